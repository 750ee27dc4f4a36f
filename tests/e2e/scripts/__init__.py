"""Training scripts as people bring them, with nothing of Baton in them."""
