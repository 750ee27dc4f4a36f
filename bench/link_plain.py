"""What plain `grpc.aio` costs with the agents of `bench.link`: the floor of what is built on it.

Problem: a floor that was measured on another machine, another day, with another load says little
about this one. So in the same run the same agents talk to a server that decides nothing, keeps
nothing and answers everything at once, with the collector on the same rule as the coordinator's,
and the same poller (`coordinator/__main__.py`).
"""

import asyncio
import os
import sys

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

import grpc
from google.protobuf.duration_pb2 import Duration

from coordinator.garbage import collect_seldom
from protos.baton.v1 import agent_pb2, agent_pb2_grpc


class Plain(agent_pb2_grpc.AgentServiceServicer):
    def __init__(self, heartbeat_s: int) -> None:
        self._interval = Duration(seconds=heartbeat_s)

    async def Session(  # type: ignore[override]
        self, request_iterator: object, context: grpc.aio.ServicerContext[object, object]
    ) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            assert isinstance(request, agent_pb2.SessionRequest)
            await context.write(self._answer(request))

    def _answer(self, request: agent_pb2.SessionRequest) -> agent_pb2.SessionResponse:
        match request.WhichOneof("message"):
            case "hello":
                welcome = agent_pb2.Welcome(heartbeat_interval=self._interval)
                return agent_pb2.SessionResponse(welcome=welcome)
            case "heartbeat":
                renewal = agent_pb2.LeaseRenewal(heartbeat_sequence=request.heartbeat.sequence)
                return agent_pb2.SessionResponse(lease_renewal=renewal)
            case _:
                ack = agent_pb2.EventAck(sequence=request.event.sequence)
                return agent_pb2.SessionResponse(event_ack=ack)


async def main(heartbeat_s: int) -> None:
    """Writes its port on standard output, and serves until it is killed."""
    server = grpc.aio.server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(Plain(heartbeat_s), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await collect_seldom()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
