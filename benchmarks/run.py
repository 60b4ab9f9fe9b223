# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.run [-k WORD] [-t 1 2] [-o FILE]`: ours against peers, ratios in one run.

Times are medians over interleaved repetitions (ours, peer, peer, ours, ...), so that a noisy
neighbour hits everybody. "floor" is our time over the time that moving the least possible bytes takes
at the copy bandwidth, which is measured between the same repetitions. A row is met when all its ratios
to peers are, or when it is within its multiple of the floor: a peer that moves its bytes as fast as the
machine can leaves no ratio to gain, and such a target is marked "beyond the floor". Everything is
written as JSON, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cases import SPEEDS

import semisam
from benchmarks import peers


class Copying:
    """Bytes per second, read plus written, of `threads` copies at once, far larger than the caches."""

    def __init__(self, threads: int, megabytes: int = 256) -> None:
        n = megabytes * 2**20 // threads
        self.pairs = [(np.ones(n, np.uint8), np.ones(n, np.uint8)) for _ in range(threads)]
        self.bytes = 2 * n * threads

    def __call__(self) -> float:
        together, times = threading.Barrier(len(self.pairs)), []

        def work(a: np.ndarray, b: np.ndarray) -> None:
            together.wait()
            start = time.perf_counter()
            np.copyto(b, a)
            times.append((start, time.perf_counter()))

        workers = [threading.Thread(target=work, args=pair) for pair in self.pairs]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        return self.bytes / (max(end for _, end in times) - min(start for start, _ in times))


def time_all(functions, data, repeat: int, copying: Copying, least: float = 0.02):
    """Median seconds, results and the median copy bandwidth, repetitions interleaved; short functions run
    in batches."""
    loops, results = {}, {}
    for name, f in functions.items():
        results[name] = f(data)
        start = time.perf_counter()
        f(data)
        once = time.perf_counter() - start
        loops[name] = max(1, int(least / max(once, 1e-7)))
    samples = {name: [] for name in functions}
    bandwidths = []
    for _ in range(repeat):
        bandwidths.append(copying())
        for name, f in functions.items():
            start = time.perf_counter()
            for _ in range(loops[name]):
                f(data)
            samples[name].append((time.perf_counter() - start) / loops[name])
    medians = {name: statistics.median(v) for name, v in samples.items()}
    return medians, results, statistics.median(bandwidths)


def run_one(speed, threads: int, copying: Copying) -> dict:
    torch.set_num_threads(threads)
    data = speed.make(np.random.default_rng(1337))
    functions, missing = {"ours": speed.ours}, {}
    for name in speed.peers:
        try:
            getattr(peers, name)(data)
            functions[name] = getattr(peers, name)
        except ImportError as e:
            missing[name] = str(e)
    times, results, bandwidth = time_all(functions, data, speed.repeat, copying)
    ours = times["ours"]
    floor = ours / (speed.moved(data) / bandwidth)
    ratios = {name: t / ours for name, t in times.items() if name != "ours"}
    ratios["best"] = min(ratios.values()) if ratios else float("nan")
    met, beyond = {}, []
    for what, target in speed.targets.items():
        if what == "floor":
            met[f"floor <= {target}"] = floor <= target
        elif what in ratios:
            met[f"{what} >= {target}x"] = ratios[what] >= target
            if floor * ratios[what] / target < 1:
                beyond.append(f"{what} >= {target}x")
    by_floor = [ok for what, ok in met.items() if what.startswith("floor")]
    by_ratio = [ok for what, ok in met.items() if not what.startswith("floor")]
    errors = {}
    if speed.error:
        errors = {n: speed.error(results["ours"], r) for n, r in results.items() if n != "ours"}
    return {
        "name": speed.name,
        "threads": threads,
        "ms": {name: 1e3 * t for name, t in times.items()},
        "ratio": ratios,
        "bytes": speed.moved(data),
        "bandwidth": bandwidth,
        "floor": floor,
        "targets": met,
        "beyond the floor": beyond,
        "met": any(by_floor) or (bool(by_ratio) and all(by_ratio)),
        "difference": errors,
        "missing": missing,
    }


def print_row(row: dict) -> None:
    others = ", ".join(f"{n} {t:.3g} ({row['ratio'][n]:.1f}x)" for n, t in row["ms"].items() if n != "ours")
    beyond = dict.fromkeys(row["beyond the floor"], " (beyond the floor)")
    targets = ", ".join(
        f"{'met' if ok else 'NOT MET'}: {what}{beyond.get(what, '')}" for what, ok in row["targets"].items()
    )
    print(
        f"{row['name']:<42}{row['threads']}T  {row['ms']['ours']:9.3f} ms  {row['bytes'] / 2**20:8.1f} MiB  "
        f"at {row['bandwidth'] / 1e9:.0f} GB/s floor x{row['floor']:.2f}  | {others}  | {targets}"
    )
    if row["difference"]:
        print(" " * 46 + "difference: " + ", ".join(f"{n} {e:.2g}" for n, e in row["difference"].items()))
    for name, why in row["missing"].items():
        print(" " * 46 + f"not measured: {name}: {why}")


def build() -> dict[str, object]:
    """What `semisam.info` says of the build, without folders of this machine."""
    private = ("operators", "platform", "semisam_data", "semisam_home")
    return {key: value for key, value in semisam.info().items() if key not in private}


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as f:
        json.dump(value, f, indent=1)
    os.replace(f.name, path)


def import_milliseconds() -> dict[str, float]:
    """Time that `import semisam` takes beyond NumPy's own import, in fresh interpreters."""
    import subprocess  # noqa: PLC0415

    code = "import time,numpy;a=time.perf_counter();import semisam;print(time.perf_counter()-a)"
    runs = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(7)]
    return {"import semisam after numpy, ms": 1e3 * statistics.median(runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-k", default="", help="only entries whose name contains this")
    parser.add_argument("-t", type=int, nargs="+", default=[1, 2], help="thread counts")
    parser.add_argument("-o", type=Path, default=None, help="where to write the JSON")
    options = parser.parse_args()
    copying = {t: Copying(t) for t in options.t}
    result = {"machine": machine(), "imports": {}, "info": build(), "rows": []}
    if not options.k:
        result["imports"] = import_milliseconds()
        print(*(f"{what}: {value:.1f}" for what, value in result["imports"].items()))
    for speed in SPEEDS:
        for t in options.t:
            if options.k in speed.name:
                result["rows"].append(run_one(speed, t, copying[t]))
                print_row(result["rows"][-1])
                if options.o:
                    write_json(options.o, result)  # each time: a run that is stopped keeps its rows
    with_target = [row for row in result["rows"] if row["targets"]]
    missed = [f"{row['name']} {row['threads']}T" for row in with_target if not row["met"]]
    share = f"{len(with_target) - len(missed)} of {len(with_target)}"
    print(f"{share} rows met; not met: {'; '.join(missed) or '-'}")


def machine() -> dict[str, str]:
    """What the results were measured on."""
    return {"cpu": platform.processor() or platform.machine(), **_cpu_name()}


def _cpu_name() -> dict[str, str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return {"model": line.split(":", 1)[1].strip()}
    except OSError:
        pass
    return {}


if __name__ == "__main__":
    main()
