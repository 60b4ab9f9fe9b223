/* SPDX-License-Identifier: Apache-2.0
 *
 * core.c: the schema as data, every argument check, and dispatch to a backend.
 *
 * ops.def is read here once more, as tables. Kernels may rely on what ss_run has checked: dtypes,
 * shapes (already flattened where the schema says "S*"), contiguity, device, no empty inputs and
 * element counts that fit int64.
 */
#include "semisam.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef SEMISAM_VERSION
#define SEMISAM_VERSION "0.0.0"
#endif

/* ---- ops.def as tables ---------------------------------------------------------------------- */

#define SS_IN(name, dtype, shape) {#name, dtype, shape, 0, 0, SS_KIND_IN},
#define SS_OPT(name, dtype, shape) {#name, dtype, shape, 0, 0, SS_KIND_OPT},
#define SS_LIST(name, dtype, shape) {#name, dtype, shape, 0, 0, SS_KIND_LIST},
#define SS_OUT(name, dtype, shape) {#name, dtype, shape, 0, 0, SS_KIND_OUT},
#define SS_INT(name, lo, hi) {#name, "", "", (double)(lo), (double)(hi), SS_KIND_INT},
#define SS_DBL(name, lo, hi) {#name, "", "", lo, hi, SS_KIND_DBL},
#define SS_DBLS(name, max) {#name, "", "", 0, (double)(max), SS_KIND_DBLS},
#define SS_OP(op, doc, args) static const ss_arg_spec op##_args[] = {args};
#include "ops.def"

