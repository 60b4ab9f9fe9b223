# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.sam_med3d [-t 2] [-o FILE]`: what one step of the term costs with SAM-Med3D.

Random weights of the published size, which time like trained ones. The encoder against the plain padded
computation in one run, one round of clicks, and this library's own work beside both (prompts, fusion,
loss), as shares of the generalist's time. Medians; memory is the process' peak beyond its start. "floor" is
the time that the encoder's matrix products alone take at the rate of a large one, measured in the same run.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import semisam
from benchmarks.run import machine, write_json
from semisam.generalists.sam_med3d import SamMed3D
from semisam.generalists.sam_med3d_network import SamMed3DNetwork


def seconds(function, repeat: int) -> float:
    function()
    samples = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def scene(batch: int, generator: torch.Generator):
    """Images, a teacher's softmax with an organ, and a student's logits, on 128^3."""
    images = torch.randn(batch, 1, 128, 128, 128, generator=generator)
    logits = torch.randn(batch, 2, 128, 128, 128, generator=generator)
    logits[:, 1, 40:90, 50:100, 30:80] += 6
    logits[:, 1] -= 3
    return images, logits.softmax(1), logits.requires_grad_()


@torch.no_grad()
def encoder(network: SamMed3DNetwork, repeat: int) -> dict[str, float]:
    cube = torch.randn(1, 1, 128, 128, 128)
    exact = seconds(lambda: network.embed(cube), repeat)
    plain = seconds(lambda: network.embed(cube, exact_shortcut=False), 1)
    apart = float((network.embed(cube) - network.embed(cube, exact_shortcut=False)).abs().max())
    side = 2048
    a, b = torch.randn(2, side, side)
    rate = 2 * side**3 / seconds(lambda: a @ b, 5 * repeat)
    with FlopCounterMode(display=False) as counter:
        network.embed(cube)
    floor = counter.get_total_flops() / rate
    return {
        "encode_s": exact,
        "encode_padded_s": plain,
        "ratio": plain / exact,
        "difference": apart,
        "floor_s": floor,
        "times_floor": exact / floor,
        "beyond_the_floor": plain / 8 < floor,  # nothing in float32 could reach the target here
    }


def one_step(sam: SamMed3D, clicks: int, batch: int) -> dict[str, float]:
    term = semisam.SemiSAMTerm(sam, total_steps=100, mode="mixed", clicks=clicks, sample_gate=0.0)
    images, prob, logits = scene(batch, torch.Generator().manual_seed(0))
    steps = []
    for step in range(48, 53):
        logits.grad = None  # in a training they are no leaf that would add gradients up
        start = time.perf_counter()
        term(images, logits, teacher_probs=prob, step=step).backward()
        whole = time.perf_counter() - start
        generalist = term.diagnostics["ms_generalist"] / 1e3
        steps.append({"step_s": whole, "generalist_s": generalist, "own_share": whole / generalist - 1})
    # The first two pay for memory that later ones reuse, as those of a training do.
    middle = sorted(steps[2:], key=lambda made: made["own_share"])[1]
    return {"clicks": clicks, "batch": batch, **middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-t", type=int, default=2, help="threads")
    parser.add_argument("-r", type=int, default=3, help="repetitions")
    parser.add_argument("-o", type=Path, default=None, help="where to write the JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.t)
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sam = SamMed3D(network=SamMed3DNetwork())
    step = one_step(sam, 6, 2)
    step["peak_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    rows = {"encoder": encoder(sam.network, options.r), "term step": step}
    e = rows["encoder"]
    print(
        f"encode 128^3: {e['encode_s']:.2f} s, padded {e['encode_padded_s']:.2f} s: {e['ratio']:.1f}x "
        f"({'met' if e['ratio'] >= 8 else 'NOT MET'}: >= 8x{', beyond the floor' * e['beyond_the_floor']}), "
        f"floor x{e['times_floor']:.2f}, difference {e['difference']:.1e}"
    )
    met = "met" if step["own_share"] < 0.02 else "NOT MET"
    print(
        f"term step, B=2, K=6, 128^3: {step['step_s']:.2f} s, generalist {step['generalist_s']:.2f} s, "
        f"the rest {100 * step['own_share']:.1f} % of it ({met}: < 2 %), "
        f"peak memory {step['peak_mib']:.0f} MiB"
    )
    if options.o:
        write_json(options.o, {"machine": machine(), "threads": options.t, "rows": rows})


if __name__ == "__main__":
    main()
