"""Switching nodes on and off: one interface, one conformance suite, a driver for each way."""
