# SPDX-License-Identifier: Apache-2.0
"""The C core's operators on NumPy arrays and torch tensors.

`call(op, ...)` runs any operator of `csrc/ops.def` and returns its outputs as the caller's kind of
array. Output shapes and dtypes, torch schemas and fake kernels are derived from the operators'
schema, so a new operator needs nothing here unless it has a gradient. This is the only file that
touches `torch.library`; torch itself is imported only if the caller already did.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from semisam import _core

if TYPE_CHECKING:
    import torch

__all__ = [
    "SCHEMA",
    "Arg",
    "call",
    "faults",
    "get_num_threads",
    "lacks",
    "numbers",
    "one_device",
    "refuse_faults",
    "set_num_threads",
    "stays",
]


class Arg(NamedTuple):
    """One argument of an operator: kind is in, opt, list, out, int, dbl or dbls."""

    name: str
    kind: str
    dtype: str
    shape: str
    lo: float
    hi: float


SCHEMA: dict[str, tuple[Arg, ...]] = {
    name: tuple(Arg(*arg) for arg in args) for name, _, args in _core.schema()
}

_IS_OUT = {op: tuple(arg.kind == "out" for arg in args) for op, args in SCHEMA.items()}

# Outputs of this many bytes get blocks that are used again: first touch of fresh pages costs more than most
# operators. At most `_KEPT` bytes of outputs that died, and of memory that kernels worked in, wait for that.
_LARGE = 2 << 20
_KEPT = int(os.environ.get("SEMISAM_KEEP_MB", "") or 256) << 20
_core.keep_at_most(_KEPT)

_NUMPY = {
    "bool": np.bool_,
    "u8": np.uint8,
    "i8": np.int8,
    "u16": np.uint16,
    "i16": np.int16,
    "u32": np.uint32,
    "i32": np.int32,
    "u64": np.uint64,
    "i64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}

_threads = int(os.environ.get("SEMISAM_THREADS", "0") or 0)


def set_num_threads(n: int) -> None:
    """Use up to `n` threads in every later call; 0 (the default) follows torch, else allows all cores.

    There are never more than cores, and a call that is too short for company has one. Results do not
    depend on it. DataLoader workers use one thread, as torch tells them to.

    >>> import semisam
    >>> semisam.set_num_threads(0)
    """
    global _threads  # noqa: PLW0603  (a process-wide setting, like torch's)
    if not 0 <= n <= 256:
        raise ValueError(f"set_num_threads(): n: expected 0 to 256, got {n}")
    _threads = n


def get_num_threads() -> int:
    """Return how many threads a call uses: the setting, else torch's, else 0, which means all cores.

    >>> from semisam import ops
    >>> ops.get_num_threads() >= 0
    True
    """
    if _threads:
        return _threads
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None and hasattr(torch, "get_num_threads") else 0


def is_torch(array: Any) -> bool:
    """Tell whether `array` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, getattr(torch, "Tensor", ()))


def one_device(function: str, **arrays: Any) -> None:
    """Refuse torch tensors that are on different devices: the first one's is the one that is expected.

    >>> import torch
    >>> from semisam import ops
    >>> ops.one_device("f", prob=torch.zeros(2), mask=torch.zeros(2, device="meta"))
    Traceback (most recent call last):
    ValueError: f(): mask: expected a tensor on cpu, where prob is, got one on meta
    """
    first, home = "", None
    for name, array in arrays.items():
        if not is_torch(array):
            continue
        if home is None:
            first, home = name, array.device
        elif array.device != home:
            raise ValueError(
                f"{function}(): {name}: expected a tensor on {home}, where {first} is, "
                f"got one on {array.device}"
            )


def stays(device: Any) -> bool:
    """Tell whether values on `device` are not to be looked at: the host would wait for all work before.

    So it is on CUDA. Code for such a device computes with masks instead of choosing by a value, makes small
    arrays there (`numbers`) instead of copying them, and can then be captured in a CUDA graph.

    >>> import torch
    >>> from semisam import ops
    >>> ops.stays(torch.device("cpu")), ops.stays(torch.device("cuda", 0))
    (False, True)
    """
    return bool(device.type == "cuda")


