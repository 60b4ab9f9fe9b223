/* SPDX-License-Identifier: Apache-2.0
 *
 * runtime.h: threads, scratch memory and error text for CPU kernels.
 *
 * Work is cut into items whose size depends on the problem alone. Threads take items in any order
 * and each item writes its own place, so results do not depend on the thread count; whoever sums
 * over items does so afterwards, in item order, in double.
 */
#ifndef SS_CPU_RUNTIME_H
#define SS_CPU_RUNTIME_H

#include "../semisam.h"

/* Runs items begin..end-1; `thread` is 0..threads-1, for choosing a scratch area. */
typedef void (*ss_body)(void *ctx, int64_t begin, int64_t end, int32_t thread);

/* How many threads ss_parallel_for will use for n items in groups of `grain`. */
int32_t ss_parallel_threads(const ss_exec *x, int64_t n, int64_t grain);
/* Calls body for groups of `grain` items until all n are done; returns when they are. */
void ss_parallel_for(const ss_exec *x, int64_t n, int64_t grain, ss_body body, void *ctx);

/* count * size bytes aligned to 64, or NULL with the sentence already in x->error. Free with
 * ss_scratch_free, which takes NULL. */
void *ss_scratch(ss_exec *x, int64_t count, size_t size);
void ss_scratch_free(void *p);

/* Writes one sentence into x->error and returns `status`. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
ss_status ss_fail(ss_exec *x, ss_status status, const char *format, ...);

#endif
