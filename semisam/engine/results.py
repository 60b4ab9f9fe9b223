# SPDX-License-Identifier: Apache-2.0
"""Run folders read back, and methods compared draw by draw.

Reading is forgiving: a run that is not finished, not validated or not tested is read as far as it goes,
and what is missing is named in `RunRecord.missing`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "BETTER_HIGH",
    "METRICS",
    "Comparison",
    "Gain",
    "Method",
    "ResultError",
    "RunRecord",
    "Scores",
    "Statistic",
    "compare",
    "find_runs",
    "method_title",
    "read_run",
]

METRICS = {"dice": "Dice", "jaccard": "Jaccard", "hd95": "HD95", "asd": "ASD"}
BETTER_HIGH = {"dice": True, "jaccard": True, "hd95": False, "asd": False}
TITLES = {
    "supervised": "Supervised",
    "mean-teacher": "Mean teacher",
    "ua-mt": "UA-MT",
    "dan": "DAN",
    "semisam-mean-teacher": "SemiSAM-MT",
    "semisam-ua-mt": "SemiSAM-UA-MT",
    "semisam-dan": "SemiSAM-DAN",
}
COMPONENT = "-largest-component"  # ending of the folder with largest components
SAME_METHOD = ("data.draw", "data.labeled", "data.unlabeled", "train.seed", "method.name")


class ResultError(ValueError):
    """A folder that holds no run, with what was looked for."""


@dataclass(frozen=True)
class Statistic:
    """A mean, its sample standard deviation (NaN for one value) and the number of values.

    >>> from semisam.engine.results import Statistic
    >>> str(Statistic.of([0.7, 0.8])), str(Statistic.of([0.7])), str(Statistic.of([]))
    ('0.750 ± 0.071', '0.700', '–')
    """

    mean: float
    sd: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Statistic:
        """Return that of the finite ones among `values`."""
        kept = [v for v in values if np.isfinite(v)]
        if not kept:
            return cls(float("nan"), float("nan"), 0)
        sd = float(np.std(kept, ddof=1)) if len(kept) > 1 else float("nan")
        return cls(float(np.mean(kept)), sd, len(kept))

    def text(self, digits: int = 3, signed: bool = False) -> str:
        """Return "mean ± sd" with `digits` decimals, an en dash where there is no value."""
        if not self.n:
            return "–"
        mean = f"{self.mean:+.{digits}f}" if signed else f"{self.mean:.{digits}f}"
        mean = mean.replace("-", "−")
        return mean if np.isnan(self.sd) else f"{mean} ± {self.sd:.{digits}f}"

    def __str__(self) -> str:
        return self.text()


@dataclass
class Scores:
    """A test's figures: `values[case][class][metric]`; distances in `unit`, NaN where undefined.

    >>> from semisam.engine.results import Scores
    >>> scores = Scores({"a": {"heart": {"dice": 0.8}}, "b": {"heart": {"dice": 0.6}}})
    >>> scores.mean("dice"), scores.case_means("dice")
    (0.7, {'a': 0.8, 'b': 0.6})
    """

    values: dict[str, dict[str, dict[str, float]]]
    unit: str = "voxels"

    @property
    def classes(self) -> list[str]:
        """Names of the foreground classes, in the file's order."""
        return list(dict.fromkeys(name for case in self.values.values() for name in case))

    def statistic(self, metric: str, name: str) -> Statistic:
        """Return mean and sd over cases of one class."""
        return Statistic.of(
            case[name].get(metric, float("nan")) for case in self.values.values() if name in case
        )

    def mean(self, metric: str, name: str | None = None) -> float:
        """Return the mean over cases of class `name`, or the mean of all classes' means."""
        if name is not None:
            return self.statistic(metric, name).mean
        return Statistic.of(self.statistic(metric, one).mean for one in self.classes).mean

    def case_means(self, metric: str) -> dict[str, float]:
        """Return every case's mean over its classes."""
        return {
            case: Statistic.of(one.get(metric, float("nan")) for one in classes.values()).mean
            for case, classes in self.values.items()
        }

    def undefined(self, metric: str = "hd95") -> int:
        """Return how many case-class pairs have no distance: exactly one of the two masks is empty."""
        return sum(
            not np.isfinite(one.get(metric, 0.0)) for case in self.values.values() for one in case.values()
        )


