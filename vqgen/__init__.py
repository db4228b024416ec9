"""vqgen: a two-stage image generator. Stage 1 turns images into discrete codes, stage 2 learns to write them."""

__version__ = "0.1.0"
