# SPDX-License-Identifier: Apache-2.0
"""`report.html`: one file that opens offline and says what a run, or a comparison of runs, has shown.

    run folders -> results.find_runs -> results.compare -> sections (dicts of text, numbers, SVG) -> template

All judgement is in `verdict`: it is computed from the paired differences alone and calls a loss a loss.
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semisam.engine import gallery, pictures
from semisam.engine.files import write_text
from semisam.engine.pictures import METHOD_COLOURS, Series
from semisam.engine.results import (
    BETTER_HIGH,
    METRICS,
    Comparison,
    Gain,
    Method,
    RunRecord,
    Scores,
    Statistic,
    compare,
    draw_text,
    find_runs,
    flat,
    number,
)

__all__ = ["render", "report", "verdict"]

LOSSES = {
    "loss": "loss, all terms",
    "ce": "cross-entropy, labeled",
    "dice": "Dice loss, labeled",
    "consistency": "consistency with the teacher",
    "adversarial": "deceiving the discriminator, unlabeled",
    "semisam": "generalist's term",
    "discriminator": "the discriminator's own loss",
}
TERM_COLUMNS = {
    "term_weight": "weight of the generalist's term",
    "term_mean_u": "mean uncertainty of the pseudo-label",
    "term_agreement": "agreement of pseudo-label and specialist (Dice)",
    "term_clicks": "clicks per step",
    "term_skipped": "samples without a pseudo-label",
    "term_failed_rows": "answers that said nothing",
    "term_ms_generalist": "milliseconds of the generalists",
    "term_ms_rest": "milliseconds of the rest of the term",
    "term_s": "seconds of the term, the pass for its prompts too",
    "term_mb": "memory that the term adds, in MiB",
    "term_cache_hits": "images that were known to the generalists",
    "term_cache_misses": "images that were new to the generalists",
}
NOT_LOSSES = {"step", "lr", "seconds", "epoch", *TERM_COLUMNS}


def report(runs: Sequence[str | Path], out: str | Path, *, title: str | None = None) -> Path:
    """Write the report of one run, or of several methods and draws, and return its path.

    `runs` are run folders or folders of them; `out` is the HTML file, or a folder for `report.html`.
    Raises ResultError if a path holds no run. What a run lacks is said in the report.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from semisam.engine.report import report
    >>> run = Path(tempfile.mkdtemp())
    >>> _ = (run / "run.json").write_text("{}")
    >>> report([run], run).name
    'report.html'
    """
    path = Path(out)
    if path.is_dir() or path.suffix not in (".html", ".htm"):
        path = path / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(find_runs(runs), title=title))
    return path


def render(runs: Sequence[RunRecord], *, title: str | None = None) -> str:
    """Return the report as HTML.

    >>> from pathlib import Path
    >>> from semisam.engine.report import render
    >>> from semisam.engine.results import RunRecord
    >>> "not tested" in render([RunRecord(Path("run"))])
    True
    """
    import jinja2  # noqa: PLC0415

    found = compare(runs)
    colours = _colours(found)
    focus = _focus(found)
    baseline = _baseline_of(found, focus)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    headline, sentences, tone = verdict(found)
    return environment.get_template("report.html.j2").render(
        title=title or _title(found),
        headline=headline,
        sentences=sentences,
        tone=tone,
        facts=_facts(found, focus),
        legend=[(m.title, colours[m.title]) for m in found.methods],
        results=_results(found, colours),
        curves=_curves(found, colours),
        cases=gallery.test_cases(focus, baseline),
        samples=gallery.samples(focus),
        gate=_gate(found),
        data=_data(runs, focus),
        settings=_settings(runs),
        missing=_missing(found),
        heat=pictures.heat_css(),
        made=datetime.date.today().isoformat(),
        version=_version(),
    )


def _version() -> str:
    import semisam  # noqa: PLC0415

    return semisam.__version__


# ---- verdict ----------------------------------------------------------------------------------------


def verdict(found: Comparison) -> tuple[str, list[str], str]:
    """Return headline, sentences and tone ("good", "mixed", "bad", "plain") from the numbers alone.

    A method is better than a baseline if its Dice is higher on average and in every draw, it has lost if
    it is lower on average; anything else is no clear difference. The strongest baseline that shares the
    method's base, and the largest component of its masks, are what counts.

    >>> from semisam.engine.results import compare
    >>> from semisam.engine.report import verdict
    >>> verdict(compare([]))[0]
    'Nothing to compare: no run was tested.'
    """
    tested = [m for m in found.methods if m.tested]
    if not tested:
        return "Nothing to compare: no run was tested.", ["`semisam evaluate` adds test figures."], "plain"
    ours = [m for m in tested if m.ours]
    if not ours or len(tested) == 1:
        best = max(tested, key=lambda m: m.statistic("dice").mean)
        lead = f"{best.title} reaches a mean test Dice of {_with_spread(best)}."
        if len(tested) == 1:
            return lead, ["No other method was run on these cases, so nothing is compared."], "plain"
        rest = [f"{m.title}: {_with_spread(m)}." for m in tested if m is not best]
        return lead, rest, "plain"
    method = max(ours, key=lambda m: m.statistic("dice").mean)
    gains = [
        gain
        for baseline in sorted((m for m in tested if not m.ours), key=lambda m: not _is_base(method, m))
        for component in ((False, False), (True, True), (False, True))
        for gain in [found.gain(method, baseline, component)]
        if gain and (component == (False, False) or _is_base(method, baseline))
    ]
    lead = f"{method.title} reaches a mean test Dice of {_with_spread(method)}."
    if not gains:
        return lead, ["No baseline shares a draw, a seed and test cases with it."], "plain"
    outcomes = [(gain, _outcome(gain)) for gain in gains]
    # Against a post-processed baseline a method that is not post-processed may be behind without having lost.
    lost = [gain for gain, outcome in outcomes if outcome == "lost" and gain.component != (False, True)]
    unclear = [gain for gain, outcome in outcomes if outcome != "better" and gain not in lost]
    if lost:
        headline, tone = f"{method.title} lost against {_listed(map(_opponent, lost))}.", "bad"
    elif unclear:
        headline = f"{method.title} is not clearly better than {_listed(map(_opponent, unclear))}."
        tone = "mixed"
    else:
        headline, tone = f"{method.title} is better than {_listed(map(_opponent, gains))}.", "good"
    same = "the same draws and seeds" if gains[0].over == "draws" else "the same cases"
    differences = "; ".join(_gain_text(gain) for gain in gains)
    return (
        headline,
        [lead, f"Difference in Dice on {same}: {differences}.", *_cautions(gains[0], method)],
        tone,
    )


def _is_base(method: Method, baseline: Method) -> bool:
    return method.name == f"semisam-{baseline.name}"


def _with_spread(method: Method) -> str:
    over = method.statistic("dice")
    if over.n > 1:
        return f"{over} (mean ± sd of {over.n} draws)"
    scores = next(iter(method.scores().values()))
    cases = Statistic.of(scores.case_means("dice").values())
    return f"{cases} (mean ± sd of {cases.n} cases, one draw of the labeled set)"


def _outcome(gain: Gain) -> str:
    mean = gain.statistic.mean
    if mean < 0:
        return "lost"
    if gain.over == "draws":
        return "better" if gain.wins == len(gain.differences) and mean > 0 else "unclear"
    error = gain.statistic.sd / np.sqrt(max(gain.statistic.n, 1))
    return "better" if mean > 2 * error else "unclear"


def _opponent(gain: Gain) -> str:
    name = _lower(gain.baseline.title)
    return f"the largest component of {name}" if gain.component[1] else name


def _lower(title: str) -> str:
    return title if title.isupper() or "-" in title else title[0].lower() + title[1:]


def _gain_text(gain: Gain) -> str:
    texts = {(True, True): " with the largest component kept in both", (False, True): ""}
    name = _opponent(gain) if gain.component == (False, True) else _lower(gain.baseline.title)
    return (
        f"to {name}{texts.get(gain.component, '')} {gain.statistic.text(3, signed=True)} "
        f"(better in {gain.wins} of {len(gain.differences)})"
    )


def _cautions(gain: Gain, method: Method) -> list[str]:
    found = []
    if gain.over == "cases":
        found.append(
            "One draw only: which scans are labeled decides more than the method does; "
            "run at least three draws before you believe a difference."
        )
    cases = len(next(iter(method.scores().values())).values)
    if cases < 10:
        found.append(f"Only {cases} test case{'s' if cases > 1 else ''}.")
    return found


def _listed(names: Iterable[str]) -> str:
    words = list(dict.fromkeys(names))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


# ---- which run, which colours ------------------------------------------------------------------------


def _colours(found: Comparison) -> dict[str, str]:
    """Colours by title: ours the first one, known baselines their own, others what is left."""
    fixed = {"mean-teacher": METHOD_COLOURS[1], "supervised": METHOD_COLOURS[2], "ua-mt": METHOD_COLOURS[3]}
    left = [METHOD_COLOURS[0], *METHOD_COLOURS[4:], *METHOD_COLOURS[1:4]]
    colours: dict[str, str] = {}
    for method in sorted(found.methods, key=lambda m: not m.ours):
        own = fixed.get(method.name, left[0])
        if own in colours.values():
            own = next((c for c in left if c not in colours.values()), own)
        colours[method.title] = own
    return colours


def _focus(found: Comparison) -> RunRecord:
    """The run that is shown in pictures: the first draw of our best method, else of the best one."""
    ours = [m for m in found.methods if m.ours] or found.methods
    best = max(ours, key=lambda m: np.nan_to_num(m.statistic("dice").mean, nan=-1.0))
    return best.runs[0]


def _baseline_of(found: Comparison, focus: RunRecord) -> RunRecord | None:
    """The tested run of the focus's own base method with the same draw, else of any baseline."""
    same = [
        run
        for m in sorted(found.methods, key=lambda m: f"semisam-{m.name}" != focus.method)
        for run in m.runs
        if not m.ours and run is not focus and run.draw == focus.draw and run.predictions
    ]
    return same[0] if same else None