@dataclass
class RunRecord:
    """What one run folder says; what it does not say is empty, and named in `missing`.

    >>> from pathlib import Path
    >>> from semisam.engine.results import RunRecord
    >>> run = RunRecord(Path("run"), {"method": {"name": "ua-mt"}, "data": {"draw": 2}, "train": {"seed": 7}})
    >>> run.method, run.draw, run.setting("train.steps", 6000), run.finished
    ('ua-mt', (2, 7), 6000, False)
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)  # column -> float array
    validation: list[dict[str, str]] = field(default_factory=list)
    gate: list[dict[str, str]] = field(default_factory=list)
    samples: list[Path] = field(default_factory=list)
    scores: Scores | None = None  # as predicted
    component_scores: Scores | None = None  # largest component of each class
    predictions: Path | None = None
    evaluation: str = ""
    missing: list[str] = field(default_factory=list)

    def setting(self, dotted: str, default: Any = None) -> Any:
        """Return a value of the configuration by its dotted name."""
        value: Any = self.config
        for part in dotted.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def method(self) -> str:
        """The method's full name, that of run.json before that of the configuration."""
        return str(self.meta.get("method") or self.setting("method.name", "unknown"))

    @property
    def draw(self) -> tuple[int, int]:
        """(draw, seed): runs of different methods with the same pair are compared with each other."""
        return int(self.setting("data.draw", 0) or 0), int(self.setting("train.seed", 0) or 0)

    @property
    def split(self) -> dict[str, list[str]]:
        """Case ids by role."""
        found = self.meta.get("split", {})
        return {role: list(ids) for role, ids in found.items() if isinstance(ids, list)}

    @property
    def last_step(self) -> int:
        """How many steps are in the log."""
        steps = self.log.get("step")
        return int(steps[-1]) if steps is not None and len(steps) else 0

    @property
    def finished(self) -> bool:
        """Whether run.json says that the training came to its end; a run without run.json has not."""
        return bool(self.meta.get("finished", False))


# ---- reading ----------------------------------------------------------------------------------------


def find_runs(paths: Sequence[str | Path], evaluation: str | None = None) -> list[RunRecord]:
    """Return the runs in `paths`: run folders, or folders that hold some up to two levels down.

    The first stage of a run is no run of its own, unless its folder is named.

    `evaluation` names the folder under `test/` to show (None: the one that most runs have). Raises
    ResultError for a path without any.

    >>> import tempfile
    >>> from semisam.engine.results import find_runs
    >>> find_runs([tempfile.mkdtemp()])
    Traceback (most recent call last):
    semisam.engine.results.ResultError: ...: holds no run: no run.json or config.yaml in it or ...
    """
    folders: list[Path] = []
    for path in map(Path, paths):
        found = [path] if _is_run(path) else []
        for pattern in () if found else ("*", "*/*"):
            found += [p for p in sorted(path.glob(pattern)) if _is_run(p) and not _is_run(p.parent)]
        if not found:
            raise ResultError(
                f"{path}: holds no run: no run.json or config.yaml in it or in its folders; "
                "give the folder that `semisam train` wrote"
            )
        folders += [p for p in found if p not in folders]
    if evaluation is None:
        names = [name for folder in folders for name in _evaluations(folder)]
        evaluation = max(dict.fromkeys(names), key=names.count, default=None)
    return [read_run(folder, evaluation) for folder in folders]


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("run.json", "config.yaml"))


def _evaluations(run: Path) -> list[str]:
    """Names of the evaluations under `test/`."""
    found = [p.parent.name for p in sorted((run / "test").glob("*/metrics.csv"))]
    return [name for name in found if not name.endswith(COMPONENT)]


def read_run(path: str | Path, evaluation: str | None = None) -> RunRecord:
    """Return what a run folder says; files that are absent or damaged are named in `missing`.

    >>> import tempfile
    >>> from semisam.engine.results import read_run
    >>> read_run(tempfile.mkdtemp()).missing[0]
    'config.yaml: settings are not known'
    """
    run = RunRecord(Path(path))
    run.config = _part(run, "config.yaml", "settings are not known", _read_yaml) or {}
    run.meta = _part(run, "run.json", "split, versions and command are not known", _read_json) or {}
    run.log = _part(run, "log.csv", "no learning curves", _read_columns) or {}
    run.validation = _part(run, "validation.csv", "the run was not validated", _read_rows) or []
    run.gate = _read_rows(run.path / "gate.csv") if (run.path / "gate.csv").is_file() else []
    run.samples = sorted((run.path / "samples").glob("step_*.npz"))
    names = _evaluations(run.path)
    if evaluation not in names:
        if evaluation is not None and names:
            run.missing.append(f"test/{evaluation}: not evaluated; shown is {names[0]}")
        evaluation = names[0] if names else None
    if evaluation is None:
        run.missing.append("test: the run was not evaluated on test cases")
        return run
    run.evaluation = evaluation
    folder = run.path / "test" / evaluation
    run.scores = _part(run, f"test/{evaluation}/metrics.csv", "no test figures", _read_scores)
    other = run.path / "test" / (evaluation + COMPONENT)
    if (other / "metrics.csv").is_file():
        run.component_scores = _part(run, f"test/{other.name}/metrics.csv", "damaged", _read_scores)
    run.predictions = folder / "predictions" if (folder / "predictions").is_dir() else None
    return run


