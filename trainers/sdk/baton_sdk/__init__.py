"""What a training process says to the agent that started it, in calls that never hold it up.

    session = baton_sdk.connect()
    if session.restore_directory is not None:
        load(session.restore_directory)
    for step in range(session.restore_step, total_steps):
        train()
        session.progress(step + 1, total_steps, {"loss": loss})
        if session.stop_requested:
            save(directory := session.staging_directory / f"checkpoint-{step + 1}")
            session.checkpoint(directory, step + 1).wait_stored(session.stop_requested.remaining_s)
            session.close()
            sys.exit(baton_sdk.EXIT_RUN_AGAIN)

The obvious way, a client that talks to the agent from the training loop, makes training wait for
a process that may be restarting, or fail with it. Here a background thread owns the socket
(``link.py``), the training loop only leaves notes in bounded pigeonholes (``mailbox.py``), and
when there is no agent the same calls do nothing. Standard library only: it must be importable
into any training environment.
"""

from baton_sdk.mailbox import Ticket, TicketState
from baton_sdk.session import (
    DUMP_SIGNAL,
    EXIT_RUN_AGAIN,
    OF_THIS_RANK,
    Session,
    StopRequest,
    connect,
)
from baton_sdk.slab import Slab

__all__ = [
    "DUMP_SIGNAL",
    "EXIT_RUN_AGAIN",
    "OF_THIS_RANK",
    "Session",
    "Slab",
    "StopRequest",
    "Ticket",
    "TicketState",
    "connect",
]