def _title(found: Comparison) -> str:
    titles = [m.title for m in found.methods]
    return f"{titles[0]}: training report" if len(titles) == 1 else f"{' · '.join(titles)}"


def _facts(found: Comparison, focus: RunRecord) -> list[tuple[str, str]]:
    split = focus.split
    draws = max(len({run.draw for run in m.runs}) for m in found.methods)
    facts = [(str(len(split[role])), f"{role} scans") for role in split if split[role] or role == "unlabeled"]
    facts.append((str(draws), "draw of the labeled set" if draws == 1 else "draws of the labeled set"))
    steps = sorted({_steps(run) for m in found.methods for run in m.runs} - {0})
    if steps:
        ends = dict.fromkeys((steps[0], steps[-1]))
        facts.append(("–".join(f"{n:,}".replace(",", " ") for n in ends), "steps"))
    seconds = [number(str(run.meta.get("seconds"))) for m in found.methods for run in m.runs]
    total = float(np.nansum(seconds)) if seconds else 0.0
    if total > 0:
        facts.append((_duration(total), "training in all" if len(seconds) > 1 else "training"))
    return facts


def _steps(run: RunRecord) -> int:
    """The steps of a run, with those of its first stage."""
    first = run.setting("term.first_stage", 0) if run.method.startswith("semisam-") else 0
    return run.last_step + int(first) if run.last_step else 0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# ---- results ----------------------------------------------------------------------------------------


