/* SPDX-License-Identifier: Apache-2.0
 *
 * test_schema.c: every kind of bad argument, one sentence each. The tensor checks are tried on
 * mask_logits, whose schema is short; lists and numbers on whatever operators have them.
 */
#include "arguments.h"

static float volume[2 * 4 * 4 * 4 + 1];
static float logits[2 * 2 * 2 * 2];

static ss_mask_logits_args good(void) {
    const int64_t in[] = {2, 4, 4, 4}, out[] = {2, 2, 2, 2};
    ss_mask_logits_args a = {.d = 2, .h = 2, .w = 2};
    a.prob = ss_tensor_of(volume, SS_F32, 4, in);
    a.logits = ss_tensor_of(logits, SS_F32, 4, out);
    return a;
}

static void expect(ss_mask_logits_args a, ss_status status, const char *text) {
    ss_exec x = ss_exec_cpu(1);
    memset(x.error, 'x', sizeof x.error);
    ss_status got = ss_mask_logits(&x, &a);
    CHECK(got == status, "status %d, expected %d", (int)got, (int)status);
    CHECK_TEXT(x.error, text);
}

static void test_dtype_and_device(void) {
    ss_mask_logits_args a = good();
    expect(a, SS_OK, "");
    a.prob.dtype = SS_I32;
    expect(a, SS_WRONG_TYPE, "mask_logits(): prob: expected dtype f16, bf16, f32, f64, got i32");
    a.prob.dtype = 77;
    expect(a, SS_WRONG_TYPE,
           "mask_logits(): prob: expected dtype f16, bf16, f32, f64, got unknown");
    a.prob.dtype = -1;
    expect(a, SS_WRONG_TYPE,
           "mask_logits(): prob: expected dtype f16, bf16, f32, f64, got unknown");
    a = good();
    a.logits.dtype = SS_F64;
    expect(a, SS_WRONG_TYPE, "mask_logits(): logits: expected dtype f32, got f64");
    a = good();
    a.prob.device = SS_CUDA;
    a.prob.device_index = 3;
    expect(a, SS_INVALID, "mask_logits(): prob: expected a tensor on cpu, got one on cuda:3");
    ss_exec x = ss_exec_cpu(1);
    x.device = SS_CUDA;
    a = good();
    a.prob.device = a.logits.device = SS_CUDA;
    CHECK(ss_mask_logits(&x, &a) == SS_UNSUPPORTED, "no CUDA backend in this library");
    CHECK_TEXT(x.error, "mask_logits(): not available on cuda");
    CHECK(ss_added_backend(SS_CUDA) == NULL, "none set");
}

/* A backend for a device that this process does not have: three numbers of workspace per call. */
static ss_status device_call(ss_exec *x, const ss_mask_logits_args *a) {
    (void)a;
    ((char *)x->workspace)[x->workspace_bytes - 1] = 1;
    return SS_OK;
}

static int64_t asked = 24;
static int64_t device_workspace(const ss_mask_logits_args *a) {
    (void)a;
    return asked;
}

