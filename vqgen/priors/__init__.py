"""The prior over the codes, and sampling from it."""
