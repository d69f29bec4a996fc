"""`moeconv import`: a GGUF file as a checkpoint of transformers."""
