// expert_sums.cuh: what the fused expert MLP (expert.cu) adds up outside its products, and the memory between steps.
//
//   sum_slots      y_RD[r] = sum over slots in order of s y_ND[p]          forward 3; backward 4 with ones for s
//   sum_biases     db = sum of dh[p], dbd = sum of s dy[r]                 over the copies of an expert: backward 3
//   sum_dweights   dweights_RK[f] = sum of ds (+ <dy[r], bd_e>)            backward 4
//
// Names are those of expert.cu. Each sum has one order, which sizes alone decide.
#ifndef MOE_EXPERT_SUMS_CUH
#define MOE_EXPERT_SUMS_CUH
#include "act.cuh"
#include "gemm.cuh"

enum { THREADS = 256, IN_FLIGHT = 4, SUM_COLUMNS = 64, SUM_ROWS = THREADS * 8 / SUM_COLUMNS };

// ---- the workspace: one list of pieces gives both their places and the size of all ----------------------------------
// Its rows begin at multiples of 16 bytes whatever D and F are. g: of a backward, else NULL. What no wanted gradient
// needs is NULL. workspace = NULL: only the size, which depends on the device: passes (expert.cu) need more.
template <class T>
struct lent {
    bool    passes;                             // on Hopper, where every row is whole pieces of 16 bytes
    int64_t row_F, row_D, row_U, pieces;        // elements of a row; parts of one ds
    T      *a_NF, *y_ND, *dh_NU;                // backward: dA' then sA, sorted copies then dx per copy, dh
    float  *ds_NP;
    size_t  bytes = 0;

    lent(const moe_expert_args &a, const moe_expert_grads *g, void *workspace)
        : passes(sizeof(T) == 2 && a.D % 8 == 0 && a.F % 8 == 0 && (!g || aligned16(g->dy_RD)) && sm90_here()),
          row_F(round_up(a.F, 8)), row_D(round_up(a.D, 8)), row_U(gated_act(a.act) ? 2 * row_F : row_F),
          pieces(passes ? 1 : ceil_div(a.F, GEMM_PIECE)) {
        const bool weights = g && (g->ddown_EDF.p || g->dgate_EFD.p || g->dup_EFD.p);
        const bool dh = g && (g->dx_RD || g->dgate_EFD.p || g->dup_EFD.p || g->dgate_bias_EF || g->dup_bias_EF);
        a_NF = take<T>(workspace, !g || g->ddown_EDF.p || (passes && (dh || g->dweights_RK)), a.N * row_F);
        y_ND = take<T>(workspace, !g || g->dx_RD || (passes && weights), a.N * row_D);
        dh_NU = take<T>(workspace, dh, a.N * row_U);
        ds_NP = take<float>(workspace, g && g->dweights_RK, a.N * pieces);
    }

   private:
    template <class Element>
    Element *take(void *workspace, bool wanted, int64_t n) {
        void *piece = workspace && wanted ? static_cast<char *>(workspace) + bytes : nullptr;
        if (wanted) bytes += static_cast<size_t>(round_up(n * static_cast<int64_t>(sizeof(Element)), 256));
        return static_cast<Element *>(piece);
    }
};

// ---- what epilogues read --------------------------------------------------------------------------------------------
template <class T>
struct bias {
    const T *p;                                 // may be NULL
    int64_t  se;
    // x = c + p[e, j .. j+n)
    __device__ void add(int64_t e, int64_t j, int n, const float (&c)[8], float (&x)[8]) const {
        if (p) load8(p + e * se + j, n, x);
        for (int v = 0; v < 8; v++) x[v] = p ? c[v] + x[v] : c[v];
    }
};
template <class T>
struct routing_weights {
    const void *p;                              // NULL: ones
    bool        wide;                           // float, else T
    __device__ float operator[](int64_t f) const {
        return !p ? 1 : wide ? static_cast<const float *>(p)[f] : to_float(static_cast<const T *>(p)[f]);
    }
};

