"""What we say of versions agrees, wherever it is said.

Problem: a lower bound is never installed here, so it goes wrong unseen: code that grpcio-tools
generates refuses any older grpcio and protobuf, and a bound may rise above what is pinned.
"""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.tidy.source import ROOT

pytestmark = pytest.mark.xdist_group("tidy")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"].values()
REQUIREMENTS = [Requirement(text) for group in (PROJECT["dependencies"], *EXTRAS) for text in group]
PINNED = {
    pin.name: next(iter(pin.specifier)).version
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for pin in [Requirement(line)]
}


def bound(name: str) -> str:
    """The lowest version of it that we say we run with."""
    return next(
        clause.version
        for requirement in REQUIREMENTS
        if requirement.name == name
        for clause in requirement.specifier
        if clause.operator == ">="
    )


def test_what_is_required_is_pinned_within_its_bounds() -> None:
    wrong = [
        str(requirement)
        for requirement in REQUIREMENTS
        if PINNED.get(requirement.name, "0") not in requirement.specifier
    ]
    assert wrong == []


def test_extras_that_the_tests_need_have_the_same_bounds() -> None:
    said: dict[str, set[str]] = {}
    for requirement in REQUIREMENTS:
        said.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: bounds for name, bounds in said.items() if len(bounds) > 1} == {}


def test_nothing_older_than_what_generated_code_takes_is_admitted() -> None:
    generated = ROOT / "protos" / "baton" / "v1"
    stub = (generated / "jobs_pb2_grpc.py").read_text(encoding="utf-8")
    message = (generated / "jobs_pb2.py").read_text(encoding="utf-8")
    grpc = re.search(r"GRPC_GENERATED_VERSION = '(.+)'", stub)
    protobuf = re.search(r"Protobuf Python Version: (.+)", message)
    assert grpc is not None
    assert protobuf is not None
    names = ("grpcio", "grpcio-health-checking", "grpcio-reflection", "protobuf")
    assert [bound(name) for name in names] == [grpc[1]] * 3 + [protobuf[1]]


def test_documents_name_the_versions_of_torch_and_python() -> None:
    said = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    assert f"torch {bound('torch')} or later" in said
    assert f"pinned to {PINNED['torch']}" in said
    pythons = [
        entry.rpartition(" ")[2]
        for entry in PROJECT["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", entry)
    ]
    assert f"Python {', '.join(pythons[:-1])} and {pythons[-1]}" in said
    assert Version(pythons[0]) == Version(PROJECT["requires-python"].removeprefix(">="))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert " ".join(f"python{version}" for version in pythons) in makefile
