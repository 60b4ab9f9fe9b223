# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels without a GPU: compiled for the CPU (tests/cuda_emulation), over the table of cases."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from cuda_emulation import load
from test_ops import all_runs, bits, check_value, make, run

from semisam import _core, ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the emulated kernels")

GUARD = 4096  # bytes around a workspace that must stay as they are


@pytest.fixture(scope="module")
def library():
    return load()


def emulated(case, inputs):
    """One call as a GPU would run it: outputs and workspace full of garbage, a guard around the latter."""
    outputs = []
    for shape, dtype in ops.output_specs(case.op, inputs):
        t = torch.empty(shape, dtype=ops._torch_dtypes(torch)[dtype])
        if t.numel():
            t.view(torch.uint8).fill_(0xA5)
        outputs.append(t)
    rooms = []

    def workspace(size):
        room = np.full(size + 2 * GUARD + 256, 0xC3, np.uint8)
        start = GUARD + -room.ctypes.data % 256
        rooms.append((room, start, size))
        return room[start : start + size]

    given, made = iter(inputs), iter(outputs)
    args = [next(made if a.kind == "out" else given) for a in ops.SCHEMA[case.op]]
    faults = np.zeros(len(ops.SCHEMA), np.int64)
    getattr(_core, case.op)(*args, 0, "emulated", workspace, faults)
    for room, start, size in rooms:
        assert (room[:start] == 0xC3).all(), "written before the workspace"
        assert (room[start + size :] == 0xC3).all(), "written behind the workspace"
    assert not faults.any()
    return outputs


def needs(op: str) -> None:
    if op not in _core.backends()["emulated"]:
        pytest.skip(f"{op} has no CUDA kernel yet")


@all_runs
def test_value_and_bits(case, dtype, library):
    needs(case.op)
    inputs = make(case, dtype)
    got = emulated(case, inputs)
    check_value(case, inputs, got)
    for ours, cpu in zip(got, run(case, inputs), strict=True):
        assert ours.is_floating_point() or torch.equal(ours, cpu), "integers must be those of the CPU"
    assert bits(emulated(case, inputs)) == bits(got), "a second run gave other bits"
    library.ss_emulated_reverse(1)
    try:
        assert bits(emulated(case, inputs)) == bits(got), "the order of threads and blocks shows"
    finally:
        library.ss_emulated_reverse(0)
