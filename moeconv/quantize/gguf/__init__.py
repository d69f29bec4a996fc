"""GGUF files for llama.cpp: format.py has the record of the format, llama_cpp/ what llama.cpp calls each family."""
