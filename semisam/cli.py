# SPDX-License-Identifier: Apache-2.0
"""The command line: `semisam COMMAND` or `python -m semisam COMMAND`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from importlib import util

import semisam


def doctor(_: argparse.Namespace) -> int:
    """Print what this installation can do, and why something is missing."""
    if util.find_spec("torch") is not None:
        importlib.import_module("torch")  # so that the report says what torch sees of CUDA and cuDNN
    print(semisam.info())
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the argument parser of all commands."""
    top = argparse.ArgumentParser(prog="semisam", description=semisam.__doc__)
    top.add_argument("--version", action="version", version=f"semisam {semisam.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "doctor", help="show build, backends, threads and versions, and why something is missing"
    )
    command.set_defaults(run=doctor)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; 2 for wrong usage.

    >>> main(["doctor"])  # doctest: +ELLIPSIS
    semisam: ...
    0
    """
    options = parser().parse_args(argv)
    code: int = options.run(options)
    return code