def _results(found: Comparison, colours: dict[str, str]) -> dict[str, Any] | None:
    tested = [m for m in found.methods if m.tested]
    if not tested:
        return None
    scores = [s for m in tested for s in m.scores().values()]
    classes = scores[0].classes
    draws = max(m.statistic("dice").n for m in tested)
    blocks = [_block(tested, None, component, colours) for component in (False, True)]
    per_class = [
        {"name": name, **block}
        for name in (classes if len(classes) > 1 else [])
        for block in [_block(tested, name, False, colours)]
    ]
    return {
        "blocks": [block for block in blocks if block["rows"]],
        "per_class": per_class,
        "metrics": [_heading(metric, scores[0]) for metric in METRICS],
        "spread": f"mean ± sd of {draws} draws" if draws > 1 else "mean ± sd of the test cases",
        "single": draws == 1,
        "cases": len(scores[0].values),
        "classes": classes,
        "evaluation": next((run.evaluation for m in tested for run in m.tested), ""),
        "gains": [_gain_row(gain) for gain in found.gains],
        "draws": _draws_table(tested, colours),
        "chart": _draws_picture(tested, colours),
        "undefined": any(s.undefined() for s in scores),
    }


def _heading(metric: str, scores: Scores) -> dict[str, str]:
    unit = scores.unit if metric in ("hd95", "asd") else ""
    return {"title": METRICS[metric], "unit": unit, "arrow": "↑" if BETTER_HIGH[metric] else "↓"}


