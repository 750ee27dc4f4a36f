"""`python -m agent` and `baton-agent`: see `main.py`."""

import sys

# structlog takes rich, where it is installed, for tracebacks that a daemon never prints: 5 MiB.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]

from agent.main import main  # noqa: E402 - the line above comes first

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
