/* SPDX-License-Identifier: Apache-2.0
 *
 * scratch.c: memory in which kernels work, used again by the next call.
 *
 * Large pieces have pages of their own and wait here when they are given back: first touch of fresh
 * pages costs as much as many a kernel, and handing a large piece back to the system's allocator
 * makes it return whatever other libraries have freed before, milliseconds that are not ours. At
 * most SLOTS pieces and `bound` bytes in all wait. Slots are exchanged atomically and never locked:
 * a child that was forked in between cannot hang, and the worst that two threads can do to each
 * other is a piece that is not found. Small pieces come from the allocator, and under a sanitizer
 * all do, so that it sees each one's ends.
 */
#define _GNU_SOURCE
#include "runtime.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__has_feature)
#define SS_HAS(feature) __has_feature(feature)
#else
#define SS_HAS(feature) 0
#endif
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) &&       \
    !SS_HAS(address_sanitizer) && !SS_HAS(thread_sanitizer) && !SS_HAS(memory_sanitizer)
#define SS_KEEPS 1
#endif

#if defined(SS_KEEPS)
#define SLOTS 16
#define LARGE ((size_t)128 << 10)
#define HUGE_PAGE ((size_t)2 << 20)

/* Before every piece's first byte; a line of its own, so that pieces begin with one. */
typedef struct piece {
    size_t bytes; /* with this one's; 0: from the allocator */
    char *map;    /* what was mapped, `mapped` bytes */
    size_t mapped;
    char pad[64 - 2 * sizeof(size_t) - sizeof(char *)];
} piece;

static _Atomic(piece *) slots[SLOTS];
static atomic_size_t bound = (size_t)64 << 20;
static atomic_size_t kept;
static atomic_uint oldest; /* the slot to give up next */

/* Room for `bytes` with an eighth of slack at most, so that sizes which vary little meet again. */
static size_t rounded(size_t bytes) {
    size_t step = 4096;
    while (step * 16 < bytes) {
        step *= 2;
    }
    return (bytes + step - 1) / step * step;
}

static piece *fresh(size_t bytes) {
    const size_t spare = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 0; /* to begin with a huge page */
    char *map =
        mmap(NULL, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) {
        return NULL;
    }
    char *begin = map + (spare ? (size_t)(-(uintptr_t)map & (HUGE_PAGE - 1)) : 0);
    ss_advise_huge(begin, bytes);
    piece *p = (piece *)(void *)begin;
    *p = (piece){.bytes = bytes, .map = map, .mapped = bytes + spare};
    return p;
}

static void destroy(piece *p) {
    munmap(p->map, p->mapped);
}

static int put_away(piece *p) {
    for (int i = 0; i < SLOTS; ++i) {
        piece *none = NULL;
        if (atomic_compare_exchange_strong(&slots[i], &none, p)) {
            return 1;
        }
    }
    return 0;
}

static void drop_oldest(void) {
    piece *p = atomic_exchange(&slots[atomic_fetch_add(&oldest, 1) % SLOTS], (piece *)NULL);
    if (p) {
        atomic_fetch_sub(&kept, p->bytes);
        destroy(p);
    }
}

/* A piece of at least `bytes` and at most a quarter more. */
static piece *find(size_t bytes) {
    for (int i = 0; i < SLOTS; ++i) {
        piece *p = atomic_load(&slots[i]) ? atomic_exchange(&slots[i], (piece *)NULL) : NULL;
        if (!p) {
            continue;
        }
        if (p->bytes >= bytes && p->bytes <= bytes + bytes / 4) {
            atomic_fetch_sub(&kept, p->bytes);
            return p;
        }
        if (!put_away(p)) {
            atomic_fetch_sub(&kept, p->bytes);
            destroy(p);
        }
    }
    return NULL;
}

static void keep(piece *p) {
    const size_t most = atomic_load(&bound);
    size_t now = atomic_fetch_add(&kept, p->bytes) + p->bytes;
    for (int i = 0; i < SLOTS && now > most && p->bytes <= most; ++i) {
        drop_oldest();
        now = atomic_load(&kept);
    }
    for (int i = 0; i < 2 && now <= most; ++i) {
        if (put_away(p)) {
            return;
        }
        drop_oldest();
    }
    atomic_fetch_sub(&kept, p->bytes);
    destroy(p);
}

void ss_keep_at_most(size_t bytes) {
    atomic_store(&bound, bytes);
    for (int i = 0; i < SLOTS && atomic_load(&kept) > bytes; ++i) {
        drop_oldest();
    }
}

static void *take(size_t bytes) {
    const size_t all = bytes + sizeof(piece);
    if (all >= LARGE) {
        const size_t room = rounded(all);
        piece *p = find(room);
        p = p ? p : fresh(room);
        return p ? p + 1 : NULL;
    }
    void *small = NULL;
    if (posix_memalign(&small, 64, all) != 0) {
        return NULL;
    }
    piece *p = small;
    p->bytes = 0;
    return p + 1;
}

static void give_back(void *data) {
    piece *p = (piece *)data - 1;
    if (p->bytes) {
        keep(p);
    } else {
        free(p);
    }
}
#else
void ss_keep_at_most(size_t bytes) {
    (void)bytes;
}

static void *take(size_t bytes) {
    void *p = NULL;
    return posix_memalign(&p, 64, bytes < 64 ? 64 : bytes) == 0 ? p : NULL;
}

static void give_back(void *data) {
    free(data);
}
#endif

void *ss_scratch(ss_exec *x, int64_t count, size_t size) {
    if (count >= 0 && (uint64_t)count <= (SIZE_MAX / 2) / size) {
        void *data = take((size_t)count * size);
        if (data) {
            return data;
        }
    }
    snprintf(x->error, sizeof x->error, "could not allocate %lld x %zu bytes of scratch memory",
             (long long)count, size);
    return NULL;
}

void ss_scratch_free(void *data) {
    if (data) {
        give_back(data);
    }
}
