// expert_sums.cuh: what the fused expert MLP (expert.cu) adds up outside its products, and the memory between steps.
//
//   sum_slots      y_RD[r] = sum over slots in order of s y_ND[p]          forward 3; backward 4 with ones for s
//   sum_biases     db = sum of dh[p], dbd = sum of s dy[r]                 over an expert's slabs: backward 3
//   sum_dweights   dweights_RK[f] = sum of ds (+ <dy[r], bd_e>)            backward 4
//
// Names are those of expert.cu. Each sum has one order, which sizes alone decide.
#ifndef MOE_EXPERT_SUMS_CUH
#define MOE_EXPERT_SUMS_CUH
#include "act.cuh"
#include "gemm.cuh"

enum { THREADS = 256, WARPS = THREADS / 32, IN_FLIGHT = 4, SUM_COLUMNS = 32 * 8, SLAB = 128 };

// ---- slabs: what sums over an expert's copies are made of ------------------------------------------------------------
// A slab is SLAB positions of one expert, counted from its first one: a slab's sum knows of no other expert. Those of
// expert e are numbered from bins[e-1] / SLAB + e on: in order, with gaps, below N / SLAB + E, and nobody has to count
// the slabs before his. Wrong bins lead to nothing outside.
struct stretch {
    int64_t begin, end;
};
struct slabs {
    int64_t        E, N;
    const int32_t *bins_E;
    __host__ __device__ int64_t most() const { return N / SLAB + E; }
    __device__ int64_t end(int64_t e) const { return e < 0 ? 0 : max64(0, min64(N, bins_E[e])); }
    __device__ int64_t first(int64_t e) const { return end(e - 1) / SLAB + e; }
    __device__ stretch of(int64_t e) const {            // slabs of an expert
        return {first(e), first(e) + ceil_div(end(e) - end(e - 1), SLAB)};
    }
    __device__ stretch positions(int64_t slab) const {  // none: a gap
        const int64_t e = expert_at(E - 1, slab, [&](int64_t e) { return first(e + 1); });
        const int64_t begin = end(e - 1) + max64(0, slab - first(e)) * SLAB;
        return {begin, min64(end(e), begin + SLAB)};
    }
};
// Rows of a stretch are taken by the warps of a block in turn, from warp_id() on: so many are this warp's.
static __device__ inline int rows_of_warp(stretch rows) {
    return static_cast<int>(max64(0, rows.end - rows.begin - warp_id() + WARPS - 1)) / WARPS;
}
// Of SUM_COLUMNS columns, lane l of every warp has added up some rows of those from 8 l on: the sum over warps, in
// order, of column threadIdx.x. shared: THREADS * 8 floats.
static __device__ inline float sum_of_warps(const float (&sum)[8], float *shared) {
    store8(piece_at<true>(shared + threadIdx.x * 8), 8, sum);
    __syncthreads();
    float total = 0;
    for (int warp = 0; warp < WARPS; warp++) total += shared[warp * SUM_COLUMNS + threadIdx.x];
    return total;
}

// ---- the workspace: one list of pieces gives both their places and the size of all ----------------------------------
// Its rows begin at multiples of 16 bytes whatever D and F are. g: of a backward, else NULL. What no wanted gradient
// needs is NULL. workspace = NULL: only the size, which depends on the device: passes (expert.cu) need more.
template <class T>
struct lent {
    bool    passes;                             // on Hopper, where every row is whole pieces of 16 bytes
    int64_t row_F, row_D, row_U, pieces;        // elements of a row; parts of one ds
    int64_t row_C, down_C;                      // columns of a slab's sums: of dh, then from down_C on those of dy
    T      *a_NF, *y_ND, *dh_NU;                // backward: dA' then sA, sorted copies then dx per copy, dh
    float  *ds_NP, *parts_SC;
    size_t  bytes = 0;

