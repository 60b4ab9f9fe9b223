# SPDX-License-Identifier: Apache-2.0
"""Are two generalists at once as good as the better one? Pseudo-labels of whole real scans, without weights.

    python -m benchmarks.several --data DIR/hippocampus --out runs/several -o results.json

A mean teacher is trained with 2 labeled and 40 unlabeled scans (three draws of the labeled ones; settings of
`benchmarks.evidence`). What it says of the unlabeled scans prompts each source alone and every pair:

- walker: the random walker with the mask as prompt;
- clicks: the random walker with three clicks of its own in the place of the mask;
- geodesic: a function in this file, by the image's shortest paths to where the teacher is sure.

Reliabilities come from held-out labeled scans, as before every training, with the choice of the gate ("gate")
and without it ("no gate": every source speaks). Printed is the Dice of the fused pseudo-labels; labels of
unlabeled scans are opened for this and nothing else. A pair is "as good" if it loses less than 0.002.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.evidence import SETTINGS
from semisam import generalists, metrics
from semisam.engine import cases, config, gate, inference, record, trainer
from semisam.engine.files import write_text
from semisam.engine.preprocess import Preprocessing
from semisam.engine.stepper import fabric_for
from semisam.generalists.callable import CallableGeneralist
from semisam.random_walk import geodesic
from semisam.term import SemiSAMTerm

EQUAL = 0.002
SURE, EDGES, SLOPE = 2.0, 4.0, 4.0  # logit of a seed, what an edge costs, how steep the answer is
OPTIONS: dict[str, Any] = SETTINGS["term.options"]


def shortest_path(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    """Logits [B, F, *S] from the geodesic distances to sure foreground and to sure background."""
    sure = prompts.mask_logits
    space = tuple(range(2, images.ndim))
    scaled = (images - images.mean(space, keepdim=True)) / images.std(space, keepdim=True).clamp_min(1e-6)
    scaled = scaled.mean(1).expand(-1, *images.shape[2:])
    distances = [geodesic(scaled, marked, weight=EDGES) for marked in (sure > SURE, sure < -SURE)]
    inside, outside = (d.clamp_max(1e6) for d in distances)
    return SLOPE * (outside - inside) / (outside + inside).clamp_min(1e-6)


def sources() -> dict[str, tuple[Any, str]]:
    """Every source and the prompt mode that it is asked in."""
    walker = SETTINGS["term.generalist_options"]["random-walker"]
    return {
        "walker": (generalists.build("random-walker", **walker), "mask"),
        "clicks": (generalists.build("random-walker"), "unc"),
        "geodesic": (CallableGeneralist(shortest_path, name="geodesic", prompts=("mask",)), "mask"),
    }


def trained(data: Path, labeled: int, draw: int, out: Path, pairs: list[tuple[str, Any]]) -> Path:
    """The folder of one draw's mean teacher, trained if it is not there."""
    base = [(k, v) for k, v in SETTINGS.items() if not k.startswith("term.")]
    settings = [("data.root", str(data.resolve())), *base, ("data.labeled", labeled), ("data.draw", draw)]
    made = config.load(settings=[*settings, ("method.name", "mean-teacher"), *pairs])
    folder = out / f"labeled{labeled}-draw{draw}"
    trainer.train(made, folder, resume=(folder / "config.yaml").exists())
    return folder


def measured(folder: Path) -> dict[str, dict[str, float]]:
    """Mean Dice of the pseudo-labels of all unlabeled scans, of every set of sources, gated and not."""
    loaded = inference.load_run(folder, network="teacher", device="cpu")
    made, count = loaded.config, loaded.meta["num_classes"]
    made.term.gate_steps = SETTINGS["term.gate_steps"]
    every = cases.find_cases(made.data.root)
    truth_of = {c.id: c for c in every.cases}  # the split takes labels away
    roles = cases.split(every, made.data)
    steps = Preprocessing.of(made, 3)
    held = list(gate.held_out(made, roles, steps, loaded.meta, fabric_for(made.train)))
    sets = [s for n in (1, 2) for s in itertools.combinations(sources(), n)]
    terms = {}
    for gated, names in itertools.product((False, True), sets):
        chosen = [sources()[name] for name in names]
        term = SemiSAMTerm(
            [g for g, _ in chosen], mode=[m for _, m in chosen], total_steps=made.train.steps, **OPTIONS
        )
        gate.choose(term, held)
        if not gated:
            term.gate.choice = {name: name for name in term.gate.choice}
        terms["gate" if gated else "no gate", " + ".join(names)] = term
    found: dict[tuple[str, str], list[float]] = {}
    for number, case in enumerate(roles.unlabeled):
        prepared = steps.prepare(cases.read_image(case))
        truth = steps.prepare_label(cases.read_label(truth_of[case.id], made.data.label_map), prepared)
        prob = inference.sliding_window(loaded.network, prepared.image, made.train.patch_size)
        image, probs = torch.from_numpy(prepared.image)[None], torch.as_tensor(prob)[None]
        labels = {("mask", "teacher"): probs.argmax(1).byte()}
        for key, term in terms.items():
            answer = term.teach(image, probs, step=0, sample_ids=[number], spacing=prepared.spacing)
            labels[key] = labels["mask", "teacher"] if answer is None else answer.label
        for key, label in labels.items():
            dice = metrics.dice(label.numpy()[:, None], truth[None, None], False, False, count, 255)
            found.setdefault(key, []).append(float(np.nanmean(dice)))
    rows: dict[str, dict[str, float]] = {}
    for (kind, name), values in found.items():
        rows.setdefault(kind, {})[name] = round(float(np.mean(values)), 4)
    return rows


def verdicts(draws: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """One row per pair and kind: its Dice, its better half's, and in how many draws it is as good."""
    rows = []
    for kind in ("no gate", "gate"):
        for pair in (name for name in draws[0][kind] if " + " in name):
            halves = pair.split(" + ")
            best = [max(d[kind][h] for h in halves) for d in draws]
            ours = [d[kind][pair] for d in draws]
            equal = sum(o >= b - EQUAL for o, b in zip(ours, best, strict=True))
            means = {"dice": round(float(np.mean(ours)), 4), "better_alone": round(float(np.mean(best)), 4)}
            rows.append({"kind": kind, "pair": pair, **means, "as_good": equal, "draws": len(draws)})
    return rows


def main() -> None:
    """Train, measure, print, and write the tables as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the scans, all labeled")
    parser.add_argument("--labeled", type=int, default=2)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/several"), help="run folders")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of the tables")
    options = parser.parse_args()
    pairs = [config.parse_setting(text) for text in options.set]
    warnings.simplefilter("ignore", RuntimeWarning)  # a source without an answer for a scan
    draws = []
    for draw in range(1, options.draws + 1):
        folder = trained(options.data, options.labeled, draw, options.out, pairs)
        draws.append(measured(folder))
        print(f"draw {draw}: {json.dumps(draws[-1])}", flush=True)
    rows = verdicts(draws)
    for row in rows:
        print(
            f"{row['kind']:8s} {row['pair']:20s} {row['dice']:.4f}   better one alone "
            f"{row['better_alone']:.4f}   as good in {row['as_good']} of {row['draws']} draws"
        )
    if options.output:
        head = {"data": options.data.name, "machine": platform.machine(), "versions": record.versions()}
        settings = {k: v for k, v in SETTINGS.items() if not k.startswith("term.")} | {
            "term.options": OPTIONS
        }
        table = {**head, "settings": settings, "labeled": options.labeled, "draws": draws, "pairs": rows}
        write_text(options.output, json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
