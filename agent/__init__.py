"""The node agent: a pure core that decides, and a thin shell that does what it says."""
