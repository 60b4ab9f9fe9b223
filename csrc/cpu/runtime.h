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

/* The most threads that ss_parallel_for will use for n items in groups of `grain`: for scratch. */
int32_t ss_parallel_threads(const ss_exec *x, int64_t n, int64_t grain);
/* Calls body for groups of `grain` items until all n are done; returns when they are. The caller
 * begins alone and its pace decides whether others are started, so a grain need not be worth a
 * thread: small groups tell the pace early, and are shared out evenly. */
void ss_parallel_for(const ss_exec *x, int64_t n, int64_t grain, ss_body body, void *ctx);

/* A team that lives for one call, for algorithms of many short sweeps that depend on each other:
 * body runs once on each of `threads` threads (fewer if the system has none to spare: see
 * ss_region_threads), and ss_barrier returns when all of them have reached it. Whatever a thread
 * wrote before a barrier is visible to all behind it. All threads are joined on return. */
typedef struct ss_region ss_region;
typedef void (*ss_region_body)(void *ctx, ss_region *region, int32_t thread);
void ss_parallel_region(int32_t threads, ss_region_body body, void *ctx);
int32_t ss_region_threads(const ss_region *region);
void ss_barrier(ss_region *region);

/* count * size bytes aligned to 64, or NULL with the sentence already in x->error. Free with
 * ss_scratch_free, which takes NULL. Large pieces wait for the next call: see ss_keep_at_most. */
void *ss_scratch(ss_exec *x, int64_t count, size_t size);
void ss_scratch_free(void *p);

/* Asks the system for huge pages behind a large fresh buffer; harmless where it cannot. */
void ss_advise_huge(void *data, size_t bytes);

/* Writes one sentence into x->error and returns `status`. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
ss_status ss_fail(ss_exec *x, ss_status status, const char *format, ...);

#endif
