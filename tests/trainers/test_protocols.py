"""What ranks tell each other changes only together with the number that says so.

Problem: each node's agent brings its own trainers, so in the middle of an upgrade two of them may
meet. `PROTOCOL` lets them find that out, if whoever changes what is said remembers to raise it; one
who forgets has ranks that wait for one another for ever.

So all that is said stands in `tests/golden/protocols/`, read from the source: the calls that all
ranks make together, and the functions that give what is told its form. Where that differs from the
source, either `PROTOCOL` was raised, and `BATON_GOLDEN=write` writes it anew; or nothing else is
said, as where a variable got another name, and `BATON_GOLDEN=same` does, which a reviewer sees.
"""

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "tests" / "golden" / "protocols"


@dataclass(frozen=True)
class Protocol:
    """`numbered` is the file with the number; `calls` are the methods in which ranks meet, of
    whatever is named as one of `partners`; `forms` are what they are made of, by file."""

    name: str
    files: tuple[Path, ...]
    numbered: Path
    calls: frozenset[str]
    partners: frozenset[str]
    forms: dict[str, frozenset[str]]


TRAINERS = ROOT / "trainers"
HOOK = TRAINERS / "sdk" / "baton_hook"
MEET = {"decide", "gather", "sums", "texts", "check_same", "check_none_failed", "norm"}
PROTOCOLS = [
    Protocol(
        "trainers",
        tuple(sorted(TRAINERS.glob("*.py"))),
        TRAINERS / "ranks.py",
        frozenset(MEET),
        frozenset({"world", "_world"}),
        {"ranks.py": frozenset({"Vote", "open", "_gather", "TEXT_BYTES_MAX", *MEET})},
    ),
    Protocol(
        "hook",
        tuple(sorted(HOOK.glob("*.py"))),
        HOOK / "versions.py",
        frozenset({"highest", "barrier", "gather", "of_first"}),
        frozenset({"ranks", "states"}),
        {
            "agreement.py": frozenset({"numbers_of"}),
            "ranks.py": frozenset({"highest"}),
            "shards.py": frozenset({"besides", "encode", "decode"}),
            "states.py": frozenset({"gather", "of_first"}),
            "versions.py": frozenset({"first_word", "second_word"}),
        },
    ),
]


def number_of(source: str) -> int:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROTOCOL":
            return int(ast.literal_eval(node.value))
    raise AssertionError("no PROTOCOL")


def said_in(protocol: Protocol, name: str, source: str) -> Iterator[str]:
    """One line for each call of all ranks, and the text of each form; comments and docstrings are
    not in them."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not is_text(one)]  # type: ignore[attr-defined]
    yield from _said(tree, protocol, name, "")


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _said(node: ast.AST, protocol: Protocol, file: str, within: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", "")
        if isinstance(child, ast.Assign):
            name = ast.unparse(child.targets[0])
        if name in protocol.forms.get(file, ()):
            yield f"{file} {ast.unparse(child)}"
            continue
        function = child.func if isinstance(child, ast.Call) else None
        if isinstance(function, ast.Attribute) and function.attr in protocol.calls:
            if ast.unparse(function.value).rpartition(".")[2] in protocol.partners:
                yield f"{file} {within}: {ast.unparse(child)}"
        deeper = isinstance(child, ast.FunctionDef | ast.ClassDef)
        yield from _said(child, protocol, file, f"{within}.{name}".strip(".") if deeper else within)


def listing(protocol: Protocol) -> str:
    said = [line for f in protocol.files for line in said_in(protocol, f.name, f.read_text())]
    return "\n\n".join([f"protocol {number_of(protocol.numbered.read_text())}", *said]) + "\n"


def verdict(kept: str, present: str) -> str:
    """The sentence; empty where nothing has to be done."""
    if present == kept:
        return ""
    (number, *before), (raised, *now) = kept.split("\n\n"), present.split("\n\n")
    if before != now and number == raised:
        new = [line for line in now if line not in before] or ["something less"]
        return (
            "what ranks tell each other has changed, and PROTOCOL has not; raise it and"
            " BATON_GOLDEN=write, or if as much is said as before BATON_GOLDEN=same:\n"
            + "\n".join(new)
        )
    return f"{number} has become {raised}: BATON_GOLDEN=write"


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_what_ranks_say_changes_with_its_number_alone(protocol: Protocol) -> None:
    path, present = KEPT / f"{protocol.name}.txt", listing(protocol)
    asked = os.environ.get("BATON_GOLDEN", "")
    wrong = verdict(path.read_text() if path.exists() else "protocol 0\n", present)
    if asked == "same" or (asked == "write" and "and PROTOCOL has not" not in wrong):
        path.write_text(present)
        return
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vote.loss, vote.stop_s, *flags", "vote.stop_s, vote.loss, *flags"),
        ("(vote.due, vote.busy, vote.tight)", "(vote.due, vote.busy)"),
        ("dtype=torch.float64", "dtype=torch.float32"),
        ("TEXT_BYTES_MAX = 1024", "TEXT_BYTES_MAX = 2048"),
    ],
)
def test_a_change_of_what_is_said_is_seen(old: str, new: str) -> None:
    protocol, name = PROTOCOLS[0], "ranks.py"
    source = (TRAINERS / name).read_text()
    assert old in source
    before, after = (
        "\n\n".join(said_in(protocol, name, s)) for s in (source, source.replace(old, new))
    )
    assert "PROTOCOL has not" in verdict(f"protocol 1\n\n{before}", f"protocol 1\n\n{after}")
    assert verdict(f"protocol 1\n\n{before}", f"protocol 2\n\n{after}").endswith("=write")


def test_a_call_more_or_in_another_turn_is_seen_and_a_comment_is_none() -> None:
    protocol = PROTOCOLS[1]
    first = 'def f(a):\n    """One."""\n    ranks.barrier(a)\n    return states.gather(a, 1)\n'
    told = [
        list(said_in(protocol, "trainer.py", source))
        for source in (
            first,
            first.replace("One", "Two").replace("(a)\n    ret", "(a)  # why\n    ret"),
            first.replace("ranks.barrier(a)", "states.gather(a, 1)").replace(
                "return", "ranks.barrier(a);"
            ),
            first + "    ranks.barrier(a)\n",
        )
    ]
    assert (
        told[0]
        == told[1]
        == ["trainer.py f: ranks.barrier(a)", "trainer.py f: states.gather(a, 1)"]
    )
    assert told[0] != told[2]
    assert len(told[3]) == 3
