"""That all ranks speak one protocol, found out before they speak it.

Problem: each node's agent brings the hook that came with it. Where one node was upgraded and
another was not, one rank takes part in a collective that the other does not know, and both wait for
ever, on GPUs that nobody else gets.

How: the protocol has a number, and the first collective of a call of `train`, by which ranks that
are left alone are found since the first hook, carries it: a number, of which the highest of all
ranks counts. One that is left alone says 1, and hooks from before the numbers say 0, so what is
below 0 are numbers alone. Then each says its number and its node, and where they differ all leave
with the same sentence and a status of its own, to be run again for as long as that takes. These two
steps, and the form of what is said in them, stay as they are in every later protocol.
"""

import json
from collections.abc import Sequence

PROTOCOL = 1
"""What ranks tell each other, in which order and form (`trainer`, `agreement`, `shards`,
`states`). One higher with each change of that."""

EXIT_PROTOCOL = 76
"""EX_PROTOCOL of sysexits.h, as of the built-in trainers: no failure of the job's."""

LEFT_ALONE = 1
UNNUMBERED = 0
"""What is said in the first step, beside numbers below 0."""


def first_word(ours: bool) -> int:
    """Whether this rank's Trainer is ours to follow, and with what protocol."""
    return -PROTOCOL if ours else LEFT_ALONE


def second_word(node: str) -> bytes:
    """Which node has which protocol."""
    return json.dumps([node, PROTOCOL]).encode()


def unnumbered(node: str) -> str:
    """The sentence, where a rank has said `UNNUMBERED`; which one is not known."""
    return (
        f"the hook of {node} speaks protocol {PROTOCOL}, and another rank's an older one without a"
        " number: upgrade the agents on the other nodes of this job"
    )


def problem(words: Sequence[bytes]) -> str:
    """The sentence, by the second words of all ranks; empty where they agree. Raises ValueError
    for what is no second word."""
    found: dict[tuple[str, int], None] = {}
    for word in words:
        node, protocol = json.loads(word)
        found[str(node), int(protocol)] = None
    newest = max(protocol for _, protocol in found)
    older = [node for node, protocol in found if protocol < newest]
    if not older:
        return ""
    spoken = ", ".join(f"{protocol} on {node}" for node, protocol in found)
    return (
        f"the hooks of this job's ranks speak different protocols, {spoken}: upgrade the agent on"
        f" {' and '.join(older)}"
    )
