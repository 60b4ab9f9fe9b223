# SPDX-License-Identifier: Apache-2.0
"""Wheel, sdist and editable install, in fresh environments that have NumPy and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = [
    "semisam/engine/report.html.j2",
    *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "semisam" / "engine" / "recipes").glob("*.yaml"))),
]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
USE = """
import importlib.util, sys
import numpy as np, semisam
from semisam import ops
assert importlib.util.find_spec("torch") is None
assert "torch" not in sys.modules
result = ops.call("mask_logits", np.full((1, 4, 4, 4), 0.5, np.float32), 1, 1, 1)
assert result.shape == (1, 1, 1, 1) and result[0, 0, 0, 0] == 0, result
info = semisam.info()
assert info["semisam"] == semisam.__version__ and "pip install" in info["torch"], info
print(semisam._core.__file__)
"""


def run(*command, **environment: str) -> str:
    """Output of a command that has neither this tree nor a compiler for CUDA on its paths."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SEMISAM", "CUDA", "LD_"))}
    path = os.pathsep.join(p for p in env["PATH"].split(os.pathsep) if "cuda" not in p)
    done = subprocess.run(
        list(map(str, command)),
        env={**env, "PATH": path, "MAX_JOBS": "2", "SEMISAM_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def interpreter(version: str) -> str | None:
    """An interpreter of this version with headers: on PATH or where pyenv keeps them."""
    if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        return sys.executable
    found = [str(p) for p in Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")]
    on_path = shutil.which(f"python{version}")
    for python in [*found, *([on_path] if on_path else [])]:
        header = "sysconfig.get_paths()['include'] + '/Python.h'"
        code = f"import sysconfig, os, venv; print(os.path.exists({header}))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        if done.stdout.strip() == "True":
            return python
    return None


def new_environment(folder: Path, python: str, *packages: str) -> Path:
    """A virtual environment with these packages alone; its interpreter."""
    run(python, "-m", "venv", folder)
    made = folder / "bin" / "python"
    run(made, "-m", "pip", "install", "-q", *packages)
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, made from a copy so that nothing is left in the tree."""
    folder = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns(
        ".git",
        ".venv",
        "build",
        "dist",
        "*.egg-info",
        "*.so",
        "__pycache__",
        ".*_cache",
        ".hypothesis",
        "shared",
    )
    shutil.copytree(ROOT, folder / "tree", ignore=ignore)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, folder / "tree")
    (made,) = folder.glob("*.tar.gz")
    return made


def test_sdist_has_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "csrc").rglob("*")
        if p.suffix in (".c", ".h", ".def", ".mk", ".cu", ".cuh")
    }
    wanted |= {
        str(p.relative_to(ROOT)) for p in (ROOT / "semisam").rglob("*.py*") if p.suffix in (".py", ".pyi")
    }
    wanted |= {
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "semisam/VERSION",
        "semisam/py.typed",
        *DATA,
    }
    assert wanted <= names, wanted - names
    refused = [
        n for n in names if n.endswith((".so", ".o", ".h5", ".nii.gz", ".npz")) or n.startswith("build/")
    ]
    assert not refused


@pytest.mark.parametrize("version", VERSIONS)
def test_build_from_sdist(version, sdist, tmp_path):
    """sdist -> wheel on this version of CPython; the wheel works and has only what it should."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"CPython {version} is not installed here")
    build = new_environment(tmp_path / "build", python, "setuptools>=77", "numpy>=2.0")
    run(build, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist)
    (wheel,) = tmp_path.glob("*.whl")
    check_wheel(wheel)
    run(build, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    where = run(build, "-c", USE).strip()
    assert where.startswith(str(tmp_path / "build"))


def check_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    package = [n for n in names if ".dist-info/" not in n]
    sources = {
        str(p.relative_to(ROOT)) for p in (ROOT / "semisam").rglob("*.py*") if p.suffix in (".py", ".pyi")
    }
    expected = sources | {"semisam/py.typed", "semisam/VERSION", *DATA}
    extensions = [n for n in package if n.endswith(".so")]
    assert len(extensions) == 1
    assert extensions[0].startswith("semisam/_core.")
    assert set(package) - set(extensions) == expected, set(package) ^ expected
    assert any(n.endswith("/licenses/LICENSE") for n in names)
    required = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert required == ["Requires-Dist: numpy>=2.0"]


def test_editable_install(tmp_path):
    """`pip install -e .` runs from the tree: a change there is seen, the extension is built there."""
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.egg-info", "*.so", "__pycache__", ".*_cache", "shared"
    )
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=ignore)
    python = new_environment(tmp_path / "env", sys.executable, "setuptools>=77", "numpy>=2.0")
    run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-e",
        tree,
        SEMISAM_ISA="base",
    )
    assert run(python, "-c", USE).strip().startswith(str(tree / "semisam"))
    (tree / "semisam" / "schedules.py").write_text('"""Changed."""\n')
    assert run(python, "-c", "import semisam.schedules as s; print(s.__doc__)").strip() == "Changed."


def test_not_every_interpreter_is_missing():
    assert any(interpreter(version) for version in VERSIONS)
