/* SPDX-License-Identifier: Apache-2.0
 *
 * test_runtime.c: threads, nesting, fork after use, threads that cannot be started, scratch memory
 * and error text.
 */
#define _GNU_SOURCE
#include "check.h"
#include "cpu/runtime.h"
#include "wrap.h"

#include <sched.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef struct tally {
    atomic_int *hits; /* one per item */
    int64_t grain;
    int64_t n;
    int32_t threads;
    const ss_exec *x;
    atomic_int bad;
} tally;

static void count(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    tally *t = ctx;
    int whole = t->threads == 1; /* one thread gets everything in one call */
    if (begin < 0 || end > t->n || begin >= end || thread < 0 || thread >= t->threads ||
        (!whole && (begin % t->grain != 0 || end - begin > t->grain))) {
        atomic_fetch_add(&t->bad, 1);
        return;
    }
    for (int64_t i = begin; i < end; ++i) {
        atomic_fetch_add(&t->hits[i], 1);
    }
}

static void every_item_once(int64_t n, int64_t grain, int32_t threads) {
    ss_exec x = ss_exec_cpu(threads);
    tally t = {.grain = grain, .n = n, .threads = ss_parallel_threads(&x, n, grain)};
    t.hits = calloc((size_t)n + 1, sizeof *t.hits);
    ss_parallel_for(&x, n, grain, count, &t);
    int wrong = 0;
    for (int64_t i = 0; i < n; ++i) {
        wrong += atomic_load(&t.hits[i]) != 1;
    }
    CHECK(wrong == 0 && atomic_load(&t.bad) == 0, "n %lld grain %lld threads %d", (long long)n,
          (long long)grain, (int)threads);
    free(t.hits);
}

static void test_items(void) {
    const int64_t sizes[] = {0, 1, 2, 7, 64, 1000, 4097};
    const int64_t grains[] = {1, 2, 64, 5000};
    const int32_t threads[] = {0, 1, 2, 100000, -1, -2, -3, -16, -256, -100000};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; ++i) {
        for (size_t k = 0; k < sizeof grains / sizeof grains[0]; ++k) {
            for (size_t j = 0; j < sizeof threads / sizeof threads[0]; ++j) {
                every_item_once(sizes[i], grains[k], threads[j]);
            }
        }
    }
}

typedef struct late {
    atomic_int begun;
    int64_t microseconds;
} late;

/* The caller's item ends when the other thread has one, which takes longer. */
static void end_late(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    late *l = ctx;
    struct timespec start, now;
    (void)begin;
    (void)end;
    if (thread == 0) {
        while (!atomic_load(&l->begun)) {
            sched_yield();
        }
        return;
    }
    atomic_store(&l->begun, 1);
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - start.tv_sec) * 1000000 + (now.tv_nsec - start.tv_nsec) / 1000 <
             l->microseconds);
}

/* Late threads are moved to the caller's core, whatever their end coincides with; the caller stays
 * where it was. */
static void test_late_threads(void) {
#if defined(__linux__)
    cpu_set_t before, after;
    int moved = 0;
    sched_getaffinity(0, sizeof before, &before);
    for (int i = 0; i < 500 && !moved; ++i) {
        late l = {.microseconds = 90 + i % 200};
        atomic_init(&l.begun, 0);
        ss_exec x = ss_exec_cpu(-2);
        ss_parallel_for(&x, 2, 1, end_late, &l);
        sched_getaffinity(0, sizeof after, &after);
        moved = !CPU_EQUAL(&before, &after);
    }
    CHECK(!moved, "the caller keeps its cores");
#endif
}

static void test_thread_count(void) {
    ss_exec x = ss_exec_cpu(-4); /* at once, whatever the work and the machine */
    CHECK(ss_parallel_threads(&x, 100, 10) == 4, "as asked");
    CHECK(ss_parallel_threads(&x, 30, 10) == 3 && ss_parallel_threads(&x, 31, 10) == 4, "groups");
    CHECK(ss_parallel_threads(&x, 0, 10) == 1, "at least one");
    CHECK(ss_parallel_threads(&x, INT64_MAX, 1) == 4, "no overflow");
    x.threads = INT32_MIN;
    CHECK(ss_parallel_threads(&x, INT64_MAX, 1) == SS_MAX_THREADS, "the most there can be");
    x.threads = INT32_MAX;
    CHECK(ss_parallel_threads(&x, INT64_MAX, 1) == ss_cpu_count(), "no more than cores");
    x.threads = 1;
    CHECK(ss_parallel_threads(&x, INT64_MAX, 1) == 1, "one");
    x.threads = 0;
    CHECK(ss_parallel_threads(&x, INT64_MAX, 1) == ss_cpu_count(), "all cores");
    CHECK(ss_cpu_count() >= 1 && ss_cpu_count() <= SS_MAX_THREADS, "%d", (int)ss_cpu_count());
}

static void nested(void *ctx, int64_t begin, int64_t end, int32_t thread) {
    (void)thread;
    const tally *outer = ctx;
    for (int64_t i = begin; i < end; ++i) {
        tally t = {.grain = 3, .n = 20, .hits = outer->hits + 20 * i};
        t.threads = ss_parallel_threads(outer->x, t.n, t.grain);
        ss_parallel_for(outer->x, t.n, t.grain, count, &t);
    }
}

