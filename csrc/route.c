// route.c: which experts a token goes to and with what weight.
//
//   score            scores = ...          ids = the K largest ...      u = ...
//   softmax_topk     softmax(logits)       scores + select_bias         scores[ids]
//   topk_softmax     softmax(logits)       logits                       softmax(logits[ids])
//   sigmoid          sigmoid(logits)       scores + select_bias         scores[ids]
//   weights = scale * u / |u|_p
//
// Forced ids take the place of the K largest, and all else follows: the ids that the router would have chosen give the
// bits that it would have given. -1 is absent: u is 0, in the softmax and the norm too, and nothing comes back from it.
// logits_TE, scores_TE: row-major, one row per token, E <= MOE_MAX_EXPERTS (a row lives on the stack).
// A logit of -inf masks its expert: it has score 0 and is never chosen, whatever its bias, as long as K others remain.
// Fewer than K unmasked logits in a row, NaN or +inf is MOE_BAD_VALUE; with `balanced`, so is any masked logit. A masked
// expert that is forced has u = 0.
// A row whose K kept scores are all zero keeps zero weights instead of 0/0.
// The softmax runs in real; what follows it (choice, norm, gradient) in double, rounded once.
// Rows are independent, so results do not know the number of threads.
#include "real.h"
#include <math.h>
#include <stdatomic.h>
#include <string.h>

// Element `index` of storage x.
static inline const void *at(int dtype, const void *x, int64_t index) {
    return (const char *)x + index * moe_size(dtype);
}
static inline void *out_at(int dtype, void *x, int64_t index) { return (char *)x + index * moe_size(dtype); }

// row[i] = x[i] as double, and back.
static void load_row(int dtype, int64_t n, const void *x, double *row) {
    real_row real;
    moe_k->load(dtype, n, x, &real);
    for (int64_t i = 0; i < n; i++) row[i] = real_get(dtype, &real, i);
}
static void store_row(int dtype, int64_t n, const double *row, void *x) {
    real_row real;
    for (int64_t i = 0; i < n; i++) real_set(dtype, &real, i, row[i]);
    moe_k->store(dtype, n, &real, x);
}

typedef struct {
    const moe_router_args *a;
    const void    *logits_TE;
    const float   *select_bias_E;
    const int32_t *forced_TK;
    void          *weights_TK, *scores_TE;
    int32_t       *ids_TK;
    atomic_int     bad_value, bad_index;
} router_job;

static int check_router(const moe_router_args *a) {
    int status = check_rows(a->dtype, a->T, a->E);
    if (status) return status;
    if (a->K < 1 || a->K > a->E) return MOE_BAD_SHAPE;
    bool known = a->score == MOE_SOFTMAX_TOPK || a->score == MOE_TOPK_SOFTMAX || a->score == MOE_SIGMOID;
    return known && a->norm_p >= 0 && isfinite(a->scale) ? MOE_OK : MOE_BAD_VALUE;
}

// How many of a row are finite, and how many -inf.
#define COUNT(NAME, REAL)                                                                                             \
    static void NAME(int64_t n, const REAL *x, int64_t *finite, int64_t *masked) {                                    \
        int32_t is_finite = 0, is_masked = 0;                                                                         \
        for (int64_t i = 0; i < n; i++) is_finite += x[i] - x[i] == 0, is_masked += x[i] == -(REAL)INFINITY;          \
        *finite = is_finite, *masked = is_masked;                                                                     \
    }
COUNT(count_f32, float)
COUNT(count_f64, double)

// Whether ids_K are -1 or below E, and those that are present distinct.
static bool good_choice(const int32_t *ids_K, int64_t K, int64_t E) {
    bool taken_E[MOE_MAX_EXPERTS];
    memset(taken_E, 0, (size_t)E);
    for (int64_t k = 0; k < K; k++) {
        if (ids_K[k] == -1) continue;
        if (ids_K[k] < 0 || ids_K[k] >= E || taken_E[ids_K[k]]) return false;
        taken_E[ids_K[k]] = true;
    }
    return true;
}

static void check_router_rows(int64_t begin, int64_t end, void *arg) {
    router_job *job = arg;
    const int dtype = job->a->dtype;
    const int64_t E = job->a->E, least = job->a->balanced ? E : job->a->K;
    for (int64_t t = begin; t < end; t++) {
        real_row logit;
        int64_t finite, masked;
        moe_k->load(dtype, E, at(dtype, job->logits_TE, t * E), &logit);
        if (dtype == MOE_F64) count_f64(E, logit.f64, &finite, &masked);
        else                  count_f32(E, logit.f32, &finite, &masked);
        if (finite < least || finite + masked < E) atomic_store_explicit(&job->bad_value, 1, memory_order_relaxed);
        if (job->forced_TK && !good_choice(job->forced_TK + t * job->a->K, job->a->K, E))
            atomic_store_explicit(&job->bad_index, 1, memory_order_relaxed);
    }
}

