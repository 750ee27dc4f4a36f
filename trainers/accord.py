"""What a loop does after a step, where all ranks must do the same: go on, save, stop.

Problem: see ``ranks``. The loop should not be written twice, once for a rank that may look at its
own clock and its own stop request whenever it likes, and once for ranks that may not. So it asks
here. One rank is answered at once, from what there is to know at that moment; several from what
they told each other in their last step, so that each answer is everybody's.
"""

import time
from dataclasses import replace

import baton_sdk
from trainers.ranks import NO_STOP_S, Decision, Vote, World
from trainers.saving import Saver

STOPPED_BY_ANOTHER = "another rank was asked to stop"


class Accord:
    """Of one training, in its one thread."""

    def __init__(self, world: World, session: baton_sdk.Session, saver: Saver) -> None:
        self._world = world
        self._session = session
        self._saver = saver
        self._decision = Decision(loss=0.0, stop_s=NO_STOP_S, save=False)

    def begin(self) -> None:
        """Before the first step: a stop may have come already. A collective."""
        self._decide(Vote(loss=0.0))

    @property
    def tight(self) -> bool:
        """Whether any rank's memory was nearly full after the last step."""
        return self._decision.tight

    def after_step(self, share: float, step: int, waited_s: float, *, tight: bool = False) -> float:
        """Tell the others of a step, of which ``share`` is this rank's share of the mean loss, so
        many seconds after the last checkpoint, with ``tight`` memory or not. Returns the mean loss.
        A collective."""
        due = self._world.first and not self._world.alone and self._saver.due(step, waited_s)
        # While its last part waits at the agent a newer one would take that one's place, here and
        # not elsewhere: the ranks' agents would keep different steps, and none would be common.
        busy = self._saver.blocked or self._saver.waiting
        self._decide(Vote(loss=share, due=due, busy=busy, tight=tight))
        return self._decision.loss

    def save(self, step: int, waited_s: float) -> bool:
        """Whether a checkpoint is to be taken now."""
        if self._world.alone:
            return self._saver.due(step, waited_s)
        return self._decision.save

    def stop(self) -> baton_sdk.StopRequest | None:
        """The stop to be obeyed now. One that has come to this rank since the last step waits until
        the others have heard of it."""
        own = self._session.stop_requested
        if self._world.alone:
            return own
        if not self._decision.stop:
            return None
        grace_ms = int(self._decision.stop_s * 1000)
        return own or baton_sdk.StopRequest(STOPPED_BY_ANOTHER, grace_ms, time.monotonic())

    def _decide(self, vote: Vote) -> None:
        stop = self._session.stop_requested
        if stop is not None:
            vote = replace(vote, stop_s=stop.remaining_s)
        self._decision = self._world.decide(vote)
