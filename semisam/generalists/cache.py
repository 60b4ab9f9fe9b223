# SPDX-License-Identifier: Apache-2.0
"""A cache of what generalists make of images, so that an image that comes again is encoded once.

An entry belongs to the bytes, dtype, shape and spacing of one image, the generalist's weights and settings
(`fingerprint`), the versions of semisam and torch, and the device. What was done to an image before it is
encoded, such as augmentation, is in its bytes: another crop or another draw of it is another image.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
import warnings
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from semisam import ops
from semisam._backend import info

__all__ = ["EncoderCache", "WeightsHash", "can_be_cached"]

_MIB = 1 << 20
_ENTRY = re.compile(r"^[0-9a-f]{64}\.safetensors$")
_PART = re.compile(r"^\.[0-9a-f]{64}\.[0-9a-f]{16}\.part$")
_ABANDONED = 3600.0  # seconds after which an unfinished file has no process any more
_METHODS = ("fingerprint", "pack", "unpack")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def can_be_cached(generalist: Any) -> bool:
    """Return whether a generalist has the methods that a cache needs (`semisam.generalists.protocol`).

    >>> from semisam import generalists
    >>> from semisam.generalists.cache import can_be_cached
    >>> can_be_cached(generalists.build("random-walker"))
    False
    """
    return all(callable(getattr(generalist, name, None)) for name in _METHODS)


class WeightsHash:
    """SHA-256 of a module's tensors and their names, computed again only after one of them has changed.

    A change is another tensor, another place in memory, or an operation in place that torch counted; what
    is written through `.data` or another array on the same memory is not seen.

    >>> import torch
    >>> from semisam.generalists.cache import WeightsHash
    >>> layer, weights = torch.nn.Linear(2, 3), WeightsHash()
    >>> before = weights.of(layer)
    >>> with torch.no_grad():
    ...     _ = layer.bias.add_(1)
    >>> weights.of(layer) == before
    False
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Any, int, int]] = []
        self._digest = ""

    def __reduce__(self) -> Any:
        return WeightsHash, ()  # copies have tensors of their own

    def of(self, module: nn.Module) -> str:
        """Return the digest of a module's parameters and buffers as hexadecimal text."""
        tensors = [*module.named_parameters(), *module.named_buffers()]
        if len(tensors) != len(self._seen) or not all(
            ref() is t and (where, version) == _moment(t)
            for (_, t), (ref, where, version) in zip(tensors, self._seen, strict=True)
        ):
            digest = hashlib.sha256()
            for name, t in tensors:
                digest.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
                digest.update(_bytes(t))
            self._digest = digest.hexdigest()
            self._seen = [(weakref.ref(t), *_moment(t)) for _, t in tensors]
        return self._digest


def _moment(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), -1 if t.is_inference() else t._version


