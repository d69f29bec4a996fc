"""The rows of llama.cpp, one file per vendor; each has ROWS, model_type -> row. find.py reads every file here."""
