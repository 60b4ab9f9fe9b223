# SPDX-License-Identifier: Apache-2.0
"""The CUDA library as it was built: what ptxas reports, what it exports, what it says without a driver."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from semisam import _backend, _core, ops

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
HEADERS = [*ROOT.glob("csrc/*.h"), ROOT / "csrc/ops.def", *ROOT.glob("csrc/cuda/*.cuh")]


def report_of(source: Path) -> str:
    """What ptxas said when this file was last compiled; skips without nvcc, fails if that is old news."""
    if shutil.which("nvcc") is None or os.environ.get("SEMISAM_CUDA") == "0":
        pytest.skip("built without CUDA: nvcc is not on PATH, or SEMISAM_CUDA=0")
    report = ROOT / "build" / "cuda" / f"{source.stem}.ptxas"
    assert report.exists(), "not compiled yet: make build"
    newest = max(p.stat().st_mtime for p in (source, *HEADERS))
    assert report.stat().st_mtime > newest, "compiled from older sources: make build"
    return report.read_text()


def entries(report: str):
    """(kernel, architecture, registers, bytes of stack, bytes of spills) of every kernel."""
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for '(sm_\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.S,
    )
    for name, arch, stack, stores, loads, registers in pattern.findall(report):
        yield name, arch, int(registers), int(stack), int(stores) + int(loads)


def budget_of(source: Path) -> int:
    """The number that the head of the file promises: registers <= N."""
    head = source.read_text().partition("*/")[0]
    found = re.search(r"registers\s*(?:\*\s*)?<=\s*(?:\*\s*)?(\d+)", head)
    assert found, f"{source.name}: its head must state the budget: registers <= N"
    return int(found[1])


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_registers_within_the_budget_and_nothing_in_local_memory(source):
    report, budget = report_of(source), budget_of(source)
    found = list(entries(report))
    assert len(found) == report.count("Compiling entry function")
    assert found or source.stem == "backend"
    for name, arch, registers, stack, spills in found:
        assert (stack, spills) == (0, 0), f"{name} on {arch}: {stack} bytes of stack, {spills} of spills"
        assert registers <= budget, f"{name} on {arch}: {registers} registers, the head says {budget}"


@pytest.fixture(scope="module")
def library() -> Path:
    path = ops.CUDA_LIBRARY
    if not path.exists():
        pytest.skip("built without CUDA")
    return path


def test_one_symbol_and_no_cuda_library_is_needed(library):
    nm = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    functions = [line.split()[-1] for line in nm.stdout.splitlines() if line.split()[-2] in "TW"]
    assert functions == ["semisam_cuda"]
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(cuda|torch|python)", needed)


def test_another_abi_is_refused_before_anything_else(library):
    entry = ctypes.CDLL(str(library)).semisam_cuda
    entry.restype = ctypes.c_void_p
    text = ctypes.create_string_buffer(256)
    assert entry(1, text, ctypes.c_int64(256)) is None
    assert re.match(rb"has ABI \d+, and this semisam needs 1: build both together", text.value)


def test_without_a_driver_a_sentence(library):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code = "import semisam; print(semisam.info()['cuda backend'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.match(r"not usable: finds no usable GPU: .+", done.stdout), done.stdout


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be loaded: .*cannot open shared object file"),
        (b"no library at all", "cannot be loaded: .*(too short|invalid ELF header)"),
    ],
)
def test_a_library_that_cannot_be_loaded(content, sentence, tmp_path):
    path = tmp_path / "libsemisam_cuda.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImportError, match=sentence):
        _core.load_backend(path)


def test_a_library_that_is_something_else():
    with pytest.raises(ImportError, match="is not a backend of semisam: it exports no semisam_cuda"):
        _core.load_backend(_core.__file__)


def test_info_names_where_every_operator_runs():
    info = _backend.info()
    assert set(info["operators"]) == set(ops.SCHEMA)
    assert all("cpu" in where for where in info["operators"].values())
