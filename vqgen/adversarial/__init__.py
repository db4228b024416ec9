"""The discriminators and what they and their opponents minimise; the plain GAN."""
