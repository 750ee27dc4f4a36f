"""The table of XIDs: ours says what NVIDIA's catalogue says, and a wrong one is refused."""

from pathlib import Path

import pytest

from agent.core.health import Action
from agent.telemetry.xid_table import TableError, load_table, parse_table

HEAD = 'version = 1\nsource = "us"\ndate = "2026-01-31"\nunlisted = "inspect"\n'


@pytest.mark.parametrize(
    ("codes", "action"),
    [
        ((13, 31, 68, 69, 94), Action.RESTART_APPLICATION),
        ((46, 48, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143), Action.RESET),
        ((79,), Action.REBOOT),
        ((154,), Action.READ),
        ((43, 45, 63, 92), Action.IGNORE),
        ((61, 74, 999), Action.INSPECT),
    ],
)
def test_our_table_is_the_catalogue(codes: tuple[int, ...], action: Action) -> None:
    table = load_table()
    assert {code: table.rule(code).action for code in codes} == dict.fromkeys(codes, action)
    assert [code for code, rule in table.rules.items() if rule.lost] == [79]
    assert "docs.nvidia.com" in table.source
    assert table.date == "2025-10-29"


def test_an_operators_table_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "xids.toml"
    path.write_text(HEAD + '[xids]\n95 = { action = "reboot", name = "ours", lost = true }\n')
    rule = load_table(str(path)).rule(95)
    assert (rule.action, rule.name, rule.lost) == (Action.REBOOT, "ours", True)
    assert load_table(str(path)).rule(79).action is Action.INSPECT


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("version = 2\n", "has version 2; this agent reads version 1"),
        ("", "says no version"),
        ("version = ", "is not TOML"),
        (HEAD, "missing required field `xids`"),
        (HEAD + '[xids]\n95 = { action = "explode", name = "x" }\n', "explode"),
        (HEAD + '[xids]\nabc = { action = "reset", name = "x" }\n', "xids"),
        (HEAD + '[xids]\n95 = { action = "reset", name = "x", colour = 1 }\n', "colour"),
        (HEAD.replace("2026-01-31", "lately") + "[xids]\n", "date"),
        (HEAD.replace("inspect", "read") + "[xids]\n", "an unlisted XID says no action"),
    ],
)
def test_a_wrong_table_is_refused_with_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(TableError) as caught:
        parse_table(text, "site.toml")
    assert sentence in str(caught.value)
    assert "site.toml" in str(caught.value)


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="cannot be read"):
        load_table(str(tmp_path / "none.toml"))
    path = tmp_path / "latin.toml"
    path.write_bytes(b"\xff")
    with pytest.raises(TableError, match="not UTF-8"):
        load_table(str(path))
