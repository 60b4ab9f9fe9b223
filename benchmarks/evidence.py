# SPDX-License-Identifier: Apache-2.0
"""What the generalist's term is worth on real scans: supervised, mean teacher, SemiSAM, equal conditions.

    python -m benchmarks.evidence --data DIR/hippocampus --labeled 2 4 --out runs/evidence -o results.json

For each number of labeled scans: three methods x three draws of these scans, same seed, steps, patches and
network; the last 40 scans are the test, 40 others are unlabeled and their labels are never opened. SemiSAM-MT
learns from labels of whole scans and may use where organs lie in the labeled scans (`term.position_prior`),
which the others do not know. As a control, mean teacher's predictions are multiplied with the same prior
after training ("prior_at_inference"); "prior" is that alone.

With `--stages` all have 1000 steps, there is no prior, and SemiSAM-MT's steps are divided: 500 train a mean
teacher, the generalist labels the unlabeled scans prompted by it, and 500 train a new network from that.
What a new network gains without any generalist is a control there: "self_training" learns from that mean
teacher's own labels, "self_training_component" from their largest components, all else being equal.

`--methods` adds baselines (ua-mt, dan), `--first-draw` takes other draws of the labeled scans.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semisam import masks, metrics
from semisam.engine import cases, config, demo, gate, inference, offline, record, report, results
from semisam.engine.files import write_text
from semisam.engine.position import PositionPrior
from semisam.engine.preprocess import Preprocessing
from semisam.generalists.protocol import Decoded, GeneralistSpec
from semisam.prompts import PromptBatch

SETTINGS: dict[str, Any] = {
    "data.unlabeled": 40,
    "data.test": 40,
    "specialist.options": {"channels": [8, 16, 32]},
    "train.patch_size": [32, 32, 32],
    "train.steps": 250,
    "train.lr": 0.05,
    "train.augment": False,  # all scans lie in one orientation
    "train.precision": "bf16",
    "train.memory_format": "channels_last",
    "train.checkpoint_every": 1000,
    "term.gate_steps": 80,
    # Chosen on scans 100 to 119 and other draws of the labeled ones (11 to 13).
    "term.offline": True,
    "term.offline_start": 30,
    "term.refresh": 40,
    "term.position_prior": 1.0,
    "term.options": {
        "loss": "ce_dice",
        "target": "hard",
        "tau_c": 0.5,
        "lam_sam": 5.0,
        "ramp": "flat",
        "warmup": 0.0,
    },
    "term.generalist_options": {"random-walker": {"gamma": 0.02, "largest_component": True}},
}

STAGES: dict[str, Any] = {
    **SETTINGS,
    # Chosen on scans 100 to 119 and another draw of the labeled ones (11), as recipe two-stages.
    "train.steps": 1000,
    "term.gate_steps": 250,  # whoever is to teach is prompted by a network of 500 steps
    "term.offline_start": None,
    "term.refresh": 0,
    "term.position_prior": 0.0,
    "term.generalist_options": {"random-walker": {"gamma": 0.05, "largest_component": True}},
}


def row(method: results.Method, component: bool) -> dict[str, Any]:
    """Mean, sd over draws and the single draws of one method."""
    made: dict[str, Any] = {}
    for metric in ("dice", "hd95", "asd"):
        statistic = method.statistic(metric, component=component)
        made[metric] = {"mean": round(statistic.mean, 4), "sd": round(statistic.sd, 4), "n": statistic.n}
    scores = method.scores(component)
    made["draws"] = {str(draw): round(score.mean("dice"), 4) for (draw, _), score in scores.items()}
    names = next(iter(scores.values())).classes
    made["classes"] = {name: round(method.statistic("dice", name, component).mean, 4) for name in names}
    return made


def gate_row(found: dict[str, Any]) -> dict[str, Any]:
    """What the gate of one run found and chose."""
    names = ("scores", "choice", "position_prior", "without_prior", "with_prior")
    return {name: found[name] for name in names if name in found}


def control(folder: Path) -> dict[str, float]:
    """Test Dice of the prior alone, and of a run's student with it: no generalist, no new training."""
    loaded = inference.load_run(folder, device="cpu")
    roles = cases.split(cases.find_cases(loaded.config.data.root), loaded.config.data)
    steps = Preprocessing.of(loaded.config, 3)
    count = loaded.meta["num_classes"]
    prior = PositionPrior([gate.source_label(loaded.config, steps, c) for c in roles.labeled], count)
    found: dict[str, list[float]] = {"prior": [], "prior_at_inference": []}
    for case in roles.test:
        prepared = steps.prepare(cases.read_image(case))
        prob = inference.sliding_window(loaded.network, prepared.image, loaded.config.train.patch_size)
        truth = cases.read_label(case)
        for name, made in (("prior", prior.at(prepared.shape)), ("prior_at_inference", prior.sharpen(prob))):
            label = steps.restore(made, prepared).argmax(0).astype(np.uint8)
            dice = metrics.dice(label[None, None], truth[None, None], False, False, count, 255)
            found[name].append(float(dice.mean()))
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