// |u|_p of u >= 0, scaled by the largest entry so that no power underflows. p = INFINITY is the maximum.
static double p_norm(double p, int64_t K, const double *u_K) {
    double top = 0, sum = 0;
    for (int64_t k = 0; k < K; k++) top = fmax(top, u_K[k]);
    if (top == 0 || isinf(p)) return top;
    for (int64_t k = 0; k < K; k++) sum += p == 1 ? u_K[k] / top : pow(u_K[k] / top, p);
    return top * (p == 1 ? sum : pow(sum, 1 / p));
}

// d|u|_p / du_k = (u_k / |u|_p)^(p-1); 0 at u_k = 0, and shared by all maxima if p = INFINITY (both as in torch).
static void p_norm_backward(double p, int64_t K, const double *u_K, double norm, double dnorm, double *du_K) {
    int64_t maxima = 0;
    for (int64_t k = 0; k < K; k++) maxima += u_K[k] == norm;
    for (int64_t k = 0; k < K; k++) {
        if (u_K[k] == 0) continue;
        if (isinf(p)) du_K[k] += u_K[k] == norm ? dnorm / (double)maxima : 0;
        else du_K[k] += p == 1 ? dnorm : dnorm * pow(u_K[k] / norm, p - 1);
    }
}

// u_K: the kept weights before norm and scale. The rows are of real, whatever their dtypes.
static void kept_weights(const moe_router_args *a, int logit_type, const void *logit_E, int score_type,
                         const void *score_E, const int32_t *ids_K, double *u_K) {
    if (a->score != MOE_TOPK_SOFTMAX) {
        for (int64_t k = 0; k < a->K; k++) u_K[k] = ids_K[k] < 0 ? 0 : real_get(score_type, score_E, ids_K[k]);
        return;
    }
    double top = -INFINITY, sum = 0;
    for (int64_t k = 0; k < a->K; k++)
        top = fmax(top, u_K[k] = ids_K[k] < 0 ? -INFINITY : real_get(logit_type, logit_E, ids_K[k]));
    for (int64_t k = 0; k < a->K; k++) sum += u_K[k] = u_K[k] == -INFINITY ? 0 : exp(u_K[k] - top);
    for (int64_t k = 0; k < a->K && sum > 0; k++) u_K[k] /= sum;
}

// What the K largest are chosen by: real if that is exact, else double. -> whether it is double
static bool choice_keys(const router_job *job, const real_row *logit, int score_type, const real_row *score,
                        real_row *key) {
    const moe_router_args *a = job->a;
    if (a->score == MOE_TOPK_SOFTMAX) {
        memcpy(key, logit, (size_t)(a->E * moe_real_size(a->dtype)));
        return a->dtype == MOE_F64;
    }
    if (score_type != MOE_F64 && !job->select_bias_E) {
        for (int64_t e = 0; e < a->E; e++) key->f32[e] = logit->f32[e] == -INFINITY ? -INFINITY : score->f32[e];
        return false;
    }
    for (int64_t e = 0; e < a->E; e++) {
        const double bias = job->select_bias_E ? job->select_bias_E[e] : 0;
        const bool masked = real_get(a->dtype, logit, e) == -INFINITY;
        key->f64[e] = masked ? -INFINITY : real_get(score_type, score, e) + bias;
    }
    return true;
}

static void router_rows(int64_t begin, int64_t end, void *arg) {
    const router_job *job = arg;
    const moe_router_args *a = job->a;
    const int dtype = a->dtype, score_type = a->score == MOE_SIGMOID ? MOE_F64 : dtype;
    const int64_t E = a->E, K = a->K;
    real_row logit, score, key;
    double u[MOE_MAX_EXPERTS];
    for (int64_t t = begin; t < end; t++) {
        moe_k->load(dtype, E, at(dtype, job->logits_TE, t * E), &logit);
        void *scores = out_at(dtype, job->scores_TE, t * E);
        if (a->score == MOE_SIGMOID) {
            for (int64_t e = 0; e < E; e++) score.f64[e] = 1 / (1 + exp(-real_get(dtype, &logit, e)));
            store_row(dtype, E, score.f64, scores);
        } else {
            moe_k->softmax(dtype == MOE_F64, E, &logit, &score);
            moe_k->store(dtype, E, &score, scores);
        }

        int32_t *ids = job->ids_TK + t * K;
        if (job->forced_TK) memcpy(ids, job->forced_TK + t * K, (size_t)K * sizeof *ids);
        else if (a->balanced) for (int64_t k = 0; k < K; k++) ids[k] = (int32_t)((t * K + k) % E);
        else moe_k->top_k(choice_keys(job, &logit, score_type, &score, &key), E, K, &key, ids);

        kept_weights(a, dtype, &logit, score_type, &score, ids, u);
        const double norm = a->norm_p > 0 ? p_norm(a->norm_p, K, u) : 1;
        for (int64_t k = 0; k < K; k++) u[k] = norm > 0 ? a->scale * u[k] / norm : 0;
        store_row(dtype, K, u, out_at(dtype, job->weights_TK, t * K));
    }
}

