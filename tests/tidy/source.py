"""The files that the rules look at: found once, parsed once.

Which files? Those that belong to the project. Asking git would be exact, but would judge a release
tarball by nothing at all; so the tree is walked, leaving out what is hidden or built. Generated
code is read (others import it) but never judged.
"""

import ast
import os
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
_SKIPPED = {"__pycache__", "build", "dist", "node_modules"}
_HIDDEN_BUT_OURS = {".ci", ".importlinter", ".gitignore"}
_GENERATED_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


@dataclass(frozen=True)
class Source:
    """One text file: its path from the repository root, with slashes, and what it says."""

    path: str
    text: str

    @property
    def is_python(self) -> bool:
        return self.path.endswith(".py")

    @property
    def is_generated(self) -> bool:
        return self.path.endswith(_GENERATED_SUFFIXES)

    @property
    def is_core(self) -> bool:
        """Does it belong to a pure decision core?"""
        return self.path.startswith(("agent/core/", "coordinator/core/"))

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed module; raises `SyntaxError` for what is not Python."""
        return ast.parse(self.text, filename=self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All of `tree`: a walk takes longer than any rule, and each of ten walked anew."""
        return list(ast.walk(self.tree))

    @property
    def module(self) -> str:
        """The dotted name that it is imported by."""
        parts = list(PurePosixPath(self.path).with_suffix("").parts)
        if parts[:2] == ["trainers", "sdk"]:
            parts = parts[2:]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@dataclass(frozen=True)
class Finding:
    """A broken rule: where, and a sentence with the numbers or names in it."""

    path: str
    line: int
    sentence: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.sentence}"


@cache
def project_sources(root: Path = ROOT) -> tuple[Source, ...]:
    """Every text file of the project, sorted by path."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if _is_ours(name)]
        for name in files:
            path = Path(folder) / name
            if _is_ours(name) and path.is_file():
                text = _text_of(path)
                if text is not None:
                    found.append(Source(path.relative_to(root).as_posix(), text))
    return tuple(sorted(found, key=lambda source: source.path))


def _is_ours(name: str) -> bool:
    hidden = name.startswith(".") and name not in _HIDDEN_BUT_OURS
    return not hidden and name not in _SKIPPED and not name.endswith(".egg-info")


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None  # a picture or a built library: nothing here to read
