"""The prior over the codes, and drawing from it."""
