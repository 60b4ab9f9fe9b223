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


# ---- voxel losses: any sum of terms --------------------------------------------------------------


def random_loss(seed: int):
    """Inputs of `voxel_loss_forward`: terms, samples, dtypes and sizes at random."""
    r = np.random.default_rng(seed)
    activation = int(r.choice([0, 0, 0, 1, 2]))
    c = int(r.choice([2, 2, 2, 3, 4, 5, 9, 16, 17, 33] if activation == 0 else [1, 2, 3]))
    b, s = int(r.integers(1, 4)), int(r.choice([1, 7, 64, 1024, 1501, 4096, 9001, 16500]))
    s = min(s, 1501 if c > 16 else s)
    logits = torch.from_numpy(r.random((b, c, s)) if activation == 2 else 3 * r.standard_normal((b, c, s)))
    logits = logits.to(r.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    targets, weights, params = [], [], []
    terms = int(r.integers(1, 6))
    kinds = ((0, 1, 2, 3, 4), (0, 1, 2), (1, 2))[activation]
    for _ in range(terms):
        kind = int(r.choice(kinds))
        first = int(r.integers(0, b))
        last = b if r.random() < 0.7 else int(r.integers(first + 1, b + 1))
        again = [k for k, (_, *samples) in enumerate(targets) if samples == [first, last]]
        target, weight = -1.0, -1.0
        if kind != 4:
            if again and r.random() < 0.5:
                target = float(r.choice(again))
            else:
                if r.random() < 0.6:
                    q = torch.from_numpy(r.integers(0, max(c, 2), (last - first, s)))
                    q[r.random(q.shape) < 0.1] = 255 if r.random() < 0.7 else 0
                    q = q.to(r.choice([torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16]))
                else:
                    q = torch.from_numpy(r.random((last - first, c, s)))
                    q = q / q.sum(1, keepdim=True) if activation == 0 else q
                    q[:, 0, ::3] = 0
                    q = q.to(r.choice([torch.float16, torch.float32, torch.float64]))
                target = float(len(targets))
                targets.append((q, first, last))
        if r.random() < 0.5:
            w = torch.from_numpy(r.random((last - first, s)) * (r.random((last - first, s)) > 0.2))
            weight = float(len(weights))
            weights.append(w.to(r.choice([torch.float16, torch.float32, torch.float64])))
            if r.random() < 0.2:
                weights[-1] = weights[-1] > 0.5
        smooth = float(r.choice([0, 0, 0.1])) if kind == 0 and activation == 0 else 0.0
        flags = [float(v) for v in r.integers(0, 2, 4)]  # background, squared, batch, jaccard
        row = [float(kind), target, weight, float(first), float(last), 1.0, 255.0, smooth, *flags]
        row += [float(r.choice([0, 1e-5, 1])), float(r.choice([1e-5, 1]))]
        row += [float(r.integers(0, 4)), 1e-3, float(r.integers(0, 2))]
        weighted = r.random() < 0.4 and (kind == 1 or activation == 0)
        params += row + (r.choice([0.0, 0.5, 1.0, 2.0], c) if weighted else np.ones(c)).tolist()
    return [logits, [t for t, *_ in targets], weights, params, activation, terms]


def worst_difference(seed: int) -> float:
    """Between emulated kernel and CPU, forward and backward, relative to the largest value of an output."""
    inputs = random_loss(seed)
    case = Case("voxel_loss_forward", f"seed {seed}", lambda r: inputs)
    values, stats = emulated(case, inputs)
    cpu = run(case, inputs)
    assert torch.equal(values == 0, cpu[0] == 0), f"seed {seed}: zeros"
    back = Case("voxel_loss_backward", f"seed {seed}", lambda r: inputs)
    grad = torch.from_numpy(np.random.default_rng(seed).standard_normal(values.shape))
    given = [*inputs[:4], cpu[1], grad, *inputs[4:]]
    pairs = [(values, cpu[0]), (stats, cpu[1]), (emulated(back, given)[0], run(back, given)[0])]
    eps = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}.get(inputs[0].dtype, 0.0)
    worst = 0.0
    for ours, theirs in pairs:
        scale = float(theirs.double().abs().max()) + 1e-30
        excess = (ours.double() - theirs.double()).abs() - 2 * eps * theirs.double().abs() * (
            theirs is pairs[2][1]
        )
        tiny = 2.0**-24 if inputs[0].dtype == torch.float16 and theirs is pairs[2][1] else 0.0
        worst = max(worst, (float(excess.max()) - tiny) / scale)
    return worst


