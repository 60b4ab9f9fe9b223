/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "runtime.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

/* Spawned and joined within the call: a pool, like OpenMP's, would hang children forked after its
 * first use, and DataLoader forks. A thread costs its caller 20 to 40 us to start and a few to
 * join, and begins 40 to 60 us after it was asked for; so the caller begins alone, and its own pace
 * says whether what is left is worth company. */

#define SS_SHARE 125e-6 /* seconds of work that a thread must find */
#define SS_SURE 20e-6   /* seconds after which a pace means something: beginnings are slow */
#define SS_FEW 8        /* groups: with fewer, one of them alone would be a large part of all */
#define SS_SPIN 100e-6  /* seconds: a core that sleeps takes as long to wake */

static double ss_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void ss_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    for (int i = 0; i < 8; ++i) {
        __builtin_ia32_pause();
    }
#endif
}

/* ---- threads, one after the other ----------------------------------------------------------- */

/* New threads are put on any core but the caller's: kernels that pack their tasks (guests do) leave
 * a thread on the core that made it, waiting for a time slice while other cores are idle. */
typedef struct ss_starter {
    pthread_attr_t *attr; /* `own`, or NULL: wherever the system likes */
    pthread_attr_t own;
} ss_starter;

static void ss_starter_begin(ss_starter *s) {
    s->attr = NULL;
#if defined(__GLIBC__)
    cpu_set_t set;
    int here = sched_getcpu();
    if (here < 0 || sched_getaffinity(0, sizeof set, &set) != 0) {
        return;
    }
    CPU_CLR((size_t)here, &set);
    if (CPU_COUNT(&set) == 0 || pthread_attr_init(&s->own) != 0) {
        return;
    }
    s->attr = &s->own;
    if (pthread_attr_setaffinity_np(s->attr, sizeof set, &set) != 0) {
        pthread_attr_destroy(s->attr);
        s->attr = NULL;
    }
#endif
}

static int ss_start(const ss_starter *s, pthread_t *handle, void *(*entry)(void *), void *arg) {
    int error = pthread_create(handle, s->attr, entry, arg);
    if (error == EINVAL && s->attr) { /* those cores were taken away meanwhile */
        error = pthread_create(handle, NULL, entry, arg);
    }
    return error;
}

static void ss_starter_end(ss_starter *s) {
    if (s->attr) {
        pthread_attr_destroy(s->attr);
    }
}

/* Waits for a thread that others keep from its core: it gets the caller's, who sleeps. */
static void ss_join_here(pthread_t handle) {
#if defined(__GLIBC__)
    cpu_set_t own, here;
    int core = sched_getcpu();
    if (core >= 0 && core < CPU_SETSIZE && sched_getaffinity(0, sizeof own, &own) == 0) {
        CPU_ZERO(&here);
        CPU_SET((size_t)core, &here);
        (void)pthread_setaffinity_np(handle, sizeof here, &here);
        pthread_join(handle, NULL);
        /* A thread that just ended has no number, and none is the caller's: */
        if (sched_getaffinity(0, sizeof here, &here) == 0 && !CPU_EQUAL(&here, &own)) {
            (void)sched_setaffinity(0, sizeof own, &own);
        }
        return;
    }
#endif
    pthread_join(handle, NULL);
}

/* Most threads are about to end when they are waited for: asleep, the caller would come back later,
 * so it stays awake for `patience` seconds. A thread that is not there by then, or has not even
 * begun, waits for a time slice: milliseconds. */
static void ss_join(pthread_t handle, const atomic_int *begun, double patience) {
#if defined(__linux__)
    double until = ss_seconds() + patience;
    while (atomic_load_explicit(begun, memory_order_relaxed) && ss_seconds() < until) {
        if (pthread_tryjoin_np(handle, NULL) == 0) {
            return;
        }
        ss_pause();
    }
#else
    (void)begun;
    (void)patience;
#endif
    ss_join_here(handle);
}

/* ---- items ---------------------------------------------------------------------------------- */

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
    atomic_int begun;
    pthread_t handle;
} ss_worker;

static int64_t ss_group(const ss_team *team, int64_t begin, int32_t thread) {
    int64_t left = team->n - begin;
    int64_t end = begin + (left < team->grain ? left : team->grain);
    team->body(team->ctx, begin, end, thread);
    return end;
}

