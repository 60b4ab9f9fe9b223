# SPDX-License-Identifier: Apache-2.0
"""Every loop marked SS_SIMD is really vectorised, for every instruction set: gcc's report says so.

A marked loop that stays scalar is right but several times slower, and nothing else would tell.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPU = ROOT / "csrc" / "cpu"
FLAGS = {
    name: words.split()
    for name, equals, words in (
        line.partition(" = ") for line in (ROOT / "csrc/flags.mk").read_text().splitlines()
    )
    if equals and not name.startswith("#")
}
KERNELS = [p for p in sorted(CPU.glob("*.c")) if str(p.relative_to(ROOT)) not in FLAGS["SS_ONCE"]]
ISAS = ("base", "v3", "v4")


def gcc() -> str:
    """gcc 12 or later, whose report has the form that is read here."""
    found = shutil.which("gcc")
    if not found:
        pytest.skip("no gcc here: other compilers report differently")
    text = subprocess.run([found, "-dumpfullversion"], capture_output=True, text=True, check=False).stdout
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    if "clang" in version or not text[:1].isdigit() or int(text.split(".")[0]) < 12:
        pytest.skip(f"needs gcc >= 12, got {version.splitlines()[0]}")
    if platform.machine() != "x86_64":
        pytest.skip(f"the instruction sets are x86-64's, this is {platform.machine()}")
    return found


def report(compiler: str, kernel: Path, isa: str) -> set[tuple[str, int]]:
    """(file, line) of every loop that gcc vectorised in `kernel`."""
    command = [compiler, *FLAGS["SS_FLAGS"], *FLAGS.get(f"SS_FLAGS_{isa}", []), f"-DSS_ISA={isa}"]
    done = subprocess.run(
        [*command, "-fopt-info-vec-optimized", "-c", str(kernel), "-o", "/dev/null"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\S+):(\d+):\d+: optimized: +loop vectorized", done.stderr, re.M)
    return {(Path(file).resolve().name, int(line)) for file, line in found}


@cache
def vectorised(isa: str) -> set[tuple[str, int]]:
    compiler = gcc()
    with ThreadPoolExecutor(2) as pool:
        return set().union(*pool.map(lambda kernel: report(compiler, kernel, isa), KERNELS))


# SS_SIMD, what a file defines as SS_SIMD, and simd pragmas that say more, such as a reduction.
ALIASES = {m for p in CPU.glob("*.[ch]") for m in re.findall(r"#define (\w+) SS_SIMD\b", p.read_text())}
MARK = re.compile(rf"\b({'|'.join(sorted({'SS_SIMD', *ALIASES}))})\b|\b_Pragma\(\"omp simd")


def marked_loops(path: Path) -> list[range]:
    """The lines of every loop behind SS_SIMD or another simd pragma, from `for` to the last brace."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), path.read_text(), flags=re.S)
    lines = text.splitlines()
    found = []
    for i, line in enumerate(lines):
        if not MARK.search(line) or re.match(r"\s*#\s*define \w+(?: SS_SIMD| _Pragma.*|)$", line):
            continue
        first = next(k for k in range(i, len(lines)) if re.search(r"\bfor \(", lines[k]))
        assert first - i <= 2, f"{path.name}:{i + 1}: a simd pragma without a loop behind it"
        depth = 0
        for last in range(first, len(lines)):
            depth += lines[last].count("{") - lines[last].count("}")
            if depth == 0 and (";" in lines[last] or "}" in lines[last]) and last > first:
                break
        found.append(range(first + 1, last + 2))
    return found


def expansions(path: Path, loop: range) -> set[tuple[str, int]]:
    """Where a loop is reported: on its lines or, inside a macro, where the macro is used."""
    lines = path.read_text().splitlines()
    places = {(path.name, line) for line in loop}
    if not lines[loop[0] - 1].endswith("\\"):
        return places
    define = next(k for k in range(loop[0] - 1, -1, -1) if re.match(r"\s*#\s*define\b", lines[k]))
    macro = lines[define].split()[1].split("(")[0]
    for other in CPU.glob("*.[ch]"):
        for k, line in enumerate(other.read_text().splitlines()):
            if re.search(rf"\b{macro}\b", line):
                places.add((other.name, k + 1))
    return places


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "path", sorted(p for p in CPU.glob("*.[ch]") if marked_loops(p)), ids=lambda p: p.name
)
def test_marked_loops_are_vectorised(path, isa):
    done = vectorised(isa)
    scalar = [loop[0] for loop in marked_loops(path) if not expansions(path, loop) & done]
    assert not scalar, f"{path.name}: scalar loops with {isa}, lines {scalar}"


def test_the_report_is_read_rightly(tmp_path):
    """One loop that can be vectorised and one that cannot."""
    source = tmp_path / "two.c"
    source.write_text(
        "void f(float *restrict a, const float *restrict b) {\n"
        "    for (int i = 0; i < 1024; ++i) { a[i] = b[i] + 1.0f; }\n"
        "    for (int i = 1; i < 1024; ++i) { a[i] = a[i - 1] * b[i] + 1.0f; }\n"
        "}\n"
    )
    assert report(gcc(), source, "v3") == {("two.c", 2)}


def test_marked_loops_are_found():
    found = marked_loops(CPU / "lanes.h")
    assert len(found) >= 6
    assert all(len(loop) == 3 for loop in found)  # for, one line, brace