class EncoderCache:
    """What generalists made of images, in memory and, if there is a `folder`, in files that outlive the run.

    `ram_mb` and `disk_mb` (MiB) bound each; what was used longest ago goes first, and an entry that is larger
    than a bound is not kept there. Each entry is one safetensors file, mapped into memory when it is read,
    written under another name first: several processes may share a folder. A file that is damaged or not
    what its name says is told of (RuntimeWarning) and made anew; if a file cannot be written, such as on a
    full disk, that is said once and nothing more is written.

    Images are encoded one by one, so that a result does not depend on what was known already: on the CPU it
    is the same bits as without a cache, on a GPU networks may round otherwise for another batch. The images'
    bytes and the features of new ones are read by the host, for which a GPU is waited for. `hits` and
    `misses` count images. A cache may serve several generalists and terms, in one thread.

    Raises ValueError for bounds below 0, OSError for a folder that cannot be made.

    >>> import torch
    >>> from semisam.generalists.cache import EncoderCache
    >>> from semisam.generalists.sam_med3d import SamMed3D
    >>> from semisam.generalists.sam_med3d_network import Architecture, SamMed3DNetwork
    >>> sam, cache = SamMed3D(network=SamMed3DNetwork(Architecture.small())), EncoderCache(ram_mb=64)
    >>> images = torch.rand(2, 1, 20, 24, 16)
    >>> state = cache.encode(sam, images)
    >>> again = cache.encode(sam, images.flip(0))
    >>> torch.equal(again.features, state.features.flip(0)), cache.hits, cache.misses
    (True, 2, 2)
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, *, ram_mb: float = 512, disk_mb: float = 8192
    ) -> None:
        """Make an empty cache in memory; files that the folder has already are used."""
        for name, bound in (("ram_mb", ram_mb), ("disk_mb", disk_mb)):
            if not 0 <= bound < float("inf"):
                raise ValueError(f"EncoderCache(): {name}: expected 0 or a positive number, got {bound!r}")
        self.folder = None if folder is None else Path(folder)
        self.ram_bytes, self.disk_bytes = int(ram_mb * _MIB), int(disk_mb * _MIB)
        self.hits = self.misses = 0
        self.used_bytes = 0  # in memory
        self._entries: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        self._writes = self.folder is not None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def encode(self, generalist: Any, images: Any, *, spacing: Sequence[float] | None = None) -> Any:
        """Return `generalist.encode(images, spacing=spacing)`, for which only unknown images are encoded.

        A generalist without the methods that this needs (`can_be_cached`) encodes all of them, uncounted.
        Raises what the generalist raises.
        """
        if not can_be_cached(generalist) or not ops.is_torch(images) or images.ndim < 2 or not len(images):
            return generalist.encode(images, spacing=spacing)
        keys = self._keys(generalist, images, spacing)
        known: dict[str, tuple[Tensor, ...]] = {}
        for n, key in enumerate(keys):
            found = known.get(key) or self._find(key)
            if found is None:
                self.misses += 1
                (found,) = generalist.pack(generalist.encode(images[n : n + 1], spacing=spacing))
                self._keep(key, found)
            else:
                self.hits += 1
            known[key] = found
        samples = [tuple(t.to(images.device) for t in known[key]) for key in keys]
        return generalist.unpack(samples, images, spacing=spacing)

    def _keys(self, generalist: Any, images: Any, spacing: Sequence[float] | None) -> list[str]:
        device = images.device
        about = {
            "format": 1,
            "semisam": info.version,  # a generalist may come to prepare images in another way
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "generalist": generalist.fingerprint(),
            "dtype": str(images.dtype),
            "shape": list(images.shape[1:]),
            "spacing": None if spacing is None else [float(s) for s in spacing],
        }
        head = json.dumps(about, sort_keys=True).encode()
        return [hashlib.sha256(head + b"\n" + _bytes(image)).hexdigest() for image in images]

    def _find(self, key: str) -> tuple[Tensor, ...] | None:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        try:
            found = _read(path, key)
        except FileNotFoundError:
            return None
        except (_Damaged, OSError) as error:
            _warn(f"{path}: {error}; it is left out, and made anew")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # it was used: others go first
        self._remember(key, found)
        return found

    def _keep(self, key: str, tensors: tuple[Tensor, ...]) -> None:
        kept = tuple(_own(t) for t in tensors)
        self._remember(key, kept)
        size = sum(t.nbytes for t in kept)
        if self.folder is None or not self._writes or not 0 < size <= self.disk_bytes:
            return
        try:
            _write(self.folder, key, kept)
            self._trim(self.folder)
        except OSError as error:
            self._writes = False
            _warn(f"{self.folder}: cannot be written: {error.strerror or error}; goes on without new files")

    def _remember(self, key: str, tensors: tuple[Tensor, ...]) -> None:
        size = sum(t.nbytes for t in tensors)
        if size > self.ram_bytes:
            return
        self._entries[key] = tensors
        self.used_bytes += size
        while self.used_bytes > self.ram_bytes:
            _, old = self._entries.popitem(last=False)
            self.used_bytes -= sum(t.nbytes for t in old)

    def _trim(self, folder: Path) -> None:
        """Remove what was used longest ago until the rest is within bounds; other processes may do so too."""
        found = []
        with os.scandir(folder) as entries:
            for entry in entries:
                ours = _ENTRY.match(entry.name)
                if ours or _PART.match(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        if ours:
                            found.append((status.st_mtime_ns, status.st_size, entry.path))
                        elif time.time() - status.st_mtime > _ABANDONED:
                            os.unlink(entry.path)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.disk_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size


# ---- bytes --------------------------------------------------------------------------------------


def _own(t: Tensor) -> Tensor:
    """The tensor on the CPU, without whatever else lies in its memory."""
    made = t.detach().cpu().contiguous()
    return made.clone() if made.untyped_storage().nbytes() > made.nbytes else made


def _bytes(t: Tensor) -> memoryview:
    """A tensor's numbers as bytes, in order."""
    flat: Any = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


# ---- files --------------------------------------------------------------------------------------


class _Damaged(ValueError):
    """A file that is not what its name says."""


def _write(folder: Path, key: str, tensors: tuple[Tensor, ...]) -> None:
    """Write an entry as a safetensors file, or nothing: eight bytes of length, a JSON header, the numbers."""
    header: dict[str, Any] = {}
    at = checksum = 0
    for number, t in enumerate(tensors):
        place = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        header[str(number)] = place
        checksum = zlib.crc32(_bytes(t), checksum)
        at += t.nbytes
    header["__metadata__"] = {"key": key, "crc32": str(checksum)}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)  # the numbers begin where every dtype may
    part = folder / f".{key}.{secrets.token_hex(8)}.part"
    try:
        with part.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for t in tensors:
                file.write(_bytes(t))
        part.replace(folder / f"{key}.safetensors")
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _read(path: Path, key: str) -> tuple[Tensor, ...]:
    """The tensors of an entry, mapped into memory: what is written to them stays in this process."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MIB):
            raise _Damaged("expected a safetensors file, got something else")
        try:
            header = json.loads(file.read(length))
            about = header.pop("__metadata__")
            places = [header.pop(str(number)) for number in range(len(header))]
            kinds = [(_DTYPES[p["dtype"]], [int(n) for n in p["shape"]], p["data_offsets"]) for p in places]
            expected, checksum = about["key"], int(about["crc32"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _Damaged("expected the header of an entry, got another one") from None
    if expected != key:
        raise _Damaged("expected the entry that its name says, got another one")
    try:  # not by Python's mmap, which keeps a file descriptor for every map
        every = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
    except RuntimeError:
        path.stat()  # FileNotFoundError: another process has just removed it
        raise _Damaged("expected a file that can be mapped, got one that cannot") from None
    if zlib.crc32(_bytes(every)) != checksum:
        raise _Damaged("expected the numbers that were written, got other ones or too few")
    try:
        return tuple(_part(every, *kind) for kind in kinds)
    except (ValueError, RuntimeError, TypeError):
        raise _Damaged("expected a header that fits the numbers, got another one") from None


def _part(every: Tensor, dtype: torch.dtype, shape: list[int], offsets: list[int]) -> Tensor:
    piece = every[offsets[0] : offsets[1]]
    if offsets[0] % dtype.itemsize:
        piece = piece.clone()
    return piece.view(dtype).reshape(shape)


def _warn(text: str) -> None:
    warnings.warn(f"EncoderCache(): {text}", RuntimeWarning, stacklevel=2)
