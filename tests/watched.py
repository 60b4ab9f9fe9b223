# SPDX-License-Identifier: Apache-2.0
"""A CPU on which nobody looks at a value: what would make the host wait for a GPU is an error here.

`watched` stands in for a GPU in tests. `semisam.ops.stays` says so of the CPU, and every way in which Python
gets hold of a tensor's values, or a tensor's shape depends on them, raises `Waited`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from semisam import ops


class Waited(AssertionError):
    """A value was looked at."""


# Operators whose result, or its shape, the host has to know.
_READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "item", "nonzero", "masked_select", "unique_dim"),
    *("unique_consecutive", "_unique", "_unique2", "bincount", "argwhere", "allclose", "nonzero_numpy"),
    *("histc", "lift_fresh", "_assert_async"),
}
_METHODS = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"),
    *("__contains__", "nonzero", "from_numpy", "as_tensor"),
}


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in _READS:
            raise Waited(f"{func} would make the host wait")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise Waited(f"{func} by a mask: as many elements as it has ones")
        if name == "repeat_interleave" and func._overloadname == "Tensor":
            raise Waited(f"{func}: as many elements as the tensor says")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _METHODS:
            raise Waited(f"Tensor.{func.__name__} would make the host wait")
        return func(*args, **(kwargs or {}))


def _refused(*_: Any, **__: Any) -> Any:
    raise Waited("an array of the host would be copied to the device")


@contextlib.contextmanager
def watched(monkeypatch: Any) -> Iterator[None]:
    """Take the CPU for a device whose values are not to be looked at."""
    with monkeypatch.context() as patch:
        patch.setattr(ops, "stays", lambda device: True)
        patch.setattr(torch, "from_numpy", _refused)
        with _Methods(), _Operators():
            yield
