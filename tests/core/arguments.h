/* SPDX-License-Identifier: Apache-2.0
 *
 * arguments.h: arguments for any operator, made from its schema and a seed, so that tests reach
 * operators that did not exist when they were written.
 *
 * Every buffer is its own allocation of the exact size, so that an address sanitizer sees the first
 * byte too far. `wild` values are what nobody should pass: NaN, infinities, any bits as labels.
 */
#ifndef SS_TEST_ARGUMENTS_H
#define SS_TEST_ARGUMENTS_H

#include "check.h"
#include "semisam.h"
#include "ss_math.h"

#include <stdlib.h>

#define MOST_ARGS 32
#define MOST_BUFFERS 160

typedef struct arguments {
    const ss_op_spec *spec;
    int32_t op;
    int wild;
    int probabilities; /* floating values stay in 0..1 */
    uint64_t state;
    char *slots;
    void *buffer[MOST_BUFFERS];
    size_t bytes[MOST_BUFFERS];
    int is_output[MOST_BUFFERS];
    int32_t dtype[MOST_BUFFERS];
    int buffers;
    const char *name[MOST_ARGS];
    size_t length[MOST_ARGS];
    int64_t size[MOST_ARGS];
    int names;
    int64_t star[SS_MAX_DIMS];
    int stars;
} arguments;

static inline uint64_t below(arguments *a, uint64_t n) {
    return ss_pick(n, next_random(&a->state));
}

static inline double unit(arguments *a) {
    return (double)(next_random(&a->state) >> 11) * 0x1p-53;
}

static inline char *slot_of(const arguments *a, int32_t index) {
    char *p = a->slots;
    for (int32_t i = 0; i < index; ++i) {
        p += ss_kind_size(a->spec->args[i].kind);
    }
    return p;
}

/* ---- names and dtypes of the schema --------------------------------------------------------- */

static inline int64_t *size_of(arguments *a, const char *word, size_t length) {
    for (int i = 0; i < a->names; ++i) {
        if (a->length[i] == length && memcmp(a->name[i], word, length) == 0) {
            return &a->size[i];
        }
    }
    return NULL;
}

static inline void name_size(arguments *a, const char *word, size_t length, int64_t size) {
    a->name[a->names] = word;
    a->length[a->names] = length;
    a->size[a->names++] = size;
}

static inline const ss_tensor *earlier(const arguments *a, const char *name) {
    for (int32_t i = 0; i < a->spec->n_args; ++i) {
        if (strcmp(a->spec->args[i].name, name) == 0) {
            const char *p = slot_of(a, i);
            return a->spec->args[i].kind == SS_KIND_LIST ? ((const ss_list *)(const void *)p)->at
                                                         : (const ss_tensor *)(const void *)p;
        }
    }
    return NULL;
}

static inline int word_allows(const char *word, size_t length, int32_t dtype) {
    const char *name = ss_dtype_name(dtype);
    int is_float = name[0] == 'f' || strcmp(name, "bf16") == 0;
    if (length == 5 && memcmp(word, "float", 5) == 0) {
        return is_float;
    }
    if (length == 3 && (memcmp(word, "int", 3) == 0 || memcmp(word, "any", 3) == 0)) {
        return word[0] == 'a' || !is_float;
    }
    if (length == 4 && memcmp(word, "mask", 4) == 0) {
        return dtype == SS_BOOL || dtype == SS_U8;
    }
    return strlen(name) == length && memcmp(word, name, length) == 0;
}

static inline int dtype_allowed(const arguments *a, const char *expression, int32_t dtype) {
    const char *e = expression + (expression[0] == '?');
    if (e[0] == '=') {
        return earlier(a, e + 1)->dtype == dtype;
    }
    if (strncmp(e, "acc=", 4) == 0) {
        return dtype == (earlier(a, e + 4)->dtype == SS_F64 ? SS_F64 : SS_F32);
    }
    while (*e) {
        size_t length = strcspn(e, "|");
        if (word_allows(e, length, dtype)) {
            return 1;
        }
        e += length + (e[length] == '|');
    }
    return 0;
}

static inline int32_t pick_dtype(arguments *a, const char *expression) {
    int32_t allowed[SS_DTYPES];
    int n = 0;
    for (int32_t d = 0; d < SS_DTYPES; ++d) {
        if (dtype_allowed(a, expression, d)) {
            allowed[n++] = d;
        }
    }
    return n ? allowed[below(a, (uint64_t)n)] : SS_F32;
}

/* ---- values --------------------------------------------------------------------------------- */

static inline void put_float(void *data, int32_t dtype, size_t i, double v) {
    switch (dtype) {
    case SS_F16:
        ((uint16_t *)data)[i] = ss_f32_f16((float)v);
        return;
    case SS_BF16:
        ((uint16_t *)data)[i] = ss_f32_bf16((float)v);
        return;
    case SS_F32:
        ((float *)data)[i] = (float)v;
        return;
    default:
        ((double *)data)[i] = v;
        return;
    }
}

