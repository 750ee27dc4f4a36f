"""One conformance suite for every store, and what only a file can do to us."""
