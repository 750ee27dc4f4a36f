"""Training programs that know nothing of Baton, for comparisons."""
