"""Writes the Python code of the contract, and proves that the committed code is current.

Problem: generated code that is committed can drift from its .proto, and generated code that is not
committed makes every clone need a compiler. So it is committed, and `--check` generates again into
an empty directory and compares.

The obvious way (protoc with the repository as include root) would name the files
`protos/baton/v1/...` on the wire, where other languages expect `baton/v1/...`. The include root is
therefore `protos/`, and the imports that protoc writes (`from baton.v1 import jobs_pb2`) are
rewritten to the import package that the files really live in (`protos.baton.v1`).

    python -m protos.generate           writes *_pb2*.py and *_pb2*.pyi beside the .proto files
    python -m protos.generate --check   writes nothing; exit 1 and the files that differ, on drift

Determinism: inputs are sorted, the plugins run from this very environment, and versions are pinned
in constraints.txt.
"""

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

INCLUDE_ROOT = Path(__file__).resolve().parent
PACKAGE = Path("baton/v1")
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")

# `from baton.v1 import x_pb2`, `import baton.v1.x_pb2`, and uses of that long name (one becomes
# `__module__` of every message). The names in the serialized descriptor ("baton/v1/x.proto",
# "baton.v1.Job") must stay as they are.
_IMPORT = re.compile(r"^(\s*)(from|import) baton\.v1\b", re.MULTILINE)
_LONG_NAME = re.compile(r"(?<![\w.])baton\.v1\.(\w+_pb2)\b")


class GenerateError(Exception):
    """protoc refused; the text is what it said."""


def rewrite_imports(text: str) -> str:
    """Point generated imports at `protos.baton.v1`. Doing it twice is doing it once."""
    return _LONG_NAME.sub(r"protos.baton.v1.\1", _IMPORT.sub(r"\1\2 protos.baton.v1", text))


def generate(include_root: Path, output_root: Path) -> list[Path]:
    """Compile every `.proto` of the package below `output_root`; returns the files, sorted.

    Raises `GenerateError` when there is nothing to compile or protoc reports an error.
    """
    sources = sorted((include_root / PACKAGE).glob("*.proto"))
    if not sources:
        raise GenerateError(f"there is no .proto file in {include_root / PACKAGE}")
    scripts = Path(sysconfig.get_path("scripts"))
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--proto_path={include_root}",
        f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
        f"--python_out={output_root}",
        f"--grpc_python_out={output_root}",
        f"--mypy_out=quiet:{output_root}",
        f"--mypy_grpc_out=quiet:{output_root}",
        *(str(source) for source in sources),
    ]
    output_root.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise GenerateError(result.stderr.strip() or f"protoc left with {result.returncode}")
    written = generated_files(output_root)
    for path in written:
        path.write_text(rewrite_imports(path.read_text(encoding="utf-8")), encoding="utf-8")
    return written


def generated_files(root: Path) -> list[Path]:
    """The generated files that lie below `root`, sorted."""
    candidates = sorted((root / PACKAGE).iterdir()) if (root / PACKAGE).is_dir() else []
    return [path for path in candidates if path.name.endswith(SUFFIXES)]


def drift(include_root: Path = INCLUDE_ROOT) -> list[str]:
    """One sentence for each committed file that is not what its .proto says; empty: no drift."""
    with tempfile.TemporaryDirectory(prefix="baton-protos-") as scratch:
        fresh = {path.name: path.read_bytes() for path in generate(include_root, Path(scratch))}
    committed = {path.name: path.read_bytes() for path in generated_files(include_root)}
    findings = []
    for name in sorted(fresh.keys() | committed.keys()):
        if name not in committed:
            findings.append(f"{PACKAGE / name} is missing")
        elif name not in fresh:
            findings.append(f"{PACKAGE / name} has no .proto any more")
        elif fresh[name] != committed[name]:
            findings.append(f"{PACKAGE / name} differs from what its .proto generates")
    return findings


def main(arguments: list[str] | None = None) -> int:
    """Generate, or check; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m protos.generate", description="Generate code.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on drift")
    options = parser.parse_args(arguments)
    try:
        findings = drift() if options.check else []
        written = [] if options.check else generate(INCLUDE_ROOT, INCLUDE_ROOT)
    except GenerateError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for finding in findings:
        sys.stderr.write(f"{finding}; run: make protos\n")
    if written:
        sys.stdout.write(f"{len(written)} files written below {INCLUDE_ROOT / PACKAGE}\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
