/* SPDX-License-Identifier: Apache-2.0
 *
 * test_ops.c: every operator of the schema on many small arguments, sensible and wild.
 *
 * Whatever comes in, a call returns a status, says why in one sentence that starts with the
 * operator's name, leaves its inputs alone, and gives the same bits for every thread count and
 * instruction set. What the values should be is the Python tests' business; that no byte outside a
 * buffer is touched is the sanitizer's.
 */
#include "arguments.h"

#define SEEDS 300

static void check_sentence(const ss_exec *x, const arguments *a, ss_status status) {
    char start[80];
    snprintf(start, sizeof start, "%s(): ", a->spec->name);
    CHECK(status == SS_INVALID || status == SS_WRONG_TYPE, "%s: status %d: %s", a->spec->name,
          (int)status, x->error);
    CHECK(strncmp(x->error, start, strlen(start)) == 0, "%s: \"%s\"", a->spec->name, x->error);
    CHECK(memchr(x->error, '\0', sizeof x->error) != NULL, "%s: unterminated", a->spec->name);
    CHECK(strlen(x->error) > strlen(start) + 8, "%s: \"%s\"", a->spec->name, x->error);
}

static void check_same_bits(arguments *a, uint64_t seed, uint64_t expected) {
    int32_t n = 0;
    const ss_backend *const *backends = ss_cpu_backends(&n);
    for (int32_t i = 0; i < n; ++i) {
        for (int32_t threads = 1; threads >= -3; threads -= 4) { /* below 0: at once */
            ss_exec x = ss_exec_cpu(threads);
            x.isa = backends[i]->isa;
            spoil_outputs(a);
            ss_status status = run_arguments(&x, a);
            CHECK(status == SS_OK, "%s seed %llu %s: %s", a->spec->name, (unsigned long long)seed,
                  x.isa, x.error);
            CHECK(hash_arguments(a, 1) == expected, "%s seed %llu: other bits with %s, %d threads",
                  a->spec->name, (unsigned long long)seed, x.isa, (int)threads);
        }
    }
}

static int one_call(int32_t op, uint64_t seed, int wild) {
    arguments a;
    make_arguments(&a, op, seed, wild);
    uint64_t inputs = hash_arguments(&a, 0);
    ss_exec x = ss_exec_cpu(-2);
    ss_status status = run_arguments(&x, &a);
    CHECK(hash_arguments(&a, 0) == inputs, "%s seed %llu: an input was changed", a.spec->name,
          (unsigned long long)seed);
    if (status == SS_OK) {
        check_same_bits(&a, seed, hash_arguments(&a, 1));
    } else {
        check_sentence(&x, &a, status);
    }
    free_arguments(&a);
    return status == SS_OK;
}

static void test_unknown(void) {
    ss_exec x = ss_exec_cpu(1);
    char slots[4096] = {0};
    CHECK(ss_run(&x, SS_OPS, slots) == SS_INVALID && ss_run(&x, -1, slots) == SS_INVALID, "number");
    CHECK_TEXT(x.error, "operator -1 does not exist");
    for (int32_t op = 0; op < SS_OPS; ++op) {
        for (uint64_t seed = 0; seed < SEEDS;
             ++seed) { /* until the arguments themselves are good */
            arguments a;
            make_arguments(&a, op, seed, 0);
            ss_exec good = ss_exec_cpu(1), bad = ss_exec_cpu(1);
            bad.isa = "z80";
            char expected[128];
            snprintf(expected, sizeof expected,
                     "%s(): not available on cpu with instruction set z80", a.spec->name);
            int found = run_arguments(&good, &a) == SS_OK;
            if (found) {
                CHECK(run_arguments(&bad, &a) == SS_UNSUPPORTED, "%s", a.spec->name);
                CHECK_TEXT(bad.error, expected);
            }
            free_arguments(&a);
            if (found) {
                break;
            }
        }
    }
}

int main(void) {
    for (int32_t op = 0; op < SS_OPS; ++op) {
        int good = 0, survived = 0;
        for (uint64_t seed = 0; seed < SEEDS; ++seed) {
            good += one_call(op, seed, 0);
            survived += one_call(op, seed + SEEDS, 1);
        }
        printf("  %-24s %3d of %d sensible calls and %3d wild ones ran\n", ss_op_specs()[op].name,
               good, SEEDS, survived);
        CHECK(good > 0, "%s: no arguments were accepted", ss_op_specs()[op].name);
    }
    test_unknown();
    return done();
}