static void test_backend(void) {
    static ss_backend backend = {.abi = SS_ABI + 1, .device = SS_CUDA, .name = "a", .isa = "b"};
    char text[256];
    CHECK(ss_add_backend(&backend, text, sizeof text) == SS_INVALID, "another ABI");
    CHECK_TEXT(text, "expected a backend of ABI 5, got 6: rebuild it");
    backend.abi = SS_ABI;
    backend.device = 7;
    CHECK(ss_add_backend(&backend, text, sizeof text) == SS_INVALID, "another device");
    CHECK_TEXT(text, "expected a backend for device 1 or 2, got 7");
    CHECK(ss_added_backend(7) == NULL && ss_added_backend(SS_CUDA) == NULL, "nothing was added");
    backend.device = SS_CUDA;
    backend.mask_logits = device_call;
    backend.mask_logits_workspace = device_workspace;
    CHECK(ss_add_backend(&backend, text, sizeof text) == SS_OK, "added");
    CHECK(ss_added_backend(SS_CUDA) == &backend, "and found");
    CHECK(ss_has(&backend, SS_OP_mask_logits) && !ss_has(&backend, SS_OP_edt), "what it has");
    CHECK(!ss_has(&backend, -1) && !ss_has(&backend, SS_OPS), "no such operators");
    ss_mask_logits_args a = good();
    a.prob.device = a.logits.device = SS_CUDA;
    ss_exec x = ss_exec_cpu(1);
    x.device = SS_CUDA;
    int64_t bytes = 0;
    CHECK(ss_workspace(&x, SS_OP_mask_logits, &a, &bytes) == SS_OK && bytes == 24, "its size");
    CHECK(ss_workspace(&x, SS_OPS, &a, &bytes) == SS_INVALID, "no such operator");
    CHECK(ss_mask_logits(&x, &a) == SS_INVALID, "no workspace");
    CHECK_TEXT(x.error, "mask_logits(): workspace: expected 24 bytes, got 0");
    char room[24] = {0};
    x.workspace = room;
    x.workspace_bytes = 23;
    CHECK(ss_mask_logits(&x, &a) == SS_INVALID, "a byte too few");
    x.workspace_bytes = 24;
    CHECK(ss_mask_logits(&x, &a) == SS_OK && room[23] == 1, "enough");
    asked = -1;
    CHECK(ss_mask_logits(&x, &a) == SS_NO_MEMORY, "a size that cannot be counted");
    asked = 24;
    a.prob.ndim = 3;
    CHECK(ss_workspace(&x, SS_OP_mask_logits, &a, &bytes) == SS_INVALID && bytes == 0, "checked");
}

static void test_shape(void) {
    ss_mask_logits_args a = good();
    a.prob.ndim = 3;
    expect(a, SS_INVALID, "mask_logits(): prob: expected a C-contiguous array");
    const int64_t three[] = {4, 4, 4};
    a.prob = ss_tensor_of(volume, SS_F32, 3, three);
    expect(a, SS_INVALID, "mask_logits(): prob: expected shape (4, 4, 4, W), got (4, 4, 4)");
    const int64_t five[] = {1, 2, 4, 4, 4};
    a.prob = ss_tensor_of(volume, SS_F32, 5, five);
    expect(a, SS_INVALID, "mask_logits(): prob: expected shape (1, 2, 4, 4), got (1, 2, 4, 4, 4)");
    a.prob = ss_tensor_of(volume, SS_F32, 0, five);
    expect(a, SS_INVALID, "mask_logits(): prob: expected shape (N, D, H, W), got ()");
    a = good();
    a.prob.ndim = SS_MAX_DIMS + 1;
    expect(a, SS_INVALID, "mask_logits(): prob: expected at most 6 dimensions, got 7");
    a.prob.ndim = INT32_MAX;
    expect(a, SS_INVALID, "mask_logits(): prob: expected at most 6 dimensions, got 2147483647");
    a.prob.ndim = -1;
    expect(a, SS_INVALID, "mask_logits(): prob: expected at most 6 dimensions, got -1");
    a = good();
    a.logits.shape[0] = 1;
    expect(a, SS_INVALID, "mask_logits(): logits: expected shape (2, 2, 2, 2), got (1, 2, 2, 2)");
    a = good();
    a.logits.shape[0] = 0; /* a size of 0 is for outputs that the schema allows to be empty */
    expect(a, SS_INVALID, "mask_logits(): logits: expected shape (2, 2, 2, 2), got (0, 2, 2, 2)");
}

static void test_size(void) {
    ss_mask_logits_args a = good();
    a.prob.shape[1] = 0;
    expect(a, SS_INVALID,
           "mask_logits(): prob: expected at least one element, got shape (2, 0, 4, 4)");
    const int64_t huge[] = {INT64_MAX / 4, 4, 2, 1};
    a.prob = ss_tensor_of(volume, SS_F32, 4, (const int64_t[]){1, 1, 1, 1});
    memcpy(a.prob.shape, huge, sizeof huge);
    expect(a, SS_INVALID, "mask_logits(): prob: the number of elements overflows");
    a.prob.shape[0] = INT64_MAX / 16; /* elements fit, bytes do not */
    expect(a, SS_INVALID, "mask_logits(): prob: the number of elements overflows");
    a.prob.shape[0] = -1;
    expect(a, SS_INVALID, "mask_logits(): prob: the number of elements overflows");
    CHECK(ss_count(&a.prob) == -1, "negative side");
    a.prob.shape[0] = 0;
    a.prob.shape[1] = INT64_MAX;
    CHECK(ss_count(&a.prob) == 0, "0 times anything is 0");
}

