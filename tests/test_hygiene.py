# SPDX-License-Identifier: Apache-2.0
"""Rules of the house that a machine can check: layers, names, lengths, formats, types, imports."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import semisam
from semisam import _core, ops

ROOT = Path(__file__).parents[1]
BUILT = (".so", ".o", ".pyc", ".dll", ".dylib", ".pyd")
SKIP = {".git", ".venv", "build", "dist", "__pycache__", ".hypothesis", ".mypy_cache", ".ruff_cache"}


def tree(*suffixes: str, under: str = ".") -> list[Path]:
    """Every file of the project with one of these suffixes; build products left out."""
    found = []
    for folder, folders, names in os.walk(ROOT / under):
        folders[:] = sorted(f for f in folders if f not in SKIP and not f.endswith(".egg-info"))
        found += [Path(folder, name) for name in sorted(names) if name.endswith(suffixes)]
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def by_name(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=name)


def without_comments(text: str) -> str:
    """C source with comments and the insides of strings blanked, lines kept."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'

    def blank(match: re.Match[str]) -> str:
        kept = '""' if match[0][0] == '"' else " "
        return kept + "\n" * match[0].count("\n")

    return re.sub(pattern, blank, text, flags=re.S)


C_FILES = tree(".c", ".h", under="csrc")
CPU_FILES = tree(".c", ".h", under="csrc/cpu")
PYTHON_FILES = tree(".py", ".pyi")

# ---- layers -------------------------------------------------------------------------------------


def allowed_include(path: Path, header: str) -> bool:
    """semisam.h <- ss_math.h <- cpu/*; python/* -> semisam.h only; nobody includes across."""
    where = path.parent.name
    beside = (path.parent / header).exists() and "/" not in header
    if where == "csrc":
        public = path.name in ("semisam.h", "core.c")
        return header == "ops.def" or (path.name == "core.c" and header == "semisam.h" and public)
    if where == "cpu":
        return beside or header in ("../semisam.h", "../ss_math.h", "../ops.def")
    return where == "python" and (beside or header in ("../semisam.h", "../ops.def"))


@by_name(C_FILES)
def test_include_layers(path):
    for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
        assert allowed_include(path, header), f'{name(path)} includes "{header}"'


@by_name([*CPU_FILES, ROOT / "csrc/core.c", ROOT / "csrc/semisam.h", ROOT / "csrc/ss_math.h"])
def test_the_core_does_not_know_python(path):
    assert not re.search(r"\bPy[A-Z_]\w*|\bNPY_|<Python\.h>|<numpy/", without_comments(path.read_text()))


# Every module imports from the lines above its own, and from its own line as long as there is no circle.
LAYERS = [
    {"_core"},
    {"ops"},
    {
        "_backend",
        "_memory",
        "losses",
        "fusion",
        "_fusing",
        "masks",
        "prompts",
        "metrics",
        "random_walk",
        "schedules",
        "weights",
    },
    {"fetch"},
    {"specialists", "generalists"},
    {"gate", "_dialogue", "term", "published"},
    {"methods"},
    {"engine"},
    {"commands", "cli"},
]
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"_backend", "ops"},
    "__main__": {"_backend", "cli"},
    "reference": set(),
    "_memory": set(),
    "fetch": set(),
    "schedules": set(),
    "specialists": {"weights"},
    "weights": set(),
}
PACKAGE = tree(".py", under="semisam")


