"""What the trainers promise: exact resumption, honest configuration, and a polite SDK."""
