# SPDX-License-Identifier: Apache-2.0
"""Every example in the README and in the docstrings runs as printed."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import semisam

ROOT = Path(__file__).parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(
    name
    for _, path, _ in pkgutil.walk_packages(semisam.__path__, "semisam.")
    if (name := path.removeprefix("semisam.")) not in ("_core", "__main__", "libsemisam_cuda")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"semisam.{name}")
    assert doctest.testmod(module, optionflags=OPTIONS).failed == 0


def test_readme_examples():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=OPTIONS)
    assert result.attempted > 20
    assert result.failed == 0


def test_the_example_of_the_term_stands_alone():
    """Whoever wants the loss for a loop of their own copies this one block."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = (b for b in blocks if ">>> from semisam import SemiSAMTerm" in b)
    test = doctest.DocTestParser().get_doctest(block, {}, "the term", "README.md", 0)
    found = doctest.DocTestRunner(optionflags=OPTIONS).run(test)
    assert found.attempted > 8
    assert found.failed == 0


# Commands show themselves by --help; their tests run them.
@pytest.mark.parametrize(
    "name", [m for m in MODULES if not re.search(r"\b_|^commands\b|^(reference|cli)$", m)]
)
def test_public_functions_have_an_example(name):
    module = importlib.import_module(f"semisam.{name}")
    for public in getattr(module, "__all__", ()):
        thing = getattr(module, public)
        # The example of a function shows its result; who uses records, protocols and errors shows these.
        result = inspect.isclass(thing) and (
            issubclass(thing, (tuple, Exception))
            or getattr(thing, "_is_protocol", False)
            or dataclasses.is_dataclass(thing)
        )
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and not result:
            assert ">>>" in (inspect.getdoc(thing) or ""), f"semisam.{name}.{public} has no example"
