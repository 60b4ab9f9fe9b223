# SPDX-License-Identifier: Apache-2.0
"""Find the cases of a folder, decide which may show their label, read and write them.

Three layouts are known: `nnunet` (nnU-Net and decathlon folders of NIfTI, PNG or JPEG files), `h5` (the
lists of UA-MT and SSL4MIS) and `images` (2-D images + masks). A case is a few paths; nothing of it is
read before `read_image` or `read_label` is called, and `split` takes the label's path away from every
case that is to be unlabeled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from semisam.engine.config import DataConfig
from semisam.engine.scans import (
    H5,
    IGNORE,
    NIFTI,
    PICTURES,
    Case,
    CaseError,
    Header,
    Problem,
    Volume,
    complete_map,
    is_grey,
    read_header,
    read_image,
    read_label,
    read_label_header,
    stem_of,
    suffix_of,
    write_label,
    write_map,
)

__all__ = [
    "IGNORE",
    "LAYOUTS",
    "Case",
    "CaseError",
    "CaseSet",
    "Header",
    "Problem",
    "Split",
    "Volume",
    "find_cases",
    "read_header",
    "read_image",
    "read_label",
    "read_label_header",
    "scan_folder",
    "split",
    "write_label",
    "write_map",
]

LAYOUTS = ("nnunet", "h5", "images")
FOUR_DIGITS = re.compile(r"^(?P<id>.+)_(?P<channel>\d{4})$")


@dataclass
class CaseSet:
    """What a folder holds: the training pool, and test and validation cases where it names them.

    `label_names` is what the folder says about label values; it is empty where nothing does, and
    `Split.class_names` is then found in the labels of the cases that may show them.
    """

    cases: list[Case]
    test: list[Case]
    validation: list[Case]
    label_names: dict[int, str]
    spatial_dims: int
    channels: int
    layout: str
    root: Path

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label value, background first; empty where the folder does not name 0, 1, 2, ..."""
        values = range(len(self.label_names))
        return tuple(self.label_names[i] for i in values) if set(values) == set(self.label_names) else ()


