# SPDX-License-Identifier: Apache-2.0
"""Checks that every operator passes, written once and run over the table in cases.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CASES, Case

from semisam import _core, ops, reference

TORCH_DTYPE = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
RUNS = [(case, dtype) for case in CASES for dtype in case.dtypes or ("",)]
IDS = [f"{case.id}-{dtype or 'int'}" for case, dtype in RUNS]
all_runs = pytest.mark.parametrize(("case", "dtype"), RUNS, ids=IDS)
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


def tree_map(f, value):
    if isinstance(value, (list, tuple)):
        return [tree_map(f, v) for v in value]
    return f(value) if isinstance(value, (np.ndarray, torch.Tensor)) else value


def make(case: Case, dtype: str, seed: int = 7):
    """Inputs as torch tensors, floating ones in `dtype` unless the schema fixes theirs."""
    given = [arg for arg in ops.SCHEMA[case.op] if arg.kind != "out"]

    def cast(a: np.ndarray, fixed: bool) -> torch.Tensor:
        t = torch.from_numpy(np.ascontiguousarray(a))
        return t.to(TORCH_DTYPE[dtype]) if t.is_floating_point() and dtype and not fixed else t

    values = case.inputs(np.random.default_rng(seed))
    return [
        tree_map(lambda a, fixed=arg.dtype == "f64": cast(a, fixed), v)
        for arg, v in zip(given, values, strict=True)
    ]


def run(case: Case, inputs):
    out = ops.call(case.op, *inputs)
    return list(out) if isinstance(out, (tuple, list)) else [out]


def raw(case: Case, inputs, threads: int, isa: str | None):
    """The core itself, with fresh outputs full of garbage: unwritten elements show."""
    outputs = []
    for shape, dtype in ops.output_specs(case.op, inputs):
        t = torch.empty(shape, dtype=ops._torch_dtypes(torch)[dtype])
        if t.numel():
            t.view(torch.uint8).fill_(0xA5)
        outputs.append(t)
    given, made = iter(inputs), iter(outputs)
    args = [next(made if a.kind == "out" else given) for a in ops.SCHEMA[case.op]]
    getattr(_core, case.op)(*args, threads, isa)
    return outputs


def bits(outputs):
    return [t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b"" for t in outputs]


def check_value(case: Case, inputs, got):
    expected = getattr(reference, case.op)(
        *[tree_map(lambda t: t.double() if t.is_floating_point() else t, v) for v in inputs]
    )
    expected = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        if not g.numel() and not e.numel():
            continue  # an output that was not asked for
        assert tuple(g.shape) == tuple(e.shape)
        if g.is_floating_point():
            torch.testing.assert_close(
                g.double(),
                e.double(),
                atol=case.atol,
                rtol=case.rtol,
                equal_nan=True,
                msg=lambda m: f"{m}\n{case.why}",
            )
        else:
            assert torch.equal(g.long(), e.long())


@all_runs
def test_value(case, dtype):
    inputs = make(case, dtype)
    check_value(case, inputs, run(case, inputs))


@all_runs
def test_same_bits_for_every_thread_count_and_instruction_set(case, dtype):
    inputs = make(case, dtype)
    expected = bits(raw(case, inputs, 1, "base"))
    for isa in _core.build_info()["isa"]:
        for threads in (1, 2, -2, -3, -7):  # below 0: at once, whatever the work
            assert bits(raw(case, inputs, threads, isa)) == expected, (isa, threads)
    assert bits(run(case, inputs)) == expected


@all_runs
def test_numpy_and_torch_agree_and_inputs_stay(case, dtype):
    if dtype == "bf16":
        pytest.skip("NumPy has no bfloat16")
    inputs = make(case, dtype)
    arrays = [tree_map(lambda t: t.numpy().copy(), v) for v in inputs]
    outputs = ops.call(case.op, *arrays)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    assert all(isinstance(o, np.ndarray) for o in outputs)
    assert [o.tobytes() for o in outputs] == bits(run(case, inputs))
    flat_now, flat_then = [], []
    tree_map(lambda a: flat_now.append(a.tobytes()), arrays)
    tree_map(lambda t: flat_then.append(t.numpy().tobytes()), inputs)
    assert flat_now == flat_then


@all_runs
def test_any_strides(case, dtype):
    inputs = make(case, dtype)

    def strided(t):
        wide = torch.zeros((*t.shape, 2), dtype=t.dtype)
        wide[..., 0] = t
        moved = wide.movedim(0, -2).contiguous().movedim(-2, 0) if t.ndim > 1 else wide
        return moved[..., 0]

    assert bits(run(case, [tree_map(strided, v) for v in inputs])) == bits(run(case, inputs))


@all_cases
def test_opcheck(case):
    ops.register()
    inputs = make(case, case.dtypes[0] if case.dtypes else "")
    op = getattr(torch.ops.semisam, case.op).default
    torch.library.opcheck(op, tuple(inputs), test_utils=("test_schema", "test_faketensor"))


@all_cases
def test_wrong_dtype_shape_and_size_name_the_argument(case):
    inputs = make(case, case.dtypes[0] if case.dtypes else "")
    given = [a for a in ops.SCHEMA[case.op] if a.kind != "out"]
    for i, arg in enumerate(given):
        if arg.kind not in ("in", "opt") or inputs[i] is None:
            continue

        def broken(value, i=i):
            return [*inputs[:i], value, *inputs[i + 1 :]]

        value = inputs[i]
        if arg.dtype != "any":
            with pytest.raises(TypeError, match=rf"{case.op}\(\): {arg.name}: expected dtype"):
                ops.call(case.op, *broken(_wrong_dtype(value)))
        if arg.shape != "*":
            wrong = value[None, None, None] if value.ndim < 4 else value[0, 0, 0]
            with pytest.raises(ValueError, match=rf"{case.op}\(\): \w+(\[0\])?: expected"):
                ops.call(case.op, *broken(wrong))
        with pytest.raises(ValueError, match=rf"{case.op}\(\): \w+(\[0\])?: expected"):
            ops.call(case.op, *broken(value[:0]))


def _wrong_dtype(t):
    return t.to(torch.int32) if t.is_floating_point() else t.to(torch.float32)


@all_cases
def test_read_only_output_is_refused(case):
    inputs = make(case, "f32" if case.dtypes else "")
    arrays = [tree_map(lambda t: t.numpy(), v) for v in inputs]
    outputs = [np.empty(s, ops._NUMPY[d]) for s, d in ops.output_specs(case.op, arrays)]
    for o in outputs:
        o.flags.writeable = False
    with pytest.raises(ValueError, match=r"expected a writable array, got a read-only one"):
        ops._raw(case.op, arrays, outputs)


def test_mixed_kinds():
    with pytest.raises(TypeError, match="expected all arrays to be NumPy arrays or all torch tensors"):
        ops.call("mask_logits", [np.zeros(3), torch.zeros(3)], 1, 1, 1)


def test_every_operator_has_a_case_and_a_reference():
    assert {c.op for c in CASES} == set(ops.SCHEMA)
    assert all(hasattr(reference, op) for op in ops.SCHEMA)
