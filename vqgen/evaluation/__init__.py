"""How good images, reconstructions and priors are, with how each figure was made."""
