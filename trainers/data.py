"""A user's files as arrays: text for language models, labelled samples for transfer learning.

Problem: people have text in folders and labels in tables, and both must come out the same on every
node, or a resumed job would go on with other data. So files are read in the order of their names,
duplicates (links, copies) once; what is held out is the end of each text, so that training and
evaluation see every text and share no byte; labels are numbered in sorted order. Each reader
returns a digest of what it read, which becomes part of the job's identity in its checkpoints.
"""

import csv
import glob
import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy
from numpy.typing import NDArray

from trainers.configuration import ConfigurationError

TEXT_BYTES_MAX = 4 * 1024**3
"""Read into memory; beyond four gibibytes a corpus wants a tokenised file of its own."""

Array = NDArray[numpy.generic]


@dataclass(frozen=True)
class Labelled:
    """Samples with class numbers. ``x`` is an array (samples first) or a list of texts."""

    x: Array | list[str]
    y: NDArray[numpy.int64]
    classes: tuple[str, ...]
    digest: str


def read_texts(pattern: str) -> list[str]:
    """The texts behind a file, a folder, a glob pattern, or a .jsonl file with ``text``.

    Raises ConfigurationError when there is nothing to read.
    """
    path = Path(pattern)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    else:
        files = [Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
    texts: dict[str, str] = {}
    total_bytes = 0
    for file in sorted({file.resolve() for file in files}):
        total_bytes += file.stat().st_size
        if total_bytes > TEXT_BYTES_MAX:
            raise ConfigurationError(f"'{pattern}' is more than {TEXT_BYTES_MAX >> 30} GiB of text")
        for text in _texts_of(file):
            if text:
                texts.setdefault(digest_of(text.encode()), text)
    if not texts:
        raise ConfigurationError(f"there is no text in '{pattern}'")
    return list(texts.values())


def split_ends(texts: list[str], held_out_ratio: float) -> tuple[list[str], list[str]]:
    """The beginning of each text for training, its end for evaluation."""
    cuts = [round(len(text) * (1 - held_out_ratio)) for text in texts]
    begins = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    ends = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    return begins, ends


def read_labelled(
    file: Path, columns: tuple[str, str], *, classes: tuple[str, ...] | None = None
) -> Labelled:
    """Samples of a .npz (arrays), .csv or .jsonl file; ``columns`` names samples and labels.

    ``classes`` are those of the training data, when this is the evaluation data. Raises
    ConfigurationError with a sentence about the file.
    """
    readers: dict[str, Callable[[Path, str, str], tuple[Array | list[str], list[str]]]] = {
        ".npz": _read_npz,
        ".csv": _read_csv,
        ".jsonl": _read_jsonl,
    }
    if file.suffix not in readers:
        raise ConfigurationError(f"{file} must be one of {', '.join(readers)}")
    if not file.is_file():
        raise ConfigurationError(f"there is no file {file}")
    try:
        samples, labels = readers[file.suffix](file, *columns)
    except KeyError as error:
        raise ConfigurationError(f"{file} has no {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"cannot read {file}: {error}") from error
    if not labels or len(samples) != len(labels):
        raise ConfigurationError(f"{file} has {len(samples)} samples and {len(labels)} labels")
    known = classes or tuple(sorted(set(labels), key=_label_order))
    numbers = {label: number for number, label in enumerate(known)}
    strangers = sorted(set(labels) - set(known))
    if strangers:
        raise ConfigurationError(f"{file} has label '{strangers[0]}', unknown to the training data")
    numbered = numpy.array([numbers[label] for label in labels], dtype=numpy.int64)
    return Labelled(samples, numbered, known, digest_of(file.read_bytes()))


def digest_of(content: bytes) -> str:
    """A short name for content."""
    return blake2b(content, digest_size=8).hexdigest()


def _texts_of(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix != ".jsonl":
        return [text]
    try:
        return [str(json.loads(line)["text"]) for line in text.splitlines() if line.strip()]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"each line of {file} must be an object with 'text'") from error


def _read_npz(file: Path, x: str, y: str) -> tuple[Array | list[str], list[str]]:
    with numpy.load(file, allow_pickle=False) as arrays:
        return arrays[x], [str(label) for label in arrays[y].tolist()]


def _read_csv(file: Path, x: str, y: str) -> tuple[Array | list[str], list[str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [row[x] for row in rows], [row[y] for row in rows]


def _read_jsonl(file: Path, x: str, y: str) -> tuple[Array | list[str], list[str]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    labels = [str(row[y]) for row in rows]
    if rows and isinstance(rows[0][x], str):
        return [str(row[x]) for row in rows], labels
    return numpy.array([row[x] for row in rows], dtype=numpy.float32), labels


def _label_order(label: str) -> tuple[bool, float, str]:
    """Numbers by value before words by letter: class 10 comes after class 9."""
    try:
        return (False, float(label), label)
    except ValueError:
        return (True, 0.0, label)
