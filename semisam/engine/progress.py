# SPDX-License-Identifier: Apache-2.0
"""Progress that a person can read: a bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TextIO, TypeVar

__all__ = ["progress", "say"]

T = TypeVar("T")


def progress(
    iterable: Iterable[T],
    total: int | None = None,
    label: str = "",
    *,
    initial: int = 0,
    every: float = 30.0,
    show: bool = True,
    file: TextIO | None = None,
) -> Iterator[T]:
    """Yield the items of `iterable` and report how far it is, to `file` (default: standard error).

    On a terminal this is tqdm's bar; elsewhere (a log file, a batch system) one line at most every
    `every` seconds and one at the end. `initial` items were done before (a resumed run). With
    `show=False` (ranks other than 0) nothing is written.

    >>> import sys
    >>> from semisam.engine.progress import progress
    >>> for case in progress(["a", "b"], label="cases", every=3600, file=sys.stdout):
    ...     pass  # doctest: +ELLIPSIS
    cases: 2/2 (...)
    """
    if total is None:
        total = len(iterable) if isinstance(iterable, Sized) else None
    out = sys.stderr if file is None else file
    if not show:
        yield from iterable
    elif out.isatty():
        from tqdm import tqdm  # noqa: PLC0415

        yield from tqdm(iterable, total=total, desc=label, initial=initial, file=out, dynamic_ncols=True)
    else:
        yield from _lines(iterable, total, label, initial, every, out)


def _lines(
    iterable: Iterable[T], total: int | None, label: str, initial: int, every: float, out: TextIO
) -> Iterator[T]:
    start = last = time.monotonic()
    done = said = initial
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= every:
            last, said = now, done
            _line(out, label, done, total, now - start, done - initial)
    if done != said or done == initial:
        _line(out, label, done, total, time.monotonic() - start, done - initial)


def _line(out: TextIO, label: str, done: int, total: int | None, seconds: float, here: int) -> None:
    left = f", {_clock((total - done) * seconds / here)} left" if total and done < total and here else ""
    of = f"/{total}" if total is not None else ""
    print(f"{label}: {done}{of} ({_clock(seconds)}{left})", file=out, flush=True)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def say(*words: Any) -> None:
    """Print one line for the user to standard error, above a running bar if there is one.

    >>> from semisam.engine.progress import say
    >>> say("gate: the generalist is used")
    """
    text = " ".join(str(word) for word in words)
    if sys.stderr.isatty():
        from tqdm import tqdm  # noqa: PLC0415

        tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)
