# SPDX-License-Identifier: Apache-2.0
"""Builds the C core: csrc/ -> semisam._core. Everything else is in pyproject.toml.

Every kernel file in csrc/cpu is compiled once per instruction set; cpu/backend.c picks at run time.
Flags are those of csrc/flags.mk, which the Makefile reads, too.
"""

import os
import platform
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


class BuildCore(build_ext):
    """build_ext that compiles in parallel, the kernels once more for each instruction set."""

    def build_extension(self, ext):
        if not (self.force or newer_group(ext.sources + ext.depends, self.get_ext_fullpath(ext.name))):
            return
        jobs = [("base", source) for source in ext.sources]
        jobs += [(isa, source) for isa in ISAS for source in KERNELS]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "0")) or os.cpu_count()) as pool:
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