def numbers(values: Any, dtype: Any, device: Any) -> Any:
    """Return a torch tensor of a few numbers on `device`, without a copy from the host that could wait.

    A kernel that has a number as an argument fills in all places in a row that have it, so a CUDA graph may
    be captured.

    >>> import torch
    >>> from semisam import ops
    >>> ops.numbers([[1, 2], [3, 4]], torch.float64, torch.device("cpu"))
    tensor([[1., 2.],
            [3., 4.]], dtype=torch.float64)
    """
    torch: Any = sys.modules["torch"]
    flat: list[Any] = [values.tolist() if isinstance(values, np.ndarray) else values]
    shape: list[int] = []
    while flat and isinstance(flat[0], (list, tuple)):  # without NumPy, which torch.compile cannot trace here
        shape.append(len(flat[0]))
        flat = [v for part in flat for v in part]
    if not flat:
        return torch.empty(np.shape(values), dtype=dtype, device=device)
    runs = [(v, len(list(equal))) for v, equal in itertools.groupby(flat)]
    filled = [torch.full((n,), v, dtype=dtype, device=device) for v, n in runs]
    return (torch.cat(filled) if len(filled) > 1 else filled[0]).reshape(shape)


def lacks(device: Any, wanted: Sequence[str]) -> list[str]:
    """Return those of the operators `wanted` that cannot run on tensors of `device`.

    >>> import torch
    >>> from semisam import ops
    >>> ops.lacks(torch.device("cpu"), ["fuse"]), ops.lacks(torch.device("meta"), ["fuse"])
    ([], ['fuse'])
    """
    if device.type == "cpu":
        return []
    there = () if device.type != "cuda" or load_cuda() else _core.backends().get("cuda", ())
    return [op for op in wanted if op not in there]


def call(op: str, *args: Any) -> Any:
    """Run operator `op` on `args` (inputs in schema order, outputs left out) and return its outputs.

    Arrays are all NumPy or all torch (one device); strides are arbitrary. One output is returned as
    such, several as a tuple. No gradient flows through; see `semisam.losses` for what has one.

    Raises TypeError for mixed kinds and wrong dtypes, ValueError for wrong shapes and values,
    NotImplementedError where the device has no such operator.

    >>> import numpy as np
    >>> from semisam import ops
    >>> float(ops.call("mask_logits", np.full((1, 4, 4, 4), 0.5, np.float32), 1, 1, 1)[0, 0, 0, 0])
    0.0
    """
    tensors, others = _kinds(args)
    if tensors and others:
        raise TypeError(f"{op}(): expected all arrays to be NumPy arrays or all torch tensors, got a mixture")
    if tensors:
        return _torch_call(op, args)
    inputs = [_contiguous(a) for a in args]
    outputs: list[Any] = [_empty(shape, np.dtype(_NUMPY[dtype])) for shape, dtype in output_specs(op, inputs)]
    _raw(op, inputs, outputs)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _kinds(args: Sequence[Any]) -> tuple[bool, bool]:
    """Tell whether there are tensors, and whether other arrays, among arguments and lists of them."""
    tensor: Any = getattr(sys.modules.get("torch"), "Tensor", ())
    tensors = others = False
    for arg in args:
        for a in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(a, tensor):
                tensors = True
            elif a is not None and not isinstance(a, (float, int, str, np.generic)):
                others = True
    return tensors, others


def _contiguous(a: Any) -> Any:
    if isinstance(a, np.ndarray):
        return np.ascontiguousarray(a) if a.ndim else a
    if isinstance(a, (list, tuple)):
        return [_contiguous(v) for v in a]
    return a


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    size = math.prod(shape) * dtype.itemsize
    return _core.empty(size).view(dtype).reshape(shape) if size >= _LARGE else np.empty(shape, dtype)


def _raw(op: str, inputs: Sequence[Any], outputs: Sequence[Any], isa: str | None = None) -> None:
    """Interleave inputs and outputs as the schema has them, and run."""
    given, made = iter(inputs), iter(outputs)
    in_order = [next(made if out else given) for out in _IS_OUT[op]]
    device: Any = getattr(outputs[0], "device", "cpu")
    if isa is None and (device == "cpu" or device.type == "cpu"):
        getattr(_core, op)(*in_order, get_num_threads())
    elif isa is None:
        _raw_cuda(op, in_order, device)
    else:
        getattr(_core, op)(*in_order, get_num_threads(), isa, _host_workspace)


def _host_workspace(size: int) -> Any:
    """Allocate what a kernel for a device works in, aligned as torch's CUDA allocator aligns."""
    room = np.empty(size + 256, np.uint8)
    start = -room.ctypes.data % 256
    return room[start : start + size]


