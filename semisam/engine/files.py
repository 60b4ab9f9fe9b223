# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there: written under another name beside their place, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic", "write_json", "write_text"]


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
