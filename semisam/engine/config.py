# SPDX-License-Identifier: Apache-2.0
"""All settings of a training run, as dataclasses: defaults <- YAML or TOML file <- flags."""

from __future__ import annotations

import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "MethodConfig",
    "SpecialistConfig",
    "TermConfig",
    "TrainConfig",
    "cache_of",
    "check",
    "differences",
    "dump",
    "from_dict",
    "load",
    "parse_setting",
    "recipes",
]


_RECIPES = Path(__file__).with_name("recipes")
PUBLISHED = "published"
"""The preset that does wrong on purpose."""


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type or out of range; the text names its key."""


@dataclass
class DataConfig:
    """What is trained on, and which cases may show their label.

    `labeled`, `unlabeled`, `validation` and `test` are a number of cases or a list of ids; None takes
    what the folder says: cases with a label file or without, `val.list`, `test.list` or labeled `imagesTs`.
    Numbers are drawn by `draw` (0: the first ones of the list, in order; k > 0: the k-th random draw), `test`
    from the end of the list. A case that is unlabeled by this choice has its label never opened.
    """

    root: str = ""
    layout: str = "auto"  # auto | nnunet | h5 | images
    labeled: int | list[str] | None = None
    unlabeled: int | list[str] | None = None
    validation: int | list[str] | None = None
    test: int | list[str] | None = None
    draw: int = 0
    spacing: list[float] | None = None  # mm; None: as the files are
    normalize: str = "zscore"  # zscore | minmax | none
    label_map: dict[int, int] | None = None
    cache: bool = True
    workers: int = 0


@dataclass
class SpecialistConfig:
    """The network: a name of `semisam.specialists` or a dotted path, its options and start weights."""

    name: str = "unet3d"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None


@dataclass
class MethodConfig:
    """The training method: supervised, mean-teacher, ua-mt, dan; semisam-* adds the generalist's term.

    `consistency_weight` is the weight of whatever a method learns from unlabeled samples; `ema_decay` and
    `noise` are the teachers', `mc_passes` UA-MT's, the `discriminator_*` DAN's.
    """

    name: str = "semisam-mean-teacher"
    lambda_ce: float = 0.5
    lambda_dice: float = 0.5
    include_background: bool = True
    consistency_weight: float = 0.1
    ema_decay: float = 0.99
    noise: float = 0.1
    mc_passes: int = 8
    discriminator_channels: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    discriminator_lr: float = 1e-4
    discriminator_dropout: float = 0.5


@dataclass
class TermConfig:
    """The generalist's term; None takes the preset's value, other names go to `SemiSAMTerm` as they are.

    `preset` "published" is the leaky reference, `semisam.published.PublishedTerm`: it does wrong on purpose,
    and opens labels of unlabeled scans (`options.defects`, default all of them).
    """

    generalists: list[str] = field(default_factory=lambda: ["random-walker"])
    preset: str = "plus"
    options: dict[str, Any] = field(default_factory=dict)  # of SemiSAMTerm: lam_sam, mode, clicks, ...
    generalist_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    gate: bool = True
    gate_steps: int | None = None  # steps of each leave-one-out run; None: a tenth of the steps, see gate.py
    gate_every: int = 100
    offline: bool = False  # labels of whole unlabeled scans, made now and then, instead of step by step
    offline_start: int | None = None  # steps before the first round of them; None: a quarter of the training
    offline_from: str | None = None  # a run folder whose network makes the first round before any step
    first_stage: int = 0  # steps of the method without the term before this run, in RUN/first_stage, likewise
    refresh: int = 0  # steps from one round to the next; 0: there is one only
    cache: str | bool = "auto"  # of encoder outputs: auto (ram where scans come again) | off | ram | a folder
    cache_ram_mb: int = 512  # MiB of memory for it
    cache_mb: int = 8192  # MiB of files for it
    position_prior: float = 0.0  # of an offline run: how strongly the place of organs in labeled scans counts
    scan_device: str = "auto"  # where generalists are asked about whole scans: auto (as train.device) | cpu


@dataclass
class TrainConfig:
    """The loop: steps, patches, optimiser, precision, checkpoints."""

    steps: int = 6000
    batch_size: int = 4
    labeled_batch: int = 2
    patch_size: list[int] = field(default_factory=lambda: [96, 96, 96])
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "poly"  # poly | step | constant
    milestones: list[int] = field(default_factory=lambda: [2500, 5000])
    precision: str = "auto"  # auto | 32 | bf16 | fp16
    memory_format: str = "auto"  # auto | contiguous | channels_last
    accumulate: int = 1
    clip_gradient: float | None = None
    augment: bool = True
    seed: int = 1337
    deterministic: bool = False
    device: str = "auto"
    validate_every: int = 200
    checkpoint_every: int = 200
    log_every: int = 10
    tensorboard: bool = False


@dataclass
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    specialist: SpecialistConfig = field(default_factory=SpecialistConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    term: TermConfig = field(default_factory=TermConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


# ---- reading ------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str] | None = None, settings: Iterable[tuple[str, Any]] = ()) -> Config:
    """Return the configuration: defaults, over them a YAML or TOML file, over that single settings.

    `settings` are pairs of a dotted key and its value, later ones win; see `parse_setting` for those of
    a command line. The file has the sections data, specialist, method, term, train; a name without an ending
    is one of the recipes that come with the package (`recipes`). Nothing is checked beyond names and types;
    `check` does the rest.

    Raises ConfigError for unknown keys (with the nearest name), values of the wrong type, and a file
    that cannot be read.

    >>> from semisam.engine import config
    >>> made = config.load(settings=[("train.steps", 2000), ("train.lr", 1e-3)])
    >>> made.train.steps, made.train.lr, made.train.momentum
    (2000, 0.001, 0.9)
    >>> config.load(settings=[("train.stpes", 2000)])
    Traceback (most recent call last):
    semisam.engine.config.ConfigError: train.stpes: no such setting; did you mean train.steps?
    """
    tree = {} if path is None else _read(_recipe(Path(path)))
    for key, value in settings:
        *sections, leaf = key.split(".")
        place: dict[str, Any] = tree
        for section in sections:
            inner = place.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key}: no such setting; {section} is a single value")
            place = inner
        place[leaf] = value
    return from_dict(tree)


def recipes() -> list[str]:
    """Return the names of the settings that come with the package.

    >>> from semisam.engine import config
    >>> config.recipes()
    ['offline', 'two-stages']
    """
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def _recipe(path: Path) -> Path:
    """The file of a recipe, where a name of one is meant."""
    return path if path.is_file() or str(path) not in recipes() else _RECIPES / f"{path.name}.yaml"


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Return the configuration that a nested mapping describes; what it does not name has its default.

    Raises ConfigError as `load` does.

    >>> from semisam.engine import config
    >>> config.from_dict({"data": {"labeled": 4}}).data.labeled
    4
    >>> config.from_dict({"train": {"steps": "many"}})
    Traceback (most recent call last):
    semisam.engine.config.ConfigError: train.steps: expected a whole number, got 'many'
    """
    made: Config = _section(Config, tree, "")
    return made


