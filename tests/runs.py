# SPDX-License-Identifier: Apache-2.0
"""Run folders made by hand, in the files' formats, for the tests of what reads them: no training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np

CLASSES = ("background", "core", "rind")
SHAPE = (40, 48, 36)


def scan(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and its label: a ball of two halves, off the centre, in noise."""
    rng = np.random.default_rng(seed)
    centre = np.array(SHAPE) / 2 + rng.uniform(-4, 4, 3)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) - centre
    radius = np.sqrt((grid * (1, 0.8, 1.1)) ** 2).sum(-1) / 1.5
    label = np.where(radius < 9, 1, 0) + np.where((radius < 9) & (grid[..., 1] > 2), 1, 0)
    image = 100 + 40 * (label > 0) + 20 * (label == 2) + 12 * rng.standard_normal(SHAPE)
    return image.astype(np.float32), label.astype(np.uint8)


def nifti(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1, 1, 1.25, 1])), path)


def data_folder(root: Path, cases: int = 6, test: int = 4) -> Path:
    """A folder in nnU-Net's layout: labeled training scans and labeled test scans."""
    for i in range(cases + test):
        image, label = scan(i)
        where = "Tr" if i < cases else "Ts"
        nifti(root / f"images{where}" / f"scan_{i:02d}_0000.nii.gz", image)
        nifti(root / f"labels{where}" / f"scan_{i:02d}.nii.gz", label)
    names = {name: i for i, name in enumerate(CLASSES)}
    text = {"channel_names": {"0": "MR"}, "labels": names, "numTraining": cases, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(text))
    return root


def table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def scores(case: str, dice: float, empty: bool = False) -> list[dict]:
    """Rows of metrics.csv: the second class a little worse."""
    rows = []
    for label, name in enumerate(CLASSES[1:], 1):
        d = 0.0 if empty and label == 2 else dice - 0.03 * (label - 1)
        far = float("nan") if empty and label == 2 else 12 * (1 - d)
        rows.append(
            {"case": case, "group": case, "label": label, "class": name, "dice": d, "jaccard": d / (2 - d)}
            | {
                "hd95": far,
                "asd": far / 4,
                "assd": far / 4,
                "nsd": d,
                "empty": "prediction" if d == 0 else "",
            }
            | {"voxels_pred": 100, "voxels_ref": 100, "diagonal": 72.0, "unit": "mm"}
        )
    return rows


def sample(path: Path, step: int, total: int) -> None:
    """What the term saw at a step; the specialist grows towards the object."""
    image, label = scan(step)
    object_ = label[4:36, 8:40, 2:34]
    grown = np.roll(object_, 4 - round(4 * step / total), axis=0)
    target = np.stack([object_ == c for c in range(3)]).astype(np.float32) * 0.9 + 0.03
    guess = np.stack([grown == c for c in range(3)]).astype(np.float32)
    unsure = np.clip((grown != object_) * 0.8 + 0.05, 0, 1).astype(np.float32)
    inside = np.argwhere(object_ == 1)[::400]
    clicks = np.concatenate(
        [
            np.c_[inside, np.ones(len(inside))],
            [[4, 4, 16, 0], [28, 27, 15, 0], [0, 0, 0, -1]],
        ]
    ).astype(np.int32)
    path.mkdir(parents=True, exist_ok=True)
    np.savez(
        path / f"step_{step:06d}.npz",
        image=image[None, 4:36, 8:40, 2:34],
        target=target,
        weight=np.exp(-4 * unsure),
        uncertainty=unsure,
        prediction=guess.argmax(0).astype(np.uint8),
        clicks=clicks,
    )


