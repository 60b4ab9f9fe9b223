# SPDX-License-Identifier: Apache-2.0
"""The whole way of a user on real scans: check, train, predict, evaluate, pseudo-label, report."""

import csv
import json

import numpy as np
import pytest
from conftest import data_dir

from semisam.cli import main

nib = pytest.importorskip("nibabel")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("lightning_fabric")

SETTINGS = {
    "specialist.options": '{"channels": [4, 8, 16]}',
    "train.precision": 32,
    "train.optimizer": "adam",
    "train.lr": 0.01,
}
SMALL = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]


def semisam(*words: object) -> None:
    assert main([str(word) for word in words]) == 0, words


@pytest.fixture(scope="module")
def hippocampus_run(tmp_path_factory):
    """A tiny training on hippocampus with the term and its gate."""
    run = tmp_path_factory.mktemp("hippocampus") / "run"
    semisam(
        *("train", data_dir("hippocampus"), "--out", run, "--method", "semisam-mean-teacher"),
        *("--labeled", 2, "--unlabeled", 6, "--test", 3, "--validation", 2, "--draw", 1),
        *(
            "--steps",
            60,
            "--patch",
            24,
            24,
            24,
            "--set",
            "term.gate_steps=40",
            "--set",
            "train.lr=0.05",
            *SMALL,
        ),
    )
    return run


def test_train_on_hippocampus(hippocampus_run):
    with (hippocampus_run / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    assert losses[-1] < 0.8 * losses[0]
    assert any(float(row["semisam"]) > 0 for row in rows)
    record = json.loads((hippocampus_run / "run.json").read_text())
    assert record["finished"]
    assert {role: len(ids) for role, ids in record["split"].items()} == {
        "labeled": 2,
        "unlabeled": 6,
        "validation": 2,
        "test": 3,
    }
    assert set(record["gate"]["scores"]) == {"mask", "largest_component", "random-walker"}
    assert (hippocampus_run / "best.ckpt").is_file()
    assert (hippocampus_run / "last.ckpt").is_file()


def test_then_predict_evaluate_report(hippocampus_run, tmp_path, capsys):
    root = data_dir("hippocampus")
    scans = sorted((root / "imagesTr").glob("*.nii.gz"))[-2:]
    semisam("predict", hippocampus_run, *scans, "--out", tmp_path / "labels", "--uncertainty")
    for scan in scans:
        made, image = nib.load(tmp_path / "labels" / scan.name), nib.load(scan)
        assert made.shape == image.shape
        assert np.array_equal(made.affine, image.affine)
        assert set(np.unique(np.asarray(made.dataobj))) <= {0, 1, 2}

    semisam("evaluate", "--run", hippocampus_run)
    (raw,) = (hippocampus_run / "test").glob("*-student/summary.json")
    summary = json.loads(raw.read_text())
    assert summary["cases"] == 3
    assert summary["unit"] == "mm"

    semisam("pseudo-label", hippocampus_run, root, "--out", tmp_path / "pseudo")
    with (tmp_path / "pseudo" / "ranking.csv").open() as file:
        ranking = list(csv.DictReader(file))
    assert len(ranking) == len(list((tmp_path / "pseudo" / "pseudo").glob("*.nii.gz"))) == 6

    semisam("report", hippocampus_run, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<img" in page or "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="http' not in page


def test_train_on_left_atria(tmp_path):
    run = tmp_path / "run"
    semisam(
        *("train", data_dir("la"), "--out", run, "--method", "semisam-mean-teacher", "--labeled", 2),
        *("--unlabeled", 3, "--validation", 0, "--test", 1, "--steps", 6, "--patch", 48, 48, 32),
        *("--set", "term.gate_steps=4", *SMALL),
    )
    semisam("evaluate", "--run", run)
    (raw,) = (run / "test").glob("*-student/summary.json")
    assert json.loads(raw.read_text())["unit"] == "voxels"  # the files do not know their spacing
    semisam("report", run, "--out", tmp_path / "report.html")


def test_train_on_slices(tmp_path):
    run = tmp_path / "run"
    semisam(
        *("train", data_dir("acdc"), "--out", run, "--method", "semisam-mean-teacher", "--labeled", 2),
        *("--steps", 6, "--patch", 64, 64, "--specialist", "unet2d", "--batch", 4, "--test", 1),
        *("--validation", 0, "--set", "term.gate_steps=4", *SMALL),
    )
    record = json.loads((run / "run.json").read_text())
    assert record["spatial_dims"] == 2
    assert record["num_classes"] == 4
    semisam("evaluate", "--run", run)
