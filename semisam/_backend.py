# SPDX-License-Identifier: Apache-2.0
"""What this installation can do: `semisam.info()`."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata, util
from typing import Any

import numpy as np

from semisam import _core, ops


class Info:
    """Callable that reports build, backends, threads and versions; `print(semisam.info())`."""

    version: str = _core.build_info()["version"]

    def __call__(self) -> Report:
        """Return the report as a dictionary that prints as a table.

        >>> import semisam
        >>> semisam.info()["abi"]
        5
        """
        build = _core.build_info()
        return Report(
            {
                "semisam": build["version"],
                "abi": build["abi"],
                "compiler": build["compiler"],
                "python": platform.python_version(),
                "platform": platform.platform(),
                "numpy": np.__version__,
                "cpu": f"{len(ops.SCHEMA)} operators, instruction sets {', '.join(build['isa'])}",
                "threads": f"{ops.get_num_threads() or build['cpu_count']} of {build['cpu_count']} cores",
                **{name.lower(): value for name, value in environment().items() if value},
                **_torch_report(),
                **_operators(),
            }
        )


class Report(dict[str, Any]):
    """A dictionary that prints one aligned line per entry."""

    def __str__(self) -> str:
        lines = []
        for key, value in self.items():
            if isinstance(value, dict):
                lines.append(f"{key}:")
                lines.extend(f"  {name:<22}{', '.join(where)}" for name, where in value.items())
            else:
                lines.append(f"{key + ':':<16}{value}")
        return "\n".join(lines)


def _operators() -> dict[str, Any]:
    """What the CUDA library was built for, where every operator runs, and why CUDA is not among it."""
    why = ops.load_cuda()
    backends = {name: found for name, found in _core.backends().items() if name in ("cpu", "cuda")}
    usable = f"{len(backends.get('cuda', ()))} of {len(ops.SCHEMA)} operators"
    return {
        "cuda library": _cuda_library(),
        "cuda backend": f"not usable: {why}" if why else usable,
        "operators": {op: [name for name in backends if op in backends[name]] for op in ops.SCHEMA},
    }


def _cuda_library() -> str:
    """Return the architectures in the library's file; nobody needs a driver for that."""
    try:
        mark = re.search(rb"semisam: CUDA code for ([\w ]+)\0", ops.CUDA_LIBRARY.read_bytes())
    except OSError:
        return "none: this installation was built without CUDA"
    return f"code for {mark[1].decode()}" if mark else "another build's: make build"


def _attention() -> str:
    """Return the ways of attention that torch may choose from on a GPU."""
    torch: Any = sys.modules["torch"]
    names = {"cudnn": "cuDNN", "flash": "flash", "mem_efficient": "memory-efficient", "math": "math"}
    enabled = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled", None) for name in names}
    return ", ".join(names[name] for name, f in enabled.items() if f is not None and f()) or "none"


def _torch_report() -> dict[str, Any]:
    if util.find_spec("torch") is None:
        return {"torch": "not installed: pip install 'semisam[torch]' for losses with gradients"}
    torch = sys.modules.get("torch")
    if torch is None:
        return {"torch": f"{metadata.version('torch')} (not imported yet; import torch first for more)"}
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if torch.version.cuda is None:
        why = "this torch is a CPU build"
    elif not torch.cuda.is_available():
        why = f"torch has CUDA {torch.version.cuda}, but no usable device or driver was found"
    else:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        why = f"CUDA {torch.version.cuda}: {', '.join(names)}"
    benchmark = "on" if torch.backends.cudnn.benchmark else "off"
    return {
        "torch": torch.__version__,
        "cuda": why,
        "cudnn": f"{cudnn}, benchmark {benchmark} (a trainer sets it)" if cudnn else "none",
        "attention": _attention() if torch.version.cuda else "torch's own for the CPU",
    }


def environment() -> dict[str, str]:
    """Return the environment variables that semisam reads and what they are set to."""
    names = ("SEMISAM_THREADS", "SEMISAM_KEEP_MB", "SEMISAM_DATA", "SEMISAM_HOME")
    return {name: os.environ.get(name, "") for name in names}


info = Info()
