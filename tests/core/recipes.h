/* SPDX-License-Identifier: Apache-2.0
 *
 * recipes.h: relations between arguments that an operator asks for beyond its schema, such as one
 * weight per source. An operator without a recipe gets arguments by the schema alone; most need no
 * more. Included by arguments.h. Hooks run after the numbers (pass 0), the inputs (1), the outputs.
 */
#ifndef SS_TEST_RECIPES_H
#define SS_TEST_RECIPES_H

static inline void *argument(arguments *a, const char *name) {
    for (int32_t i = 0; i < a->spec->n_args; ++i) {
        if (strcmp(a->spec->args[i].name, name) == 0) {
            return slot_of(a, i);
        }
    }
    return NULL;
}

static inline int64_t get_int(arguments *a, const char *name) {
    return *(int64_t *)argument(a, name);
}

static inline void set_int(arguments *a, const char *name, int64_t value) {
    *(int64_t *)argument(a, name) = value;
    int64_t *size = size_of(a, name, strlen(name));
    if (size) {
        *size = value;
    }
}

static inline void set_size(arguments *a, const char *name, int64_t value) {
    int64_t *size = size_of(a, name, strlen(name));
    if (size) {
        *size = value;
    } else {
        name_size(a, name, strlen(name), value);
    }
}

static inline double *set_doubles(arguments *a, const char *name, int64_t n, double value) {
    double *at = buffer(a, (size_t)n * sizeof *at, 0);
    for (int64_t i = 0; i < n; ++i) {
        at[i] = value;
    }
    ss_doubles *list = argument(a, name);
    list->at = at;
    list->n = n;
    return at;
}

static inline void specialist_targets_sizes(arguments *a, int pass) {
    if (pass == 0) {
        set_size(a, "C", get_int(a, "F") + 1);
        a->probabilities = 1;
    }
}

/* A table [S, B], where one was made at all. */
static inline void equal_weights(arguments *a, const char *name, const ss_list *sources) {
    ss_tensor *t = argument(a, name);
    if (t->data) {
        const int64_t shape[] = {sources->n, sources->at[0].shape[0]};
        *t = ss_tensor_of(NULL, SS_F64, 2, shape);
        double *at = t->data = buffer(a, (size_t)ss_count(t) * sizeof *at, 0);
        for (int64_t i = 0; i < ss_count(t); ++i) {
            at[i] = 1.0 / (double)sources->n;
        }
    }
}

static inline void fuse_numbers(arguments *a, int pass) {
    a->probabilities = 1;
    if (pass == 1) {
        const ss_list *sources = argument(a, "sources");
        equal_weights(a, "weights", sources);
        equal_weights(a, "uncertainty_weights", sources);
        set_int(a, "channels", sources->at[0].shape[1] == 1 ? 2 : sources->at[0].shape[1]);
        set_int(a, "ignore_index", 255);
    }
}

/* N problems: every image once per class. */
static inline void image_problems(arguments *a, int pass) {
    if (pass == 0) {
        int64_t images = 1 + (int64_t)below(a, 2), classes = 1 + (int64_t)below(a, 2);
        set_size(a, "B", images);
        set_int(a, "classes", classes);
        set_size(a, "N", images * classes);
    } else if (pass == 1) {
        set_doubles(a, "spacing", 3, 1.0);
    }
}

static inline void random_walker_numbers(arguments *a, int pass) {
    a->probabilities = 1;
    image_problems(a, pass);
    if (pass == 1) {
        const ss_tensor *prior = argument(a, "prior");
        if (!prior->data) {
            *(double *)argument(a, "gamma") = 0.0;
        }
    }
}

static inline void connectivity_of_3d(arguments *a, int pass) {
    const int64_t known[] = {6, 18, 26};
    if (pass == 0) {
        set_int(a, "connectivity", known[below(a, 3)]);
    }
}

static inline void surface_numbers(arguments *a, int pass) {
    if (pass == 0) {
        set_int(a, "dims", 3);
    } else if (pass == 1) {
        set_doubles(a, "spacing", 3, 1.0);
        set_doubles(a, "tolerance", get_int(a, "num_classes"), 1.0);
    }
}

/* Terms of random kind on integer labels, a distribution or nothing, with and without weights. */
static inline void voxel_loss_terms(arguments *a, int pass) {
    if (pass != 1) {
        return;
    }
    const ss_tensor *logits = argument(a, "logits");
    int64_t shape[SS_MAX_DIMS];
    memcpy(shape, logits->shape, sizeof shape);
    int64_t fields = 17 + shape[1], terms = get_int(a, "terms");
    ss_tensor *at = buffer(a, 3 * sizeof *at, 0);
    at[1] = ss_tensor_of(NULL, logits->dtype, logits->ndim, shape);
    at[1].data = buffer(a, (size_t)ss_count(&at[1]) * ss_dtype_size(at[1].dtype), 0);
    fill(a, at[1].data, at[1].dtype, (size_t)ss_count(&at[1]));
    shape[1] = 1;
    at[0] = ss_tensor_of(NULL, below(a, 2) ? SS_U8 : SS_I64, logits->ndim, shape);
    at[0].data = buffer(a, (size_t)ss_count(&at[0]) * ss_dtype_size(at[0].dtype), 0);
    fill(a, at[0].data, at[0].dtype, (size_t)ss_count(&at[0]));
    at[2] = ss_tensor_of(NULL, SS_F32, logits->ndim, shape);
    at[2].data = buffer(a, (size_t)ss_count(&at[2]) * sizeof(float), 0);
    fill(a, at[2].data, SS_F32, (size_t)ss_count(&at[2]));
    *(ss_list *)argument(a, "targets") = (ss_list){at, 2};
    *(ss_list *)argument(a, "weights") = (ss_list){at + 2, 1};
    double *p = set_doubles(a, "params", terms * fields, 1.0);
    for (int64_t i = 0; i < terms; ++i, p += fields) {
        double kind = (double)below(a, 5);
        const double head[] = {kind,
                               kind == 4 ? -1.0 : (double)below(a, 2),
                               (double)below(a, 2) - 1.0,
                               0.0,
                               (double)shape[0],
                               (double)below(a, 2),
                               (double)below(a, 3),
                               0.1 * (double)below(a, 2)};
        memcpy(p, head, sizeof head);
        for (int k = 8; k < 17; ++k) {
            p[k] = k == 14 ? (double)below(a, 4) : (double)below(a, 2);
        }
    }
}

static inline void use_recipe(arguments *a, int pass) {
    static const struct {
        const char *op;
        void (*apply)(arguments *, int);
    } recipes[] = {
        {"specialist_targets", specialist_targets_sizes},
        {"fuse", fuse_numbers},
        {"random_walker", random_walker_numbers},
        {"voxel_loss_forward", voxel_loss_terms},
        {"voxel_loss_backward", voxel_loss_terms},
        {"geodesic", image_problems},
        {"components", connectivity_of_3d},
        {"keep_components", connectivity_of_3d},
        {"surface_metrics", surface_numbers},
    };
    for (size_t i = 0; i < sizeof recipes / sizeof recipes[0]; ++i) {
        if (strcmp(recipes[i].op, a->spec->name) == 0) {
            recipes[i].apply(a, pass);
        }
    }
}

#endif
