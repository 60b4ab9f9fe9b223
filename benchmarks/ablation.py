# SPDX-License-Identifier: Apache-2.0
"""What each defect of the published scripts does: trained with none of them, each alone, and all.

    python -m benchmarks.ablation --data DIR/hippocampus --out runs/ablation -o results.json

Mean teacher without the term, then SemiSAM over it by the leaky reference (preset "published"), equal in
everything else: same seed, split, steps, network. The columns:

- Dice of held-out scans after the last step, mean over the draws of the labeled scans;
- gradient: norm of the term's gradient by the student's logits, before its weight in time;
- leak: share of clicks that become others when the unlabeled scans' labels are exchanged (0 without leakage);
- right: share of clicks whose sign is what the label says at that voxel; pseudo: Dice of the pseudo-label.

All but the first are measured with one and the same student (trained without defects, first draw) on the
same patches, so that a defect is all that differs. Measuring needs the labels of unlabeled scans in every
row; training sees them where D-01 is on and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semisam.engine import cases, checkpoint, config, record, trainer
from semisam.engine.config import Config
from semisam.engine.files import read_table, write_text
from semisam.engine.preprocess import Preprocessing
from semisam.engine.published import LeakedLabels
from semisam.engine.sampling import PatchSource
from semisam.engine.setup import build_term
from semisam.published import Defects, PublishedDefects

BASE = "mean-teacher"
SETTINGS: dict[str, Any] = {
    "data.labeled": 2,
    "data.unlabeled": 20,
    "data.validation": 20,
    "data.label_map": {1: 1, 2: 1},  # two classes, as the scripts have
    "specialist.options": {"channels": [8, 16, 32]},
    "method.name": f"semisam-{BASE}",
    "train.patch_size": [32, 32, 32],
    "train.steps": 80,
    "train.lr": 0.05,
    "train.augment": False,
    "train.precision": "32",
    "train.checkpoint_every": 1000,
    "train.validate_every": 1000,
    "term.preset": "published",
    "term.gate": False,
    "term.options": {"mode": "unc", "clicks": 4, "lam_sam": 20.0},
}


def rows() -> list[tuple[str, str]]:
    """(name, what it does) of every row after the base method's."""
    alone = [(f.metadata["number"], f.metadata["what"]) for f in fields(Defects)]
    bundles = [("semisam", "what the SemiSAM script has"), ("semisam+", "what the SemiSAM+ scripts have")]
    return [("none", "the papers' intent"), *alone, *bundles, ("all", "everything at once")]


def configured(data: Path, name: str, draw: int, pairs: list[tuple[str, Any]]) -> Config:
    """The settings of one row's run."""
    made = config.load(settings=[("data.root", str(data.resolve())), *SETTINGS.items(), *pairs])
    made.data.draw = draw
    if name == BASE:
        made.method.name = BASE
    made.term.options = {**made.term.options, "defects": [name] if name != BASE else []}
    config.check(made)
    return made