// ---- forward 3: y[r] = sum over slots of s y[p], and backward 4 with ones for s -------------------------------------
struct slots {
    int64_t        R, K, E, D, N, row_D;
    const int32_t *inverse_RK, *bins_E;
    verdict        bad;
};
// A thread owns eight columns of a row, and has IN_FLIGHT slots under way.
template <class T>
__global__ void __launch_bounds__(THREADS)
sum_slots_kernel(slots g, routing_weights<T> s, const T *__restrict__ y_ND, T *__restrict__ y_RD) {
    constexpr int width = vec16<T>::n, vectors = 8 / width;
    const int64_t pieces = ceil_div(g.D, 8), stride = static_cast<int64_t>(gridDim.x) * THREADS;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (first == 0 && g.bins_E[g.E - 1] != g.N) g.bad(MOE_BAD_BINS, g.E - 1);
    for (int64_t i = first; i < g.R * pieces; i += stride) {
        const int64_t r = i / pieces, j = (i - r * pieces) * 8;
        float sum[8] = {};
        for (int64_t k = 0; k < g.K; k += IN_FLIGHT) {
            int      p[IN_FLIGHT];
            float    weight[IN_FLIGHT];
            vec16<T> y[IN_FLIGHT][vectors];
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++) {
                const int64_t f = r * g.K + k + u;
                p[u] = k + u < g.K ? g.inverse_RK[f] : -1;
                if (p[u] < -1 || p[u] >= g.N) {
                    g.bad(MOE_BAD_INDEX, f);
                    p[u] = -1;
                }
            }
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++)
                if (p[u] >= 0) {
                    weight[u] = s[r * g.K + k + u];
                    const auto *from = reinterpret_cast<const vec16<T> *>(y_ND + p[u] * g.row_D + j);
                    for (int v = 0; v < vectors; v++) y[u][v] = from[v];
                }
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++)
                if (p[u] >= 0)
                    for (int v = 0; v < 8; v++)
                        sum[v] = fmaf(weight[u], to_float(y[u][v / width].v[v % width]), sum[v]);
        }
        store8(y_RD + r * g.D + j, static_cast<int>(min64(8, g.D - j)), sum);
    }
}
// Without a row there is still the first thread's look at the bins.
template <class T>
static int sum_slots(const moe_expert_args &a, routing_weights<T> s, const lent<T> &w, void *y_RD, verdict bad,
                     cudaStream_t stream) {
    const slots g = {a.R, a.K, a.E, a.D, a.N, w.row_D, a.inverse_RK, a.bins_E, bad};
    const int64_t grid = max64(1, strided_grid(a.R * ceil_div(a.D, 8), THREADS));
    return launch(sum_slots_kernel<T>, grid, THREADS, 0, stream, g, s, w.y_ND, static_cast<T *>(y_RD));
}

// ---- backward 3: bias gradients -------------------------------------------------------------------------------------
// out[e, j] = sum over the copies of e of rows[p, j], or of s rows[r, j]. A block adds SUM_COLUMNS columns of an
// expert: a thread eight of them in every SUM_ROWS-th copy, then the threads of a column in order.
template <class T>
struct column_sum {
    const T *rows;
    int64_t  stride;
    int      columns;                           // 0 where there is no bias
    bool     of_dy, whole;                      // whole: eight columns can always be loaded at once
    T       *out;
    int64_t  se;
    __host__ __device__ int tiles() const { return (columns + SUM_COLUMNS - 1) / SUM_COLUMNS; }
};
template <class T>
struct bias_sums {
    int64_t            E, N, flat_ids;
    int                K;
    const int32_t     *order_N, *bins_E;
    routing_weights<T> s;
    column_sum<T>      of[3];                   // gate, up, down
};
template <bool whole, class T>
static __device__ inline void add_rows(const bias_sums<T> &g, const column_sum<T> &c, int e, int64_t j,
                                       float (&sum)[8]) {
    const int64_t end = min64(g.N, g.bins_E[e]);
    const int     n = whole ? 8 : static_cast<int>(max64(0, min64(8, c.columns - j)));
#pragma unroll 4
    for (int64_t p = (e ? max64(0, g.bins_E[e - 1]) : 0) + threadIdx.x / 8; p < end; p += SUM_ROWS) {
        const int  f = c.of_dy ? g.order_N[p] : 0;
        const bool known = f >= 0 && f < g.flat_ids;
        const T   *row = c.rows + (!c.of_dy ? p : known ? f / g.K : 0) * c.stride + j;
        const float s = !c.of_dy ? 1 : known ? g.s[f] : 0;
        float x[8];
        load8(piece_at<whole>(row), n, x);
        for (int v = 0; v < 8; v++) sum[v] = fmaf(s, x[v], sum[v]);
    }
}
template <class T>
__global__ void __launch_bounds__(THREADS) bias_kernel(bias_sums<T> g) {
    const int     e = static_cast<int>(blockIdx.x % g.E);
    int           tile = static_cast<int>(blockIdx.x / g.E), which = 0;
    while (tile >= g.of[which].tiles()) tile -= g.of[which++].tiles();
    const column_sum<T> &c = g.of[which];
    const int64_t j = static_cast<int64_t>(tile) * SUM_COLUMNS, mine = j + threadIdx.x % 8 * 8;
    float         sum[8] = {};
    if (c.whole && mine < c.columns) add_rows<true>(g, c, e, mine, sum);
    else                             add_rows<false>(g, c, e, mine, sum);
    auto *const parts = reinterpret_cast<float *>(shared_memory());     // [SUM_ROWS, SUM_COLUMNS]
    for (int v = 0; v < 8; v++) parts[threadIdx.x * 8 + v] = sum[v];
    __syncthreads();
    if (threadIdx.x >= SUM_COLUMNS || j + threadIdx.x >= c.columns) return;
    float total = 0;
    for (int row = 0; row < SUM_ROWS; row++) total += parts[row * SUM_COLUMNS + threadIdx.x];
    c.out[e * c.se + j + threadIdx.x] = from_float<T>(total);
}
template <class T>
static int sum_biases(const moe_expert_args &a, const moe_expert_grads &g, const lent<T> &w, cudaStream_t stream) {
    const auto of_dh = [&](const T *dh, void *out, int64_t se) {
        return column_sum<T>{dh, w.row_U, out ? static_cast<int>(a.F) : 0, false, true, static_cast<T *>(out), se};
    };
    const column_sum<T> of_dy = {
        static_cast<const T *>(g.dy_RD), a.D, g.ddown_bias_ED ? static_cast<int>(a.D) : 0, true,
        a.D % 8 == 0 && aligned16(g.dy_RD), static_cast<T *>(g.ddown_bias_ED), g.ddown_bias_se,
    };
    const bias_sums<T> sums = {
        a.E, a.N, a.R * a.K, static_cast<int>(a.K), a.order_RK, a.bins_E, {a.weights_RK, a.wdtype == MOE_F32},
        {of_dh(w.dh_NU, g.dgate_bias_EF, g.dgate_bias_se),
         of_dh(w.dh_NU + w.row_F, g.dup_bias_EF, g.dup_bias_se), of_dy},
    };
    const int64_t tiles = static_cast<int64_t>(sums.of[0].tiles()) + sums.of[1].tiles() + sums.of[2].tiles();
    return launch(bias_kernel<T>, a.E * tiles, THREADS, SUM_ROWS * SUM_COLUMNS * sizeof(float), stream, sums);
}

