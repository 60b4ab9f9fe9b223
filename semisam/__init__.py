# SPDX-License-Identifier: Apache-2.0
"""semisam: promptable foundation models teach small segmentation networks on unlabeled scans.

`import semisam` needs NumPy only; torch is used when the caller's arrays are torch tensors.
"""

from __future__ import annotations

import importlib
from typing import Any

from semisam._backend import info
from semisam.ops import get_num_threads, set_num_threads

__version__ = info.version
__all__ = ["get_num_threads", "info", "set_num_threads"]
_MODULES = (
    *("fusion", "gate", "generalists", "losses", "masks", "metrics", "ops", "prompts", "random_walk"),
    *("published", "reference", "schedules", "specialists", "term"),
)
_NAMES = {"SemiSAMTerm": "term"}  # names that need torch


def __getattr__(name: str) -> Any:
    # Modules load at first use, so that the import stays cheap.
    if name in _MODULES:
        return importlib.import_module(f"semisam.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"semisam.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'semisam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, *_NAMES, "__version__"])
