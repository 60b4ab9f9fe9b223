# SPDX-License-Identifier: Apache-2.0
"""SEMISAM_CUDA and its kin: builds with a stand-in for nvcc, and what `semisam doctor` says of the result."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import setuptools

from semisam import _backend, ops

ROOT = Path(__file__).parents[1]

# Knows three architectures, makes empty files, and fails on a source that it is told to dislike.
NVCC = """#!/bin/sh
case "$*" in
    --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\n'; exit 0 ;;
    *"${DISLIKES:-no such file}"*) echo "x.cu(3): error: expected a ';'"; exit 1 ;;
esac
echo "$*" >>"$NVCC_CALLS"
while [ $# -gt 0 ]; do [ "$1" = -o ] && : >"$2"; shift; done
"""


@pytest.fixture
def library(monkeypatch, tmp_path):
    """Build with these settings; returns (what was said, the library's path, calls of nvcc so far)."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("SEMISAM_CUDA", "SEMISAM_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDAHOSTCXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("NVCC_CALLS", str(tmp_path / "calls"))
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    made = tmp_path / "out" / "libsemisam_cuda.so"
    made.parent.mkdir()

    def build(capsys, *, compiler=True, **settings):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        if compiler:
            monkeypatch.setenv("CUDACXX", str(nvcc))
        kind = runpy.run_path(str(ROOT / "setup.py"))["CudaLibrary"]
        kind.BUILD = tmp_path / "build"
        capsys.readouterr()
        kind().build(made)
        calls = tmp_path / "calls"
        said = capsys.readouterr().err.strip().splitlines()
        return said[-1], made, calls.read_text().splitlines() if calls.exists() else []

    return build


def test_auto_without_nvcc_says_why_and_removes_an_old_one(library, capsys, tmp_path):
    (tmp_path / "out" / "libsemisam_cuda.so").write_text("of an older build")
    said, made, _ = library(capsys, compiler=False)
    assert said == "semisam: no CUDA library: nvcc not found on PATH, in CUDA_HOME or as CUDACXX"
    assert not made.exists()


def test_zero_builds_none(library, capsys, tmp_path):
    (tmp_path / "out" / "libsemisam_cuda.so").write_text("of an older build")
    said, made, calls = library(capsys, SEMISAM_CUDA="0")
    assert said == "semisam: no CUDA library: SEMISAM_CUDA=0"
    assert not made.exists()
    assert not calls


def test_one_fails_without_nvcc(library, capsys):
    with pytest.raises(
        SystemExit, match=r"^semisam: no CUDA library, and SEMISAM_CUDA=1 wants one: nvcc not"
    ):
        library(capsys, compiler=False, SEMISAM_CUDA="1")


def test_other_values_are_refused(library, capsys):
    with pytest.raises(SystemExit, match=r"^SEMISAM_CUDA: expected 0, 1 or auto, got yes$"):
        library(capsys, SEMISAM_CUDA="yes")


@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_a_build_says_for_what_and_by_whom_and_compiles_once(wanted, library, capsys, tmp_path):
    n = len(list((ROOT / "csrc/cuda").glob("*.cu")))
    said, made, calls = library(capsys, SEMISAM_CUDA=wanted)
    by = f"by {tmp_path / 'nvcc'}"
    assert said == f"semisam: CUDA library for sm_75 sm_80 sm_90 compute_75 {by}: {n} of {n} files compiled"
    assert made.exists()
    assert len(calls) == n + 1
    assert all("arch=compute_75,code=[sm_75,sm_80,sm_90,compute_75]" in call for call in calls[:-1])
    assert "-cudart=static" in calls[-1]
    said, _, calls = library(capsys)
    assert said.endswith(f"0 of {n} files compiled")
    assert len(calls) == n + 1
    said, _, _ = library(capsys, SEMISAM_CUDA_ARCHS="90")  # other flags: everything anew
    assert said == f"semisam: CUDA library for sm_90 compute_90 {by}: {n} of {n} files compiled"


def test_real_architectures_leave_ptx_out(library, capsys):
    said, _, _ = library(capsys, SEMISAM_CUDA_ARCHS="90-real, 80-real")
    assert said.startswith("semisam: CUDA library for sm_80 sm_90 by ")


def test_unknown_architectures_are_named(library, capsys):
    said, made, _ = library(capsys, SEMISAM_CUDA_ARCHS="80;61")
    expected = "no CUDA library: SEMISAM_CUDA_ARCHS: expected architectures out of 75 80 90, got 61"
    assert said == f"semisam: {expected}"
    assert not made.exists()


def test_what_nvcc_says_is_in_the_sentence(library, capsys, tmp_path):
    said, made, _ = library(capsys, DISLIKES="edt.cu")
    assert said == f"semisam: no CUDA library: {tmp_path / 'nvcc'} failed: x.cu(3): error: expected a ';'"
    assert not made.exists()
    with pytest.raises(SystemExit, match=r"SEMISAM_CUDA=1 wants one: .* failed: x.cu"):
        library(capsys, SEMISAM_CUDA="1")


# ---- doctor ---------------------------------------------------------------------------------------


def test_info_names_the_architectures_without_a_driver(monkeypatch, tmp_path):
    if ops.CUDA_LIBRARY.exists():
        assert re.fullmatch(r"code for sm_\d+( \w+)*", _backend.info()["cuda library"])
    path = tmp_path / "libsemisam_cuda.so"
    monkeypatch.setattr(ops, "CUDA_LIBRARY", path)
    assert _backend.info()["cuda library"] == "none: this installation was built without CUDA"
    path.write_bytes(b"\x7fELF..semisam: CUDA code for sm_90 compute_90\0..")
    assert _backend.info()["cuda library"] == "code for sm_90 compute_90"
    path.write_bytes(b"\x7fELF")
    assert _backend.info()["cuda library"] == "another build's: make build"


class Gpu:
    """What `info` asks torch about CUDA, answered as by a torch with one GPU."""

    def __init__(self, monkeypatch):
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a GPU")
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91200)
        for name, on in (("cudnn", True), ("flash", False), ("mem_efficient", False), ("math", True)):
            monkeypatch.setattr(torch.backends.cuda, f"{name}_sdp_enabled", lambda on=on: on)


def test_info_says_what_torch_has_on_a_gpu(monkeypatch):
    Gpu(monkeypatch)
    info = _backend.info()
    assert info["cuda"] == "CUDA 13.0: a GPU"
    assert info["cudnn"].startswith("91200, benchmark o")
    assert info["attention"] == "cuDNN, math"
    monkeypatch.setattr(sys.modules["torch"].cuda, "is_available", lambda: False)
    assert _backend.info()["cuda"] == "torch has CUDA 13.0, but no usable device or driver was found"


def test_info_counts_the_operators_of_a_gpu(monkeypatch):
    some = list(ops.SCHEMA)[:3]
    monkeypatch.setattr(ops, "load_cuda", lambda: "")
    monkeypatch.setattr(_backend._core, "backends", lambda: {"cpu": list(ops.SCHEMA), "cuda": some})
    info = _backend.info()
    assert info["cuda backend"] == f"3 of {len(ops.SCHEMA)} operators"
    assert info["operators"][some[0]] == ["cpu", "cuda"]
    assert info["operators"][list(ops.SCHEMA)[-1]] == ["cpu"]
    assert f"{some[0]:<22}cpu, cuda" in str(info)