static void test_memory(void) {
    ss_mask_logits_args a = good();
    a.prob.data = NULL;
    expect(a, SS_INVALID, "mask_logits(): prob: expected an array, got nothing");
    memset(&a.prob, 0, sizeof a.prob);
    expect(a, SS_INVALID, "mask_logits(): prob: expected an array, got nothing");
    a = good();
    a.logits.data = NULL;
    expect(a, SS_INVALID, "mask_logits(): logits: expected an array, got nothing");
    a = good();
    a.prob.data = (char *)volume + 1;
    expect(a, SS_INVALID, "mask_logits(): prob: expected memory aligned to its element size");
    a = good();
    a.prob.stride[3] = 2;
    expect(a, SS_INVALID, "mask_logits(): prob: expected a C-contiguous array");
    a = good();
    a.prob.stride[0] = -64;
    expect(a, SS_INVALID, "mask_logits(): prob: expected a C-contiguous array");
    a = good();
    a.logits.read_only = 1;
    expect(a, SS_INVALID, "mask_logits(): logits: expected a writable array, got a read-only one");
    a = good();
    a.prob.read_only = 1;
    expect(a, SS_OK, ""); /* inputs may be read-only */
}

static void test_numbers(void) {
    ss_mask_logits_args a = good();
    a.d = 0;
    expect(a, SS_INVALID, "mask_logits(): d: expected an integer of at least 1, got 0");
    a.d = INT64_MIN;
    expect(a, SS_INVALID,
           "mask_logits(): d: expected an integer of at least 1, got -9223372036854775808");
    a.d = INT64_MAX;
    expect(a, SS_INVALID,
           "mask_logits(): d: expected an integer of at least 1, got 9223372036854775808");
}

/* For every operator: seeds until a call works, then break the argument `index` and run again. */
static int working(arguments *a, int32_t op) {
    for (uint64_t seed = 0; seed < 300; ++seed) {
        make_arguments(a, op, seed, 0);
        ss_exec x = ss_exec_cpu(1);
        if (run_arguments(&x, a) == SS_OK) {
            return 1;
        }
        free_arguments(a);
    }
    return 0;
}

static void expect_of(const arguments *a, const ss_arg_spec *spec, const char *rest) {
    ss_exec x = ss_exec_cpu(1);
    char text[256];
    snprintf(text, sizeof text, "%s(): %s: %s", a->spec->name, spec->name, rest);
    CHECK(run_arguments(&x, a) == SS_INVALID, "%s", a->spec->name);
    CHECK_TEXT(x.error, text);
}

static void break_list(const arguments *a, const ss_arg_spec *spec, ss_list *list) {
    ss_list good_list = *list;
    static ss_tensor many[SS_MAX_LIST + 1];
    list->at = many;
    list->n = SS_MAX_LIST + 1;
    expect_of(a, spec, "expected 1 to 128 arrays, got 129");
    if (spec->dtype[0] != '?') {
        list->n = 0;
        expect_of(a, spec, "expected 1 to 128 arrays, got 0");
    }
    *list = good_list;
    if (list->n > 0) {
        ss_tensor first = list->at[0];
        ss_tensor *at = (ss_tensor *)(uintptr_t)list->at;
        at[0].data = NULL;
        char sentence[160];
        snprintf(sentence, sizeof sentence, "%s(): %s[0]: expected an array, got nothing",
                 a->spec->name, spec->name);
        ss_exec x = ss_exec_cpu(1);
        CHECK(run_arguments(&x, a) == SS_INVALID, "%s", a->spec->name);
        CHECK_TEXT(x.error, sentence);
        at[0] = first;
    }
}

