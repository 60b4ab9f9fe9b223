# SPDX-License-Identifier: Apache-2.0
"""What the tests of a GPU need from one, and what stands for it where there is none.

SEMISAM_CUDA_REHEARSAL=cpu or =emulated runs tests/test_cuda.py on CPU tensors, by the CPU's kernels or by
the CUDA kernels of tests/cuda_emulation. Streams, graphs and waits are then plain calls: a rehearsal shows
that the tests' own code is right, and nothing about a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from semisam import _core, ops

REHEARSAL = os.environ.get("SEMISAM_CUDA_REHEARSAL", "")
if REHEARSAL not in ("", "cpu", "emulated"):
    raise ValueError(f"SEMISAM_CUDA_REHEARSAL: expected cpu, emulated or nothing, got {REHEARSAL}")
DEVICE = torch.device("cpu" if REHEARSAL else "cuda", None if REHEARSAL else 0)
BACKEND = REHEARSAL or "cuda"


def missing() -> str:
    """Why the tests cannot run here, or nothing."""
    if REHEARSAL:
        return ""
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch finds none (SEMISAM_CUDA_REHEARSAL=cpu rehearses the tests)"
    return ops.load_cuda()


def operators() -> set[str]:
    """The operators that have a kernel on the device."""
    return set(_core.backends().get(BACKEND, ()))


def use_emulation() -> None:
    """Send every call on CPU tensors to the emulated kernels; those that have none stay on the CPU."""
    import cuda_emulation  # noqa: PLC0415

    cuda_emulation.load()
    native = ops._raw
    counters = ops._faults[0] = torch.zeros(len(ops.SCHEMA), dtype=torch.int64)

    def raw(op: str, inputs: Any, outputs: Any, isa: str | None = None) -> None:
        if isa is not None or op not in operators():
            native(op, inputs, outputs, isa)
            return
        given, made = iter(inputs), iter(outputs)
        args = [next(made if a.kind == "out" else given) for a in ops.SCHEMA[op]]
        getattr(_core, op)(*args, 0, "emulated", ops._host_workspace, counters.numpy())

    ops._raw = raw


def move(value: Any) -> Any:
    """Tensors, also in lists, to the device."""
    if isinstance(value, (list, tuple)):
        return [move(v) for v in value]
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of a nest of lists, in order."""
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    return [value] if isinstance(value, torch.Tensor) else []


def bits(values: Any) -> list[bytes]:
    return [
        t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors(values)
    ]


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Stream:
    """A stream other than the current one; `with stream:` makes calls on it."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream(DEVICE) if DEVICE.type == "cuda" else None

    def __enter__(self) -> None:
        self.context = nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)

    def join(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


def keep_busy(milliseconds: float = 20.0) -> None:
    """Put work onto the current stream, so that what follows on it is late."""
    if DEVICE.type == "cuda":
        torch.cuda._sleep(int(milliseconds * 2e6))


class Graph:
    """A call captured as a CUDA graph; in a rehearsal, one that is made again into the same outputs."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        if DEVICE.type != "cuda":
            self.outputs = function()
            return
        stream = Stream()
        with stream:
            function()  # loads kernels and makes the fault counters
        stream.join()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function()

    def replay(self) -> Any:
        if DEVICE.type == "cuda":
            self.graph.replay()
        else:
            for made, again in zip(tensors(self.outputs), tensors(self.function()), strict=True):
                made.detach().copy_(again)
        return self.outputs


@contextmanager
def no_waits() -> Iterator[None]:
    """An error where the host would wait for the device."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def little_memory() -> Iterator[None]:
    """No more memory than is in use, rounded up by some MiB."""
    if DEVICE.type != "cuda":
        with _no_outputs():
            yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (8 << 20)) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def _no_outputs() -> Iterator[None]:
    native = ops.empty

    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("rehearsed")

    ops.empty = refuse
    try:
        yield
    finally:
        ops.empty = native


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers on the device, the same ones everywhere."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(values).to(dtype).to(DEVICE)


def labels(seed: int, classes: int, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    values = np.random.default_rng(seed).integers(0, classes, shape)
    return torch.from_numpy(values).to(dtype).to(DEVICE)
