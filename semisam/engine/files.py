# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there: written under another name beside their place, then renamed."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Table", "atomic", "read_table", "write_json", "write_text"]


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` when the block ends well.

    The temporary name keeps all suffixes (`.nii.gz`), as libraries choose formats by them. If the block
    raises (disk full, interrupt), the temporary file is removed and what was at `path` is untouched.
    Raises OSError as the operating system does.

    >>> import tempfile, pathlib
    >>> from semisam.engine.files import atomic
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "scan.nii.gz"
    >>> with atomic(place) as temporary:
    ...     _ = temporary.write_bytes(b"all of it")
    >>> place.read_bytes(), len(list(place.parent.iterdir()))
    (b'all of it', 1)
    """
    place = Path(path)
    temporary = place.with_name(f".{os.getpid()}.tmp.{place.name}")
    try:
        yield temporary
        os.replace(temporary, place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, all of it or nothing.

    >>> import tempfile, pathlib
    >>> from semisam.engine.files import write_text
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
    >>> write_text(place, "one line")
    >>> place.read_text()
    'one line'
    """
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, all of it or nothing; paths become text.

    >>> import tempfile, pathlib
    >>> from semisam.engine.files import write_json
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "run.json"
    >>> write_json(place, {"steps": 6000, "root": pathlib.Path("data")})
    >>> print(place.read_text().strip())
    {
      "steps": 6000,
      "root": "data"
    }
    """
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


class Table:
    """A CSV file that grows by rows and is readable at any moment.

    `columns` begin with `step`. An existing file (a resumed run) keeps the rows up to step `keep`; what a
    killed process wrote after its last checkpoint, or wrote by half, goes away. With `write=False`
    (ranks other than 0) nothing is touched. Raises ValueError for rows with other columns.

    >>> import tempfile, pathlib
    >>> from semisam.engine.files import Table
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "log.csv"
    >>> Table(place, ("step", "loss")).add(step=1, loss=0.5)
    >>> place.read_text().split()
    ['step,loss', '1,0.5']
    """

    def __init__(
        self, path: str | os.PathLike[str], columns: Sequence[str], *, keep: int = 0, write: bool = True
    ) -> None:
        self.path = Path(path)
        self.columns = tuple(columns)
        self.write = write
        if write:
            rows = [row for row in read_table(self.path) if int(row["step"]) <= keep]
            with atomic(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

    def add(self, **row: Any) -> None:
        """Append one row, in one write; floats with 8 digits."""
        if set(row) - set(self.columns):
            raise ValueError(f"Table.add(): expected the columns {self.columns}, got {sorted(row)}")
        if self.write:
            row = {name: f"{v:.8g}" if isinstance(v, float) else v for name, v in row.items()}
            text = io.StringIO()
            csv.DictWriter(text, self.columns, lineterminator="\n").writerow(row)
            with self.path.open("a", newline="", encoding="utf-8") as file:
                file.write(text.getvalue())


def read_table(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Return the whole rows of a CSV file as text by column; none if there is no file.

    >>> from semisam.engine.files import read_table
    >>> read_table("no-such-file.csv")
    []
    """
    place = Path(path)
    text = place.read_text(encoding="utf-8") if place.exists() else ""
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [row for row in rows if None not in row and None not in row.values()]
