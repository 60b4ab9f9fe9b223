# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.gpu [-k WORD] [--quick] [-o FILE]`: CUDA operators on a GPU, the term around them.

Every row is timed by CUDA events, medians over repetitions in which ours and the peers take turns, on
buffers that rotate and together are larger than the L2 cache. "copy" is the share of the bandwidth of a
device copy (bytes read + written), measured in the same run, that the least possible bytes reach; ratios are
a peer's time over ours. Where ours is captured as a CUDA graph, its replays are a column of their own, and a
target in milliseconds is for them. A row that fails is reported and the others go on; what has no package or
no kernel here is "not measured" with the reason.

Without a GPU it says so and exits with 2; `--rehearse` runs every row on the CPU on tiny inputs, to show that
the code is right: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import cases

import semisam
from benchmarks import peers
from benchmarks.run import build, machine, write_json
from semisam import _core, fusion, losses, masks, metrics, ops, prompts
from semisam.specialists import VNet

GIB = 1 << 30


class Missing(Exception):
    """Why a row or a peer is not measured."""


# ---- the device, and time on it -----------------------------------------------------------------


class Bench:
    """Where and how long to measure; `tiny` is the rehearsal on the CPU."""

    def __init__(self, *, tiny: bool = False, quick: bool = False) -> None:
        self.tiny = tiny
        self.quick = quick
        self.device = torch.device("cpu" if tiny else "cuda")
        self.repeat = 2 if tiny else 7 if quick else 15
        self.least = 0.0 if tiny else 0.004  # seconds per repetition
        self.cache = 1 << 16 if tiny else torch.cuda.get_device_properties(self.device).L2_cache_size
        self.copy = 0.0

    def size(self, full: Any, tiny: Any) -> Any:
        """The problem's size, or what stands for it in a rehearsal."""
        return tiny if self.tiny else full

    def wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Time of one `run`, on the device."""
        if self.tiny:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def medians(self, functions: dict[str, Callable[[Any], Any]], buffers: Sequence[Any]) -> dict[str, float]:
        """Median seconds of every function of one buffer; they take turns, and the buffers rotate."""
        loops, samples = {}, {name: [] for name in functions}
        for name, f in functions.items():
            for data in buffers[:2] if len(buffers) > 1 else [*buffers, *buffers]:
                f(data)
            once = self.seconds(lambda f=f: f(buffers[0]))
            loops[name] = max(1, min(200, math.ceil(self.least / max(once, 1e-7))))
        for _ in range(self.repeat):
            for name, f in functions.items():
                turns = [buffers[i % len(buffers)] for i in range(loops[name])]
                took = self.seconds(functools.partial(_all, f, turns))
                samples[name].append(took / loops[name])
        return {name: statistics.median(v) for name, v in samples.items()}

    def bandwidth(self) -> float:
        """Bytes per second, read plus written, of copies far larger than the caches."""
        n = self.size(2 * GIB, 1 << 20)
        a, b = (torch.randint(0, 256, (n,), dtype=torch.uint8, device=self.device) for _ in range(2))
        took = self.medians({"copy": lambda pair: pair[1].copy_(pair[0])}, [(a, b), (b, a)])["copy"]
        return 2 * n / took

    def captured(self, function: Callable[[], Any]) -> Callable[[Any], Any]:
        """The call as a CUDA graph whose replay is what is timed."""
        if self.tiny:
            return lambda _: function()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = function()
        return lambda _: (graph.replay(), kept)[0]


def _all(function: Callable[[Any], Any], turns: Sequence[Any]) -> None:
    for data in turns:
        function(data)


# ---- rows ---------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line: what is measured, against whom, and what was promised.

    `make(bench, rng)` makes the data of one buffer; `ours` and the peers take it. A peer is a function, or
    the reason why it is missing. `moved(data)` are the least bytes of a call. `needs` are the operators
    that must have a kernel. `graph` captures a call and times its replays. `host` are peers on the CPU, on
    the data that `on_host` makes.
    Targets: "copy" (least share of the copy bandwidth), "ms" (most milliseconds of the graph, or of the
    call), a peer's name or "best CPU" (least ratio).
    """

    name: str
    make: Callable[[Bench, np.random.Generator], Any]
    ours: Callable[[Any], Any]
    peers: dict[str, Callable[[Any], Any] | str] = field(default_factory=dict)
    moved: Callable[[Any], int] | None = None
    needs: tuple[str, ...] = ()
    targets: dict[str, float] = field(default_factory=dict)
    graph: bool = False
    host: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    on_host: Callable[[Any], Any] = lambda data: data.cpu().numpy()
    notes: Callable[[Any], dict[str, Any]] = lambda _: {}

    def measure(self, bench: Bench) -> dict[str, Any]:
        """All figures of the row."""
        _has_kernels(self.needs, bench)
        rng = np.random.default_rng(1337)
        buffers = [self.make(bench, rng)]
        size = max(_bytes_of(buffers[0]), 1)
        more = min(math.ceil(3 * bench.cache / size), 64) - 1
        buffers += [_clone(buffers[0]) for _ in range(more)]
        functions: dict[str, Callable[[Any], Any]] = {"ours": self.ours}
        missing: dict[str, str] = {}
        if self.graph:
            try:
                functions["graph"] = bench.captured(lambda: self.ours(buffers[0]))
            except Exception as e:
                missing["graph"] = _first_line(e)
        for name, peer in self.peers.items():
            reason = peer if isinstance(peer, str) else _why_not(peer, buffers[0], bench)
            if reason:
                missing[name] = reason
            else:
                functions[name] = peer
        times = bench.medians(functions, buffers)
        times.update(self._host_times(bench, buffers[0], missing))
        result = {"ms": {n: 1e3 * t for n, t in times.items()}, "buffers": len(buffers), "missing": missing}
        expected = self.ours(buffers[0])
        apart = {n: _apart(f(buffers[0]), expected) for n, f in functions.items() if n != "ours"}
        result["difference"] = {n: d for n, d in apart.items() if d is not None}
        ours = times["ours"]
        result["ratio"] = {n: t / ours for n, t in times.items() if n not in ("ours", "graph")}
        if self.host:
            of_host = [result["ratio"][n] for n in self.host if n in result["ratio"]]
            result["ratio"]["best CPU"] = min(of_host) if of_host else math.nan
        if self.moved:
            result["bytes"] = self.moved(buffers[0])
            result["bytes/s"] = result["bytes"] / ours
            result["copy"] = result["bytes/s"] / bench.copy
        result["notes"] = self.notes(buffers[0])
        result["targets"] = _verdicts(self.targets, result, bench)
        return result

    def _host_times(self, bench: Bench, data: Any, missing: dict[str, str]) -> dict[str, float]:
        """Medians of three calls of the peers on the CPU."""
        times, given = {}, self.on_host(data) if self.host else None
        for name, peer in self.host.items():
            try:
                peer(given)
                samples = []
                for _ in range(1 if bench.quick or bench.tiny else 3):
                    start = time.perf_counter()
                    peer(given)
                    samples.append(time.perf_counter() - start)
                times[name] = statistics.median(samples)
            except ImportError as e:
                missing[name] = f"needs {e.name or e}"
        return times


