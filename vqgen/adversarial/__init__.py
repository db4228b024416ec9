"""Adversarial training: the discriminators, the losses of both sides, and the plain GAN."""
