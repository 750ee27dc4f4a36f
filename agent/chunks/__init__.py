"""Checkpoints of this node: content-addressed on disk, copied to peers and shared directories, laid
out for a new attempt."""
