# SPDX-License-Identifier: Apache-2.0
"""The demonstration: three methods x several draws of the labeled set, trained, tested, compared, reported.

Every run sees the same scans, seeds and steps; what differs is the method, and per draw which scans are
labeled. Runs go to worker processes of one thread each, so that results do not depend on how many there are.
Each run is a folder like any other: what is finished stays, and `resume` goes on from there.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from semisam.engine import config as settings
from semisam.engine import report, results
from semisam.engine.config import Config
from semisam.engine.progress import progress, say

__all__ = ["METHODS", "DemoError", "Task", "configure_for", "demo", "table", "tasks_of"]

METHODS = ("supervised", "mean-teacher", "semisam-mean-teacher")
COST = {"supervised": 0.5, "mean-teacher": 1.2, "semisam-mean-teacher": 1.5}
"""Time of a step in forward and backward passes of a whole batch, roughly."""

PHANTOMS: Any = {"labeled": 16, "unlabeled": 0, "test": 12, "shape": (32, 32, 32)}
DEFAULTS: dict[str, Any] = {
    "data.labeled": 2,
    "train.steps": 240,
    "train.lr": 0.05,
    "train.precision": "32",
    "train.checkpoint_every": 50,
    "train.log_every": 5,
    "term.gate_steps": 120,  # shorter ones know too little of these volumes to say who should teach
    "term.options": {"lam_sam": 5.0},
}


class DemoError(RuntimeError):
    """A demonstration that cannot start, or a run of it that failed; the text says what to do."""


@dataclass(frozen=True)
class Task:
    """One run: its settings, and the folder it goes to.

    >>> from pathlib import Path
    >>> from semisam.engine.config import Config
    >>> from semisam.engine.demo import Task
    >>> task = Task(Config(), Path("semisam-demo/runs/first"))
    >>> task.title, task.done, task.steps_done()
    ('SemiSAM-MT, draw 0', False, 0)
    """

    config: Config
    folder: Path
    command: tuple[str, ...] = ("semisam", "demo")

    @property
    def title(self) -> str:
        """How the run is called in messages."""
        return f"{results.method_title(self.config.method.name)}, draw {self.config.data.draw}"

    @property
    def done(self) -> bool:
        """Whether the run was trained and tested."""
        return any((self.folder / "test").glob(f"*{results.COMPONENT}/summary.json"))

    def steps_done(self) -> int:
        """Return how many steps its log has."""
        try:
            with (self.folder / "log.csv").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
                return int(file.read().decode().strip().splitlines()[-1].split(",")[0])
        except (OSError, ValueError, IndexError):
            return 0


# ---- what is to be done -----------------------------------------------------------------------------


def configure_for(
    data: str | Path | None, out: str | Path, pairs: Sequence[tuple[str, Any]] = ()
) -> tuple[Config, Any]:
    """Return the settings of all runs but for method and draw, and the cases.

    Without `data` phantoms are written to OUT/data, if they are not there. Patch and network follow the
    scans' sizes, and a test set of a quarter of the labeled scans is set aside where the folder names
    none. `pairs` of dotted keys and values come last. Raises CaseError and ConfigError.

    >>> import tempfile
    >>> from semisam.engine.demo import configure_for
    >>> config, found = configure_for(None, tempfile.mkdtemp(), [("train.steps", 10)])
    >>> config.train.patch_size, config.train.steps, len(found.test)
    ([24, 24, 24], 10, 12)
    """
    from semisam.engine import cases, phantom  # noqa: PLC0415

    chosen = dict(DEFAULTS)
    root = Path(out) / "data" if data is None else Path(data)
    if data is None and not (root / "dataset.json").is_file():
        phantom.write_phantoms(root, seed=0, **PHANTOMS)
    found = cases.find_cases(root)
    chosen["data.root"] = str(root.resolve())
    labeled = sum(case.labeled for case in found.cases)
    if not found.test:
        chosen["data.test"] = max(1, labeled // 4)
    chosen |= _network(found)
    if data is None:
        chosen["train.patch_size"] = [24, 24, 24]
    config = settings.load(settings=[*chosen.items(), *pairs])
    settings.check(config)
    return config, found


def _network(found: Any) -> dict[str, Any]:
    """A small network and a patch for the scans of a folder."""
    from semisam.engine import cases  # noqa: PLC0415

    shapes = [cases.read_header(case).shape for case in found.cases[:20]]
    if found.spatial_dims == 2:
        side = [min(128, int(n) // 16 * 16) for n in np.median([s[-2:] for s in shapes], axis=0)]
        return {
            "train.patch_size": [max(n, 32) for n in side],
            "specialist.name": "unet2d",
            "specialist.options": {"channels": [8, 16, 32, 64]},
        }
    side = [min(48, int(n) // 8 * 8) for n in np.median(shapes, axis=0)]
    return {
        "train.patch_size": [max(n, 16) for n in side],
        "specialist.name": "unet3d",
        "specialist.options": {"channels": [8, 16, 32]},
    }


def tasks_of(
    config: Config, out: str | Path, draws: int | Sequence[int], methods: Sequence[str] = METHODS, **more: Any
) -> list[Task]:
    """Return the runs, the dearest method first: methods x draws; a number of draws means 1, 2, ...

    >>> from semisam.engine.config import Config
    >>> from semisam.engine.demo import tasks_of
    >>> [task.folder.name for task in tasks_of(Config(), "demo", 1)]
    ['semisam-mean-teacher-draw1', 'mean-teacher-draw1', 'supervised-draw1']
    """
    ordered = sorted(methods, key=lambda m: -COST.get(m, 1.0))
    return [
        Task(
            settings.from_dict(
                settings.dump(config)
                | {
                    "data": settings.dump(config)["data"] | {"draw": draw},
                    "method": settings.dump(config)["method"] | {"name": method},
                }
            ),
            Path(out) / "runs" / f"{method}-draw{draw}",
            **more,
        )
        for method in ordered
        for draw in (range(1, draws + 1) if isinstance(draws, int) else draws)
    ]


# ---- doing it ---------------------------------------------------------------------------------------


def demo(
    out: str | Path,
    data: str | Path | None = None,
    *,
    draws: int = 3,
    pairs: Sequence[tuple[str, Any]] = (),
    minutes: float | None = None,
    jobs: int | None = None,
    resume: bool = False,
    command: Sequence[str] = ("semisam", "demo"),
) -> results.Comparison:
    """Train and test all runs, write OUT/report.html, and return the comparison.

    `minutes` chooses the number of steps so that all runs take about so long here (None: `pairs`, else
    the default); `jobs` is the number of worker processes (None: one per core, at most one per run; 1: no
    process of its own). A KeyboardInterrupt leaves what was done; `resume` goes on from there.

    Raises DemoError, and what reading data and settings raises.

    >>> import tempfile, pathlib
    >>> from semisam.engine.demo import demo
    >>> place = pathlib.Path(tempfile.mkdtemp())
    >>> (place / "runs/of-yesterday").mkdir(parents=True)
    >>> demo(place)
    Traceback (most recent call last):
    semisam.engine.demo.DemoError: ...: holds runs already: go on with them by --resume, or ...
    """
    place = Path(out)
    runs = place / "runs"
    if runs.exists() and any(runs.iterdir()) and not resume:
        raise DemoError(
            f"{runs}: holds runs already: go on with them by --resume, or give another folder by --out"
        )
    config, _ = configure_for(data, out, pairs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = draws * len(METHODS)
    jobs = min(jobs or cores, count)
    known = next(iter(sorted(runs.glob("*/config.yaml"))), None) if resume else None
    if known is not None:  # the number of steps may have been measured
        saved = settings.load(known)
        config = settings.load(settings=_leaves(config, ("train.steps", saved.train.steps)))
    elif minutes is not None:
        steps = steps_for(config, minutes, draws, jobs)
        config = settings.load(settings=_leaves(config, ("train.steps", steps)))
    tasks = tasks_of(config, place, draws, command=tuple(command))
    left = [task for task in tasks if not task.done]
    say(
        f"{count} runs of {config.train.steps} steps in {place}/runs: {draws} draws x "
        f"{', '.join(map(results.method_title, METHODS))}; {jobs} at a time"
        + (f"; {count - len(left)} are done" if len(left) < count else "")
    )
    (place / "logs").mkdir(parents=True, exist_ok=True)
    watched = _watch(tasks, left, jobs, place / "logs")
    for _ in progress(watched, count * config.train.steps, "training", show=jobs > 1):
        pass
    report.report([runs], place / "report.html", title=_title(data, config))
    return results.compare(results.find_runs([runs]))


def _leaves(config: Config, *pairs: tuple[str, Any]) -> list[tuple[str, Any]]:
    """A configuration as pairs, with others behind them."""
    return [*((k, v) for k, v in settings.dump(config).items()), *pairs]


def _title(data: str | Path | None, config: Config) -> str:
    what = "generated volumes" if data is None else Path(data).resolve().name
    labeled = config.data.labeled
    return f"SemiSAM on {what}, {labeled} labeled" if isinstance(labeled, int) else f"SemiSAM on {what}"


def run(task: Task) -> None:
    """Train what is left of one run, predict and measure its test cases."""
    from semisam.engine import evaluation, inference, trainer  # noqa: PLC0415

    if not (task.folder / "last.ckpt").exists() or not _finished(task.folder):
        begun = (task.folder / "config.yaml").exists()
        trainer.train(task.config, task.folder, resume=begun, command=task.command)
    loaded = inference.load_run(task.folder, device=task.config.train.device)
    outcome, _ = inference.predict_split(loaded, "test", settings=inference.Settings(uncertainty=True))
    if outcome.failed:
        raise DemoError(outcome.report())
    evaluation.evaluate_run(loaded, "test")


def _finished(folder: Path) -> bool:
    return results.read_run(folder).finished


def _watch(tasks: Sequence[Task], left: Sequence[Task], jobs: int, logs: Path) -> Iterator[int]:
    """Yield once per step of all runs, as they are done by `jobs` workers."""
    seen = 0

    def news() -> Iterator[int]:
        nonlocal seen
        done = sum(t.config.train.steps if t.done else t.steps_done() for t in tasks)
        for _ in range(max(done - seen, 0)):
            seen += 1
            yield seen

    if jobs == 1:
        with _one_thread():
            for task in left:
                run(task)
                _tell(task)
        return
    with _Workers(left, jobs, logs) as workers:
        while workers.busy():
            for task in workers.finished():
                _tell(task)
            yield from news()


def _tell(task: Task) -> None:
    record = results.read_run(task.folder)
    if record.scores and record.component_scores:
        raw, kept = record.scores.mean("dice"), record.component_scores.mean("dice")
        seconds = results.number(str(record.meta.get("seconds")))
        say(f"{task.title}: Dice {raw:.3f}, largest component {kept:.3f} ({seconds:.0f} s of training)")


class _Workers:
    """Processes of one thread each that take tasks until there are none; stopped together."""

    def __init__(self, tasks: Sequence[Task], jobs: int, logs: Path) -> None:
        context = multiprocessing.get_context("spawn")  # threads and forks do not go together
        self.tasks: Any = context.Queue()
        self.answers: Any = context.Queue()
        self.open = {task.folder.name: task for task in tasks}
        for task in tasks:
            self.tasks.put(task)
        for _ in range(jobs):
            self.tasks.put(None)
        arguments = (self.tasks, self.answers, str(logs), os.getpid())
        self.processes = [context.Process(target=_work, args=arguments) for _ in range(jobs)]

    def __enter__(self) -> _Workers:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *error: Any) -> None:
        """Ask all to stop: a training saves its checkpoint and leaves."""
        while self.open and not self.tasks.empty():  # nobody begins another one
            try:
                self.tasks.get(timeout=0.1)
            except queue.Empty:
                break
        for process in self.processes:
            if process.is_alive() and self.open:
                process.terminate()
        for process in self.processes:
            process.join(60)
            if process.is_alive():
                process.kill()

    def busy(self) -> bool:
        """Return whether there are runs left; DemoError if nobody is there to do them."""
        if self.open and not any(process.is_alive() for process in self.processes) and self.answers.empty():
            codes = ", ".join(str(process.exitcode) for process in self.processes)
            raise DemoError(
                f"the workers died (exit codes {codes}) before {', '.join(self.open)}: probably memory ran "
                "out. Go on by --resume --jobs 1"
            )
        return bool(self.open)

    def finished(self) -> list[Task]:
        """Return the runs that came to their end within a second; DemoError for one that failed."""
        try:
            name, why = self.answers.get(timeout=1.0)
        except queue.Empty:
            return []
        if why is not None:
            raise DemoError(f"{name}: {why}")
        return [self.open.pop(name)]


def _work(tasks: Any, answers: Any, logs: str, parent: int) -> None:
    """What a worker process does."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C reaches the parent alone, which says once what is to be done
    signal.signal(signal.SIGTERM, _leave)
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    while (task := tasks.get()) is not None and os.getppid() == parent:
        name = task.folder.name
        with open(Path(logs) / f"{name}.txt", "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            why = _why_not(partial(run, task))
        answers.put((name, why))
        if why is not None:
            return


def _leave(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _why_not(work: Callable[[], None]) -> str | None:
    """None, or in one line why the work came to no end; the log has the rest."""
    try:
        work()
    except (KeyboardInterrupt, SystemExit):
        raise SystemExit(0) from None
    except Exception as error:  # told by the parent
        import traceback  # noqa: PLC0415

        traceback.print_exc(file=sys.stderr)
        return " ".join(str(error).split()) or type(error).__name__
    return None


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch, as workers have: the same results for every number of workers."""
    import torch  # noqa: PLC0415

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def steps_for(config: Config, minutes: float, draws: int, jobs: int) -> int:
    """Return how many steps make all runs take about `minutes` together, from three passes done here."""
    import torch  # noqa: PLC0415

    from semisam import specialists  # noqa: PLC0415

    with _one_thread():
        channels = 1
        network = specialists.build(
            config.specialist.name, in_channels=channels, num_classes=2, **config.specialist.options
        )
        batch = torch.zeros(config.train.batch_size, channels, *config.train.patch_size)
        network(batch).sum().backward()
        began = time.perf_counter()
        for _ in range(3):
            network(batch).sum().backward()
        each = (time.perf_counter() - began) / 3
    per_step = each * draws * sum(COST.values()) / jobs
    steps = 0.7 * 60 * minutes / per_step  # the rest: start, gate, test
    return int(np.clip(10 * math.floor(steps / 10), 20, 20_000))


def table(found: results.Comparison) -> str:
    """Return the comparison as lines of text: Dice as predicted and of largest components, mean ± sd.

    >>> from semisam.engine.demo import table
    >>> from semisam.engine.results import compare
    >>> table(compare([])).splitlines()[0].split()
    ['method', 'Dice', 'largest', 'component', 'HD95', 'draws']
    """
    lines = [("method", "Dice", "largest component", "HD95", "draws")]
    for method in found.methods:
        dice = method.statistic("dice")
        row = (str(dice), str(method.statistic("dice", component=True)), method.statistic("hd95").text(2))
        lines.append((method.title, *row, str(dice.n)))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    text = ["  ".join(word.ljust(w) for word, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    if found.methods:
        headline, sentences, _ = report.verdict(found)
        text += ["", headline, *sentences]
    return "\n".join(text)
