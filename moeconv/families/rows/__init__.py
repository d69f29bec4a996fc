"""The families as rows of data, a file for each vendor: each defines VENDOR, and the registry finds it by itself.

Defaults of config keys are those of transformers' configuration classes (5.23).
"""
