# SPDX-License-Identifier: Apache-2.0
"""The border between Python and the core: every way in which an array may arrive, and be wrong.

All on `_core.mask_logits`, whose schema is short: (prob, d, h, w, logits), then threads and isa.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from exchange_api import Exchange

from semisam import _core, ops

ROOT = Path(__file__).parents[1]
EXPECTED = -1.0986122886681098  # logit of 1/4


def prob(dtype=np.float32, shape=(1, 2, 2, 2)):
    return np.full(shape, 0.25, dtype)


def out():
    return np.full((1, 1, 1, 1), 7, np.float32)


def call(p, logits=None, *options):
    logits = out() if logits is None else logits
    assert _core.mask_logits(p, 1, 1, 1, logits, *options) is None
    return float(np.asarray(logits).reshape(-1)[0])


def refuses(error, text, *args):
    with pytest.raises(error) as info:
        _core.mask_logits(*args)
    assert type(info.value) is error
    assert str(info.value) == text


class Capsule:
    """An array that is known by `__dlpack__` alone; `new` says whether it knows max_version."""

    def __init__(self, array, new=True):
        self.array, self.new, self.asked = array, new, []

    def __dlpack_device__(self):
        return (1, 0)

    @property
    def dtype(self):
        return self.array.dtype

    def __dlpack__(self, **options):
        self.asked.append(options)
        if not self.new and options:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        return self.array.__dlpack__(**options)


# ---- kinds of arrays ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy(dtype):
    assert call(prob(dtype)) == pytest.approx(EXPECTED, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_exchange(dtype):
    logits = torch.zeros(1, 1, 1, 1)
    assert call(torch.full((1, 2, 2, 2), 0.25, dtype=dtype), logits) == pytest.approx(EXPECTED, abs=1e-6)
    assert logits.item() == pytest.approx(EXPECTED, abs=1e-6)


def test_torch_offset_view():
    t = torch.cat([torch.full((1, 2, 2, 2), 0.9), torch.full((1, 2, 2, 2), 0.25)])
    assert call(t[1:]) == pytest.approx(EXPECTED, abs=1e-6)


@pytest.mark.parametrize("new", [True, False], ids=["versioned", "unversioned"])
def test_capsule(new):
    given, logits = Capsule(prob(), new), out()
    references = sys.getrefcount(given.array)
    assert _core.mask_logits(given, 1, 1, 1, Capsule(logits, new)) is None
    assert given.asked == ([{"max_version": (1, 0)}] if new else [{"max_version": (1, 0)}, {}])
    assert logits[0, 0, 0, 0] == np.float32(EXPECTED)
    after = sys.getrefcount(given.array)  # outside the assert, which keeps a reference itself
    assert after == references


@pytest.mark.parametrize(
    ("exchange", "told"),
    [
        (None, False),
        (Exchange(1), True),
        (Exchange(1, stream=None), False),
        (Exchange(0), False),
        (Exchange(2), False),
        (Exchange(2, Exchange(1)), True),
        (Exchange(3, Exchange(2, Exchange(1))), True),
        (Exchange(3, Exchange(2)), False),
    ],
)
def test_a_stream_is_told_by_a_known_exchange_api_alone(exchange, told):
    """Of another major version nothing is read but what it was before; its arrays come by `__dlpack__`."""

    class Array(Capsule):
        if exchange is not None:
            __dlpack_c_exchange_api__ = exchange.capsule()

    assert _core.tells_stream(Array) is told
    given = Array(prob())
    assert call(given) == pytest.approx(EXPECTED, abs=1e-6)
    assert given.asked


def test_what_is_no_exchange_api_tells_no_stream():
    renamed = Exchange(1)
    for wrong in (None, 3, renamed.capsule(b"another name")):
        assert not _core.tells_stream(type("Array", (), {"__dlpack_c_exchange_api__": wrong}))
    assert not _core.tells_stream(np.ndarray)
    assert _core.tells_stream(torch.Tensor) is hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def test_capsule_of_one_kind_per_argument():
    assert call(Capsule(prob(np.float64)), torch.zeros(1, 1, 1, 1)) == pytest.approx(EXPECTED, abs=1e-6)


def test_capsule_is_used_once():
    class Kept(Capsule):
        def __dlpack__(self, **options):
            self.capsule = super().__dlpack__(**options)
            return self.capsule

    kept = Kept(prob())
    call(kept)
    assert "used_dltensor_versioned" in repr(kept.capsule)
    kept.__class__.__dlpack__ = lambda self, **_: self.capsule
    text = "mask_logits(): prob: __dlpack__() returned no DLPack capsule"
    refuses(TypeError, text, kept, 1, 1, 1, out())


def test_capsule_read_only():
    frozen = out()
    frozen.flags.writeable = False
    text = "mask_logits(): logits: expected a writable array, got a read-only one"
    refuses(ValueError, text, prob(), 1, 1, 1, Capsule(frozen))
    refuses(ValueError, text, prob(), 1, 1, 1, frozen)
    p = prob()
    p.flags.writeable = False
    assert call(p) == call(Capsule(p)) == call(prob())


def test_capsule_failures():
    class Raises(Capsule):
        def __dlpack__(self, **options):
            raise RuntimeError("device lost")

    class Nothing(Capsule):
        def __dlpack__(self, **options):
            return None

    refuses(RuntimeError, "device lost", Raises(prob()), 1, 1, 1, out())
    text = "mask_logits(): prob: __dlpack__() returned no DLPack capsule"
    refuses(TypeError, text, Nothing(prob()), 1, 1, 1, out())


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Handmade:
    """An unversioned capsule with any field at will and no deleter."""

    def __init__(self, array, **fields):
        ndim = fields.pop("ndim", array.ndim)
        self.array = array
        self.shape = (ctypes.c_int64 * max(ndim, 1))(*(array.shape[:ndim]), *[1] * (ndim - array.ndim))
        self.managed = Managed(
            DLTensor(array.ctypes.data, 1, 0, ndim, 2, 8 * array.itemsize, 1, self.shape, None, 0), None, None
        )
        for name, value in fields.items():
            setattr(self.managed.tensor, name, value)

    def __dlpack__(self):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)


def test_capsule_without_strides_is_contiguous():
    assert call(Handmade(prob())) == call(prob())


def test_capsule_byte_offset():
    p = np.concatenate([np.full(8, 0.9, np.float32), np.full(8, 0.25, np.float32)])
    p = p.reshape(2, 2, 2, 2)
    given = Handmade(p, byte_offset=32)
    given.shape[0] = 1
    assert call(given) == call(prob())


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"lanes": 2}, "float32"),
        ({"bits": 12}, "float32"),
        ({"bits": 8}, "float32"),
        ({"code": 5, "bits": 64}, "float32"),
        ({"code": 4, "bits": 32}, "float32"),
        ({"code": 6, "bits": 32}, "float32"),
        ({"code": 77}, "float32"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_capsule_dtype(fields, got):
    given = Handmade(prob(), **fields)
    given.dtype = got
    text = "mask_logits(): prob: expected a boolean, integer or floating-point array, got dtype float32"
    refuses(TypeError, text, given, 1, 1, 1, out())


@pytest.mark.parametrize(("code", "name"), [(0, "i"), (1, "u")])
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_capsule_integers_reach_the_schema(code, name, bits):
    text = f"mask_logits(): prob: expected dtype f16, bf16, f32, f64, got {name}{bits}"
    refuses(TypeError, text, Handmade(prob(np.float64), code=code, bits=bits), 1, 1, 1, out())


def test_capsule_device():
    text = (
        "mask_logits(): prob: expected an array on the CPU or a CUDA device, got DLPack device type 8; "
        "move it with .cpu()"
    )
    refuses(ValueError, text, Handmade(prob(), device_type=8), 1, 1, 1, out())
    cuda = Handmade(prob(), device_type=2, device_id=1)
    with pytest.raises((ValueError, NotImplementedError), match=r"^mask_logits\(\): "):
        _core.mask_logits(cuda, 1, 1, 1, Handmade(out(), device_type=2, device_id=1))


@pytest.mark.parametrize("ndim", [7, 2**31 - 1])
def test_capsule_too_many_dimensions(ndim):
    given = Handmade(prob(), ndim=7)
    given.managed.tensor.ndim = ndim
    text = f"mask_logits(): prob: expected at most 6 dimensions, got {ndim}"
    refuses(ValueError, text, given, 1, 1, 1, out())


def test_capsule_negative_dimensions():
    given = Handmade(prob())
    given.managed.tensor.ndim = -1
    refuses(ValueError, "mask_logits(): prob: expected at most 6 dimensions, got -1", given, 1, 1, 1, out())


# ---- arrays that do not fit ---------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, 0.5, "text", [[0.5]], object(), np.float32(1)], ids=type)
def test_no_array(given):
    text = f"mask_logits(): prob: expected a NumPy array or a torch tensor, got {type(given)}"
    refuses(TypeError, text, given, 1, 1, 1, out())


@pytest.mark.parametrize("dtype", ["c8", "c16", "U3", "S3", "O", "M8[s]", "m8[s]", "f4,f4", "V4", "g", ">f4"])
def test_dtypes_without_a_name_in_the_core(dtype):
    array = np.zeros((1, 2, 2, 2), dtype)
    text = (
        f"mask_logits(): prob: expected a boolean, integer or floating-point array, got dtype {array.dtype}"
    )
    refuses(TypeError, text, array, 1, 1, 1, out())


CODES = ["?", "B", "b", "H", "h", "I", "i", "L", "l", "Q", "q"]
NAMES = ["bool", "u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "u64", "i64"]


@pytest.mark.parametrize(("dtype", "name"), list(zip(CODES, NAMES, strict=True)))
def test_every_integer_dtype_has_its_name(dtype, name):
    text = f"mask_logits(): prob: expected dtype f16, bf16, f32, f64, got {name}"
    refuses(TypeError, text, np.zeros((1, 2, 2, 2), dtype), 1, 1, 1, out())


def test_torch_dtypes_without_a_name_in_the_core():
    text = (
        "mask_logits(): prob: expected a boolean, integer or floating-point array, got dtype torch.complex64"
    )
    refuses(TypeError, text, torch.zeros(1, 2, 2, 2, dtype=torch.complex64), 1, 1, 1, out())


def test_dimensions():
    text = "mask_logits(): prob: expected at most 6 dimensions, got {}"
    refuses(ValueError, text.format(7), np.zeros((1,) * 7, np.float32), 1, 1, 1, out())
    refuses(ValueError, text.format(9), torch.zeros((1,) * 9), 1, 1, 1, out())
    text = "mask_logits(): prob: expected shape (N, D, H, W), got ()"
    refuses(ValueError, text, np.zeros((), np.float32), 1, 1, 1, out())
    refuses(ValueError, text, torch.tensor(3.0), 1, 1, 1, out())


def test_empty():
    text = "mask_logits(): prob: expected at least one element, got shape (0, 2, 2, 2)"
    refuses(ValueError, text, np.zeros((0, 2, 2, 2), np.float32), 1, 1, 1, out())
    refuses(ValueError, text, torch.zeros(0, 2, 2, 2), 1, 1, 1, out())


@pytest.mark.parametrize("view", [np.s_[:, :, :, ::-1], np.s_[:, ::2], np.s_[..., ::2], np.s_[:, :, ::-1]])
def test_strides_in_raw_calls(view):
    array = np.zeros((1, 4, 4, 4), np.float32)[view]
    refuses(ValueError, "mask_logits(): prob: expected a C-contiguous array", array, 1, 1, 1, out())
    refuses(ValueError, "mask_logits(): prob: expected a C-contiguous array", Capsule(array), 1, 1, 1, out())


def test_strides_in_ops_call():
    array = np.random.default_rng(1).random((1, 4, 4, 8))[..., ::-2]
    np.testing.assert_array_equal(
        ops.call("mask_logits", array, 2, 2, 2), ops.call("mask_logits", array.copy(), 2, 2, 2)
    )


def test_a_dimension_of_one_may_have_any_stride():
    array = np.lib.stride_tricks.as_strided(prob(), (1, 2, 2, 2), (99996, 16, 8, 4))
    assert call(array) == call(prob())


def test_unaligned():
    memory = np.zeros(8 * 4 + 1, np.uint8)
    array = memory[1:].view(np.float32).reshape(1, 2, 2, 2)
    text = "mask_logits(): prob: expected memory aligned to its element size"
    refuses(ValueError, text, array, 1, 1, 1, out())


def test_fields_of_a_record_have_odd_strides():
    record = np.zeros((1, 2, 2, 2), np.dtype([("a", "u1"), ("p", "f4")]))
    with pytest.raises(ValueError, match=r"prob: expected (a C-contiguous array|memory aligned)"):
        _core.mask_logits(record["p"], 1, 1, 1, out())


# ---- subclasses ---------------------------------------------------------------------------------


def test_memmap(tmp_path):
    path = tmp_path / "volume.raw"
    prob().tofile(path)
    assert call(np.memmap(path, np.float32, "r", shape=(1, 2, 2, 2))) == call(prob())
    result = np.memmap(tmp_path / "out.raw", np.float32, "w+", shape=(1, 1, 1, 1))
    assert call(prob(), result) == call(prob())


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_matrix_and_masked():
    text = "mask_logits(): prob: expected shape (2, 2, H, W), got (2, 2)"
    refuses(ValueError, text, np.matrix(np.zeros((2, 2), np.float32)), 1, 1, 1, out())
    assert call(np.ma.masked_array(prob())) == call(prob())


def test_metatensor_and_parameter():
    monai_data = pytest.importorskip("monai.data")
    for given in (
        monai_data.MetaTensor(torch.full((1, 2, 2, 2), 0.25)),
        torch.nn.Parameter(torch.full((1, 2, 2, 2), 0.25)),
    ):
        result = ops.call("mask_logits", given, 1, 1, 1)
        assert type(result) is torch.Tensor
        assert not result.requires_grad
        assert result.item() == call(prob())


def test_tensors_that_need_a_gradient_by_capsule():
    """torch before 2.10 has no exchange API, and no capsule for them."""

    class NeedsGradient(Capsule):
        requires_grad = True

        def __dlpack__(self, **options):
            raise RuntimeError("Can't export tensors that require gradient, use tensor.detach()")

        def detach(self):
            return Capsule(self.array)

    before = sys.getrefcount(Capsule)
    for _ in range(100):
        assert call(NeedsGradient(prob())) == call(prob())
    assert sys.getrefcount(Capsule) - before < 50


# ---- numbers and options ------------------------------------------------------------------------


@pytest.mark.parametrize("given", [1.0, "1", None, [1], np.float64(1)], ids=repr)
def test_no_integer(given):
    text = f"mask_logits(): d: expected an integer, got {type(given)}"
    refuses(TypeError, text, prob(), given, 1, 1, out())


@pytest.mark.parametrize("given", [2**63, -(2**63) - 1, 10**30])
def test_integer_too_large(given):
    text = f"mask_logits(): d: expected an integer of 64 bits, got {given}"
    refuses(ValueError, text, prob(), given, 1, 1, out())


@pytest.mark.parametrize("given", [True, np.int8(1), np.uint64(1), np.bool_(True)], ids=repr)
def test_anything_with_an_index_is_an_integer(given):
    if isinstance(given, np.bool_):
        if np.lib.NumpyVersion(np.__version__) < "2.3.0":
            pytest.skip("NumPy's bool is an index until 2.3")
        refuses(
            TypeError, f"mask_logits(): d: expected an integer, got {np.bool_}", prob(), given, 1, 1, out()
        )
        return
    _core.mask_logits(prob(), given, 1, 1, out())


def test_integer_below_the_range():
    text = "mask_logits(): d: expected an integer of at least 1, got 0"
    refuses(ValueError, text, prob(), 0, 1, 1, out())
    text = "mask_logits(): d: expected an integer of at least 1, got -9223372036854775808"
    refuses(ValueError, text, prob(), -(2**63), 1, 1, out())


@pytest.mark.parametrize("n", [0, 4, 10])
def test_number_of_arguments(n):
    args = [prob(), 1, 1, 1, out(), 1, None, None, None, None][:n]
    text = f"mask_logits(): expected 5 arguments (and threads, isa, allocate, faults), got {n}"
    refuses(TypeError, text, *args)


def test_keywords_are_refused():
    with pytest.raises(TypeError, match="takes no keyword arguments"):
        _core.mask_logits(prob(), 1, 1, 1, logits=out())


@pytest.mark.parametrize("threads", [0, 1, 2, 256, -1, -2, -256])
def test_threads(threads):
    assert call(prob(), None, threads) == call(prob())


@pytest.mark.parametrize("threads", [-257, 257, 2**40])
def test_threads_out_of_range(threads):
    text = (
        f"mask_logits(): threads: expected 0 (automatic) to 256, or as many below 0 (at once), got {threads}"
    )
    refuses(ValueError, text, prob(), 1, 1, 1, out(), threads)


@pytest.mark.parametrize("threads", ["2", 2.5, None, 10**30], ids=repr)
def test_threads_of_another_kind(threads):
    text = f"mask_logits(): threads: expected an integer, got {type(threads)}"
    if isinstance(threads, int):
        refuses(
            ValueError,
            text.partition(",")[0] + f" of 64 bits, got {threads}",
            prob(),
            1,
            1,
            1,
            out(),
            threads,
        )
    else:
        refuses(TypeError, text, prob(), 1, 1, 1, out(), threads)


def test_isa():
    for name in _core.build_info()["isa"]:
        assert call(prob(), None, 1, name) == call(prob())
    assert call(prob(), None, 1, None) == call(prob())
    text = "mask_logits(): not available on cpu with instruction set z80"
    refuses(NotImplementedError, text, prob(), 1, 1, 1, out(), 1, "z80")


@pytest.mark.parametrize("isa", [3, b"v3", "v\udcff"], ids=repr)
def test_isa_of_another_kind(isa):
    text = f"mask_logits(): isa: expected a name such as v3, got {type(isa)}"
    refuses(TypeError, text, prob(), 1, 1, 1, out(), 1, isa)


# ---- lists and numbers of whatever operators have them ------------------------------------------


def operators_with(kind):
    return [
        pytest.param(op, i, arg.name, id=f"{op}-{arg.name}")
        for op, args in ops.SCHEMA.items()
        for i, arg in enumerate(args)
        if arg.kind == kind
    ]


def dummies(op):
    """Something of the right Python type for every argument, so that conversion gets to the last."""
    one = np.zeros((1, 1, 1, 1), np.float32)
    words = {"in": one, "opt": None, "out": one, "int": 1, "dbl": 1.0, "dbls": [1.0], "list": [one]}
    return [words[arg.kind] for arg in ops.SCHEMA[op]]


def check_conversion(op, i, value, error, text):
    args = dummies(op)
    args[i] = value
    with pytest.raises(error) as info:
        getattr(_core, op)(*args)
    assert str(info.value) == text


@pytest.mark.parametrize(("op", "i", "name"), operators_with("list"))
def test_lists(op, i, name):
    one = np.zeros((1, 1, 1, 1), np.float32)
    text = f"{op}(): {name}: expected a list of arrays, got "
    for bad in (None, 3, one, {1: one}, (v for v in [one])):
        check_conversion(op, i, bad, TypeError, text + str(type(bad)))
    text = f"{op}(): {name}: expected at most 128 arrays, got 129"
    check_conversion(op, i, [one] * 129, ValueError, text)
    text = f"{op}(): {name}[1]: expected a NumPy array or a torch tensor, got <class 'int'>"
    check_conversion(op, i, [one, 3], TypeError, text)


@pytest.mark.parametrize(("op", "i", "name"), operators_with("dbl"))
def test_doubles(op, i, name):
    for bad in (None, "1", [1.0], 1j):
        text = f"{op}(): {name}: expected a number, got {type(bad)}"
        check_conversion(op, i, bad, TypeError, text)


@pytest.mark.parametrize(("op", "i", "name"), operators_with("dbls"))
def test_lists_of_numbers(op, i, name):
    for bad in (None, 3.0, ["x"], [None], [1j]):
        text = f"{op}(): {name}: expected a list of numbers, got {type(bad)}"
        check_conversion(op, i, bad, TypeError, text)


def test_a_list_that_changes_while_it_is_read():
    """Conversion runs Python code (`__dlpack__`), which may do anything to the list."""
    op, i, _ = operators_with("list")[0].values
    items = []

    class Evil(Capsule):
        def __dlpack__(self, **options):
            items.clear()
            return super().__dlpack__(**options)

    items += [Evil(np.zeros((1, 1, 1, 1), np.float32)), np.zeros((1, 1, 1, 1), np.float32)]
    args = dummies(op)
    args[i] = items
    with pytest.raises((TypeError, ValueError)):
        getattr(_core, op)(*args[:-1], "wrong")


# ---- threads of Python --------------------------------------------------------------------------


def test_concurrent_calls():
    rng = np.random.default_rng(3)
    inputs = [rng.random((2, 16, 16, 16), np.float32) for _ in range(4)]
    expected = [ops.call("mask_logits", p, 4, 4, 4) for p in inputs]
    wrong = []

    def work(k):
        for _ in range(50):
            if not np.array_equal(ops.call("mask_logits", inputs[k], 4, 4, 4), expected[k]):
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(k % 4,)) for k in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


# ---- the module itself --------------------------------------------------------------------------


def test_schema_and_build_info():
    assert [name for name, _, _ in _core.schema()] == list(ops.SCHEMA)
    for op in ops.SCHEMA:
        assert callable(getattr(_core, op))
        assert getattr(_core, op).__text_signature__ == "(*args, /)"
        assert getattr(_core, op).__doc__
    build = _core.build_info()
    assert set(build) == {"version", "abi", "compiler", "cpu_count", "isa"}
    assert build["isa"][-1] == "base"


@pytest.fixture
def pool():
    """An empty pool that keeps 64 MiB; the usual bound afterwards."""
    _core.keep_at_most(0)
    _core.keep_at_most(64 << 20)
    yield
    _core.keep_at_most(0)
    _core.keep_at_most(ops._KEPT)


def address(array):
    return array.__array_interface__["data"][0]


def test_dead_outputs_are_used_again(pool):
    a = _core.empty(5_000_000)
    assert a.dtype == np.uint8
    assert a.shape == (5_000_000,)
    assert a.flags.writeable
    assert _core.kept() == 0
    a[:] = 7
    b, where = a[100:200], address(a)
    del a
    assert _core.kept() == 0
    assert (b == 7).all()
    del b
    assert 5_000_000 <= _core.kept() < 5_100_000
    small = _core.empty(3_000_000)  # the block is too large for it
    assert not where <= address(small) < where + 5_000_000
    again = _core.empty(4_900_000)
    assert address(again) == where
    assert _core.kept() == 0


def test_kept_memory_has_a_bound(pool):
    held = [_core.empty((i + 2) << 20) for i in range(20)]
    held.clear()
    assert 32 << 20 <= _core.kept() <= 64 << 20
    large = _core.empty(65 << 20)
    del large  # larger than the bound: at once, and the others stay
    assert 32 << 20 <= _core.kept() <= 64 << 20
    for _ in range(40):  # more blocks than there is room to remember
        held.append(_core.empty(1 << 20))
    held.clear()
    assert 0 < _core.kept() <= 64 << 20
    _core.keep_at_most(0)
    assert _core.kept() == 0
    a = _core.empty(1 << 20)
    del a
    assert _core.kept() == 0


def test_the_pool_says_what_it_wants():
    for call in (_core.empty, _core.keep_at_most):
        with pytest.raises(ValueError, match=r"bytes: expected 0 or more, got -1"):
            call(-1)
        with pytest.raises(OverflowError):
            call(2**80)
        with pytest.raises(TypeError):
            call("x")
    with pytest.raises(MemoryError):
        _core.empty(2**62)
    assert _core.empty(0).shape == (0,)


def test_threads_share_the_pool_and_never_a_block(pool):
    """Each thread fills what it got with its number and finds nothing else there afterwards."""

    def work(number):
        for i in range(200):
            a = _core.empty((1 + i % 3) << 20)
            a[::4096] = number
            time.sleep(0)
            if not (a[::4096] == number).all():
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))
    assert _core.kept() <= 64 << 20


def test_a_forked_child_uses_the_pool(pool):
    a = _core.empty(8 << 20)
    a[:] = 1
    held = _core.empty(8 << 20)
    del held
    child = os.fork()
    if child == 0:
        b = _core.empty(8 << 20)
        b[:] = 2
        os._exit(0 if (a == 1).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (a == 1).all()
    assert _core.kept() >= 8 << 20


def test_large_outputs_come_from_the_pool(pool):
    prob = np.full((1, 100, 100, 100), 0.5, np.float32)
    out = ops.call("mask_logits", prob, 100, 100, 100)
    assert out.shape == prob.shape
    assert out.dtype == np.float32
    assert (out == 0).all()
    where = address(out)
    del out
    assert _core.kept() >= prob.nbytes
    assert address(ops.call("mask_logits", prob, 100, 100, 100)) == where
    torch = pytest.importorskip("torch")
    tensor = ops.call("mask_logits", torch.from_numpy(prob), 100, 100, 100)
    assert tensor.data_ptr() == where
    assert tensor.is_contiguous()
    assert not tensor._is_view()
    assert tensor.untyped_storage().nbytes() == prob.nbytes
    shared = tensor.share_memory_()  # moves it out of the block
    assert shared.is_shared()
    assert bool((shared == 0).all())
    assert _core.kept() >= prob.nbytes


def test_binding_keeps_to_the_limited_api():
    """NumPy's headers need the whole API, so each file is parsed with the limited one before them."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    include = [f"-I{sysconfig.get_paths()['include']}", f"-I{np.get_include()}"]
    for source in sorted((ROOT / "csrc" / "python").glob("*.c")):
        command = [compiler, "-std=c11", "-fsyntax-only", "-Werror", "-Wall", *include]
        version = "-DPy_LIMITED_API=0x030B0000"  # vectorcall's METH_FASTCALL and Py_buffer
        done = subprocess.run(
            [*command, version, '-DSEMISAM_VERSION="0"', str(source)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_error_texts_have_one_form():
    """Every message that the binding writes starts with "%s(): " (operator), then the argument."""
    for source in (ROOT / "csrc" / "python").glob("*.c"):
        text = re.sub(r'"\s+"', "", source.read_text())
        for message in re.findall(r'PyErr_Format\(\w+,\s*"([^"]*)"', text):
            assert message.startswith("%s(): "), message
