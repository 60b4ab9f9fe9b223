# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.memory [-t THREADS] [-o FILE]`: the memory of one step of the term, by setting.

Counted are the bytes of all tensors that are alive at once, during the term and its backward pass, with
SAM-Med3D of the published size and random weights, on the way that a step goes on a GPU, where nobody waits:
all images encoded and all rows decoded as one batch, maps fused by torch. It runs on the CPU here; that count
is what torch's allocator has to hand out on either device. Not in it: what kernels take for themselves while
they run (cuDNN and cuBLAS workspaces, scratch of this library's operators), what an allocator loses to
fragments, and the CUDA context. The CPU's own way needs less.

Specialists are counted on torch's meta device: forward and backward over labeled and unlabeled patches
together, with gradients, optimiser (SGD with momentum) and the teacher's weights, without the losses' maps.
"""

from __future__ import annotations

import argparse
import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import semisam
from benchmarks.run import machine, write_json
from semisam import ops, specialists
from semisam.generalists.sam_med3d import CubeState, SamMed3D
from semisam.generalists.sam_med3d_network import SamMed3DNetwork

MIB = 1 << 20
CARD = 16 * 1024  # MiB
SETTINGS = [
    {},
    {"batch": 1},
    {"batch": 4},
    {"clicks": 10},
    {"classes": 3},
    {"side": 96},
    {"precision": "bfloat16"},
    {"generalists": 2},
    {"generalists": 2, "precision": "bfloat16"},
]
PLAIN = {"batch": 2, "side": 128, "clicks": 6, "classes": 1, "precision": "float32", "generalists": 1}


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors' storages that operators have read or made inside, and that are still there.

    A storage counts once, whatever views there are of it, from the first operator that sees it to its end;
    `peak` is the largest sum after any operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.see(args, kwargs, made)
        return made

    def see(self, *things: Any) -> None:
        """Count the tensors in nested containers."""
        for t in tree_leaves(things):
            if isinstance(t, torch.Tensor):
                self._add(t.untyped_storage())
        self.peak = max(self.peak, self.live)

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.live -= self._known.pop(key)[1]

        self._known[key] = weakref.ref(storage, gone), size
        self.live += size


class AsOnGpu(SamMed3D):
    """Encodes a batch at once."""

    @torch.no_grad()
    def encode(self, images, *, spacing=None):
        shape = tuple(images.shape[2:])
        return CubeState(self._features(images, shape), shape, shape)


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Take the CPU for a device whose values are not to be looked at."""
    before, ops.stays = ops.stays, lambda device: True
    try:
        yield
    finally:
        ops.stays = before


def scene(batch: int, side: int, classes: int):
    """Images, a teacher's softmax with an organ per class, and a student's logits."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 1, side, side, side, generator=generator)
    logits = torch.randn(batch, 1 + classes, side, side, side, generator=generator)
    logits[:, 0] += 3
    third = side // 3
    for c in range(1, classes + 1):
        start = (c - 1) * third // classes
        logits[:, c, third : 2 * third, start : start + third, third : 2 * third] += 9
    return images, logits.softmax(1), logits.requires_grad_()


def term_memory(batch, side, clicks, classes, precision, generalists, architecture=None) -> dict[str, Any]:
    """MiB of weights, of what is handed in, and of the term beyond both."""
    networks = [SamMed3DNetwork(architecture) for _ in range(generalists)]
    sams = [AsOnGpu(network=n, precision=precision) for n in networks]
    modes = {"mode": "mixed", "clicks": clicks, "sample_gate": 0.0}
    term = semisam.SemiSAMTerm(sams, total_steps=100, **modes)
    images, prob, logits = scene(batch, side, classes)
    with as_on_gpu(), LiveBytes() as count:
        count.see([[*n.parameters(), *n.buffers()] for n in networks])
        weights = count.live
        count.see(images, prob, logits)
        given = count.live - weights
        term(images, logits, prob, step=50).backward()
        count.see(logits.grad)
    assert all(len(rounds) == batch and min(rounds) > 1 for rounds in term.diagnostics["rounds"].values())
    return {
        "weights_mib": weights / MIB,
        "given_mib": given / MIB,
        "term_mib": (count.peak - weights - given) / MIB,
        "total_mib": count.peak / MIB,
        "rounds": max(max(rounds) for rounds in term.diagnostics["rounds"].values()),
    }


def specialist_memory(name: str, batch: int, side: int) -> float:
    """MiB of a training step of a specialist in float32, with weights, gradients, momentum and teacher."""
    with torch.device("meta"):
        network = specialists.build(name, in_channels=1, num_classes=2)
        images = torch.empty(batch, 1, side, side, side)
    with LiveBytes() as count:
        count.see(images, list(network.parameters()))
        network(images).sum().backward()
    own = sum(p.nbytes for p in network.parameters())
    return (count.peak + 2 * own) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-t", type=int, default=2, help="threads")
    parser.add_argument("-o", type=Path, default=None, help="where to write the JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.t)
    torch.manual_seed(0)
    rows = []
    for changed in SETTINGS:
        setting = PLAIN | changed
        row = setting | term_memory(**setting)
        rows.append(row)
        print(
            f"B={row['batch']} {row['side']}^3 K={row['clicks']} F={row['classes']} {row['precision']}, "
            f"{row['generalists']} generalists: weights {row['weights_mib']:.0f} MiB, handed in "
            f"{row['given_mib']:.0f}, term {row['term_mib']:.0f}, together {row['total_mib']:.0f} MiB",
            flush=True,
        )
    trained = {name: specialist_memory(name, 4, 128) for name in ("vnet", "unet3d")}
    for name, mib in trained.items():
        print(f"{name}, 4 patches of 128^3, float32: {mib:.0f} MiB")
    need = rows[0]["total_mib"] + max(trained.values())
    met = "met" if need < CARD else "NOT MET"
    print(
        f"B=2, 128^3, K=6: the term {rows[0]['total_mib'] / 1024:.2f} GiB, with the larger specialist "
        f"{need / 1024:.2f} GiB ({met}: < 16 GiB)"
    )
    if options.o:
        write_json(options.o, {"machine": machine(), "rows": rows, "specialists_mib": trained})


if __name__ == "__main__":
    main()