def _raw_cuda(op: str, in_order: Sequence[Any], device: Any) -> None:
    """Run on `device`: made the current one, with a workspace from torch's allocator."""
    torch: Any = sys.modules["torch"]
    why = load_cuda()
    if why:
        raise NotImplementedError(f"{op}(): not available on cuda: {why}")

    def workspace(size: int) -> Any:
        return torch.empty(size, dtype=torch.uint8, device=device)

    with torch.cuda.device(device):
        run = functools.partial(getattr(_core, op), *in_order, 0, None, workspace, _faults_on(device))
        if _core.tells_stream(torch.Tensor):
            run()
            return
        # A torch before 2.10, or one whose exchange API the core does not know: it cannot ask for the current
        # stream and runs on the default one.
        current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
        default.wait_stream(current)
        run()
        current.wait_stream(default)


# ---- the library with the CUDA kernels -----------------------------------------------------------

CUDA_LIBRARY = Path(__file__).with_name("libsemisam_cuda.so")

_faults: dict[int, Any] = {}  # per device: one counter per operator, see `faults`


@functools.cache
def load_cuda() -> str:
    """Load the CUDA backend at its first use; return "" or a sentence that says why there is none.

    Not at import: asking the driver for devices would forbid CUDA in processes forked later.
    """
    if not CUDA_LIBRARY.exists():
        return "this installation was built without CUDA (SEMISAM_CUDA=1 and nvcc build it)"
    try:
        _core.load_backend(CUDA_LIBRARY)
    except ImportError as e:
        return str(e).removeprefix(f"load_backend(): {CUDA_LIBRARY}: ")
    return ""


def _faults_on(device: Any) -> Any:
    """Return the device's counters; None while a graph is being captured and there are none yet."""
    torch: Any = sys.modules["torch"]
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _faults and not torch.cuda.is_current_stream_capturing():
        _faults[index] = torch.zeros(len(SCHEMA), dtype=torch.int64, device=device)
        torch.cuda.current_stream(device).synchronize()  # once: other streams may be the next to count
    return _faults.get(index)


def faults() -> dict[str, int]:
    """Return how many faulty values CUDA operators have left out since the last call, by operator.

    On the CPU a value that could break memory safety, such as a label outside 0..C-1, raises
    ValueError. On CUDA that would need a synchronisation in every call; such voxels are left out as
    if they were to be ignored, and counted. So are samples of a fusion with weights that are none
    (`fusion.fuse` says what becomes of them). This function waits for the devices, reads the counters
    and sets them to zero.

    >>> from semisam import ops
    >>> ops.faults()
    {}
    """
    found: dict[str, int] = {}
    for counters in _faults.values():
        _wait_for(counters)
        counts = counters.tolist()
        for op, n in zip(SCHEMA, counts, strict=True):
            if n:
                found[op] = found.get(op, 0) + n
        if any(counts):
            counters.zero_()
            _wait_for(counters)  # or what another stream counts next may be wiped out
    return found


def _wait_for(counters: Any) -> None:
    """Wait for all streams of a CUDA device: any of them may count, not the current one alone."""
    if counters.is_cuda:
        sys.modules["torch"].cuda.synchronize(counters.device)


def refuse_faults() -> None:
    """Raise ValueError if CUDA operators have met faulty values since the last look; see `faults`.

    For places where the host waits for the devices anyway. The CPU refuses such values at once and by
    their value.

    >>> from semisam import ops
    >>> ops.refuse_faults()
    """
    found = faults()
    if found:
        counts = "; ".join(f"{op}(): {n} left out" for op, n in found.items())
        raise ValueError(
            f"{counts}: expected labels that are classes or ignored, and weights of at least 0 that sum to 1 "
            "over the sources of a fusion, got others in an earlier call on a GPU (on the CPU the same call "
            "says which)"
        )


# ---- shapes and dtypes of outputs ---------------------------------------------------------------


class _Output(NamedTuple):
    shape: tuple[int | str, ...]  # a number, a size's name, or "*" for all remaining ones
    dtype: str


def _words(shape: str) -> tuple[int | str, ...]:
    words = ("*" if word.endswith("*") else word for word in shape.split())
    return tuple(int(word) if word.isdigit() else word for word in words)


# The schema as a call needs it: what is given as (name, kind, words of its shape), and the outputs.
_GIVEN = {
    op: tuple((arg.name, arg.kind, _words(arg.shape)) for arg in args if arg.kind != "out")
    for op, args in SCHEMA.items()
}
_MADE = {
    op: tuple(_Output(_words(arg.shape), arg.dtype) for arg in args if arg.kind == "out")
    for op, args in SCHEMA.items()
}


