// gemm.cuh: grouped matrix products on the device. Rows sorted by expert, sizes known only to the device.
//
//   ragged rows  gemm_rows   c[p, j] = sum over terms t and k < K of a[t](p, k) b[t](e; j, k)    p in rows of expert e
//   ragged sums  gemm_sums   c[e; i, j] = sum over rows p of e of a(i, p) b(j, p)                i < M, j < N
//
// Rows of expert e: positions bins[e-1] .. bins[e), which stay on the device. With parts = 2 the product has two b side
// by side (gate and up; terms = 1), and c(p, j) of both meet in one call of the epilogue.
//
// The epilogue is a functor that the kernel carries by value:
//   float operator()(int64_t e, int64_t i, int64_t j, int n, const float (&c)[parts][8]) const
//       takes columns j .. j+n of row i (position p, for ragged rows) of expert e; j is a multiple of 8, n = 8 but at
//       the edge. store8 and load8 move such a piece. Returns what row() is to sum, or 0.
//   static constexpr bool sums_rows
//   void row(int64_t i, int64_t piece, float sum) const       if sums_rows
//       takes the sum, in a fixed order, of what was returned for GEMM_PIECE / parts columns of row i.
//
// Every sum has one order, whatever the grid. An expert without rows gets sums of nothing, which are zeros.
// E <= MOE_MAX_EXPERTS, else MOE_BAD_SHAPE.
#ifndef MOE_GEMM_CUH
#define MOE_GEMM_CUH
#include "gemm_tile.cuh"

enum { GEMM_PIECE = 64, ROW_TILES = 8 };        // rows of tiles that are done together

template <class T>
struct gemm_product {
    int64_t         R, E, N;        // positions, experts, columns of c (of one part)
    int64_t         K = 0;          // ragged rows: length of the sum, of one term
    int64_t         M = 0;          // ragged sums: rows of c
    int             terms = 1;      // ragged rows: 1, or 2 with a[1], b[1]
    bool            tail = false;   // ragged rows: zeros for rows from bins[E-1] to R too, as rows of expert E
    const int32_t  *bins_E;
    gemm_operand<T> a[2], b[2];     // parts = 2: b[1] is the second part
    verdict         bad;            // MOE_BAD_BINS, MOE_BAD_INDEX
};

// Of gemm.cu, for T = float, bf16, f16: the products whose epilogue only stores.
// c[p, j], plus bias[e*bias_se + j] if there is one, to y[p*stride + j].
template <class T>
int gemm_store(const gemm_product<T> &g, const T *bias, int64_t bias_se, T *y, int64_t stride, cudaStream_t stream);
// dw[e] = a b^T over the rows of e, a(i, p) with i < M, b(j, p) with j < N; any strides of dw.
template <class T> int gemm_wgrad(const gemm_product<T> &g, moe_mat dw, cudaStream_t stream);

// Of api.cu. Whether products on this device may go the way of sm90.cuh: it is Hopper, its driver encodes tensor maps,
// and neither MOE_SM90=0 in the environment nor moe_cuda::force forbids. What force wants there: a way, or -1; a group,
// or 0. A note for moe_cuda::products.
bool sm90_here();
int  forced_way();
int  forced_group();
void count_product(moe_way way);

// ---- tiles ----------------------------------------------------------------------------------------------------------
// A block computes tile_m x tile_n of c: warps_m x warps_n warps of [tile_m / warps_m] x 64 columns.
template <int m, int n, int warps_m_, int stages_, int per_sm_>
struct gemm_tile {
    static constexpr int tile_m = m, tile_n = n, warps_m = warps_m_, warps_n = n / WARP_COLUMNS;
    static constexpr int warps = warps_m * warps_n, threads = warps * 32, stages = stages_, per_sm = per_sm_;
    static constexpr int stage_bytes = (m + n) * 64;
};
// Bytes that fit a multiprocessor of an A100, 164 KB, `per_sm` times; registers 65536 / (threads * per_sm). Two blocks
// of tile_mid hide one's epilogue behind the other's sums; they have registers left for a light one only.
using tile_big   = gemm_tile<128, 256, 2, 4, 1>;
using tile_mid   = gemm_tile<128, 128, 2, 4, 2>;
using tile_small = gemm_tile<64, 128, 2, 4, 2>;         // also for floats, and for operands that no vector can read