def _block(
    methods: Sequence[Method], name: str | None, component: bool, colours: dict[str, str]
) -> dict[str, Any]:
    methods = [m for m in methods if m.scores(component)]
    table = {m.title: [_cell(m, metric, name, component) for metric in METRICS] for m in methods}
    rows = []
    for method in methods:
        cells = []
        for i, metric in enumerate(METRICS):
            column = [cells_[i].mean for cells_ in table.values() if cells_[i].n]
            best = max(column, default=np.nan) if BETTER_HIGH[metric] else min(column, default=np.nan)
            value = table[method.title][i]
            digits = 3 if BETTER_HIGH[metric] else 2
            cells.append(
                {"text": value.text(digits), "best": len(methods) > 1 and value.n > 0 and value.mean == best}
            )
        found = method.scores(component).values()
        rows.append(
            {
                "method": method.title,
                "colour": colours[method.title],
                "cells": cells,
                "draws": len(found),
                "undefined": sum(s.undefined() for s in found),
            }
        )
    return {"title": "Largest component of each class" if component else "As predicted", "rows": rows}


def _cell(method: Method, metric: str, name: str | None, component: bool) -> Statistic:
    """Over draws where there are several, else over cases."""
    scores = list(method.scores(component).values())
    if len(scores) > 1:
        return method.statistic(metric, name, component)
    if name is None:
        return Statistic.of(scores[0].case_means(metric).values())
    return scores[0].statistic(metric, name)


def _gain_row(gain: Gain) -> dict[str, Any]:
    mean = gain.statistic.mean
    what = {False: "as predicted", True: "largest component"}
    return {
        "method": gain.method.title,
        "own": what[gain.component[0]],
        "baseline": gain.baseline.title,
        "other": what[gain.component[1]],
        "text": gain.statistic.text(3, signed=True),
        "tone": "good" if _outcome(gain) == "better" else "bad" if mean < 0 else "mixed",
        "wins": f"{gain.wins} of {len(gain.differences)} {gain.over}",
    }


