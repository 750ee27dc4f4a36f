"""A hello: refused, let in at once, or let in when its turn comes.

Problem: `admission.py` says who is next; somebody has to see that whoever stands in line is neither
lost meanwhile nor forgotten. While its stream is open a node in line has been heard, so it is not
lost; when it closes, the node is as one whose connection has closed. Nobody in line is sent
anything but for how long, so its hello says later what it said when it came, as if it had been long
on its way; whatever has happened since comes in the events after it.

A slow machine is behind its slots. So a batch lets in no more than come free in a tick, and what
the agents that are in have to say is heard between two batches; who has waited for longer than it
was told is told again, and does not take the coordinator for dead.
"""

from coordinator.core import admission, health, leases, nodes, power
from coordinator.core.admission import Waiting
from coordinator.core.live import Rival
from coordinator.core.messages import CloseSession, ComeLater, Goodbye, Hello, Send
from coordinator.core.phases import NodePhase
from coordinator.core.state import Instant, LiveNode, State

# Twice what one coordinator is meant for; beyond that somebody is joining by mistake.
NODES_MAX = 20_000
# Let in by one batch: as many as come free in this time.
BATCH_MS = 250
# How much longer than it was told an agent has waited when it is told again; less than any lease.
LATE_MS = 1_000
# A node in line is not lost until so long after what it was told last.
EXPECTED_MS = 10_000
# So long after it was turned away last people see an agent that has another one's name, and so
# often the log says it of one that comes again and again.
RIVAL_MS = 60_000
NEWER = "a newer session took its place"


def hello(state: State, now: Instant, session: int, body: Hello) -> None:
    """Somebody wants in, or is in already and says again what it has."""
    line, rate = state.admission, state.options.hellos_per_s
    if state.sessions.get(session) == body.node:
        _let_in(state, now, session, body)
        return
    refusal = _refuse(state, now, session, body)
    if not refusal and body.node not in line.line and len(line.line) >= NODES_MAX:
        refusal = f"{NODES_MAX} agents stand in line already"
    if refusal:
        _send_away(state, now, session, body, refusal)
    elif not line.line and admission.take_slot(line, now.now_ms, rate):
        _let_in(state, now, session, body)
    else:
        _stand(state, now, session, body)


