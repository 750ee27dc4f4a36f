"""Comparisons that print a table and a ratio, measured side by side in one run."""