def layer_of(path: Path) -> str:
    """The module or package under semisam that a file belongs to."""
    return path.relative_to(ROOT / "semisam").with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Submodules of semisam that a file imports anywhere, those for type checking left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.ImportFrom) and node.module == "semisam":
            found.update(alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("semisam."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("semisam."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found - {layer_of(path)}


@by_name(PACKAGE)
def test_python_layers(path):
    module, imported = layer_of(path), imports_of(path)
    assert "reference" not in imported, "semisam.reference is for tests alone"
    rank = next((i for i, layer in enumerate(LAYERS) if module in layer), None)
    assert rank is not None or module in MAY_IMPORT, f"{name(path)}: give it a place in LAYERS"
    allowed = MAY_IMPORT.get(module, set().union(*LAYERS[: (rank or 0) + 1]))
    assert imported <= allowed, f"{name(path)} imports {sorted(imported - allowed)}"


def test_python_layers_have_no_circles():
    graph: dict[str, set[str]] = {}
    for path in PACKAGE:
        module = layer_of(path)
        graph.setdefault(module, set()).update(imports_of(path) - {module})
    graph["commands"].discard("cli")  # for its exception; cli imports a command by name when it is asked for
    done: set[str] = set()

    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        for other in graph.get(module, set()) - done:
            walk(other, (*above, module))
        done.add(module)

    for module in graph:
        walk(module, ())


def test_only_ops_touches_torch_library():
    for path in tree(".py", under="semisam"):
        if path.name != "ops.py":
            assert "torch.library" not in path.read_text(), name(path)


# ---- text ---------------------------------------------------------------------------------------


@by_name(tree(".c", ".h", ".py", ".pyi", ".mk", "Makefile", ".def", ".cu", ".cuh", ".sh"))
def test_spdx_line(path):
    if path.stat().st_size:
        head = path.read_text().splitlines()[:3]
        assert any("SPDX-License-Identifier: Apache-2.0" in line for line in head), name(path)


def test_no_names_that_say_nothing():
    empty = re.compile(r"^(utils?|helpers?|common|misc|stuff|tools?)$")
    for path in tree(".py", ".c", ".h", ".pyi"):
        for part in (path.stem, *path.relative_to(ROOT).parts[:-1]):
            assert not any(empty.match(word) for word in re.split(r"[_\W]", part)), name(path)


@by_name(
    tree(".py", ".pyi", ".c", ".h", ".cu", ".cuh", ".def", ".md", ".toml", "Makefile", ".mk", ".txt", ".sh")
    + tree(".json", ".yaml", ".j2", ".ipynb", ".tsv")
)
def test_text_speaks_of_the_project_alone(path):
    text = path.read_text()
    for word in (r"/" + r"work/", r"/" + r"tmp/wt", r"/" + r"root/", r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b"):
        assert not re.search(word, text), f"{name(path)}: {word}"


# ---- C ------------------------------------------------------------------------------------------


# ---- the map ------------------------------------------------------------------------------------

# Folders of files of one kind, which the map names as such.
OF_ONE_KIND = (
    "tests/core",
    "tests/fuzz",
    "tests/leaks",
    "tests/cuda_emulation",
    "benchmarks/results",
    "examples/c",
)


def map_of_contributing() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.partition("## Map")[2].partition("Dependencies point one way")[0]


def in_braces(text: str) -> list[str]:
    """The names that `a_{b,c}.h` stands for, and all others."""
    found = []
    for word in re.findall(r"[\w.<>-]*(?:\{[\w,]+\}[\w.]*)?", text):
        start, brace, rest = word.partition("{")
        names, _, end = rest.partition("}")
        found += [start + name + end for name in names.split(",")] if brace else [word]
    return [word.rstrip(".") for word in found]


def patterns_of(text: str) -> dict[str, str]:
    """Names that the map has for several files, as patterns, and where these lie."""
    families = {path.split(".")[-2] for path in semisam.generalists.GENERALISTS.values()}
    sets = {
        "<operator>.c": ("csrc/cpu", list(ops.SCHEMA)),
        "<operator>.cu": ("csrc/cuda", list(ops.SCHEMA)),
        "<family>.py": ("semisam/generalists", sorted(families)),
        "<command>.py": ("semisam/commands", [r"\w+"]),
        "test_<area>.py": ("tests", [r"\w+"]),
    }
    for written in sets:
        assert written in text, f"the map has no {written}"
    found = {}
    for written, (folder, names) in sets.items():
        start, end = re.split("<.*>", written)
        found[folder + "/" + start] = f"{re.escape(folder)}/{start}({'|'.join(names)}){re.escape(end)}"
    return found


def test_the_map_has_every_file():
    """By its name, by the name of its kind, or by its folder."""
    text = map_of_contributing()
    names, patterns = set(in_braces(text)), patterns_of(text).values()
    for folder in OF_ONE_KIND:
        assert re.search(rf"\b{folder.rpartition('/')[2]}/", text), f"the map has no {folder}/"
    missing = []
    for top in ("csrc", "semisam", "tests", "benchmarks", "examples"):
        for path in tree("", under=top):
            file = path.relative_to(ROOT).as_posix()
            known = path.name in names or file.startswith(tuple(f"{f}/" for f in OF_ONE_KIND))
            if not known and not any(re.fullmatch(p, file) for p in patterns) and path.suffix not in BUILT:
                missing.append(file)
    assert not missing, f"not in CONTRIBUTING.md's map: {', '.join(missing)}"


def test_the_map_has_no_file_that_is_gone():
    there = {path.name for path in tree("")}
    suffixes = r"\.(c|h|cu|cuh|def|mk|py|pyi|yaml|tsv|j2)"
    named = {n for n in in_braces(map_of_contributing()) if re.fullmatch(rf"[\w.]+{suffixes}", n)}
    assert len(named) > 100
    assert sorted(named - there) == []


def functions(text: str):
    """(first line, number of lines) of every top-level braced body, in clang-format's layout."""
    start = None
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if re.match(r"^\S.*\)\s*\{$|^\S.*\) \{$|^ .*\) \{$", line) and start is None:
            head = i
            while head > 0 and lines[head].startswith(" "):
                head -= 1
            start = head
        elif line == "}" and start is not None:
            yield start + 1, i - start + 1
            start = None


@by_name(tree(".c", ".h"))
def test_c_functions_are_short(path):
    for line, length in functions(without_comments(path.read_text())):
        assert length <= 60, f"{name(path)}:{line}: a function of {length} lines"


def test_the_length_rule_sees_functions():
    text = "static int f(int a,\n             int b) {\n    return a;\n}\n\nint g(void) {\n}\n"
    assert list(functions(text)) == [(1, 4), (6, 2)]
    found = sum(len(list(functions(without_comments(p.read_text())))) for p in C_FILES)
    assert found > 50


# Kernels report by status; memory comes from ss_scratch and threads from ss_parallel_for.
FORBIDDEN = [
    *["printf", "fprintf", "puts", "putchar", "perror", "exit", "_exit", "abort", "assert", "longjmp"],
    *["malloc", "calloc", "realloc", "free", "alloca", "posix_memalign", "aligned_alloc", "mmap"],
    *["strcpy", "strcat", "sprintf", "gets", "system", "getenv", "rand", "srand", "time", "clock"],
    *["pthread_create", "pthread_mutex_lock", "sleep", "fopen", "open", "qsort", "fma", "fmaf"],
]


@by_name([*(p for p in CPU_FILES if p.stem not in ("runtime", "memory")), ROOT / "csrc/ss_math.h"])
def test_kernels_call_nothing_forbidden(path):
    text = without_comments(path.read_text())
    for function in FORBIDDEN:
        match = re.search(rf"(?<![\w.>]){function}\s*\(", text)
        assert not match, f"{name(path)}: {function}() is not for kernels"
    assert not re.search(r"\bgoto\b", text), f"{name(path)}: goto"
    assert not re.search(r"#\s*pragma\s+omp\s+(?!simd)", text), f"{name(path)}: OpenMP runtime"
    assert not re.search(r"_Pragma\(\"omp (?!simd)", path.read_text())
    assert not re.search(r"\b(float|double)\s*\w*\[[a-z]\w*\s*[*+]?[^\]]*\]\s*;", text) or _no_vla(path)


def _no_vla(path: Path) -> bool:
    compiler = shutil.which("cc")
    if not compiler:
        return True
    command = [compiler, "-std=c11", "-fopenmp-simd", "-fsyntax-only", "-Werror=vla", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@by_name(C_FILES)
def test_no_mutable_globals(path):
    """File-scope data is const, but for what is set once, at import, and the memory that memory.c keeps."""
    allowed = {"cuda_backend", "methods", "slots", "definition"}
    if path.name == "memory.c":
        allowed |= {"bound", "kept", "oldest"}  # atomic, like its slots
    text = without_comments(path.read_text())
    text = re.sub(r"^\s*#(?:.*\\\n)*.*$", "", text, flags=re.M)
    for line in text.splitlines():
        match = re.match(r"^(?:static )(?!inline\b)(?:[\w*]+ )*\**(\w+)(?:\[\w*\])*( =.*|;)$", line)
        if match and "(" not in line.split("=")[0]:
            is_const = re.match(r"^static (_Thread_local )?const\b", line) or "*const " in line
            assert is_const or match[1] in allowed, f"{name(path)}: {line}"


@by_name([p for p in CPU_FILES if p.suffix == ".c" and p.stem not in ("backend", "runtime")])
def test_kernel_files_open_with_what_they_compute(path):
    comment = re.match(r"/\* SPDX.*?\*/", path.read_text(), re.S)
    assert comment
    lines = comment[0].count("\n") + 1
    assert lines >= 9, f"{name(path)}: formula, shapes, bytes, numerics, determinism: {lines} lines"
    assert path.name in comment[0]


def compiler_or_skip(command: str) -> str:
    found = shutil.which(command)
    if not found:
        pytest.skip(f"no {command} here")
    return found


@pytest.mark.parametrize(
    ("compiler", "language", "standard"),
    [("cc", "c", "c11"), ("c++", "c++", "c++17"), ("clang", "c", "c11"), ("clang", "c++", "c++17")],
)
def test_header_compiles(compiler, language, standard, tmp_path):
    source = tmp_path / "user"
    source.write_text(
        '#include "semisam.h"\n'
        "int main(void) {\n"
        "    ss_exec x = ss_exec_cpu(0);\n"
        "    int64_t shape[2] = {1, 2};\n"
        "    ss_tensor t = ss_tensor_of(0, SS_F32, 2, shape);\n"
        "    return (int)(x.threads + t.ndim - 2 + (SS_OPS > 0 ? 0 : 1));\n"
        "}\n"
    )
    flags = [f"-std={standard}", "-pedantic", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    command = [compiler_or_skip(compiler), "-x", language, *flags, "-fsyntax-only"]
    done = subprocess.run(
        [*command, f"-I{ROOT / 'csrc'}", str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_extension_exports_its_init_function_alone():
    output = subprocess.run(
        [compiler_or_skip("nm"), "-D", "--defined-only", _core.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols = {line.split()[-1].split("@")[0] for line in output.splitlines() if line}
    sanitizer = {s for s in symbols if s.startswith(("__asan", "__odr_asan", "__ubsan", "_fini", "_init"))}
    assert symbols - sanitizer == {"PyInit__core"}


# ---- Python -------------------------------------------------------------------------------------


def run_tool(module: str, *args: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'semisam[dev]'")
    command = [sys.executable, "-m", module, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_is_content():
    run_tool("ruff", "check", ".")


def test_ruff_format_is_content():
    run_tool("ruff", "format", "--check", ".")


def test_mypy_is_content():
    run_tool("mypy")


def test_clang_format_is_content():
    clang_format = Path(sys.executable).with_name("clang-format")  # the pinned one: versions differ
    if not clang_format.exists():
        pytest.skip("clang-format is not installed: pip install 'semisam[dev]'")
    command = [clang_format, "--dry-run", "--Werror", *map(name, tree(".c", ".h"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_stub_matches_the_extension(tmp_path):
    """The stub covers operators by __getattr__; everything else it must name."""
    allowed = tmp_path / "operators"
    allowed.write_text("".join(f"semisam\\._core\\.{op}\n" for op in ops.SCHEMA))
    run_tool("mypy.stubtest", "semisam._core", "--allowlist", str(allowed))


def test_schema_is_the_one_of_ops_def():
    """The extension was built from this tree's ops.def: names, arguments, dtypes and shapes."""
    text = without_comments_keep_strings((ROOT / "csrc/ops.def").read_text())
    for op in re.split(r"\bSS_OP\(", text)[1:]:
        operator = re.match(r"(\w+),", op)
        assert operator
        found = re.findall(r'SS_(IN|OPT|LIST|OUT)\s*\((\w+),\s*"([^"]*)",\s*"([^"]*)"\)', op)
        tensors = [(a.kind.upper(), a.name, a.dtype, a.shape) for a in ops.SCHEMA[operator[1]] if a.shape]
        assert tensors == found, f"{operator[1]}: rebuild the extension: make build"
    listed = set(re.findall(r"\bSS_OP\((\w+),", text))
    assert listed == set(ops.SCHEMA), "rebuild the extension: make build"


def without_comments_keep_strings(text: str) -> str:
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.S)


def fresh(code: str) -> str:
    """What `code` prints in a new interpreter."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_import_needs_numpy_alone():
    code = (
        "import sys, json, numpy; before = set(sys.modules); import semisam; "
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    loaded = set(json.loads(fresh(code)))
    assert loaded - set(sys.stdlib_module_names) == {"semisam"}
    assert not loaded & {"torch", "subprocess", "asyncio", "unittest", "multiprocessing"}


@pytest.mark.parametrize(
    "module",
    [
        "ops",
        "prompts",
        "fusion",
        "masks",
        "metrics",
        "random_walk",
        "schedules",
        "generalists",
        "gate",
        "fetch",
    ],
)
def test_modules_import_without_torch(module):
    code = f"import sys, semisam.{module}; print('torch' in sys.modules)"
    assert fresh(code).strip() == "False"


def test_lazy_names_are_those_of_their_modules():
    for public, module in semisam._NAMES.items():
        assert getattr(semisam, public) is getattr(importlib.import_module(f"semisam.{module}"), public)
        assert public in dir(semisam)


def test_public_names_exist_and_are_documented():
    for public in semisam.__all__:
        assert getattr(semisam, public).__doc__, public
    for path in PACKAGE:
        if path.stem == "__main__":
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
        assert module.__doc__, name(path)
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            assert not callable(value) or value.__doc__, f"{module.__name__}.{public}"


def test_version_is_one():
    assert (ROOT / "semisam/VERSION").read_text().strip() == _core.build_info()["version"]
    assert semisam.__version__ == _core.build_info()["version"]


def test_constraints_pin_everything_once():
    lines = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    names = [re.fullmatch(r"([A-Za-z0-9_.-]+)==([A-Za-z0-9_.]+)", line) for line in lines]
    assert all(names), [line for line, match in zip(lines, names, strict=True) if not match]
    assert len({m[1].lower() for m in names if m}) == len(lines)
    assert "torch==2.13.0" in lines
