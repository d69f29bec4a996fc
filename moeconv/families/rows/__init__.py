"""The families as rows of data, in one file per vendor, which defines VENDOR. The registry finds new files by itself.

Defaults of config keys are those of transformers' configuration classes (5.23).
"""
