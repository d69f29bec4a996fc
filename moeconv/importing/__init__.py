"""`moeconv import`: a GGUF file as a transformers checkpoint."""
