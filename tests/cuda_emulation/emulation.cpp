/* SPDX-License-Identifier: Apache-2.0
 *
 * emulation.cpp: runs a grid on the CPU, one block after the other, the threads of a block as
 * fibers.
 *
 * A fiber runs thread after thread until one has to wait, which costs nothing where no thread ever
 * waits; then the next fiber goes on. Waiting threads resume in the order in which they became
 * ready, so that runs repeat exactly; ss_emulated_reverse(1) starts blocks and threads in the
 * opposite order, and whatever gives other bits then had depended on the order. Blocks of a
 * cooperative launch are processes, as many as ss_emulated_processors says. One launch at a
 * time per process.
 */
#include "cuda_runtime.h"

#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

#define MAX_THREADS 1024
#define STACK (64 << 10)
#define PAGE 4096
#define POISON_BYTES                                                                               \
    (16 << 20) /* per launch: as many blocks as that pays for start with garbage                   \
                */

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

/* ---- fibers ------------------------------------------------------------------------------------
 */

#if defined(__x86_64__) || defined(__aarch64__)
typedef void *saved; /* the stack pointer; everything else is on the stack */
extern "C" void ss_emulated_switch(saved *from, saved to);
#if defined(__x86_64__)
asm(".text\n.type ss_emulated_switch,@function\nss_emulated_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size ss_emulated_switch,.-ss_emulated_switch\n");
enum { SAVED_WORDS = 8, RETURN_WORD = 6 }; /* six registers, the address, and one to align */
#else
asm(".text\n.type ss_emulated_switch,%function\nss_emulated_switch:\n"
    "sub sp,sp,#160\n"
    "stp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\n"
    "stp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\n"
    "stp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
    "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\n"
    "ldp x27,x28,[sp,#64]\nldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\n"
    "ldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\n"
    "add sp,sp,#160\nret\n.size ss_emulated_switch,.-ss_emulated_switch\n");
enum { SAVED_WORDS = 20, RETURN_WORD = 11 };
#endif
static void fiber_start(saved *s, char *stack, size_t size, void (*run)(void)) {
    void **top = (void **)(void *)(stack + size);
    top -= SAVED_WORDS;
    memset(top, 0, SAVED_WORDS * sizeof *top);
    memcpy(&top[RETURN_WORD], &run, sizeof run);
    *s = top;
}
static void fiber_switch(saved *from, saved *to) {
    ss_emulated_switch(from, *to);
}
#else
typedef ucontext_t saved;
static void fiber_start(saved *s, char *stack, size_t size, void (*run)(void)) {
    getcontext(s);
    s->uc_stack.ss_sp = stack;
    s->uc_stack.ss_size = size;
    s->uc_link = nullptr;
    makecontext(s, run, 0);
}
static void fiber_switch(saved *from, saved *to) {
    swapcontext(from, to);
}
#endif

/* ---- one block ---------------------------------------------------------------------------------
 */

typedef struct warp {
    uint64_t value[2][32]; /* of this function and of the one before, which some have yet to read */
    unsigned arrived, left;
    int line, turn;
} warp;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    char *stacks;
    saved fiber[MAX_THREADS + 1], main;
    int free[MAX_THREADS + 1], n_free;
    int current;            /* fiber */
    int of[MAX_THREADS];    /* the fiber that a waiting thread is on */
    int ready[MAX_THREADS]; /* ring of threads that may go on */
    int ready_first, ready_n;
    int threads, started, done, now;
    int waiting[MAX_THREADS], n_waiting, line, count;
    int result[MAX_THREADS];
    warp warps[MAX_THREADS / 32];
    void (*run)(void *);
    void *context;
    int reverse, failed;
    unsigned first; /* block; not 0 in the processes of a cooperative launch */
    clock_t began;
    char error[256];
    alignas(16) char dynamic_shared[49152];
} e;

static int processors = 1; /* how many blocks of a cooperative launch fit */

