# SPDX-License-Identifier: Apache-2.0
"""What is said of generalists: their list, the data sets they were trained on, their weights by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_fetch import CONTENT, HASH, server  # noqa: F401

from semisam import cli, fetch, generalists
from semisam.engine import config, trainer
from semisam.engine.phantom import write_phantoms
from semisam.fetch import Weights
from semisam.generalists import benchmarks
from semisam.generalists.benchmarks import BENCHMARKS, overlap, recognise
from semisam.generalists.sam_med3d import SamMed3D, SamMed3DTurbo
from semisam.generalists.sam_med3d_network import Architecture, SamMed3DNetwork


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    place = tmp_path / "home"
    monkeypatch.setenv("SEMISAM_HOME", str(place))
    return place


# ---- data sets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("LA", ["LA"]),
        ("la", ["LA"]),
        ("2018LA_Seg_Training Set", ["LA"]),
        ("Atria-Seg", ["LA"]),
        ("Task04_Hippocampus", ["Hippocampus"]),
        ("Dataset027_ACDC", ["ACDC"]),
        ("ACDC_h5", ["ACDC"]),
        ("Synapse", ["BTCV"]),
        ("amos22", ["AMOS"]),
        ("KiTS19", ["KiTS"]),
        ("Task03_Liver", ["LiTS"]),
        ("Totalsegmentator_dataset_v201", ["TotalSegmentator"]),
        ("Kvasir-SEG", ["Kvasir"]),
        ("BraTS2019", ["BraTS"]),
        ("Pancreas-CT", ["Pancreas-CT"]),
        ("Task02_Heart", ["MSD Heart"]),
        ("Task07_Pancreas", ["MSD Pancreas"]),
        ("data", []),
        ("Phantoms", []),
        ("plants", []),
        ("splits_final", []),
        ("password", []),
    ],
)
def test_names_of_data_sets(name, known):
    assert recognise([name]) == known


def test_overlaps():
    assert overlap(SamMed3D.spec, "AMOS").state == "yes"
    assert overlap(SamMed3D.spec, "LA").state == "related"
    assert overlap(SamMed3D.spec, "KiTS").state == "not listed"
    assert overlap(SamMed3DTurbo.spec, "KiTS") == ("yes", "as KiTS and KiTS2021")
    assert overlap(generalists.class_of("segany-pet").spec, "AMOS").state == "not stated"
    assert overlap(generalists.class_of("random-walker").spec, "AMOS").state == "no"
    with pytest.raises(KeyError):
        overlap(SamMed3D.spec, "nothing")
    for name in generalists.GENERALISTS:
        spec = generalists.class_of(name).spec
        assert set(spec.overlaps) <= set(BENCHMARKS), name
        assert spec.training_list in ("none", "published", "")


# ---- semisam generalists ------------------------------------------------------------------------


def test_the_list_shows_every_registered_generalist(capsys, home):
    assert cli.main(["generalists"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["name", "images", "prompts"]
    shown = lines[1 : 1 + len(generalists.GENERALISTS)]
    assert [line.split()[0] for line in shown] == list(generalists.GENERALISTS)
    assert "none needed" in shown[0]
    assert "128x128x128  1.5 1.5 1.5  torch" in shown[1]
    assert all("not here" in line for line in shown[1:])
    assert f"weights: in {home} (SEMISAM_HOME), by `semisam fetch NAME`" in lines
    assert any("do not judge it by LA, Hippocampus" in line for line in lines)


def test_the_list_for_programs(capsys, home, monkeypatch):
    monkeypatch.setitem(generalists.GENERALISTS, "gone", "nowhere.at.all.Model")
    (home / "sam-med3d-turbo").mkdir(parents=True)
    (home / "sam-med3d-turbo" / "sam_med3d_turbo.pth").write_bytes(b"")
    assert cli.main(["generalists", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(generalists.GENERALISTS)
    turbo = rows["sam-med3d-turbo"]
    assert turbo["found"] == str(home / "sam-med3d-turbo" / "sam_med3d_turbo.pth")
    assert turbo["weights"]["hub"] == "blueyo0/SAM-Med3D"
    assert turbo["benchmarks"]["KiTS"]["state"] == "yes"
    assert rows["sam-med3d"]["found"] is None
    assert rows["random-walker"]["weights"] is None
    assert "nowhere" in rows["gone"]["error"]
    assert cli.main(["generalists"]) == 0
    assert "nowhere" in capsys.readouterr().out


def test_the_list_about_one_data_set(capsys):
    assert cli.main(["generalists", "--dataset", "amos22"]) == 0
    text = capsys.readouterr().out
    assert "  sam-med3d: yes, as AMOS2022, CT and MRI" in text
    assert "  segany-pet: not stated" in text
    assert cli.main(["generalists", "--dataset", "mine"]) == 1
    assert "--dataset: expected one of LA, ACDC" in capsys.readouterr().err


def test_what_a_generalist_needs_is_missing(capsys, monkeypatch):
    from semisam.commands import generalists as command  # noqa: PLC0415

    monkeypatch.setattr(command.util, "find_spec", lambda name: None)
    assert command.describe("sam-med3d")["missing"] == ["torch"]
    cli.main(["generalists"])
    assert "torch (missing)" in capsys.readouterr().out


# ---- semisam fetch ------------------------------------------------------------------------------


def test_fetch_on_the_command_line(server, home, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fetch.util, "find_spec", lambda name: None)
    url = f"{server.url}/model.pt"
    assert cli.main(["fetch", "sam-med3d", "--url", url]) == 0
    said = capsys.readouterr().out.splitlines()
    place = home / "sam-med3d" / "model.pt"
    assert said == [
        f"licence: {SamMed3D.spec.licence}",
        f"{place}: sha256 {HASH} (not checked: no hash is known for this file)",
        "ready: --generalist sam-med3d",
    ]
    assert place.read_bytes() == CONTENT
    assert cli.main(["fetch", "sam-med3d-turbo", "--url", url, "--sha256", HASH]) == 0
    assert f"--checkpoint {home / 'sam-med3d-turbo' / 'model.pt'}" in capsys.readouterr().out
    place.unlink()
    assert cli.main(["fetch", "sam-med3d", "--url", url, "--sha256", "0" * 64]) == 1
    assert f"got {HASH}: it is another file" in capsys.readouterr().err
    assert cli.main(["fetch", "sam-med3d", "--url", f"{server.url}/none.pt"]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_fetch_from_the_known_address(server, home, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fetch.util, "find_spec", lambda name: None)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.files["/blueyo0/SAM-Med3D/resolve/main/sam_med3d_turbo.pth"] = CONTENT
    assert cli.main(["fetch", "sam-med3d-turbo"]) == 0
    assert "ready: --generalist sam-med3d-turbo\n" in capsys.readouterr().out
    assert fetch.find("sam-med3d-turbo", SamMed3DTurbo.spec.weights).read_bytes() == CONTENT
    server.files["/YichiZhang98/SegAnyPET/resolve/main/v.pth"] = CONTENT
    assert cli.main(["fetch", "segany-pet"]) == 1
    assert "is wanted is not known: give --file NAME" in capsys.readouterr().err
    assert cli.main(["fetch", "segany-pet", "--file", "v.pth"]) == 0
    assert "ready: --generalist segany-pet\n" in capsys.readouterr().out


def test_fetch_is_refused(capsys, home):
    assert cli.main(["fetch", "random-walker"]) == 0
    assert capsys.readouterr().out == "random-walker needs no weights\n"
    assert cli.main(["fetch", "sam-med4d"]) == 1
    assert "NAME: expected one of random-walker" in capsys.readouterr().err
    assert cli.main(["fetch", "sam-med3d"]) == 1
    assert (
        "no address is known for its weights (see https://github.com/uni-medical" in capsys.readouterr().err
    )
    for words in (["--sha256", "abc"], ["--file", "a", "--url", "b"]):
        with pytest.raises(SystemExit):
            cli.main(["fetch", "sam-med3d-turbo", *words])
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file where the folder should be")
    assert cli.main(["fetch", "sam-med3d", "--url", "http://127.0.0.1:9/a.pth"]) == 1
    assert "cannot be written" in capsys.readouterr().err


# ---- weights by name ----------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(
        "semisam.generalists.sam_med3d.SamMed3DNetwork", lambda: SamMed3DNetwork(Architecture.small())
    )
    return SamMed3DNetwork(Architecture.small())


def test_weights_are_found_by_name(home, small):
    with pytest.raises(
        ValueError, match=r"neither; none is in .*, where `semisam fetch sam-med3d-turbo` would"
    ):
        generalists.build("sam-med3d-turbo")
    (home / "sam-med3d-turbo").mkdir(parents=True)
    place = home / "sam-med3d-turbo" / "sam_med3d_turbo.pth"
    torch.save({"model_state_dict": small.state_dict()}, place)
    made = generalists.build("sam-med3d-turbo", resample_mm=1.5)
    assert (made.files, made.resample_mm) == ((place,), 1.5)
    other = home / "other.pth"
    shutil.copy(place, other)
    assert generalists.build("sam-med3d-turbo", checkpoint=other).files == (other,)
    assert generalists.build("sam-med3d", network=small).files == ()
    with pytest.raises(ValueError, match="none is in"):
        generalists.build("segany-pet")


def test_a_training_tells_of_overlaps_and_records_the_weights(tmp_path, home, small, capsys):
    root = write_phantoms(tmp_path / "Task04_Hippocampus", labeled=2, unlabeled=1, test=0, shape=(16, 16, 16))
    (home / "sam-med3d").mkdir(parents=True)
    place = home / "sam-med3d" / "mine.pth"
    torch.save({"model_state_dict": small.state_dict()}, place)
    pairs = {
        "data.root": str(root),
        "term.generalists": ["random-walker", "sam-med3d"],
        "term.gate_steps": 1,
        "specialist.options": {"channels": [4, 8]},
        "train.patch_size": [16, 16, 16],
        "train.steps": 1,
        "train.device": "cpu",
    }
    out = tmp_path / "run"
    trainer.train(config.load(settings=list(pairs.items())), out)
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == 1
    assert told[0].startswith(
        "warning: sam-med3d was trained on Hippocampus (as MSD04_Hippocampus), which this"
    )
    run = json.loads((out / "run.json").read_text())
    assert run["generalist_overlaps"] == [told[0].removeprefix("warning: ")]
    assert run["generalist_weights"] == {"sam-med3d": {"path": str(place), "sha256": fetch.sha256(place)}}


def test_every_known_source_is_complete():
    for name in generalists.GENERALISTS:
        weights = generalists.class_of(name).spec.weights
        if weights is not None:
            assert isinstance(weights, Weights)
            assert weights.page.startswith("https://"), name
            assert not weights.load or any(f.startswith(weights.load) for f in weights.files)
    assert benchmarks.BENCHMARKS
    assert Path(fetch.home()).is_absolute()