def _draws_table(methods: Sequence[Method], colours: dict[str, str]) -> dict[str, Any] | None:
    draws = sorted({draw for m in methods for draw in m.scores()})
    if len(draws) < 2:
        return None
    rows = []
    for draw in draws:
        values = [m.scores()[draw].mean("dice") if draw in m.scores() else np.nan for m in methods]
        labeled = next((r.split.get("labeled", []) for m in methods for r in m.runs if r.draw == draw), [])
        rows.append(
            {
                "draw": draw_text(draw),
                "labeled": ", ".join(labeled[:8])
                + (f" and {len(labeled) - 8} more" if len(labeled) > 8 else ""),
                "values": [f"{v:.3f}" if np.isfinite(v) else "–" for v in values],
            }
        )
    return {"methods": [(m.title, colours[m.title]) for m in methods], "rows": rows}


def _draws_picture(methods: Sequence[Method], colours: dict[str, str]) -> str | None:
    draws = sorted({draw for m in methods for draw in m.scores()})
    if len(methods) < 2:
        return None
    if len(draws) > 1:
        rows = [[m.scores()[d].mean("dice") if d in m.scores() else np.nan for m in methods] for d in draws]
        title, what = "Test Dice of every draw", "draw"
        names = [f"draw {d[0]}" if len({d[1] for d in draws}) == 1 else draw_text(d) for d in draws]
    else:
        cases = sorted({case for m in methods for case in next(iter(m.scores().values())).values})
        means = [next(iter(m.scores().values())).case_means("dice") for m in methods]
        rows = [[mean.get(case, np.nan) for mean in means] for case in cases]
        title, what, names = "Test Dice of every case", "case", []
    text = "; ".join(
        f"{m.title} {Statistic.of(c).mean:.3f}" for m, c in zip(methods, zip(*rows, strict=True), strict=True)
    )
    return pictures.draws_chart(
        title,
        [(m.title, colours[m.title]) for m in methods],
        rows,
        alt=f"{title}: one dot per {what} and method. Means: {text}.",
        names=names,
    )


# ---- curves -----------------------------------------------------------------------------------------


def _curves(found: Comparison, colours: dict[str, str]) -> list[str]:
    logs = [(m, run) for m in found.methods for run in m.runs if run.log]
    columns = list(dict.fromkeys(name for _, run in logs for name in run.log))
    losses = [c for c in columns if c not in NOT_LOSSES]
    charts = []
    for column in losses:
        charts.append(_log_chart(logs, column, LOSSES.get(column, f"loss: {column}"), colours, zero=True))
    charts.insert(min(1, len(charts)), _validation_chart(found, colours))
    for column, title in TERM_COLUMNS.items():
        charts.append(_log_chart(logs, column, title, colours, zero=True))
    charts.append(_log_chart(logs, "lr", "learning rate", colours, zero=True))
    return [chart for chart in charts if chart]


def _log_chart(
    logs: Sequence[tuple[Method, RunRecord]], column: str, title: str, colours: dict[str, str], zero: bool
) -> str | None:
    series: list[Series] = []
    bold: list[Series] = []
    ends = []
    for title_ in dict.fromkeys(m.title for m, _ in logs):
        lines = [
            (run.log["step"], run.log[column])
            for m, run in logs
            if m.title == title_ and column in run.log and np.isfinite(run.log[column]).any()
        ]
        if not lines or all(not np.nan_to_num(y).any() for _, y in lines):
            continue
        for x, y in lines:
            kept = np.isfinite(y)
            series.append(Series(title_, x[kept], y[kept], colours[title_], faint=True))
        x, y = _mean_line(lines)
        bold.append(Series(title_, x, y, colours[title_]))
        ends.append(f"{title_} from {y[0]:.3g} to {y[-1]:.3g}")
    if not series:
        return None
    return pictures.line_chart(
        title, series + bold, alt=f"{title} over the steps: {'; '.join(ends)}.", zero=zero
    )