// What one block does next: rows i0 .. i_end and columns from j0 on of expert e, sums from k0 on.
struct gemm_piece {
    int e, i0, i_end, j0, k0, k_end, steps;
};

// Ragged rows: where the rows of expert e end. Expert E is the tail.
static __device__ __forceinline__ int end_of_rows(int R, int E, const int32_t *bins_E, int e) {
    return e < 0 ? 0 : e < E ? bins_E[e] : R;
}
// The same as a call: it needs no registers of a kernel that has none left.
static __device__ __noinline__ inline int ask_end_of_rows(int R, int E, const int32_t *bins_E, int e) {
    return end_of_rows(R, E, bins_E, e);
}
// How many tiles of rows stand before each expert: experts + 1 entries. Every block counts for itself. Bins that are
// not in order: a verdict, and no tiles at all. shared: 32 words.
template <int tile_m>
static __device__ void count_tiles(int R, int E, bool tail, const int32_t *bins_E, verdict bad, uint32_t *table,
                                   uint32_t *shared) {
    const int n = E + tail, each = (n + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
    const int first = min32(n, static_cast<int>(threadIdx.x) * each), last = min32(n, first + each);
    const auto end_of = [&](int e) { return end_of_rows(R, E, bins_E, e); };
    uint32_t mine = 0, wrong = 0, all;
    for (int e = first; e < last; e++) {
        const int begin = end_of(e - 1), end = end_of(e);
        if (begin < 0 || end < begin || end > R) wrong = 1, bad(MOE_BAD_BINS, e);
        else mine += static_cast<uint32_t>(end - begin + tile_m - 1) / tile_m;
    }
    wrong = block_sum(wrong, shared);
    uint32_t tiles = block_exclusive_scan(wrong ? 0 : mine, shared, &all);
    for (int e = first; e < last; e++) {
        table[e] = tiles;
        if (!wrong) tiles += static_cast<uint32_t>(end_of(e) - end_of(e - 1) + tile_m - 1) / tile_m;
    }
    if (threadIdx.x == 0) table[n] = all;
    __syncthreads();
}

// Tile t of `m` x `n`, `group` rows of tiles at a time: neighbours in time share panels of both operands in L2.
static __device__ __forceinline__ void swizzle(uint32_t t, uint32_t m, uint32_t n, uint32_t group, int *i, int *j) {
    const uint32_t first = t / (group * n) * group, rows = m - first < group ? m - first : group, rest = t - first * n;
    *i = static_cast<int>(first + rest % rows);
    *j = static_cast<int>(rest / rows);
}

// The t-th tile of all experts; false if there is none.
template <class Tile, int parts, class T>
static __device__ bool find_of_sums(const gemm_product<T> &g, int64_t t, gemm_piece *piece) {
    constexpr int columns = Tile::tile_n / parts, depth = panel_depth<T>;
    const int down = static_cast<int>((g.M + Tile::tile_m - 1) / Tile::tile_m);
    const int across = static_cast<int>((g.N + columns - 1) / columns);
    const int64_t tiles = static_cast<int64_t>(down) * across;
    if (t >= g.E * tiles) return false;
    const int e = static_cast<int>(t / tiles);
    int i, j, begin = e ? g.bins_E[e - 1] : 0, end = g.bins_E[e];
    if (begin < 0 || end < begin || end > g.R) g.bad(MOE_BAD_BINS, e), begin = end = 0;
    swizzle(static_cast<uint32_t>(t - e * tiles), down, across, ROW_TILES, &i, &j);
    *piece = {e, i * Tile::tile_m, static_cast<int>(g.M), j * columns, begin, end, (end - begin + depth - 1) / depth};
    return true;
}
template <class Tile, int parts, bool full = false, class T>
static __device__ bool find_of_rows(const gemm_product<T> &g, const uint32_t *table, uint32_t group, int64_t t,
                                    gemm_piece *piece) {
    constexpr int columns = Tile::tile_n / parts, depth = panel_depth<T>;
    const int R = static_cast<int>(g.R), E = static_cast<int>(g.E);
    const int K = static_cast<int>(g.K);
    const uint32_t tile = static_cast<uint32_t>(t), across = static_cast<uint32_t>(g.N + columns - 1) / columns;
    const int experts = E + g.tail;
    int i, j;
    if (t >= table[experts] * across) return false;
    const int e = expert_at(experts, tile / across, [&](int e) { return table[e + 1]; });
    swizzle(tile - table[e] * across, table[e + 1] - table[e], across, group, &i, &j);
    const auto end_of = [&](int e) {
        return full ? ask_end_of_rows(R, E, g.bins_E, e) : end_of_rows(R, E, g.bins_E, e);
    };
    *piece = {e, end_of(e - 1) + i * Tile::tile_m, end_of(e), j * columns, 0, K,
              (e != E) * g.terms * ((K + depth - 1) / depth)};
    return true;
}

// ---- the kernel -----------------------------------------------------------------------------------------------------
// Blocks walk over tiles. A stage holds one panel of A and of each B; `stages - 1` panels are under way while one is
// multiplied, and the first of the next tile while the last one's sums leave through the epilogue.
template <class Tile, int parts, bool ragged_sums, bool b_along_k, bool vector, class T, class Epilogue>
__global__ void __launch_bounds__(Tile::threads, Tile::per_sm)
gemm_kernel(const gemm_product<T> g, const Epilogue emit) {
    constexpr int stages = Tile::stages, depth = panel_depth<T>, width_b = Tile::tile_n / parts;
    constexpr int warp_m = Tile::tile_m / Tile::warps_m, warp_n = WARP_COLUMNS / parts;
    constexpr bool a_along_k = !ragged_sums;
    using sums = warp_sums<T, warp_m, parts, a_along_k, b_along_k, Tile::tile_m, width_b>;
    unsigned char *const shared = shared_memory();
    auto *const area = reinterpret_cast<float *>(shared + stages * Tile::stage_bytes);      // of the block's warps
    auto *const table = reinterpret_cast<uint32_t *>(area + Tile::warps * sums::pass_rows * WARP_STRIDE);
    if (!ragged_sums)
        count_tiles<Tile::tile_m>(static_cast<int>(g.R), static_cast<int>(g.E), g.tail, g.bins_E, g.bad, table,
                                  reinterpret_cast<uint32_t *>(area));

    panel_loader<T, a_along_k, vector, true, Tile::tile_m, Tile::threads> a;
    panel_loader<T, b_along_k, vector, ragged_sums, width_b, Tile::threads> b[parts];
    sums c;
    c.m0 = warp_id() % Tile::warps_m * warp_m;
    c.n0 = warp_id() / Tile::warps_m * warp_n;

    const auto begin = [&](const gemm_piece &p, int term) {
        a.begin(g.a[term], p.e, p.i0, p.i_end, p.k0, p.k_end, g.bad);
#pragma unroll
        for (int q = 0; q < parts; q++)
            b[q].begin(g.b[parts == 2 ? q : term], p.e, p.j0, static_cast<int>(g.N), p.k0, p.k_end, g.bad);
    };
    const auto load = [&](const gemm_piece &p, int step) {          // one group of copies, empty after the last step
        if (step < p.steps) {
            unsigned char *to = shared + step % stages * Tile::stage_bytes;
            const int one = ragged_sums || g.terms == 1 ? p.steps : p.steps / 2;
            if (step == one) begin(p, 1);
            const int k = p.k0 + (step < one ? step : step - one) * depth;
            a.load(to, k, g.a[0], g.bad);
#pragma unroll
            for (int q = 0; q < parts; q++) b[q].load(to + (Tile::tile_m + q * width_b) * 64, k, g.b[q], g.bad);
        }
        cp_async_commit();
    };
    const auto fragments = [&](int slot, int stage, int step) {
        const unsigned char *at = shared + stage * Tile::stage_bytes;
        c.load(slot, at, at + Tile::tile_m * 64, step);
    };

    gemm_piece now = {}, next;
    for (int64_t t = blockIdx.x;; t += gridDim.x) {
        const bool more = ragged_sums ? find_of_sums<Tile, parts>(g, t, &next)
                                      : find_of_rows<Tile, parts, !vector>(g, table, ROW_TILES, t, &next);
        if (more) {
            if (next.steps > 0) begin(next, 0);
#pragma unroll 1
            for (int step = 0; step < stages - 1; step++) load(next, step);
        }
        if (t != blockIdx.x) {                                      // the sums of `now` leave, 8 columns at a time
            constexpr int across = warp_n / 8;                      // lanes that share a row
            float *const mine = area + warp_id() * sums::pass_rows * WARP_STRIDE;
            const int piece = lane_id() % across, j = now.j0 + c.n0 + piece * 8;
            const int n = min32(8, static_cast<int>(g.N) - j);
#pragma unroll 1
            for (int pass = 0; pass < sums::passes; pass++) {
                __syncwarp();
                c.put(pass, mine);
                __syncwarp();
#pragma unroll 1
                for (int r0 = 0; r0 < sums::pass_rows; r0 += 32 / across) {     // all lanes of a warp as often
                    const int r = r0 + lane_id() / across;
                    const int i = now.i0 + c.m0 + pass * sums::pass_rows + r;
                    const bool inside = i < now.i_end && n > 0;
                    float x[parts][8], sum = 0;
#pragma unroll
                    for (int q = 0; q < parts; q++)
#pragma unroll
                        for (int v = 0; v < 8; v++) x[q][v] = mine[r * WARP_STRIDE + q * warp_n + piece * 8 + v];
                    if (inside) sum = emit(now.e, i, j, n, x);
                    if constexpr (Epilogue::sums_rows) {
                        for (int step = across / 2; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
                        if (piece == 0 && inside) emit.row(i, j / warp_n, sum);
                    }
                }
            }
        }
        if (!more) break;
        now = next;

        c.clear();
        cp_async_wait<stages - 2>();
        __syncthreads();
        int stage = 0;
        if (sums::slots == 2 && now.steps > 0) fragments(0, 0, 0);
#pragma unroll 1
        for (int step = 0; step < now.steps; step++) {
#pragma unroll
            for (int k = 0; k < sums::steps; k++) {
                const bool last = k == sums::steps - 1;
                if (sums::slots == 1) fragments(0, stage, k);
                if (last) {                                         // all have read this stage; the next one is there
                    cp_async_wait<stages - 2>();
                    __syncthreads();
                    stage = stage + 1 == stages ? 0 : stage + 1;
                }
                if (k == 0) load(now, step + stages - 1);
                if (sums::slots == 2 && !(last && step + 1 == now.steps))
                    fragments((k + 1) % 2, stage, (k + 1) % sums::steps);
                c.multiply(k % sums::slots);
            }
            c.end_panel(step);
        }
    }
}

// ---- the choice of a tile, and the launch ---------------------------------------------------------------------------
// Whether chunks of 16 bytes can be copied: along k, or along i.
template <class T>
bool gemm_vector(const gemm_operand<T> &x, bool along_k, int64_t E) {
    constexpr int n = chunk_size<T>;
    return aligned16(x.p) && (along_k ? x.sk : x.si) == 1 && (along_k ? x.si : x.sk) % n == 0 &&
           (E == 1 || x.se % n == 0);
}

// Time of a grid, in units that only compare: rounds of the device times the work of one round over its efficiency.
// Of ragged rows half a tile per expert is lost at its end.
template <class Tile>
double gemm_cost(double efficiency, bool ragged_sums, int64_t R, int64_t E, int64_t M, int64_t columns, int sms) {
    const double down = ragged_sums ? static_cast<double>(E * ceil_div(M, Tile::tile_m))
                                    : static_cast<double>(R) / Tile::tile_m + 0.5 * static_cast<double>(E);
    const double tiles = down * static_cast<double>(ceil_div(columns, Tile::tile_n)), slots = Tile::per_sm * sms;
    const double rounds = tiles < slots ? 1 : tiles / slots;
    return rounds * Tile::per_sm * Tile::tile_m * Tile::tile_n / efficiency;
}
enum gemm_choice { GEMM_SMALL, GEMM_MID, GEMM_BIG };
inline gemm_choice gemm_policy(bool light, bool ragged_sums, int64_t R, int64_t E, int64_t M, int64_t columns,
                               int sms) {
    const double small = gemm_cost<tile_small>(0.7, ragged_sums, R, E, M, columns, sms);
    const double mid = gemm_cost<tile_mid>(0.9, ragged_sums, R, E, M, columns, sms);
    const double big = gemm_cost<tile_big>(1.0, ragged_sums, R, E, M, columns, sms);
    if (light && mid < big && mid < small) return GEMM_MID;
    return big < small ? GEMM_BIG : GEMM_SMALL;
}

template <class Tile, int parts, bool ragged_sums, bool b_along_k, bool vector, class T, class Epilogue>
int gemm_launch(const gemm_product<T> &g, Epilogue emit, cudaStream_t stream) {
    using sums = warp_sums<T, Tile::tile_m / Tile::warps_m, parts, !ragged_sums, b_along_k, Tile::tile_m,
                           Tile::tile_n / parts>;
    const int64_t across = ceil_div(g.N, Tile::tile_n / parts), experts = g.E + g.tail;
    const int64_t down = ragged_sums ? g.E * ceil_div(g.M, Tile::tile_m) : g.R / Tile::tile_m + min64(g.R, experts);
    const size_t area = Tile::warps * sums::pass_rows * WARP_STRIDE * sizeof(float);
    const size_t table = ragged_sums ? 0 : (experts + 1) * sizeof(uint32_t);
    const int64_t grid = min64(down * across, static_cast<int64_t>(multiprocessors()) * Tile::per_sm);
    count_product(MOE_GEMM);
    return launch(gemm_kernel<Tile, parts, ragged_sums, b_along_k, vector, T, Epilogue>, grid, Tile::threads,
                  Tile::stages * Tile::stage_bytes + area + table, stream, g, emit);
}
template <int parts, bool ragged_sums, bool b_along_k, bool light, class T, class Epilogue>
int gemm_by_tile(const gemm_product<T> &g, Epilogue emit, cudaStream_t stream) {
    if constexpr (sizeof(T) == 2) {
        const auto tile = gemm_policy(light, ragged_sums, g.R, g.E, g.M, g.N * parts, multiprocessors());
        if (tile == GEMM_BIG) return gemm_launch<tile_big, parts, ragged_sums, b_along_k, true>(g, emit, stream);
        if constexpr (light)
            if (tile == GEMM_MID) return gemm_launch<tile_mid, parts, ragged_sums, b_along_k, true>(g, emit, stream);
    }
    return gemm_launch<tile_small, parts, ragged_sums, b_along_k, true>(g, emit, stream);
}
template <class T>
int gemm_check(const gemm_product<T> &g) {
    constexpr int64_t most = INT32_MAX - 1024;          // coordinates are 32 bits wide, with room for a tile
    const int64_t across = g.N / 64 + 1;                // and so are the tiles of all rows, and of one matrix of sums
    return g.E < 1 || g.E > MOE_MAX_EXPERTS || g.R > INT32_MAX - 1024 || g.N > most || g.M > most || g.K > most / 2 ||
                   (g.R / 64 + g.E + 1) * across > most || (g.M / 64 + 1) * across > most
        ? MOE_BAD_SHAPE : MOE_OK;
}

// light: the epilogue needs few registers.
template <int parts, bool light = false, class T, class Epilogue>
int gemm_rows(const gemm_product<T> &g, Epilogue emit, cudaStream_t stream) {
    TRY(gemm_check(g));
    bool a = true, b_k = true, b_i = true;
    for (int t = 0; t < g.terms; t++) a = a && gemm_vector(g.a[t], true, 1);
    for (int q = 0; q < (parts == 2 ? 2 : g.terms); q++) {
        b_k = b_k && gemm_vector(g.b[q], true, g.E);
        b_i = b_i && gemm_vector(g.b[q], false, g.E);
    }
    if (a && b_k) return gemm_by_tile<parts, false, true, light>(g, emit, stream);
    if (a && b_i) return gemm_by_tile<parts, false, false, light>(g, emit, stream);
    return gemm_launch<tile_small, parts, false, true, false>(g, emit, stream);
}
template <bool light = false, class T, class Epilogue>
int gemm_sums(const gemm_product<T> &g, Epilogue emit, cudaStream_t stream) {
    TRY(gemm_check(g));
    if (gemm_vector(g.a[0], false, 1) && gemm_vector(g.b[0], false, 1))
        return gemm_by_tile<1, true, false, light>(g, emit, stream);
    return gemm_launch<tile_small, 1, true, false, false>(g, emit, stream);
}
#endif
