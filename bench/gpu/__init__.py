"""One script a question, for a machine with a CUDA device; each takes under ten minutes there."""
