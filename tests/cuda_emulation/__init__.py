# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as a library for the CPU: `load()` builds it, if need be, and loads it.

Every csrc/cuda/*.cu is compiled as C++ against the <cuda_runtime.h> of this folder. The library
answers calls on CPU arrays that ask for the instruction set "emulated".
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulated"
FLAGS = [
    *("-x", "c++", "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-exceptions"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
    *("-fcf-protection=none", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-unknown-pragmas"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", f"-I{HERE}"),
]
KERNELS = sorted(ROOT.glob("csrc/cuda/*.cu"))
HEADERS = [
    *sorted(ROOT.glob("csrc/*.h")),
    ROOT / "csrc/ops.def",
    *sorted(ROOT.glob("csrc/cuda/*.cuh")),
    HERE / "cuda_runtime.h",
]


def build(sources: list[Path] = KERNELS) -> Path:
    """Compile what has changed of CUDA files, link, and return the library's path."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may come here at once
        shared = hashlib.sha256("".join([*FLAGS, *(p.read_text() for p in HEADERS)]).encode())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda s: _compile(s, shared.copy()), [*sources, HERE / "emulation.cpp"]))
        names = "".join(o.name for o in objects)
        library = BUILD / f"emulated-{hashlib.sha256(names.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            _run([_compiler(), "-shared", "-o", library, *objects, "-Wl,-z,defs", "-lm", "-pthread"])
        return library


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _compile(source: Path, digest) -> Path:
    digest.update(source.read_bytes())
    made = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if not made.exists():
        part = made.with_suffix(".part")
        _run([_compiler(), *FLAGS, "-c", source, "-o", part])
        part.rename(made)
    return made


def _run(command: list[object]) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


@functools.cache
def load() -> ctypes.CDLL:
    """Load the backend into semisam's core; returns the library, whose order of threads one can set."""
    from semisam import _core  # noqa: PLC0415  (building alone must not need the package)

    path = build()
    _core.load_backend(path)
    return ctypes.CDLL(str(path))


if __name__ == "__main__":
    print(build())
