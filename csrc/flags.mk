# SPDX-License-Identifier: Apache-2.0
# Compiler flags of the core, the one list for setup.py and the Makefile: NAME = words, one per line.
# Never -ffast-math; no fused multiply-add, so that every instruction set gives the same bits.
SS_FLAGS = -std=c11 -O3 -fopenmp-simd -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -fPIC -Wall -Wextra -Wno-unknown-pragmas
SS_FLAGS_v3 = -march=x86-64-v3
# gcc would use 256-bit vectors for x86-64-v4 on its own.
SS_FLAGS_v4 = -march=x86-64-v4 -mprefer-vector-width=512
# Files of the core that are compiled once; every other file in csrc/cpu once per instruction set.
SS_ONCE = csrc/core.c csrc/cpu/backend.c csrc/cpu/runtime.c csrc/cpu/memory.c
# The CUDA library. Products are not contracted, so that ss_math.h gives the CPU's bits.
SS_NVCC_FLAGS = -std=c++17 -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -Xptxas=-v,-warn-spills
