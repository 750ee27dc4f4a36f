"""How gRPC polls for the coordinator's server and for an agent, and what it says (their
`__main__.py`)."""

import os
import subprocess
import sys

import pytest

NAME = "GRPC_EXPERIMENTS"
LEFT = f"""
import os
print(os.environ.get({NAME!r}, ""))
"""
TAKEN = """
import asyncio
import socket
import grpc

async def serve():
    with socket.create_server(("127.0.0.1", 0)) as other:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        try:
            server.add_insecure_port(f"127.0.0.1:{other.getsockname()[1]}")
        except RuntimeError:
            print("it is taken")

asyncio.run(serve())
"""
LOUD = {"GRPC_VERBOSITY": "ERROR"}
SERVE = f"""
import asyncio
import coordinator.__main__
import grpc

async def serve():
    server = grpc.aio.server()
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await server.stop(0)

asyncio.run(serve())
{LEFT}"""
DIAL = f"""
import agent.__main__
import grpc

with grpc.insecure_channel("127.0.0.1:1"):
    pass
{LEFT}"""


def said(script: str, **variables: str) -> tuple[str, str]:
    """What is in the environment then, and what gRPC has said."""
    kept = {name: value for name, value in os.environ.items() if name not in (NAME, *LOUD)}
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(
        command, env={**kept, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(("script", "left"), [(SERVE, "-event_engine_listener"), (DIAL, "")])
def test_this_version_of_grpc_knows_the_choice(script: str, left: str) -> None:
    """With one that does not, measure again (`bench.link`, `bench.agent`), and take the line away.
    What an agent chooses is not for the jobs that it starts."""
    assert said(script, **LOUD) == (left, "")
    assert "Unknown experiment" in said(script, GRPC_EXPERIMENTS="-no_such_thing")[1]


@pytest.mark.parametrize("program", ["agent", "coordinator"])
def test_grpc_writes_no_lines_of_its_own_between_those_of_the_log(program: str) -> None:
    script = f"import {program}.__main__{TAKEN}"
    assert said(script) == ("it is taken", "")
    assert "Address already in use" in said(script, **LOUD)[1]


@pytest.mark.parametrize("script", [SERVE, DIAL])
def test_an_operator_s_own_choice_stands(script: str) -> None:
    assert said(script, GRPC_EXPERIMENTS="event_engine_listener")[0] == "event_engine_listener"
