# SPDX-License-Identifier: Apache-2.0
"""List the generalists: what they take and need, whether their weights are here, what they were trained on.

Where a generalist was trained on a data set it cannot be judged by that set, and neither can what it taught.

examples:
  semisam generalists
  semisam generalists --dataset AMOS                      who was trained on it
  semisam generalists --json
"""

from __future__ import annotations

import argparse
import json
from importlib import util
from typing import Any

from semisam import fetch, generalists
from semisam.cli import CommandError
from semisam.generalists import benchmarks

COLUMNS = ("name", "images", "prompts", "input", "mm", "needs", "weights", "licence")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--dataset", metavar="NAME", help="say of each whether it was trained on this one")


def run(options: argparse.Namespace) -> int:
    """Print the list; return 0."""
    rows = [describe(name) for name in generalists.GENERALISTS]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    if options.dataset is not None:
        return _about(options.dataset, rows)
    table = [COLUMNS, *(_line(row) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"\nweights: in {fetch.home()} (SEMISAM_HOME), by `semisam fetch NAME`\n\ntrained on:")
    for row in rows:
        if "error" in row:
            continue
        print(f"  {row['name']}: {'; '.join(row['training_sets']) or 'nothing'}")
        seen = [name for name, found in row["benchmarks"].items() if found["state"] in ("yes", "related")]
        rest = {found["state"] for found in row["benchmarks"].values()}
        if seen:
            print(f"    do not judge it by {', '.join(seen)}")
        if "not stated" in rest:
            print("    other common data sets: not stated")
    return 0


def describe(name: str) -> dict[str, Any]:
    """Return what is known of a registered generalist as plain values, or "error" if it cannot be loaded."""
    try:
        spec = generalists.class_of(name).spec
    except (ImportError, AttributeError, ValueError) as error:
        return {"name": name, "error": str(error)}
    missing = [package for package in spec.packages if util.find_spec(package) is None]
    found = None if spec.weights is None else fetch.find(name, spec.weights)
    source = None
    if spec.weights is not None:
        source = {key: getattr(spec.weights, key) for key in ("hub", "files", "url", "page")}
    return {
        "name": name,
        "spatial_dims": list(spec.spatial_dims),
        "slice_axis": spec.slice_axis,
        "prompts": sorted(spec.prompts),
        "default_mode": spec.default_mode,
        "max_classes": spec.max_classes,
        "input_size": spec.input_size,
        "spacing": spec.spacing,
        "packages": list(spec.packages),
        "missing": missing,
        "extra": spec.extra,
        "weights": source,
        "found": None if found is None else str(found),
        "licence": spec.licence,
        "paper": spec.paper,
        "training_sets": list(spec.training_sets),
        "benchmarks": {key: benchmarks.overlap(spec, key)._asdict() for key in benchmarks.BENCHMARKS},
    }


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    if "error" in row:
        return (row["name"], *("?",) * (len(COLUMNS) - 2), row["error"])
    dims = " ".join(f"{n}-D" for n in row["spatial_dims"])
    slices = ", slices" if row["slice_axis"] is not None else ""
    needs = " ".join(name + " (missing)" * (name in row["missing"]) for name in row["packages"]) or "-"
    kept = {True: "none needed", False: "found" if row["found"] else "not here"}[row["weights"] is None]
    return (
        row["name"],
        dims + slices,
        " ".join(row["prompts"]),
        "x".join(map(str, row["input_size"])) if row["input_size"] else "any",
        " ".join(f"{s:g}" for s in row["spacing"]) if row["spacing"] else "any",
        needs,
        kept,
        row["licence"] or "not stated",
    )


def _about(dataset: str, rows: list[dict[str, Any]]) -> int:
    known = benchmarks.recognise([dataset])
    if not known:
        names = ", ".join(benchmarks.BENCHMARKS)
        raise CommandError(f"--dataset: expected one of {names}, got {dataset}")
    for key in known:
        print(f"{key} ({benchmarks.BENCHMARKS[key][0]})")
        for row in rows:
            if "error" not in row:
                found = row["benchmarks"][key]
                print(f"  {row['name']}: {found['state']}" + (f", {found['how']}" if found["how"] else ""))
    return 0
