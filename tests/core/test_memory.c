/* SPDX-License-Identifier: Apache-2.0
 *
 * test_memory.c: let the first, second, ... allocation of a call fail, for every operator.
 *
 * The call says SS_NO_MEMORY or, where it knows another way, gives the same bits; the leak checker
 * sees what an error path forgets to free.
 */
#include "arguments.h"
#include "wrap.h"

#define SEEDS 40

/* run_arguments allocates, too: run on views of our own instead. */
static ss_status run_failing(ss_exec *x, const arguments *a, long n, char *slots) {
    ss_tensor views[MOST_ARGS][4];
    memcpy(slots, a->slots, (size_t)a->spec->size);
    for (int32_t i = 0; i < a->spec->n_args; ++i) {
        if (a->spec->args[i].kind == SS_KIND_LIST) {
            ss_list *list = (ss_list *)(void *)(slots + (slot_of(a, i) - a->slots));
            memcpy(views[i], list->at, (size_t)list->n * sizeof(ss_tensor));
            list->at = views[i];
        }
    }
    atomic_store(&fail_alloc, n);
    ss_status status = ss_run(x, a->op, slots);
    return status;
}

static long fail_each(arguments *a, uint64_t expected, int32_t threads) {
    char *slots = malloc((size_t)a->spec->size);
    char start[80];
    snprintf(start, sizeof start, "%s(): ", a->spec->name);
    long n = 1;
    for (;; ++n) {
        ss_exec x = ss_exec_cpu(threads);
        spoil_outputs(a);
        ss_status status = run_failing(&x, a, n, slots);
        int reached = atomic_exchange(&fail_alloc, 0) <= 0; /* two threads may pass 0 */
        if (status == SS_OK) {
            CHECK(hash_arguments(a, 1) == expected, "%s: other bits when allocation %ld fails",
                  a->spec->name, n);
        } else {
            CHECK(status == SS_NO_MEMORY, "%s: status %d, %s", a->spec->name, (int)status, x.error);
            CHECK(strncmp(x.error, start, strlen(start)) == 0, "\"%s\"", x.error);
            CHECK(strstr(x.error, "memory") != NULL, "\"%s\"", x.error);
        }
        if (!reached) {
            CHECK(status == SS_OK, "%s: %s", a->spec->name, x.error);
            break;
        }
    }
    free(slots);
    return n - 1;
}

int main(void) {
    for (int32_t op = 0; op < SS_OPS; ++op) {
        long failed = 0;
        int calls = 0;
        for (uint64_t seed = 0; seed < SEEDS; ++seed) {
            arguments a;
            make_arguments(&a, op, seed, 0);
            ss_exec x = ss_exec_cpu(1);
            if (run_arguments(&x, &a) == SS_OK) {
                uint64_t expected = hash_arguments(&a, 1);
                failed += fail_each(&a, expected, 1);
                failed += fail_each(&a, expected, -2);
                ++calls;
            }
            free_arguments(&a);
        }
        printf("  %-24s %2d calls, %ld failed allocations\n", ss_op_specs()[op].name, calls,
               failed);
    }
    return done();
}
