"""How gRPC polls for the coordinator's server (`coordinator/__main__.py`)."""

import os
import subprocess
import sys

NAME = "GRPC_EXPERIMENTS"
SERVE = """
import asyncio, os
import coordinator.__main__
import grpc

async def serve():
    server = grpc.aio.server()
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await server.stop(0)

asyncio.run(serve())
print(os.environ["GRPC_EXPERIMENTS"])
"""


def served(**variables: str) -> tuple[str, str]:
    """What is in force, and what gRPC has said."""
    kept = {name: value for name, value in os.environ.items() if name != NAME}
    command = [sys.executable, "-P", "-c", SERVE]
    done = subprocess.run(
        command, env={**kept, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


def test_this_version_of_grpc_knows_the_choice() -> None:
    """With one that does not, measure again (`bench.link`), and take the line away."""
    assert served() == ("-event_engine_listener", "")
    assert "Unknown experiment" in served(GRPC_EXPERIMENTS="-no_such_thing")[1]


def test_an_operator_s_own_choice_stands() -> None:
    assert served(GRPC_EXPERIMENTS="event_engine_listener")[0] == "event_engine_listener"