def output_specs(op: str, inputs: Sequence[Any]) -> list[tuple[tuple[int, ...], str]]:
    """Return shape and dtype name of every output, from the schema and the inputs alone."""
    given = _GIVEN[op]
    if len(given) != len(inputs):
        names = ", ".join(name for name, _, _ in given)
        raise TypeError(f"{op}(): expected {len(given)} arguments ({names}), got {len(inputs)}")
    sizes: dict[str, Any] = {}
    by_name: dict[str, Any] = {}
    for (name, kind, words), value in zip(given, inputs, strict=True):
        if kind == "int":
            sizes[name] = value
        elif kind in ("in", "opt", "list"):
            first = value[0] if kind == "list" and len(value) else value
            by_name[name] = first
            if first is not None and hasattr(first, "shape"):
                _bind(words, first.shape, sizes)
    specs = []
    for out in _MADE[op]:
        shape: list[int] = []
        for word in out.shape:
            if word == "*":
                shape.extend(sizes.get("*", ()))
            else:
                # A name without a size means a wrong input, which the core's checks will name.
                shape.append(sizes.get(word, 0) if isinstance(word, str) else word)
        specs.append((tuple(shape), _output_dtype(out.dtype, by_name)))
    return specs


def _bind(words: Sequence[int | str], shape: Sequence[int], sizes: dict[str, Any]) -> None:
    for d, word in enumerate(words):
        if word == "*":
            sizes.setdefault("*", tuple(shape[d:]))
        elif d < len(shape):
            sizes.setdefault(str(word), shape[d])


def _output_dtype(expression: str, by_name: dict[str, Any]) -> str:
    if expression.startswith("="):
        return dtype_name(by_name[expression[1:]])
    if expression.startswith("acc="):
        return "f64" if dtype_name(by_name[expression[4:]]) == "f64" else "f32"
    return expression


_SHORT = {"float": "f", "int": "i", "uint": "u", "bfloat": "bf"}


def dtype_name(array: Any) -> str:
    """Return the schema's name of an array's dtype, such as f32; the plain name if it has none."""
    return _short_name(getattr(array, "dtype", ""))


@functools.cache
def _short_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    letters = name.rstrip("0123456789")
    return _SHORT.get(letters, letters) + name[len(letters) :]


# ---- torch --------------------------------------------------------------------------------------

_library: Any = None


def _torch_call(op: str, args: Sequence[Any]) -> Any:
    torch: Any = sys.modules["torch"]
    register()
    return getattr(torch.ops.semisam, op)(*[_plain(a, torch) for a in args])


def _plain(a: Any, torch: Any) -> Any:
    """Strip tensor subclasses (MONAI's MetaTensor) and the graph."""
    if isinstance(a, torch.Tensor):
        return _bare(a.detach() if a.requires_grad else a, torch)
    if isinstance(a, (list, tuple)) and len(a) and isinstance(a[0], torch.Tensor):
        return [_plain(v, torch) for v in a]
    return a


def _bare(a: Any, torch: Any) -> Any:
    """A tensor without its subclass, unless that takes the operators' place (fake tensors)."""
    kind = type(a)
    if kind is torch.Tensor or kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return a
    return a.as_subclass(torch.Tensor)


def _tensors(a: Any, tensor: Any) -> Sequence[Any]:
    """Return the tensors of one argument: itself, or a list of them (lists of numbers are long)."""
    if isinstance(a, tensor):
        return (a,)
    return a if isinstance(a, (list, tuple)) and len(a) and isinstance(a[0], tensor) else ()


def register() -> None:
    """Define every operator in torch.library, once; called when a tensor first arrives."""
    global _library  # noqa: PLW0603  (torch wants one library object alive for the whole process)
    if _library is not None:
        return
    torch: Any = importlib.import_module("torch")
    _library = torch.library.Library("semisam", "DEF")
    words = {
        "in": "Tensor {}",
        "opt": "Tensor? {}",
        "list": "Tensor[] {}",
        "int": "SymInt {}",
        "dbl": "float {}",
        "dbls": "float[] {}",
    }
    for op, args in SCHEMA.items():
        inputs = ", ".join(words[arg.kind].format(arg.name) for arg in args if arg.kind != "out")
        results = ["Tensor" for arg in args if arg.kind == "out"]
        output = results[0] if len(results) == 1 else f"({', '.join(results)})"
        _library.define(f"{op}({inputs}) -> {output}")
        for key in ("CPU", "CUDA"):
            _library.impl(op, _torch_kernel(op, torch), key)
        torch.library.register_fake(f"semisam::{op}", _torch_fake(op, torch), lib=_library)
    _define_functions()