def _part(run: RunRecord, name: str, consequence: str, read: Any) -> Any:
    """One file of a run, or None and a line in `missing`."""
    path = run.path / name
    if not path.is_file():
        run.missing.append(f"{name}: {consequence}")
        return None
    try:
        return read(path)
    except (OSError, ValueError, KeyError, csv.Error) as error:
        run.missing.append(f"{name}: cannot be read ({error}): {consequence}")
        return None


def _read_yaml(path: Path) -> Any:
    import yaml  # noqa: PLC0415

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a mapping, got {type(found).__name__}")
    return found


def _read_json(path: Path) -> Any:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {type(found).__name__}")
    return found


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {k: v or "" for k, v in row.items() if k is not None and isinstance(v, str | None)}
            for row in csv.DictReader(file)
        ]


def number(text: str | None) -> float:
    """Return the number in a CSV field, NaN for anything else."""
    try:
        return float(text) if text else float("nan")
    except ValueError:
        return float("nan")


def _read_columns(path: Path) -> dict[str, Any]:
    rows = [row for row in _read_rows(path) if np.isfinite(number(row.get("step")))]
    names = list(rows[0]) if rows else []
    return {name: np.array([number(row.get(name)) for row in rows]) for name in names}


def _read_scores(path: Path) -> Scores:
    values: dict[str, dict[str, dict[str, float]]] = {}
    for row in _read_rows(path):
        one = {metric: number(row.get(metric)) for metric in METRICS}
        values.setdefault(row["case"], {})[row["class"]] = one
    summary = path.with_name("summary.json")
    unit = str(_read_json(summary).get("unit", "voxels")) if summary.is_file() else "voxels"
    if not values:
        raise ValueError("no rows")
    return Scores(values, unit)


# ---- comparison -------------------------------------------------------------------------------------


def method_title(name: str) -> str:
    """Return how a method is called in tables.

    >>> from semisam.engine.results import method_title
    >>> method_title("semisam-mean-teacher"), method_title("mine")
    ('SemiSAM-MT', 'mine')
    """
    return TITLES.get(name, name)


@dataclass
class Method:
    """The runs of one method with equal settings but for draw and seed.

    >>> from pathlib import Path
    >>> from semisam.engine.results import Method, RunRecord, Scores
    >>> runs = [RunRecord(Path(str(d)), {"data": {"draw": k}}, scores=Scores({"a": {"heart": {"dice": d}}}))
    ...         for k, d in enumerate((0.7, 0.8))]
    >>> str(Method("ua-mt", "UA-MT", runs).statistic("dice"))
    '0.750 ± 0.071'
    """

    name: str
    title: str
    runs: list[RunRecord]

    @property
    def ours(self) -> bool:
        """Whether a generalist teaches in it."""
        return self.name.startswith("semisam")

    @property
    def tested(self) -> list[RunRecord]:
        """Its runs with test figures."""
        return [run for run in self.runs if run.scores]

    def statistic(self, metric: str, name: str | None = None, component: bool = False) -> Statistic:
        """Return mean ± sd over runs of a metric's mean over cases (and classes, if `name` is None)."""
        return Statistic.of(s.mean(metric, name) for s in self.scores(component).values())

    def scores(self, component: bool = False) -> dict[tuple[int, int], Scores]:
        """Return the test figures by (draw, seed)."""
        found = {run.draw: run.component_scores if component else run.scores for run in self.runs}
        return {draw: scores for draw, scores in found.items() if scores}


@dataclass
class Gain:
    """A method's Dice less a baseline's, under the same draw and seed, on the same cases.

    With one draw in common the differences are those of the cases, and `over` says so.

    >>> from semisam.engine.results import Gain, Method
    >>> ours, theirs = Method("semisam-ua-mt", "SemiSAM-UA-MT", []), Method("ua-mt", "UA-MT", [])
    >>> gain = Gain(ours, theirs, (False, False), {"draw 1": 0.03, "draw 2": -0.01}, "draws")
    >>> gain.statistic.text(3, signed=True), gain.wins
    ('+0.010 ± 0.028', 1)
    """

    method: Method
    baseline: Method
    component: tuple[bool, bool]  # largest component of (method, baseline)
    differences: dict[str, float]
    over: str  # "draws" | "cases"

    @property
    def statistic(self) -> Statistic:
        """Mean ± sd of the differences."""
        return Statistic.of(self.differences.values())

    @property
    def wins(self) -> int:
        """In how many the method is better."""
        return sum(d > 0 for d in self.differences.values())


