# SPDX-License-Identifier: Apache-2.0
"""Every operator of the case table, from NumPy and from torch."""

import sys
from pathlib import Path

import numpy as np
import torch
from growth import check

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import CASES

from semisam import ops


def cast(value, dtype):
    """Floating arrays in `dtype` where NumPy has it (empty: as they are); all of them contiguous."""
    if isinstance(value, (list, tuple)):
        return [cast(v, dtype) for v in value]
    if not isinstance(value, np.ndarray):
        return value
    name = {"f16": "float16", "f32": "float32"}.get(dtype, "float64")
    return np.ascontiguousarray(value.astype(name) if value.dtype.kind == "f" and dtype else value)


def inputs(case):
    """The first dtype of the case, but where the schema fixes it."""
    arguments = [arg for arg in ops.SCHEMA[case.op] if arg.kind != "out"]
    values = case.inputs(np.random.default_rng(1))
    wanted = case.dtypes[0] if case.dtypes else "f64"
    return [cast(v, "" if arg.dtype == "f64" else wanted) for arg, v in zip(arguments, values, strict=True)]


def tensors(value):
    if isinstance(value, (list, tuple)):
        return [tensors(v) for v in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


torch.set_num_threads(1)
for case in {case.op: case for case in CASES}.values():
    given = inputs(case)
    on_torch = tensors(given)
    watched = [a for a in given if isinstance(a, np.ndarray)]
    watched_torch = [a for a in on_torch if isinstance(a, torch.Tensor)]
    check(f"{case.id} numpy", lambda op=case.op, a=given: ops.call(op, *a), watched, times=200)
    check(f"{case.id} torch", lambda op=case.op, a=on_torch: ops.call(op, *a), watched_torch, times=200)