static inline double wild_number(arguments *a) {
    static const double odd[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0, 1e30, -1e30, 1e-40, -1.0};
    return odd[below(a, sizeof odd / sizeof odd[0])];
}

static inline void fill(arguments *a, void *data, int32_t dtype, size_t n) {
    static const double scales[] = {1.0, 1.0, 20.0};
    size_t size = ss_dtype_size(dtype);
    double scale = a->probabilities ? 1.0 : scales[below(a, 3)];
    uint64_t labels = 1 + below(a, 3); /* 0; 0, 1; 0, 1, 2 */
    double odd = a->wild && below(a, 2) ? 0.1 : 0.0;
    for (size_t i = 0; i < n; ++i) {
        if (dtype >= SS_F16) {
            double v = scale > 1.0 ? scale * (unit(a) - 0.5) : unit(a);
            put_float(data, dtype, i, unit(a) < odd ? wild_number(a) : v);
            continue;
        }
        uint64_t v = below(a, dtype == SS_BOOL ? 2 : labels);
        if (dtype != SS_BOOL && unit(a) < odd) {
            v = next_random(&a->state);
        }
        memcpy((char *)data + i * size, &v, size); /* little-endian, as all machines here */
    }
}

static inline void *buffer(arguments *a, size_t bytes, int is_output) {
    void *p = malloc(bytes ? bytes : 1);
    memset(p, 0xA5, bytes ? bytes : 1);
    a->is_output[a->buffers] = is_output;
    a->bytes[a->buffers] = bytes;
    a->buffer[a->buffers++] = p;
    return p;
}

static inline void put_shape(arguments *a, ss_tensor *t, const char *shape) {
    const char *s = shape;
    if (strcmp(s, "*") == 0) {
        t->ndim = 1 + (int32_t)below(a, 3);
        for (int32_t d = 0; d < t->ndim; ++d) {
            t->shape[d] = 1 + (int64_t)below(a, 5);
        }
        return;
    }
    while (*s) {
        size_t length = strcspn(s, " ");
        int64_t *size = size_of(a, s, length);
        if (s[length - 1] == '*') {
            if (a->stars < 0) {
                a->stars = 1 + (int)below(a, (uint64_t)(SS_MAX_DIMS - 1 - t->ndim));
                for (int k = 0; k < a->stars; ++k) {
                    a->star[k] = 1 + (int64_t)below(a, k ? 7 : 40);
                }
            }
            for (int k = 0; k < a->stars; ++k) {
                t->shape[t->ndim++] = a->star[k];
            }
        } else if (s[0] >= '0' && s[0] <= '9') {
            t->shape[t->ndim++] = strtoll(s, NULL, 10);
        } else {
            if (!size) {
                int64_t most = s[0] == 'N' || s[0] == 'B' || s[0] == 'C' ? 3 : 9;
                name_size(a, s, length, 1 + (int64_t)below(a, (uint64_t)most));
                size = &a->size[a->names - 1];
            }
            t->shape[t->ndim++] = *size;
        }
        s += length + (s[length] == ' ');
    }
}

static inline void put_tensor(arguments *a, ss_tensor *t, const ss_arg_spec *spec, int32_t dtype) {
    memset(t, 0, sizeof *t);
    t->device = SS_CPU;
    t->dtype = dtype;
    put_shape(a, t, spec->shape);
    int64_t n = 1;
    for (int32_t d = t->ndim - 1; d >= 0; --d) {
        t->stride[d] = n;
        n *= t->shape[d];
    }
    int is_output = spec->kind == SS_KIND_OUT;
    t->data = buffer(a, (size_t)n * ss_dtype_size(dtype), is_output);
    a->dtype[a->buffers - 1] = dtype;
    if (!is_output) {
        fill(a, t->data, dtype, (size_t)n);
    }
}

static inline double inside(double v, const ss_arg_spec *spec) {
    return v < spec->lo ? spec->lo : (v > spec->hi ? spec->hi : v);
}

static inline void put_number(arguments *a, char *p, const ss_arg_spec *spec) {
    static const double some[] = {1.0, 0.5, 0.0, 2.0, 1e-3, 1e6};
    if (spec->kind == SS_KIND_INT) {
        int64_t lo = (int64_t)inside(-2.0, spec);
        int64_t hi = (int64_t)inside((double)lo + 6.0, spec);
        int64_t v = lo + (int64_t)below(a, (uint64_t)(hi - lo) + 1);
        memcpy(p, &v, sizeof v);
        name_size(a, spec->name, strlen(spec->name), v);
    } else if (spec->kind == SS_KIND_DBL) {
        double v = inside(some[below(a, sizeof some / sizeof some[0])], spec);
        memcpy(p, &v, sizeof v);
    } else {
        int64_t n = (int64_t)below(a, (uint64_t)inside(6.0, spec) + 1);
        double *at = buffer(a, (size_t)n * sizeof(double), 0);
        double same = some[below(a, 2)];
        for (int64_t i = 0; i < n; ++i) {
            at[i] = a->wild && below(a, 8) == 0 ? wild_number(a) : same;
        }
        ss_doubles list = {at, n};
        memcpy(p, &list, sizeof list);
    }
}