// ---- backward 4: dweights[f] = sum of ds[p] (+ <dy[r], bd_e>) -------------------------------------------------------
// A warp per flat id.
template <class T>
struct dweights_job {
    int64_t        flat_ids, K, E, D, N, pieces;
    const int32_t *inverse_RK, *bins_E;
    const float   *ds_NP;
    const T       *dy_RD;
    bias<T>        down_bias;
    void          *dweights_RK;
    bool           wide;
};
template <class T>
__global__ void __launch_bounds__(THREADS) dweights_kernel(dweights_job<T> g) {
    const int64_t f = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + warp_id();
    if (f >= g.flat_ids) return;
    const int64_t p = g.inverse_RK[f];
    const bool    here = p >= 0 && p < g.N;
    float         ds = 0;
    for (int64_t piece = lane_id(); here && piece < g.pieces; piece += 32) ds += g.ds_NP[p * g.pieces + piece];
    if (here && g.down_bias.p) {
        const int64_t e = expert_at(g.E - 1, p, [&](int64_t e) { return g.bins_E[e]; });
        const T      *bd = g.down_bias.p + e * g.down_bias.se, *dy = g.dy_RD + f / g.K * g.D;
        for (int64_t j = lane_id() * 8; j < g.D; j += 32 * 8) {
            const int n = static_cast<int>(min64(8, g.D - j));
            float     x[8], y[8];
            load8(dy + j, n, x);
            load8(bd + j, n, y);
            for (int v = 0; v < 8; v++) ds = fmaf(x[v], y[v], ds);
        }
    }
    ds = warp_sum(ds);
    if (lane_id() != 0) return;
    if (g.wide) static_cast<float *>(g.dweights_RK)[f] = ds;
    else static_cast<T *>(g.dweights_RK)[f] = from_float<T>(ds);
}
template <class T>
static int sum_dweights(const moe_expert_args &a, const moe_expert_grads &g, const lent<T> &w, cudaStream_t stream) {
    const dweights_job<T> job = {
        a.R * a.K, a.K, a.E, a.D, a.N, w.pieces, a.inverse_RK, a.bins_E, w.ds_NP, static_cast<const T *>(g.dy_RD),
        {static_cast<const T *>(a.down_bias_ED), a.down_bias_se}, g.dweights_RK, a.wdtype == MOE_F32,
    };
    return launch(dweights_kernel<T>, ceil_div(a.R * a.K, THREADS / 32), THREADS, 0, stream, job);
}
#endif