@dataclass
class Comparison:
    """Methods in the order of a table, baselines first, and every method's gains over its baselines.

    >>> from semisam.engine.results import Comparison, Gain, Method
    >>> ours, theirs = Method("semisam-ua-mt", "SemiSAM-UA-MT", []), Method("ua-mt", "UA-MT", [])
    >>> gain = Gain(ours, theirs, (False, False), {"draw 1": 0.03, "draw 2": 0.01}, "draws")
    >>> Comparison([theirs, ours], [gain]).gain(ours, theirs, (False, False)).wins
    2
    """

    methods: list[Method]
    gains: list[Gain]

    def gain(self, method: Method, baseline: Method, component: tuple[bool, bool]) -> Gain | None:
        """Return one of the gains."""
        for one in self.gains:
            if (one.method, one.baseline, one.component) == (method, baseline, component):
                return one
        return None


def compare(runs: Sequence[RunRecord]) -> Comparison:
    """Return methods and paired gains of any number of runs.

    Runs of one method name are one method if they differ in draw, seed, split and the run that labeled for
    them alone; otherwise what differs is part of the title.

    >>> from pathlib import Path
    >>> from semisam.engine.results import RunRecord, Scores, compare
    >>> def run(name, dice):
    ...     scores = Scores({"a": {"heart": {"dice": dice}}, "b": {"heart": {"dice": dice + 0.1}}})
    ...     return RunRecord(Path(name), {"method": {"name": name}}, scores=scores)
    >>> found = compare([run("semisam-mean-teacher", 0.75), run("mean-teacher", 0.7)])
    >>> [m.title for m in found.methods], found.gains[0].statistic.text(2, signed=True), found.gains[0].over
    (['Mean teacher', 'SemiSAM-MT'], '+0.05 ± 0.00', 'cases')
    """
    methods = _methods(runs)
    gains = []
    for method in (m for m in methods if m.ours):
        for baseline in (m for m in methods if not m.ours):
            for component in ((False, False), (False, True), (True, True)):
                gain = _gain(method, baseline, component)
                if gain:
                    gains.append(gain)
    return Comparison(methods, gains)


def _methods(runs: Sequence[RunRecord]) -> list[Method]:
    order = list(TITLES)
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        same = [other for other in runs if other.method == run.method]
        groups.setdefault((run.method, _what_differs(run, same)), []).append(run)
    methods = []
    for (name, differs), group in groups.items():
        title = method_title(name) + (f" ({differs})" if differs else "")
        group.sort(key=lambda run: run.draw)
        seen: dict[tuple[int, int], int] = {}
        for run in group:
            seen[run.draw] = seen.get(run.draw, 0) + 1
        if max(seen.values()) > 1:  # the same thing several times: each run stands for itself
            methods += [Method(name, f"{title} [{run.path.name}]", [run]) for run in group]
        else:
            methods.append(Method(name, title, group))
    rank = {name: i for i, name in enumerate(order)}
    methods.sort(key=lambda m: (m.ours, rank.get(m.name, len(rank)), m.title))
    return methods


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _what_differs(run: RunRecord, same: Sequence[RunRecord]) -> str:
    own = flat(run.config)
    others = [flat(other.config) for other in same]
    keys = [
        key
        for key in sorted({k for other in others for k in other})
        if key not in SAME_METHOD and any(_kind(key, other) != _kind(key, own) for other in others)
    ]
    return ", ".join(f"{key}={_kind(key, own)}" for key in keys)


def _kind(key: str, settings: dict[str, Any]) -> Any:
    """A setting as far as it makes a method: every draw has its own run to learn from."""
    value = settings.get(key)
    return "another run" if key == "term.offline_from" and value else value


def _gain(method: Method, baseline: Method, component: tuple[bool, bool]) -> Gain | None:
    ours, theirs = method.scores(component[0]), baseline.scores(component[1])
    shared = [draw for draw in ours if draw in theirs]
    pairs = {}
    for draw in shared:
        cases = [case for case in ours[draw].values if case in theirs[draw].values]
        a, b = ours[draw].case_means("dice"), theirs[draw].case_means("dice")
        pairs[draw] = {case: a[case] - b[case] for case in cases}
    pairs = {draw: cases for draw, cases in pairs.items() if cases}
    if not pairs:
        return None
    if len(pairs) == 1:
        return Gain(method, baseline, component, next(iter(pairs.values())), "cases")
    differences = {draw_text(draw): float(np.mean(list(cases.values()))) for draw, cases in pairs.items()}
    return Gain(method, baseline, component, differences, "draws")


def draw_text(draw: tuple[int, int]) -> str:
    """Return how a (draw, seed) is called: the first cases of the list are draw 0."""
    return f"draw {draw[0]}, seed {draw[1]}"
