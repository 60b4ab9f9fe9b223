# SPDX-License-Identifier: Apache-2.0
"""The report: its numbers, its verdict, what it does with gaps and damage, and how it looks in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image

from semisam import cli
from semisam.engine import gallery, pictures, results
from semisam.engine.report import _facts, render, report, verdict
from semisam.engine.results import Scores, compare, find_runs, read_run

DRAWS = (1, 2, 3)
VOID = {"meta", "br", "hr", "img", "link", "input", "use", "path", "image"}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return runs.data_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def group(tmp_path_factory, data):
    """Three methods x three draws; SemiSAM wins every draw against both."""
    place = tmp_path_factory.mktemp("runs")
    for draw in DRAWS:
        runs.run_folder(place, data, "supervised", 0.60 + 0.02 * draw, draw=draw)
        runs.run_folder(place, data, "mean-teacher", 0.66 + 0.025 * draw, draw=draw)
        runs.run_folder(place, data, "semisam-mean-teacher", 0.71 + 0.02 * draw, draw=draw)
    return place


@pytest.fixture(scope="session")
def page(group, tmp_path_factory):
    path = report([group], tmp_path_factory.mktemp("out"))
    return path, path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Text, ids and attributes of a page; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: dict[str, list[dict[str, str | None]]] = {}
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.setdefault(tag, []).append(found)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [v for k, v in found.items() if k in ("href", "src", "xlink:href") and v]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if not self.open or self.open[-1] not in ("style", "title"):
            self.words += text.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


# ---- numbers ----------------------------------------------------------------------------------------


def made(name: str, *dices: float, draw: int = 0, cases: int = 12) -> results.RunRecord:
    """A tested run whose cases score around each of `dices` (one per class)."""
    spread = np.linspace(-0.1, 0.1, cases)
    values = {
        f"case {i}": {f"class {c}": {"dice": d + s, "hd95": 2.0} for c, d in enumerate(dices)}
        for i, s in enumerate(spread)
    }
    config = {"method": {"name": name}, "data": {"draw": draw}, "train": {"seed": 7}}
    return results.RunRecord(Path(f"{name}-{draw}"), config, scores=Scores(values))


def trio(ours: list[float], theirs: list[float]) -> results.Comparison:
    pairs = enumerate(zip(ours, theirs, strict=True))
    return compare(
        [
            r
            for i, (a, b) in pairs
            for r in (made("semisam-mean-teacher", a, draw=i), made("mean-teacher", b, draw=i))
        ]
    )


def test_gains_are_paired_by_draw():
    found = trio([0.80, 0.70, 0.75], [0.70, 0.69, 0.60])
    gain = found.gains[0]
    assert gain.over == "draws"
    assert list(gain.differences.values()) == pytest.approx([0.10, 0.01, 0.15])
    assert gain.statistic.mean == pytest.approx(0.26 / 3)
    assert gain.statistic.sd == pytest.approx(np.std([0.10, 0.01, 0.15], ddof=1))
    assert gain.wins == 3


def test_runs_of_other_draws_or_seeds_are_not_compared():
    ours, theirs = made("semisam-mean-teacher", 0.8, draw=1), made("mean-teacher", 0.5, draw=2)
    assert compare([ours, theirs]).gains == []
    theirs.config["data"]["draw"] = 1
    assert len(compare([ours, theirs]).gains) == 1
    theirs.config["train"]["seed"] = 8
    assert compare([ours, theirs]).gains == []


def test_every_draw_may_learn_from_a_run_of_its_own():
    runs = [made("semisam-mean-teacher", 0.8, draw=draw) for draw in (1, 2, 3)]
    for run in runs:
        run.config["term"] = {"offline_from": f"first/draw{run.draw[0]}"}
    (method,) = compare(runs).methods
    assert len(method.runs) == 3
    runs[0].config["term"]["offline_from"] = None  # this one teaches itself
    assert len(compare(runs).methods) == 2


def test_steps_are_those_of_both_stages():
    runs = [made("semisam-mean-teacher", 0.8), made("mean-teacher", 0.7)]
    for run, steps in zip(runs, (500, 1000), strict=True):
        run.log["step"] = np.array([1, steps])
    facts = _facts(compare(runs), runs[0])
    assert ("500–1 000", "steps") in facts
    runs[0].config["term"] = {"first_stage": 500}
    runs[1].config["term"] = {"first_stage": 500}  # of a method without the term it says nothing
    assert ("1 000", "steps") in _facts(compare(runs), runs[0])


def test_gains_use_the_cases_that_both_have():
    ours, theirs = made("semisam-mean-teacher", 0.8), made("mean-teacher", 0.7)
    assert ours.scores
    ours.scores.values["only mine"] = {"class 0": {"dice": 0.0}}
    gain = compare([ours, theirs]).gains[0]
    assert gain.over == "cases"
    assert gain.statistic.mean == pytest.approx(0.1)


def test_distances_leave_undefined_cases_out_and_count_them():
    values = {c: {"x": {"dice": d, "hd95": h}} for c, d, h in (("a", 0.9, 2.0), ("b", 0.0, np.nan))}
    scores = Scores(values)
    assert scores.mean("dice") == pytest.approx(0.45)
    assert scores.mean("hd95") == 2.0
    assert scores.undefined() == 1


def test_mean_over_classes_weighs_classes_alike():
    scores = Scores({"a": {"x": {"dice": 0.9}, "y": {"dice": 0.1}}, "b": {"x": {"dice": 0.7}}})
    assert scores.mean("dice") == pytest.approx((0.8 + 0.1) / 2)


@pytest.mark.parametrize(
    ("ours", "theirs", "tone", "words"),
    [
        ([0.80, 0.72, 0.75], [0.70, 0.69, 0.60], "good", "SemiSAM-MT is better than mean teacher."),
        (
            [0.80, 0.68, 0.75],
            [0.70, 0.69, 0.60],
            "mixed",
            "SemiSAM-MT is not clearly better than mean teacher.",
        ),
        ([0.60, 0.72, 0.60], [0.70, 0.69, 0.60], "bad", "SemiSAM-MT lost against mean teacher."),
        (
            [0.70, 0.69, 0.60],
            [0.70, 0.69, 0.60],
            "mixed",
            "SemiSAM-MT is not clearly better than mean teacher.",
        ),
    ],
)
def test_verdict_calls_a_loss_a_loss(ours, theirs, tone, words):
    headline, _, found = verdict(trio(ours, theirs))
    assert (headline, found) == (words, tone)


def test_verdict_names_every_baseline_that_won():
    both = [made("semisam-mean-teacher", 0.7), made("mean-teacher", 0.8), made("supervised", 0.75)]
    headline, sentences, tone = verdict(compare(both))
    assert headline == "SemiSAM-MT lost against mean teacher and supervised."
    assert tone == "bad"
    assert "One draw only" in " ".join(sentences)


def test_verdict_holds_the_largest_component_against_us():
    ours, theirs = made("semisam-mean-teacher", 0.72), made("mean-teacher", 0.7)
    theirs.component_scores = made("", 0.75).scores
    ours.component_scores = made("", 0.73).scores
    headline, _, tone = verdict(compare([ours, theirs]))
    assert headline == "SemiSAM-MT lost against the largest component of mean teacher."
    assert tone == "bad"
    ours.component_scores = made("", 0.78).scores
    headline, _, tone = verdict(compare([ours, theirs]))
    assert headline == "SemiSAM-MT is not clearly better than the largest component of mean teacher."
    assert tone == "mixed"


def test_settings_that_differ_make_two_methods_of_one():
    one, two = made("semisam-mean-teacher", 0.7), made("semisam-mean-teacher", 0.8)
    two.config["term"] = {"options": {"lam_sam": 5.0}}
    assert [m.title for m in compare([one, two]).methods] == [
        "SemiSAM-MT (term.options.lam_sam=5.0)",
        "SemiSAM-MT (term.options.lam_sam=None)",
    ]
    two.config.pop("term")
    assert len(compare([one, two]).methods) == 2, "the same draw twice is no sample of two draws"


# ---- the page ---------------------------------------------------------------------------------------


def test_page_is_one_file_without_scripts(page):
    path, text = page
    reader = Reader(text)
    assert path.stat().st_size < 5e6
    assert "script" not in reader.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in reader.links)
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(reader.ids) == len(set(reader.ids))


def test_page_points_to_what_it_has(page):
    reader = Reader(page[1])
    targets = {link[1:] for link in reader.links if link.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]+)\)", page[1]))
    assert targets <= set(reader.ids)


def test_every_picture_says_what_it_shows(page):
    found = Reader(page[1]).tags["svg"]
    assert len(found) > 30
    assert all(len(svg.get("aria-label") or "") > 10 and svg.get("role") == "img" for svg in found)


def test_page_has_the_numbers(page, group):
    text = Reader(page[1]).text
    values = {m: [] for m in ("supervised", "mean-teacher", "semisam-mean-teacher")}
    for method, dices in values.items():
        for draw in DRAWS:
            rows = results._read_rows(group / f"{method}-draw{draw}" / "test/best-student/metrics.csv")
            by_class = [[float(r["dice"]) for r in rows if r["class"] == c] for c in runs.CLASSES[1:]]
            dices.append(np.mean([np.mean(d) for d in by_class]))
        assert f"{np.mean(dices):.3f} ± {np.std(dices, ddof=1):.3f}" in text
    gain = np.subtract(values["semisam-mean-teacher"], values["mean-teacher"])
    assert f"+{gain.mean():.3f} ± {gain.std(ddof=1):.3f} (better in 3 of 3)" in text
    assert "Largest component of each class" in text
    assert "HD95 ↓ mm" in text


def test_page_has_every_section(page):
    text = Reader(page[1]).text
    for words in (
        *("Best: scan_09", "Worst: scan_06", "Step 67", "Step 400", "pseudo-label", "specialist and clicks"),
        *("The random-walker taught.", "largest component", "1 × 1 × 1.25 mm"),
        *("0 background, 1 core, 2 rind", "scan_02, scan_03", "torch", "2.13.0", "train.patch_size"),
    ):
        assert words in text, words
    assert "Not in this report" not in text


def test_page_escapes_what_it_prints(page):
    assert "<script>alert" not in page[1]
    assert "&lt;script&gt;alert" in page[1]


def test_clicks_lie_where_they_were_made():
    """A click at voxel (i, j) of the slice is drawn on that voxel."""
    space = (6, 8, 4)
    volume = np.zeros(space)
    volume[1, 5, 2] = 1
    seen = pictures.take_slice(volume, 2, 2)
    mark = gallery._mark(np.array([1, 5, 2]), True, 2, 2, space)
    assert seen[int(mark.row), int(mark.column)] == 1
    assert mark.away == 0


def test_without_clicks_the_page_names_none(page, tmp_path):
    """A generalist that was asked with a mask: nothing to look for in its pictures."""
    assert "clicks made from it" in page[1]
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    space = (6, 8, 4)
    arrays = {name: np.zeros(space, np.float32) for name in ("weight", "uncertainty", "target", "prediction")}
    sample = {**arrays, "image": np.zeros((1, *space), np.float32)}
    for step, clicks in ((10, np.array([[1, 2, 3, -1]])), (20, np.zeros((0, 4)))):  # -1: no click
        np.savez(run / "samples" / f"step_{step:06d}.npz", **{**sample, "clicks": clicks})
        row = gallery._sample_row(run / "samples" / f"step_{step:06d}.npz")
        assert not row["clicked"]
        assert "click" not in str(row["panels"])
    np.savez(run / "samples" / "step_000030.npz", **{**sample, "clicks": np.array([[1, 2, 3, 1]])})
    row = gallery._sample_row(run / "samples" / "step_000030.npz")
    assert row["clicked"]
    assert "1 positive and 0 negative clicks" in str(row["panels"])


def test_contours_lie_around_their_mask():
    mask = np.zeros((6, 8), bool)
    mask[2:4, 3:7] = True
    svg = pictures.panel(mask * 1.0, alt="a box", contours=[pictures.Contour(mask, "#fff")], aspect=2.0)
    path = re.search(r'<path d="M([^"]*)Z"', svg)
    assert path
    points = np.array([float(v) for v in path[1].split()]).reshape(-1, 2)
    assert points.min(0).tolist() == [3.0, 4.0]
    assert points.max(0).tolist() == [7.0, 8.0]


# ---- gaps and damage --------------------------------------------------------------------------------


def test_one_run_is_a_report_too(tmp_path, data):
    run = runs.run_folder(tmp_path, data, "semisam-mean-teacher", 0.7)
    text = Reader(report([run], run).read_text()).text
    assert "SemiSAM-MT reaches a mean test Dice of" in text
    assert "No other method was run" in text
    assert (run / "report.html").is_file()


def test_what_is_missing_is_said(tmp_path, data):
    run = runs.run_folder(tmp_path, data, "mean-teacher", 0.7, tested=False)
    (run / "validation.csv").unlink()
    text = Reader(render([read_run(run)])).text
    assert "validation.csv: the run was not validated" in text
    assert "the run was not evaluated on test cases" in text
    assert "Nothing to compare: no run was tested." in text
    assert "kept no samples" in text
    assert "No run has a gate" in text


def test_an_empty_run_folder_is_reported(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    reader = Reader(render(find_runs([tmp_path])))
    assert "Not in this report" in reader.text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path, data):
    run = runs.run_folder(tmp_path, data, "semisam-mean-teacher", 0.7)
    (run / "run.json").write_text("{ not json")
    (run / "log.csv").write_bytes(b"step,loss\n\xff\xfe\x00")
    (run / "gate.csv").write_text("")
    (run / "samples/step_000067.npz").write_bytes(b"PK")
    (run / "test/best-student/predictions/scan_09.nii.gz").write_bytes(b"\x1f\x8b")
    text = Reader(render([read_run(run)])).text
    assert "run.json: cannot be read" in text
    assert "step_000067.npz" in text
    assert "scan_09" in text
    assert "Step 133" in text


def test_scans_that_moved_are_a_sentence(tmp_path, data):
    run = runs.run_folder(tmp_path, Path("/nowhere/data"), "semisam-mean-teacher", 0.7)
    assert "The scans could not be shown" in Reader(render([read_run(run)])).text


def test_a_run_that_goes_on_is_unfinished(tmp_path, data):
    run = runs.run_folder(tmp_path, data, "supervised", 0.7)
    lines = (run / "log.csv").read_text().splitlines()
    (run / "log.csv").write_text("\n".join(lines[:40]) + "\n")
    meta = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(meta | {"finished": False}))
    assert "unfinished: step 190 of 400" in Reader(render([read_run(run)])).text


def test_command(tmp_path, data, capsys):
    run = runs.run_folder(tmp_path / "runs", data, "supervised", 0.7)
    assert (
        cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "x.html"), "--title", "A <b>"])
        == 0
    )
    assert str(tmp_path / "x.html") in capsys.readouterr().out
    assert "A &lt;b&gt;" in (tmp_path / "x.html").read_text()
    assert cli.main(["report", str(run / "test")]) == 1
    assert "holds no run" in capsys.readouterr().err
    assert cli.main(["report", str(run), "--out", "/proc/no/report.html"]) == 1


# ---- in a browser -----------------------------------------------------------------------------------


def screenshot(page: Path, out: Path, *options: str, width: int = 1280, height: int = 6400) -> np.ndarray:
    """What headless Chromium shows of a page, [rows, columns, 3]."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here: apt-get install chromium")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    command += [f"--user-data-dir={out.parent / 'profile'}", f"--window-size={width},{height}"]
    done = subprocess.run(
        [*command, f"--screenshot={out}", page.as_uri()], capture_output=True, timeout=120, check=False
    )
    assert out.is_file(), done.stderr.decode()
    with Image.open(out) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def has(shot: np.ndarray, colour: str) -> bool:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(shot - wanted).sum(-1) < 30).any())


