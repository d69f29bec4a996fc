"""The command line: a thin function a verb over the library, and the one output sink."""
