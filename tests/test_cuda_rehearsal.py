# SPDX-License-Identifier: Apache-2.0
"""Parts of tests/test_cuda.py on CPU tensors, so that its code is right on the day of a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def rehearse(how: str, words: str) -> tuple[int, int, str]:
    """Exit status, number of tests that passed, and what pytest said."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", "-k", words]
    done = subprocess.run(
        [*command, "tests/test_cuda.py"],
        cwd=ROOT,
        env={**os.environ, "SEMISAM_CUDA_REHEARSAL": how},
        capture_output=True,
        text=True,
        check=False,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    return done.returncode, int(passed[1]) if passed else 0, done.stdout + done.stderr


def test_on_the_kernels_of_the_cpu():
    status, passed, said = rehearse(
        "cpu",
        "gradcheck or precision or channels or objective or wait and not waits or term or devices or memory "
        "or rollout or boxes or metrics_are or info",
    )
    assert (status, passed > 50) == (0, True), said


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the emulated kernels")
def test_on_the_emulated_kernels():
    status, passed, said = rehearse(
        "emulated", "mask_logits or boxes or without_a_kernel or no_class or memory"
    )
    assert (status, passed > 40) == (0, True), said


def test_without_a_gpu_every_test_is_skipped_with_the_reason():
    status, passed, said = rehearse("", "devices or info")
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert (status, passed) == (0, 0), said
    assert "needs a CUDA device, and torch finds none" in said