extern "C" {
extern char ss_shared_begin[] __asm__("__start_ss_shared") __attribute__((weak));
extern char ss_shared_end[] __asm__("__stop_ss_shared") __attribute__((weak));
__attribute__((visibility("default"))) void ss_emulated_reverse(int reverse);
__attribute__((visibility("default"))) void ss_emulated_processors(int n);
}

void ss_emulated_reverse(int reverse) {
    pthread_mutex_lock(&lock);
    e.reverse = reverse;
    pthread_mutex_unlock(&lock);
}

const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : e.error;
}

static void become(int thread) {
    e.now = thread;
    threadIdx.x = (unsigned)thread % blockDim.x;
    threadIdx.y = (unsigned)thread / blockDim.x % blockDim.y;
    threadIdx.z = (unsigned)thread / blockDim.x / blockDim.y;
}

static void to_fiber(int fiber) {
    int from = e.current;
    e.current = fiber;
    fiber_switch(&e.fiber[from], &e.fiber[fiber]);
}

/* Ends the block; what its fibers were doing is forgotten. */
static void fail(const char *format, ...) {
    va_list ap;
    va_start(ap, format);
    vsnprintf(e.error, sizeof e.error, format, ap);
    va_end(ap);
    e.failed = 1;
    fiber_switch(&e.fiber[e.current], &e.main);
}

static void make_ready(int thread) {
    e.ready[(e.ready_first + e.ready_n++) % MAX_THREADS] = thread;
}

static void resume_next(void) {
    int thread = e.ready[e.ready_first];
    e.ready_first = (e.ready_first + 1) % MAX_THREADS;
    --e.ready_n;
    become(thread);
    if (e.of[thread] != e.current) {
        to_fiber(e.of[thread]);
    }
}

static void deadlock(void) {
    for (int w = 0; w < e.threads / 32; ++w) {
        if (e.warps[w].arrived) {
            fail("block (%u, %u, %u): warp %d waits at line %d for its lanes %08x, %d threads wait "
                 "at the barrier of line %d, %d have ended",
                 blockIdx.x, blockIdx.y, blockIdx.z, w, e.warps[w].line, ~e.warps[w].arrived,
                 e.n_waiting, e.line, e.done);
        }
    }
    fail("block (%u, %u, %u): %d of %d threads wait at the barrier of line %d, %d have ended",
         blockIdx.x, blockIdx.y, blockIdx.z, e.n_waiting, e.threads, e.line, e.done);
}

/* The current thread waits; returns when somebody has made it ready. */
static void wait(void) {
    e.of[e.now] = e.current;
    if (e.ready_n > 0) {
        resume_next();
    } else if (e.started < e.threads) {
        to_fiber(e.free[--e.n_free]);
    } else {
        deadlock();
    }
}

static void release_barrier(void) {
    for (int i = 0; i < e.n_waiting; ++i) {
        e.result[e.waiting[i]] = e.count;
        if (e.waiting[i] != e.now) {
            make_ready(e.waiting[i]);
        }
    }
    e.n_waiting = 0;
    e.count = 0;
}

/* What a fiber does: starts threads as long as there are some, then makes room for waiting ones. */
static void work(void) {
    for (;;) {
        if (e.ready_n == 0 && e.started < e.threads) {
            int i = e.started++;
            become(e.reverse ? e.threads - 1 - i : i);
            e.run(e.context);
            warp *w = &e.warps[e.now / 32];
            w->left |= 1u << (e.now % 32);
            if (w->arrived) {
                fail(
                    "block (%u, %u, %u): lane %d of warp %d has left the kernel, and line %d waits "
                    "for it",
                    blockIdx.x, blockIdx.y, blockIdx.z, e.now % 32, e.now / 32, w->line);
            }
            ++e.done;
            e.now = -1;
            if (e.n_waiting > 0 && e.n_waiting + e.done == e.threads) {
                release_barrier();
            }
            continue;
        }
        e.free[e.n_free++] = e.current;
        if (e.ready_n > 0) {
            resume_next();
        } else {
            if (e.done < e.threads) {
                deadlock();
            }
            fiber_switch(&e.fiber[e.current], &e.main);
        }
    }
}

