# SPDX-License-Identifier: Apache-2.0
"""The gate of the generalist's term (do no harm): who may teach, judged by labeled scans.

Candidates are the prompt mask itself ("mask"), its largest components ("largest_component"), every
generalist, by its name, and generalists together ("a + b"). `Gate` keeps their scores and says what each
generalist contributes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from semisam import masks, ops
from semisam.fusion import Reliability

__all__ = ["LARGEST", "MASK", "Gate", "doubt_of", "largest_components", "sets_of"]

MASK, LARGEST = "mask", "largest_component"
ALL_SETS = 4  # up to so many generalists every set of them is a candidate
T90 = (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372)
"""One-sided 90 % points of Student's t for 1, 2, ... degrees of freedom; 1.282 for very many."""


def largest_components(labels: Any, num_classes: int) -> Any:
    """Return the label map in which every foreground class keeps its largest component alone.

    `labels` is [B, *S] (2-D or 3-D, classes 0..num_classes-1, any integer dtype); the result is uint8, the
    same kind of array. What is taken away becomes background. Components are 26- or 8-connected.

    >>> import numpy as np
    >>> from semisam.gate import largest_components
    >>> largest_components(np.array([[[1, 1, 0, 1, 2]]]), 3).tolist()
    [[[1, 1, 0, 0, 2]]]
    """
    kept: Any = 0
    for c in range(1, num_classes):
        found = masks.largest_component(labels == c, spatial_dims=labels.ndim - 1)
        kept = kept + c * (found.byte() if ops.is_torch(found) else found.astype(np.uint8))
    return kept


