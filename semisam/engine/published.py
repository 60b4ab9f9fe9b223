# SPDX-License-Identifier: Apache-2.0
"""The one door to labels of unlabeled scans: for D-01 of the leaky reference, and for nothing else.

Batches have no place for such labels, and a split takes their paths away. `LeakedLabels` finds them again and
cuts them as the patches were cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from semisam.engine.cases import CaseSet, Split
from semisam.engine.config import Config
from semisam.engine.preprocess import Preprocessing
from semisam.engine.sampling import PatchSource
from semisam.engine.setup import TrainingError

__all__ = ["LeakedLabels"]


class LeakedLabels:
    """Labels of the unlabeled patches of a run, by sample ids: `labels(ids)` gives [B, *patch] uint8.

    Raises TrainingError if an unlabeled case has no label file.

    >>> import tempfile
    >>> from semisam.engine import cases, config, published
    >>> from semisam.engine.phantom import write_phantoms
    >>> from semisam.engine.preprocess import Preprocessing
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=3, unlabeled=0, test=0, shape=(20, 20, 20))
    >>> made = config.load(settings=[("train.patch_size", [16, 16, 16]), ("data.labeled", 1)])
    >>> found = cases.find_cases(root)
    >>> labels = published.LeakedLabels(made, found, cases.split(found, made.data), Preprocessing())
    >>> labels([2, 3]).shape
    (2, 16, 16, 16)
    """

    def __init__(self, config: Config, case_set: CaseSet, split: Split, preprocessing: Preprocessing) -> None:
        everything = {c.id: c for c in (*case_set.cases, *case_set.validation, *case_set.test)}
        cases = [everything[case.id] for case in split.unlabeled]
        missing = [case.id for case in cases if not case.labeled]
        if missing:
            raise TrainingError(
                f"term.options.defects: D-01 takes its clicks from labels of unlabeled scans, but "
                f"{', '.join(missing[:3])} has none; train without D-01"
            )
        self._batch = config.train.batch_size
        self._source = PatchSource(
            replace(split, unlabeled=cases), preprocessing, config.train, config.data, split.num_classes
        )

    def __call__(self, ids: Sequence[int]) -> Any:
        """Return the labels of the patches with these sample ids (slot + batch size x batch number)."""
        made = [self._source.patch(*divmod(int(number), self._batch))[1] for number in ids]
        return np.stack([label for label in made if label is not None])
