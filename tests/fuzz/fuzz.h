/* SPDX-License-Identifier: Apache-2.0
 *
 * fuzz.h: small volumes out of a fuzzer's bytes, and what to do when an answer is wrong.
 *
 * Every target computes the answer once more by brute force; volumes have at most 9 voxels a side,
 * or up to 40 along one, so that this stays fast.
 */
#ifndef SS_FUZZ_H
#define SS_FUZZ_H

#include "semisam.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_VOXELS (40 * 9 * 9)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct bytes {
    const uint8_t *at;
    size_t left;
} bytes;

/* The next byte, 0 when there is none left. */
static inline uint8_t take(bytes *b) {
    if (b->left == 0) {
        return 0;
    }
    --b->left;
    return *b->at++;
}

static inline void take_shape(bytes *b, int64_t shape[4]) {
    shape[0] = 1;
    uint8_t longer = take(b) % 4;
    for (int d = 1; d < 4; ++d) {
        shape[d] = 1 + take(b) % (d == longer ? 40 : 9);
    }
}

/* Fills a mask from runs: a byte is a value (below `values`) and a length. */
static inline void take_mask(bytes *b, uint8_t *mask, int64_t n, int values) {
    for (int64_t i = 0; i < n;) {
        uint8_t byte = take(b);
        int64_t run = b->left ? 1 + byte / 64 : n;
        for (int64_t k = 0; k < run && i < n; ++k) {
            mask[i++] = (uint8_t)(byte % values);
        }
    }
}

static inline void wrong(const char *what, int64_t where, double got, double expected) {
    fprintf(stderr, "%s: at %lld: got %.9g, expected %.9g\n", what, (long long)where, got,
            expected);
    abort();
}

static inline void must_run(ss_status status, const ss_exec *x) {
    if (status != SS_OK) {
        fprintf(stderr, "status %d: %s\n", (int)status, x->error);
        abort();
    }
}

#endif
