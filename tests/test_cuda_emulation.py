# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels without a GPU: compiled for the CPU (tests/cuda_emulation), over the table of cases."""

from __future__ import annotations

import ctypes
import math
import mmap
import re
import shutil

import numpy as np
import pytest
import torch
from cases import CASES, Case
from cuda_emulation import HERE, build, load
from test_ops import all_runs, bits, check_value, make, run

from semisam import _core, ops, reference

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


@pytest.fixture
def processes(library, monkeypatch):
    """Calls with memory that the blocks of a cooperative launch, processes here, have in common."""

    def run_with(blocks, case, inputs):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda shape, dtype: _shared(math.prod(shape), dtype).view(shape))
            patch.setattr(np, "full", lambda n, value, dtype: _shared(n, torch.uint8).fill_(value).numpy())
            library.ss_emulated_processors(blocks)
            try:
                return emulated(case, inputs)
            finally:
                library.ss_emulated_processors(1)

    return run_with


def _shared(n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, max(n, 1) * dtype.itemsize), dtype=dtype, count=n)


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


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.op in ("random_walker", "geodesic")], ids=lambda c: c.id
)
def test_blocks_that_wait_for_each_other(case, processes):
    needs(case.op)
    inputs = make(case, "f32")
    expected = bits(emulated(case, inputs))
    for blocks in (2, 3, 7):
        assert bits(processes(blocks, case, inputs)) == expected, f"other bits with {blocks} blocks"


def test_random_walker_is_as_far_from_the_solution_as_on_the_cpu(library):
    """Sums are folded in another order, so iterations may end elsewhere; near the limit of float the
    error is conditioning, the same for both on average (over 300 seeds: .00299 and .00302)."""
    needs("random_walker")
    errors = []
    for seed in range(40):
        g = np.random.default_rng(seed)
        shape, classes = tuple(int(n) for n in g.integers(2, 8, 3)), int(g.integers(1, 3))
        image = torch.from_numpy(g.normal(size=(1, *shape)).astype(np.float32))
        seeds = torch.from_numpy(g.choice([0, 0, 0, 0, 0, 1, 2], size=(classes, *shape)).astype(np.uint8))
        seeds[:, 0, 0, 0] = 1
        prior = torch.from_numpy(g.random(seeds.shape).astype(np.float32))
        values = (float(g.choice([0.0, 0.01, 0.1])), float(g.choice([1.0, 30.0, 130.0])), [1.0, 1.5, 0.7])
        inputs = [image, seeds, prior, classes, *values, 1e-6, 1000]
        exact = reference.random_walker(*inputs[:-2], 1e-12, 5000)[0]
        case = Case("random_walker", f"seed {seed}", lambda r, inputs=inputs: inputs)
        errors.append(
            [(run_one[0] - exact).abs().max() for run_one in (emulated(case, inputs), run(case, inputs))]
        )
    ours, cpu = np.mean(errors, axis=0)
    assert ours < 1.5 * cpu + 1e-6


# ---- workspace, faults and libraries, at the border of the core ----------------------------------


def _labels():
    """components needs a workspace."""
    image = np.ones((1, 2, 2, 2), np.uint8)
    return image, 6, 0, np.empty((1, 2, 2, 2), np.int32), np.empty(1, np.int64), 0, "emulated"


def _read_only(size):
    room = np.empty(size, np.uint8)
    room.flags.writeable = False
    return room


@pytest.mark.parametrize(
    ("allocate", "error", "sentence"),
    [
        (None, ValueError, r"components\(\): workspace: expected \d+ bytes, got 0"),
        (lambda size: np.empty(size - 1, np.uint8), ValueError, r"workspace: expected \d+ bytes, got \d+"),
        (
            lambda size: np.empty(2 * size, np.uint8)[::2],
            ValueError,
            "workspace: expected a writable contiguous",
        ),
        (_read_only, ValueError, "workspace: expected a writable contiguous array on the call's device"),
        (
            lambda size: "text",
            TypeError,
            r"components\(\): workspace: expected a NumPy array or a torch tensor",
        ),
        (lambda size: 1 / 0, ZeroDivisionError, "division by zero"),
        (3, TypeError, "not callable"),
    ],
)
def test_bad_workspace(allocate, error, sentence, library):
    with pytest.raises(error, match=sentence):
        _core.components(*_labels(), allocate)


