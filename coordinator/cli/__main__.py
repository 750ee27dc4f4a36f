"""`python -m coordinator.cli`: the same as `baton`, for places where the script is not on the
path."""

from coordinator.cli.main import main

main()