@pytest.mark.parametrize("seed", range(24))
def test_voxel_loss_of_any_terms_is_the_cpus(seed, library):
    """Both are within a few eps of p and sum floats of up to 1024 voxels before doubles: 1e-5 is ample for
    sums, and a gradient h - p sum h loses at most the digits that h has above it."""
    needs("voxel_loss_forward")
    dtype = random_loss(seed)[0].dtype
    assert worst_difference(seed) < (1e-11 if dtype == torch.float64 else 1e-5)


def _plain_term(kind, target, weight, samples, channels):
    row = [kind, target, weight, 0, samples, 1, 255, 0, 1, 1, 1, 0, 1e-5, 1e-5, 0, 1e-3, 1]
    return [float(v) for v in row] + [1.0] * channels


def test_faulty_labels_and_weights_count_as_weight_0(library):
    needs("voxel_loss_forward")
    r = np.random.default_rng(5)
    for c in (2, 3, 10, 20):
        z = r.standard_normal((2, c, 3000)).astype(np.float32)
        y = r.integers(0, c, (2, 3000)).astype(np.int32)
        w = r.random((2, 3000)).astype(np.float32)
        bad_y, bad_w = y.copy(), w.copy()
        bad_y[0, :7], bad_y[1, 2990:], bad_w[1, 5:9] = c, -3, -1.0
        y[0, :7], y[1, 2990:], w[1, 5:9] = 255, 255, 0.0
        params = _plain_term(0, 0, 0, 2, c) + _plain_term(1, 0, 0, 2, c)
        found = []
        for labels, weight, expected in ((y, w, 0), (bad_y, bad_w, 7 + 10 + 4)):
            out = [np.empty((2, 2, c)), np.empty((2, 2, c, 4)), np.empty_like(z)]
            faults = np.zeros(len(ops.SCHEMA), np.int64)
            given = [z, [labels], [weight], params]
            _core.voxel_loss_forward(*given, 0, 2, *out[:2], 0, "emulated", ops._host_workspace, faults)
            assert faults.sum() == faults[list(ops.SCHEMA).index("voxel_loss_forward")] == expected
            grad = np.ones((2, 2, c))
            _core.voxel_loss_backward(
                *given, out[1], grad, 0, 2, out[2], 0, "emulated", ops._host_workspace, faults
            )
            assert faults.sum() == expected, "backward must not count again"
            found.append([o.tobytes() for o in out])
        assert found[0] == found[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels", [2, 3, 6, 20])
def test_voxel_loss_of_logits_that_are_not_finite_is_the_cpus(bad, channels, library):
    needs("voxel_loss_forward")
    r = np.random.default_rng(2)
    z = r.standard_normal((2, channels, 500)).astype(np.float32)
    z[1, 1, 77] = bad
    y, q = r.integers(0, channels, (2, 500)).astype(np.uint8), np.full_like(z, 1 / channels)
    for kind in range(5):
        params = _plain_term(kind, -1 if kind == 4 else 0, -1, 2, channels)
        target = q if kind in (2, 3) else y
        both = []
        for where in ((0,), (0, "emulated", ops._host_workspace)):
            out = [np.empty((1, 2, channels)), np.empty((1, 2, channels, 4)), np.empty_like(z)]
            _core.voxel_loss_forward(z, [target], [], params, 0, 1, *out[:2], *where)
            grad = np.ones((1, 2, channels))
            _core.voxel_loss_backward(z, [target], [], params, out[1], grad, 0, 1, out[2], *where)
            both.append(out)
        for cpu, ours in zip(*both, strict=True):
            if cpu.ndim == 4:  # sums of a class that has a NaN among them: which ones does not matter
                lost = np.isnan(cpu).any(-1)
                assert (np.isnan(ours).any(-1) == lost).all()
                cpu[lost] = ours[lost] = 0
            np.testing.assert_allclose(ours, cpu, rtol=1e-4, atol=1e-6)


def test_voxel_loss_with_more_class_weights_than_a_launch_takes(library):
    needs("voxel_loss_forward")
    r = np.random.default_rng(3)
    b, c, terms = 4, 130, 5  # 650 numbers: two launches; and more values than the last block makes
    z, y = r.standard_normal((b, c, 40)), r.integers(0, c, (b, 40)).astype(np.int64)
    params = []
    for _ in range(terms):
        params += _plain_term(0, 0, -1, b, c)[:-c] + r.random(c).tolist()
    inputs = [torch.from_numpy(z), [torch.from_numpy(y)], [], params, 0, terms]
    case = Case("voxel_loss_forward", "many", lambda rng: inputs)
    for ours, cpu in zip(emulated(case, inputs), run(case, inputs), strict=True):
        torch.testing.assert_close(ours, cpu, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({0: 5.0}, "params: term 0: expected a kind of 0 to 4, got 5"),
        ({1: 1.0}, "params: term 0: expected the index of a target"),
        ({2: 0.0}, "params: term 0: expected the index of a weight, or -1"),
        ({4: 3.0}, "params: term 0: expected samples of the batch"),
        ({}, r"targets\[0\]: expected integer labels of 20 voxels"),
        ({14: 4.0}, "params: term 0: expected a reduction of 0 to 3"),
        ({17: None}, "params: expected 19 numbers for each of 1 terms, got 18"),
    ],
)
def test_voxel_loss_refuses_what_the_cpu_refuses(change, sentence, library):
    needs("voxel_loss_forward")
    params = _plain_term(0, 0, -1, 2, 2)
    for i, v in change.items():
        params[i : i + 1] = [] if v is None else [v]
    out = np.empty((1, 2, 2)), np.empty((1, 2, 2, 4))
    for where in ((0,), (0, "emulated", ops._host_workspace)):
        with pytest.raises(ValueError, match=sentence):
            _core.voxel_loss_forward(
                np.zeros((2, 2, 10)), [np.zeros((3, 10), np.uint8)], [], params, 0, 1, *out, *where
            )