def let_in(state: State, now: Instant) -> None:
    """Whose turn it is, at the end of a batch."""
    line, rate = state.admission, state.options.hellos_per_s
    for _ in range(max(1, rate * BATCH_MS // 1_000)):
        if not line.line or not admission.take_slot(line, now.now_ms, rate):
            return
        waiting = admission.first(line)
        refusal = _refuse(state, now, waiting.session, waiting.hello)
        if refusal:
            _send_away(state, now, waiting.session, waiting.hello, refusal)
        else:
            _let_in(state, now, waiting.session, waiting.hello)


def tick(state: State, now: Instant) -> None:
    """Who was told less than it takes is told again."""
    for place, waiting in enumerate(state.admission.line.values()):
        if waiting.told_ms + LATE_MS <= now.now_ms:
            _tell(state, now, waiting, place)


def closed(state: State, now: Instant, session: int) -> None:
    """A stream has ended, of a node that is in or stands in line."""
    waiting = admission.leave(state.admission, session)
    if waiting is None:
        nodes.closed(state, now, session)
        return
    live = state.nodes.get(waiting.hello.node)
    if live is not None:
        leases.closed(state, now, live)


def goodbye(state: State, now: Instant, session: int, body: Goodbye) -> None:
    """Of one that is not in: it counts if it stands in line."""
    waiting = admission.leave(state.admission, session)
    live = None if waiting is None else state.nodes.get(waiting.hello.node)
    if live is not None:
        nodes.goodbye(state, now, live, body)


def _refuse(state: State, now: Instant, session: int, body: Hello) -> str:
    waiting = state.admission.line.get(body.node)
    if waiting is not None and session < waiting.session:
        return NEWER
    live = state.nodes.get(body.node)
    if live is None:
        full = len(state.nodes) >= NODES_MAX
        return f"{len(state.nodes)} nodes have joined and {NODES_MAX} is the limit" if full else ""
    if session <= live.newest_session and session != live.session:
        return NEWER  # what it says has been overtaken
    if live.newest_session < 0 and live.phase is not NodePhase.LOST and _is_stranger(live, body):
        return (
            f"{body.node} was on host {live.node.host.hostname} when it was seen last, before the"
            f" coordinator's restart; one on host {body.host.hostname} is let in when that one has"
            " not come"
        )
    other = live.session is not None and live.session != session
    fresh = live.heard_ms + state.options.closed_grace_ms > now.now_ms
    return _rival(now, live, body) if other and fresh else ""


def _rival(now: Instant, live: LiveNode, body: Hello) -> str:
    """Why an agent may not have the name of one that is connected. With the same journal it is that
    one, come again, unless its machine (of a container: its name) is another, or was started anew:
    none starts so fast that the connection from before is still heard."""
    there, here = live.node.host, body.host
    same_journal = live.node.journal_id == body.journal_id
    told = ((there.boot_id, here.boot_id), (there.hostname, here.hostname))
    if same_journal and all(one == other or not one or not other for one, other in told):
        return ""
    before, said_ms = live.rival, now.now_ms
    if before is not None and before.journal_id == body.journal_id:
        said_ms = before.said_ms if said_ms - before.said_ms < RIVAL_MS else said_ms
    live.rival = Rival(here.hostname, body.journal_id, now.now_ms, said_ms)
    copied = ", and without the other's state_directory, which it has a copy of"
    return (
        f"another agent is connected as {body.node} (host {there.hostname}); give this one"
        f" (host {here.hostname}) a node name of its own{copied if same_journal else ''}"
    )


def _is_stranger(live: LiveNode, body: Hello) -> bool:
    """Whether it looks like another machine than the one that is written down. After our own
    restart nobody is connected, and who comes first may be a copy of the one that runs the jobs.
    One that was not started anew since is it, whatever it is called now; else nothing runs there.
    """
    if live.node.host.boot_id and live.node.host.boot_id == body.host.boot_id:
        return False
    there, here = live.node.host.hostname, body.host.hostname
    known = {gpu.uuid for gpu in live.node.gpus}
    others = bool(known and body.gpus) and not any(gpu.uuid in known for gpu in body.gpus)
    return (bool(there and here) and there != here) or others


def describe_rival(now: Instant, live: LiveNode) -> str:
    """That its name is claimed by another agent as well, in a sentence for people; empty when it
    is not."""
    rival = live.rival
    if rival is None or now.now_ms - rival.at_ms > RIVAL_MS:
        return ""
    return (
        f"an agent on host {rival.hostname} claims the name {live.node.id} as well, and is turned"
        " away: give it one of its own"
    )


def _send_away(state: State, now: Instant, session: int, body: Hello, refusal: str) -> None:
    admission.leave(state.admission, session)
    live = state.nodes.get(body.node)
    rival = None if live is None else live.rival
    again = rival is not None and rival.at_ms == now.now_ms and rival.said_ms < now.now_ms
    if not again:
        state.log("warning", "node.refused", node=body.node, reason=refusal)
    state.commands.append(CloseSession(session, refusal))


def _let_in(state: State, now: Instant, session: int, body: Hello) -> None:
    before = state.admission.line.get(body.node)
    if before is not None:
        admission.leave(state.admission, before.session)
        state.commands.append(CloseSession(before.session, NEWER))
    nodes.hello(state, now, session, body)
    power.hello(state, now, state.nodes[body.node])
    health.reported(state, now, state.nodes[body.node], body.health)


def _stand(state: State, now: Instant, session: int, body: Hello) -> None:
    line, rate = state.admission, state.options.hellos_per_s
    if not line.line:
        reason = f"more agents want in than the {rate} a second that are let in"
        state.log("warning", "node.line", node=body.node, reason=reason)
    last = body.node not in line.line
    before = admission.stand(line, session, body, now.now_ms)
    if before is not None:
        state.commands.append(CloseSession(before, NEWER))
    place = len(line.line) - 1 if last else list(line.line).index(body.node)
    _tell(state, now, line.line[body.node], place)


def _tell(state: State, now: Instant, waiting: Waiting, place: int) -> None:
    rate = state.options.hellos_per_s
    wait_ms = admission.wait_ms(state.admission, now.now_ms, place, rate)
    waiting.told_ms = now.now_ms + wait_ms
    state.commands.append(Send(waiting.session, ComeLater(wait_ms)))
    live = state.nodes.get(waiting.hello.node)
    if live is not None:
        leases.expect(live, waiting.told_ms + EXPECTED_MS)