static const ss_op_spec specs[] = {
#define SS_OP(op, doc, args)                                                                       \
    {#op, doc, op##_args, (int32_t)(sizeof op##_args / sizeof op##_args[0]),                       \
     (int32_t)sizeof(ss_##op##_args)},
#include "ops.def"
};

/* Slots of an argument struct are found by walking: true only without padding between them. */
#define SS_IN(name, dtype, shape) +sizeof(ss_tensor)
#define SS_OPT(name, dtype, shape) +sizeof(ss_tensor)
#define SS_LIST(name, dtype, shape) +sizeof(ss_list)
#define SS_OUT(name, dtype, shape) +sizeof(ss_tensor)
#define SS_INT(name, lo, hi) +sizeof(int64_t)
#define SS_DBL(name, lo, hi) +sizeof(double)
#define SS_DBLS(name, max) +sizeof(ss_doubles)
#define SS_OP(op, doc, args) _Static_assert(sizeof(ss_##op##_args) == (0 args), "padding in " #op);
#include "ops.def"

const ss_op_spec *ss_op_specs(void) {
    return specs;
}

size_t ss_kind_size(int32_t kind) {
    switch (kind) {
    case SS_KIND_LIST:
        return sizeof(ss_list);
    case SS_KIND_INT:
        return sizeof(int64_t);
    case SS_KIND_DBL:
        return sizeof(double);
    case SS_KIND_DBLS:
        return sizeof(ss_doubles);
    default:
        return sizeof(ss_tensor);
    }
}

/* ---- dtypes --------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    size_t size;
} dtypes[SS_DTYPES] = {
    [SS_BOOL] = {"bool", 1}, [SS_U8] = {"u8", 1},   [SS_I8] = {"i8", 1},     [SS_U16] = {"u16", 2},
    [SS_I16] = {"i16", 2},   [SS_U32] = {"u32", 4}, [SS_I32] = {"i32", 4},   [SS_U64] = {"u64", 8},
    [SS_I64] = {"i64", 8},   [SS_F16] = {"f16", 2}, [SS_BF16] = {"bf16", 2}, [SS_F32] = {"f32", 4},
    [SS_F64] = {"f64", 8},
};

const char *ss_version(void) {
    return SEMISAM_VERSION;
}

const char *ss_dtype_name(int32_t dtype) {
    return dtype >= 0 && dtype < SS_DTYPES ? dtypes[dtype].name : "unknown";
}

size_t ss_dtype_size(int32_t dtype) {
    return dtype >= 0 && dtype < SS_DTYPES ? dtypes[dtype].size : 0;
}

int64_t ss_count(const ss_tensor *t) {
    int64_t n = 1;
    for (int32_t d = 0; d < t->ndim; ++d) {
        int64_t side = t->shape[d];
        if (side < 0 || (side > 0 && n > INT64_MAX / side)) {
            return -1;
        }
        n *= side;
    }
    return n;
}

static uint32_t bit(int32_t dtype) {
    return (uint32_t)1 << dtype;
}

/* One word of a dtype expression as a set of dtypes. */
static uint32_t word_set(const char *word, size_t length) {
    const uint32_t floats = bit(SS_F16) | bit(SS_BF16) | bit(SS_F32) | bit(SS_F64);
    const uint32_t all = bit(SS_DTYPES) - 1;
    const struct {
        const char *name;
        uint32_t set;
    } classes[] = {{"float", floats},
                   {"int", all & ~floats},
                   {"mask", bit(SS_BOOL) | bit(SS_U8)},
                   {"any", all}};
    for (size_t i = 0; i < sizeof classes / sizeof classes[0]; ++i) {
        if (strlen(classes[i].name) == length && memcmp(word, classes[i].name, length) == 0) {
            return classes[i].set;
        }
    }
    for (int32_t d = 0; d < SS_DTYPES; ++d) {
        if (strlen(dtypes[d].name) == length && memcmp(word, dtypes[d].name, length) == 0) {
            return bit(d);
        }
    }
    return 0;
}

/* ---- one call's checks ---------------------------------------------------------------------- */

#define MAX_NAMES 24
#define POOL (2 * SS_MAX_LIST) /* views of all lists of one call together */

/* Room for the argument struct of any operator. */
typedef union any_args {
#define SS_OP(op, doc, args) ss_##op##_args op;
#include "ops.def"
} any_args;

typedef struct check {
    ss_exec *x;
    const ss_op_spec *op;
    char *base; /* the argument struct */
    const char *name[MAX_NAMES];
    size_t length[MAX_NAMES];
    int64_t size[MAX_NAMES];
    int32_t names;
    int64_t star[SS_MAX_DIMS]; /* what "S*" stands for */
    int32_t stars;             /* -1: not bound yet */
    ss_tensor *views;          /* POOL of them: flattened copies of what lists hold */
    int32_t used;
} check;

#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
static ss_status refuse(check *c, ss_status status, const char *argument, const char *format, ...) {
    char text[sizeof c->x->error];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    /* The sentence is at most as long as the room for it; a cut one still names the argument. */
    int n = snprintf(c->x->error, sizeof c->x->error, "%s(): %s: ", c->op->name, argument);
    if (n > 0 && (size_t)n < sizeof c->x->error) {
        snprintf(c->x->error + n, sizeof c->x->error - (size_t)n, "%.*s",
                 (int)(sizeof c->x->error - (size_t)n - 1), text);
    }
    return status;
}

static char *slot(const check *c, int32_t index) {
    char *p = c->base;
    for (int32_t i = 0; i < index; ++i) {
        p += ss_kind_size(c->op->args[i].kind);
    }
    return p;
}

static const ss_tensor *tensor_named(const check *c, const char *name) {
    for (int32_t i = 0; i < c->op->n_args; ++i) {
        if (strcmp(c->op->args[i].name, name) == 0) {
            if (c->op->args[i].kind == SS_KIND_LIST) {
                const ss_list *list = (const ss_list *)(const void *)slot(c, i);
                return list->n > 0 ? &list->at[0] : NULL;
            }
            return (const ss_tensor *)(const void *)slot(c, i);
        }
    }
    return NULL;
}

/* The set of dtypes that an expression allows, given the tensors seen so far. */
static uint32_t dtype_set(const check *c, const char *expression) {
    const char *e = expression[0] == '?' ? expression + 1 : expression;
    if (e[0] == '=') {
        const ss_tensor *t = tensor_named(c, e + 1);
        return t ? bit(t->dtype) : 0;
    }
    if (strncmp(e, "acc=", 4) == 0) {
        const ss_tensor *t = tensor_named(c, e + 4);
        return bit(t && t->dtype == SS_F64 ? SS_F64 : SS_F32);
    }
    uint32_t set = 0;
    while (*e) {
        size_t length = strcspn(e, "|");
        set |= word_set(e, length);
        e += length + (e[length] == '|');
    }
    return set;
}

static void print_set(uint32_t set, char *text, size_t room) {
    size_t used = 0;
    text[0] = '\0';
    for (int32_t d = 0; d < SS_DTYPES && used < room; ++d) {
        if (set & bit(d)) {
            int n = snprintf(text + used, room - used, "%s%s", used ? ", " : "", dtypes[d].name);
            used += n > 0 ? (size_t)n : 0;
        }
    }
}

static void print_device(int32_t device, int32_t index, char *text, size_t room) {
    if (device == SS_CPU) {
        snprintf(text, room, "cpu");
    } else {
        snprintf(text, room, "cuda:%d", (int)index);
    }
}

static void print_shape(const int64_t *shape, int32_t ndim, char *text, size_t room) {
    size_t used = (size_t)snprintf(text, room, "(");
    for (int32_t d = 0; d < ndim && used + 24 < room; ++d) {
        used +=
            (size_t)snprintf(text + used, room - used, d ? ", %lld" : "%lld", (long long)shape[d]);
    }
    snprintf(text + used, room - used, ndim == 1 ? ",)" : ")");
}

static int64_t *bound(check *c, const char *name, size_t length) {
    for (int32_t i = 0; i < c->names; ++i) {
        if (c->length[i] == length && memcmp(c->name[i], name, length) == 0) {
            return &c->size[i];
        }
    }
    return NULL;
}

static void bind(check *c, const char *name, size_t length, int64_t size) {
    if (c->names < MAX_NAMES) {
        c->name[c->names] = name;
        c->length[c->names] = length;
        c->size[c->names++] = size;
    }
}

/* What a shape expression looks like with everything that is bound filled in. */
static void print_expected(check *c, const char *shape, char *text, size_t room) {
    size_t used = (size_t)snprintf(text, room, "(");
    const char *s = shape;
    for (int32_t d = 0; *s && used + 24 < room; ++d) {
        size_t length = strcspn(s, " ");
        const char *comma = d ? ", " : "";
        int64_t *size = bound(c, s, length);
        if (s[length - 1] == '*' && c->stars >= 0) {
            for (int32_t k = 0; k < c->stars && used + 24 < room; ++k) {
                used += (size_t)snprintf(text + used, room - used, "%s%lld", d + k ? ", " : "",
                                         (long long)c->star[k]);
            }
        } else if (s[length - 1] == '*') {
            used += (size_t)snprintf(text + used, room - used, "%sspatial...", comma);
        } else if (size) {
            used += (size_t)snprintf(text + used, room - used, "%s%lld", comma, (long long)*size);
        } else {
            used += (size_t)snprintf(text + used, room - used, "%s%.*s", comma, (int)length, s);
        }
        s += length + (s[length] == ' ');
    }
    snprintf(text + used, room - used, ")");
}

static ss_status wrong_shape(check *c, const char *label, const ss_tensor *t, const char *shape) {
    char expected[96];
    char got[96];
    print_expected(c, shape, expected, sizeof expected);
    print_shape(t->shape, t->ndim, got, sizeof got);
    return refuse(c, SS_INVALID, label, "expected shape %s, got %s", expected, got);
}

/* Matches a shape, binding names at first use; flattens the dimensions behind "S*". */
static ss_status check_shape(check *c, const char *label, ss_tensor *t, const char *shape) {
    if (strcmp(shape, "*") == 0) {
        return SS_OK;
    }
    const char *s = shape;
    int32_t d = 0;
    while (*s) {
        size_t length = strcspn(s, " ");
        if (s[length - 1] == '*') {
            int32_t rest = t->ndim - d;
            if (rest < 1 || (c->stars >= 0 && rest != c->stars)) {
                return wrong_shape(c, label, t, shape);
            }
            int64_t flat = 1;
            for (int32_t k = 0; k < rest; ++k) {
                if (c->stars >= 0 && c->star[k] != t->shape[d + k]) {
                    return wrong_shape(c, label, t, shape);
                }
                flat *= t->shape[d + k]; /* cannot overflow: ss_count has passed */
            }
            if (c->stars < 0) {
                c->stars = rest;
                memcpy(c->star, t->shape + d, (size_t)rest * sizeof(int64_t));
            }
            t->shape[d] = flat;
            t->stride[d] = 1;
            t->ndim = d + 1;
            return SS_OK;
        }
        if (d >= t->ndim) {
            return wrong_shape(c, label, t, shape);
        }
        int64_t *size = bound(c, s, length);
        int64_t literal = s[0] >= '0' && s[0] <= '9' ? strtoll(s, NULL, 10) : -1;
        if ((literal >= 0 && t->shape[d] != literal) || (size && *size != t->shape[d])) {
            return wrong_shape(c, label, t, shape);
        }
        if (literal < 0 && !size) {
            bind(c, s, length, t->shape[d]);
        }
        ++d;
        s += length + (s[length] == ' ');
    }
    return d == t->ndim ? SS_OK : wrong_shape(c, label, t, shape);
}

static ss_status check_tensor(check *c, const char *label, ss_tensor *t, const ss_arg_spec *spec) {
    if (t->ndim < 0 || t->ndim > SS_MAX_DIMS) {
        return refuse(c, SS_INVALID, label, "expected at most %d dimensions, got %d", SS_MAX_DIMS,
                      (int)t->ndim);
    }
    if (t->data == NULL && ss_count(t) != 0) {
        return refuse(c, SS_INVALID, label, "expected an array, got nothing");
    }
    uint32_t set = dtype_set(c, spec->dtype);
    char text[128];
    if (t->dtype < 0 || t->dtype >= SS_DTYPES || !(set & bit(t->dtype))) {
        print_set(set, text, sizeof text);
        return refuse(c, SS_WRONG_TYPE, label, "expected dtype %s, got %s", text,
                      ss_dtype_name(t->dtype));
    }
    if (t->device != c->x->device ||
        (t->device != SS_CPU && t->device_index != c->x->device_index)) {
        char got[32];
        print_device(c->x->device, c->x->device_index, text, sizeof text);
        print_device(t->device, t->device_index, got, sizeof got);
        return refuse(c, SS_INVALID, label, "expected a tensor on %s, got one on %s", text, got);
    }
    int64_t n = ss_count(t);
    if (n < 0 || n > INT64_MAX / 8) {
        return refuse(c, SS_INVALID, label, "the number of elements overflows");
    }
    if (n == 0 && spec->kind != SS_KIND_OUT) {
        print_shape(t->shape, t->ndim, text, sizeof text);
        return refuse(c, SS_INVALID, label, "expected at least one element, got shape %s", text);
    }
    int64_t stride = 1;
    for (int32_t d = t->ndim - 1; n > 0 && d >= 0; --d) {
        if (t->shape[d] != 1 && t->stride[d] != stride) {
            return refuse(c, SS_INVALID, label, "expected a C-contiguous array");
        }
        stride *= t->shape[d];
    }
    if (spec->kind == SS_KIND_OUT && t->read_only) {
        return refuse(c, SS_INVALID, label, "expected a writable array, got a read-only one");
    }
    if (n > 0 && ((uintptr_t)t->data & (ss_dtype_size(t->dtype) - 1)) != 0) {
        return refuse(c, SS_INVALID, label, "expected memory aligned to its element size");
    }
    return check_shape(c, label, t, spec->shape);
}

/* Checks copies of the list's views, since the caller's own must not come out flattened. */
static ss_status check_list(check *c, ss_list *list, const ss_arg_spec *spec) {
    if (list->n < (spec->dtype[0] == '?' ? 0 : 1) || list->n > SS_MAX_LIST) {
        return refuse(c, SS_INVALID, spec->name, "expected 1 to %d arrays, got %lld", SS_MAX_LIST,
                      (long long)list->n);
    }
    if (c->used + list->n > POOL) {
        return refuse(c, SS_INVALID, spec->name, "expected at most %d arrays in all lists", POOL);
    }
    ss_tensor *views = c->views + c->used;
    c->used += (int32_t)list->n;
    if (list->n > 0 && list->at == NULL) {
        return refuse(c, SS_INVALID, spec->name, "expected arrays, got nothing");
    }
    for (int64_t i = 0; i < list->n; ++i) {
        char label[64];
        snprintf(label, sizeof label, "%s[%lld]", spec->name, (long long)i);
        views[i] = list->at[i];
        ss_status status = check_tensor(c, label, &views[i], spec);
        if (status != SS_OK) {
            return status;
        }
    }
    list->at = views;
    return SS_OK;
}

static ss_status check_number(check *c, double v, const ss_arg_spec *spec) {
    if (v >= spec->lo && v <= spec->hi) {
        return SS_OK; /* false for NaN */
    }
    if (spec->kind == SS_KIND_INT && spec->hi >= 0x1p53) {
        return refuse(c, SS_INVALID, spec->name, "expected an integer of at least %.0f, got %.0f",
                      spec->lo, v);
    }
    if (spec->kind == SS_KIND_INT) {
        return refuse(c, SS_INVALID, spec->name, "expected an integer from %.0f to %.0f, got %.0f",
                      spec->lo, spec->hi, v);
    }
    return refuse(c, SS_INVALID, spec->name, "expected a number from %g to %g, got %g", spec->lo,
                  spec->hi, v);
}

static ss_status check_slot(check *c, char *p, const ss_arg_spec *spec) {
    switch (spec->kind) {
    case SS_KIND_LIST:
        return check_list(c, (ss_list *)(void *)p, spec);
    case SS_KIND_INT: {
        int64_t v = *(int64_t *)(void *)p;
        bind(c, spec->name, strlen(spec->name), v);
        return check_number(c, (double)v, spec);
    }
    case SS_KIND_DBL:
        return check_number(c, *(double *)(void *)p, spec);
    case SS_KIND_DBLS: {
        const ss_doubles *v = (const ss_doubles *)(const void *)p;
        if (v->n > 0 && v->at == NULL) {
            return refuse(c, SS_INVALID, spec->name, "expected numbers, got nothing");
        }
        if (v->n >= 0 && v->n <= (int64_t)spec->hi) {
            return SS_OK;
        }
        return refuse(c, SS_INVALID, spec->name, "expected at most %.0f numbers, got %lld",
                      spec->hi, (long long)v->n);
    }
    default:
        return check_tensor(c, spec->name, (ss_tensor *)(void *)p, spec);
    }
}

static int is_absent(const char *p, const ss_arg_spec *spec) {
    const ss_tensor *t = (const ss_tensor *)(const void *)p;
    return spec->kind == SS_KIND_OPT && t->data == NULL && t->ndim == 0;
}

static ss_status check_all(ss_exec *x, const ss_op_spec *op, void *args, ss_tensor *views) {
    check c = {.x = x, .op = op, .base = args, .stars = -1, .views = views};
    /* Numbers first: their names are sizes of outputs that may come earlier in the list. */
    for (int32_t pass = 0; pass < 2; ++pass) {
        char *p = c.base;
        for (int32_t i = 0; i < op->n_args; ++i) {
            const ss_arg_spec *spec = &op->args[i];
            int number = spec->kind == SS_KIND_INT || spec->kind == SS_KIND_DBL ||
                         spec->kind == SS_KIND_DBLS;
            if (number == (pass == 0) && !is_absent(p, spec)) {
                ss_status status = check_slot(&c, p, spec);
                if (status != SS_OK) {
                    return status;
                }
            }
            p += ss_kind_size(spec->kind);
        }
    }
    return SS_OK;
}

/* ---- dispatch ------------------------------------------------------------------------------- */

/* Set once, before any call that needs them; never changed afterwards. */
static const ss_backend *added[SS_CUDA + 1];

ss_status ss_add_backend(const ss_backend *backend, char *error, size_t room) {
    if (backend->abi != SS_ABI) { /* nothing behind the number may be read before this */
        snprintf(error, room, "expected a backend of ABI %d, got %d: rebuild it", SS_ABI,
                 (int)backend->abi);
        return SS_INVALID;
    }
    if (backend->device != SS_CPU && backend->device != SS_CUDA) {
        snprintf(error, room, "expected a backend for device %d or %d, got %d", SS_CPU, SS_CUDA,
                 (int)backend->device);
        return SS_INVALID;
    }
    added[backend->device] = backend;
    return SS_OK;
}

const ss_backend *ss_added_backend(int32_t device) {
    return device == SS_CPU || device == SS_CUDA ? added[device] : NULL;
}

static const ss_backend *backend_for(const ss_exec *x) {
    if (x->device != SS_CPU) {
        return ss_added_backend(x->device);
    }
    int32_t n = 0;
    const ss_backend *const *all = ss_cpu_backends(&n);
    for (int32_t i = 0; x->isa && i < n; ++i) {
        if (strcmp(all[i]->isa, x->isa) == 0) {
            return all[i];
        }
    }
    if (x->isa && added[SS_CPU] && strcmp(added[SS_CPU]->isa, x->isa) == 0) {
        return added[SS_CPU];
    }
    return x->isa ? NULL : all[0];
}

int32_t ss_has(const ss_backend *backend, int32_t op) {
    switch (op) {
#define SS_OP(op, doc, args)                                                                       \
    case SS_OP_##op:                                                                               \
        return backend->op != NULL;
#include "ops.def"
    default:
        return 0;
    }
}

static int64_t workspace_of(const ss_backend *backend, int32_t op, const void *args) {
    switch (op) {
#define SS_OP(op, doc, args_)                                                                      \
    case SS_OP_##op:                                                                               \
        return backend->op##_workspace ? backend->op##_workspace((const ss_##op##_args *)args) : 0;
#include "ops.def"
    default:
        return 0;
    }
}

static ss_status call_kernel(ss_exec *x, const ss_backend *backend, int32_t op, const void *args) {
    switch (op) {
#define SS_OP(op, doc, args_)                                                                      \
    case SS_OP_##op:                                                                               \
        return backend->op(x, (const ss_##op##_args *)args);
#include "ops.def"
    default:
        return SS_UNSUPPORTED;
    }
}

static ss_status find_backend(ss_exec *x, int32_t op, const ss_backend **found) {
    const ss_backend *backend = backend_for(x);
    if (backend && ss_has(backend, op)) {
        *found = backend;
        return SS_OK;
    }
    snprintf(x->error, sizeof x->error, "%s(): not available on %s%s%s", specs[op].name,
             x->device == SS_CPU ? "cpu" : "cuda", x->isa ? " with instruction set " : "",
             x->isa ? x->isa : "");
    return SS_UNSUPPORTED;
}

static ss_status check_workspace(ss_exec *x, const ss_backend *backend, int32_t op,
                                 const void *args) {
    int64_t bytes = workspace_of(backend, op, args);
    if (bytes < 0) {
        snprintf(x->error, sizeof x->error, "%s(): the size of the workspace overflows",
                 specs[op].name);
        return SS_NO_MEMORY;
    }
    if (bytes > 0 && (!x->workspace || x->workspace_bytes < bytes)) {
        snprintf(x->error, sizeof x->error, "%s(): workspace: expected %lld bytes, got %lld",
                 specs[op].name, (long long)bytes,
                 (long long)(x->workspace ? x->workspace_bytes : 0));
        return SS_INVALID;
    }
    return SS_OK;
}

static ss_status check_op(ss_exec *x, int32_t op) {
    x->error[0] = '\0';
    if (op >= 0 && op < SS_OPS) {
        return SS_OK;
    }
    snprintf(x->error, sizeof x->error, "operator %d does not exist", (int)op);
    return SS_INVALID;
}

ss_status ss_workspace(ss_exec *x, int32_t op, const void *args, int64_t *bytes) {
    ss_tensor views[POOL];
    any_args copy;
    const ss_backend *backend = NULL;
    *bytes = 0;
    ss_status status = check_op(x, op);
    if (status == SS_OK) {
        memcpy(&copy, args, (size_t)specs[op].size);
        status = check_all(x, &specs[op], &copy, views);
    }
    status = status == SS_OK ? find_backend(x, op, &backend) : status;
    if (status == SS_OK) {
        *bytes = workspace_of(backend, op, &copy);
    }
    return status;
}

ss_status ss_run(ss_exec *x, int32_t op, void *args) {
    ss_tensor views[POOL];
    const ss_backend *backend = NULL;
    ss_status status = check_op(x, op);
    status = status == SS_OK ? check_all(x, &specs[op], args, views) : status;
    status = status == SS_OK ? find_backend(x, op, &backend) : status;
    status = status == SS_OK ? check_workspace(x, backend, op, args) : status;
    if (status != SS_OK) {
        return status;
    }
    status = call_kernel(x, backend, op, args);
    if (status != SS_OK) {
        /* Kernels write "argument: expected X, got Y"; the operator's name goes in front here. */
        char text[sizeof x->error];
        memcpy(text, x->error, sizeof text);
        snprintf(x->error, sizeof x->error, "%s(): %.*s", specs[op].name,
                 (int)(sizeof x->error - strlen(specs[op].name) - 5), text);
    }
    return status;
}

#define SS_OP(op, doc, args)                                                                       \
    ss_status ss_##op(ss_exec *x, const ss_##op##_args *a) {                                       \
        ss_##op##_args copy = *a;                                                                  \
        return ss_run(x, SS_OP_##op, &copy);                                                       \
    }
#include "ops.def"
