# SPDX-License-Identifier: Apache-2.0
"""DLPack's exchange API as a library of any major version would offer it: what does the core make of it?"""

from __future__ import annotations

import ctypes
from typing import Any

_STREAM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
_NEW = ctypes.pythonapi.PyCapsule_New
_NEW.restype, _NEW.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class _Table(ctypes.Structure):
    _fields_ = (
        *(("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p)),
        *(("allocate", ctypes.c_void_p), ("from_py", ctypes.c_void_p), ("to_py", ctypes.c_void_p)),
        *(("tensor_from_py", ctypes.c_void_p), ("current_stream", ctypes.c_void_p)),
    )


@_STREAM
def _default(device_type: int, device_id: int, out: Any) -> int:
    out[0] = None
    return 0


class Exchange:
    """A table of one major version, which may point at an earlier one; without a way to view tensors."""

    def __init__(self, major: int, previous: Exchange | None = None, stream: Any = _default) -> None:
        self.major, self.previous = major, previous
        self.table = _Table(major, 0, None if previous is None else ctypes.addressof(previous.table))
        self.table.current_stream = ctypes.cast(stream, ctypes.c_void_p) if stream is not None else None
        self.name = b""

    def capsule(self, name: bytes = b"dlpack_exchange_api") -> Any:
        """A capsule as the type's attribute has it; alive as long as this object."""
        self.name = name  # the capsule keeps no copy
        return _NEW(ctypes.addressof(self.table), self.name, None)

    def __repr__(self) -> str:
        return f"{self.major}" + ("" if self.previous is None else f" over {self.previous!r}")
