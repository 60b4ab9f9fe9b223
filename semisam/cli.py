# SPDX-License-Identifier: Apache-2.0
"""The command line: `semisam COMMAND` or `python -m semisam COMMAND`.

Every command is a module of `semisam.commands` with `configure(parser)`, `run(options) -> exit code` and
a docstring that is its help; only the module of the command that was asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import semisam

COMMANDS: dict[str, str] = {
    "check": "list every broken, missing or mismatched case of a folder",
    "convert": "copy a folder into another layout: nnunet, h5 or images",
    "train": "train a specialist on labeled and unlabeled scans",
    "predict": "segment scans with the network of a run",
    "evaluate": "measure predictions against the truth, per case and class",
    "report": "write report.html of one run, or of several methods and draws",
    "demo": "train, compare and report on generated volumes, or on your scans",
    "pseudo-label": "label unlabeled scans, the most doubtful first for review",
    "generalists": "list the models that may teach: needs, licence, weights, training sets",
    "fetch": "get a generalist's published weights",
    "doctor": "show build, backends, threads and versions, and why something is missing",
}


class CommandError(Exception):
    """What a user can mend; `main` prints the message without a traceback and exits with 1."""


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the argument parser, with the options of `command` (None: of every command)."""
    top = argparse.ArgumentParser(prog="semisam", description=semisam.__doc__)
    top.add_argument("--version", action="version", version=f"semisam {semisam.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        if command in (None, name):
            module = importlib.import_module(f"semisam.commands.{name.replace('-', '_')}")
            made = commands.add_parser(
                name,
                help=line,
                description=module.__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.configure(made)
            made.set_defaults(run=module.run)
        else:
            commands.add_parser(name, help=line)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed with a message, 2 wrong usage.

    >>> main(["doctor"])  # doctest: +ELLIPSIS
    semisam: ...
    0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if not word.startswith("-")), "")
    options = parser(chosen).parse_args(words, argparse.Namespace(words=words))
    try:
        code: int = options.run(options)
    except CommandError as error:
        print(f"semisam {options.command}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "semisam":
            raise
        print(
            f"semisam {options.command}: needs the package {error.name}, which is not installed: "
            'pip install "semisam[train]"',
            file=sys.stderr,
        )
        return 1
    return code