class Itself:
    """A generalist that answers with its mask prompt: who is asked teaches what it said."""

    def __init__(self, largest_component: bool = False) -> None:
        self.largest_component = largest_component
        self.spec = GeneralistSpec("itself", (2, 3), frozenset({"mask"}), default_mode="mask")

    def encode(self, images: Any, *, spacing: Any = None) -> None:
        """Nothing is to be known of the images."""

    def decode(self, state: None, prompts: PromptBatch, active: Any = None) -> Decoded:
        """The logits of the mask prompt, those outside the largest component at -10."""
        logits = prompts.mask_logits
        if self.largest_component:
            mask = logits >= 0
            kept = masks.largest_component(mask, spatial_dims=logits.ndim - 2)
            logits = torch.where(mask & ~kept.bool(), -10.0, logits)
        return Decoded(logits, logits)


CONTROLS = {"self_training": False, "self_training_component": True}


def chain(task: demo.Task, stages: bool) -> list[demo.Task]:
    """One run; in stages, one with the term is a mean teacher of half its length and who learns from it."""
    made = task.config
    if not stages or not made.method.name.startswith("semisam-"):
        return [task]
    half = made.train.steps // 2
    out, name = task.folder.parents[1], f"draw{made.data.draw}"
    first = offline.first_stage(replace(made, term=replace(made.term, first_stage=half)))
    term = replace(made.term, offline_from=str(out / "first" / name))
    second = replace(made, term=term, train=replace(made.train, steps=made.train.steps - half))
    controls = [
        replace(
            second,
            term=replace(
                term,
                gate=False,
                generalists=["benchmarks.evidence.Itself"],
                generalist_options={"benchmarks.evidence.Itself": {"largest_component": component}},
            ),
        )
        for component in CONTROLS.values()
    ]
    return [
        replace(task, config=first, folder=out / "first" / name),
        replace(task, config=second),
        *(
            replace(task, config=made, folder=out / control / name)
            for control, made in zip(CONTROLS, controls, strict=True)
        ),
    ]


def run_all(tasks: list[demo.Task]) -> None:
    """Train and test what is left of some runs, one after another."""
    torch.set_num_threads(1)
    for task in tasks:
        if not task.done:
            demo.run(task)


def compared(tasks: list[demo.Task], out: Path, title: str, stages: bool) -> results.Comparison:
    """Train what is missing of all runs, write the report, and return the comparison."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        for _ in pool.map(run_all, [chain(task, stages) for task in tasks]):
            pass
    report.report([out / "runs"], out / "report.html", title=title)
    return results.compare(results.find_runs([out / "runs"]))


def study(options: argparse.Namespace, labeled: int) -> dict[str, Any]:
    """Train what is missing of one study; return its table."""
    began = time.monotonic()
    out, stages = options.out / f"labeled{labeled}", options.stages
    pairs = [config.parse_setting(text) for text in options.set]
    settings = [*(STAGES if stages else SETTINGS).items(), ("data.labeled", labeled), *pairs]
    made, _ = demo.configure_for(options.data, out, settings)
    draws = range(options.first_draw, options.first_draw + options.draws)
    command = ("python", "-m", "benchmarks.evidence")
    tasks = demo.tasks_of(made, out, draws, options.methods, command=command)
    title = f"SemiSAM {'in two stages ' if stages else ''}on {options.data.name}, {labeled} labeled"
    found = compared(tasks, out, title, stages)
    gates = {}
    for path in sorted((out / "runs").glob("*/run.json")):
        chosen = json.loads(path.read_text())["gate"]
        if chosen:
            gates[path.parent.name] = gate_row(chosen)
    table = {
        "labeled": labeled,
        "methods": {m.name: {"raw": row(m, False), "largest_component": row(m, True)} for m in found.methods},
        "gate": gates,
        "control": {p.name: control(p) for p in sorted((out / "runs").glob("mean-teacher-*"))},
        "settings": {key: value for key, value in settings if key != "data.root"},
        "seconds": round(time.monotonic() - began),
    }
    for name in CONTROLS if stages else ():
        (method,) = results.compare(results.find_runs([out / name])).methods
        table["methods"][name] = {"raw": row(method, False), "largest_component": row(method, True)}
    return table


def main() -> None:
    """Run the studies and write their tables as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the scans")
    parser.add_argument("--labeled", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--first-draw", type=int, default=1, metavar="K", help="draws K, K + 1, ...")
    parser.add_argument("--methods", nargs="+", default=list(demo.METHODS), metavar="NAME")
    parser.add_argument("--stages", action="store_true", help="SemiSAM-MT in two halves, no prior")
    parser.add_argument("--out", type=Path, default=Path("build/evidence"), help="run folders and reports")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of the tables")
    options = parser.parse_args()
    tables = {
        "data": options.data.name,
        "machine": platform.machine(),
        "versions": record.versions(),
        "studies": [study(options, n) for n in options.labeled],
    }
    text = json.dumps(tables, indent=1)
    if options.output:
        write_text(options.output, text + "\n")
    for table in tables["studies"]:
        print(f"{table['labeled']} labeled")
        for name, rows in table["methods"].items():
            cells = [f"{k} {v['dice']['mean']:.3f} +- {v['dice']['sd']:.3f}" for k, v in rows.items()]
            print(f"  {name:24s} " + "   ".join(cells))


if __name__ == "__main__":
    main()
