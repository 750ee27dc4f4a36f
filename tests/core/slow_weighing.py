"""Rules of a state machine: who decides over all jobs beside the loop is slow, fails, or is heard
twice.

Problem: between an order for a decision and its answer anything may happen, and the answer may
never come. These two rules are part of every machine that drives a coordinator
(`test_coordinator_machine.py` and those made of it).
"""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from coordinator.core.messages import AllocationMade, Event
from coordinator.core.weighing import answer
from tests.core.coordinator_harness import Rig


class SlowWeighing(RuleBasedStateMachine):
    rig: Rig

    def apply(self, event: Event) -> None:
        raise NotImplementedError

    @rule(at_once=st.booleans())
    def weigh(self, at_once: bool) -> None:
        self.rig.answers_at_once = at_once

    @rule(
        index=st.integers(0, 2),
        fate=st.sampled_from(["take", "take", "repeat", "fail", "lose"]),
    )
    def answer_late(self, index: int, fate: str) -> None:
        """In turn or out of turn, once or again later, with nothing in it or never; also what a
        coordinator before this one has asked."""
        if index >= len(self.rig.unanswered):
            return
        asked = self.rig.unanswered[index]
        if fate != "repeat":
            del self.rig.unanswered[index]
        if fate == "fail":
            self.apply(AllocationMade(asked.asking, None, reason="it was out of memory"))
        elif fate != "lose":
            self.apply(answer(asked))
