# SPDX-License-Identifier: Apache-2.0
"""The demonstration: what it plans, that it ends with an honest table, and that it goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

from semisam import cli
from semisam.engine import demo, results
from semisam.engine.config import Config, dump

ROOT = Path(__file__).parents[1]
TINY = [
    *("--set", "train.patch_size=[16,16,16]", "--set", "specialist.options={channels: [4, 8]}"),
    *("--set", "train.steps=6", "--set", "term.gate_steps=3", "--set", "train.checkpoint_every=2"),
    *("--set", "train.log_every=1", "--set", "train.device=cpu"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.data_folder(tmp_path_factory.mktemp("data"), cases=5, test=2)


def test_runs_differ_in_method_and_draw_alone():
    tasks = demo.tasks_of(Config(), "out", 3)
    assert len(tasks) == 9
    assert len({task.folder for task in tasks}) == 9
    plain = []
    for task in tasks:
        tree = dump(task.config)
        plain.append((tree["data"].pop("draw"), tree["method"].pop("name")))
        assert tree == {**dump(Config()), "data": tree["data"], "method": tree["method"]}
    assert set(plain) == {(d, m) for d in (1, 2, 3) for m in demo.METHODS}


def test_a_test_set_is_set_aside_where_the_folder_has_none(tmp_path):
    folder = runs.data_folder(tmp_path / "data", cases=8, test=0)
    config, found = demo.configure_for(folder, tmp_path)
    assert config.data.test == 2
    assert config.train.patch_size == [40, 48, 32]
    assert not found.test


def test_minutes_become_steps():
    config = Config()
    config.train.patch_size = [16, 16, 16]
    config.specialist.options = {"channels": [4, 8]}
    few, many = (demo.steps_for(config, minutes, draws=1, jobs=1) for minutes in (0.05, 5))
    assert 20 <= few < many


def test_wrong_words_are_refused(tmp_path, data, capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--draws", "0"])
    with pytest.raises(SystemExit):
        cli.main(["demo", "--minutes", "0"])
    assert cli.main(["demo", "--out", str(tmp_path), "--data", str(tmp_path / "none")]) == 1
    assert cli.main(["demo", "--out", str(tmp_path), "--data", str(data), "--set", "train.stepz=1"]) == 1
    assert "did you mean train.steps" in capsys.readouterr().err


def test_demo_on_a_folder(tmp_path, data, capsys):
    """Two draws in this process, then once more: nothing is trained again, nothing is written over."""
    words = ["demo", "--out", str(tmp_path), "--data", str(data), "--draws", "2", "--jobs", "1", *TINY]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "SemiSAM-MT" in out
    assert str(tmp_path / "report.html") in out
    found = results.compare(results.find_runs([tmp_path / "runs"]))
    assert [len(m.tested) for m in found.methods] == [2, 2, 2]
    for method in found.methods:  # the table's numbers are those of the files
        assert str(method.statistic("dice")) in out
    labeled = {tuple(run.split["labeled"]) for m in found.methods for run in m.runs if run.draw[0] == 1}
    assert len(labeled) == 1, "one draw is the same for all methods"
    page = (tmp_path / "report.html").read_text()
    assert results.compare(results.find_runs([tmp_path / "runs"])).gains[0].method.title in page

    assert cli.main(words) == 1
    assert "--resume" in capsys.readouterr().err
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    assert cli.main([*words, "--resume"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()}


@pytest.fixture
def sigint_arrives():
    """Shells start what runs in the background with SIGINT ignored, and processes hand that on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_and_resume_with_workers(tmp_path, data, sigint_arrives):
    """Workers save and leave on Ctrl-C, and nothing goes on behind it; --resume ends what was begun."""
    words = ["demo", "--data", str(data), "--draws", "1", "--jobs", "2", *TINY, "--set", "train.steps=40"]
    command = [sys.executable, "-m", "semisam", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        [*command, "--out", str(stopped)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 200
    log = stopped / "runs/mean-teacher-draw1/log.csv"
    while not (log.exists() and len(log.read_text().splitlines()) > 4):
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors.decode()
    assert b"--resume" in out
    assert not results.read_run(stopped / "runs/mean-teacher-draw1").finished

    done = subprocess.run(
        [*command, "--out", str(stopped), "--resume"], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"continues after step" in (stopped / "logs/mean-teacher-draw1.txt").read_bytes()
    found = results.compare(results.find_runs([stopped / "runs"]))
    assert [len(m.tested) for m in found.methods] == [1, 1, 1]
    assert all(run.finished and run.last_step == 40 for m in found.methods for run in m.runs)


def test_a_run_that_fails_is_told(tmp_path, data, capsys):
    words = ["demo", "--out", str(tmp_path), "--data", str(data), "--draws", "1", "--jobs", "2", *TINY]
    assert cli.main([*words, "--set", "train.lr=1e30"]) == 1
    said = capsys.readouterr().err
    assert "-draw1: " in said
    assert not any(run.finished for run in results.find_runs([tmp_path / "runs"]))
