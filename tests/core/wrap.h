/* SPDX-License-Identifier: Apache-2.0
 *
 * wrap.h: system calls that fail on demand; the linker's --wrap puts these in their place.
 * `fail_alloc` n > 0 lets the n-th allocation from now fail; `fail_thread` likewise; 0: none does.
 */
#ifndef SS_TEST_WRAP_H
#define SS_TEST_WRAP_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

static atomic_long fail_alloc, fail_thread;

int __real_posix_memalign(void **p, size_t alignment, size_t size);
void *__real_malloc(size_t size);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t size);
int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

static inline int fails(atomic_long *countdown) {
    return atomic_load(countdown) > 0 && atomic_fetch_sub(countdown, 1) == 1;
}

int __wrap_posix_memalign(void **p, size_t alignment, size_t size) {
    return fails(&fail_alloc) ? ENOMEM : __real_posix_memalign(p, alignment, size);
}

void *__wrap_malloc(size_t size) {
    return fails(&fail_alloc) ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t n, size_t size) {
    return fails(&fail_alloc) ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t size) {
    return fails(&fail_alloc) ? NULL : __real_realloc(p, size);
}

int __wrap_pthread_create(pthread_t *handle, const pthread_attr_t *attr, void *(*f)(void *),
                          void *p) {
    return fails(&fail_thread) ? EAGAIN : __real_pthread_create(handle, attr, f, p);
}

#endif