int ss_emulated_sync_count(int line, int predicate) {
    if (e.n_waiting > 0 && e.line != line) {
        fail(
            "block (%u, %u, %u): thread %d is at the barrier of line %d, others at that of line %d",
            blockIdx.x, blockIdx.y, blockIdx.z, e.now, line, e.line);
    }
    const int me = e.now;
    e.line = line;
    e.count += predicate != 0;
    e.waiting[e.n_waiting++] = me;
    if (e.n_waiting + e.done == e.threads) {
        release_barrier();
    } else {
        wait();
    }
    return e.result[me];
}

void ss_emulated_sync(int line) {
    ss_emulated_sync_count(line, 0);
}

const uint64_t *ss_emulated_warp(int line, unsigned mask, uint64_t value, unsigned *lane) {
    warp *w = &e.warps[e.now / 32];
    const unsigned me = (unsigned)e.now % 32;
    const int turn = w->turn, first = e.now / 32 * 32;
    *lane = me;
    if (mask != 0xffffffffu || w->left) {
        fail(
            "block (%u, %u, %u): warp %d at line %d: expected all 32 lanes, got mask %08x and %08x "
            "that have ended",
            blockIdx.x, blockIdx.y, blockIdx.z, first / 32, line, mask, w->left);
    }
    if (w->arrived && w->line != line) {
        fail("block (%u, %u, %u): lane %u of warp %d is at line %d, others at line %d", blockIdx.x,
             blockIdx.y, blockIdx.z, me, first / 32, line, w->line);
    }
    w->line = line;
    w->value[turn][me] = value;
    w->arrived |= 1u << me;
    if (w->arrived != 0xffffffffu) {
        wait();
        return w->value[turn];
    }
    w->arrived = 0;
    w->turn = !turn;
    for (int i = 0; i < 32; ++i) {
        if (i != (int)me) {
            make_ready(first + i);
        }
    }
    return w->value[turn];
}

void *ss_emulated_dynamic_shared(void) {
    return e.dynamic_shared;
}

/* ---- one grid ----------------------------------------------------------------------------------
 */

static int start_fibers(void) {
    if (!e.stacks) {
        void *p = mmap(nullptr, (size_t)STACK * (MAX_THREADS + 1), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            return 0;
        }
        e.stacks = (char *)p;
    }
    e.n_free = 0;
    for (int i = MAX_THREADS; i >= 0; --i) {
        char *stack = e.stacks + (size_t)i * STACK;
        mprotect(stack, PAGE, PROT_NONE); /* an overflow is a crash here, not a wrong number */
        /* Tops of stacks at different places of a page, or all would compete for one cache line. */
        size_t size = (size_t)STACK - (size_t)(i * 832 % 8192);
        fiber_start(&e.fiber[i], stack, size & ~(size_t)63, work);
        e.free[e.n_free++] = i;
    }
    return 1;
}

static int run_block(void) {
    e.threads = (int)(blockDim.x * blockDim.y * blockDim.z);
    e.started = e.done = e.n_waiting = e.count = e.ready_n = e.ready_first = e.failed = 0;
    for (int w = 0; w < e.threads / 32; ++w) {
        e.warps[w].arrived = e.warps[w].left = 0;
    }
    e.current = e.free[--e.n_free];
    fiber_switch(&e.main, &e.fiber[e.current]);
    if (e.failed) {
        start_fibers();
    }
    return !e.failed;
}