# ---- fusion --------------------------------------------------------------------------------------


def _fuse(sources, **given):
    """Arguments of `fuse` for sources [B, C, V]; equal weights unless told, one per source or a table."""
    channels = sources[0].shape[1]
    named = {
        "lab": None,
        "unc": None,
        "logits": 0,
        "kind": 0,
        "ignore": 255,
        "channels": channels,
    }
    lab, unc, logits, kind, ignore, channels = {**named, **given}.values()
    numbers = (4.0, 0.0, 1.0, 0.0, ignore, channels)
    tables = [None if r is None else _per_sample(r, len(sources[0])) for r in (lab, unc)]
    return [sources, *tables, logits, kind, 0, *numbers, 1, 1, 1, 1, 1]


def _per_sample(r, batch):
    r = torch.as_tensor(r, dtype=torch.float64)
    return r.reshape(len(r), -1).expand(-1, batch if r.ndim == 1 else r.shape[1]).contiguous()


def _on_both(inputs):
    case = Case("fuse", "", lambda r: inputs)
    return emulated(case, inputs), run(case, inputs)


@pytest.mark.parametrize("space", [64, 77])
@pytest.mark.parametrize("logits", [0, 1])
@pytest.mark.parametrize("channels", [1, 3])
def test_fuse_of_several_dtypes_at_any_address(channels, logits, space, library):
    needs("fuse")
    g = torch.Generator().manual_seed(3)
    sources = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float32, torch.float32):
        room = torch.rand(2 * channels * space + 1, generator=g).to(dtype)
        sources.append(room[1:].view(2, channels, space))
    for some in (sources, sources[0::3], sources[1:2]):
        ours, cpu = _on_both(_fuse(some, logits=logits))
        assert torch.equal(ours[1], cpu[1])
        for o, c in zip(ours, cpu, strict=True):
            torch.testing.assert_close(o, c, atol=4e-6, rtol=0)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 2, 3, 20])
