# SPDX-License-Identifier: Apache-2.0
"""Write report.html: what a run, or a comparison of runs, has shown. One file that opens offline.

RUN is a folder that `semisam train` wrote, or a folder of such folders. Runs of several methods with the
same draws of the labeled set and the same seeds are compared in pairs; test figures are those that
`semisam evaluate --run RUN` left in the run.

examples:
  semisam report runs/la-4
  semisam report runs/supervised runs/mean-teacher runs/semisam --out comparison.html
  semisam report runs --title "Left atrium, 4 labeled scans"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from semisam.cli import CommandError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, or of several runs")
    add("--out", metavar="PATH", help="HTML file, or folder for report.html (the first RUN)")
    add("--title", help="headline (the methods' names)")


def run(options: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from semisam.engine import report, results  # noqa: PLC0415

    try:
        path = report.report(options.runs, options.out or options.runs[0], title=options.title)
    except results.ResultError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"cannot write the report: {error}") from error
    print(f"written: {Path(path).resolve()}")
    return 0
