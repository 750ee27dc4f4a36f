"""Scenarios as text, with the traces that reviewers read."""