int moe_router(const moe_router_args *a, const void *logits_TE, const float *select_bias_E, const int32_t *forced_TK,
               void *weights_TK, int32_t *ids_TK, void *scores_TE) {
    int status = check_router(a);
    if (status) return status;
    for (int64_t e = 0; select_bias_E && e < a->E; e++)
        if (!isfinite(select_bias_E[e])) return MOE_BAD_VALUE;
    router_job job = {.a = a, .logits_TE = logits_TE, .select_bias_E = select_bias_E, .forced_TK = forced_TK,
                      .ids_TK = ids_TK, .weights_TK = weights_TK, .scores_TE = scores_TE};
    moe_parallel(a->T, moe_row_grain(a->E), check_router_rows, &job);
    if (job.bad_value) return MOE_BAD_VALUE;
    if (job.bad_index) return MOE_BAD_INDEX;
    moe_parallel(a->T, moe_row_grain(a->E), router_rows, &job);
    return MOE_OK;
}

typedef struct {
    const moe_router_args *a;
    const void    *logits_TE, *scores_TE, *dweights_TK, *dscores_TE;
    const int32_t *ids_TK;
    void          *dlogits_TE;
} router_backward_job;

// Forward was: w = scale * u / n, n = |u|_p; u = score[ids] or softmax(logit[ids]); score = softmax or sigmoid(logit).
static void router_rows_backward(int64_t begin, int64_t end, void *arg) {
    const router_backward_job *job = arg;
    const moe_router_args *a = job->a;
    const int dtype = a->dtype;
    const int64_t E = a->E, K = a->K;
    double logit[MOE_MAX_EXPERTS], score[MOE_MAX_EXPERTS], dscore[MOE_MAX_EXPERTS], dlogit[MOE_MAX_EXPERTS];
    double u[MOE_MAX_EXPERTS], du[MOE_MAX_EXPERTS];
    for (int64_t t = begin; t < end; t++) {
        const int32_t *ids = job->ids_TK + t * K;
        if (a->score != MOE_SOFTMAX_TOPK) load_row(dtype, E, at(dtype, job->logits_TE, t * E), logit);
        load_row(dtype, E, at(dtype, job->scores_TE, t * E), score);
        if (job->dscores_TE) load_row(dtype, E, at(dtype, job->dscores_TE, t * E), dscore);
        else memset(dscore, 0, (size_t)E * sizeof *dscore);
        memset(dlogit, 0, (size_t)E * sizeof *dlogit);

        if (job->dweights_TK) {
            load_row(dtype, K, at(dtype, job->dweights_TK, t * K), du);
            for (int64_t k = 0; k < K; k++) du[k] = ids[k] < 0 ? 0 : du[k];
            kept_weights(a, MOE_F64, logit, MOE_F64, score, ids, u);
            const double norm = a->norm_p > 0 ? p_norm(a->norm_p, K, u) : 1;
            double sum = 0;                                             // sum_k dw_k u_k
            for (int64_t k = 0; k < K; k++) sum += du[k] * u[k];
            for (int64_t k = 0; k < K; k++) du[k] = norm > 0 ? a->scale * du[k] / norm : 0;
            if (a->norm_p > 0 && norm > 0) p_norm_backward(a->norm_p, K, u, norm, -a->scale * sum / norm / norm, du);
            if (a->score == MOE_TOPK_SOFTMAX) {
                double mean = 0;
                for (int64_t k = 0; k < K; k++) mean += u[k] * du[k];
                for (int64_t k = 0; k < K; k++)
                    if (ids[k] >= 0) dlogit[ids[k]] = u[k] * (du[k] - mean);
            } else {
                for (int64_t k = 0; k < K; k++)
                    if (ids[k] >= 0) dscore[ids[k]] += du[k];
            }
        }
        if (a->score == MOE_SIGMOID) {
            for (int64_t e = 0; e < E; e++) {                           // s (1-s) without the cancellation in 1-s
                const double s = 1 / (1 + exp(fabs(logit[e])));
                dlogit[e] += dscore[e] * s * (1 - s);
            }
        } else {
            double mean = 0;
            for (int64_t e = 0; e < E; e++) mean += score[e] * dscore[e];
            for (int64_t e = 0; e < E; e++) dlogit[e] += score[e] * (dscore[e] - mean);
        }
        store_row(dtype, E, dlogit, out_at(dtype, job->dlogits_TE, t * E));
    }
}

int moe_router_backward(const moe_router_args *a, const void *logits_TE, const void *scores_TE, const int32_t *ids_TK,
                        const void *dweights_TK, const void *dscores_TE, void *dlogits_TE) {
    int status = check_router(a);
    if (status) return status;
    for (int64_t n = 0; n < a->T * a->K; n++)
        if (ids_TK[n] < -1 || ids_TK[n] >= a->E) return MOE_BAD_INDEX;
    router_backward_job job = {a, logits_TE, scores_TE, dweights_TK, dscores_TE, ids_TK, dlogits_TE};
    moe_parallel(a->T, moe_row_grain(a->E), router_rows_backward, &job);
    return MOE_OK;
}
