# SPDX-License-Identifier: Apache-2.0
"""Evaluation: values against MONAI and direct calls, empties, units, and every problem at once."""

from __future__ import annotations

import csv
import json
import math
import shutil

import numpy as np
import pytest
from conftest import data_dir

from semisam import cli, metrics
from semisam.engine.evaluation import (
    METRICS,
    Evaluation,
    EvaluationError,
    Pair,
    case_rows,
    evaluate_folders,
    evaluate_pairs,
    read_label_file,
)

nib = pytest.importorskip("nibabel")
h5py = pytest.importorskip("h5py")
Image = pytest.importorskip("PIL.Image")


def blob(shift=0, shape=(12, 14, 10), label=1):
    a = np.zeros(shape, np.uint8)
    a[(slice(3 + shift, 7 + shift), *(slice(3, 7),) * (len(shape) - 1))] = label
    return a


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def save_h5(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        f["label"] = array


@pytest.fixture
def folders(tmp_path):
    """Two cases of 2 x 1 x 1 mm; the second prediction lies 1 voxel off, on axis 0."""
    affine = np.diag([2.0, 1, 1, 1])
    for name, shift in (("a", 0), ("b", 1)):
        save(tmp_path / "truth" / f"{name}.nii.gz", blob(), affine)
        save(tmp_path / "pred" / f"{name}.nii.gz", blob(shift), affine)
    return tmp_path / "pred", tmp_path / "truth"


# ---- values -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory):
    """Real labels, two of them float32 files, against shifted ones; folders pred and truth."""
    root = data_dir("hippocampus")
    place = tmp_path_factory.mktemp("hippocampus")
    (place / "truth").mkdir()
    shutil.copy(root / "dataset.json", place / "truth")
    for number, name in enumerate(("003", "243", "001")):
        file = f"hippocampus_{name}.nii.gz"
        shutil.copy(root / "labelsTr" / file, place / "truth" / file)
        image = nib.load(root / "labelsTr" / file)
        moved = np.roll(np.asarray(image.dataobj).astype(np.uint8), number + 1, number)
        save(place / "pred" / file, moved, image.affine)
    return place / "pred", place / "truth"


@pytest.mark.parametrize("definition", ["pooled", "monai", "deepmind"])
def test_values_are_those_of_direct_calls(hippocampus, definition):
    found = evaluate_folders(*hippocampus, definition=definition, tolerance=1.5, show=False)
    assert found.classes == ["Anterior", "Posterior"]
    assert found.unit == "mm"
    assert len(found.rows) == 6
    for row in found.rows:
        file = f"{row['case']}.nii.gz"
        a, g = (np.asarray(nib.load(p / file).dataobj).astype(np.uint8) for p in hippocampus)
        direct = metrics.evaluate_case(a, g, 3, (1.0, 1.0, 1.0), [1.5, 1.5], definition=definition)
        for name in METRICS:
            assert row[name] == direct[row["label"]][name]
        assert row["voxels_ref"] == (g == row["label"]).sum()


def test_values_are_those_of_monai(hippocampus):
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics")
    found = evaluate_folders(*hippocampus, definition="monai", show=False)
    for row in found.rows:
        file = f"{row['case']}.nii.gz"
        a, g = (
            torch.from_numpy((np.asarray(nib.load(p / file).dataobj) == row["label"])[None, None])
            for p in hippocampus
        )
        assert row["dice"] == pytest.approx(monai.DiceHelper(include_background=True)(a, g)[0].item())
        hd = monai.compute_hausdorff_distance(a, g, include_background=True, percentile=95, spacing=1.0)
        assert row["hd95"] == pytest.approx(hd.item(), abs=1e-5)
        asd = monai.compute_average_surface_distance(a, g, include_background=True, spacing=1.0)
        assert row["asd"] == pytest.approx(asd.item(), abs=1e-5)
        nsd = monai.compute_surface_dice(a, g, [1.0], include_background=True, spacing=1.0)
        assert row["nsd"] == pytest.approx(nsd.item(), abs=1e-5)


def test_truth_against_itself_is_perfect(hippocampus):
    found = evaluate_folders(hippocampus[1], hippocampus[1], show=False)
    for row in found.rows:
        assert [row[m] for m in METRICS] == [1, 1, 0, 0, 0, 1]


def test_summary_is_mean_and_deviation_over_cases(hippocampus):
    found = evaluate_folders(*hippocampus, show=False)
    summary = found.summary()
    for name in found.classes:
        for metric in METRICS:
            values = [row[metric] for row in found.rows if row["class"] == name]
            entry = summary["per_class"][name][metric]
            assert entry["mean"] == pytest.approx(np.mean(values))
            assert entry["sd"] == pytest.approx(np.std(values, ddof=1))
            assert entry["n"] == 3
    per_case = [np.mean([r["dice"] for r in found.rows if r["case"] == c]) for c in found.cases]
    assert summary["mean"]["dice"]["mean"] == pytest.approx(np.mean(per_case))
    assert summary["mean"]["dice"]["sd"] == pytest.approx(np.std(per_case, ddof=1))


def test_spacing_of_the_file_counts(folders):
    found = evaluate_folders(*folders, show=False)
    b = next(row for row in found.rows if row["case"] == "b")
    assert (b["hd95"], b["unit"]) == (2.0, "mm")
    assert b["nsd"] < evaluate_folders(*folders, show=False, tolerance=2).rows[1]["nsd"] == 1
    voxels = evaluate_folders(*folders, show=False, unit="voxels")
    assert (voxels.rows[1]["hd95"], voxels.unit, voxels.rows[1]["unit"]) == (1.0, "voxels", "voxels")


def test_labels_need_not_be_consecutive(tmp_path):
    truth = blob() * 7 + np.roll(blob(), 5, 1) * 200
    pred = np.roll(truth, 1, 2)
    save(tmp_path / "t" / "a.nii", truth)
    save(tmp_path / "p" / "a.nii", pred)
    found = evaluate_folders(tmp_path / "p", tmp_path / "t", show=False)
    assert [(row["label"], row["class"], row["dice"]) for row in found.rows] == [
        (7, "7", 0.75),
        (200, "200", 0.75),
    ]


def test_ignored_voxels_count_nowhere():
    truth, pred = blob(), blob()
    truth[0], pred[0] = 255, 1
    row = case_rows("a", pred, truth, {1: "x"})[0]
    assert row["dice"] == 1
    assert row["voxels_pred"] == 64


# ---- empties ------------------------------------------------------------------------------------


def test_empties_are_counted_and_never_averaged_as_perfect():
    nothing, something = np.zeros((3, 4, 12), np.uint8), np.ones((3, 4, 12), np.uint8)
    rows = []
    cases = (("ok", 1, 1), ("no-pred", 0, 1), ("no-truth", 1, 0), ("both", 0, 0))
    for name, a, g in cases:
        rows += case_rows(name, (nothing, something)[a], (nothing, something)[g], {1: "x"}, spacing=(1, 1, 1))
    assert [row["empty"] for row in rows] == ["", "prediction", "truth", "both"]
    summary = Evaluation(rows, "mm").summary()
    entry = summary["per_class"]["x"]
    assert (entry["empty_predictions"], entry["empty_truths"], entry["empty_both"]) == (1, 1, 1)
    assert entry["failed"] == 2
    assert summary["empty_predictions"] == 1
    assert entry["dice"] == {"mean": 0.5, "sd": pytest.approx(math.sqrt(1 / 3)), "n": 4}
    assert entry["hd95"]["n"] == 2
    assert entry["hd95"]["mean"] == 0
    assert entry["hd95"]["mean_with_diagonal"] == pytest.approx((13 + 13) / 4)
    assert summary["mean"]["hd95"]["mean_with_diagonal"] == pytest.approx((13 + 13) / 4)
    assert "failed" in Evaluation(rows, "mm").table()


def test_a_set_where_everything_failed(tmp_path):
    rows = case_rows("a", np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8), {1: "x"})
    found = Evaluation(rows, "voxels")
    assert found.summary()["per_class"]["x"]["hd95"]["mean"] is None
    found.write(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["per_class"]["x"]["hd95"]["mean"] is None
    assert "-" in found.table()


# ---- units --------------------------------------------------------------------------------------


def test_units_are_never_mixed(folders):
    pred, truth = folders
    for folder in folders:
        save_h5(folder / "c.h5", blob())
    with pytest.raises(EvaluationError, match="spacing is unknown for c: give it"):
        evaluate_folders(pred, truth, show=False)
    assert evaluate_folders(pred, truth, unit="voxels", show=False).unit == "voxels"
    found = evaluate_folders(pred, truth, spacing=(3, 1, 1), show=False)
    assert found.unit == "mm"
    assert evaluate_folders(pred / "c.h5", truth / "c.h5", show=False).unit == "voxels"
    with pytest.raises(EvaluationError, match="spacing is unknown"):
        evaluate_folders(pred / "c.h5", truth / "c.h5", unit="mm", show=False)


# ---- everything that is wrong, at once -------------------------------------------------------------


def test_all_problems_are_listed_at_once(folders):
    pred, truth = folders
    save(truth / "missing.nii.gz", blob())
    save(truth / "shape.nii.gz", blob())
    save(pred / "shape.nii.gz", blob(shape=(12, 14, 11)))
    save(truth / "affine.nii.gz", blob())
    save(pred / "affine.nii.gz", blob(), np.diag([-1.0, 1, 1, 1]))
    save(truth / "label.nii.gz", blob())
    save(pred / "label.nii.gz", blob(label=5))
    save(truth / "fraction.nii.gz", blob().astype(np.float32) / 2)
    save(pred / "fraction.nii.gz", blob())
    save(truth / "cut.nii.gz", blob())
    whole = (truth / "cut.nii.gz").read_bytes()
    (pred / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EvaluationError) as caught:
        evaluate_folders(pred, truth, show=False)
    text = str(caught.value)
    for part in (
        "missing: no prediction",
        "shape: the prediction's shape (12, 14, 11) is not the truth's (12, 14, 10)",
        "affine: the prediction's affine is not the truth's (by 2 mm)",
        "label: the prediction has the unexpected labels 5; expected 1",
        "not whole numbers",
        "cut: ",
    ):
        assert part in text, text
    assert len(caught.value.problems) == 6
    assert text.startswith("6 problems, nothing was evaluated")


def test_truths_without_a_prediction_may_be_left_out_with_a_note(folders):
    pred, truth = folders
    save(truth / "later.nii.gz", blob())
    save(pred / "stranger.nii.gz", blob())
    found = evaluate_folders(pred, truth, only_predicted=True, show=False)
    assert found.cases == ["a", "b"]
    assert any("later" in note for note in found.notes)
    assert any("stranger" in note for note in found.notes)
    assert found.summary()["notes"] == found.notes


def test_nothing_in_common_says_how_files_are_matched(folders, tmp_path):
    save(tmp_path / "other" / "x.nii.gz", blob())
    with pytest.raises(EvaluationError, match="matched by their names"):
        evaluate_folders(tmp_path / "other", folders[1], show=False)
    with pytest.raises(EvaluationError, match="no such file or folder"):
        evaluate_folders(tmp_path / "absent", folders[1], show=False)


def test_unexpected_label_in_the_truth_when_classes_are_named(folders):
    with pytest.raises(EvaluationError, match="the truth has the unexpected labels 1"):
        evaluate_folders(*folders, classes={2: "x"}, show=False)


# ---- files --------------------------------------------------------------------------------------


def test_written_files_hold_all_rows(folders, tmp_path):
    found = evaluate_folders(*folders, show=False)
    found.write(tmp_path / "out")
    with (tmp_path / "out" / "metrics.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [row["case"] for row in rows] == ["a", "b"]
    for row, kept in zip(rows, found.rows, strict=True):
        assert all(float(row[m]) == kept[m] for m in METRICS)
        assert row["unit"] == "mm"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["unit"] == "mm"
    assert summary["cases"] == 2
    assert summary["per_class"]["1"]["dice"]["n"] == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.csv", "summary.json"]


def test_slices_are_grouped_by_patient(tmp_path):
    root = data_dir("acdc") / "data" / "slices"
    files = sorted(root.glob("*.h5"))[:14]
    pairs = []
    for file in files:
        with h5py.File(file) as f:
            label = f["label"][()]
        save_h5(tmp_path / file.name, np.roll(label, 2, 0))
        pairs.append(Pair(file.stem, tmp_path / file.name, file, file.stem.split("_slice")[0]))
    found = evaluate_pairs(pairs, classes={1: "RV", 2: "Myo", 3: "LV"}, show=False)
    groups = found.per_group()
    names = sorted({pair.group for pair in pairs})
    assert 1 < len(names) < len(pairs)
    for row in groups:
        members = [r for r in found.rows if r["group"] == row["group"] and r["class"] == row["class"]]
        assert row["dice"] == pytest.approx(np.mean([r["dice"] for r in members]))
        assert row["cases"] == len(members)
        stacks = [[], []]
        for pair in pairs:
            if pair.group == row["group"]:
                for stack, path in zip(stacks, (pair.prediction, pair.truth), strict=True):
                    stack.append(read_label_file(path).labels.ravel() == members[0]["label"])
        a, g = (np.concatenate(s)[None, None, None] for s in stacks)
        assert row["dice_pooled"] == pytest.approx(float(metrics.dice(a, g)[0, 0]))
    summary = found.summary()
    assert summary["groups"] == len(names)
    expected = np.mean([row["dice"] for row in groups if row["class"] == "LV"])
    assert summary["per_group"]["LV"]["dice"]["mean"] == pytest.approx(expected)
    found.write(tmp_path / "out")
    assert (tmp_path / "out" / "groups.csv").read_text().count("\n") == 1 + len(groups)
    assert "per patient" in found.table()


def test_left_atrium_files_in_folders_of_their_own(tmp_path):
    root = data_dir("la") / "2018LA_Seg_Training Set"
    name = sorted(p.name for p in root.iterdir())[0]
    label = read_label_file(root / name / "mri_norm2.h5").labels
    save_h5(tmp_path / "pred" / f"{name}.h5", np.roll(label, 5, 1))
    found = evaluate_folders(tmp_path / "pred", root, only_predicted=True, show=False)
    assert found.unit == "voxels"
    assert found.rows[0]["hd95"] == pytest.approx(5, abs=2)
    again = evaluate_folders(
        tmp_path / "pred", root, only_predicted=True, show=False, spacing=(0.625,) * 3
    ).rows[0]
    assert again["hd95"] == pytest.approx(0.625 * found.rows[0]["hd95"])


def test_largest_component_is_taken_of_predictions_alone(tmp_path):
    truth = blob()
    truth[11, 13, 9] = 1
    pred = truth.copy()
    pred[0, 0, 0] = 1
    save(tmp_path / "p" / "a.nii", pred)
    save(tmp_path / "t" / "a.nii", truth)
    raw = evaluate_folders(tmp_path / "p", tmp_path / "t", show=False).rows[0]
    found = evaluate_folders(tmp_path / "p", tmp_path / "t", largest_component=True, show=False)
    assert (raw["voxels_pred"], found.rows[0]["voxels_pred"], found.rows[0]["voxels_ref"]) == (66, 64, 65)
    assert "largest component" in found.table()


def test_masks_of_pictures(tmp_path):
    Image.fromarray(np.uint8([[0, 255], [255, 0]])).save(tmp_path / "binary.png")
    Image.fromarray(np.uint8([[0, 1], [2, 0]])).save(tmp_path / "labels.png")
    Image.fromarray(np.uint8([[[0] * 3, [255] * 3]])).save(tmp_path / "grey.png")
    Image.fromarray(np.uint8([[[0, 1, 2], [255] * 3]])).save(tmp_path / "colour.png")
    assert read_label_file(tmp_path / "binary.png").labels.tolist() == [[0, 1], [1, 0]]
    assert read_label_file(tmp_path / "labels.png").labels.tolist() == [[0, 1], [2, 0]]
    assert read_label_file(tmp_path / "grey.png").labels.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="colour-coded"):
        read_label_file(tmp_path / "colour.png")
    native = sorted((data_dir("polyp") / "kvasir_native").rglob("masks/*.jpg"))[0]
    assert np.unique(read_label_file(native).labels).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("value", "word"), [(np.nan, "NaN"), (0.5, "not whole"), (-1, "values -1"), (300, "300")]
)
def test_what_is_no_label_is_refused(tmp_path, value, word):
    array = blob().astype(np.float32)
    array[0, 0, 0] = value
    save(tmp_path / "a.nii.gz", array)
    with pytest.raises(ValueError, match=word):
        read_label_file(tmp_path / "a.nii.gz")


# ---- command ------------------------------------------------------------------------------------


def test_command_prints_a_table_and_writes(folders, tmp_path, capsys):
    code = cli.main(["evaluate", *map(str, folders), "--out", str(tmp_path / "out"), "--classes", "organ"])
    assert code == 0
    out = capsys.readouterr().out
    assert "organ" in out
    assert "95HD (mm)" in out
    assert (tmp_path / "out" / "summary.json").is_file()


def test_command_fails_with_all_problems(folders, capsys):
    save(folders[1] / "c.nii.gz", blob())
    assert cli.main(["evaluate", *map(str, folders)]) == 1
    assert "c: no prediction" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["pred"], ["pred", "truth", "--run", "x"], ["p", "t", "--spacing", "x"]]
)
def test_command_refuses_wrong_usage(words):
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", *words])
    assert caught.value.code == 2
