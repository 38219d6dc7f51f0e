// act.c: a_NF = act(h_NU) and its gradient, row by row. The formulas are in act.inc.
// Rows of 16-bit storage are widened a tile at a time, computed in float and rounded once.
#include "kernels.h"

enum { TILE = 512 };            // elements of a row that are worked on at once; everything stays in L1
typedef union { float f32[TILE]; double f64[TILE]; } tile;

typedef struct {
    int         dtype, act;
    int64_t     F;
    const char *h, *da;
    char       *out;            // a or dh
} act_job;

static int check(int dtype, int act, int64_t N, int64_t F) {
    if (!moe_is_float(dtype)) return MOE_BAD_DTYPE;
    if (act < MOE_SWIGLU || act > MOE_RELU) return MOE_BAD_VALUE;
    return N < 0 || F < 0 || (F > 0 && N > INT64_MAX / 16 / F) ? MOE_BAD_SHAPE : MOE_OK;
}

int moe_act_gated(int act) { return act >= MOE_SWIGLU && act <= MOE_SWIGLU_OAI; }

static void forward(int64_t begin, int64_t end, void *arg) {
    const act_job *j = arg;
    const int64_t size = moe_size(j->dtype), U = moe_act_gated(j->act) ? 2 * j->F : j->F;
    tile gate, up, a;
    for (int64_t n = begin; n < end; n++)
        for (int64_t f = 0; f < j->F; f += TILE) {
            const int64_t m = j->F - f < TILE ? j->F - f : TILE;
            const char *h = j->h + (n * U + f) * size;
            moe_k->load(j->dtype, m, h, &gate);
            if (U > j->F) moe_k->load(j->dtype, m, h + j->F * size, &up);
            moe_k->act(j->dtype == MOE_F64, j->act, m, &gate, U > j->F ? &up : NULL, &a);
            moe_k->store(j->dtype, m, &a, j->out + (n * j->F + f) * size);
        }
}

int moe_activation(int dtype, int act, int64_t N, int64_t F, const void *h_NU, void *a_NF) {
    const int status = check(dtype, act, N, F);
    if (status != MOE_OK) return status;
    act_job j = {dtype, act, F, h_NU, NULL, a_NF};
    moe_parallel(N, moe_row_grain(F), forward, &j);
    return MOE_OK;
}

static void backward(int64_t begin, int64_t end, void *arg) {
    const act_job *j = arg;
    const int64_t size = moe_size(j->dtype), U = moe_act_gated(j->act) ? 2 * j->F : j->F;
    const bool gated = U > j->F;
    tile gate, up, da, dgate, dup;
    for (int64_t n = begin; n < end; n++)
        for (int64_t f = 0; f < j->F; f += TILE) {
            const int64_t m = j->F - f < TILE ? j->F - f : TILE;
            const char *h = j->h + (n * U + f) * size;
            char *dh = j->out + (n * U + f) * size;
            moe_k->load(j->dtype, m, h, &gate);
            if (gated) moe_k->load(j->dtype, m, h + j->F * size, &up);
            moe_k->load(j->dtype, m, j->da + (n * j->F + f) * size, &da);
            moe_k->dact(j->dtype == MOE_F64, j->act, m, &gate, gated ? &up : NULL, &da, &dgate, gated ? &dup : NULL);
            moe_k->store(j->dtype, m, &dgate, dh);
            if (gated) moe_k->store(j->dtype, m, &dup, dh + j->F * size);
        }
}

int moe_activation_backward(int dtype, int act, int64_t N, int64_t F, const void *h_NU, const void *da_NF,
                            void *dh_NU) {
    const int status = check(dtype, act, N, F);
    if (status != MOE_OK) return status;
    act_job j = {dtype, act, F, h_NU, da_NF, dh_NU};
    moe_parallel(N, moe_row_grain(F), backward, &j);
    return MOE_OK;
}
