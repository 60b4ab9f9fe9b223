# SPDX-License-Identifier: Apache-2.0
"""Generalists: promptable models that teach a specialist."""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any

from semisam import fetch
from semisam.generalists.protocol import Decoded, Generalist, GeneralistSpec

__all__ = ["GENERALISTS", "Decoded", "Generalist", "GeneralistSpec", "as_generalist", "build", "class_of"]

GENERALISTS: dict[str, str] = {
    "random-walker": "semisam.generalists.random_walker.RandomWalker",
    "sam-med3d": "semisam.generalists.sam_med3d.SamMed3D",
    "sam-med3d-turbo": "semisam.generalists.sam_med3d.SamMed3DTurbo",
    "segany-pet": "semisam.generalists.sam_med3d.SegAnyPET",
    "sam": "semisam.generalists.hf_sam.Sam",
    "sam2": "semisam.generalists.hf_sam.Sam2",
    "sam3": "semisam.generalists.hf_sam.Sam3",
    "medsam": "semisam.generalists.hf_sam.MedSam",
    "vista3d": "semisam.generalists.vista3d.Vista3D",
    "nninteractive": "semisam.generalists.nninteractive.NnInteractive",
}
"""Names that `build` knows, and where their classes are."""


def build(name: str, /, **options: Any) -> Any:
    """Make a generalist: a name of `GENERALISTS`, or the dotted path of something of yours.

    That is a class, or a function that makes a generalist (`options` go to either), or a function `(images,
    prompts) -> logits` (see `as_generalist`; `options` are those of `CallableGeneralist`). Raises ValueError
    for an unknown name (with the nearest known one) or a path that leads nowhere, TypeError for options that
    the class does not have and for a result that is no `Generalist`.

    A name whose weights are in `semisam.fetch.home()` needs no `checkpoint`.

    >>> from semisam import generalists
    >>> generalists.build("random-walker", gamma=0.1).spec.default_mode
    'mask'
    """
    maker = class_of(name)
    weights = getattr(getattr(maker, "spec", None), "weights", None)
    if name not in GENERALISTS or weights is None or options.keys() & _SOURCES:
        return _made(name, maker, options)
    found = fetch.find(name, weights)
    if found is not None:
        return _made(name, maker, {"checkpoint": found, **options})
    try:
        return _made(name, maker, options)
    except ValueError as error:
        raise ValueError(
            f"{error}; none is in {fetch.home() / name}, where `semisam fetch {name}` would put it"
        ) from None


def class_of(name: str) -> Any:
    """Return what a name of `GENERALISTS` or a dotted path stands for; the errors are those of `build`.

    >>> from semisam import generalists
    >>> generalists.class_of("random-walker").spec.spatial_dims
    (2, 3)
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
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it needs is not
        raise ValueError(f"build(): name: expected an importable path, got {name!r}: {error}") from None
    except AttributeError:
        raise ValueError(f"build(): name: {module} has no {attribute!r}, got {name!r}") from None


def _made(name: str, maker: Any, options: dict[str, Any]) -> Any:
    segments = not inspect.isclass(maker) and _takes_two(maker)
    made = as_generalist(maker, **options) if segments else maker(**options)
    if not isinstance(made, Generalist):
        raise TypeError(
            f"build(): name: expected something with spec, encode and decode (semisam.generalists."
            f"Generalist), got {type(made).__name__} from {name!r}"
        )
    return made


def as_generalist(thing: Any, **options: Any) -> Any:
    """Return `thing` if it is a generalist, or a function `(images, prompts) -> logits` as one.

    `options` are those of `semisam.generalists.callable.CallableGeneralist`. Raises TypeError for anything
    else, such as a class, and for a function that cannot be called with two arguments.

    >>> from semisam import generalists
    >>> def bright(images, prompts):
    ...     return (8 * (images - 0.5)).expand(-1, prompts.labels.shape[1], -1, -1)
    >>> generalists.as_generalist(bright, spatial_dims=(2,)).spec.name
    'bright'
    """
    if isinstance(thing, Generalist) and not inspect.isclass(thing):
        if options:
            raise TypeError(f"as_generalist(): options: expected none for a generalist, got {list(options)}")
        return thing
    if inspect.isclass(thing) or not _takes_two(thing, exactly=False):
        raise TypeError(
            f"as_generalist(): thing: expected a generalist or a function (images, prompts) -> logits, got "
            f"{thing!r}"
        )
    return importlib.import_module("semisam.generalists.callable").CallableGeneralist(thing, **options)


def _takes_two(function: Any, *, exactly: bool = True) -> bool:
    """Whether it can be called as (images, prompts); exactly: and with no fewer arguments than these two."""
    try:
        signature = inspect.signature(function)
        signature.bind(None, None)
    except TypeError:
        return False
    except ValueError:  # builtins without a signature
        return not exactly
    needed = [p for p in signature.parameters.values() if p.default is p.empty and p.kind in _POSITIONAL]
    return len(needed) == 2 or not exactly


_SOURCES = {"checkpoint", "network", "model", "session"}  # options that say where a model comes from
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
