# SPDX-License-Identifier: Apache-2.0
"""The terms of somebody else's weights, said once per process."""

from __future__ import annotations

import sys

from semisam.generalists.protocol import GeneralistSpec

__all__ = ["tell"]

_told: set[str] = set()


def tell(spec: GeneralistSpec) -> None:
    """Write a generalist's licence to standard error, the first time that it is asked for.

    >>> from semisam.generalists import licences
    >>> from semisam.generalists.random_walker import RandomWalker
    >>> licences.tell(RandomWalker.spec)
    """
    if spec.name not in _told:
        _told.add(spec.name)
        print(
            f"{spec.name}: licence of the weights: {spec.licence or 'not stated'}",
            file=sys.stderr,
            flush=True,
        )
