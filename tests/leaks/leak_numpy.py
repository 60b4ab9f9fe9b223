# SPDX-License-Identifier: Apache-2.0
"""Calls with NumPy arrays and DLPack capsules: the good path and every way to fail."""

import numpy as np
from growth import check, raises

from semisam import _core, ops


class Capsule:
    def __init__(self, array, new):
        self.array, self.new = array, new

    def __dlpack__(self, **options):
        if options and not self.new:
            raise TypeError("no max_version")
        return self.array.__dlpack__(**options)


class Broken:
    def __init__(self, result):
        self.result = result

    def __dlpack__(self, **options):
        if isinstance(self.result, type):
            raise self.result("broken")
        return self.result


prob = np.full((1, 2, 2, 2), 0.25, np.float32)
out = np.zeros((1, 1, 1, 1), np.float32)
frozen = np.zeros((1, 1, 1, 1), np.float32)
frozen.flags.writeable = False
raw = _core.mask_logits
seven = np.zeros((1,) * 7, np.float32)

check("good", lambda: raw(prob, 1, 1, 1, out, 1, "base"), (prob, out))
check("threads", lambda: raw(prob, 1, 1, 1, out, 2), (prob, out), times=500)
for new in (True, False):
    given, made = Capsule(prob, new), Capsule(out, new)
    check(f"capsule {new}", lambda g=given, m=made: raw(g, 1, 1, 1, m), (prob, out, given, made))
    bad = Capsule(seven, new)
    check(f"capsule dims {new}", raises(ValueError, raw, bad, 1, 1, 1, out), (seven, bad))
    bad = Capsule(prob.astype(np.complex64), new)
    check(f"capsule dtype {new}", raises(TypeError, raw, bad, 1, 1, 1, out), (bad, bad.array))
    bad = Capsule(prob[..., ::2], new)
    check(f"capsule strides {new}", raises(ValueError, raw, bad, 1, 1, 1, out), (bad, bad.array))
check("raises", raises(RuntimeError, raw, Broken(RuntimeError), 1, 1, 1, out), (out,))
check("no capsule", raises(TypeError, raw, Broken("text"), 1, 1, 1, out), (out,))
for name, error, args in [
    ("dtype", TypeError, (prob.astype(np.int32), 1, 1, 1, out)),
    ("complex", TypeError, (prob.astype(np.complex64), 1, 1, 1, out)),
    ("kind", TypeError, (object(), 1, 1, 1, out)),
    ("dims", ValueError, (seven, 1, 1, 1, out)),
    ("shape", ValueError, (prob[0], 1, 1, 1, out)),
    ("strides", ValueError, (prob[..., ::2], 1, 1, 1, out)),
    ("frozen", ValueError, (prob, 1, 1, 1, frozen)),
    ("integer", TypeError, (prob, 1.5, 1, 1, out)),
    ("huge integer", ValueError, (prob, 2**80, 1, 1, out)),
    ("kernel", ValueError, (prob, 3, 1, 1, np.zeros((1, 3, 1, 1), np.float32))),
    ("count", TypeError, (prob, 1)),
    ("threads", ValueError, (prob, 1, 1, 1, out, 1000)),
    ("isa kind", TypeError, (prob, 1, 1, 1, out, 1, 5)),
    ("isa", NotImplementedError, (prob, 1, 1, 1, out, 1, "z80")),
]:
    check(name, raises(error, raw, *args), (prob, out, *args))
check("schema", _core.schema, times=500)
check("build_info", _core.build_info)
check("empty", lambda: _core.empty(3 << 20))
check("empty fails", raises(ValueError, _core.empty, -1))
check("keep_at_most", lambda: _core.keep_at_most(1 << 20))
check("kept", _core.kept)
check("ops.call", lambda: ops.call("mask_logits", prob, 1, 1, 1), (prob,))

# Lists and numbers of whatever operators have them.
for op, schema in ops.SCHEMA.items():
    words = {"in": prob, "opt": None, "out": out, "int": 1, "dbl": 1.0, "dbls": [1.0], "list": [prob, prob]}
    args = [words[arg.kind] for arg in schema]
    for i, arg in enumerate(schema):
        wrong = {"list": [[prob, 3], 5, [prob] * 129], "dbls": [["x"], 5], "dbl": ["x"]}.get(arg.kind, [])
        for value in wrong:
            broken = [*args[:i], value, *args[i + 1 :]]
            check(
                f"{op} {arg.name}",
                raises((TypeError, ValueError), getattr(_core, op), *broken),
                (prob, out),
                500,
            )
