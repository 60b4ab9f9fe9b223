# SPDX-License-Identifier: Apache-2.0
"""Does a call leak? References, Python's memory and the process's memory over many repetitions."""

from __future__ import annotations

import gc
import os
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


def resident() -> int:
    """Bytes of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check(name: str, call: Callable[[], Any], watched: Sequence[Any] = (), times: int = 2000) -> None:
    """Exit with a sentence if `call` keeps references to `watched`, or memory."""
    for _ in range(200):
        call()
    gc.collect()
    references = [sys.getrefcount(object_) for object_ in watched]
    tracemalloc.start()
    before, start = tracemalloc.get_traced_memory()[0], resident()
    for _ in range(times):
        call()
    gc.collect()
    grown, process = tracemalloc.get_traced_memory()[0] - before, resident() - start
    tracemalloc.stop()
    now = [sys.getrefcount(object_) for object_ in watched]
    if now != references:
        sys.exit(f"{name}: reference counts went from {references} to {now}")
    if grown > 4096 + 16 * times:  # what tracing itself needs; the smallest object has 16 bytes
        sys.exit(f"{name}: Python's memory grew by {grown} bytes over {times} calls")
    if process > 4 << 20:
        sys.exit(f"{name}: the process grew by {process} bytes over {times} calls")


def raises(error: type[Exception], call: Callable[..., Any], *args: Any) -> Callable[[], None]:
    """`call(*args)` as something to repeat that must raise `error`."""

    def attempt() -> None:
        try:
            call(*args)
        except error:
            return
        raise AssertionError(f"expected {error.__name__}")

    return attempt
