# SPDX-License-Identifier: Apache-2.0
"""Runs the Python tests on a core built with address and undefined-behaviour sanitizers.

`python tests/sanitized.py [pytest arguments]`: builds into build/asan, then starts pytest with the
sanitizer's runtime preloaded. Leaks are the business of tests/leaks: Python itself has too many.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "asan"
FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
# What drives the core directly; files that are about other things need no second run.
LEAVE_OUT = tuple(
    f"test_{area}.py"
    for area in (
        *("hygiene", "vectorised", "packaging", "torch", "docs", "config", "specialists", "data", "sampling"),
        *("phantom", "cache", "inference", "evaluation", "trainer", "report", "demo", "notebooks"),
        *("cuda", "cuda_rehearsal", "end_to_end"),
    )
)


def runtime() -> str:
    """What to preload: the compiler's libasan and libstdc++, or "" if it has none."""
    compiler = shutil.which("gcc")
    if not compiler:
        return ""
    paths = []
    for library in ("libasan.so", "libstdc++.so.6"):  # asan wants to see C++'s throw at the start
        command = [compiler, f"-print-file-name={library}"]
        paths.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return " ".join(paths) if all(Path(path).is_absolute() for path in paths) else ""


def build() -> None:
    # One instruction set: the C tests have all of them under the sanitizers.
    flags = {
        "SEMISAM_ISA": "base",
        "SEMISAM_CFLAGS": FLAGS,
        "LDFLAGS": "-fsanitize=address,undefined",
        "CC": "gcc",
    }
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD)]
    command += ["--build-lib", str(BUILD / "lib")]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **flags})


def environment(libasan: str) -> dict[str, str]:
    return {
        **os.environ,
        "LD_PRELOAD": libasan,
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(BUILD / "lib"), str(ROOT / "tests"), str(ROOT)]),
        "PYTHONSAFEPATH": "1",  # not the source tree's own build
    }


def main() -> int:
    libasan = runtime()
    if not libasan:
        print("skipped: gcc's libasan is not installed")
        return 0
    build()
    where = [sys.executable, "-c", "import semisam; print(semisam._core.__file__)"]
    found = subprocess.run(
        where, env=environment(libasan), capture_output=True, text=True, check=True, cwd=BUILD
    )
    if not found.stdout.startswith(str(BUILD)):
        print(f"expected the sanitized build in {BUILD}, got {found.stdout}")
        return 1
    tests = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if p.name not in LEAVE_OUT]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "-o",
        "pythonpath=tests",
        "-p",
        "no:cacheprovider",
    ]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    return subprocess.run(
        [*command, *(sys.argv[1:] or tests)], env=environment(libasan), check=False, cwd=ROOT
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