    lent(const moe_expert_args &a, const moe_expert_grads *g, void *workspace)
        : passes(sizeof(T) == 2 && a.D % 8 == 0 && a.F % 8 == 0 && sm90_here() &&
                 (!g || (aligned16(g->dy_RD) && aligned16(g->h_NU)))),
          row_F(round_up(a.F, 8)), row_D(round_up(a.D, 8)), row_U(gated_act(a.act) ? 2 * row_F : row_F),
          pieces(passes ? ceil_div(a.F, SUM_COLUMNS) : ceil_div(a.F, GEMM_PIECE)),
          row_C((sums_dh(g) ? row_U : 0) + (g && g->ddown_bias_ED ? row_D : 0)), down_C(sums_dh(g) ? row_U : 0) {
        const bool weights = g && (g->ddown_EDF.p || g->dgate_EFD.p || g->dup_EFD.p);
        const bool dh = g && (g->dx_RD || g->dgate_EFD.p || g->dup_EFD.p || sums_dh(g));
        a_NF = take<T>(workspace, !g || g->ddown_EDF.p || (passes && (dh || g->dweights_RK)), a.N * row_F);
        y_ND = take<T>(workspace, !g || g->dx_RD || (passes && weights), a.N * row_D);
        dh_NU = take<T>(workspace, dh, a.N * row_U);
        ds_NP = take<float>(workspace, g && g->dweights_RK, a.N * pieces);
        parts_SC = take<float>(workspace, row_C > 0, slabs{a.E, a.N, a.bins_E}.most() * row_C);
    }
    static bool sums_dh(const moe_expert_grads *g) { return g && (g->dgate_bias_EF || g->dup_bias_EF); }

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
// First the sums of slabs, of dh where it lies in memory and no pass (dact.cu) has made them, and of s dy; then those of
// an expert's slabs. A block has SUM_COLUMNS columns of a slab or of an expert, a lane eight of them.
//
// Adds n rows of a warp to sum, IN_FLIGHT of them under way at once (the last again where there are no more): row(i, s)
// says where this lane's columns of the i-th begin, and what they are multiplied by.
template <bool whole, class Row>
static __device__ inline void add_rows(int n, int columns, const Row &row, float (&sum)[8]) {
    for (int i = 0; i < n; i += IN_FLIGHT) {
        float s[IN_FLIGHT], x[IN_FLIGHT][8];
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; u++)
            load8(piece_at<whole>(row(min32(i + u, n - 1), s[u])), whole ? 8 : columns, x[u]);
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; u++)
            for (int v = 0; v < 8 && i + u < n; v++) sum[v] = fmaf(s[u], x[u][v], sum[v]);
    }
}

template <class T>
struct summed_rows {
    const T *rows;
    int64_t  stride, at;                        // at: their first column among those of a slab's sums
    int      columns;
    bool     of_dy, whole;                      // whole: eight columns can always be loaded at once
    __host__ __device__ int tiles() const { return (columns + SUM_COLUMNS - 1) / SUM_COLUMNS; }
};
template <class T>
struct bias_parts {
    slabs              cut;
    int64_t            flat_ids;
    int                K;
    const int32_t     *order_N;
    routing_weights<T> s;
    summed_rows<T>     of[2];                   // dh, dy
    float             *parts_SC;
    int64_t            row_C;
};
// Blocks that run at the same time have the same columns: dy's, K times the same ones, are found in L2.
template <class T>
__global__ void __launch_bounds__(THREADS) bias_parts_kernel(bias_parts<T> g) {
    const int64_t slab = blockIdx.x % g.cut.most();
    const int     tile = static_cast<int>(blockIdx.x / g.cut.most()), before = g.of[0].tiles();
    const summed_rows<T> &c = g.of[tile >= before];
    const int     j = (tile >= before ? tile - before : tile) * SUM_COLUMNS, mine = j + lane_id() * 8;
    const stretch p = g.cut.positions(slab);
    if (p.begin >= p.end) return;

    // Lane i of a warp knows the row and the weight of the warp's i-th position.
    static_assert(SLAB <= 32 * WARPS);
    const int n = rows_of_warp(p);
    int       row = static_cast<int>(p.begin) + warp_id() + lane_id() * WARPS;
    float     s = 1;
    if (c.of_dy) {
        const int32_t f = lane_id() < n ? g.order_N[row] : -1;
        const bool    known = f >= 0 && f < g.flat_ids;
        row = known ? f / g.K : 0;
        s = known ? g.s[f] : 0;
    }
    const auto at = [&](int column) {
        return [&g, &c, row, s, column](int i, float &weight) {
            weight = __shfl_sync(0xffffffffu, s, i);
            return c.rows + __shfl_sync(0xffffffffu, row, i) * c.stride + column;
        };
    };
    float sum[8] = {};
    if (c.whole) add_rows<true>(n, 8, at(mine < c.columns ? mine : 0), sum);
    else         add_rows<false>(n, max32(0, min32(8, c.columns - mine)), at(mine), sum);
    const float total = sum_of_warps(sum, reinterpret_cast<float *>(shared_memory()));
    const int   column = j + static_cast<int>(threadIdx.x);
    if (column < c.columns) g.parts_SC[slab * g.row_C + c.at + column] = total;
}

