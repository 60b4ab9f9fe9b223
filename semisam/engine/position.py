# SPDX-License-Identifier: Apache-2.0
"""A position prior from the labeled scans: where an organ lies in a scan, and how large it is.

    s_c = mean over labeled scans of the signed distance to class c (voxels, positive inside), on one grid
    a_c = exp(s_c / tau) / (1 + sum_k exp(s_k / tau))        background: 1 / (the same)
    p   ~ q a^strength, the teacher's prediction of a whole scan made sharper by what is known anyway

Scans are laid over one another by their extents, so that it helps where all show the same field of view and
says little elsewhere. Paper for means of signed distances: Leventon, Grimson, Faugeras (CVPR 2000).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from semisam import masks
from semisam.engine.preprocess import resized

__all__ = ["PositionPrior"]

FLOOR = 0.01  # of a class's prior: a place where no labeled scan has it is unlikely, not impossible


class PositionPrior:
    """The mean place of every class in labeled scans.

    `labels` are arrays [*S_i] of whole labeled scans (shapes may differ; values beyond the classes, as 255,
    are background), `tau` is the width of the border in voxels. Raises ValueError without any label.

    >>> import numpy as np
    >>> from semisam.engine.position import PositionPrior
    >>> label = np.zeros((16, 16), np.uint8)
    >>> label[4:12, 4:12] = 1
    >>> prior = PositionPrior([label, np.roll(label, 1, 0)], num_classes=2)
    >>> prior.at((32, 32)).shape, bool(prior.at((16, 16))[1, 8, 8] > 0.8)
    ((2, 32, 32), True)
    >>> unsure = np.full((2, 16, 16), 0.5, np.float32)
    >>> bool(prior.sharpen(unsure)[1, 8, 8] > 0.8), bool(prior.sharpen(unsure)[1, 0, 0] < 0.1)
    (True, True)
    """

    def __init__(
        self, labels: Sequence[Any], num_classes: int, *, strength: float = 1.0, tau: float = 1.5
    ) -> None:
        if not len(labels):
            raise ValueError("PositionPrior(): labels: expected at least one labeled scan, got none")
        self.strength, self.tau = strength, tau
        grid = tuple(int(n) for n in np.median([label.shape for label in labels], axis=0))
        self.distance = np.mean([_signed(label, num_classes, grid) for label in labels], axis=0)

    def at(self, shape: Sequence[int]) -> Any:
        """Return the prior [C, *S] for scans of a shape, float32; it sums to 1 over the classes."""
        s = np.clip(resized(self.distance.astype(np.float32), shape, 1) / self.tau, -30, 30)
        e = np.exp(np.concatenate([np.zeros_like(s[:1]), s]))
        return (e / e.sum(0)).astype(np.float32)

    def sharpen(self, prob: Any) -> Any:
        """Return `prob` [C, *S] times the prior to the power of `strength`, made a distribution again."""
        prior = np.maximum(self.at(prob.shape[1:]), FLOOR)
        made = np.maximum(np.asarray(prob, np.float32), 1e-4) * prior**self.strength
        return made / made.sum(0)


def _signed(label: Any, num_classes: int, grid: tuple[int, ...]) -> Any:
    """Signed distances [F, *grid] of the foreground classes, in voxels; far outside where there is none."""
    rows = []
    for c in range(1, num_classes):
        inside = np.ascontiguousarray(label == c)
        options: dict[str, Any] = {"border": False, "spatial_dims": label.ndim}
        if not inside.any():
            rows.append(np.full(label.shape, -float(max(label.shape)), np.float32))
            continue
        within = masks.edt(inside, **options) if not inside.all() else np.full(label.shape, 30.0, np.float32)
        rows.append(within - masks.edt(~inside, **options))
    return resized(np.stack(rows).astype(np.float32), grid, 1)
