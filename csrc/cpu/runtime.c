/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "runtime.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

/* Spawned and joined within the call: a pool, like OpenMP's, would hang children forked after its
 * first use, and DataLoader forks. Two threads cost about 35 us, so callers choose a grain that is
 * worth more than that. */

typedef struct ss_team {
    ss_body body;
    void *ctx;
    int64_t n;
    int64_t grain;
    atomic_int_fast64_t next;
} ss_team;

typedef struct ss_worker {
    ss_team *team;
    int32_t thread;
    pthread_t handle;
} ss_worker;

static void ss_work(ss_team *team, int32_t thread) {
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&team->next, team->grain, memory_order_relaxed);
        if (begin >= team->n) {
            return;
        }
        int64_t left = team->n - begin;
        team->body(team->ctx, begin, begin + (left < team->grain ? left : team->grain), thread);
    }
}

static void *ss_worker_main(void *p) {
    ss_worker *w = p;
    ss_work(w->team, w->thread);
    return NULL;
}

int32_t ss_cpu_count(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        int32_t n = CPU_COUNT(&set);
        return n < 1 ? 1 : (n > SS_MAX_THREADS ? SS_MAX_THREADS : n);
    }
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : (n > SS_MAX_THREADS ? SS_MAX_THREADS : (int32_t)n);
}

int32_t ss_parallel_threads(const ss_exec *x, int64_t n, int64_t grain) {
    int64_t groups = n / grain + (n % grain != 0);
    int64_t threads = x->threads > 0 ? x->threads : ss_cpu_count();
    threads = threads < groups ? threads : groups;
    threads = threads < SS_MAX_THREADS ? threads : SS_MAX_THREADS;
    return threads < 1 ? 1 : (int32_t)threads;
}

void ss_parallel_for(const ss_exec *x, int64_t n, int64_t grain, ss_body body, void *ctx) {
    if (n <= 0) {
        return;
    }
    int32_t threads = ss_parallel_threads(x, n, grain);
    if (threads == 1) {
        body(ctx, 0, n, 0);
        return;
    }
    ss_team team = {.body = body, .ctx = ctx, .n = n, .grain = grain};
    atomic_init(&team.next, 0);
    ss_worker workers[SS_MAX_THREADS];
    int32_t started = 0;
    for (int32_t t = 1; t < threads; ++t) {
        workers[started] = (ss_worker){.team = &team, .thread = t};
        if (pthread_create(&workers[started].handle, NULL, ss_worker_main, &workers[started]) !=
            0) {
            break; /* the caller does what is left: slower, same result */
        }
        ++started;
    }
    ss_work(&team, 0);
    for (int32_t t = 0; t < started; ++t) {
        pthread_join(workers[t].handle, NULL);
    }
}

/* ---- a team with a barrier ------------------------------------------------------------------ */

struct ss_region {
    ss_region_body body;
    void *ctx;
    pthread_mutex_t lock;
    pthread_cond_t moved;
    atomic_int arrived;
    atomic_uint phase; /* how many barriers have been passed; the first one is the start */
    int32_t threads;
};

typedef struct ss_member {
    ss_region *region;
    int32_t thread;
    pthread_t handle;
} ss_member;

/* About 10 us: longer than a sweep's threads differ by, shorter than a time slice of a busy core.
 */
#define SS_SPINS 256

static void ss_next_phase(ss_region *region) {
    pthread_mutex_lock(&region->lock);
    atomic_fetch_add_explicit(&region->phase, 1, memory_order_release);
    pthread_cond_broadcast(&region->moved);
    pthread_mutex_unlock(&region->lock);
}

static void ss_await_phase(ss_region *region, unsigned phase) {
    for (int32_t i = 0; i < SS_SPINS; ++i) {
        if (atomic_load_explicit(&region->phase, memory_order_acquire) != phase) {
            return;
        }
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }
    pthread_mutex_lock(&region->lock);
    while (atomic_load_explicit(&region->phase, memory_order_acquire) == phase) {
        pthread_cond_wait(&region->moved, &region->lock);
    }
    pthread_mutex_unlock(&region->lock);
}

int32_t ss_region_threads(const ss_region *region) {
    return region->threads;
}

void ss_barrier(ss_region *region) {
    if (region->threads == 1) {
        return;
    }
    unsigned phase = atomic_load_explicit(&region->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&region->arrived, 1, memory_order_acq_rel) + 1 ==
        region->threads) {
        atomic_store_explicit(&region->arrived, 0, memory_order_relaxed);
        ss_next_phase(region);
    } else {
        ss_await_phase(region, phase);
    }
}

static void *ss_member_main(void *p) {
    ss_member *m = p;
    ss_await_phase(m->region, 0); /* until it is known how many there are */
    m->region->body(m->region->ctx, m->region, m->thread);
    return NULL;
}

void ss_parallel_region(int32_t threads, ss_region_body body, void *ctx) {
    ss_region region = {.body = body, .ctx = ctx, .threads = 1};
    if (threads <= 1) {
        body(ctx, &region, 0);
        return;
    }
    threads = threads < SS_MAX_THREADS ? threads : SS_MAX_THREADS;
    pthread_mutex_init(&region.lock, NULL);
    pthread_cond_init(&region.moved, NULL);
    atomic_init(&region.arrived, 0);
    atomic_init(&region.phase, 0);
    ss_member members[SS_MAX_THREADS];
    int32_t started = 1;
    for (; started < threads; ++started) {
        members[started] = (ss_member){.region = &region, .thread = started};
        if (pthread_create(&members[started].handle, NULL, ss_member_main, &members[started]) !=
            0) {
            break; /* fewer threads: slower, same result */
        }
    }
    region.threads = started;
    ss_next_phase(&region);
    body(ctx, &region, 0);
    for (int32_t t = 1; t < started; ++t) {
        pthread_join(members[t].handle, NULL);
    }
    pthread_cond_destroy(&region.moved);
    pthread_mutex_destroy(&region.lock);
}

void *ss_scratch(ss_exec *x, int64_t count, size_t size) {
    void *p = NULL;
    if (count >= 0 && (uint64_t)count <= (SIZE_MAX / 2) / size) {
        size_t bytes = (size_t)count * size;
        if (posix_memalign(&p, 64, bytes < 64 ? 64 : bytes) == 0) {
            ss_advise_huge(p, bytes);
            return p;
        }
    }
    snprintf(x->error, sizeof x->error, "could not allocate %lld x %zu bytes of scratch memory",
             (long long)count, size);
    return NULL;
}

void ss_scratch_free(void *p) {
    free(p);
}

void ss_advise_huge(void *data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)2 << 20;
    uintptr_t begin = ((uintptr_t)data + page - 1) & ~(page - 1);
    uintptr_t end = ((uintptr_t)data + bytes) & ~(page - 1);
    if (bytes >= 2 * page && end > begin) {
        (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
    }
#else
    (void)data;
    (void)bytes;
#endif
}

ss_status ss_fail(ss_exec *x, ss_status status, const char *format, ...) {
    va_list ap;
    va_start(ap, format);
    vsnprintf(x->error, sizeof x->error, format, ap);
    va_end(ap);
    return status;
}