template <class T>
struct bias_out {
    T      *out;
    int64_t se, at;                             // at: as in summed_rows
    int     columns;                            // 0: not wanted
    __host__ __device__ int tiles() const { return (columns + SUM_COLUMNS - 1) / SUM_COLUMNS; }
};
template <class T>
struct bias_totals {
    slabs        cut;
    const float *parts_SC;
    int64_t      row_C;
    bias_out<T>  of[3];                         // gate, up, down
};
template <class T>
__global__ void __launch_bounds__(THREADS) bias_totals_kernel(bias_totals<T> g) {
    const int64_t e = blockIdx.x % g.cut.E;
    int           tile = static_cast<int>(blockIdx.x / g.cut.E), which = 0;
    while (tile >= g.of[which].tiles()) tile -= g.of[which++].tiles();
    const bias_out<T> &c = g.of[which];
    const int     j = tile * SUM_COLUMNS, mine = j + lane_id() * 8;
    const stretch slab = g.cut.of(e);
    const float  *from = g.parts_SC + (slab.begin + warp_id()) * g.row_C + c.at + (mine < c.columns ? mine : 0);
    float         sum[8] = {};
    add_rows<true>(rows_of_warp(slab), 8, [&](int i, float &s) {
        s = 1;
        return from + static_cast<int64_t>(i) * WARPS * g.row_C;
    }, sum);
    const float total = sum_of_warps(sum, reinterpret_cast<float *>(shared_memory()));
    const int   column = j + static_cast<int>(threadIdx.x);
    if (column < c.columns) c.out[e * c.se + column] = from_float<T>(total);
}

template <class T>
static int sum_biases(const moe_expert_args &a, const moe_expert_grads &g, const lent<T> &w, cudaStream_t stream) {
    const slabs cut = {a.E, a.N, a.bins_E};
    const auto  width = [](int64_t columns, bool wanted) { return wanted ? static_cast<int>(columns) : 0; };
    const bias_parts<T> parts = {
        cut, a.R * a.K, static_cast<int>(a.K), a.order_RK, {a.weights_RK, a.wdtype == MOE_F32},
        {{w.dh_NU, w.row_U, 0, width(w.row_U, w.sums_dh(&g) && !w.passes), false, true},
         {static_cast<const T *>(g.dy_RD), a.D, w.down_C, width(a.D, g.ddown_bias_ED), true,
          a.D % 8 == 0 && aligned16(g.dy_RD)}},
        w.parts_SC, w.row_C,
    };
    const bias_totals<T> totals = {
        cut, w.parts_SC, w.row_C,
        {{static_cast<T *>(g.dgate_bias_EF), g.dgate_bias_se, 0, width(a.F, g.dgate_bias_EF)},
         {static_cast<T *>(g.dup_bias_EF), g.dup_bias_se, w.row_F, width(a.F, g.dup_bias_EF)},
         {static_cast<T *>(g.ddown_bias_ED), g.ddown_bias_se, w.down_C, width(a.D, g.ddown_bias_ED)}},
    };
    const auto run = [&](auto kernel, int64_t rows, const auto &job) {
        int64_t tiles = 0;
        for (const auto &of : job.of) tiles += of.tiles();
        return launch(kernel, rows * tiles, THREADS, THREADS * 8 * sizeof(float), stream, job);
    };
    TRY(run(bias_parts_kernel<T>, cut.most(), parts));
    return run(bias_totals_kernel<T>, a.E, totals);
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
