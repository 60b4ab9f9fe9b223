/* SPDX-License-Identifier: Apache-2.0
 *
 * isa.h: every kernel file is compiled once per instruction set with -DSS_ISA=<suffix>; SS_CPU(op)
 * is the kernel's name with that suffix. Since fused multiply-add is off and lanes are fixed, all
 * of them give the same bits; only speed differs. Everything else in a kernel file is `static`.
 */
#ifndef SS_CPU_ISA_H
#define SS_CPU_ISA_H

#ifndef SS_ISA
#define SS_ISA base
#endif
#define SS_PASTE_(a, b, c) a##b##_##c
#define SS_PASTE(a, b, c) SS_PASTE_(a, b, c)
#define SS_CPU(op) SS_PASTE(ss_cpu_, op, SS_ISA)

#endif