def run_folder(
    place: Path, data: Path, method: str, dice: float, *, draw: int = 0, steps: int = 400, tested: bool = True
) -> Path:
    """One finished run that scores `dice` on average."""
    run = place / f"{method}-draw{draw}"
    run.mkdir(parents=True)
    rng = np.random.default_rng([draw, len(method)])
    ours = method.startswith("semisam")
    (run / "config.yaml").write_text(
        f"data:\n  root: {data}\n  layout: nnunet\n  draw: {draw}\n  labeled: 2\n  normalize: zscore\n"
        f"method:\n  name: {method}\ntrain:\n  steps: {steps}\n  seed: 1337\n  patch_size: [32, 32, 32]\n"
        + ("term:\n  options:\n    lam_sam: 0.5\n" if ours else "")
    )
    ids = [f"scan_{i:02d}" for i in range(10)]
    labeled = [ids[(2 * draw) % 6], ids[(2 * draw + 1) % 6]]
    meta = {
        "method": method,
        "steps": steps,
        "finished": True,
        "command": ["semisam", "train", "--out", f"runs/{run.name}", "<script>alert('x')</script>"],
        "versions": {"semisam": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        "split": {
            "labeled": labeled,
            "unlabeled": [i for i in ids[:6] if i not in labeled],
            "validation": [],
            "test": ids[6:],
        },
        "seed": 1337,
        "sha256": {"imagesTr/scan_00_0000.nii.gz": "9f" * 32},
        "class_names": list(CLASSES),
        "spatial_dims": 3,
        "spacing": [1.0, 1.0, 1.25],
        "device": "cpu",
        "seconds": 61.5,
    }
    (run / "run.json").write_text(json.dumps(meta))
    log = []
    for step in (1, *range(5, steps + 1, 5)):
        fall = np.exp(-step / 120) + 0.03 * rng.standard_normal()
        row = {"step": step, "loss": 0.9 * fall + 0.2, "ce": 0.4 * fall + 0.1, "dice": 0.4 * fall + 0.05}
        row["consistency"] = 0.01 * step / steps if method != "supervised" else ""
        row["semisam"] = 0.05 * (1 - step / steps) if ours else ""
        row |= {"lr": 0.01 * (1 - step / steps) ** 0.9, "seconds": 0.1 * step}
        row["term_weight"] = 0.05 * (1 - step / steps) if ours else ""
        row["term_mean_u"] = 0.3 * fall + 0.1 if ours else ""
        row["term_agreement"] = 0.9 - 0.4 * fall if ours else ""
        row["term_clicks"] = 12 if ours else ""
        row["term_skipped"] = 0 if ours else ""
        log.append(row)
    table(run / "log.csv", log)
    rows = []
    for step in range(50, steps + 1, 50):
        for network in ("student", "teacher") if method != "supervised" else ("student",):
            d = dice * (1 - np.exp(-step / 90)) - 0.02 * (network == "student")
            rows += [
                {"step": step, "network": network, "case": c, "class": n, "dice": d}
                for c in ids[:2]
                for n in CLASSES[1:]
            ]
    table(run / "validation.csv", rows)
    if ours:
        gate = []
        for step in (0, 100, 200, 300, 400):
            found = {
                "mask": 0.62,
                "largest_component": 0.64,
                "random-walker": 0.70,
            }
            best = max(found, key=found.get)
            gate += [
                {"step": step, "candidate": c, "class": n, "dice": d, "chosen": int(c == best)}
                for c, d in found.items()
                for n in CLASSES[1:]
            ]
        table(run / "gate.csv", gate)
        for step in (67, 133, 200, 267, 333, 400):
            sample(run / "samples", step, steps)
    if tested:
        test_folder(run, ids[6:], dice, rng)
    return run


def test_folder(run: Path, ids: list[str], dice: float, rng: np.random.Generator) -> None:
    """Figures, predicted labels and uncertainty maps of the test cases."""
    place = run / "test" / "best-student"
    spread = 0.05 * np.arange(len(ids)) - 0.05 * (len(ids) - 1) / 2
    for suffix, more in (("", 0.0), ("-largest-component", 0.01)):
        folder = place.with_name(place.name + suffix)
        rows = []
        for i, case in enumerate(ids):
            rows += scores(case, dice + more + spread[i], empty=i == 0 and not suffix)
        table(folder / "metrics.csv", rows)
        (folder / "summary.json").write_text(json.dumps({"unit": "mm", "cases": len(ids)}))
    for i, case in enumerate(ids):
        label = scan(int(case[-2:]))[1]
        guess = np.roll(label, (round(10 * (1 - dice - spread[i])), 1, 0), (0, 1, 2))
        nifti(place / "predictions" / f"{case}.nii.gz", guess)
        unsure = ((guess != label) * 0.7 + 0.1 * rng.random(SHAPE)).astype(np.float32)
        nifti(place / "predictions/uncertainty" / f"{case}.nii.gz", unsure)


test_folder.__test__ = False  # type: ignore[attr-defined]
