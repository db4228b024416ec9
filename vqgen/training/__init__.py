"""What the training loops share; it knows no model and no loss."""
