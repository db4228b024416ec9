"""Measures images, reconstructions and priors, and records how each figure was made."""