def _torch_dtypes(torch: Any) -> dict[str, torch.dtype]:
    return {
        **{name: getattr(torch, np.dtype(kind).name) for name, kind in _NUMPY.items()},
        "bf16": torch.bfloat16,
    }


def _torch_kernel(op: str, torch: Any) -> Any:
    dtypes = _torch_dtypes(torch)
    tensor = torch.Tensor

    def contiguous(a: Any) -> Any:
        if isinstance(a, tensor):
            return a.contiguous()
        return [v.contiguous() for v in a] if _tensors(a, tensor) else a

    def kernel(*args: Any) -> Any:
        inputs = [contiguous(a) for a in args]
        device = _device(op, inputs, torch)
        outputs = []
        for shape, dtype in output_specs(op, inputs):
            outputs.append(empty(shape, dtypes[dtype], device))
        _raw(op, inputs, outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return kernel


def empty(shape: Sequence[int], dtype: Any, device: Any) -> Any:
    """Return a torch tensor without values; a large one on the CPU takes the memory of a dead one.

    >>> import torch
    >>> from semisam import ops
    >>> ops.empty((2, 3), torch.float32, torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    torch: Any = sys.modules["torch"]
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    storage = torch.from_numpy(_core.empty(size)).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


def _torch_fake(op: str, torch: Any) -> Any:
    dtypes = _torch_dtypes(torch)

    def fake(*args: Any) -> Any:
        device = _device(op, args, torch)
        outputs = [
            torch.empty(shape, dtype=dtypes[dtype], device=device) for shape, dtype in output_specs(op, args)
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return fake


def _device(op: str, args: Sequence[Any], torch: Any) -> Any:
    """Return where all of an operator's tensors are."""
    home = None
    for (name, kind, _), a in zip(_GIVEN[op], args, strict=True):
        for i, v in enumerate(_tensors(a, torch.Tensor)):
            if home is None:
                home = v.device
            elif v.device != home:
                label = f"{name}[{i}]" if kind == "list" else name
                raise ValueError(f"{op}(): {label}: expected a tensor on {home}, got one on {v.device}")
    return torch.device("cpu") if home is None else home


# ---- gradients ----------------------------------------------------------------------------------


def voxel_loss(
    logits: Any,
    targets: Sequence[Any],
    weights: Sequence[Any],
    params: Sequence[float],
    activation: int,
    terms: int,
) -> Any:
    """Return losses [terms, B, C] of the operator `voxel_loss_forward` with gradient to the logits.

    The operators are raw; the `autograd.Function` is around them, which is what torch.compile traces.
    Targets and weights are detached. Twice differentiable it is not: that raises RuntimeError.
    """
    torch: Any = sys.modules["torch"]
    register()
    logits = _bare(logits, torch)
    others = [_plain(t, torch) for t in (*targets, *weights)]
    return _functions["VoxelLoss"].apply(
        logits.contiguous(), tuple(params), activation, terms, len(targets), *others
    )


_functions: dict[str, Any] = {}


def _run(direction: str, *args: Any) -> Any:
    """Call a raw operator; a global function, as the compiler of torch 2.5 reads no module from a closure."""
    import torch  # noqa: PLC0415

    return getattr(torch.ops.semisam, f"voxel_loss_{direction}")(*args)


def _define_functions() -> None:
    import torch  # noqa: PLC0415  (only called where the caller has it)

    class VoxelLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Any, params: Any, *args: Any) -> Any:
            activation, terms, n, *arrays = args
            values, stats = _run("forward", logits, arrays[:n], arrays[n:], params, activation, terms)
            ctx.save_for_backward(logits, stats, *arrays)
            ctx.params, ctx.activation, ctx.terms, ctx.n = params, activation, terms, n
            return values

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            if torch.is_grad_enabled():  # once_differentiable would drop the second derivative silently
                raise RuntimeError("voxel_loss(): create_graph: expected False: differentiable once only")
            logits, stats, *arrays = ctx.saved_tensors
            given = (logits, arrays[: ctx.n], arrays[ctx.n :], ctx.params)
            dlogits = _run("backward", *given, stats, grad, ctx.activation, ctx.terms)
            return dlogits, *[None] * (4 + len(arrays))

    _functions["VoxelLoss"] = VoxelLoss


if "torch" in sys.modules:
    register()  # now rather than inside somebody's torch.compile
