"""The common part of the training loops, which knows no model and no loss."""