def _apart(theirs: Any, ours: Any) -> float | None:
    """Largest difference relative to the largest number; None where the results are not alike."""
    a, b = _tensors_of(theirs), _tensors_of(ours)
    if not a or [t.shape for t in a] != [t.shape for t in b]:
        return None
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = x.detach().double(), y.detach().double()  # noqa: PLW2901
        largest = float(y.abs().max()) if y.numel() else 0.0
        worst = max(worst, float((x - y).abs().max()) / (largest or 1.0)) if y.numel() else worst
    return worst


def _tensors_of(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors_of(v)]
    return [value] if isinstance(value, torch.Tensor) else []


def _verdicts(targets: dict[str, float], result: dict[str, Any], bench: Bench) -> dict[str, str]:
    """What became of every target; a rehearsal can only say that there was a figure."""
    found = {f"{what} {limit}": _judge(what, limit, result) for what, limit in targets.items()}
    return {k: "rehearsed" if bench.tiny and v != "not measured" else v for k, v in found.items()}


def _judge(what: str, limit: float, result: dict[str, Any]) -> str:
    if what == "copy":
        value = result.get("copy", math.nan)
    elif what == "ms":
        value = result["ms"].get("graph", result["ms"]["ours"])
    elif what.endswith("<="):
        value = result["ratio"].get(what.removesuffix("<=").strip(), math.nan)
    else:
        value = result["ratio"].get(what, math.nan)
    if math.isnan(value):
        return "not measured"
    return "met" if (value <= limit if what == "ms" or what.endswith("<=") else value >= limit) else "NOT MET"


def _has_kernels(needed: Sequence[str], bench: Bench) -> None:
    there = _core.backends().get("cpu" if bench.tiny else "cuda", ())
    without = [op for op in needed if op not in there]
    if without:
        raise Missing(f"no CUDA kernel for {', '.join(without)} yet")


def _why_not(peer: Callable[[Any], Any], data: Any, bench: Bench) -> str:
    try:
        peer(data)
        bench.wait()
    except Exception as e:  # a peer that cannot run here costs its column, not the row
        return f"needs {e.name}" if isinstance(e, ModuleNotFoundError) and e.name else _first_line(e)
    return ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:300]


def _bytes_of(data: Any) -> int:
    if isinstance(data, torch.Tensor):
        return data.nbytes
    if isinstance(data, dict):
        return sum(map(_bytes_of, data.values()))
    return sum(map(_bytes_of, data)) if isinstance(data, (list, tuple)) else 0


def _clone(data: Any) -> Any:
    if isinstance(data, torch.Tensor):
        return data.detach().clone().requires_grad_(data.requires_grad)
    if isinstance(data, dict):
        return {k: _clone(v) for k, v in data.items()}
    return type(data)(map(_clone, data)) if isinstance(data, (list, tuple)) else data


def _cucim(_: Any) -> Any:
    return importlib.import_module("cucim")


# ---- losses -------------------------------------------------------------------------------------

_LA8, _LA_TINY = (32, 2, 112, 112, 80), (2, 2, 8, 9, 10)  # eight batches of left atrium patches


def _loss_data(dtype: torch.dtype, labels: torch.dtype, classes: int = 2):
    def make(bench: Bench, _: Any) -> Any:
        b, _c, *space = bench.size(_LA8 if classes == 2 else (4, classes, 96, 96, 96), _LA_TINY)
        generator = torch.Generator(bench.device).manual_seed(0)
        options = {"generator": generator, "device": bench.device}
        y = torch.randint(0, classes, (b, *space), dtype=labels, **options)
        z = torch.randn((b, classes, *space), **options)
        z.scatter_add_(1, y[:, None].long(), torch.full_like(z, 3.0))
        q = torch.randn((b, classes, *space), **options).softmax(1)
        w = torch.rand((b, *space), **options)
        return z.to(dtype).requires_grad_(), y, q, w

    return make