def trained(made: Config, out: Path) -> float:
    """Mean Dice of the held-out scans after the last step; trains if that has not been done."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PublishedDefects)
        trainer.train(made, out, resume=True, command=["python", "-m", "benchmarks.ablation"])
    found = read_table(out / "validation.csv")
    last = [row for row in found if row["step"] == str(made.train.steps) and row["network"] == "student"]
    return float(np.mean([float(row["dice"]) for row in last]))


class Probe:
    """One student and some patches on which every row's term is looked at."""

    def __init__(self, made: Config, run: Path, batches: int) -> None:
        found = cases.find_cases(made.data.root)
        split = cases.split(found, made.data)
        preparation = Preprocessing.of(made, found.spatial_dims)
        source = PatchSource(split, preparation, made.train, made.data, split.num_classes)
        self.labels = LeakedLabels(made, found, split, preparation)
        self.network = checkpoint.load(run, "last").network
        self.batches = [source.batch(10_000 + k) for k in range(batches)]
        self.step = made.train.steps // 2

    def measure(self, made: Config) -> dict[str, float]:
        """Gradient, leak, signs, pseudo-label and time of a row's term, means over the patches."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PublishedDefects)
            term = build_term(made)
        sums = {"gradient": 0.0, "leak": 0.0, "right": 0.0, "pseudo": 0.0, "seconds": 0.0}
        for batch in self.batches:
            images, ids = batch.image[batch.labeled :], list(batch.ids[batch.labeled :])
            truth = torch.from_numpy(self.labels(ids))
            exchanged = truth.roll(1, 0)
            with torch.no_grad():
                logits = self.network(images)
            logits.requires_grad_()
            term.open_labels(lambda _, truth=truth: truth)
            began = time.perf_counter()
            loss = term(images, logits, step=self.step, sample_ids=ids, spacing=batch.spacing)
            sums["seconds"] += time.perf_counter() - began
            (gradient,) = torch.autograd.grad(loss, logits)
            sums["gradient"] += float(gradient.norm()) / term.factor(self.step)
            clicks, label = _clicks(term), term.last.label
            sums["right"] += _right(clicks, truth)
            both = (label > 0).flatten(1), (truth > 0).flatten(1)
            size = (both[0].sum() + both[1].sum()).clamp_min(1)
            sums["pseudo"] += float(2 * (both[0] & both[1]).sum() / size)
            term.open_labels(lambda _, other=exchanged: other)
            term(images, logits.detach(), step=self.step, sample_ids=ids, spacing=batch.spacing)
            sums["leak"] += _changed(clicks, _clicks(term))
        return {name: round(value / len(self.batches), 6) for name, value in sums.items()}


def _clicks(term: Any) -> Any:
    """[B, clicks, 4]: place and sign of every click of the last call."""
    if term.last is None:
        return torch.zeros(0, 0, 4)
    (batch,) = term.last.clicks.values()
    return torch.cat([batch.points, batch.labels[..., None]], -1)[:, 0]


def _changed(ours: Any, theirs: Any) -> float:
    """Share of clicks that are not the same in both; one that is there in one alone is another."""
    if not ours.numel() or not theirs.numel():
        return float(ours.numel() != theirs.numel())
    most = max(ours.shape[1], theirs.shape[1])
    padded = [torch.nn.functional.pad(c, (0, 0, 0, most - c.shape[1]), value=-1) for c in (ours, theirs)]
    real = (padded[0][..., -1] >= 0) | (padded[1][..., -1] >= 0)
    return float((padded[0] != padded[1]).any(-1)[real].float().mean()) if real.any() else 0.0


def _right(clicks: Any, truth: Any) -> float:
    """Share of clicks that are positive inside the label and negative outside."""
    right = [
        int(sign) == int(truth[(n, *place)] > 0)
        for n, sample in enumerate(clicks)
        for *place, sign in sample.tolist()
        if sign >= 0
    ]
    return float(np.mean(right)) if right else float("nan")


def main() -> None:
    """Train what is missing, measure, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the scans, all labeled")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--patches", type=int, default=8, help="batches for the measurements")
    parser.add_argument("--out", type=Path, default=Path("build/ablation"), help="run folders")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of the table")
    options = parser.parse_args()
    pairs = [config.parse_setting(text) for text in options.set]
    began = time.monotonic()
    dice: dict[str, dict[str, float]] = {}
    for draw in range(1, options.draws + 1):
        for name, _ in [(BASE, ""), *rows()]:
            made = configured(options.data, name, draw, pairs)
            score = trained(made, options.out / f"{name}-draw{draw}")
            dice.setdefault(name, {})[str(draw)] = round(score, 4)
            print(f"{time.monotonic() - began:7.0f} s  draw {draw}  {name:12s} Dice {score:.4f}", flush=True)
    first = configured(options.data, "none", 1, pairs)
    probe = Probe(first, options.out / "none-draw1", options.patches)
    table = [{"row": BASE, "what": "the base method, without the term", "dice": dice[BASE]}]
    for name, what in rows():
        found = probe.measure(configured(options.data, name, 1, pairs))
        table.append({"row": name, "what": what, "dice": dice[name], **found})
    _print(table)
    if options.output:
        content = {
            "data": options.data.name,
            "machine": platform.machine(),
            "versions": record.versions(),
            "settings": {**SETTINGS, **dict(pairs)},
            "patches": options.patches,
            "seconds": round(time.monotonic() - began),
            "table": table,
        }
        write_text(options.output, json.dumps(content, indent=1) + "\n")


def _print(table: list[dict[str, Any]]) -> None:
    print(f"{'':14s}{'Dice':>7s}  {'gradient':>9s} {'leak':>6s} {'right':>6s} {'pseudo':>7s} {'s/call':>7s}")
    for row in table:
        mean = np.mean(list(row["dice"].values()))
        rest = ""
        if "gradient" in row:
            rest = f"{row['gradient']:9.2e} {row['leak']:6.2f} {row['right']:6.2f} {row['pseudo']:7.3f} "
            rest += f"{row['seconds']:7.3f}"
        print(f"{row['row']:14s}{mean:7.4f}  {rest:39s}  {row['what']}")


if __name__ == "__main__":
    main()
