# SPDX-License-Identifier: Apache-2.0
"""What is run on a lent GPU: its benchmark, rehearsed on the CPU, and the scripts around it, on stand-ins."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench():
    made = gpu.Bench(tiny=True)
    made.copy = 1e9
    return made


def test_without_a_gpu_one_sentence_and_two(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("benchmarks.gpu: needs a GPU: torch finds no CUDA device; --rehearse")
    assert said.err.count("\n") == 1
    assert not said.out


def test_a_run_writes_its_rows(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert gpu.main(["--rehearse", "-k", "HD95", "-o", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["rehearsal"] is True
    assert {row["name"] for row in found["rows"]} == {row.name for row in gpu.rows() if "HD95" in row.name}
    for row in found["rows"]:
        assert row["ms"]["ours"] > 0
        assert row["bytes/s"] == pytest.approx(row["bytes"] / row["ms"]["ours"] * 1e3)
    operator = next(row for row in found["rows"] if "operator" in row["name"])
    assert operator["targets"] == {"ms 1.0": "rehearsed"}
    assert operator["missing"] == {"cuCIM": "needs cucim"}
    assert "not measured: cuCIM: needs cucim" in capsys.readouterr().out


@pytest.mark.parametrize(
    "word", ["forward C=14", "entropy", "components", "rollout", "targets", "attention", "term", "growth"]
)
def test_rows_run(word, bench):
    chosen = [row for row in gpu.rows() if word in row.name]
    assert chosen
    for one in chosen:  # without peers: no compiler in this test
        result = gpu.measure(replace(one, peers={}) if isinstance(one, gpu.Row) else one, bench)
        assert "ms" in result, result
        assert all(ms > 0 for ms in result["ms"].values())
        assert one.name in gpu.line_of(result)


def failing(_):
    raise RuntimeError("broken\nand more")


def row(name="a row", **fields):
    return gpu.Row(name, lambda bench, rng: torch.zeros(3), fields.pop("ours", lambda d: d + 1), **fields)


def test_a_failing_row_is_told_and_the_next_one_runs(monkeypatch, capsys):
    rows = [row("first", ours=failing, targets={"copy": 0.9}), row("second")]
    monkeypatch.setattr(gpu, "rows", lambda: rows)
    assert gpu.main(["--rehearse"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["first", "failed:", "RuntimeError:", "broken"]
    assert said[2].startswith("second")
    assert "ours" in said[2]
    assert said[3].startswith("targets: 1 not measured; failed rows: first")


def test_no_row_begins_when_time_is_up(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "rows", lambda: [row("late")])
    assert gpu.main(["--rehearse", "--seconds", "0"]) == 0
    assert "not measured: out of time" in capsys.readouterr().out


def test_results_are_compared_where_they_are_alike(bench):
    others = {"half": lambda d: d + 1.5, "other shape": lambda d: d[:2], "no tensor": lambda d: 3}
    result = gpu.measure(row(peers=others), bench)
    assert result["difference"] == {"half": 0.5}
    result = gpu.measure(row(ours=lambda d: [d + 2, d], graph=True), bench)
    assert result["difference"] == {"graph": 0.0}


def test_missing_kernels_and_peers_are_named(bench):
    result = gpu.measure(row(needs=("no_such_operator",), targets={"ms": 1.0}), bench)
    assert result["not measured"] == "no CUDA kernel for no_such_operator yet"
    assert result["targets"] == {"ms 1.0": "not measured"}
    missing = {"other": failing, "absent": gpu._cucim, "known": "needs more"}
    result = gpu.measure(row(peers=missing, targets={"other": 2.0}), bench)
    assert result["missing"] == {
        "other": "RuntimeError: broken",
        "absent": "needs cucim",
        "known": "needs more",
    }
    assert result["targets"] == {"other 2.0": "not measured"}


@pytest.mark.parametrize(
    ("what", "limit", "result", "verdict"),
    [
        ("copy", 0.85, {"copy": 0.86}, "met"),
        ("copy", 0.85, {"copy": 0.84}, "NOT MET"),
        ("ms", 1.0, {"ms": {"ours": 3.0, "graph": 0.9}}, "met"),
        ("ms", 1.0, {"ms": {"ours": 3.0}}, "NOT MET"),
        ("MONAI", 6.0, {"ratio": {"MONAI": 6.5}}, "met"),
        ("best CPU", 50.0, {"ratio": {"best CPU": math.nan}}, "not measured"),
        ("SemiSAM+ <=", 1.15, {"ratio": {"SemiSAM+": 1.1}}, "met"),
        ("SemiSAM+ <=", 1.15, {"ratio": {"SemiSAM+": 1.2}}, "NOT MET"),
    ],
)
def test_verdicts(what, limit, result, verdict):
    assert gpu._judge(what, limit, result) == verdict


def test_small_inputs_rotate_beyond_the_cache(bench):
    seen = []
    watched = row(ours=lambda d: seen.append(d.data_ptr()), graph=False)
    bench.cache, bench.repeat, bench.least = 30, 1, 1e-3
    watched.measure(bench)
    assert len(set(seen)) == math.ceil(3 * 30 / 12)


def test_every_promise_has_its_row():
    names = [row.name for row in gpu.rows()]
    assert len(set(names)) == len(names)
    promised = {t for row in gpu.rows() for t in row.targets}
    assert promised == {"copy", "torch.compile", "MONAI", "cuCIM", "best CPU", "cupy", "ms", "SemiSAM+ <="}
    with_target = [bool(row.targets) for row in gpu.rows()]
    assert with_target == sorted(with_target, reverse=True), "a run that is stopped keeps what was promised"


# ---- the scripts ----------------------------------------------------------------------------------

# A Python that has a GPU, says what it is asked to do, and whose tests fail.
STAND_IN = """#!/bin/sh
case "$1 $*" in
    "-c "*get_device_capability*) echo 90-real ;;
    "-c "*) exit "${BLIND:-0}" ;;
    *) echo "python $* with $SEMISAM_CUDA_ARCHS $SEMISAM_CUDA" ;;