def _gradient(function: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda data: torch.autograd.grad(function(*data), data[0])


def _compiled(name: str, function: Callable[..., Any]) -> Callable[[Any], Any]:
    @functools.cache
    def made() -> Any:
        torch._dynamo.config.recompile_limit = 64
        return torch.compile(function, dynamic=False, backend="inductor")

    def run(data: Any) -> Any:
        return _gradient(made())(data)

    return run


def _terms(make: Callable[..., list]) -> Callable[..., Any]:
    return lambda z, y, q, w: losses.voxel_loss(z, make(losses.Term, y, q, w))


def _dice_ce(term: Any, y: Any, *_: Any) -> list:
    return [term("ce", y), term("dice", y)]


def _operator(backward: bool) -> Callable[[Any], Any]:
    """Cross entropy + Dice by the operators themselves."""

    @functools.cache
    def params(b: int, c: int) -> list[float]:
        return cases._term(c, "ce", 0, -1, 0, b) + cases._term(c, "dice", 0, -1, 0, b)

    def run(data: Any) -> Any:
        z, y = data[0].detach(), data[1]
        b, c = z.shape[:2]
        if not backward:
            return ops.call("voxel_loss_forward", z, [y], [], params(b, c), 0, 2)
        stats, grad = data[4:]
        return ops.call("voxel_loss_backward", z, [y], [], params(b, c), stats, grad, 0, 2)

    return run


def _backward_data(dtype: torch.dtype, labels: torch.dtype, classes: int = 2):
    def make(bench: Bench, rng: Any) -> Any:
        data = _loss_data(dtype, labels, classes)(bench, rng)
        b, c = data[0].shape[:2]
        stats = 50 + 50 * torch.rand((2, b, c, 4), dtype=torch.float64, device=bench.device)
        return (*data, stats, torch.ones((2, b, c), dtype=torch.float64, device=bench.device))

    return make


_LOSS = ("voxel_loss_forward", "voxel_loss_backward")
_F32, _F16, _BF16, _U8, _I64 = torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64


def _loss_rows() -> Iterator[Row]:
    for dtype, labels, classes in (
        *((_F32, _U8, 2), (_F32, _I64, 2), (_F16, _U8, 2), (_BF16, _U8, 2)),
        *((_F32, _U8, 4), (_F32, _U8, 14), (_F32, _U8, 40)),
    ):
        kind = f"C={classes} {str(dtype)[6:]}, {str(labels)[6:]} labels"
        yield Row(
            f"dice+ce forward {kind}",
            _loss_data(dtype, labels, classes),
            _operator(False),
            moved=lambda d: d[0].nbytes + d[1].nbytes,
            needs=_LOSS[:1],
            targets={"copy": 0.85},
        )
        yield Row(
            f"dice+ce backward {kind}",
            _backward_data(dtype, labels, classes),
            _operator(True),
            moved=lambda d: 2 * d[0].nbytes + d[1].nbytes,
            needs=_LOSS[1:],
            targets={"copy": 0.85},
        )
    promised = {"torch.compile": 1.5, "MONAI": 6.0}
    for name, ours, peer, moved in (
        ("dice+ce", _dice_ce, peers._dice_ce, lambda d: 3 * d[0].nbytes + 2 * d[1].nbytes),
        ("softmax mse", lambda t, y, q, w: [t("mse", q)], peers._mse, lambda d: 5 * d[0].nbytes),
        ("kl", lambda t, y, q, w: [t("kl", q)], peers._kl, lambda d: 5 * d[0].nbytes),
        ("entropy", lambda t, *_: [t("entropy")], peers._entropy, lambda d: 3 * d[0].nbytes),
    ):
        others: dict[str, Any] = {
            "torch": _gradient(peer),
            "torch.compile": _compiled(name, peer),
        }
        if name == "dice+ce":
            others["MONAI"] = _gradient(peers._dice_ce_monai)
        yield Row(
            f"{name} forward+backward, with autograd",
            _loss_data(_F32, _I64),
            _gradient(_terms(ours)),
            others,
            moved,
            _LOSS,
            {k: v for k, v in promised.items() if k in others},
        )


# ---- fusion, distances, components, prompts, metrics, random walker -------------------------------


def _maps(bench: Bench, _: Any) -> list[Any]:
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = (bench.size(8, 1), 1, *(bench.size(128, 8),) * 3)
    return [torch.rand(shape, generator=generator, device=bench.device) for _ in range(10)]


def _organ(side: int, batch: int, tiny: int = 12):
    def make(bench: Bench, rng: np.random.Generator) -> Any:
        n = bench.size(side, tiny)
        one = torch.from_numpy(cases.organ(rng, (n,) * 3, 0.08))
        return one.to(bench.device)[None].repeat(batch, 1, 1, 1)

    return make


def _specks(bench: Bench, rng: np.random.Generator) -> Any:
    return torch.from_numpy(cases._specks(rng, bench.size(128, 12))).to(bench.device)[None]


def _labels_cupy(mask: Any) -> Any:
    cupy = importlib.import_module("cupy")
    label = importlib.import_module("cupyx.scipy.ndimage").label
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    with stream:
        return label(cupy.from_dlpack(mask[0]), cupy.ones((3, 3, 3)))[0]


def _geometry_rows() -> Iterator[Row]:
    yield Row(
        "fusion of 10 maps 8x1x128^3",
        _maps,
        lambda maps: fusion.fuse(maps, want=("mean", "uncertainty", "weight")),
        {"torch": peers.fuse_maps_torch, "torch.compile": peers.fuse_maps_compile},
        lambda maps: 13 * maps[0].nbytes,
        ("fuse",),
        {"copy": 0.85},
    )
    for name, side, batch in (("128^3, B=4", 128, 4), ("256^3", 256, 1)):
        yield Row(
            f"edt {name}, 8 % full",
            _organ(side, batch),
            masks.edt,
            {"cuCIM": _cucim},
            lambda m: 5 * m.numel(),
            ("edt",),
            {"cuCIM": 2.0, "best CPU": 50.0},
            graph=True,
            host={
                "edt (CPU)": lambda m: [peers.edt_edt(one) for one in m],
                "scipy (CPU)": lambda m: [peers.edt_scipy(one) for one in m],
            },
        )
    yield Row(
        "components 128^3",
        _specks,
        masks.components,
        {"cupy": _labels_cupy, "cuCIM": _cucim},
        lambda m: 5 * m.numel(),
        ("components",),
        {"cupy": 3.0},
        graph=True,
        host={
            "cc3d (CPU)": lambda m: peers.components_cc3d_26(m[0]),
            "scipy (CPU)": lambda m: peers.components_scipy(m[0]),
        },
    )
    yield Row(
        "largest component 128^3",
        _specks,
        masks.largest_component,
        {},
        lambda m: 2 * m.numel(),
        ("keep_components",),
        graph=True,
        host={"published (CPU)": lambda m: peers.largest_component_published(m[0])},
    )


def _surfaces(bench: Bench, rng: np.random.Generator) -> Any:
    pred, ref = cases._atrium(rng)
    if bench.tiny:
        pred, ref = (np.ascontiguousarray(a[80:92, 60:72, 40:52]) for a in (pred, ref))
    return tuple(torch.from_numpy(a).to(bench.device)[None] for a in (pred, ref))


def _surface_operator(data: Any) -> Any:
    return ops.call("surface_metrics", *data, None, 2, 1, 3, 0, 0, 95.0, [1.0, 1.0, 1.0], [])


def _walk(bench: Bench, rng: np.random.Generator) -> dict[str, Any]:
    problem = cases._mask_problem(rng, *bench.size((180, 140, 72), (12, 10, 8)))
    arrays = {
        k: torch.from_numpy(np.ascontiguousarray(problem[k])).to(bench.device) for k in ("image", "seeds")
    }
    return {
        **arrays,
        "prior": torch.from_numpy(problem["prior"]).to(bench.device),
        "sweeps": problem["sweeps"],
    }


def _walk_operator(data: dict[str, Any]) -> Any:
    image, seeds, prior = (data[k][None] for k in ("image", "seeds", "prior"))
    return ops.call(
        *("random_walker", image, seeds, prior, 1, 0.05, 90.0, [1.0, 1.0, 1.0], 1e-4, 1000),
    )


def _metric_rows() -> Iterator[Row]:
    pair = {"host": {"MONAI (CPU)": peers.hd95_asd_monai, "medpy's formula (CPU)": peers.hd95_asd_medpy}}
    yield Row(
        "HD95 + ASD, LA case: the operator",
        _surfaces,
        _surface_operator,
        {"cuCIM": _cucim},
        lambda d: d[0].nbytes + d[1].nbytes,
        ("surface_metrics",),
        {"ms": 1.0},
        graph=True,
    )
    yield Row(
        "all metrics, LA case: compute_all",
        _surfaces,
        lambda d: metrics.compute_all(d[0][:, None], d[1][:, None], 2),
        {},
        lambda d: d[0].nbytes + d[1].nbytes,
        ("surface_metrics", "overlap"),
        on_host=lambda d: tuple(a[0].cpu().numpy() for a in d),
        **pair,
    )
    yield Row(
        "random walker, mask prompt, 1.8 M voxels",
        _walk,
        _walk_operator,
        {},
        _walk_bytes,
        ("random_walker",),
        {"ms": 3.0},
        graph=True,
        notes=lambda d: {"iterations": d["sweeps"]},
    )
    yield Row(
        "geodesic distance, 225 k voxels",
        lambda bench, rng: {
            "image": (volume := torch.randn(bench.size((90, 70, 36), (8, 9, 10)), device=bench.device)),
            "mask": _ball(volume),
        },
        lambda d: ops.call("geodesic", d["image"][None], d["mask"][None], 1, 30.0, [1.0, 1.0, 1.0]),
        {},
        lambda d: 9 * d["image"].numel(),
        ("geodesic",),
        graph=True,
    )


def _ball(volume: Any) -> Any:
    grid = torch.meshgrid(
        *(torch.arange(n, device=volume.device) - n // 2 for n in volume.shape), indexing="ij"
    )
    return sum(g * g for g in grid) <= 4


def _walk_bytes(d: dict[str, Any]) -> int:
    return int((d["seeds"] == 0).sum()) * 56 * d["sweeps"] + 13 * d["seeds"].numel()


def _teacher(bench: Bench, batch: int = 2) -> Any:
    """A softmax [B, 2, n, n, n] with an organ, as a teacher of some training gives it."""
    n = bench.size(128, 16)
    generator = torch.Generator(bench.device).manual_seed(0)
    z = torch.randn((batch, 2, n, n, n), generator=generator, device=bench.device)
    low, high = n // 3, 3 * n // 4
    z[:, 1, low:high, low:high, low:high] += 6
    z[:, 1] -= 3
    return z


def _rollout(data: Any, clicks: int = 10) -> Any:
    """Specialist's map, clicks, mask prompts, fused pseudo-label; the generalist's answers are given."""
    prob, answers = data
    target, region, skip = prompts.specialist_targets(prob)
    size = [max(n // 4, 1) for n in prob.shape[2:]]
    current, made = None, []
    for k in range(clicks):
        made += prompts.next_click(
            *(target, current, region),
            skip=skip,
            seed=1,
            iteration=2,
            sample_ids=range(len(prob)),
            round=k,
            clicks=clicks,
        )
        made.append(prompts.mask_logits(answers[k].sigmoid()[:, 0], size))
        current, _ = prompts.answer_mask(answers[k])
    fused = fusion.fuse(answers, logits=True, two_channels=True)
    return [*made, *fused]


def _rollout_data(bench: Bench, _: Any) -> Any:
    prob = _teacher(bench).softmax(1)
    generator = torch.Generator(bench.device).manual_seed(1)
    shape = (len(prob), 1, *prob.shape[2:])
    noise = (torch.randn(shape, generator=generator, device=bench.device) for _ in range(10))
    return prob, [4 * (2 * prob[:, 1:] - 1) + n for n in noise]


def _prompt_rows() -> Iterator[Row]:
    yield Row(
        "click rollout K=10 B=2 128^3, without the generalist",
        _rollout_data,
        _rollout,
        {},
        None,
        ("specialist_targets", "answer_mask", "next_click", "mask_logits", "fuse"),
        {"ms": 1.0},
        graph=True,
    )
    batch = {"prob": lambda bench, _: _teacher(bench).softmax(1)}
    yield Row(
        "specialist targets 2x2x128^3",
        batch["prob"],
        prompts.specialist_targets,
        {"torch": peers.targets_torch},
        lambda p: p.nbytes + 2 * p.nbytes // 8,
        ("specialist_targets",),
        graph=True,
    )
    yield Row(
        "answer's mask and span 2x128^3",
        lambda bench, _: _teacher(bench)[:, 1:].contiguous(),
        prompts.answer_mask,
        {"torch": peers.answer_torch},
        lambda z: z.nbytes + z.nbytes // 4,
        ("answer_mask",),
        graph=True,
    )
    yield Row(
        "mask_logits 2x128^3 -> 32^3: ours against torch's pooling",
        lambda bench, _: _teacher(bench).softmax(1)[:, 1].contiguous(),
        lambda p: prompts.mask_logits(p, [n // 4 for n in p.shape[1:]]),
        {
            "adaptive_avg_pool3d": lambda p: _pooled(F.adaptive_avg_pool3d, [n // 4 for n in p.shape[1:]], p),
            "avg_pool3d": lambda p: _pooled(F.avg_pool3d, 4, p),
        },
        lambda p: p.nbytes + p.nbytes // 64,
        ("mask_logits",),
        graph=True,
    )
    yield Row(
        "RITM click 2x128^3",
        lambda bench, _: ((p := _teacher(bench).softmax(1)[:, 1:]) > 0.5, p.roll(4, 2) > 0.6),
        lambda d: prompts.next_click(*d, seed=1, iteration=2, sample_ids=range(len(d[0])), round=0),
        {},
        lambda d: 2 * d[0].numel(),
        ("next_click",),
        graph=True,
    )
    yield Row(
        "SC-SAM points 8x2x512^2",
        lambda bench, _: _squares(bench),
        lambda p: prompts.sample_points(p, 5, seed=1, iteration=2, sample_ids=range(len(p))).points,
        {},
        lambda p: p.nbytes,
        ("sample_points",),
        graph=True,
    )
    yield Row(
        "boxes 8x512^2",
        lambda bench, _: _squares(bench)[:, 1:] > 0.5,
        lambda m: prompts.boxes(m, 0.0, order="xy"),
        {},
        lambda m: m.numel(),
        ("boxes",),
        graph=True,
    )
    yield Row(
        "overlap, LA case",
        _surfaces,
        lambda d: ops.call("overlap", *d, 2, 0, 0),
        {},
        lambda d: d[0].nbytes + d[1].nbytes,
        ("overlap",),
        graph=True,
    )


def _pooled(pool: Callable[..., Any], how: Any, prob: Any) -> Any:
    return pool(prob[:, None], how)[:, 0].logit().clamp(-10, 10)


def _squares(bench: Bench) -> Any:
    side = bench.size(512, 16)
    p = torch.full((8, side, side), 0.05, device=bench.device)
    p[:, side // 4 : side // 2, side // 3 : side // 2 + 2] = 0.9
    return torch.stack([1 - p, p], 1)


# ---- networks and whole iterations ----------------------------------------------------------------


@dataclass
class Alternatives:
    """A row of ways to do the same, compared among themselves; `make` gives a function per way."""

    name: str
    make: Callable[[Bench], dict[str, Callable[[], Any] | str]]
    targets: dict[str, float] = field(default_factory=dict)
    repeat: int = 7

    def measure(self, bench: Bench) -> dict[str, Any]:
        """Medians of every way, and their ratios to the first."""
        ways = self.make(bench)
        missing = {n: f for n, f in ways.items() if isinstance(f, str)}
        functions = {n: (lambda _, f=f: f()) for n, f in ways.items() if not isinstance(f, str)}
        for name in list(functions):
            reason = _why_not(functions[name], None, bench)
            if reason:
                missing[name] = reason
                del functions[name]
        if not functions:
            raise Missing("; ".join(f"{n}: {why}" for n, why in missing.items()))
        repeat, bench.repeat = bench.repeat, min(bench.repeat, self.repeat)
        try:
            times = bench.medians(functions, [None])
        finally:
            bench.repeat = repeat
        first = times[next(iter(functions))]
        result: dict[str, Any] = {
            "ms": {n: 1e3 * t for n, t in times.items()},
            "ratio": {n: t / first for n, t in times.items()},
            "missing": missing,
            "fastest": min(times, key=times.__getitem__),
        }
        result["targets"] = _verdicts(self.targets, result, bench)
        return result


@dataclass
class Growth:
    """A row of one operator on cubes of growing sides; `make(bench, side)` gives a call."""

    name: str
    make: Callable[[Bench, int], Callable[[], Any]]
    needs: tuple[str, ...]
    sides: tuple[int, ...] = (64, 128, 256, 512)
    targets: dict[str, float] = field(default_factory=dict)

    def measure(self, bench: Bench) -> dict[str, Any]:
        """Milliseconds and nanoseconds per voxel for every side."""
        _has_kernels(self.needs, bench)
        times: dict[str, float] = {}
        for side in bench.size(self.sides, (8, 16)):
            call = self.make(bench, side)
            times[f"{side}^3"] = bench.medians({"": lambda _, call=call: call()}, [None])[""]
            bench.free()
        per = {name: 1e9 * t / int(name[:-2]) ** 3 for name, t in times.items()}
        ms = {name: 1e3 * t for name, t in times.items()}
        return {"ms": ms, "ns per voxel": per, "ratio": {}, "missing": {}, "targets": {}}


def _cube(bench: Bench, side: int) -> Any:
    """A ball of 8 % of a cube, [1, n, n, n], made where it is."""
    axis = torch.linspace(-1, 1, side, device=bench.device) ** 2
    return (axis[:, None, None] + axis[:, None] + axis < 0.29).byte()[None]


def _growing_clicks(bench: Bench, side: int) -> Callable[[], Any]:
    target = _cube(bench, side).bool()[None]
    current = target.roll(3, 3)
    return lambda: prompts.next_click(target, current, seed=1, iteration=2, sample_ids=[3], round=0)


def _growing_loss(bench: Bench, side: int) -> Callable[[], Any]:
    y = _cube(bench, side)
    z = torch.randn((1, 2, side, side, side), device=bench.device, requires_grad=True)
    return lambda: torch.autograd.grad(losses.voxel_loss(z, _dice_ce(losses.Term, y)), z)


def _growing_maps(bench: Bench, side: int) -> Callable[[], Any]:
    maps = [torch.rand((1, 1, side, side, side), device=bench.device) for _ in range(4)]
    return lambda: fusion.fuse(maps, want=("mean", "weight"))


def _growing(function: Callable[[Any], Any]) -> Callable[[Bench, int], Callable[[], Any]]:
    def make(bench: Bench, side: int) -> Callable[[], Any]:
        cube = _cube(bench, side)
        return lambda: function(cube)

    return make


GROWTH = [
    Growth("growth of edt", _growing(masks.edt), ("edt",)),
    Growth("growth of components", _growing(masks.components), ("components",)),
    Growth("growth of the RITM click", _growing_clicks, ("next_click",)),
    Growth("growth of dice+ce forward+backward", _growing_loss, _LOSS),
    Growth("growth of the fusion of 4 maps", _growing_maps, ("fuse",)),
]


@contextmanager
def _cudnn(*, enabled: bool = True, benchmark: bool = False) -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=enabled, benchmark=benchmark):
        yield


def _vnet_ways(bench: Bench) -> dict[str, Callable[[], Any] | str]:
    """One training step of V-Net, forward and backward, in memory formats and precisions."""
    shape = bench.size((4, 1, 112, 112, 80), (1, 1, 16, 16, 16))
    ways: dict[str, Callable[[], Any] | str] = {}
    for precision, dtype in (("bfloat16", _BF16), ("float32", _F32)):
        for name, memory in (
            ("contiguous", torch.contiguous_format),
            ("channels_last", torch.channels_last_3d),
        ):
            for benchmark in (False, True):
                network = VNet(channels=bench.size((16, 32, 64, 128, 256), (4, 8))).to(bench.device)
                network = network.to(memory_format=memory)
                image = torch.randn(shape, device=bench.device).to(memory_format=memory)

                def step(
                    network: Any = network, image: Any = image, dtype: Any = dtype, b: bool = benchmark
                ) -> None:
                    with _cudnn(benchmark=b), torch.autocast(bench.device.type, dtype, enabled=dtype != _F32):
                        loss = network(image).float().square().mean()
                    loss.backward()
                    network.zero_grad(set_to_none=True)

                ways[f"{precision} {name}{', cudnn.benchmark' if benchmark else ''}"] = step
    return ways


def _convolution_ways(bench: Bench) -> dict[str, Callable[[], Any] | str]:
    shape = bench.size((4, 16, 112, 112, 80), (1, 4, 8, 8, 8))
    ways: dict[str, Callable[[], Any] | str] = {}
    for precision, dtype in (("bfloat16", _BF16), ("float32", _F32)):
        image = torch.randn(shape, device=bench.device, dtype=dtype)
        weight = torch.randn((shape[1], shape[1], 3, 3, 3), device=bench.device, dtype=dtype)
        for name, options in (
            ("cuDNN", {}),
            ("cuDNN, benchmark", {"benchmark": True}),
            ("torch without cuDNN", {"enabled": False}),
        ):

            def run(image: Any = image, weight: Any = weight, options: Any = options) -> None:
                with _cudnn(**options):
                    F.conv3d(image, weight, padding=1)

            ways[f"{precision} {name}"] = run
    return ways


def _attention(name: str):
    try:
        attention = importlib.import_module("torch.nn.attention")
        return attention.sdpa_kernel(getattr(attention.SDPBackend, name))
    except (ImportError, AttributeError) as e:
        raise Missing(f"this torch has no {name}") from e


def _sdpa_ways(bench: Bench) -> dict[str, Callable[[], Any] | str]:
    """SAM-Med3D's encoder attends among 512 tokens in 12 heads of 64."""
    shape = bench.size((8, 12, 512, 64), (1, 2, 8, 8))
    q, k, v = (torch.randn(shape, device=bench.device, dtype=_BF16) for _ in range(3))
    ways: dict[str, Callable[[], Any] | str] = {
        "torch's choice": lambda: F.scaled_dot_product_attention(q, k, v)
    }
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):

        def run(name: str = name) -> None:
            with _attention(name):
                F.scaled_dot_product_attention(q, k, v)

        ways[name] = run
    return ways


def _architecture(bench: Bench) -> Any:
    network = importlib.import_module("semisam.generalists.sam_med3d_network")
    return network.Architecture() if not bench.tiny else network.Architecture.small()


def _sam_network(bench: Bench) -> Any:
    torch.manual_seed(0)
    made = importlib.import_module("semisam.generalists.sam_med3d_network").SamMed3DNetwork
    return made(_architecture(bench)).eval().to(bench.device)


def _encoder_ways(bench: Bench) -> dict[str, Callable[[], Any] | str]:
    """SAM-Med3D's encoder with each backend of attention, bfloat16."""
    network = _sam_network(bench)
    side = _architecture(bench).side
    image = torch.randn((2, 1, side, side, side), device=bench.device)
    ways: dict[str, Callable[[], Any] | str] = {}
    for name in ("torch's choice", "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):

        def run(name: str = name) -> None:
            chosen = nullcontext() if name == "torch's choice" else _attention(name)
            with chosen, torch.no_grad(), torch.autocast(bench.device.type, _BF16):
                network.embed(image)

        ways[name] = run
    return ways


class _Training:
    """Iterations of a method on given patches, without loading or logging: two labeled, two not."""

    def __init__(self, bench: Bench, name: str, term: Any = None) -> None:
        config = importlib.import_module("semisam.engine.config").MethodConfig(name)
        methods = importlib.import_module("semisam.methods")
        n = bench.size(128, 32)
        torch.manual_seed(0)
        student = VNet(channels=bench.size((16, 32, 64, 128, 256), (4, 8))).to(bench.device)
        self.method = methods.build(config, student, num_classes=2, total_steps=100, term=term)
        self.method.to(bench.device)
        self.optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
        generator = torch.Generator(bench.device).manual_seed(0)
        image = torch.randn((4, 1, n, n, n), generator=generator, device=bench.device)
        label = torch.zeros((2, n, n, n), dtype=torch.uint8, device=bench.device)
        label[:, n // 4 : n // 2, n // 4 : n // 2, n // 4 : n // 2] = 1
        image[:2, 0] += label
        self.batch = methods.Batch(image, label, (0, 1, 2, 3))
        self.bench, self.step = bench, 50

    def __call__(self) -> None:
        """One iteration in bfloat16, as the trainer's stepper does it."""
        with torch.autocast(self.bench.device.type, _BF16):
            parts = self.method.losses(self.batch, self.step)
        torch.stack([v.to(self.bench.device) for v in parts.values()]).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(self.step)


def _iteration_ways(bench: Bench) -> dict[str, Callable[[], Any] | str]:
    sam = importlib.import_module("semisam.generalists.sam_med3d").SamMed3D(network=_sam_network(bench))
    options = {"total_steps": 100, "mode": "mixed", "clicks": bench.size(10, 2), "sample_gate": 0.0}
    term = semisam.SemiSAMTerm(sam, **options)
    taught = _Training(bench, "semisam-mean-teacher", term)
    return {"mean teacher": _Training(bench, "mean-teacher"), "SemiSAM+": taught}


def _term_ways(bench: Bench) -> dict[str, Callable[[], Any] | str]:
    """The term with answers that are there already: everything but the generalist's forward."""
    z = _teacher(bench)
    prob, clicks = z.softmax(1), bench.size(10, 2)
    answer = 4 * (2 * prob[:, 1:] - 1)
    term = semisam.SemiSAMTerm(lambda images, asked: answer, total_steps=100, clicks=clicks, sample_gate=0.0)
    logits = z.requires_grad_()

    def run() -> None:
        term(prob[:, 1:], logits, teacher_probs=prob, step=50).backward()
        logits.grad = None

    return {"the term": run}


NETWORKS = [
    Alternatives("term K=10 B=2 128^3, everything but the generalist's forward", _term_ways),
    Alternatives(
        "iteration K=10 B=2+2 128^3, V-Net, SAM-Med3D with random weights",
        _iteration_ways,
        {"SemiSAM+ <=": 1.15},
        5,
    ),
    Alternatives("V-Net 4x1x112x112x80, forward+backward", _vnet_ways, {}, 5),
    Alternatives("convolution 3^3, 16 channels, 4x112x112x80", _convolution_ways),
    Alternatives("attention 8x12x512x64 bfloat16", _sdpa_ways),
    Alternatives("SAM-Med3D encoder, B=2, bfloat16", _encoder_ways, {}, 5),
]


def rows() -> list[Row | Alternatives | Growth]:
    """Every row, what has a target first: a run that is stopped keeps those."""
    made = [*_loss_rows(), *_geometry_rows(), *_metric_rows(), *_prompt_rows(), *NETWORKS, *GROWTH]
    return sorted(made, key=lambda row: not row.targets)


# ---- the run --------------------------------------------------------------------------------------


def describe(bench: Bench) -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {"rehearsal": bench.tiny, **machine()}
    if not bench.tiny:
        p = torch.cuda.get_device_properties(bench.device)
        found |= {
            "device": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory": p.total_memory,
            "multiprocessors": p.multi_processor_count,
            "L2": p.L2_cache_size,
        }
    return found | {"info": build()}


def measure(row: Row | Alternatives | Growth, bench: Bench) -> dict[str, Any]:
    """The figures of a row, or why there are none."""
    start = time.perf_counter()
    try:
        result = row.measure(bench)
    except Missing as e:
        result = {"not measured": str(e)}
    except Exception as e:  # the other rows are worth having
        traceback.print_exc(file=sys.stderr)
        result = {"failed": _first_line(e)}
    bench.free()
    if "targets" not in result:
        result["targets"] = {f"{what} {limit}": "not measured" for what, limit in row.targets.items()}
    return {"name": row.name, **result, "seconds": time.perf_counter() - start}


def line_of(result: dict[str, Any]) -> str:
    """One row as text."""
    if "ms" not in result:
        why = next(f"{k}: {result[k]}" for k in ("not measured", "failed") if k in result)
        return f"{result['name']:<62}{why}"
    columns = [f"{name} {ms:.4g} ms" for name, ms in result["ms"].items()]
    if "copy" in result:
        columns.append(f"{result['bytes/s'] / 1e9:.0f} GB/s = {100 * result['copy']:.0f} % of a copy")
    columns += [f"{n} {r:.3g}x" for n, r in result["ratio"].items() if r != 1 and not math.isnan(r)]
    columns += [f"{ns:.3g} ns per voxel at {n}" for n, ns in result.get("ns per voxel", {}).items()]
    columns += [f"{n} apart by {d:.1e}" for n, d in result.get("difference", {}).items()]
    columns += [f"{verdict}: {what}" for what, verdict in result["targets"].items()]
    columns += [f"not measured: {name}: {why}" for name, why in result["missing"].items()]
    return f"{result['name']:<62}{', '.join(columns)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-k", default="", metavar="WORD", help="only rows whose name contains this")
    parser.add_argument("-o", type=Path, default=None, metavar="FILE", help="where to write the JSON")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, rows with a target alone")
    parser.add_argument("--seconds", type=float, default=270, help="start no row after this time (270)")
    parser.add_argument("--rehearse", action="store_true", help="every row on the CPU, on tiny inputs")
    options = parser.parse_args(arguments)
    if not options.rehearse:
        why = "torch finds no CUDA device" if not torch.cuda.is_available() else ops.load_cuda()
        if why:
            print(f"benchmarks.gpu: needs a GPU: {why}; --rehearse runs it on the CPU", file=sys.stderr)
            return 2
    start = time.perf_counter()
    bench = Bench(tiny=options.rehearse, quick=options.quick)
    bench.copy = bench.bandwidth()
    bench.free()
    result: dict[str, Any] = {**describe(bench), "copy bytes/s": bench.copy, "rows": []}
    print(f"{result.get('device', 'rehearsal on the CPU')}: copy {bench.copy / 1e9:.0f} GB/s read + written")
    for row in rows():
        if options.k not in row.name or (options.quick and not row.targets):
            continue
        if time.perf_counter() - start > options.seconds:
            made = {"name": row.name, "not measured": "out of time (--seconds)", "seconds": 0.0}
        else:
            made = measure(row, bench)
        result["rows"].append(made)
        print(line_of(made), flush=True)
        result["seconds"] = time.perf_counter() - start
        if options.o:
            write_json(options.o, result)  # each time: a run that is stopped keeps its rows
    verdicts = [v for made in result["rows"] for v in made.get("targets", {}).values()]
    failed = [made["name"] for made in result["rows"] if "failed" in made]
    known = ("met", "NOT MET", "not measured", "rehearsed")
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in known if v in verdicts)
    print(f"targets: {counts}; failed rows: {'; '.join(failed) or '-'}; {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