static cudaError_t refuse_launch(dim3 grid, dim3 block, size_t shared) {
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (threads == 0 || threads > MAX_THREADS || threads % 32 != 0 || block.z > 64 ||
        grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
        shared > sizeof e.dynamic_shared) {
        snprintf(
            e.error, sizeof e.error,
            "invalid launch: grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory",
            grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
        return cudaErrorInvalidConfiguration;
    }
    return cudaSuccess;
}

static cudaError_t run_together(dim3 grid, dim3 block, size_t shared);

/* Runs `blocks` of the grid's blocks, from e.first on. */
static cudaError_t run_grid(dim3 grid, dim3 block, size_t shared, uint64_t blocks) {
    const size_t fixed = ss_shared_begin ? (size_t)(ss_shared_end - ss_shared_begin) : 0;
    uint64_t poison = 1 + POISON_BYTES / (fixed + shared + 1);
    blockDim = block;
    gridDim = grid;
    for (uint64_t i = 0; i < blocks; ++i) {
        if (i < poison) {
            memset(ss_shared_begin, 0xff, fixed);
            memset(e.dynamic_shared, 0xff, shared);
        }
        uint64_t b = e.first + (e.reverse ? blocks - 1 - i : i);
        blockIdx.x = (unsigned)(b % grid.x);
        blockIdx.y = (unsigned)(b / grid.x % grid.y);
        blockIdx.z = (unsigned)(b / grid.x / grid.y);
        if (!run_block()) {
            return cudaErrorLaunchFailure;
        }
    }
    return cudaSuccess;
}

static cudaError_t launch(dim3 grid, dim3 block, size_t shared, void (*run)(void *), void *context,
                          int together) {
    pthread_mutex_lock(&lock);
    cudaError_t error = refuse_launch(grid, block, shared);
    if (error == cudaSuccess && !e.stacks && !start_fibers()) {
        snprintf(e.error, sizeof e.error, "no memory for the stacks of a block");
        error = cudaErrorMemoryAllocation;
    }
    if (error == cudaSuccess) {
        e.run = run;
        e.context = context;
        e.first = 0;
        e.began = clock();
        error = together ? run_together(grid, block, shared)
                         : run_grid(grid, block, shared, (uint64_t)grid.x * grid.y * grid.z);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

cudaError_t ss_emulated_launch(dim3 grid, dim3 block, size_t shared, void (*run)(void *),
                               void *context) {
    return launch(grid, block, shared, run, context, 0);
}

/* ---- blocks that wait for each other ------------------------------------------------------------
 */

#define MOST_BLOCKS 16
#define PATIENCE 20 /* seconds of CPU time */

void ss_emulated_processors(int n) {
    pthread_mutex_lock(&lock);
    processors = n;
    pthread_mutex_unlock(&lock);
}

int ss_emulated_attribute(int attribute) {
    return attribute == cudaDevAttrMultiProcessorCount ? processors : 1;
}

void ss_emulated_nap(void) {
    if (clock() - e.began > (clock_t)PATIENCE * CLOCKS_PER_SEC) {
        fail("block (%u, %u, %u): waits for blocks that do not come", blockIdx.x, blockIdx.y,
             blockIdx.z);
    }
    sched_yield();
}

/* One block in a process of its own, where shared memory and fibers are its own, too; what the
 * blocks have in common must lie in memory that processes share. */
static cudaError_t run_together(dim3 grid, dim3 block, size_t shared) {
    pid_t child[MOST_BLOCKS];
    unsigned started = 1;
    int broken = 0;
    for (; started < grid.x; ++started) {
        child[started] = fork();
        if (child[started] == 0) {
            e.first = started;
            _exit(run_grid(grid, block, shared, 1) != cudaSuccess);
        }
        if (child[started] < 0) {
            break; /* block 0 will run out of patience */
        }
    }
    cudaError_t error = run_grid(grid, block, shared, 1);
    for (unsigned i = 1; i < started; ++i) {
        int status = 1;
        broken |= waitpid(child[i], &status, 0) < 0 || status != 0;
    }
    if (error == cudaSuccess && broken) {
        snprintf(e.error, sizeof e.error, "a block of a cooperative launch failed");
        error = cudaErrorLaunchFailure;
    }
    return error;
}

cudaError_t ss_emulated_cooperative(dim3 grid, dim3 block, size_t shared, void (*run)(void *),
                                    void *context) {
    if (grid.x > (unsigned)processors || grid.x > MOST_BLOCKS || grid.y != 1 || grid.z != 1) {
        snprintf(e.error, sizeof e.error,
                 "a cooperative launch of %u x %u x %u blocks does not fit", grid.x, grid.y,
                 grid.z);
        return cudaErrorInvalidConfiguration;
    }
    return launch(grid, block, shared, run, context, 1);
}
