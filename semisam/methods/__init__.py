# SPDX-License-Identifier: Apache-2.0
"""Training methods, one small object each; `build` makes one by name.

A method turns a batch into weighted loss terms (`losses`), follows the optimiser's step (`after_step`)
and may have a teacher. The prefix "semisam-" adds a generalist's term to a method.
"""

from __future__ import annotations

import difflib
from typing import Any

from semisam.methods.base import Batch, Method, PseudoLabel
from semisam.methods.dan import DeepAdversarial
from semisam.methods.mean_teacher import MeanTeacher
from semisam.methods.uamt import UncertaintyAwareMeanTeacher

__all__ = [
    "METHODS",
    "Batch",
    "DeepAdversarial",
    "MeanTeacher",
    "Method",
    "PseudoLabel",
    "UncertaintyAwareMeanTeacher",
    "build",
    "canonical_name",
    "needs_term",
    "needs_unlabeled",
]

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Method, MeanTeacher, UncertaintyAwareMeanTeacher, DeepAdversarial)
}
"""Every method by its name."""

ALIASES = {"mt": "mean-teacher", "uamt": "ua-mt"}
PREFIX = "semisam-"


def canonical_name(name: str) -> str:
    """Return a method's full name: mt, uamt and semisam-mt are short for longer ones.

    Raises ValueError for an unknown name.

    >>> from semisam import methods
    >>> methods.canonical_name("semisam-mt"), methods.canonical_name("uamt")
    ('semisam-mean-teacher', 'ua-mt')
    >>> methods.canonical_name("mean-techer")
    Traceback (most recent call last):
    ValueError: method.name: expected one of supervised, ... got 'mean-techer'; did you mean 'mean-teacher'?
    """
    prefix = PREFIX if name.startswith(PREFIX) else ""
    base = name.removeprefix(PREFIX)
    base = ALIASES.get(base, base)
    names = [*METHODS, *(PREFIX + n for n, m in METHODS.items() if m.uses_unlabeled)]
    if prefix + base not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method.name: expected one of {', '.join(names)}, got {name!r}{hint}")
    return prefix + base


def needs_term(name: str) -> bool:
    """Return whether the method of this name takes a generalist's term.

    >>> from semisam import methods
    >>> methods.needs_term("semisam-mt"), methods.needs_term("mt")
    (True, False)
    """
    return canonical_name(name).startswith(PREFIX)


def needs_unlabeled(name: str) -> bool:
    """Return whether the method of this name learns from unlabeled images.

    >>> from semisam import methods
    >>> methods.needs_unlabeled("mt"), methods.needs_unlabeled("supervised")
    (True, False)
    """
    return METHODS[canonical_name(name).removeprefix(PREFIX)].uses_unlabeled


def build(
    config: Any,
    student: Any,
    *,
    num_classes: int,
    total_steps: int,
    seed: int = 0,
    term: Any = None,
    channels: int = 1,
    spatial_dims: int = 3,
) -> Method:
    """Return the method `config.name`: supervised, mean-teacher, ua-mt, dan, or semisam-* of the last three.

    `config` is a `MethodConfig`; `student` the network for images of `channels` channels and `spatial_dims`
    axes, `total_steps` the length of the training in optimiser's steps.
    `term(images_u, logits_u, teacher_probs, step=, sample_ids=, spacing=)` gives the weighted loss of a
    generalist and is needed by, and only by, semisam-*. A teacher is a copy of the student as it is now.

    Raises ValueError for an unknown name, options out of range, and a term that is missing or too much.

    >>> import torch
    >>> from semisam import methods
    >>> from semisam.engine.config import MethodConfig
    >>> method = methods.build(MethodConfig("uamt"), torch.nn.Conv2d(1, 2, 1), num_classes=2, total_steps=9)
    >>> method.name, method.terms
    ('ua-mt', ('ce', 'dice', 'consistency'))
    """
    name = canonical_name(config.name)
    if needs_term(name) != (term is not None):
        expected = "a SemiSAMTerm" if term is None else "None (the name has no 'semisam-')"
        raise ValueError(f"build(): term: expected {expected} for the method {name!r}, got {term}")
    method = METHODS[name.removeprefix(PREFIX)]
    return method(
        config,
        student,
        num_classes=num_classes,
        total_steps=total_steps,
        seed=seed,
        term=term,
        channels=channels,
        spatial_dims=spatial_dims,
    )
