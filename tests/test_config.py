# SPDX-License-Identifier: Apache-2.0
"""Settings: defaults, file, flags; every mistake is named with its key."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import yaml

from semisam.engine import config
from semisam.engine.config import Config, ConfigError

YAML = """
data: {labeled: 4, unlabeled: [a, b], spacing: [1, 1, 2.5], label_map: {1: 1, 2: 1}}
train:
  lr: 1e-3
  patch_size: [32, 48, 32]
term:
  options: {lam_sam: 1, mode: mask}
"""
TOML = """
[data]
labeled = 4
unlabeled = ["a", "b"]
spacing = [1, 1, 2.5]
label_map = {1 = 1, 2 = 1}
[train]
lr = 1e-3
patch_size = [32, 48, 32]
[term.options]
lam_sam = 1
mode = "mask"
"""


@pytest.mark.parametrize(("name", "text"), [("run.yaml", YAML), ("run.toml", TOML)])
def test_file_over_defaults_and_settings_over_the_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    made = config.load(path, [("train.lr", 0.5), ("train.lr", 0.25), ("term.options.clicks", 3)])
    assert made.data.labeled == 4
    assert made.data.unlabeled == ["a", "b"]
    assert made.data.spacing == [1.0, 1.0, 2.5]
    assert made.data.label_map == {1: 1, 2: 1}
    assert made.train.lr == 0.25
    assert made.train.patch_size == [32, 48, 32]
    assert made.train.momentum == Config().train.momentum
    assert made.term.options == {"lam_sam": 1, "mode": "mask", "clicks": 3}
    assert config.load(path).train.lr == 1e-3


def test_what_is_saved_is_read_back():
    made = config.load(
        settings=[("data.label_map", {2: 1}), ("train.clip_gradient", 5), ("data.labeled", ["x"])]
    )
    assert config.from_dict(yaml.safe_load(yaml.safe_dump(config.dump(made)))) == made


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.stpes", 1, r"train\.stpes: no such setting; did you mean train\.steps\?"),
        ("trian.steps", 1, r"trian: no such setting; did you mean train\?"),
        ("steps", 1, r"steps: no such setting; did you mean train\.steps\?"),
        ("method.lr", 1, r"method\.lr: no such setting; did you mean train\.lr\?"),
        ("train.steps", "many", r"train\.steps: expected a whole number, got 'many'"),
        ("train.steps", 1.5, r"train\.steps: expected a whole number, got 1\.5"),
        ("train.steps", True, r"train\.steps: expected a whole number, got True"),
        ("train.lr", "fast", r"train\.lr: expected a number, got 'fast'"),
        ("train.lr", True, r"train\.lr: expected a number, got True"),
        ("train.augment", 1, r"train\.augment: expected true or false, got 1"),
        ("train.patch_size", 32, r"train\.patch_size: expected a list of whole numbers, got 32"),
        ("train.patch_size", [32, "x"], r"train\.patch_size: expected a list of whole numbers"),
        ("data.labeled", [1, 2], r"data\.labeled: .* got \[1, 2\]; put names in quotes"),
        ("data.label_map", {"a": 1}, r"data\.label_map: expected a mapping"),
        ("specialist.name", [3], r"specialist\.name: expected text, got \[3\]"),
        ("train", 3, r"train: expected a section with settings, got 3"),
        ("train.lr.base", 3, r"train\.lr: expected a number"),
    ],
)
def test_mistakes_name_their_key(key, value, message):
    with pytest.raises(ConfigError, match=message):
        config.load(settings=[(key, value)])


def test_a_key_below_a_single_value(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {lr: 0.1}")
    with pytest.raises(ConfigError, match="no such setting; lr is a single value"):
        config.load(path, [("train.lr.base", 1)])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "train: [", "expected YAML"),
        ("c.yaml", "- 1\n- 2", "expected sections"),
        ("c.toml", "train = ", "TOML"),
        ("c.yaml", "!!python/object/apply:os.system ['true']", "expected YAML"),
        ("missing.yaml", None, "cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(path)


def test_an_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("# nothing\ntrain:\n")
    assert config.load(path) == Config()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.schedule", "cosine", "expected one of poly, step, constant"),
        ("train.optimizer", "lion", "expected one of sgd, adam"),
        ("train.steps", 0, "expected at least 1"),
        ("train.lr", 0.0, "above 0"),
        ("train.lr", float("nan"), "above 0"),
        ("train.labeled_batch", 5, r"at most train\.batch_size \(4"),
        ("train.labeled_batch", 4, "less than train.batch_size"),
        ("train.patch_size", [32], "2 or 3 sides"),
        ("train.patch_size", [0, 8, 8], "2 or 3 sides"),
        ("method.name", "mean-techer", "did you mean 'mean-teacher'"),
        ("term.generalists", [], "at least one name"),
        ("data.draw", -1, "expected at least 0"),
    ],
)
def test_values_out_of_range(key, value, message):
    with pytest.raises(ConfigError, match=message) as error:
        config.check(config.load(settings=[(key, value)]))
    assert str(error.value).startswith(key)


def test_milestones_must_increase():
    with pytest.raises(ConfigError, match=r"train\.milestones"):
        config.check(config.load(settings=[("train.schedule", "step"), ("train.milestones", [5, 5])]))


def test_defaults_are_valid_and_of_their_own_type():
    config.check(Config())
    assert config.from_dict(config.dump(Config())) == Config()
    for section in dataclasses.fields(Config):
        assert dataclasses.is_dataclass(typing.get_type_hints(Config)[section.name])


def test_differences():
    other = config.load(settings=[("train.lr", 1.0), ("term.options.lam_sam", 2)])
    assert config.differences(Config(), other) == {
        "train.lr": (0.01, 1.0),
        "term.options": ({}, {"lam_sam": 2}),
    }


@pytest.mark.parametrize("text", ["train.lr", "=3", "train.lr={"])
def test_bad_settings_of_the_command_line(text):
    with pytest.raises(ConfigError, match="--set"):
        config.parse_setting(text)


def test_settings_of_the_command_line():
    assert config.parse_setting("train.lr=1e-3") == ("train.lr", "1e-3")
    assert config.load(settings=[config.parse_setting("train.lr=1e-3")]).train.lr == 1e-3
    assert config.parse_setting("specialist.weights=") == ("specialist.weights", None)
    assert config.parse_setting("specialist.options={channels: [4, 8]}")[1] == {"channels": [4, 8]}
