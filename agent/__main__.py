"""`python -m agent` and `baton-agent`: see `main.py`."""

import os
import sys

# As in `coordinator/__main__.py`, for the client's side: a fifth less CPU for an agent at rest.
# gRPC reads both when it is imported, and trainers do not inherit them.
_CHOICES = {
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
    "GRPC_VERBOSITY": "NONE",
}
_ours = [name for name in _CHOICES if name not in os.environ]
os.environ.update({name: _CHOICES[name] for name in _ours})

# structlog takes rich, where it is installed, for tracebacks that a daemon never prints: 5 MiB.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]

from agent.main import main  # noqa: E402 - the line above comes first

for _name in _ours:
    del os.environ[_name]

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
