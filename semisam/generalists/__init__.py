# SPDX-License-Identifier: Apache-2.0
"""Generalists: promptable models that teach a specialist."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from semisam.generalists.protocol import Decoded, Generalist, GeneralistSpec

__all__ = ["GENERALISTS", "Decoded", "Generalist", "GeneralistSpec", "build"]

GENERALISTS: dict[str, str] = {
    "random-walker": "semisam.generalists.random_walker.RandomWalker",
    "sam-med3d": "semisam.generalists.sam_med3d.SamMed3D",
    "sam-med3d-turbo": "semisam.generalists.sam_med3d.SamMed3DTurbo",
    "segany-pet": "semisam.generalists.sam_med3d.SegAnyPET",
    "sam": "semisam.generalists.hf_sam.Sam",
    "sam2": "semisam.generalists.hf_sam.Sam2",
    "sam3": "semisam.generalists.hf_sam.Sam3",
    "medsam": "semisam.generalists.hf_sam.MedSam",
}
"""Names that `build` knows, and where their classes are."""


def build(name: str, **options: Any) -> Any:
    """Make a generalist: a name of `GENERALISTS`, or the dotted path of a class or function of yours.

    `options` go to the class. Raises ValueError for an unknown name (with the nearest known one) or a path
    that leads nowhere, TypeError for options that the class does not have and for a result that is no
    `Generalist`.

    >>> from semisam import generalists
    >>> generalists.build("random-walker", gamma=0.1).spec.default_mode
    'mask'
    """
    path = GENERALISTS.get(name, name)
    module, _, attribute = path.replace(":", ".").rpartition(".")
    if not module:
        near = difflib.get_close_matches(name, GENERALISTS, 1)
        raise ValueError(
            f"build(): name: expected one of {', '.join(GENERALISTS)} or a dotted path such as "
            f"package.module.Class, got {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    try:
        maker = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it needs is not
        raise ValueError(f"build(): name: expected an importable path, got {name!r}: {error}") from None
    except AttributeError:
        raise ValueError(f"build(): name: {module} has no {attribute!r}, got {name!r}") from None
    made = maker(**options)
    if not isinstance(made, Generalist):
        raise TypeError(
            f"build(): name: expected something with spec, encode and decode (semisam.generalists."
            f"Generalist), got {type(made).__name__} from {name!r}"
        )
    return made
