/* SPDX-License-Identifier: Apache-2.0
 *
 * blocks.c: memory for large new outputs, used again when its array has died.
 *
 * First touch of fresh pages costs more than most operators, and the system's allocator hands large
 * blocks back at once. So a block whose array dies waits here for the next output of about its
 * size: at most SLOTS blocks and `bound` bytes in all, the oldest go first; a bound of 0 keeps
 * nothing. Slots are exchanged atomically and never locked: a child that was forked in between
 * cannot hang, and the worst that two threads can do to each other is a block that is not found.
 * The pool belongs to the module and to every block that came from it.
 */
#ifndef _GNU_SOURCE /* some Pythons' headers define it, too */
#define _GNU_SOURCE 1
#endif
#include "binding.h"

#include <stdatomic.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define SLOTS 16
#define PAGE ((size_t)2 << 20) /* of the huge kind: blocks begin with one */

static const char name_of_owner[] = "semisam_block";

typedef struct block {
    ss_pool *pool;
    char *data;
    size_t bytes;
} block;

struct ss_pool {
    atomic_size_t users; /* the module and all blocks */
    atomic_size_t bound;
    atomic_size_t kept; /* bytes */
    atomic_uint oldest; /* the slot to give up next */
    _Atomic(block *) slots[SLOTS];
};

/* ---- memory --------------------------------------------------------------------------------- */

static char *map(size_t bytes) {
#if defined(__linux__)
    char *all =
        mmap(NULL, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) {
        return NULL;
    }
    const size_t before = (size_t)(-(uintptr_t)all & (PAGE - 1));
    if (before) {
        munmap(all, before);
    }
    if (before < PAGE) {
        munmap(all + before + bytes, PAGE - before);
    }
    ss_advise_huge(all + before, bytes);
    return all + before;
#else
    void *p = NULL;
    return posix_memalign(&p, 64, bytes) == 0 ? p : NULL;
#endif
}

static void unmap(char *data, size_t bytes) {
#if defined(__linux__)
    munmap(data, bytes);
#else
    (void)bytes;
    free(data);
#endif
}

static void leave(ss_pool *pool) {
    if (atomic_fetch_sub(&pool->users, 1) == 1) {
        free(pool);
    }
}

static void destroy(block *b) {
    ss_pool *pool = b->pool;
    unmap(b->data, b->bytes);
    free(b);
    leave(pool);
}

/* `bytes` is a multiple of 4 KiB. */
static block *fresh(ss_pool *pool, size_t bytes) {
    block *b = malloc(sizeof *b);
    char *data = b ? map(bytes) : NULL;
    if (!data) {
        free(b);
        return NULL;
    }
    *b = (block){.pool = pool, .data = data, .bytes = bytes};
    atomic_fetch_add(&pool->users, 1);
    return b;
}

/* ---- slots ---------------------------------------------------------------------------------- */

static int put_away(ss_pool *pool, block *b) {
    for (int i = 0; i < SLOTS; ++i) {
        block *none = NULL;
        if (atomic_compare_exchange_strong(&pool->slots[i], &none, b)) {
            return 1;
        }
    }
    return 0;
}

static void drop_oldest(ss_pool *pool) {
    block *b =
        atomic_exchange(&pool->slots[atomic_fetch_add(&pool->oldest, 1) % SLOTS], (block *)NULL);
    if (b) {
        atomic_fetch_sub(&pool->kept, b->bytes);
        destroy(b);
    }
}

static void keep(block *b) {
    ss_pool *pool = b->pool;
    const size_t bound = atomic_load(&pool->bound);
    size_t kept = atomic_fetch_add(&pool->kept, b->bytes) + b->bytes;
    for (int i = 0; i < SLOTS && kept > bound && b->bytes <= bound; ++i) {
        drop_oldest(pool);
        kept = atomic_load(&pool->kept);
    }
    for (int i = 0; i < 2 && kept <= bound; ++i) {
        if (put_away(pool, b)) {
            return;
        }
        drop_oldest(pool);
    }
    atomic_fetch_sub(&pool->kept, b->bytes);
    destroy(b);
}

/* A kept block of `bytes` and at most a quarter more. */
static block *find(ss_pool *pool, size_t bytes) {
    for (int i = 0; i < SLOTS; ++i) {
        block *b =
            atomic_load(&pool->slots[i]) ? atomic_exchange(&pool->slots[i], (block *)NULL) : NULL;
        if (!b) {
            continue;
        }
        if (b->bytes >= bytes && b->bytes <= bytes + bytes / 4) {
            atomic_fetch_sub(&pool->kept, b->bytes);
            return b;
        }
        if (!put_away(pool, b)) {
            atomic_fetch_sub(&pool->kept, b->bytes);
            destroy(b);
        }
    }
    return NULL;
}

/* ---- Python --------------------------------------------------------------------------------- */

static void array_died(PyObject *owner) {
    block *b = PyCapsule_GetPointer(owner, name_of_owner);
    if (b) {
        keep(b);
    }
}

ss_pool *ss_pool_new(void) {
    ss_pool *pool = calloc(1, sizeof *pool);
    if (!pool) {
        PyErr_NoMemory();
        return NULL;
    }
    atomic_init(&pool->users, 1);
    return pool;
}

void ss_pool_limit(ss_pool *pool, size_t bound) {
    atomic_store(&pool->bound, bound);
    for (int i = 0; i < SLOTS && atomic_load(&pool->kept) > bound; ++i) {
        drop_oldest(pool);
    }
}

size_t ss_pool_kept(const ss_pool *pool) {
    return atomic_load(&pool->kept);
}

void ss_pool_end(ss_pool *pool) {
    if (pool) {
        ss_pool_limit(pool, 0);
        leave(pool);
    }
}

PyObject *ss_pool_array(ss_pool *pool, Py_ssize_t bytes) {
    const size_t room = ((size_t)bytes + 4095) & ~(size_t)4095;
    block *b = find(pool, room);
    b = b ? b : fresh(pool, room);
    if (!b) {
        return PyErr_NoMemory();
    }
    PyObject *owner = PyCapsule_New(b, name_of_owner, array_died);
    if (!owner) {
        keep(b);
        return NULL;
    }
    npy_intp n = bytes;
    PyObject *array = PyArray_SimpleNewFromData(1, &n, NPY_UINT8, b->data);
    if (!array) {
        Py_DECREF(owner);
        return NULL;
    }
    if (PyArray_SetBaseObject((PyArrayObject *)array, owner) < 0) { /* has taken `owner` */
        Py_DECREF(array);
        return NULL;
    }
    return array;
}
