"""`python -m coordinator` and `baton-coordinator`: see `main.py`."""

import os
import sys

# Since its event engine polls for servers in Python too (https://github.com/grpc/grpc/pull/41432),
# gRPC hands every message from one of its threads to another before ours hears of it: twice the
# context switches of the poller before it, and a tenth more CPU (`bench.link`). A version that has
# this choice no more takes its own way. Read when gRPC is imported.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

# It writes lines of its own to stderr, past `logging`, and whoever reads our log reads JSON. What
# goes wrong with a call we log; of handshakes that fail ERROR tells more.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# structlog takes rich, where it is installed, for tracebacks that a daemon never prints: 5 MiB.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]

from coordinator.leaving import leave  # noqa: E402 - the line above comes first
from coordinator.main import main as serve  # noqa: E402


def main() -> int:
    """Exit status, as `coordinator.main` says; 1 after a bug of ours."""
    status = 1
    try:
        status = serve()
    finally:
        leave(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
