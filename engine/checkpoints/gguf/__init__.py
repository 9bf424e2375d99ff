"""GGUF: one file that holds a model's metadata, tokenizer and block-quantized tensors."""
