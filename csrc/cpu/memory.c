/* SPDX-License-Identifier: Apache-2.0
 *
 * memory.c: large blocks of memory, for outputs and for kernels to work in, used again when they
 * have been given back.
 *
 * First touch of fresh pages costs more than most operators, and handing a large block back to the
 * system's allocator makes it return what other libraries have freed before, milliseconds that are
 * not ours. So blocks have pages of their own and wait here for the next caller of about their
 * size: at most SLOTS of them and `bound` bytes in all, the oldest go first; a bound of 0 keeps
 * nothing. Slots are exchanged atomically and never locked: a child that was forked in between
 * cannot hang, and the worst that two threads can do to each other is a block that is not found.
 * Small scratch comes from the allocator, and under a sanitizer all of it does, so that it sees
 * where a kernel's areas end.
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
#if defined(__SANITIZE_ADDRESS__) || SS_HAS(address_sanitizer) || SS_HAS(memory_sanitizer)
#define SS_WATCHED 1
#endif

#define SMALL ((size_t)128 << 10) /* scratch below this comes from the allocator */
#define SLOTS 32
#define PAGE ((size_t)4 << 10)
#define HUGE_PAGE ((size_t)2 << 20)

/* Before every block's first byte; a line of its own, so that blocks begin with one. */
typedef struct block {
    size_t bytes; /* with this one's; 0: small scratch */
    char *map;    /* what was mapped, `mapped` bytes */
    size_t mapped;
    char pad[64 - 2 * sizeof(size_t) - sizeof(char *)];
} block;

static _Atomic(block *) slots[SLOTS];
static atomic_size_t bound = (size_t)64 << 20;
static atomic_size_t kept;
static atomic_uint oldest; /* the slot to give up next */

static block *fresh(size_t bytes) {
#if defined(__linux__)
    const size_t mapped = bytes + (bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 0);
    char *map = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) {
        return NULL;
    }
    /* Room for it was asked for: begin with a huge page. */
    char *begin = map + (mapped > bytes ? (size_t)(-(uintptr_t)map & (HUGE_PAGE - 1)) : 0);
    ss_advise_huge(begin, bytes);
#else
    const size_t mapped = bytes;
    void *begin = NULL;
    if (posix_memalign(&begin, 64, bytes) != 0) {
        return NULL;
    }
    char *map = begin;
#endif
    block *b = (block *)(void *)begin;
    *b = (block){.bytes = bytes, .map = map, .mapped = mapped};
    return b;
}

static void destroy(block *b) {
#if defined(__linux__)
    munmap(b->map, b->mapped);
#else
    free(b);
#endif
}

static int put_away(block *b) {
    for (int i = 0; i < SLOTS; ++i) {
        block *none = NULL;
        if (atomic_compare_exchange_strong(&slots[i], &none, b)) {
            return 1;
        }
    }
    return 0;
}

static void drop_oldest(void) {
    block *b = atomic_exchange(&slots[atomic_fetch_add(&oldest, 1) % SLOTS], (block *)NULL);
    if (b) {
        atomic_fetch_sub(&kept, b->bytes);
        destroy(b);
    }
}

/* A kept block of at least `bytes` and at most a quarter more. */
static block *find(size_t bytes) {
    for (int i = 0; i < SLOTS; ++i) {
        block *b = atomic_load(&slots[i]) ? atomic_exchange(&slots[i], (block *)NULL) : NULL;
        if (!b) {
            continue;
        }
        if (b->bytes >= bytes && b->bytes <= bytes + bytes / 4) {
            atomic_fetch_sub(&kept, b->bytes);
            return b;
        }
        if (!put_away(b)) {
            atomic_fetch_sub(&kept, b->bytes);
            destroy(b);
        }
    }
    return NULL;
}

static void keep(block *b) {
    const size_t most = atomic_load(&bound);
    size_t now = atomic_fetch_add(&kept, b->bytes) + b->bytes;
    for (int i = 0; i < SLOTS && now > most && b->bytes <= most; ++i) {
        drop_oldest();
        now = atomic_load(&kept);
    }
    for (int i = 0; i < 2 && now <= most; ++i) {
        if (put_away(b)) {
            return;
        }
        drop_oldest();
    }
    atomic_fetch_sub(&kept, b->bytes);
    destroy(b);
}

static void drop_until(size_t bytes) {
    for (int i = 0; i < SLOTS && atomic_load(&kept) > bytes; ++i) {
        drop_oldest();
    }
}

void ss_keep_at_most(size_t bytes) {
    atomic_store(&bound, bytes);
    drop_until(bytes);
}

size_t ss_kept(void) {
    return atomic_load(&kept);
}

void *ss_block_new(size_t bytes) {
    if (bytes > SIZE_MAX / 2) {
        return NULL;
    }
    const size_t room = (bytes + sizeof(block) + PAGE - 1) & ~(PAGE - 1);
    block *b = find(room);
    b = b ? b : fresh(room);
    if (!b) { /* memory is short: not for what only waits */
        drop_until(0);
        b = fresh(room);
    }
    return b ? b + 1 : NULL;
}

void ss_block_free(void *data) {
    if (data) {
        keep((block *)data - 1);
    }
}

/* ---- scratch -------------------------------------------------------------------------------- */

#if defined(SS_WATCHED)
static void *take(size_t bytes) {
    void *p = NULL;
    return posix_memalign(&p, 64, bytes < 64 ? 64 : bytes) == 0 ? p : NULL;
}

void ss_scratch_free(void *data) {
    free(data);
}
#else
static void *take(size_t bytes) {
    void *p = NULL;
    if (bytes >= SMALL) {
        return ss_block_new(bytes);
    }
    if (posix_memalign(&p, 64, bytes + sizeof(block)) != 0) {
        return NULL;
    }
    block *b = p;
    b->bytes = 0;
    return b + 1;
}

void ss_scratch_free(void *data) {
    block *b = data ? (block *)data - 1 : NULL;
    if (b && b->bytes) {
        keep(b);
    } else {
        free(b);
    }
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
