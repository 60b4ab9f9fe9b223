# SPDX-License-Identifier: Apache-2.0
"""Builds the C core: csrc/ -> semisam._core. Everything else is in pyproject.toml.

Every kernel file in csrc/cpu is compiled once per instruction set; cpu/backend.c picks at run time.
"""

import os
import platform
import sys
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
VERSION = (HERE / "semisam" / "VERSION").read_text().strip()
ONCE = ["csrc/core.c", "csrc/cpu/backend.c", "csrc/cpu/runtime.c"]
KERNELS = sorted(
    str(p.relative_to(HERE)) for p in (HERE / "csrc/cpu").glob("*.c") if str(p.relative_to(HERE)) not in ONCE
)
BINDING = sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc/python").glob("*.c"))
DEPENDS = sorted(
    str(p.relative_to(HERE)) for pattern in ("*.h", "*.def", "*/*.h") for p in (HERE / "csrc").glob(pattern)
)
FLAGS = [
    *["-std=c11", "-O3", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
    *["-fvisibility=hidden", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"],
    *os.environ.get("SEMISAM_CFLAGS", "").split(),
]
# gcc would use 256-bit vectors for x86-64-v4 on its own.
ISAS = {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
if platform.machine().lower() not in ("x86_64", "amd64") or os.environ.get("SEMISAM_ISA") == "base":
    ISAS = {}
if sys.platform == "darwin":
    ISAS.pop("v4", None)


class BuildCore(build_ext):
    """build_ext that compiles the kernels once more for each instruction set."""

    def build_extension(self, ext):
        for isa, flags in ISAS.items():
            ext.extra_objects += self.compiler.compile(
                KERNELS,
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("SS_ISA", isa)],
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "semisam._core",
            sources=[*ONCE, *KERNELS, *BINDING],
            depends=DEPENDS,
            include_dirs=[numpy.get_include()],
            define_macros=[
                ("SEMISAM_VERSION", f'"{VERSION}"'),
                *((f"SS_WITH_{isa.upper()}", "1") for isa in ISAS),
            ],
            extra_compile_args=FLAGS,
            libraries=["m"] if os.name == "posix" else [],
            extra_link_args=["-pthread"] if os.name == "posix" else [],
        )
    ],
    cmdclass={"build_ext": BuildCore},
)
