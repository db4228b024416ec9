"""The tokenizer: image -> code maps -> image."""
