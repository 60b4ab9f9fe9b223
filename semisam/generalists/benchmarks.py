# SPDX-License-Identifier: Apache-2.0
"""Common data sets, and which generalists have seen them in training.

A generalist that was trained on a data set, test scans perhaps included, cannot be judged there. Sources:
SAM-Med3D: `utils/data_paths.py` of its repository and, for turbo, its issue 2; VISTA3D:
`vista3d/data/datasets.py` of its repository. What no list was found for counts as not stated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from semisam.generalists.protocol import GeneralistSpec

__all__ = ["BENCHMARKS", "Overlap", "overlap", "recognise"]

BENCHMARKS: dict[str, tuple[str, str]] = {
    "LA": ("left atria in LGE-MRI, 2018 challenge", r"^la$|2018 ?la|la ?(2018|seg)|left ?atri|atria ?seg"),
    "ACDC": ("heart, cine MRI", r"acdc"),
    "Hippocampus": ("decathlon task 4", r"hippocampus"),
    "MSD Heart": ("decathlon task 2", r"task ?0*2\b|msd ?0*2|(msd|decathlon).*heart"),
    "MSD Prostate": ("decathlon task 5", r"task ?0*5\b|msd ?0*5|(msd|decathlon).*prostate"),
    "MSD Pancreas": ("decathlon task 7", r"task ?0*7\b|msd ?0*7|(msd|decathlon).*pancreas"),
    "MSD Spleen": ("decathlon task 9", r"task ?0*9\b|msd ?0*9|(msd|decathlon).*spleen"),
    "Pancreas-CT": ("NIH, 82 scans", r"pancreas ?ct|nih ?pancreas|tcia ?pancreas"),
    "BTCV": ("13 abdominal organs, CT", r"btcv|synapse|beyond the cranial"),
    "AMOS": ("15 abdominal organs, CT and MRI", r"amos"),
    "FLARE": ("abdominal organs, CT", r"flare"),
    "WORD": ("16 abdominal organs, CT", r"^word$|\bword ?v?\d|ct ?word"),
    "KiTS": ("kidney tumours, CT", r"kits"),
    "LiTS": ("liver tumours, CT; decathlon task 3", r"\blits\b|task ?0*3\b|msd ?0*3|(msd|decathlon).*liver"),
    "TotalSegmentator": ("104 structures, CT", r"total ?segmentator"),
    "BraTS": ("brain tumours, MRI; decathlon task 1", r"brats|brain ?tumou?r|task ?0*1\b"),
    "PROMISE12": ("prostate, MRI", r"promise ?12"),
    "Kvasir": ("polyps, endoscopy", r"kvasir"),
}
"""Names, what they are, and the pattern of folder and data set names, in lower case with single spaces."""


class Overlap(NamedTuple):
    """Whether a generalist was trained on a data set, and how.

    "yes"; "related": on scans of another name that may be in part the same; "no"; "not listed": a list of its
    training sets is published, and this one is not on it; "not stated": no list is known here.
    """

    state: str
    how: str = ""


def recognise(names: Iterable[str]) -> list[str]:
    """Return the benchmarks that names of folders or data sets stand for, the most telling pattern first.

    >>> from semisam.generalists.benchmarks import recognise
    >>> recognise(["Task04_Hippocampus"]), recognise(["2018LA_Seg_Training Set"]), recognise(["scans"])
    (['Hippocampus'], ['LA'], [])
    """
    plain = [re.sub(r"[^a-z0-9]+", " ", name.lower()).strip() for name in names]
    return [key for key, (_, pattern) in BENCHMARKS.items() if any(re.search(pattern, n) for n in plain)]


def overlap(spec: GeneralistSpec, benchmark: str) -> Overlap:
    """Return whether a generalist has seen a benchmark in training; KeyError for a name not in `BENCHMARKS`.

    >>> from semisam.generalists.benchmarks import overlap
    >>> from semisam.generalists.random_walker import RandomWalker
    >>> overlap(RandomWalker.spec, "LA")
    Overlap(state='no', how='it was not trained')
    """
    BENCHMARKS[benchmark]
    how = spec.overlaps.get(benchmark)
    if how is not None:
        related = how.removeprefix("related: ")
        return Overlap("yes" if how == related else "related", related)
    if spec.training_list == "none":
        return Overlap("no", "it was not trained")
    return Overlap("not listed" if spec.training_list == "published" else "not stated")
