"""Other people's file formats: PEFT, NumPy and GGUF."""
