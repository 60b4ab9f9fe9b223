# SPDX-License-Identifier: Apache-2.0
"""Scans for the gate of the generalist's term: predictions of specialists that did not train on them.

Before training, short supervised runs each leave one labeled patient out and predict it; with a single
labeled patient, a disturbed copy of its scans takes that part. The term scores its candidates on these
predictions (`calibrate`) and decides who may teach. Paper: SemiSAM+ (arXiv 2502.20749) for reliability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from semisam import methods, specialists
from semisam.engine import inference
from semisam.engine.cases import Case, Split, read_image, read_label
from semisam.engine.checkpoint import network_of
from semisam.engine.config import Config
from semisam.engine.position import PositionPrior
from semisam.engine.preprocess import Preprocessing
from semisam.engine.sampling import PatchSource
from semisam.engine.stepper import Stepper
from semisam.methods.base import random_key

__all__ = ["HeldOut", "choose", "disturbed", "gate_steps", "held_out", "sentence", "source_label"]

FOLDS = 4
COPIES = 2
MOST_CASES = 8
"""Scans per fold at most: slices of a patient are many, and near ones look alike."""


@dataclass
class HeldOut:
    """A labeled scan as the network sees it, and the prediction of a network that did not see it.

    >>> import numpy as np
    >>> from semisam.engine.gate import HeldOut
    >>> image, half = np.zeros((1, 8, 8), np.float32), np.full((2, 8, 8), 0.5, np.float32)
    >>> HeldOut(image, half, np.zeros((8, 8), np.uint8), None, "scan_01").case
    'scan_01'
    """

    image: Any  # [channels, *S] float32
    probability: Any  # [C, *S] float32
    label: Any  # [*S] uint8, 255: ignored
    spacing: tuple[float, ...] | None
    case: str
    sharpened: Any = None  # `probability` with a position prior of the other labeled scans


def gate_steps(config: Config) -> int:
    """Return the length of each short run: `term.gate_steps`, or a tenth of the training's steps.

    After a first stage it is half of that stage at least: who is to teach will be prompted by its network,
    and is judged too badly by predictions that are much worse.

    >>> from semisam.engine import config, gate
    >>> gate.gate_steps(config.load(settings=[("train.steps", 2000)]))
    200
    """
    return config.term.gate_steps or max(config.train.steps // 10, config.term.first_stage // 2, 1)


def held_out(
    config: Config,
    split: Split,
    preprocessing: Preprocessing,
    meta: dict[str, Any],
    fabric: Any,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[HeldOut]:
    """Yield up to 4 folds' held-out scans with their predictions, the same in every run with these settings.

    All ranks of `fabric` train the short runs together. `tick` is called after every step and may raise
    to stop. Raises what training raises.

    >>> import tempfile
    >>> from semisam.engine import cases, config, gate, stepper
    >>> from semisam.engine.phantom import write_phantoms
    >>> from semisam.engine.preprocess import Preprocessing
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=2, unlabeled=0, test=0, shape=(16, 16, 16))
    >>> made = config.load(settings=[("train.patch_size", [16, 16, 16]), ("term.gate_steps", 1),
    ...                              ("specialist.options", {"channels": [4, 8]}), ("train.device", "cpu")])
    >>> split = cases.split(cases.find_cases(root), made.data)
    >>> meta = {"channels": 1, "num_classes": 2}
    >>> scans = gate.held_out(made, split, Preprocessing(), meta, stepper.fabric_for(made.train))
    >>> [scan.probability.shape for scan in scans]
    [(2, 16, 16, 16), (2, 16, 16, 16)]
    """
    patients: dict[str, list[Case]] = {}
    for case in split.labeled:
        patients.setdefault(case.group or case.id, []).append(case)
    alone = len(patients) == 1
    chosen = list(patients)[:FOLDS]
    for fold, patient in enumerate(chosen):
        rest = [c for name, cases in patients.items() if alone or name != patient for c in cases]
        network = _short_run(config, replace(split, labeled=rest), preprocessing, meta, fabric, fold, tick)
        cases = patients[patient]
        prior = None
        if config.term.offline and config.term.position_prior and not alone:
            labels = [source_label(config, preprocessing, c) for c in rest]
            prior = PositionPrior(labels, meta["num_classes"], strength=config.term.position_prior)
        for case in cases[:: -(-len(cases) // MOST_CASES)]:
            prepared = preprocessing.prepare(read_image(case))
            label = preprocessing.prepare_label(read_label(case, config.data.label_map), prepared)
            for copy in range(COPIES if alone else 1):
                image, truth = prepared.image, label
                if alone:
                    key = random_key(config.train.seed, fold, copy)
                    image, truth = disturbed(image, label, np.random.default_rng(key))
                with fabric.autocast():
                    probability = inference.sliding_window(network, image, config.train.patch_size)
                more = None if prior is None else prior.sharpen(probability)
                yield HeldOut(image, probability, truth, prepared.spacing, case.id, more)


def source_label(config: Config, preprocessing: Preprocessing, case: Case) -> Any:
    """Return the label of a labeled case on the grid that the network sees, [*S'] uint8.

    >>> import tempfile
    >>> from semisam.engine import cases, config, gate
    >>> from semisam.engine.phantom import write_phantoms
    >>> from semisam.engine.preprocess import Preprocessing
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=0, test=0, shape=(16, 16, 16))
    >>> gate.source_label(config.Config(), Preprocessing(), cases.find_cases(root).cases[0]).shape
    (16, 16, 16)
    """
    label = read_label(case, config.data.label_map)
    return preprocessing.prepare_label(label, preprocessing.prepare(read_image(case)))


def choose(term: Any, scans: Sequence[HeldOut], *, device: Any = None) -> dict[str, Any]:
    """Let the term choose its source on held-out scans, and return what `SemiSAMTerm.calibrate` found.

    Where scans come with a position prior, too, it is used if the best candidate is better with it than
    without; "position_prior" says so, and "without_prior" or "with_prior" has the other's scores. The
    generalists are asked on `device` (default: the CPU, where the scans are), scan by scan.

    >>> import numpy as np
    >>> from semisam.engine import gate
    >>> from semisam.term import SemiSAMTerm
    >>> label = np.zeros((32, 32), np.uint8)
    >>> label[8:24, 8:24] = 1
    >>> sure = np.stack([1 - label, label]).astype(np.float32)
    >>> scan = gate.HeldOut(sure[1:], np.roll(sure, 6, 1), label, None, "a", sharpened=sure)
    >>> found = gate.choose(SemiSAMTerm(total_steps=10), [scan])
    >>> found["position_prior"], found["choice"]
    (True, {'random-walker': 'mask'})
    """
    known = all(scan.spacing for scan in scans)
    spacing = [scan.spacing for scan in scans] if known else None
    images, labels = [scan.image for scan in scans], [scan.label for scan in scans]
    plain = [scan.probability for scan in scans]
    if any(scan.sharpened is None for scan in scans):
        return {**term.calibrate(images, plain, labels, spacing, device=device), "position_prior": False}
    state = term.state_dict()
    sharp = term.calibrate(images, [scan.sharpened for scan in scans], labels, spacing, device=device)
    after = term.state_dict()
    term.load_state_dict(state)
    found = term.calibrate(images, plain, labels, spacing, device=device)
    if max(sharp["scores"].values()) > max(found["scores"].values()):
        term.load_state_dict(after)
        return {**sharp, "position_prior": True, "without_prior": found["scores"]}
    return {**found, "position_prior": False, "with_prior": sharp["scores"]}


def _short_run(
    config: Config,
    split: Split,
    preprocessing: Preprocessing,
    meta: dict[str, Any],
    fabric: Any,
    fold: int,
    tick: Callable[[], None],
) -> torch.nn.Module:
    """A specialist, trained with labels alone."""
    steps = gate_steps(config)
    train = replace(config.train, steps=steps, seed=random_key(config.train.seed, fold) % 2**31)
    data = replace(config.data, workers=0)
    source = PatchSource(
        replace(split, unlabeled=[]),
        *(preprocessing, train, data, meta["num_classes"], fabric.global_rank, fabric.world_size),
    )
    torch.manual_seed(train.seed)
    network = network_of(config, meta)
    if config.specialist.weights:
        specialists.load_weights(network, config.specialist.weights)
    method = methods.build(
        replace(config.method, name="supervised"),
        network,
        num_classes=meta["num_classes"],
        total_steps=steps,
        seed=train.seed,
    )
    stepper = Stepper(fabric, train, method, steps)
    batches = source.loader(0)
    for step in range(steps):
        stepper.step(step, [next(batches) for _ in range(train.accumulate)])
        tick()
    return network


def disturbed(image: Any, label: Any, random: np.random.Generator, *, rotate: bool = True) -> tuple[Any, Any]:
    """Return an image [channels, *S] and its label [*S] as another scanner might have taken them.

    Rotation by up to 15 degrees in one plane (linear, labels by nearest neighbour), gamma 0.7..1.4, a smooth
    bias field of +-30 %, noise of a tenth of the standard deviation; then mean and deviation of every channel
    are what they were. `rotate=False` leaves the geometry, and so the label, alone.

    >>> import numpy as np
    >>> from semisam.engine.gate import disturbed
    >>> image = np.random.default_rng(0).random((1, 12, 12, 12), np.float32)
    >>> copy, label = disturbed(image, np.ones((12, 12, 12), np.uint8), np.random.default_rng(1))
    >>> copy.shape, str(copy.dtype), bool(abs(copy.mean() - image.mean()) < 1e-5)
    ((1, 12, 12, 12), 'float32', True)
    """
    from scipy import ndimage  # noqa: PLC0415

    image = np.asarray(image, np.float32)
    shape = image.shape[1:]
    if rotate:
        plane = tuple(random.permutation(len(shape))[:2].tolist())
        angle = random.uniform(-15, 15)
        options = {"angle": angle, "axes": plane, "reshape": False, "mode": "nearest"}
        turned = np.stack([ndimage.rotate(channel, order=1, **options) for channel in image])
        label = ndimage.rotate(label, order=0, **options)
    else:
        turned = image
    field = ndimage.zoom(random.standard_normal((3,) * len(shape)), [n / 3 for n in shape], order=1)
    bias = np.exp(0.3 * np.clip(field[tuple(slice(n) for n in shape)], -1, 1))
    gamma = np.exp(random.uniform(-0.35, 0.35))
    result = np.empty_like(image)
    for before, channel, after in zip(image, turned, result, strict=True):
        low, high = float(channel.min()), float(channel.max())
        span = max(high - low, 1e-6)
        value = np.clip((channel - low) / span, 0, 1) ** gamma * bias
        value = value + 0.1 * value.std() * random.standard_normal(shape)
        deviation = max(float(value.std()), 1e-6)
        after[...] = (value - value.mean()) / deviation * before.std() + before.mean()
    return result, label


def sentence(found: dict[str, Any]) -> str:
    """Return in words what `SemiSAMTerm.calibrate` found and chose.

    >>> from semisam.engine import gate
    >>> gate.sentence({"scores": {"mask": 0.71, "largest_component": 0.72, "walker": 0.76},
    ...                "choice": {"walker": "walker"}, "volumes": 2})
    'Dice on 2 held-out scans: mask 0.710, largest_component 0.720, walker 0.760; walker teaches'
    """
    scores = ", ".join(f"{name} {value:.3f}" for name, value in found["scores"].items())
    words = []
    for name, choice in found["choice"].items():
        if choice == name:
            words.append(f"{name} teaches")
        elif choice == "mask" and found.get("best", "mask") != "mask":
            words.append(f"{name} teaches nothing: {found['best']} is better without it")
        elif choice == "mask":
            words.append(f"{name} is not better than the specialist's own mask and teaches nothing")
        else:
            words.append(f"{choice.replace('_', ' ')} teaches in the place of {name}")
    volumes = found["volumes"]
    scans = "scan" if volumes == 1 else "scans"
    for key, word in (("without_prior", "without"), ("with_prior", "with")):
        if key in found:
            words.append(
                f"{word} the position prior it would have been {max(found[key].values()):.3f} at best"
            )
    return f"Dice on {volumes} held-out {scans}: {scores}; {'; '.join(words)}"