static inline void put_list(arguments *a, char *p, const ss_arg_spec *spec) {
    int64_t n = spec->dtype[0] == '?' ? (int64_t)below(a, 4) : 1 + (int64_t)below(a, 3);
    ss_tensor *at = buffer(a, (size_t)n * sizeof *at, 0);
    int32_t dtype = pick_dtype(a, spec->dtype);
    for (int64_t i = 0; i < n; ++i) {
        put_tensor(a, &at[i], spec, dtype);
    }
    ss_list list = {at, n};
    memcpy(p, &list, sizeof list);
}

/* ---- what the schema cannot say ------------------------------------------------------------- */

#include "recipes.h"

/* ---- one set of arguments ------------------------------------------------------------------- */

static inline int is_number(const ss_arg_spec *spec) {
    return spec->kind == SS_KIND_INT || spec->kind == SS_KIND_DBL || spec->kind == SS_KIND_DBLS;
}

static inline void make_arguments(arguments *a, int32_t op, uint64_t seed, int wild) {
    memset(a, 0, sizeof *a);
    a->spec = &ss_op_specs()[op];
    a->op = op;
    a->wild = wild;
    a->state = seed * 1000003u + (uint64_t)op;
    a->stars = -1;
    a->slots = calloc(1, (size_t)a->spec->size);
    for (int pass = 0; pass < 3; ++pass) { /* numbers, inputs, outputs: sizes before their use */
        for (int32_t i = 0; i < a->spec->n_args; ++i) {
            const ss_arg_spec *spec = &a->spec->args[i];
            char *p = slot_of(a, i);
            if (is_number(spec) && pass == 0) {
                put_number(a, p, spec);
            } else if (spec->kind == SS_KIND_LIST && pass == 1) {
                put_list(a, p, spec);
            } else if (!is_number(spec) && spec->kind != SS_KIND_LIST &&
                       pass == (spec->kind == SS_KIND_OUT ? 2 : 1)) {
                if (spec->kind != SS_KIND_OPT || below(a, 2)) {
                    put_tensor(a, (ss_tensor *)(void *)p, spec, pick_dtype(a, spec->dtype));
                }
            }
        }
        use_recipe(a, pass);
    }
}

static inline void free_arguments(arguments *a) {
    for (int i = 0; i < a->buffers; ++i) {
        free(a->buffer[i]);
    }
    free(a->slots);
}

/* ss_run changes the views it is given ("S*" comes out flat): run a copy of them. */
static inline ss_status run_arguments(ss_exec *x, const arguments *a) {
    char *copy = malloc((size_t)a->spec->size);
    memcpy(copy, a->slots, (size_t)a->spec->size);
    ss_tensor *views[MOST_ARGS] = {0};
    for (int32_t i = 0; i < a->spec->n_args; ++i) {
        if (a->spec->args[i].kind == SS_KIND_LIST) {
            ss_list *list = (ss_list *)(void *)(copy + (slot_of(a, i) - a->slots));
            views[i] = malloc((size_t)(list->n + 1) * sizeof(ss_tensor));
            memcpy(views[i], list->at, (size_t)list->n * sizeof(ss_tensor));
            list->at = views[i];
        }
    }
    ss_status status = ss_run(x, a->op, copy);
    for (int32_t i = 0; i < a->spec->n_args; ++i) {
        free(views[i]);
    }
    free(copy);
    return status;
}

/* Which NaN it is (sign, payload) may differ between instruction sets: make all of them one. */
static inline void unify_nans(void *data, int32_t dtype, size_t bytes) {
    size_t n = bytes / (ss_dtype_size(dtype) ? ss_dtype_size(dtype) : 1);
    uint16_t *h = data;
    float *f = data;
    double *d = data;
    for (size_t i = 0; i < n; ++i) {
        if ((dtype == SS_F16 && isnan(ss_f16_f32(h[i]))) ||
            (dtype == SS_BF16 && isnan(ss_bf16_f32(h[i])))) {
            h[i] = 0x7fff;
        } else if (dtype == SS_F32 && isnan(f[i])) {
            f[i] = NAN;
        } else if (dtype == SS_F64 && isnan(d[i])) {
            d[i] = (double)NAN;
        }
    }
}

/* A hash of all outputs, or of all inputs. */
static inline uint64_t hash_arguments(const arguments *a, int outputs) {
    uint64_t h = 14695981039346656037u;
    for (int i = 0; i < a->buffers; ++i) {
        if (outputs && a->is_output[i]) {
            unify_nans(a->buffer[i], a->dtype[i], a->bytes[i]);
        }
        for (size_t k = 0; a->is_output[i] == outputs && k < a->bytes[i]; ++k) {
            h = (h ^ ((const unsigned char *)a->buffer[i])[k]) * 1099511628211u;
        }
    }
    return h;
}

static inline void spoil_outputs(arguments *a) {
    for (int i = 0; i < a->buffers; ++i) {
        if (a->is_output[i]) {
            memset(a->buffer[i], 0xA5, a->bytes[i]);
        }
    }
}

#endif
