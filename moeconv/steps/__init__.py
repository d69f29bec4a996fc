"""The steps of a pipeline, a function each: parameters in, the JSON object of the command contract out.

The command line, recipes and the demo all call these; nothing here prints.
"""
