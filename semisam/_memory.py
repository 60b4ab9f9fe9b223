# SPDX-License-Identifier: Apache-2.0
"""What a part of a step costs: seconds, and how far memory grows while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["Cost", "cost_of"]

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # proc(5), clear_refs: the peak becomes what is resident now


class Cost:
    """`seconds` and `mib`, None where a system does not tell how far memory grew."""

    seconds: float = 0.0
    mib: float | None = None


@contextmanager
def cost_of(device: torch.device | str) -> Iterator[Cost]:
    """Measure what runs inside; the result is there at the end.

    On a GPU `mib` (MiB) is what torch's allocator had handed out at most, beyond what it had at the
    beginning; its statistics of peaks begin anew. Nobody waits for the GPU: `seconds` are those of the host,
    which runs ahead. On the CPU it is how far resident memory grew: memory that the process has already,
    such as what an earlier step left, does not count. Linux tells; elsewhere, and where it may not, `mib` is
    None.

    >>> from semisam._memory import cost_of
    >>> with cost_of("cpu") as cost:
    ...     ones = torch.ones(1 << 20)
    >>> cost.seconds > 0
    True
    """
    device, made = torch.device(device), Cost()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else _begin()
    began = time.perf_counter()
    yield made
    made.seconds = time.perf_counter() - began
    if before is not None:
        after = torch.cuda.max_memory_allocated(device) if cuda else _resident("VmHWM:")
        made.mib = None if after is None else max(after - before, 0) / (1 << 20)


def _begin() -> int | None:
    """Bytes that are resident, after the peak was set to them; None if that cannot be done."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return None
    return _resident("VmRSS:")


def _resident(line: str) -> int | None:
    try:
        words: list[Any] = (_PROCESS / "status").read_text().split()
        return 1024 * int(words[words.index(line) + 1])
    except (OSError, ValueError, IndexError):
        return None
