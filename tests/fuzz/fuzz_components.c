/* SPDX-License-Identifier: Apache-2.0
 *
 * fuzz_components.c: components and keep_components against flood filling in C order.
 */
#include "fuzz.h"

/* Are two voxels neighbours? 6, 18, 26 neighbours: 1, 2, 3 coordinates may differ, by one. */
static int neighbours(int64_t dz, int64_t dy, int64_t dx, int connectivity) {
    int64_t differ = (dz != 0) + (dy != 0) + (dx != 0);
    return differ >= 1 && differ <= (connectivity == 6 ? 1 : connectivity == 18 ? 2 : 3);
}

static void visit(const uint8_t *image, const int64_t *s, int connectivity, int by_value,
                  int32_t *labels, int64_t i, int64_t *stack, int64_t *top) {
    int64_t z = i / s[3] / s[2], y = i / s[3] % s[2], x = i % s[3];
    for (int64_t k = 0; k < 27; ++k) {
        int64_t dz = k / 9 - 1, dy = k / 3 % 3 - 1, dx = k % 3 - 1;
        int64_t qz = z + dz, qy = y + dy, qx = x + dx;
        if (!neighbours(dz, dy, dx, connectivity) || qz < 0 || qz >= s[1] || qy < 0 || qy >= s[2] ||
            qx < 0 || qx >= s[3]) {
            continue;
        }
        int64_t q = (qz * s[2] + qy) * s[3] + qx;
        if (image[q] && !labels[q] && (!by_value || image[q] == image[i])) {
            labels[q] = labels[i];
            stack[(*top)++] = q;
        }
    }
}

static int32_t flood(const uint8_t *image, const int64_t *s, int connectivity, int by_value,
                     int32_t *labels) {
    static int64_t stack[MOST_VOXELS];
    int64_t n = s[1] * s[2] * s[3], top = 0;
    int32_t count = 0;
    memset(labels, 0, (size_t)n * sizeof *labels);
    for (int64_t i = 0; i < n; ++i) {
        if (image[i] && !labels[i]) {
            labels[i] = ++count;
            stack[top++] = i;
            while (top > 0) {
                visit(image, s, connectivity, by_value, labels, stack[--top], stack, &top);
            }
        }
    }
    return count;
}

/* The largest component (the first among equals), or all of at least min_size voxels. */
static void check_kept(const uint8_t *mask, const uint8_t *kept, const int32_t *labels,
                       int32_t count, int64_t n, int64_t min_size) {
    static int64_t sizes[MOST_VOXELS + 1];
    memset(sizes, 0, sizeof sizes);
    int32_t largest = 1;
    for (int64_t i = 0; i < n; ++i) {
        sizes[labels[i]] += labels[i] > 0;
    }
    for (int32_t c = 1; c <= count; ++c) {
        largest = sizes[c] > sizes[largest] ? c : largest;
    }
    for (int64_t i = 0; i < n; ++i) {
        int keep = labels[i] && (min_size ? sizes[labels[i]] >= min_size : labels[i] == largest);
        if ((kept[i] != 0) != keep || (keep && !mask[i])) {
            wrong("kept", i, kept[i], keep);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const int neighbour_counts[] = {6, 18, 26};
    static int32_t expected[MOST_VOXELS];
    bytes b = {data, size};
    int64_t s[4], got_count = -1;
    take_shape(&b, s);
    uint8_t options = take(&b);
    int connectivity = neighbour_counts[options % 3], by_value = options / 4 % 2;
    int64_t n = s[1] * s[2] * s[3], min_size = take(&b) % 8;
    uint8_t *image = malloc((size_t)n), *kept = malloc((size_t)n);
    int32_t *labels = malloc((size_t)n * sizeof *labels);
    take_mask(&b, image, n, by_value ? 3 : 2);
    ss_exec x = ss_exec_cpu(options / 16 % 2 ? -2 : 1);
    ss_components_args a = {.connectivity = connectivity, .by_value = by_value};
    a.image = ss_tensor_of(image, SS_U8, 4, s);
    a.labels = ss_tensor_of(labels, SS_I32, 4, s);
    a.count = ss_tensor_of(&got_count, SS_I64, 1, s);
    must_run(ss_components(&x, &a), &x);
    int32_t count = flood(image, s, connectivity, by_value, expected);
    for (int64_t i = 0; i < n; ++i) {
        if (labels[i] != expected[i]) {
            wrong("label", i, labels[i], expected[i]);
        }
    }
    if (got_count != count) {
        wrong("count", 0, (double)got_count, count);
    }
    ss_keep_components_args k = {.connectivity = connectivity, .min_size = min_size};
    k.mask = ss_tensor_of(image, SS_U8, 4, s);
    k.kept = ss_tensor_of(kept, SS_U8, 4, s);
    must_run(ss_keep_components(&x, &k), &x);
    count = flood(image, s, connectivity, 0, expected);
    check_kept(image, kept, expected, count, n, min_size);
    free(image);
    free(kept);
    free(labels);
    return 0;
}
