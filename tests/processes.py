# SPDX-License-Identifier: Apache-2.0
"""Processes for tests that kill them or let several train together; forked from one that has torch."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def start(words: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """Start `semisam WORDS` in a process of its own; its exit code is the command's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["semisam.engine.trainer", "lightning_fabric", "monai.inferers.utils"])
    process = context.Process(target=_command, args=(list(words), dict(environment or {})))
    process.start()
    return process


def _command(words: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import torch  # noqa: PLC0415

    from semisam.cli import main  # noqa: PLC0415

    torch.set_num_threads(1)
    sys.exit(main(words))
