"""Everything that must hold. `make check` runs the fast part, `make test` all of it."""