def test_fuse_keeps_what_is_not_finite(channels, kind, library):
    needs("fuse")
    g = torch.Generator().manual_seed(5)
    sources = [3 * torch.randn(1, channels, 32, generator=g) for _ in range(4)]
    for i, value in enumerate((math.nan, math.inf, -math.inf)):
        for s in range(3):
            sources[s][0, s % channels, 4 * i + s] = value
    sources[3][:] = math.nan  # has no weight
    weights = [0.5, 0.25, 0.25, 0.0]
    for other in (weights, [0.25, 0.25, 0.5, 0.0]):
        ours, cpu = _on_both(_fuse(sources, lab=weights, unc=other, logits=1, kind=kind))
        assert torch.equal(ours[1], cpu[1])
        assert 3 <= cpu[3].isnan().sum() < 12
        for o, c in zip(ours, cpu, strict=True):
            torch.testing.assert_close(o, c, atol=4e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    "change",
    [
        {"lab": [0.5, 0.5, 0.0]},
        {"unc": [[1.0, 0.5]]},
        {"unc": [[1.0], [0.0]]},
        {"channels": 2},
        {"ignore": 2},
        {"sources": [torch.zeros(2, 3, 5), torch.zeros(2, 3, 5, dtype=torch.float64)]},
    ],
)
def test_fuse_refuses_what_the_cpu_refuses_in_the_same_words(change, library):
    needs("fuse")
    inputs = _fuse(**{"sources": [torch.zeros(2, 3, 5)] * 2, **change})
    case = Case("fuse", "", lambda r: inputs)
    with pytest.raises((ValueError, TypeError)) as cpu:
        run(case, inputs)
    with pytest.raises(cpu.type, match=re.escape(str(cpu.value))):
        emulated(case, inputs)


@pytest.mark.parametrize(("channels", "logits"), [(1, 0), (1, 1), (3, 0), (3, 1), (20, 1)])
@pytest.mark.parametrize(
    ("lab", "unc", "as_if", "faults"),
    [
        ([0.5, 0.3, 0.0], None, ([0.625, 0.375, 0.0],) * 2, 1),
        ([math.nan, 0.5, 0.5], None, ([0.0, 0.5, 0.5],) * 2, 1),
        ([0.25, 0.75, -0.5], [0.25, 0.5, 0.25], ([0.25, 0.75, 0.0], [0.25, 0.5, 0.25]), 1),
        ([0.25, 0.75, 0.0], [math.inf, 0.5, 0.5], ([0.25, 0.75, 0.0], [0.0, 0.5, 0.5]), 1),
        ([1.0, 0.0, 0.0], [0.0, 0.0, 0.0], ([0.0] * 3,) * 2, 1),
        ([-1.0, math.nan, 3.0], None, ([0.0] * 3,) * 2, 1),
        ([0.0, 0.0, 0.0], None, ([0.0] * 3,) * 2, 0),
        ([0.5, 0.5, 0.0], None, ([0.5, 0.5, 0.0],) * 2, 0),
    ],
)
def test_weights_that_are_none_are_left_out_and_counted(channels, logits, lab, unc, as_if, faults, library):
    """The middle one of three samples, each of several blocks; the CPU refuses it by its value."""
    needs("fuse")
    g = torch.Generator().manual_seed(11)
    sources = [3 * torch.randn(3, channels, 2100, generator=g) for _ in range(3)]
    if not logits:
        sources = [z.sigmoid() if channels == 1 else z.softmax(1) for z in sources]
    right = [0.25, 0.25, 0.5]

    def table(middle):
        return None if middle is None else np.array([right, middle, right]).T.copy()

    made = []
    for columns in ((lab, unc), as_if):
        inputs = [sources, *map(table, columns), *_fuse(sources, logits=logits)[3:]]
        outputs = [np.full(s, 7, ops._NUMPY[d]) for s, d in ops.output_specs("fuse", inputs)]
        counters = np.zeros(len(ops.SCHEMA), np.int64)
        _core.fuse(*inputs, *outputs, 0, "emulated", ops._host_workspace, counters)
        made.append((outputs, counters[list(ops.SCHEMA).index("fuse")], counters.sum()))
        if columns is not as_if and faults:
            with pytest.raises(ValueError, match=r"(uncertainty_)?weights: expected (weights|all 0)"):
                _core.fuse(*inputs, *outputs)
    (ours, *counted), (expected, *none) = made
    assert counted == [faults, faults]
    assert none == [0, 0]
    for a, b in zip(ours, expected, strict=True):
        assert a.tobytes() == b.tobytes()


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
