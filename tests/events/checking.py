"""What is logged while tests run must be registered: a production run would only mark it."""

from collections.abc import Iterable

from tests.events.test_code import PROGRAMS


def check(program: str, level: str, name: str, fields: Iterable[tuple[str, object]]) -> None:
    """Raises `AssertionError` with a sentence."""
    event = PROGRAMS[program][0].get(name)
    assert event is not None, f"{program} logs {name}, which is not registered"
    assert level == event.level, f"{program} logs {name} as {level}, registered is {event.level}"
    strange = {field for field, _ in fields} - {*event.fields.split(), "trace_id"}
    assert not strange, f"{program} gives {name} {sorted(strange)}, which is not registered"