/* Groups until there are none; returns how many that were. */
static int64_t ss_work(ss_team *team, int32_t thread) {
    for (int64_t groups = 0;; ++groups) {
        int64_t begin = atomic_fetch_add_explicit(&team->next, team->grain, memory_order_relaxed);
        if (begin >= team->n) {
            return groups;
        }
        ss_group(team, begin, thread);
    }
}

static void *ss_worker_main(void *p) {
    ss_worker *w = p;
    atomic_store_explicit(&w->begun, 1, memory_order_relaxed);
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
    int64_t threads = n / grain + (n % grain != 0);
    if (threads > 1 && x->threads < 0) {
        threads = threads < -(int64_t)x->threads ? threads : -(int64_t)x->threads;
    } else if (threads > 1 && x->threads != 1) {
        int64_t cores = ss_cpu_count();
        cores = x->threads > 0 && x->threads < cores ? x->threads : cores;
        threads = threads < cores ? threads : cores;
    } else {
        threads = 1;
    }
    return threads < SS_MAX_THREADS ? (int32_t)threads : SS_MAX_THREADS;
}

/* The caller's groups before anybody is asked to help; returns how many items that were, and how
 * many threads (of at most *threads) should do the rest. */
static int64_t ss_begin_alone(const ss_team *team, int32_t *threads) {
    const double start = ss_seconds();
    for (int64_t done = 0; done < team->n;) {
        done = ss_group(team, done, 0);
        double spent = ss_seconds() - start;
        double shares = spent * (double)(team->n - done) / (double)done / SS_SHARE;
        if (spent >= SS_SURE && shares >= 2.0) {
            *threads = shares < (double)*threads ? (int32_t)shares : *threads;
            return done;
        }
    }
    return team->n;
}

static void ss_work_together(ss_team *team, int32_t threads) {
    ss_worker workers[SS_MAX_THREADS];
    ss_starter starter;
    int32_t started = 0;
    ss_starter_begin(&starter);
    for (int32_t t = 1; t < threads; ++t) {
        workers[started].team = team;
        workers[started].thread = t;
        atomic_init(&workers[started].begun, 0);
        if (ss_start(&starter, &workers[started].handle, ss_worker_main, &workers[started]) != 0) {
            break; /* the caller does what is left: slower, same result */
        }
        ++started;
    }
    ss_starter_end(&starter);
    const double start = ss_seconds();
    const int64_t groups = ss_work(team, 0);
    const double each = groups ? (ss_seconds() - start) / (double)groups : 0.0;
    for (int32_t t = 0; t < started; ++t) {
        ss_join(workers[t].handle, &workers[t].begun, SS_SPIN + each);
    }
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
    int64_t done = 0;
    if (x->threads >= 0 && n / grain >= SS_FEW) {
        done = ss_begin_alone(&team, &threads);
    }
    atomic_init(&team.next, done);
    if (done < n) {
        ss_work_together(&team, threads);
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
    atomic_int begun;
    pthread_t handle;
} ss_member;

static void ss_next_phase(ss_region *region) {
    pthread_mutex_lock(&region->lock);
    atomic_fetch_add_explicit(&region->phase, 1, memory_order_release);
    pthread_cond_broadcast(&region->moved);
    pthread_mutex_unlock(&region->lock);
}

static void ss_await_phase(ss_region *region, unsigned phase) {
    double until = 0.0;
    do {
        for (int i = 0; i < 16; ++i) {
            if (atomic_load_explicit(&region->phase, memory_order_acquire) != phase) {
                return;
            }
            ss_pause();
        }
        until = until > 0.0 ? until : ss_seconds() + SS_SPIN;
    } while (ss_seconds() < until);
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
    atomic_store_explicit(&m->begun, 1, memory_order_relaxed);
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
    ss_starter starter;
    int32_t started = 1;
    ss_starter_begin(&starter);
    for (; started < threads; ++started) {
        members[started].region = &region;
        members[started].thread = started;
        atomic_init(&members[started].begun, 0);
        if (ss_start(&starter, &members[started].handle, ss_member_main, &members[started]) != 0) {
            break; /* fewer threads: slower, same result */
        }
    }
    ss_starter_end(&starter);
    region.threads = started;
    ss_next_phase(&region);
    body(ctx, &region, 0);
    for (int32_t t = 1; t < started; ++t) {
        ss_join(members[t].handle, &members[t].begun, SS_SPIN);
    }
    pthread_cond_destroy(&region.moved);
    pthread_mutex_destroy(&region.lock);
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