@dataclass
class Split:
    """Which case plays which role; no case of `unlabeled` knows where its label is."""

    labeled: list[Case]
    unlabeled: list[Case]
    validation: list[Case] = field(default_factory=list)
    test: list[Case] = field(default_factory=list)
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes with the background."""
        return len(self.class_names)

    def ids(self) -> dict[str, list[str]]:
        """The ids by role; given to `DataConfig` as lists they make the same split again."""
        roles = ("labeled", "unlabeled", "validation", "test")
        return {role: [case.id for case in getattr(self, role)] for role in roles}


# ---- finding ------------------------------------------------------------------------------------


def find_cases(root: str | Path, layout: str = "auto") -> CaseSet:
    """Return the cases of a folder without opening any label.

    `layout` is "nnunet" (imagesTr, labelsTr, optional imagesTs, labelsTs, imagesUn, dataset.json; a channel
    suffix `_0000` is optional; a case without label file is unlabeled), "h5" (`train.list` or
    `train_slices.list`, optional `val.list` and `test.list`, files found by name in any sub-folder),
    "images" (`images/` and `masks/`, paired by file name without suffix) or "auto". Unlabeled `imagesTs` are
    left out.

    Raises CaseError that lists everything that does not fit together: files that are listed and not there,
    labels without image, two files for one case, missing channels.

    >>> import tempfile
    >>> from semisam.engine.cases import find_cases
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=2, test=1, shape=(16, 16, 16))
    >>> found = find_cases(root)
    >>> [case.labeled for case in found.cases], len(found.test), found.class_names
    ([True, False, False], 1, ('background', 'organ'))
    """
    found, problems = scan_folder(root, layout)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        lines = "\n".join(f"  {problem}" for problem in errors[:20])
        more = f"\n  and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise CaseError(
            f"{root}: {len(errors)} problem(s) ('semisam check' shows all):\n{lines}{more}", errors
        )
    return found


def scan_folder(root: str | Path, layout: str = "auto") -> tuple[CaseSet, list[Problem]]:
    """Return the cases of a folder and what does not fit together, without raising for the latter.

    Raises CaseError if the folder is not there or has none of the layouts.

    >>> from semisam.engine.cases import CaseError, scan_folder
    >>> try:
    ...     scan_folder("no/such/folder")
    ... except CaseError as error:
    ...     print(error)
    root: expected a folder, got no/such/folder
    """
    folder = Path(root)
    if not folder.is_dir():
        raise CaseError(f"root: expected a folder, got {root}")
    if layout not in ("auto", *LAYOUTS):
        raise CaseError(f"layout: expected auto, {', '.join(LAYOUTS)}, got {layout!r}")
    chosen = _layout_of(folder) if layout == "auto" else layout
    problems: list[Problem] = []
    found = {"nnunet": _scan_nnunet, "h5": _scan_h5, "images": _scan_pictures}[chosen](folder, problems)
    if not (found.cases or found.test or found.validation or problems):
        raise CaseError(f"{folder}: no case found in layout {chosen}")
    return found, problems


def _layout_of(root: Path) -> str:
    marks = {
        "nnunet": ("imagesTr",),
        "h5": ("train_slices.list", "train.list"),
        "images": ("images",),
    }
    for layout, names in marks.items():
        if any((root / name).exists() for name in names):
            return layout
    wanted = "; ".join(f"{' or '.join(names)} ({layout})" for layout, names in marks.items())
    raise CaseError(f"{root}: no known layout: expected to find {wanted}")


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which 2 comes before 10."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


def _files(folder: Path, known: Sequence[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [
        p for p in folder.iterdir() if not p.name.startswith(".") and suffix_of(p, known) and p.is_file()
    ]
    return sorted(found, key=lambda p: natural(p.name))


def _group(identifier: str) -> str:
    return re.sub(r"_frame_?\d+$", "", re.sub(r"_slice_?\d+$", "", identifier)) or identifier


def _by_stem(
    files: Iterable[Path], known: Sequence[str], what: str, problems: list[Problem]
) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files:
        stem = stem_of(path, known)
        if stem in found:
            message = f"two {what} files for one case: {found[stem].name} and {path.name}"
            problems.append(Problem(stem, "duplicate", "error", message))
        else:
            found[stem] = path
    return found


def _dataset_json(root: Path, problems: list[Problem]) -> dict[str, Any]:
    path = root / "dataset.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        reason = "expected an object at its top"
    except (OSError, ValueError) as error:
        reason = str(error)
    problems.append(Problem("dataset.json", "dataset", "error", f"cannot be read: {reason}"))
    return {}


def _label_names(content: dict[str, Any], problems: list[Problem]) -> dict[int, str]:
    """Names by value, from {"0": "background"} (decathlon) or {"background": 0} (nnU-Net)."""
    names: dict[int, str] = {}
    labels = content.get("labels", {})
    for key, value in labels.items() if isinstance(labels, dict) else ():
        if isinstance(value, list):
            message = f"label {key!r} is a region {value}: give every class one number"
            problems.append(Problem("dataset.json", "dataset", "error", message))
        elif str(key).isdigit() and not (isinstance(value, int) or str(value).isdigit()):
            names[int(key)] = str(value)
        elif str(value).isdigit():
            names[int(value)] = str(key)
        else:
            message = f"labels: expected a name and a number, got {key!r}: {value!r}"
            problems.append(Problem("dataset.json", "dataset", "error", message))
    return dict(sorted(names.items()))


def _channels_named(content: dict[str, Any]) -> int | None:
    named = content.get("channel_names") or content.get("modality")
    return len(named) if isinstance(named, dict) and named else None


def _group_channels(
    files: list[Path], labels: set[str], named: int | None, style: str
) -> dict[str, dict[int, list[Path]]]:
    """Files by case and channel; `style`: names end in `_0000` ("suffix"), do not ("plain"), or "both"."""
    known = (*NIFTI, *PICTURES)
    cases: dict[str, dict[int, list[Path]]] = {}
    for path in files:
        stem = stem_of(path, known)
        match = FOUR_DIGITS.match(stem) if style != "plain" and stem not in labels else None
        if match and int(match["channel"]) < (named or 16):
            cases.setdefault(match["id"], {}).setdefault(int(match["channel"]), []).append(path)
        else:
            cases.setdefault(stem, {}).setdefault(0, []).append(path)
    return cases


def _nnunet_folder(
    root: Path, suffix: str, named: int | None, style: str, problems: list[Problem]
) -> tuple[dict[str, tuple[Path, ...]], dict[str, Path], str]:
    """Images and labels of imagesTr, imagesTs or imagesUn, and the style of their names."""
    known = (*NIFTI, *PICTURES)
    labels = _by_stem(_files(root / f"labels{suffix}", known), known, "label", problems)
    files = _files(root / f"images{suffix}", known)
    stems = {stem_of(path, known) for path in files}
    if not style:
        plain = any(stem in stems for stem in labels)
        suffixed = any(f"{stem}_0000" in stems for stem in labels)
        style = "plain" if plain and not suffixed else "suffix" if suffixed and not plain else "both"
    images: dict[str, tuple[Path, ...]] = {}
    for stem, channels in _group_channels(files, set(labels), named, style).items():
        for paths in channels.values():
            for path in paths[1:]:
                message = f"two image files for one case: {paths[0].name} and {path.name}"
                problems.append(Problem(stem, "duplicate", "error", message))
        images[stem] = tuple(channels[k][0] for k in sorted(channels))
        missing = sorted(set(range(max(channels) + 1)) - set(channels))
        if missing:
            message = f"channel file(s) missing: {', '.join(f'{stem}_{k:04d}' for k in missing)}"
            problems.append(Problem(stem, "channels", "error", message))
    for stem in sorted(set(labels) - set(images), key=natural):
        message = f"label without image: {labels[stem].relative_to(root)}"
        problems.append(Problem(stem, "missing-image", "error", message))
    return images, labels, style


def _scan_nnunet(root: Path, problems: list[Problem]) -> CaseSet:
    content = _dataset_json(root, problems)
    named = _channels_named(content)
    if not (root / "imagesTr").is_dir():
        raise CaseError(f"{root}: layout nnunet: expected a folder imagesTr")
    pools: dict[str, tuple[dict[str, tuple[Path, ...]], dict[str, Path]]] = {}
    style = ""
    for suffix in ("Tr", "Un", "Ts"):
        images, labels, style = _nnunet_folder(root, suffix, named, style, problems)
        pools[suffix] = images, labels
    for suffix, others in (("Un", ("Tr",)), ("Ts", ("Tr", "Un"))):
        for other in others:
            for stem in sorted(set(pools[suffix][0]) & set(pools[other][0]), key=natural):
                message = f"the same id in images{other} and images{suffix}"
                problems.append(Problem(stem, "duplicate", "error", message))
    everything = [paths for images, _ in pools.values() for paths in images.values()]
    kind = "image" if everything and all(suffix_of(p[0], PICTURES) for p in everything) else "nifti"
    files = max((len(paths) for paths in everything), default=1)
    if named is None or (kind == "image" and named in (1, 3) and files == 1):
        named = _picture_channels([p[0] for p in everything]) if kind == "image" and files == 1 else files
    made: dict[str, list[Case]] = {}
    for suffix, (images, labels) in pools.items():
        stems = sorted(images, key=natural)
        made[suffix] = [
            Case(s, images[s], labels.get(s), _kind(images[s][0]), _group(s), named) for s in stems
        ]
    cases = made["Tr"] + made["Un"]
    _compare_with_list(content, {case.id for case in cases}, pools["Tr"][1], problems)
    test = [case for case in made["Ts"] if case.labeled]
    dims = 2 if kind == "image" else _spatial_dims(cases, 3)
    return CaseSet(cases, test, [], _label_names(content, problems), dims, named, "nnunet", root)


def _kind(path: Path) -> str:
    return "image" if suffix_of(path, PICTURES) else "nifti"


def _compare_with_list(
    content: dict[str, Any], ids: set[str], labels: Mapping[str, Path], problems: list[Problem]
) -> None:
    """What dataset.json lists under "training" and the folder lacks."""
    known = (*NIFTI, *PICTURES)
    listed = content.get("training", [])
    for entry in listed if isinstance(listed, list) else ():
        if not isinstance(entry, dict) or "image" not in entry:
            continue
        stem = stem_of(Path(str(entry["image"])), known)
        match = FOUR_DIGITS.match(stem)
        if stem not in ids and not (match and match["id"] in ids):
            message = f"listed in dataset.json and not there: {entry['image']}"
            problems.append(Problem(stem, "missing-image", "error", message))
        elif entry.get("label") and stem not in labels and not (match and match["id"] in labels):
            message = (
                f"its label is listed in dataset.json and not there: {entry['label']}; it counts as unlabeled"
            )
            problems.append(Problem(stem, "missing-label", "warning", message))


def _scan_h5(root: Path, problems: list[Problem]) -> CaseSet:
    files: dict[str, list[Path]] = {}
    for path in sorted(p for p in root.rglob("*") if suffix_of(p, H5) and not p.name.startswith(".")):
        files.setdefault(stem_of(path, H5), []).append(path)
        if path.parent != root:
            files.setdefault(path.parent.name, []).append(path)
    slices = root / "train_slices.list"
    lists = {"cases": slices if slices.is_file() else root / "train.list"}
    lists |= {"validation": root / "val.list", "test": root / "test.list"}
    if not lists["cases"].is_file():
        raise CaseError(f"{root}: layout h5: expected a file train.list or train_slices.list")
    roles: dict[str, list[Case]] = {}
    seen: dict[str, str] = {}
    for role, path in lists.items():
        roles[role] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            name = stem_of(Path(line.strip()), H5) if line.strip() else ""
            if not name:
                continue
            if name in seen:
                message = f"listed twice: in {seen[name]} and in {path.name}"
                problems.append(Problem(name, "duplicate", "error", message))
                continue
            seen[name] = path.name
            places = _h5_places(files.get(name, []))
            if len(places) == 1:
                roles[role].append(Case(name, (places[0],), places[0], "h5", _group(name)))
            elif places:
                message = f"several files for one case: {', '.join(str(p.relative_to(root)) for p in places)}"
                problems.append(Problem(name, "duplicate", "error", message))
            else:
                message = (
                    f"listed in {path.name}, but there is no {name}.h5 and no h5 file in a folder {name}"
                )
                problems.append(Problem(name, "missing-image", "error", message))
    for role, cases in roles.items():
        roles[role] = [case if _h5_has_label(case) else replace(case, label=None) for case in cases]
    dims = _spatial_dims(roles["cases"], 3)
    return CaseSet(roles["cases"], roles["test"], roles["validation"], {}, dims, 1, "h5", root)


def _h5_places(paths: list[Path]) -> list[Path]:
    named = [path for path in paths if path.name == "mri_norm2.h5"]
    return named if len(named) == 1 else paths


def _h5_has_label(case: Case) -> bool:
    """Whether the file has a key `label`; files that cannot be opened are met again when read."""
    import h5py  # noqa: PLC0415

    try:
        with h5py.File(case.images[0], "r") as file:
            return "label" in file
    except OSError:
        return True


def _scan_pictures(root: Path, problems: list[Problem]) -> CaseSet:
    if not (root / "images").is_dir():
        raise CaseError(f"{root}: layout images: expected a folder images")
    images = _by_stem(_files(root / "images", PICTURES), PICTURES, "image", problems)
    masks = _by_stem(_files(root / "masks", PICTURES), PICTURES, "mask", problems)
    for stem in sorted(set(masks) - set(images), key=natural):
        message = f"mask without image: {masks[stem].relative_to(root)}"
        problems.append(Problem(stem, "missing-image", "error", message))
    channels = _picture_channels(images.values())
    cases = [Case(s, (images[s],), masks.get(s), "image", _group(s), channels) for s in images]
    names = _label_names(_dataset_json(root, problems), problems)
    return CaseSet(cases, [], [], names, 2, channels, "images", root)


def _picture_channels(paths: Iterable[Path]) -> int:
    """3 if any picture has colours, else 1; pictures that cannot be opened do not count."""
    from PIL import Image  # noqa: PLC0415

    for path in paths:
        try:
            with Image.open(path) as picture:
                if not is_grey(picture.mode):
                    return 3
        except OSError:
            continue
    return 1


def _spatial_dims(cases: Sequence[Case], default: int) -> int:
    for case in cases:
        try:
            return len(read_header(case).shape)
        except CaseError:
            continue
    return default


# ---- splitting ----------------------------------------------------------------------------------


def split(case_set: CaseSet, config: DataConfig) -> Split:
    """Return who is labeled, unlabeled, validation and test; unlabeled cases lose their label here.

    Lists of ids (of cases, or of patients) are taken as they are. A number counts patients, which is cases
    unless file names say that several are of one patient (`<patient>_frame01_slice_3`); so no patient is in
    two roles. Numbers are taken thus: `test` from the folder's own test list, or the last ones of the
    training list; then `validation` alike; then `labeled`, `unlabeled` from what is left. `config.draw` 0
    keeps the list's order, k > 0 permutes it at random; `labeled` takes from its head, `validation` from
    its tail, so that 2 labeled cases of a draw are among its 4. None takes what the folder says:
    cases with a label, cases without one (all others once `labeled` is given), its own lists.

    Class names come from the folder, else from the values in labels of labeled and validation cases.
    Raises CaseError for unknown ids, more cases asked for than there are, cases in two roles, labeled
    cases without a label, and label values that are not 0, 1, 2, ... (set `label_map`).

    >>> import tempfile
    >>> from semisam.engine.cases import find_cases, split
    >>> from semisam.engine.config import DataConfig
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=4, unlabeled=0, test=0, shape=(16, 16, 16))
    >>> roles = split(find_cases(root), DataConfig(labeled=2, test=1))
    >>> len(roles.labeled), len(roles.unlabeled), roles.unlabeled[0].label, len(roles.test)
    (2, 1, None, 1)
    """
    roles = _named_roles(case_set, config)
    claimed = {case.id for cases in roles.values() for case in cases}
    pool = [case for case in case_set.cases if case.id not in claimed]
    for role in ("test", "validation"):
        if role in roles:
            continue
        wanted = getattr(config, role)
        own = [case for case in getattr(case_set, role) if case.id not in claimed]
        if wanted is None:
            roles[role] = own
        elif own:
            roles[role] = _take(role, own, wanted, labeled=True)
        else:
            order = _permuted(pool, config.draw) if role == "validation" else pool
            roles[role] = _take(role, order, wanted, labeled=True, tail=True)
        gone = {case.group for case in roles[role]} if not own else set()
        pool = [case for case in pool if case.group not in gone]
    pool = _permuted(pool, config.draw)
    if "labeled" not in roles:
        with_label = [case for case in pool if case.labeled]
        named = config.labeled
        roles["labeled"] = (
            with_label if named is None else _take("labeled", with_label, _int(named), labeled=True)
        )
    rest = [case for case in pool if case not in roles["labeled"]]
    if "unlabeled" not in roles:
        if config.labeled is None:
            rest = [case for case in rest if not case.labeled]
        wanted = config.unlabeled
        roles["unlabeled"] = rest if wanted is None else _take("unlabeled", rest, _int(wanted), labeled=False)
    roles["unlabeled"] = [replace(case, label=None) for case in roles["unlabeled"]]
    made = Split(roles["labeled"], roles["unlabeled"], roles["validation"], roles["test"])
    made.class_names = _class_names(case_set, made, config.label_map)
    return made


def _int(value: Any) -> int:
    return int(value)


def _named_roles(case_set: CaseSet, config: DataConfig) -> dict[str, list[Case]]:
    """The roles that are given as lists of ids."""
    everything = [*case_set.cases, *case_set.validation, *case_set.test]
    by_id = {case.id: [case] for case in everything}
    for case in everything:
        if case.group not in by_id or case.group != by_id[case.group][0].id:
            by_id.setdefault(case.group, []).append(case)
    roles: dict[str, list[Case]] = {}
    role_of: dict[str, str] = {}
    problems: list[Problem] = []
    for role in ("labeled", "unlabeled", "validation", "test"):
        wanted = getattr(config, role)
        if isinstance(wanted, bool) or not (wanted is None or isinstance(wanted, (int, list, tuple))):
            raise CaseError(f"data.{role}: expected a number or a list of ids, got {wanted!r}")
        if isinstance(wanted, int) and wanted < 0:
            raise CaseError(f"data.{role}: expected a number >= 0, got {wanted}")
        if wanted is None or isinstance(wanted, int):
            continue
        roles[role] = []
        for name in map(str, wanted):
            if name not in by_id:
                message = f"data.{role} names it, but there is no such case or patient"
                problems.append(Problem(name, "unknown", "error", message))
            for case in by_id.get(name, []):
                if case.id in role_of:
                    message = f"is in data.{role_of[case.id]} and in data.{role}"
                    problems.append(Problem(case.id, "duplicate", "error", message))
                elif role != "unlabeled" and not case.labeled:
                    message = f"data.{role} names it, but it has no label"
                    problems.append(Problem(case.id, "missing-label", "error", message))
                role_of[case.id] = role
                roles[role].append(case)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems[:20])
        raise CaseError(f"the split cannot be made:\n{lines}", problems)
    return roles


def _permuted(cases: list[Case], draw: int) -> list[Case]:
    """Cases in the order of the k-th draw, patient by patient."""
    if draw < 0:
        raise CaseError(f"data.draw: expected a number >= 0, got {draw}")
    groups = _groups(cases)
    names = list(groups)
    if draw:
        names = [names[i] for i in np.random.default_rng([draw, 0x5E]).permutation(len(names))]
    return [case for name in names for case in groups[name]]


def _groups(cases: Iterable[Case]) -> dict[str, list[Case]]:
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group or case.id, []).append(case)
    return groups


def _take(role: str, cases: list[Case], count: int, *, labeled: bool, tail: bool = False) -> list[Case]:
    """The cases of the first (last) `count` patients."""
    groups = _groups(case for case in cases if case.labeled or not labeled)
    if count > len(groups):
        kind = "with a label " if labeled else ""
        raise CaseError(
            f"data.{role}: {count} asked for, but only {len(groups)} {kind}are left for it: ask for fewer"
        )
    names = list(groups)
    chosen = names[len(names) - count :] if tail else names[:count]
    return [case for name in chosen for case in groups[name]]


def _class_names(case_set: CaseSet, made: Split, label_map: Mapping[int, int] | None) -> tuple[str, ...]:
    if label_map:
        targets = complete_map(label_map)
        values = sorted({0, *targets.values()} - {IGNORE})
        sources = {v: [s for s, t in targets.items() if t == v] for v in values}
        names = {
            v: "+".join(case_set.label_names[s] for s in sources[v] if s in case_set.label_names)
            for v in values
        }
        where = "data.label_map"
    elif case_set.label_names:
        names, where = dict(case_set.label_names), "dataset.json"
        ignored = [value for value, name in names.items() if name.lower() == "ignore" and value != IGNORE]
        if ignored:
            example = {value: IGNORE if value in ignored else value for value in names}
            raise CaseError(f"dataset.json has a label 'ignore': set data.label_map to {example}")
        names.pop(IGNORE, None)
    else:
        found: set[int] = {0}
        for case in [*made.labeled, *made.validation]:
            found |= set(np.unique(read_label(case)).tolist())
        names = dict.fromkeys(sorted(found - {IGNORE}), "")
        where = "the labels of labeled and validation cases"
    values = sorted(names)
    if values != list(range(len(values))):
        example = {value: i for i, value in enumerate(values)}
        raise CaseError(
            f"label values of {where} must be 0, 1, 2, ..., got {values}: set data.label_map, e.g. {example}"
        )
    default = ("background", "foreground") if len(values) == 2 else None
    return tuple(
        names[v] or (default[v] if default else "background" if v == 0 else f"class {v}") for v in values
    )
