# SPDX-License-Identifier: Apache-2.0
"""Where memory runs out, a call raises MemoryError, loses nothing, and works again afterwards."""

import os
import subprocess
import sys

import numpy as np
import pytest

from semisam import ops

CODE = """
import gc, resource, sys
import numpy as np
from semisam import _core, ops

rng = np.random.default_rng(0)
shape = (1, 160, 160, 160)
mask = (rng.random(shape) < 0.3).astype(np.uint8)
image = rng.random(shape, np.float32)
inputs = {
    "random_walker": (image, (mask * 2).astype(np.uint8), image, 1, 1.0, 90.0, (), 1e-3, 10),
    "geodesic": (image, mask, 1, 1.0, ()),
}
op = sys.argv[1]
args = list(inputs[op])
outputs = [np.zeros(s, ops._NUMPY[d]) for s, d in ops.output_specs(op, args)]
ops._raw(op, args, outputs)  # enough memory: fine
expected = [o.copy() for o in outputs]
_core.keep_at_most(0)  # or the next call works in this one's memory
gc.collect()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), hard))
try:
    for _ in range(50):
        try:
            ops._raw(op, args, outputs)
        except MemoryError as e:
            text = str(e)
        else:
            raise SystemExit("no MemoryError")
finally:
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
after = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
assert after - used < 8 << 20, (used, after)
ops._raw(op, args, outputs)
assert all((a == b).all() for a, b in zip(outputs, expected))
print(text)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's address space limit")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer needs the room")
@pytest.mark.parametrize("op", ["random_walker", "geodesic"])
def test_no_memory_is_a_memory_error(op):
    run = subprocess.run([sys.executable, "-c", CODE, op], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith(f"{op}(): could not allocate"), run.stdout


KEPT = """
import resource
from semisam import _core

_core.keep_at_most(1 << 30)
held = [_core.empty(96 << 20) for _ in range(3)]
held.clear()
assert _core.kept() >= 288 << 20
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
array = _core.empty(200 << 20)  # no kept block is as large, and beside them there is no room
assert array.nbytes == 200 << 20
assert _core.kept() == 0
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's address space limit")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer needs the room")
def test_kept_memory_is_given_up_where_memory_is_short():
    run = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_outputs_that_fit_nowhere():
    """An output of 2^45 cells: the system says no before anything is touched, and nothing is left."""
    prob = np.full((1 << 15, 1, 1, 1), 0.5, np.float32)
    wide = np.lib.stride_tricks.as_strided(prob, (1 << 15, 1 << 10, 1 << 10, 1 << 10), (4, 0, 0, 0))
    with pytest.raises((MemoryError, ValueError)):
        ops.call("mask_logits", wide, 1 << 10, 1 << 10, 1 << 10)