def _mean_line(lines: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """The mean of several lines where the shortest has steps, as a moving mean over a twentieth of them."""
    x = min((x for x, _ in lines), key=len)
    rows = [np.interp(x, a[np.isfinite(b)], b[np.isfinite(b)]) for a, b in lines]
    mean = np.mean(rows, axis=0)
    width = max(1, len(x) // 20) | 1
    if width == 1:
        return x, mean
    padded = np.pad(mean, width // 2, mode="edge")
    return x, np.convolve(padded, np.ones(width) / width, mode="valid")


def _validation_chart(found: Comparison, colours: dict[str, str]) -> str | None:
    series = []
    bold = []
    ends = []
    for method in found.methods:
        lines = [line for run in method.runs for line in [_validation_line(run)] if line]
        series += [Series(method.title, x, y, colours[method.title], faint=True) for x, y in lines]
        if lines:
            x = min((x for x, _ in lines), key=len)
            y = np.mean([np.interp(x, a, b) for a, b in lines], axis=0)
            bold.append(Series(method.title, x, y, colours[method.title]))
            ends.append(f"{method.title} ends at {y[-1]:.3f}")
    if not series:
        return None
    return pictures.line_chart(
        "validation Dice", series + bold, alt=f"Validation Dice over the steps: {'; '.join(ends)}."
    )


def _validation_line(run: RunRecord) -> tuple[Any, Any] | None:
    """Mean Dice over cases and classes; of the teacher where the run has one that was validated."""
    networks = {row.get("network", "") for row in run.validation}
    network = "teacher" if "teacher" in networks else next(iter(sorted(networks)), "")
    steps: dict[float, list[float]] = {}
    for row in run.validation:
        if row.get("network", "") == network:
            steps.setdefault(number(row.get("step")), []).append(number(row.get("dice")))
    if not steps:
        return None
    x = np.array(sorted(steps))
    return x, np.array([np.nanmean(steps[step]) for step in x])


# ---- the gate ---------------------------------------------------------------------------------------


def _gate(found: Comparison) -> dict[str, Any] | None:
    """What the gate measured and chose, run by run, or None if no run has one."""
    runs = [(m, run) for m in found.methods for run in m.runs if run.gate]
    if not runs:
        return None
    tables = []
    for method, run in runs:
        steps = list(dict.fromkeys(row.get("step", "") for row in run.gate))
        candidates = list(dict.fromkeys(row.get("candidate", "") for row in run.gate))
        kept = (
            steps
            if len(steps) <= 8
            else [steps[i] for i in np.linspace(0, len(steps) - 1, 8).round().astype(int)]
        )
        rows = []
        for step in kept:
            here = [row for row in run.gate if row.get("step") == step]
            cells = []
            for candidate in candidates:
                dice = Statistic.of(
                    number(r.get("dice")) for r in here if r.get("candidate") == candidate
                ).mean
                chosen = any(r.get("candidate") == candidate and r.get("chosen") == "1" for r in here)
                cells.append({"text": f"{dice:.3f}" if np.isfinite(dice) else "–", "best": chosen})
            rows.append({"step": step, "cells": cells})
        tables.append(
            {
                "title": f"{method.title}, {draw_text(run.draw)}",
                "candidates": [c.replace("_", " ") for c in candidates],
                "rows": rows,
                "sentence": _gate_sentence(run, steps),
                "left_out": len(steps) - len(kept),
            }
        )
    return {"tables": tables}


def _gate_sentence(run: RunRecord, steps: Sequence[str]) -> str:
    """Who taught, and whether that changed."""

    def chosen(step: str) -> tuple[str, ...]:
        rows = (r for r in run.gate if r.get("step") == step and r.get("chosen") == "1")
        return tuple(dict.fromkeys(r.get("candidate", "") for r in rows))

    choices = [chosen(step) for step in steps]
    text = _who_taught(choices[-1])
    changes = sum(a != b for a, b in itertools.pairwise(choices))
    if changes:
        times = "once" if changes == 1 else f"{changes} times"
        text += f" That changed {times} during the training; at first: {', '.join(choices[0]) or 'nobody'}."
    return text


def _who_taught(chosen: Sequence[str]) -> str:
    teachers = [name for name in chosen if name != "mask"]
    if not teachers:
        return (
            "Nobody taught: no generalist was better than the specialist's own mask, "
            "and the generalist's term was off."
        )
    if teachers == ["largest_component"]:
        return "The largest component of the specialist's mask taught: no generalist was better than it."
    names = ["the largest component" if name == "largest_component" else name for name in teachers]
    return f"{_listed(names)} taught.".capitalize() if len(names) > 1 else f"The {names[0]} taught."


# ---- data, settings, what is missing ---------------------------------------------------------------


def _data(runs: Sequence[RunRecord], focus: RunRecord) -> dict[str, Any]:
    meta = focus.meta
    spacing = meta.get("spacing")
    rows = [
        ("folder", str(focus.setting("data.root", "–"))),
        ("dimensions", f"{meta['spatial_dims']}-D" if meta.get("spatial_dims") else "–"),
        ("classes", ", ".join(f"{i} {name}" for i, name in enumerate(meta.get("class_names", []))) or "–"),
        ("spacing", _spacing_text(spacing)),
        ("intensities", str(focus.setting("data.normalize", "–"))),
    ]
    roles = [
        {"role": role, "count": len(ids), "ids": ", ".join(ids)} for role, ids in focus.split.items() if ids
    ]
    draws: dict[tuple[int, int], list[str]] = {}
    for run in runs:
        draws.setdefault(run.draw, run.split.get("labeled", []))
    varying = [{"draw": draw_text(d), "ids": ", ".join(ids)} for d, ids in sorted(draws.items())]
    return {
        "rows": rows,
        "roles": roles,
        "draws": varying if len(varying) > 1 else [],
        "of": draw_text(focus.draw),
    }


def _spacing_text(spacing: Any) -> str:
    if not spacing:
        return "not known: distances in voxels"
    if isinstance(spacing, list) and all(isinstance(s, int | float) for s in spacing):
        return " × ".join(f"{s:g}" for s in spacing) + " mm"
    return str(spacing)


def _settings(runs: Sequence[RunRecord]) -> dict[str, Any]:
    configs = [flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    common = [
        (k, _plain(configs[0].get(k))) for k in keys if all(c.get(k) == configs[0].get(k) for c in configs)
    ]
    differing = [k for k in keys if k not in dict(common)]
    table = [
        {"run": run.path.name, "values": [_plain(config.get(k)) for k in differing]}
        for run, config in zip(runs, configs, strict=True)
    ]
    versions = runs[0].meta.get("versions", {})
    return {
        "common": common,
        "differing": differing,
        "table": table if differing else [],
        "versions": [(str(k), _plain(v)) for k, v in versions.items()] if isinstance(versions, dict) else [],
        "device": str(runs[0].meta.get("device", "–")),
        "commands": list(dict.fromkeys(_command(run) for run in runs if run.meta.get("command"))),
        "hashes": _hashes(runs),
    }


def _command(run: RunRecord) -> str:
    command = run.meta["command"]
    return " ".join(map(str, command)) if isinstance(command, list) else str(command)


def _plain(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _hashes(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for run in runs:
        hashes = run.meta.get("sha256", {})
        for name, value in hashes.items() if isinstance(hashes, dict) else ():
            if isinstance(value, str):
                found.setdefault(name, value)
    return sorted(found.items())[:200]


def _missing(found: Comparison) -> list[str]:
    """One line per gap, with the runs that have it."""
    lines: dict[str, list[str]] = {}
    runs = [run for m in found.methods for run in m.runs]
    for run in runs:
        for line in run.missing:
            lines.setdefault(line, []).append(run.path.name)
        if run.log and not run.finished:
            line = f"unfinished: step {run.last_step} of {run.setting('train.steps')}"
            lines.setdefault(line, []).append(run.path.name)
    return [
        line if len(names) == len(runs) else f"{line} ({', '.join(names)})" for line, names in lines.items()
    ]
