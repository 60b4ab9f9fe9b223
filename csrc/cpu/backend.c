/* SPDX-License-Identifier: Apache-2.0
 *
 * backend.c: the CPU tables, one per instruction set that was compiled in.
 *
 * Every operator of ops.def has a kernel SS_CPU(op); the linker says which one is missing.
 */
#include "../semisam.h"
#include "isa.h"

#define SS_OP(op, doc, args) ss_status ss_cpu_##op##_base(ss_exec *, const ss_##op##_args *);
#include "../ops.def"
static const ss_backend base = {
    SS_ABI,
    SS_CPU,
    "cpu",
    "base",
#define SS_OP(op, doc, args) ss_cpu_##op##_base,
#include "../ops.def"
#define SS_OP(op, doc, args) NULL, /* no workspace: the CPU has ss_scratch */
#include "../ops.def"
};

#ifdef SS_WITH_V3 /* AVX2 */
#define SS_OP(op, doc, args) ss_status ss_cpu_##op##_v3(ss_exec *, const ss_##op##_args *);
#include "../ops.def"
static const ss_backend v3 = {
    SS_ABI,
    SS_CPU,
    "cpu",
    "v3",
#define SS_OP(op, doc, args) ss_cpu_##op##_v3,
#include "../ops.def"
#define SS_OP(op, doc, args) NULL, /* no workspace: the CPU has ss_scratch */
#include "../ops.def"
};
#endif

#ifdef SS_WITH_V4 /* AVX-512 */
#define SS_OP(op, doc, args) ss_status ss_cpu_##op##_v4(ss_exec *, const ss_##op##_args *);
#include "../ops.def"
static const ss_backend v4 = {
    SS_ABI,
    SS_CPU,
    "cpu",
    "v4",
#define SS_OP(op, doc, args) ss_cpu_##op##_v4,
#include "../ops.def"
#define SS_OP(op, doc, args) NULL, /* no workspace: the CPU has ss_scratch */
#include "../ops.def"
};
#endif

/* All suffixes of the best list are lists themselves: best first, ending with what runs anywhere.
 */
const ss_backend *const *ss_cpu_backends(int32_t *n) {
    static const ss_backend *const all[] = {
#ifdef SS_WITH_V4
        &v4,
#endif
#ifdef SS_WITH_V3
        &v3,
#endif
        &base,
    };
    int32_t count = (int32_t)(sizeof all / sizeof all[0]);
    int32_t skip = 0;
#ifdef SS_WITH_V4
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl"))) {
        ++skip;
    }
#endif
#ifdef SS_WITH_V3
    if (all[skip] == &v3 && !__builtin_cpu_supports("avx2")) {
        ++skip;
    }
#endif
    *n = count - skip;
    return all + skip;
}