@pytest.mark.parametrize(
    ("counters", "error", "sentence"),
    [
        (np.zeros(3, np.int64), ValueError, r"components\(\): faults: expected \d+ numbers of dtype i64"),
        (np.zeros(len(ops.SCHEMA), np.int32), ValueError, "faults: expected"),
        (_read_only(len(ops.SCHEMA) * 8).view(np.int64), ValueError, "faults: expected a writable"),
        (3, TypeError, r"components\(\): faults: expected a NumPy array or a torch tensor"),
    ],
)
def test_bad_fault_counters(counters, error, sentence, library):
    with pytest.raises(error, match=sentence):
        _core.components(*_labels(), ops._host_workspace, counters)


def test_backends_lists_what_there_is(library):
    found = _core.backends()
    assert set(found) == {"cpu", "emulated"}
    assert set(found["cpu"]) == set(ops.SCHEMA)


def test_a_file_that_is_no_backend(tmp_path):
    with pytest.raises(ImportError, match=r"load_backend\(\): .*none.so: cannot be loaded: "):
        _core.load_backend(tmp_path / "none.so")
    with pytest.raises(ImportError, match="is not a backend of semisam: it exports no semisam_cuda"):
        _core.load_backend(_core.__file__)
    with pytest.raises(TypeError):
        _core.load_backend(3)


# ---- the emulation itself -----------------------------------------------------------------------

THREADS = 96


@pytest.fixture(scope="module")
def faulty():
    library = ctypes.CDLL(str(build([HERE / "faulty.cu"])))

    def run_one(which: int, blocks: int = 1):
        out = np.zeros(blocks * THREADS, np.int64)
        text = ctypes.create_string_buffer(256)
        status = library.faulty(which, out.ctypes.data_as(ctypes.c_void_p), text)
        return status, text.value.decode(), out

    run_one.reverse = library.ss_emulated_reverse
    return run_one


def test_a_right_kernel_runs(faulty):
    status, text, out = faulty(0, blocks=3)
    lanes = np.arange(THREADS).reshape(3, 32).sum(1).repeat(32)
    expected = [b * THREADS + np.arange(THREADS)[::-1] + lanes + 1000 for b in range(3)]
    assert (status, text) == (0, "")
    assert out.tolist() == np.concatenate(expected).tolist()


@pytest.mark.parametrize(
    ("which", "sentence"),
    [
        (1, r"^k_two_barriers: block \(0, 0, 0\): thread 32 is at the barrier of line \d+, others at"),
        (2, r"k_lane_at_barrier: block .* warp 0 waits at line \d+ for its lanes 00000020"),
        (3, r"k_lane_gone: .*(lane 8 of warp 1 has left|warp 1 at line \d+: expected all 32 lanes)"),
        (4, r"k_half_mask: .* expected all 32 lanes, got mask 0000ffff"),
        (7, r"invalid launch: grid \(1, 1, 1\), block \(100, 1, 1\)"),
        (8, r"invalid launch: .* 49153 bytes of shared memory"),
    ],
)
def test_a_wrong_kernel_is_told_and_the_next_one_runs(faulty, which, sentence):
    status, text, _ = faulty(which)
    assert status == 5  # SS_FAILED
    assert re.search(sentence, text), text
    test_a_right_kernel_runs(faulty)


def test_shared_memory_starts_as_garbage(faulty):
    assert (faulty(5)[2] == -1).all()


def test_a_missing_barrier_shows_in_the_other_order(faulty):
    forward = faulty(6)[2]
    faulty.reverse(1)
    try:
        assert faulty(6)[2].tolist() != forward.tolist()
    finally:
        faulty.reverse(0)