def sets_of(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the sets of two or more generalists that are candidates: "a + b" -> positions in `names`.

    All sets of up to 4 generalists; of more, the pairs and all of them together.

    >>> from semisam.gate import sets_of
    >>> sets_of(["a", "b", "c"])
    {'a + b': (0, 1), 'a + c': (0, 2), 'b + c': (1, 2), 'a + b + c': (0, 1, 2)}
    >>> len(sets_of("abcdef")), sets_of(["alone"])
    (16, {})
    """
    n = len(names)
    sizes = range(2, n + 1) if n <= ALL_SETS else (2, n)
    members = (m for size in sizes for m in itertools.combinations(range(n), size))
    return {" + ".join(names[g] for g in m): m for m in members}


def doubt_of(gains: Sequence[float]) -> float:
    """Return how large the mean of some gains must be to be more than chance: a one-sided t test at 90 %.

    `gains` has one number per scan; with a single one nothing can be said: infinity.

    >>> from semisam.gate import doubt_of
    >>> round(doubt_of([0.01, 0.03]), 4), round(doubt_of([0.01, 0.03] * 4), 4), doubt_of([0.1])
    (0.0308, 0.0053, inf)
    """
    n = len(gains)
    if n < 2:
        return float("inf")
    return T90[min(n - 1, len(T90)) - 1] * float(np.std(gains, ddof=1)) / math.sqrt(n)


class Gate:
    """Scores of all candidates, and from them what each generalist contributes to the term.

    The candidate with the best mean Dice is the source, and whoever comes later in this order must be
    strictly better: mask, largest component, each generalist, sets of them; a set by more than its `doubt`
    (`doubt_of` its gains over the best member), because held-out scans are few. `choice` says it for
    every generalist: its own output (its name) if it is the best or in the best set, `LARGEST`, or nothing
    (`MASK`: the prompt alone, or others without it, are better). So several generalists are never worse on
    the held-out scans than the best one. Without any score every generalist is used as it is. `reliability`
    holds one score per generalist: its own if it teaches, else that of what was better.

    >>> from semisam.gate import Gate
    >>> gate = Gate(["random-walker"])
    >>> gate.choice
    {'random-walker': 'random-walker'}
    >>> gate.start({"mask": [0.6], "largest_component": [0.7], "random-walker": [0.65]})
    >>> gate.choice, gate.reliability.scores.tolist()
    ({'random-walker': 'largest_component'}, [0.7])
    >>> pair = Gate(["a", "b"])
    >>> pair.start({"mask": [0.6], "largest_component": [0.7], "a": [0.8], "b": [0.75], "a + b": [0.78]})
    >>> pair.best, pair.choice
    ('a', {'a': 'a', 'b': 'mask'})
    """

    def __init__(self, names: Sequence[str], momentum: float = 0.9, start: float = 0.5) -> None:
        """Begin without scores; `names` are the generalists'."""
        self.names = list(names)
        self.momentum = momentum
        self.scores: dict[str, list[float]] = {}  # Dice per foreground class
        self.doubt: dict[str, float] = {}  # of sets: how much they must gain
        self.best: str | None = None
        self.choice = {name: name for name in self.names}
        self.reliability = Reliability(len(self.names), momentum, start)

    def start(self, scores: Mapping[str, Sequence[float]], doubt: Mapping[str, float] | None = None) -> None:
        """Take held-out scores (Dice per foreground class of every candidate) as the beginning."""
        self.doubt = dict(doubt or {})
        self.scores = {name: [float(v) for v in values] for name, values in scores.items()}
        self._decide()
        for g, name in enumerate(self.names):
            self.reliability.scores[g] = self._worth(name, self.scores)

    def update(
        self,
        scores: Mapping[str, Sequence[float]],
        *,
        held_out: bool,
        doubt: Mapping[str, float] | None = None,
    ) -> None:
        """Let new scores in slowly: score <- momentum score + (1 - momentum) new.

        Only scores of predictions that did not train on these scans (`held_out`) may change a choice: on
        scans it has learned by heart, a specialist's mask beats every generalist. The others change
        `reliability`, of which only ratios between generalists are used.
        """
        if held_out and not self.scores:
            self.start(scores, doubt)
            return
        if held_out:
            m = self.momentum
            for name, old in self.scores.items():
                new = scores[name]
                self.scores[name] = [m * a + (1 - m) * float(b) for a, b in zip(old, new, strict=True)]
            for name, error in (doubt or {}).items():
                self.doubt[name] = m * self.doubt.get(name, error) + (1 - m) * error
            self._decide()
        for g, name in enumerate(self.names):
            self.reliability.update(g, self._worth(name, scores))

    def _worth(self, name: str, scores: Mapping[str, Sequence[float]]) -> float:
        return float(np.mean(scores[self.choice[name]]))

    def _decide(self) -> None:
        mean = {name: float(np.mean(values)) for name, values in self.scores.items()}
        sets = sets_of(self.names)
        best = MASK
        for candidate in (LARGEST, *self.names, *(name for name in sets if name in mean)):
            gain = mean[candidate] - mean[best]
            best = candidate if gain > self.doubt.get(candidate, 0.0) else best
        self.best = best
        teaching = {self.names[g] for g in sets[best]} if best in sets else {best}
        other = LARGEST if best == LARGEST else MASK
        self.choice = {name: name if name in teaching else other for name in self.names}

    def report(self) -> dict[str, Any]:
        """Return scores, choices and reliabilities as plain Python values."""
        return {
            "scores": {name: float(np.mean(values)) for name, values in self.scores.items()},
            "per_class": {name: list(values) for name, values in self.scores.items()},
            "best": self.best,
            "choice": dict(self.choice),
            "reliability": dict(zip(self.names, self.reliability.scores.tolist(), strict=True)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes, as plain Python values."""
        return {
            "names": list(self.names),
            "scores": {name: list(values) for name, values in self.scores.items()},
            "doubt": dict(self.doubt),
            "best": self.best,
            "choice": dict(self.choice),
            "reliability": self.reliability.scores.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; ValueError for one of other generalists."""
        if list(state["names"]) != self.names:
            raise ValueError(
                f"load_state_dict(): state: expected generalists {self.names}, got {list(state['names'])}"
            )
        self.scores = {name: [float(v) for v in values] for name, values in state["scores"].items()}
        self.doubt = dict(state.get("doubt", {}))
        self.best = state.get("best")
        self.choice = dict(state["choice"])
        self.reliability.scores = np.array(state["reliability"], np.float64)