esac
case "$*" in "-m pytest "*) exit 1 ;; esac
"""


def script(name, tmp_path, *arguments, **environment):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("SEMISAM_CUDA", "GPU_", "CUDA", "OUT"))}
    return subprocess.run(
        ["sh", str(ROOT / ".ci" / name), *arguments],
        env={
            **keep,
            "PATH": "/usr/bin:/bin",
            "CUDA_HOME": str(tmp_path),
            "PYTHON": str(stand_in),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_gpu_runs_every_step_and_tells_which_failed(tmp_path):
    out = tmp_path / "results"
    done = script("gpu", tmp_path, str(out))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "gpu: failed: tests sanitize"
    log = {name: (out / f"{name}.log").read_text() for name in ("build", "tests", "sanitize", "bench")}
    assert log["build"] == "python setup.py -q build_ext --inplace with 90-real 1\n"
    assert log["tests"].startswith("python -m pytest -q -p no:cacheprovider -n 4 -m cuda tests/test_cuda")
    assert log["sanitize"].startswith("sanitize-cuda: compute-sanitizer is not installed: it comes with")
    assert log["bench"].startswith(f"python -m benchmarks.gpu -o {out}/gpu.json --seconds 120 with")


def test_gpu_ends_within_ten_minutes():
    """Every step at its limit, and 15 seconds for what lies between."""
    text = (ROOT / ".ci" / "gpu").read_text()
    limits = dict(re.findall(r"step \w+ \"\$\{(GPU_\w+):-(\d+)\}\"", text))
    assert sorted(limits) == ["GPU_BENCH", "GPU_BUILD", "GPU_SANITIZE", "GPU_TESTS"]
    assert sum(map(int, limits.values())) <= 585
    for name, seconds in limits.items():  # and as the script's head has it
        assert set(re.findall(rf"{name}(?:=|:-)(\d+)", text)) == {seconds}


def test_gpu_takes_the_steps_that_are_named(tmp_path):
    done = script("gpu", tmp_path, OUT=str(tmp_path / "out"), GPU_STEPS="build bench")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "gpu: all of: build bench")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["bench.log", "build.log"]


def test_gpu_without_one_says_so(tmp_path):
    done = script("gpu", tmp_path, str(tmp_path / "out"), BLIND="1")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: no Python here has a torch that sees a GPU (tried .venv and")


def test_sanitizer_runs_its_three_tools(tmp_path):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"\n[ "$2" != racecheck ]\n')
    tool.chmod(0o755)
    done = script("sanitize-cuda", tmp_path, "python3")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("1 ")]
    assert [line.split()[2] for line in lines] == ["memcheck", "racecheck", "initcheck"]
    assert "--error-exitcode 9 python3 -m pytest" in lines[0]
    assert done.stdout.splitlines()[-1] == "sanitize-cuda: found something: racecheck"
