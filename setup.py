# SPDX-License-Identifier: Apache-2.0
"""Builds the C core and the CUDA library. Everything else is in pyproject.toml.

csrc/ -> semisam._core. Every kernel file in csrc/cpu is compiled once per instruction set;
cpu/backend.c picks at run time. Flags are those of csrc/flags.mk, which the Makefile reads, too.

csrc/cuda/ -> semisam/libsemisam_cuda.so, by nvcc alone: neither torch nor a GPU is needed.
    SEMISAM_CUDA         auto (the default): where nvcc is found; 1: or the build fails; 0: not at all
    SEMISAM_CUDA_ARCHS   such as "75;80;90": machine code for each, and PTX for GPUs that come later;
                         "80-real;90-real" leaves the PTX out
    CUDACXX, CUDA_HOME   where nvcc is, if not on PATH        CUDAHOSTCXX   its host compiler
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

HERE = Path(__file__).parent
VERSION = (HERE / "semisam" / "VERSION").read_text().strip()


def files(*patterns):
    return sorted(str(p.relative_to(HERE)) for pattern in patterns for p in (HERE / "csrc").glob(pattern))


LISTS = {
    name: words.split()
    for name, equals, words in (
        line.partition(" = ") for line in (HERE / "csrc/flags.mk").read_text().splitlines()
    )
    if equals and not name.startswith("#")
}
KERNELS = [name for name in files("cpu/*.c") if name not in LISTS["SS_ONCE"]]
SOURCES = [*LISTS["SS_ONCE"], *KERNELS, *files("python/*.c")]
FLAGS = [*LISTS["SS_FLAGS"], *os.environ.get("SEMISAM_CFLAGS", "").split()]
ISAS = ["v3", "v4"]
if platform.machine().lower() not in ("x86_64", "amd64") or os.environ.get("SEMISAM_ISA") == "base":
    ISAS = []
if sys.platform == "darwin":
    ISAS = ISAS[:1]


def workers():
    return int(os.environ.get("MAX_JOBS", "0")) or os.cpu_count()


class NoCuda(Exception):
    """Why there is no CUDA library."""


class CudaLibrary:
    """libsemisam_cuda.so: csrc/cuda compiled by nvcc, objects reused as long as nothing changed."""

    NAME = "libsemisam_cuda.so"
    BUILD = HERE / "build" / "cuda"
    ARCHS = "75;80;86;89;90;100;103;120"

    def __init__(self):
        self.wanted = os.environ.get("SEMISAM_CUDA", "") or "auto"
        if self.wanted not in ("0", "1", "auto"):
            raise SystemExit(f"SEMISAM_CUDA: expected 0, 1 or auto, got {self.wanted}")

    def build(self, made):
        """Make the file `made`, or remove an old one; say in one line which and why."""
        try:
            said = self.make(made)
        except NoCuda as why:
            if self.wanted == "1":
                raise SystemExit(f"semisam: no CUDA library, and SEMISAM_CUDA=1 wants one: {why}") from None
            made.unlink(missing_ok=True)
            said = f"no CUDA library: {why}"
        print(f"semisam: {said}", file=sys.stderr)

    def make(self, made):
        if self.wanted == "0":
            raise NoCuda("SEMISAM_CUDA=0")
        if not sys.platform.startswith("linux"):
            raise NoCuda(f"it is for Linux, this is {sys.platform}")
        nvcc = self.find_nvcc()
        codes, base = self.architectures(nvcc)
        host = ["-ccbin", os.environ["CUDAHOSTCXX"]] if os.environ.get("CUDAHOSTCXX") else []
        code = f"arch=compute_{base},code=[{','.join(codes)}]"
        command = [nvcc, *LISTS["SS_NVCC_FLAGS"], *host, "-gencode", code]
        command.append(f'-DSS_CUDA_ARCHS="{" ".join(codes)}"')
        sources = sorted((HERE / "csrc/cuda").glob("*.cu"), key=lambda p: -p.stat().st_size)
        self.BUILD.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(workers()) as pool:  # the largest first: nobody waits for it at the end
            results = list(pool.map(lambda source: self.compile(command, source), sources))
        objects, fresh = [r[0] for r in results], sum(r[1] for r in results)
        if fresh or not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            link = [nvcc, *host, "-shared", "-cudart=static", "-Xlinker", "--exclude-libs,ALL"]
            self.run([*link, "-o", made, *objects])
        return f"CUDA library for {' '.join(codes)} by {nvcc}: {fresh} of {len(objects)} files compiled"

    def find_nvcc(self):
        home = os.environ.get("CUDA_HOME")
        for nvcc in (os.environ.get("CUDACXX"), home and os.path.join(home, "bin", "nvcc"), "nvcc"):
            if nvcc and shutil.which(nvcc):
                return shutil.which(nvcc)
        raise NoCuda("nvcc not found on PATH, in CUDA_HOME or as CUDACXX")

    def architectures(self, nvcc):
        """(code names for nvcc, number of the PTX they are all made from): the oldest one asked for,
        which every later GPU can translate."""
        known = re.findall(r"sm_(\w+)", self.run([nvcc, "--list-gpu-code"]))
        asked = os.environ.get("SEMISAM_CUDA_ARCHS", "").strip()
        words = re.split(r"[;,\s]+", asked) if asked else [w for w in self.ARCHS.split(";") if w in known]
        for word in words:
            if not re.fullmatch(r"\d+(-real)?", word) or word.removesuffix("-real") not in known:
                text = f"expected architectures out of {' '.join(known)}, got {word}"
                raise NoCuda(f"SEMISAM_CUDA_ARCHS: {text}")
        numbers = sorted({int(word.removesuffix("-real")) for word in words})
        codes = [f"sm_{n}" for n in numbers]
        if not all(word.endswith("-real") for word in words):
            codes.append(f"compute_{numbers[0]}")
        return codes, numbers[0]

    def compile(self, command, source):
        """(object, whether it was compiled now); what ptxas says about registers goes beside it."""
        made, said = self.BUILD / f"{source.stem}.o", self.BUILD / f"{source.stem}.ptxas"
        first = " ".join(map(str, command))
        headers = [HERE / name for name in files("*.h", "*.def", "cuda/*.cuh")]
        if made.exists() and said.exists() and said.read_text().partition("\n")[0] == first:
            age = min(made.stat().st_mtime, said.stat().st_mtime)
            if all(p.stat().st_mtime < age for p in (source, *headers)):
                return made, False
        said.unlink(missing_ok=True)
        report = self.run([*command, "-c", source, "-o", made])
        said.write_text(f"{first}\n{report}")
        return made, True

    @staticmethod
    def run(command):
        done = subprocess.run(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            lines = [line for line in done.stdout.splitlines() if "error" in line] or ["no reason given"]
            raise NoCuda(f"{command[0]} failed: {lines[0]}")
        return done.stdout


class BuildCore(build_ext):
    """build_ext that compiles in parallel, the kernels once more for each instruction set."""

    def run(self):
        super().run()  # with --inplace this ends by copy_extensions_to_source
        if not self.inplace:
            self.cuda_library()

    def cuda_library(self):
        CudaLibrary().build(Path(self.build_lib, "semisam", CudaLibrary.NAME))

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        self.cuda_library()
        made = Path(self.build_lib, "semisam", CudaLibrary.NAME)
        here = HERE / "semisam" / CudaLibrary.NAME
        if made.exists():
            self.copy_file(str(made), str(here), level=self.verbose)
        else:
            here.unlink(missing_ok=True)  # one of another build would not fit these sources

    def build_extension(self, ext):
        if not (self.force or newer_group(ext.sources + ext.depends, self.get_ext_fullpath(ext.name))):
            return
        jobs = [("base", source) for source in ext.sources]
        jobs += [(isa, source) for isa in ISAS for source in KERNELS]
        with ThreadPoolExecutor(workers()) as pool:
            ext.extra_objects += pool.map(lambda job: self.compile_one(ext, *job), jobs)
        sources, ext.sources, self.force = ext.sources, [], True
        try:
            super().build_extension(ext)  # what is left to do is linking
        finally:
            ext.sources = sources

    def compile_one(self, ext, isa, source):
        (made,) = self.compiler.compile(
            [source],
            output_dir=os.path.join(self.build_temp, isa),
            macros=[*ext.define_macros, ("SS_ISA", isa)],
            include_dirs=ext.include_dirs,
            extra_postargs=[*FLAGS, *LISTS.get(f"SS_FLAGS_{isa}", [])],
        )
        return made


setup(
    ext_modules=[
        Extension(
            "semisam._core",
            sources=SOURCES,
            depends=files("*.h", "*.def", "*.mk", "*/*.h"),
            include_dirs=[numpy.get_include()],
            define_macros=[
                ("SEMISAM_VERSION", f'"{VERSION}"'),
                ("SS_API", ""),  # PyInit__core is all that the extension exports
                *((f"SS_WITH_{isa.upper()}", "1") for isa in ISAS),
            ],
            libraries=["m"] if os.name == "posix" else [],
            extra_link_args=["-pthread"] if os.name == "posix" else [],
        )
    ],
    cmdclass={"build_ext": BuildCore},
)
