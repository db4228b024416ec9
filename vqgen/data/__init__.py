"""The data of training: images for the tokenizer, and the tokens of images for the prior."""
