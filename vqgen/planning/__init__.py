"""What a training run will cost, before it starts."""