def test_browser_shows_it(page, tmp_path):
    shot = screenshot(page[0], tmp_path / "light.png")
    paper = shot[5, 5]
    assert paper.sum() > 700
    blank = (np.abs(shot - paper).sum(-1) < 12).all(1)
    filled = np.flatnonzero(~blank)
    assert filled[-1] > 4000, "most of the page is there"
    longest = max(
        len(list(run)) for run in np.split(blank, np.flatnonzero(np.diff(blank)) + 1) if run[0] and len(run)
    )
    assert longest < 6400 - filled[-1] + 1 or longest < 200, "no holes"
    assert (np.abs(shot[:, -40:] - paper).sum(-1) < 12).all(), "nothing sticks out to the right"
    for colour in (*pictures.CLASS_COLOURS[:2], *pictures.METHOD_COLOURS[:3], "#3df07c", "#ff5050"):
        assert has(shot, colour), colour


def test_browser_shows_it_in_the_dark_and_on_a_phone(page, tmp_path):
    dark = screenshot(page[0], tmp_path / "dark.png", "--blink-settings=preferredColorScheme=0", height=1600)
    assert dark[5, 5].sum() < 120
    assert has(dark, "#e4e6e9"), "light text"
    phone = screenshot(page[0], tmp_path / "phone.png", width=500, height=1600)
    assert (np.abs(phone[:, -10:] - phone[5, 5]).sum(-1) < 12).all(), "nothing sticks out to the right"


def test_modules_load_without_matplotlib_and_torch():
    code = (
        "import sys, semisam.engine.report, semisam.engine.pictures;"
        "print(sorted({'torch', 'matplotlib', 'jinja2', 'nibabel'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