static void test_nesting(void) {
    ss_exec x = ss_exec_cpu(-3);
    static atomic_int hits[20 * 10];
    tally t = {.hits = hits, .x = &x};
    ss_parallel_for(&x, 10, 1, nested, &t);
    for (int i = 0; i < 200; ++i) {
        CHECK(atomic_load(&hits[i]) == 1, "item %d", i);
    }
}

static void test_fork(void) {
    every_item_once(1000, 10, -4);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        check_failures = 0;
        every_item_once(1000, 10, -4);
        _exit(check_failures != 0);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child, "fork");
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child computes: %d", status);
}

static void test_no_threads(void) {
    for (long n = 1; n <= 4; ++n) {
        atomic_store(&fail_thread, n);
        every_item_once(1000, 10, -4);
        CHECK(atomic_exchange(&fail_thread, 0) == (n < 4 ? 0 : 1), "failure %ld was not reached",
              n);
    }
}

static void test_blocks(void) {
    const size_t bytes = (size_t)3 << 20;
    ss_keep_at_most(0);
    ss_keep_at_most((size_t)8 << 20);
    char *first = ss_block_new(bytes), *second = ss_block_new(bytes);
    CHECK(first && second && (first + bytes <= second || second + bytes <= first), "apart");
    memset(first, 1, bytes);
    memset(second, 2, bytes);
    CHECK(first[bytes - 1] == 1 && second[0] == 2, "one block's bytes in the other");
    CHECK(ss_kept() == 0, "%zu bytes kept while all are used", ss_kept());
    ss_block_free(first);
    CHECK(ss_kept() >= bytes && ss_kept() <= bytes + 8192, "%zu bytes kept", ss_kept());
    char *larger = ss_block_new(bytes + 8192);
    CHECK(larger && larger != first, "a block that is too small");
    ss_keep_at_most(ss_kept()); /* `larger` finds no room */
    ss_block_free(larger);
    ss_keep_at_most((size_t)8 << 20);
    char *again = ss_block_new(bytes - 5000), *third = ss_block_new(bytes);
    CHECK(again == first, "a block that was given back is used again, for a bit less, too");
    CHECK(third && third != again && third != second, "one block, two users");
    ss_block_free(third);
    ss_block_free(second);
    ss_block_free(again); /* 9 MiB in all: the oldest goes */
    CHECK(ss_kept() > bytes && ss_kept() <= (size_t)8 << 20, "%zu bytes kept", ss_kept());
    ss_keep_at_most(0);
    CHECK(ss_kept() == 0, "%zu bytes kept, none allowed", ss_kept());
    ss_block_free(ss_block_new(bytes));
    CHECK(ss_kept() == 0, "%zu bytes kept, none allowed", ss_kept());
    CHECK(ss_block_new(SIZE_MAX) == NULL && ss_block_new(SIZE_MAX / 4) == NULL, "no such memory");
    ss_block_free(NULL);
    ss_keep_at_most((size_t)64 << 20);
}

/* More pieces than wait at once; each is its user's alone. */
static void test_much_scratch(ss_exec *x) {
    for (int i = 0; i < 20; ++i) {
        char *p[40];
        for (int k = 0; k < 40; ++k) {
            p[k] = ss_scratch(x, 150000 + 1000 * k, 1);
            CHECK(p[k] && ((uintptr_t)p[k] & 63) == 0, "piece %d", k);
            memset(p[k], k, p[k] ? 150000 : 0);
        }
        for (int k = 0; k < 40; ++k) {
            CHECK(p[k] && p[k][0] == k && p[k][149999] == k, "piece %d has another's bytes", k);
            ss_scratch_free(p[k]);
        }
    }
}

static void test_scratch(void) {
    ss_exec x = ss_exec_cpu(1);
    CHECK(ss_scratch(&x, INT64_MAX, 8) == NULL, "overflow");
    CHECK_TEXT(x.error, "could not allocate 9223372036854775807 x 8 bytes of scratch memory");
    CHECK(ss_scratch(&x, -1, 1) == NULL, "negative");
    CHECK_TEXT(x.error, "could not allocate -1 x 1 bytes of scratch memory");
    atomic_store(&fail_alloc, 1);
    CHECK(ss_scratch(&x, 5, 4) == NULL, "failure");
    CHECK_TEXT(x.error, "could not allocate 5 x 4 bytes of scratch memory");
    const int64_t counts[] = {0, 1, 63, 64, 65, 5 << 20};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; ++i) {
        char *p = ss_scratch(&x, counts[i], 1);
        CHECK(p && ((uintptr_t)p & 63) == 0, "%lld bytes, aligned to 64", (long long)counts[i]);
        if (p) {
            memset(p, 1, (size_t)counts[i]);
        }
        ss_scratch_free(p);
    }
    ss_scratch_free(NULL);
    test_much_scratch(&x);
    ss_advise_huge(NULL, 0);
    ss_advise_huge(&x, sizeof x);
}

static void test_fail(void) {
    ss_exec x = ss_exec_cpu(1);
    CHECK(ss_fail(&x, SS_FAILED, "%s: %d", "sizes", 3) == SS_FAILED, "status");
    CHECK_TEXT(x.error, "sizes: 3");
    ss_fail(&x, SS_FAILED, "%500d", 7);
    CHECK(strlen(x.error) == sizeof x.error - 1, "a long sentence is cut: %zu", strlen(x.error));
}

int main(void) {
    test_fork(); /* before anything else starts threads that a sanitizer would remember */
    test_items();
    test_late_threads();
    test_thread_count();
    test_nesting();
    test_no_threads();
    test_blocks();
    test_scratch();
    test_fail();
    return done();
}
