"""A table in a CSV file, as spreadsheets and people write it, packed by gzip or not.

Problem: a file that somebody else has made has a mark of its encoding, Windows line ends, spaces,
empty lines, columns without a name at its right edge, or is no CSV file at all. What does no harm
is read, and of the rest one sentence says where it is and what to change.
"""

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from coordinator.sim.toml_file import BadFile

SEPARATORS: Final = {";": "semicolons", "\t": "tabs"}
GZIP: Final = b"\x1f\x8b"
ZIP: Final = b"PK\x03\x04"
# Where a tar archive says that it is one.
TAR: Final = (257, b"ustar")
SHOWN_MAX: Final = 60  # of a cell in a sentence: an open quote makes one of the rest of the file


@dataclass(slots=True)
class Table:
    """Its columns, and its lines, each with its place in the file; lines of nothing are left
    out."""

    path: Path
    columns: Sequence[str]
    lines: Iterator[list[str]]
    line_num: Callable[[], int]

    def rows(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        """A cell that is missing is empty."""
        width = len(self.columns)
        for cells in self.lines:
            if not any(cells):
                continue
            place = f"{self.path}, line {self.line_num()}"
            if any(cells[width:]):
                raise BadFile(f"{place}: there are more cells than columns")
            row = dict.fromkeys(self.columns, "")
            for column, cell in zip(self.columns, cells, strict=False):
                if cell and not column:
                    raise BadFile(f"{place}: {shown(cell)} is in a column that has no name")
                row[column] = cell
            yield place, row


def shown(text: str) -> str:
    """A cell as a sentence quotes it."""
    return repr(text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}...")


@contextmanager
def read_csv(path: Path) -> Iterator[Table]:
    """Open while it is read."""
    try:
        with _open(path) as lines:
            reader = csv.reader(lines, skipinitialspace=True)
            stripped = ([cell.strip() for cell in cells] for cells in reader)
            columns = next((cells for cells in stripped if any(cells)), [])
            _check_header(path, columns)
            yield Table(path, columns, stripped, lambda: reader.line_num)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadFile(f"{path} cannot be unpacked ({error})") from error
    except OSError as error:
        raise BadFile(f"{path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not text in UTF-8; save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise BadFile(f"{path} is no CSV file: {error}") from error


def _open(path: Path) -> IO[str]:
    with path.open("rb") as file:
        packed = file.read(len(GZIP)) == GZIP
    with gzip.open(path) if packed else path.open("rb") as file:
        head = file.read(TAR[0] + len(TAR[1]))
    if head.startswith(ZIP):
        raise BadFile(f"{path} is a zip archive or a spreadsheet; save what it holds as CSV")
    if head[TAR[0] :] == TAR[1]:
        raise BadFile(f"{path} is an archive of files; unpack it and name one of them")
    if packed:
        return gzip.open(path, "rt", newline="", encoding="utf-8-sig")
    return path.open(newline="", encoding="utf-8-sig")


def _check_header(path: Path, columns: Sequence[str]) -> None:
    if not columns:
        raise BadFile(f"{path} is empty; its first line names the columns")
    for mark, name in SEPARATORS.items():
        if len(columns) == 1 and mark in columns[0]:
            raise BadFile(f"{path}: {name} separate its columns; write commas")
