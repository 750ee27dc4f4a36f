"""The list of events is closed: the code logs what is on it, with its fields, and all of it."""

import re
from collections.abc import Iterable, Iterator, Mapping

import pytest

from agent.events import EVENTS as AGENT_EVENTS
from agent.events import FIELDS as AGENT_FIELDS
from agent.logs import Event as AgentEvent
from coordinator.events import EVENTS as COORDINATOR_EVENTS
from coordinator.events import FIELDS as COORDINATOR_FIELDS
from coordinator.logs import Event as CoordinatorEvent
from tests.events.sites import LEVELS, Site, Unreadable, sites
from tests.tidy.source import Source, project_sources

Events = Mapping[str, AgentEvent] | Mapping[str, CoordinatorEvent]
PROGRAMS: dict[str, tuple[Events, Mapping[str, str]]] = {
    "agent": (AGENT_EVENTS, AGENT_FIELDS),
    "coordinator": (COORDINATOR_EVENTS, COORDINATOR_FIELDS),
}
both = pytest.mark.parametrize("program", PROGRAMS)


def found_in(program: str) -> list[Site]:
    return [
        site
        for source in project_sources()
        if source.path.startswith(f"{program}/") and source.is_python and not source.is_generated
        for site in sites(source)
    ]


def differences(found: Iterable[Site], events: Events) -> Iterator[str]:
    """A sentence for each way in which code and list differ."""
    levels = {name: event.level for name, event in events.items()}
    given: dict[str, set[str]] = {}
    opened = set()
    for site in found:
        names = site.events(levels)
        if not names:
            yield f"{site.where} logs {' or '.join(site.names)}, which is not registered"
        for name in names:
            event = events[name]
            given.setdefault(name, set()).update(site.fields)
            if site.is_open:
                opened.add(name)
            if site.level not in ("", event.level):
                yield f"{site.where} logs {name} as {site.level}; registered is {event.level}"
            for field in sorted(site.fields - set(event.fields.split())):
                yield f"{site.where} gives {name} the field {field}, which is not registered"
    for name, event in events.items():
        if name not in given:
            yield f"nobody logs {name}"
        elif name not in opened:
            for field in sorted(set(event.fields.split()) - given[name]):
                yield f"nobody gives {name} its field {field}"


@both
def test_the_code_logs_what_is_registered(program: str) -> None:
    assert list(differences(found_in(program), PROGRAMS[program][0])) == []


@both
def test_the_list_is_sorted_and_says_everything(program: str) -> None:
    events, glossary = PROGRAMS[program]
    assert list(events) == sorted(events)
    assert list(glossary) == sorted(glossary)
    used = set()
    for event in events.values():
        assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)?", event.name)
        assert event.level in LEVELS
        assert event.meaning.endswith(".")
        fields = event.fields.split()
        assert set(re.findall(r"\{(\w+)", event.msg)) <= set(fields), event.name
        used.update(fields)
    assert used == set(glossary)


EVENT = AgentEvent("disk.full", "warning", "reason path", "the disk is full: {reason}", "Help.")


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("log.warning('disk.full', reason='', path='')", None),
        ("log.warning('disk.fill', reason='', path='')", "which is not registered"),
        ("log.error('disk.full', reason='', path='')", "as error; registered is warning"),
        ("log.warning('disk.full', reason='', path='', size=1)", "the field size"),
        ("log.warning('disk.full', reason='')", "nobody gives disk.full its field path"),
        ("log.warning('disk.full', **fields)", None),
        ("pass", "nobody logs disk.full"),
        ("state.log('warning', f'disk.{phase}', reason='', path='')", None),
        ("state.log('warning', f'disc.{phase}', reason='', path='')", "which is not registered"),
        ("logging_setup.emit('warning', 'disk.full', (('reason', 1), ('path', 2)))", None),
        ("logging_setup.emit('warning', 'disk.full', (('raison', 1), ('path', 2)))", "raison"),
        ("pairs = (('reason', 1), ('size', 2))\nNotice('warning', 'disk.full', pairs)", "size"),
    ],
)
def test_a_difference_is_found(code: str, sentence: str | None) -> None:
    found = list(differences(sites(Source("agent/x.py", code)), {EVENT.name: EVENT}))
    if sentence is None:
        assert found == []
    else:
        assert any(sentence in one for one in found), found


def test_a_name_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(Unreadable, match=r"x\.py:1: name is no name"):
        list(sites(Source("agent/x.py", "log.info(name)")))
