/* SPDX-License-Identifier: Apache-2.0
 *
 * check.h: the whole test harness. A test is a function without arguments; CHECK prints what did
 * not hold and goes on, so that one run shows everything; main returns done().
 */
#ifndef SS_TEST_CHECK_H
#define SS_TEST_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

static int check_failures;
static long check_count;

/* CHECK(condition, "format", ...) */
#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        ++check_count;                                                                             \
        if (!(condition) && ++check_failures <= 40) {                                              \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);                                 \
            printf(__VA_ARGS__);                                                                   \
            printf("\n");                                                                          \
        }                                                                                          \
    } while (0)

#define CHECK_TEXT(got, expected)                                                                  \
    CHECK(strcmp(got, expected) == 0, "\n  expected \"%s\"\n  got      \"%s\"", expected, got)

static inline int done(void) {
    printf("  %ld checks, %d failures\n", check_count, check_failures);
    return check_failures != 0;
}

/* splitmix64: random enough for tests, the same on every machine. */
static inline uint64_t next_random(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

#endif
