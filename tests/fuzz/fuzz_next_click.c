/* SPDX-License-Identifier: Apache-2.0
 *
 * fuzz_next_click.c: next_click against its definition, on one row.
 */
#include "fuzz.h"
#include "ss_math.h"

typedef struct row {
    const uint8_t *target, *current, *region;
    int64_t s[4], n;
    int dims, ritm;
    uint64_t random;
    uint8_t fn[MOST_VOXELS], fp[MOST_VOXELS];
    int64_t d2[MOST_VOXELS];
} row;

static int64_t find_errors(row *r, int in_region) {
    int64_t errors = 0;
    for (int64_t i = 0; i < r->n; ++i) {
        int wanted = !in_region || !r->region || r->region[i];
        int t = r->target[i] != 0, g = r->current && r->current[i];
        r->fn[i] = (uint8_t)(t && !g && wanted);
        r->fp[i] = (uint8_t)(!t && g && wanted);
        errors += r->fn[i] || r->fp[i];
    }
    return errors;
}

/* Squared distance to the nearest voxel outside `mask`, the shell around the volume included. */
static int64_t depth(const row *r, const uint8_t *mask, int64_t i) {
    const int64_t *s = r->s;
    int64_t p[3] = {i / s[3] / s[2], i / s[3] % s[2], i % s[3]};
    int64_t best = INT64_MAX, margin = r->dims == 3;
    for (int64_t z = -margin; z < s[1] + margin; ++z) {
        for (int64_t y = -1; y <= s[2]; ++y) {
            for (int64_t x = -1; x <= s[3]; ++x) {
                int inside = z >= 0 && z < s[1] && y >= 0 && y < s[2] && x >= 0 && x < s[3];
                if (!inside || !mask[(z * s[2] + y) * s[3] + x]) {
                    int64_t dz = z - p[0], dy = y - p[1], dx = x - p[2];
                    int64_t d2 = dz * dz + dy * dy + dx * dx;
                    best = d2 < best ? d2 : best;
                }
            }
        }
    }
    return best;
}

static int64_t deepest(row *r, const uint8_t *mask) {
    int64_t most = 0;
    for (int64_t i = 0; i < r->n; ++i) {
        r->d2[i] = mask[i] ? depth(r, mask, i) : 0;
        most = r->d2[i] > most ? r->d2[i] : most;
    }
    return most;
}

/* The number of candidates, and which voxel the one of rank `wanted` is. */
static int64_t candidates(const row *r, int64_t most, int64_t wanted, int64_t *found) {
    int64_t rank = 0;
    for (int64_t i = 0; i < r->n; ++i) {
        if (r->ritm ? 4 * r->d2[i] > most : r->fn[i] || r->fp[i]) {
            *found = rank++ == wanted ? i : *found;
        }
    }
    return rank;
}

/* The clicked voxel, or -1; `label` as the operator has it. */
static int64_t expected_click(row *r, int32_t *label) {
    int64_t most = 0, found = -1;
    *label = -1;
    if (find_errors(r, 1) == 0 && find_errors(r, 0) == 0) {
        return -1;
    }
    if (r->ritm) {
        int64_t most_fn = deepest(r, r->fn), most_fp = deepest(r, r->fp);
        most = most_fn > most_fp ? deepest(r, r->fn) : most_fp;
    }
    int64_t count = candidates(r, most, -1, &found);
    candidates(r, most, (int64_t)ss_pick((uint64_t)count, r->random), &found);
    *label = r->fn[found];
    return found;
}

static const uint8_t *take_volume(bytes *b, int64_t n) {
    uint8_t *mask = malloc((size_t)n);
    take_mask(b, mask, n, 2);
    return mask;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static row r;
    bytes b = {data, size};
    take_shape(&b, r.s);
    uint8_t options = take(&b);
    r.ritm = options % 2;
    r.dims = options / 2 % 2 ? 2 : 3;
    r.s[1] = r.dims == 2 ? 1 : r.s[1];
    r.n = r.s[1] * r.s[2] * r.s[3];
    int64_t counter[4] = {take(&b), take(&b), 3, 4}, seed = take(&b), point[3] = {-9, -9, -9};
    r.random = ss_philox64((uint64_t)seed, (uint32_t)counter[0], (uint32_t)counter[1], 3, 4);
    r.target = take_volume(&b, r.n);
    r.current = options / 4 % 2 ? take_volume(&b, r.n) : NULL;
    r.region = options / 8 % 2 ? take_volume(&b, r.n) : NULL;
    int32_t label = -9, expected_label = -1;
    ss_exec x = ss_exec_cpu(options / 16 % 2 ? -2 : 1);
    ss_next_click_args a = {.seed = seed, .ritm = r.ritm, .dims = r.dims};
    a.target = ss_tensor_of((void *)(uintptr_t)r.target, SS_U8, 4, r.s);
    if (r.current) {
        a.current = ss_tensor_of((void *)(uintptr_t)r.current, SS_U8, 4, r.s);
    }
    if (r.region) {
        a.region = ss_tensor_of((void *)(uintptr_t)r.region, SS_U8, 4, r.s);
    }
    a.counter = ss_tensor_of(counter, SS_I64, 2, (const int64_t[]){1, 4});
    a.point = ss_tensor_of(point, SS_I64, 2, (const int64_t[]){1, 3});
    a.label = ss_tensor_of(&label, SS_I32, 1, (const int64_t[]){1});
    must_run(ss_next_click(&x, &a), &x);
    int64_t voxel = expected_click(&r, &expected_label);
    int64_t got = (point[0] * r.s[2] + point[1]) * r.s[3] + point[2];
    if (label != expected_label || got != (voxel < 0 ? 0 : voxel)) {
        fprintf(stderr, "label %d, expected %d\n", (int)label, (int)expected_label);
        wrong("click", 0, (double)got, (double)voxel);
    }
    free((void *)(uintptr_t)r.target);
    free((void *)(uintptr_t)r.current);
    free((void *)(uintptr_t)r.region);
    return 0;
}
