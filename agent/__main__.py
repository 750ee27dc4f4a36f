"""`python -m agent` and `baton-agent`: see `main.py`."""

import os
import sys

# As in `coordinator/__main__.py`, for the client's side: a fifth less CPU for an agent at rest.
# gRPC reads it when it is imported, and trainers do not inherit it.
_POLLER = "GRPC_EXPERIMENTS"
_is_ours = _POLLER not in os.environ
os.environ.setdefault(_POLLER, "-event_engine_client,-event_engine_listener")

# structlog takes rich, where it is installed, for tracebacks that a daemon never prints: 5 MiB.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]

from agent.main import main  # noqa: E402 - the line above comes first

if _is_ours:
    del os.environ[_POLLER]

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
