# SPDX-License-Identifier: Apache-2.0
"""Show what this installation can do, and why something is missing."""

from __future__ import annotations

import argparse
import importlib
from importlib import util

import semisam


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options: none."""


def run(_: argparse.Namespace) -> int:
    """Print the report."""
    if util.find_spec("torch") is not None:
        importlib.import_module("torch")  # so that the report says what torch sees of CUDA and cuDNN
    print(semisam.info())
    return 0