static void break_number(const arguments *a, const ss_arg_spec *spec, void *p) {
    char rest[160];
    if (spec->kind == SS_KIND_DBL) {
        const double kept = *(double *)p;
        const double bad[] = {NAN, INFINITY, -INFINITY};
        for (size_t i = 0; i < 3; ++i) {
            *(double *)p = bad[i];
            snprintf(rest, sizeof rest, "expected a number from %g to %g, got %g", spec->lo,
                     spec->hi, bad[i]);
            expect_of(a, spec, rest);
        }
        *(double *)p = kept;
    } else if (spec->kind == SS_KIND_DBLS) {
        ss_doubles *v = p, kept = *v;
        v->n = (int64_t)spec->hi + 1;
        snprintf(rest, sizeof rest, "expected at most %.0f numbers, got %lld", spec->hi,
                 (long long)v->n);
        const double one = 1.0;
        v->at = &one;
        expect_of(a, spec, rest);
        v->n = -1;
        snprintf(rest, sizeof rest, "expected at most %.0f numbers, got -1", spec->hi);
        expect_of(a, spec, rest);
        *v = (ss_doubles){NULL, 1};
        expect_of(a, spec, "expected numbers, got nothing");
        *v = kept;
    } else if (spec->lo > -0x1p53) {
        const int64_t kept = *(int64_t *)p;
        *(int64_t *)p = (int64_t)spec->lo - 1;
        if (spec->hi >= 0x1p53) {
            snprintf(rest, sizeof rest, "expected an integer of at least %.0f, got %.0f", spec->lo,
                     spec->lo - 1);
        } else {
            snprintf(rest, sizeof rest, "expected an integer from %.0f to %.0f, got %.0f", spec->lo,
                     spec->hi, spec->lo - 1);
        }
        expect_of(a, spec, rest);
        *(int64_t *)p = kept;
    }
}

static void test_every_operator(void) {
    for (int32_t op = 0; op < SS_OPS; ++op) {
        arguments a;
        if (!working(&a, op)) {
            CHECK(0, "%s: no arguments were accepted", ss_op_specs()[op].name);
            continue;
        }
        for (int32_t i = 0; i < a.spec->n_args; ++i) {
            const ss_arg_spec *spec = &a.spec->args[i];
            void *p = slot_of(&a, i);
            if (spec->kind == SS_KIND_LIST) {
                break_list(&a, spec, p);
            } else if (is_number(spec)) {
                break_number(&a, spec, p);
            } else if (spec->kind == SS_KIND_IN) {
                ss_tensor *t = p, kept = *t;
                t->data = NULL;
                expect_of(&a, spec, "expected an array, got nothing");
                *t = kept;
                t->ndim = 7;
                expect_of(&a, spec, "expected at most 6 dimensions, got 7");
                *t = kept;
            }
        }
        free_arguments(&a);
    }
}

/* The schema itself: names once, spelled as an identifier; expressions that mean something. */
static void test_schema_is_sound(void) {
    for (int32_t op = 0; op < SS_OPS; ++op) {
        const ss_op_spec *spec = &ss_op_specs()[op];
        CHECK(spec->n_args <= MOST_ARGS && spec->size <= 4096, "%s is too large", spec->name);
        CHECK(strlen(spec->doc) > 10, "%s: says nothing about itself", spec->name);
        for (int32_t i = 0; i < spec->n_args; ++i) {
            const ss_arg_spec *arg = &spec->args[i];
            for (int32_t k = 0; k < i; ++k) {
                CHECK(strcmp(arg->name, spec->args[k].name) != 0, "%s: %s twice", spec->name,
                      arg->name);
            }
            CHECK(!is_number(arg) || arg->lo <= arg->hi, "%s: %s: no value allowed", spec->name,
                  arg->name);
            CHECK(is_number(arg) || (arg->dtype[0] && arg->shape[0]), "%s: %s", spec->name,
                  arg->name);
        }
    }
    CHECK(ss_dtype_size(SS_F64) == 8 && ss_dtype_size(-1) == 0 && ss_dtype_size(99) == 0, "sizes");
    CHECK_TEXT(ss_dtype_name(SS_BF16), "bf16");
    CHECK_TEXT(ss_dtype_name(SS_DTYPES), "unknown");
    CHECK(strlen(ss_version()) > 0, "version");
}

int main(void) {
    for (size_t i = 0; i < sizeof volume / sizeof volume[0]; ++i) {
        volume[i] = 0.25f;
    }
    test_dtype_and_device();
    test_backend();
    test_shape();
    test_size();
    test_memory();
    test_numbers();
    test_every_operator();
    test_schema_is_sound();
    return done();
}
