"""The coordinator: a pure core that decides who runs where, in a thin shell that acts."""