def parse_setting(text: str) -> tuple[str, Any]:
    """Return key and value of "key=value"; the value is read as YAML.

    Raises ConfigError if there is no key or the value is no YAML.

    >>> from semisam.engine.config import parse_setting
    >>> parse_setting("train.patch_size=[32, 48, 32]")
    ('train.patch_size', [32, 48, 32])
    """
    import yaml  # noqa: PLC0415

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: expected KEY=VALUE, for example train.lr=0.02")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: expected a number, text or [list] as value") from None


def dump(config: Config) -> dict[str, Any]:
    """Return the configuration as nested dictionaries, lists and plain values; `from_dict` undoes it.

    >>> from semisam.engine.config import Config, dump, from_dict
    >>> from_dict(dump(Config())) == Config()
    True
    """
    return asdict(config)


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (our value, their value)} of the settings that differ.

    >>> from semisam.engine import config
    >>> config.differences(config.Config(), config.load(settings=[("train.lr", 0.1)]))
    {'train.lr': (0.01, 0.1)}
    """
    a, b = _flat(dump(ours)), _flat(dump(theirs))
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, inner in tree.items() for key, value in inner.items()}


def _read(path: Path) -> dict[str, Any]:
    import yaml  # noqa: PLC0415

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            try:
                import tomllib  # noqa: PLC0415
            except ModuleNotFoundError:  # Python 3.10
                import tomli as tomllib  # noqa: PLC0415
            tree: Any = tomllib.loads(text)
        else:
            tree = yaml.safe_load(text)
    except OSError as error:
        known = "" if path.suffix else f"; recipes are {', '.join(recipes())}"
        raise ConfigError(f"{path}: cannot be read: {error.strerror}{known}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected YAML (or TOML in a .toml file): {error}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: expected sections with settings, got {type(tree).__name__}")
    return tree or {}


def _section(kind: Any, tree: Any, name: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{name}: expected a section with settings, got {tree!r}")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        dotted = f"{name}.{key}" if name else str(key)
        if key not in hints:
            raise ConfigError(f"{dotted}: no such setting{_nearest(dotted)}")
        if is_dataclass(hints[key]):
            values[key] = _section(hints[key], {} if value is None else value, dotted)
        else:
            values[key] = _typed(value, hints[key], dotted)
    return kind(**values)


def _nearest(dotted: str) -> str:
    known = list(_flat(dump(Config())))
    leaf = dotted.rpartition(".")[2]
    same = [key for key in known if key.rpartition(".")[2] == leaf]
    near = same or difflib.get_close_matches(dotted, known, 1, 0.7)
    if not near:
        by_leaf = {key.rpartition(".")[2]: key for key in known}
        near = [by_leaf[n] for n in difflib.get_close_matches(leaf, by_leaf, 1)]
    near = near or difflib.get_close_matches(dotted, [f.name for f in fields(Config)], 1)
    return f"; did you mean {near[0]}?" if near else ""


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}


def _typed(value: Any, hint: Any, key: str) -> Any:
    """The value as the type that the field has, or an error; numbers may be written as text (1e-4)."""
    made = str(value) if hint is str and type(value) is int else _as(value, hint)  # train.precision=32
    if made is _NO:
        texts = any(word in _words(hint) for word in ("text", "names"))
        quoted = "; put names in quotes" if texts and not isinstance(value, dict) else ""
        raise ConfigError(f"{key}: expected {_words(hint)}, got {value!r}{quoted}")
    return made


_NO = object()


def _as(value: Any, hint: Any) -> Any:  # noqa: PLR0911
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        made = (_as(value, kind) for kind in arguments)
        return next((m for m in made if m is not _NO), _NO)
    if origin is list:
        items = [_as(v, arguments[0]) for v in value] if isinstance(value, (list, tuple)) else [_NO]
        return _NO if any(item is _NO for item in items) else items
    if origin is dict:
        if not isinstance(value, Mapping):
            return _NO
        pairs = [(_key(k, arguments[0]), _as(v, arguments[1])) for k, v in value.items()]
        return _NO if any(_NO in (k, v) for k, v in pairs) else dict(pairs)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value) if isinstance(value, (int, float, str)) else _NO
        except ValueError:
            return _NO
    right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    return value if right else _NO


def _key(key: Any, hint: Any) -> Any:
    """Keys of mappings are text in TOML."""
    return int(key) if hint is int and isinstance(key, str) and key.isdecimal() else _as(key, hint)


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(kind) for kind in arguments)
    if origin is list:
        return f"a list of {_words(arguments[0]).removeprefix('a ')}s".replace("texts", "names")
    if origin is dict:
        return "a mapping"
    return _WORDS.get(hint, str(hint))


# ---- checking -----------------------------------------------------------------------------------

_CHOICES = {
    "data.layout": ("auto", "nnunet", "h5", "images"),
    "data.normalize": ("zscore", "minmax", "none"),
    "train.optimizer": ("sgd", "adam"),
    "train.schedule": ("poly", "step", "constant"),
    "train.precision": ("auto", "32", "bf16", "fp16"),
    "train.memory_format": ("auto", "contiguous", "channels_last"),
    "train.device": ("auto", "cpu", "cuda"),
    "term.scan_device": ("auto", "cpu"),
}
_AT_LEAST = {
    "data.draw": 0,
    "data.workers": 0,
    "term.gate_every": 1,
    "term.gate_steps": 1,
    "term.offline_start": 0,
    "term.refresh": 0,
    "term.first_stage": 0,
    "term.position_prior": 0,
    "term.cache_ram_mb": 0,
    "term.cache_mb": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.labeled_batch": 1,
    "train.accumulate": 1,
    "train.validate_every": 1,
    "train.checkpoint_every": 1,
    "train.log_every": 1,
    "train.momentum": 0,
    "train.weight_decay": 0,
    "train.seed": 0,
}


def check(config: Config) -> None:
    """Raise ConfigError for the first setting that is out of range or does not fit the others.

    >>> from semisam.engine import config
    >>> config.check(config.load(settings=[("train.schedule", "cosine")]))
    Traceback (most recent call last):
    semisam.engine.config.ConfigError: train.schedule: expected one of poly, step, constant, got 'cosine'
    """
    from semisam import methods  # noqa: PLC0415

    values = _flat(dump(config))
    train = config.train
    try:
        methods.canonical_name(config.method.name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise ConfigError(f"{key}: expected one of {', '.join(choices)}, got {values[key]!r}")
    for key, least in _AT_LEAST.items():
        if values[key] is not None and not values[key] >= least:
            raise ConfigError(f"{key}: expected at least {least}, got {values[key]}")
    for key in ("train.lr", "train.clip_gradient"):
        if values[key] is not None and not 0 < values[key] < math.inf:
            raise ConfigError(f"{key}: expected a number above 0, got {values[key]}")
    if train.labeled_batch > train.batch_size:
        raise ConfigError(
            f"train.labeled_batch: expected at most train.batch_size ({train.batch_size}, labeled and "
            f"unlabeled together), got {train.labeled_batch}"
        )
    if methods.needs_unlabeled(config.method.name) and train.labeled_batch == train.batch_size:
        raise ConfigError(
            f"train.labeled_batch: expected less than train.batch_size ({train.batch_size}), as "
            f"{config.method.name} learns from unlabeled patches too, got {train.labeled_batch}"
        )
    if config.term.preset == PUBLISHED and config.term.gate and methods.needs_term(config.method.name):
        raise ConfigError(
            "term.gate: expected false with the preset 'published', as the published scripts have no gate"
        )
    _check_patch(config)
    if train.schedule == "step" and sorted(set(train.milestones)) != train.milestones:
        raise ConfigError(f"train.milestones: expected increasing steps, got {train.milestones}")
    if methods.needs_term(config.method.name):
        _check_term(config)


def cache_of(config: Config) -> str:
    """Return where encoder outputs are kept: "off", "ram", or a folder.

    `term.cache`; by default in memory where whole scans come again: in an offline run of several rounds, and
    one whose gate asks with and without a position prior. Patches, which augmentation draws, hardly do.

    >>> from semisam.engine import config
    >>> config.cache_of(config.Config())
    'off'
    >>> config.cache_of(config.load(settings=[("term.offline", True), ("term.refresh", 100)]))
    'ram'
    """
    term = config.term
    if isinstance(term.cache, bool):  # YAML's off and on
        return "ram" if term.cache else "off"
    again = term.refresh > 0 or (term.gate and term.position_prior > 0)
    return term.cache if term.cache != "auto" else "ram" if term.offline and again else "off"


def _check_term(config: Config) -> None:
    term = config.term
    if not term.generalists:
        raise ConfigError("term.generalists: expected at least one name for a semisam method, got none")
    if not cache_of(config):
        raise ConfigError("term.cache: expected auto, off, ram or a folder, got nothing")
    if term.preset == PUBLISHED and cache_of(config) != "off":
        raise ConfigError(
            "term.cache: expected off with the preset 'published', as the published scripts encode in every "
            f"step, got {term.cache!r}"
        )
    if not term.offline:
        if term.first_stage:
            raise ConfigError(
                "term.first_stage: expected 0 without term.offline: its network labels whole scans; got "
                f"{term.first_stage}"
            )
        if term.position_prior:
            raise ConfigError(
                "term.position_prior: expected 0 without term.offline: a patch does not know where it lies; "
                f"got {term.position_prior}"
            )
        return
    if term.preset == PUBLISHED:
        raise ConfigError(
            "term.offline: expected false with the preset 'published', as the published scripts ask in "
            "every step"
        )
    if term.first_stage and term.offline_from:
        raise ConfigError(
            f"term.first_stage: expected 0 with term.offline_from, whose network makes the first labels, got "
            f"{term.first_stage}"
        )
    other = "term.offline_from" if term.offline_from else "term.first_stage"
    known = bool(term.offline_from or term.first_stage)
    if term.offline_start == 0 and not known:
        raise ConfigError(
            "term.offline_start: expected at least 1, as an untrained teacher knows nothing (or steps in "
            "term.first_stage, or a run's folder in term.offline_from), got 0"
        )
    if term.offline_start is not None and term.offline_start >= config.train.steps:
        raise ConfigError(
            f"term.offline_start: expected less than train.steps ({config.train.steps}), got "
            f"{term.offline_start}"
        )
    if known and term.offline_start:
        raise ConfigError(
            f"term.offline_start: expected 0 or nothing with {other}, whose network makes the first labels, "
            f"got {term.offline_start}"
        )


def _check_patch(config: Config) -> None:
    from semisam import methods  # noqa: PLC0415

    patch = config.train.patch_size
    if len(patch) not in (2, 3) or min(patch) < 1:
        raise ConfigError(f"train.patch_size: expected 2 or 3 sides in voxels, got {patch}")
    halvings = len(config.method.discriminator_channels)
    if methods.canonical_name(config.method.name).endswith("dan") and min(patch) < 2**halvings:
        raise ConfigError(
            f"train.patch_size: expected sides of at least {2**halvings}, as the discriminator halves the "
            f"patch {halvings} times (method.discriminator_channels), got {patch}"
        )
