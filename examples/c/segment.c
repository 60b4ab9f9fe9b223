/* SPDX-License-Identifier: Apache-2.0
 *
 * Two masks, raw files of D x H x W bytes: how thick and connected the prediction is, where an
 * annotator would click next, and the 95th percentile of the distance between the surfaces.
 */
#include <semisam/semisam.h>
#include <stdio.h>
#include <stdlib.h>

static int read_mask(const char *path, unsigned char *mask, size_t n) {
    FILE *file = fopen(path, "rb");
    size_t got = file ? fread(mask, 1, n, file) : 0;
    (void)(file && fclose(file));
    return got == n ? 0 : fprintf(stderr, "%s: expected a file of %zu bytes\n", path, n);
}

int main(int argc, char **argv) {
    int64_t s[5] = {0, 1};
    for (int d = 2; d < 5; ++d) {
        s[d] = argc == 6 ? atoll(argv[d + 1]) : 0;
    }
    size_t n = (size_t)(s[2] * s[3] * s[4]);
    unsigned char *masks = malloc(2 * n + 1);
    float *distance = malloc(4 * n + 1), thickest = 0;
    int32_t *labels = malloc(4 * n + 1), label;
    if (n == 0 || !masks || !distance || !labels || read_mask(argv[1], masks, n) ||
        read_mask(argv[2], masks + n, n)) {
        return fprintf(stderr, "usage: segment prediction.raw reference.raw D H W\n"), 2;
    }
    ss_tensor prediction = ss_tensor_of(masks, SS_U8, 4, s + 1);
    ss_tensor reference = ss_tensor_of(masks + n, SS_U8, 4, s + 1);
    int64_t count, point[3], counter[4] = {0}, four[] = {1, 4}, three[] = {1, 3}, of[] = {1, 2, 11};
    double stats[2][11], spacing[] = {1, 1, 1};
    ss_edt_args edt = {.mask = prediction};
    edt.distance = ss_tensor_of(distance, SS_F32, 4, s + 1);
    edt.index = ss_tensor_of(NULL, SS_I64, 5, s); /* 0 x ...: not wanted */
    ss_components_args components = {.image = prediction, .connectivity = 26};
    components.labels = ss_tensor_of(labels, SS_I32, 4, s + 1);
    components.count = ss_tensor_of(&count, SS_I64, 1, s + 1);
    ss_next_click_args click = {.target = reference, .current = prediction, .ritm = 1, .dims = 3};
    click.counter = ss_tensor_of(counter, SS_I64, 2, four);
    click.point = ss_tensor_of(point, SS_I64, 2, three);
    click.label = ss_tensor_of(&label, SS_I32, 1, s + 1);
    ss_surface_metrics_args hd = {.y_pred = prediction, .y = reference, .num_classes = 2};
    hd.dims = 3, hd.percentile = 95, hd.spacing = (ss_doubles){spacing, 3};
    hd.stats = ss_tensor_of(stats, SS_F64, 3, of);
    ss_exec x = ss_exec_cpu(0); /* as many threads as there are cores */
    if (ss_edt(&x, &edt) || ss_components(&x, &components) || ss_next_click(&x, &click) ||
        ss_surface_metrics(&x, &hd)) {
        return fprintf(stderr, "%s\n", x.error), 1;
    }
    for (size_t i = 0; i < n; ++i) {
        thickest = distance[i] > thickest ? distance[i] : thickest;
    }
    printf("deepest voxel: %.4f\ncomponents: %lld\nnext click: %lld %lld %lld %s\nHD95: %.4f\n",
           (double)thickest, (long long)count, (long long)point[0], (long long)point[1],
           (long long)point[2], label < 0 ? "none" : (label ? "foreground" : "background"),
           stats[1][6] > stats[1][7] ? stats[1][6] : stats[1][7]);
    free(masks), free(distance), free(labels);
}
