// gemm_rows_sm90.cu: products over ragged rows on Hopper: rows_sm90 and act_sm90 of sm90.cuh.
//
// One block per multiprocessor walks over the tiles of gemm.cuh (a group of row tiles shares panels of B in L2). A comes
// by TMA, or row by row through its index; B by TMA, the expert being the map's third coordinate. What TMA reads past
// the end of the sum is zero. Rows past the end of an expert are multiplied too, but no row has a part in the sums of
// another, and theirs are not stored.
#include "pipe_sm90.cuh"
#include "policy_sm90.cuh"
#include "sm90.cuh"
#include "tensor_map.cuh"

// ---- schedules ------------------------------------------------------------------------------------------------------
using together_256 = pipe_tile<128, 256, 4, false, 56>;     // 24 registers are too few for the threads that gather
using by_turns_192 = pipe_tile<128, 192, 5, true, 24>;      // 192 sums a thread
using by_turns_128 = pipe_tile<128, 128, 5, true, 56>;

// ---- epilogues: what happens to a warp's 16 rows --------------------------------------------------------------------
// c[n] of row p on and column j on, in the layout of wgmma; columns: that g.N has from j on.
// x += bias, for 64 columns: a lane reads two of them and asks others for its own.
template <class T>
static __device__ __forceinline__ void add_bias(const T *bias, int columns, float *x) {
    const int lane = lane_id();
    uint32_t  mine = 0;
    if (2 * lane < columns) mine = bias[2 * lane].bits | static_cast<uint32_t>(bias[2 * lane + 1].bits) << 16;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t pair = __shfl_sync(0xffffffffu, mine, 4 * i + (lane & 3));
#pragma unroll
        for (int v = 0; v < 4; v++) x[4 * i + v] += to_float(T{static_cast<uint16_t>(v & 1 ? pair >> 16 : pair)});
    }
}

template <class T>
struct rows_out {
    const T *bias;
    int64_t  bias_se;
    T       *y;
    int64_t  stride;
    template <class Tile, int n>
    __device__ __forceinline__ void store(unsigned char *area, int e, bool tail, int p, int rows, int j, int columns,
                                          float (&c)[n]) const {
        T *const to = y + p * stride + j;
#pragma unroll
        for (int at = 0; at < 2 * n; at += AREA_COLUMNS) {
            if (bias && !tail) add_bias(bias + (e * bias_se + j + at), columns - at, c + at / 2);
            store_rows16<Tile::pieces>(area, c + at / 2, to + at, stride, rows, columns - at);
        }
    }
};

// act sees h before it is rounded. Without a gate, gate is h.
template <class T, int parts>
struct act_rows {
    act_out<T> out;
    int64_t    F;
    template <class Tile, int n>
    __device__ __forceinline__ void store(unsigned char *area, int e, bool, int p, int rows, int j, int columns,
                                          float (&c)[n]) const {
        constexpr int width = 2 * n / parts;
        T *const h = out.h_NU + p * (parts * F) + j, *const a = out.a_NF + p * out.row_F + j;
#pragma unroll
        for (int at = 0; at < width; at += AREA_COLUMNS) {
            float *const gate = c + at / 2, *const up = gate + (parts == 2 ? width / 2 : 0);
            if (out.gate_bias) add_bias(out.gate_bias + (e * out.gate_bias_se + j + at), columns - at, gate);
            store_rows16<Tile::pieces>(area, gate, h + at, parts * F, rows, columns - at);
            if constexpr (parts == 2) {
                if (out.up_bias) add_bias(out.up_bias + (e * out.up_bias_se + j + at), columns - at, up);
                store_rows16<Tile::pieces>(area, up, h + F + at, 2 * F, rows, columns - at);
            }
#pragma unroll
            for (int i = 0; i < AREA_COLUMNS / 2; i += 8) {
                float x[8], value[8], slope[8], unused;
#pragma unroll
                for (int v = 0; v < 8; v++) x[v] = gate[i + v];
                act8(out.plain, x, value, slope);
#pragma unroll
                for (int v = 0; v < 8; v++)
                    gate[i + v] = parts == 2 ? value[v] * up_value_f32(out.plain, up[i + v], &unused) : value[v];
            }
            store_rows16<Tile::pieces>(area, gate, a + at, out.row_F, rows, columns - at);
        }
    }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------
struct rows_plan {
    tensor_map a[2], b[2];          // b: of the terms, or of the parts
    int        term_steps, steps;   // stages of one term, and of all; a tile of the tail has none
    int        group;               // row tiles that are done together
};

// Rows of A through the index. Eight lanes copy 128 bytes of a row; a warp has rows 4 w .. 4 w + 3 of every 16. A stage
// is full once its copies have landed and the async proxy has been told so, which is one stage later.
template <class Tile, class T, class Find, class Load>
static __device__ __forceinline__ void load_gathered(const pipe<Tile> &ring, const gemm_product<T> &g, int steps,
                                                     const Find &find, const Load &load_b) {
    constexpr int copies = Tile::tile_m / 16;
    const int lane = lane_id(), K = static_cast<int>(g.K), chunk = lane & 7, line = warp_id() * 4 + lane / 8;
    const int row_chunks = static_cast<int>(g.a[0].si / 8);
    // Lane l knows row l%4 + 4 w + 16 (l/4) of a tile. What the index has there is read one tile ahead of its use.
    const auto position = [&](const gemm_piece &p) {                    // -1: there is none
        const int i = p.i0 + lane / 4 * 16 + warp_id() * 4 + lane % 4;
        return p.e < g.E && i < p.i_end ? i : -1;
    };
    const auto read = [&](const gemm_piece &p) { return position(p) < 0 ? 0 : g.a[0].index[position(p)]; };
    ring_place<Tile> at, landed;        // landed: of the copies under way, which are at most one stage
    bool       under_way = false;
    gemm_piece next;
    uint32_t   t = blockIdx.x;
    bool       more = find(t, &next);
    int32_t    flat = more ? read(next) : 0;
    while (more) {
        const gemm_piece now = next;
        const int row = position(now) < 0 ? -1 : g.a[0].row_of(flat, position(now), g.bad);
        int from[copies];                                               // where rows begin, in chunks; -1: of zeros
#pragma unroll
        for (int u = 0; u < copies; u++)
            from[u] = __shfl_sync(0xffffffffu, row < 0 ? -1 : row * row_chunks, u * 4 + lane / 8);
        more = find(t += gridDim.x, &next);
        if (more) flat = read(next);
        if (now.e == g.E) continue;
        for (int step = 0; step < steps; step++) {
            const int k = step * PIPE_DEPTH + chunk * 8, bytes = min32(16, (K - k) * 2);
            ring.wait_empty(at);
            if (threadIdx.x == 0) {
                mbarrier_arrive_expect(ring.full(at.stage), Tile::b_bytes);
                load_b(now, step, at.stage);
            }
            const uint32_t to = ring.a(at.stage) + line * 128 + ((chunk ^ (line & 7)) << 4);
#pragma unroll
            for (int u = 0; u < copies; u++) {
                const bool here = from[u] >= 0 && bytes > 0;
                cp_async_16(to + u * 16 * 128, g.a[0].p + (here ? static_cast<int64_t>(from[u]) * 8 + k : 0),
                            here ? bytes : 0);
            }
            cp_async_commit();
            if (under_way) {
                cp_async_wait<1>();
                fence_async();
                mbarrier_arrive(ring.full(landed.stage));
                landed.next();
            }
            under_way = true;
            at.next();
        }
    }
    if (under_way) {
        cp_async_wait<0>();
        fence_async();
        mbarrier_arrive(ring.full(landed.stage));
    }
}

// parts = 2: the first half of a tile's columns are of b[0], the second of b[1].
template <class Tile, int parts, bool b_along_k, class T, class Epilogue>
__global__ void __launch_bounds__(PIPE_THREADS, 1)
rows_kernel(const __grid_constant__ rows_plan plan, const gemm_product<T> g, const Epilogue emit) {
    constexpr int width = Tile::tile_n / parts;
    const pipe<Tile> ring;
    auto *const table = reinterpret_cast<uint32_t *>(shared_memory() + Tile::bytes);
    const bool  gathered = !Tile::by_turns && g.a[0].index;
    const int   E = static_cast<int>(g.E);

    ring.init(gathered ? PIPE_LOADERS + 1 : 1);
    count_tiles<Tile::tile_m>(static_cast<int>(g.R), E, g.tail, g.bins_E, g.bad, table,
                              reinterpret_cast<uint32_t *>(shared_memory() + Tile::areas_at));
    const auto find = [&](uint32_t t, gemm_piece *p) { return find_of_rows<Tile, parts>(g, table, plan.group, t, p); };
    const auto load_b = [&](const gemm_piece &p, int step, int stage) {
        const int term = step >= plan.term_steps, k = (step - term * plan.term_steps) * PIPE_DEPTH;
#pragma unroll
        for (int q = 0; q < parts; q++) {
            const tensor_map *map = &plan.b[parts == 2 ? q : term];
            const uint32_t    to = ring.b(stage) + q * width * 128;
            if (b_along_k) tma_load(to, map, ring.full(stage), k, p.j0, p.e);
            else
#pragma unroll
                for (int j = 0; j < width; j += 64) tma_load(to + j * 128, map, ring.full(stage), p.j0 + j, k, p.e);
        }
    };

    if (warp_id() < PIPE_LOADERS / 32) {
        fewer_registers<Tile::loader_registers>();
        if (gathered) {
            if constexpr (!Tile::by_turns) load_gathered(ring, g, plan.steps, find, load_b);
        } else if (threadIdx.x == 0) {
            ring_place<Tile> at;
            gemm_piece       p;
            for (uint32_t t = blockIdx.x; find(t, &p); t += gridDim.x)
                for (int step = 0; p.e < E && step < plan.steps; step++) {
                    const int term = step >= plan.term_steps, k = (step - term * plan.term_steps) * PIPE_DEPTH;
                    ring.wait_empty(at);
                    mbarrier_arrive_expect(ring.full(at.stage), Tile::stage_bytes);
                    tma_load(ring.a(at.stage), &plan.a[term], ring.full(at.stage), k, p.i0);
                    load_b(p, step, at.stage);
                    at.next();
                }
        }
        return;
    }

    more_registers<Tile::registers>();
    const int group = warp_id() / 4 - 1, first_row = Tile::by_turns ? 0 : group * Tile::group_m;
    const uint32_t hop = Tile::by_turns ? 2 * gridDim.x : gridDim.x;
    ring_place<Tile> at;
    gemm_piece       now, next;
    uint32_t         t = blockIdx.x;
    uint32_t         lap = 1 - group;           // of turn[group]: the first turn is group 0's
    if (Tile::by_turns && group) {
        t += gridDim.x;
        at.skip(plan.steps);
    }
    bool more = find(t, &now);
    while (more) {
        const int steps = now.e < E ? plan.steps : 0;
        tile_sums<Tile, T, true, b_along_k> sums;
        float c[Tile::slices][Tile::tile_n / 2];
        if (Tile::by_turns) {
            mbarrier_wait(ring.turn(group), lap);
            lap ^= 1;
        }
        sums.begin(ring, at, first_row, steps, c);
        if (Tile::by_turns) {
            ring.arrive(ring.turn(group ^ 1));
            at.skip(plan.steps);                // if the other has a tile of the tail, no stage is needed any more
        }
        if (!Tile::by_turns) more = find(t += hop, &next);      // while the last product runs
        sums.end(ring, steps, c);
#pragma unroll
        for (int i = 0; i < Tile::slices; i++) {
            const int p = now.i0 + first_row + i * 64 + warp_id() % 4 * AREA_ROWS, rows = now.i_end - p;
            if (rows > 0)
                emit.template store<Tile>(ring.area(), now.e, now.e == E, p, rows, now.j0,
                                          static_cast<int>(g.N) - now.j0, c[i]);
        }
        if (Tile::by_turns) more = find(t += hop, &now);        // while the other multiplies
        else now = next;
    }
}

// ---- who may come ---------------------------------------------------------------------------------------------------
template <class T>
static bool strides_fit(const gemm_operand<T> &x) {         // TMA: below 2^40 bytes; none of a broadcast
    constexpr int64_t most = 1ll << 38;
    return x.si > 0 && x.sk > 0 && x.se >= 0 && x.si <= most && x.sk <= most && x.se <= most;
}
template <class T>
static bool b_takes(const gemm_product<T> &g, int matrices, bool along_k) {
    bool fits = true;
    for (int q = 0; q < matrices; q++)
        fits = fits && gemm_vector(g.b[q], along_k, g.E) && strides_fit(g.b[q]) && (g.E == 1 || g.b[q].se > 0);
    return fits;
}
template <class T>
static bool product_takes(const gemm_product<T> &g, int matrices) {
    bool fits = gemm_check(g) == MOE_OK && g.R >= 1 && g.N >= 1 && g.K >= 1 && g.N % 8 == 0;
    for (int t = 0; t < g.terms; t++) fits = fits && gemm_vector(g.a[t], true, 1) && strides_fit(g.a[t]);
    if (fits && g.a[0].index) fits = g.terms == 1 && g.a[0].index_rows * (g.a[0].si / 8) <= INT32_MAX;
    return fits && (b_takes(g, matrices, true) || b_takes(g, matrices, false));
}
template <class T>
bool rows_sm90_takes(const gemm_product<T> &g, const T *, const T *y, int64_t stride) {
    return product_takes(g, g.terms) && aligned16(y) && stride % 8 == 0;
}
template <int parts, class T>
bool act_sm90_takes(const gemm_product<T> &g, const act_out<T> &out) {
    return g.terms == 1 && !g.tail && product_takes(g, parts) && aligned16(out.h_NU) && aligned16(out.a_NF) &&
           out.row_F % 8 == 0;
}

// ---- the launch -----------------------------------------------------------------------------------------------------
template <class Tile>
static size_t block_bytes(int64_t experts) { return Tile::bytes + (experts + 1) * sizeof(uint32_t); }
static_assert(together_256::bytes + (MOE_MAX_EXPERTS + 2) * sizeof(uint32_t) <= BLOCK_BYTES);
static_assert(by_turns_128::bytes + (MOE_MAX_EXPERTS + 2) * sizeof(uint32_t) <= BLOCK_BYTES);

template <class Tile, int parts, bool b_along_k, class T, class Epilogue>
static int rows_launch(moe_way way, const gemm_product<T> &g, const Epilogue &emit, cudaStream_t stream) {
    constexpr int width = Tile::tile_n / parts, dtype = dtype_of(T{});
    rows_plan plan = {};
    plan.term_steps = static_cast<int>(ceil_div(g.K, PIPE_DEPTH)), plan.steps = g.terms * plan.term_steps;
    plan.group = forced_group() ? forced_group()
                                : sm90_group(Tile::tile_n, g.terms * g.K, multiprocessors(), l2_bytes());
    for (int t = 0; t < g.terms && !g.a[0].index; t++) {
        const int64_t size[] = {g.K, g.R}, stride[] = {(g.R == 1 ? round_up(g.K, 8) : g.a[t].si) * 2};
        const int     box[] = {PIPE_DEPTH, Tile::tile_m};
        TRY(encode_tensor_map(&plan.a[t], dtype, g.a[t].p, 2, size, stride, box));
    }
    for (int q = 0; q < (parts == 2 ? 2 : g.terms); q++) {
        const gemm_operand<T> &b = g.b[q];
        const int64_t along = b_along_k ? g.K : g.N, lines = b_along_k ? g.N : g.K, line = b_along_k ? b.si : b.sk;
        const int64_t size[] = {along, lines, g.E}, stride[] = {line * 2, (g.E == 1 ? line * lines : b.se) * 2};
        const int     box[] = {64, b_along_k ? width : PIPE_DEPTH, 1};
        TRY(encode_tensor_map(&plan.b[q], dtype, b.p, 3, size, stride, box));
    }
    const int64_t experts = g.E + g.tail, down = g.R / Tile::tile_m + min64(g.R, experts);
    const int64_t grid = min64(down * ceil_div(g.N, width), multiprocessors());
    count_product(way);
    return launch(rows_kernel<Tile, parts, b_along_k, T, Epilogue>, grid, PIPE_THREADS, block_bytes<Tile>(experts),
                  stream, plan, g, emit);
}
template <bool b_along_k, class T>
static int rows_by_way(moe_way way, const gemm_product<T> &g, const rows_out<T> &emit, cudaStream_t stream) {
    if (way == MOE_SM90_128x192) return rows_launch<by_turns_192, 1, b_along_k>(way, g, emit, stream);
    if (way == MOE_SM90_128x128) return rows_launch<by_turns_128, 1, b_along_k>(way, g, emit, stream);
    return rows_launch<together_256, 1, b_along_k>(way, g, emit, stream);
}
template <class T>
int rows_sm90(const gemm_product<T> &g, const T *bias, int64_t bias_se, T *y, int64_t stride, cudaStream_t stream) {
    const rows_out<T> emit = {bias, bias_se, y, stride};
    const bool gathered = g.a[0].index, fits = block_bytes<by_turns_192>(g.E + g.tail) <= BLOCK_BYTES;
    moe_way way = forced_way() < 0 ? sm90_rows_way(g.R, g.E, g.N, g.terms * g.K, gathered, 1, multiprocessors())
                                   : static_cast<moe_way>(forced_way());
    if (gathered || (way == MOE_SM90_128x192 && !fits)) way = MOE_SM90_128x256;
    const auto by_way = b_takes(g, g.terms, true) ? rows_by_way<true, T> : rows_by_way<false, T>;
    return by_way(way, g, emit, stream);
}
template <int parts, class T>
int act_sm90(const gemm_product<T> &g, const act_out<T> &out, cudaStream_t stream) {
    const act_rows<T, parts> emit = {out, g.N};
    return b_takes(g, parts, true) ? rows_launch<together_256, parts, true>(MOE_SM90_128x256, g, emit, stream)
                                   : rows_launch<together_256, parts, false>(MOE_SM90_128x256, g, emit, stream);
}
#define INSTANCES(T) \
    template bool rows_sm90_takes(const gemm_product<T> &, const T *, const T *, int64_t); \
    template int rows_sm90(const gemm_product<T> &, const T *, int64_t, T *, int64_t, cudaStream_t); \
    template bool act_sm90_takes<1>(const gemm_product<T> &, const act_out<T> &); \
    template bool act_sm90_takes<2>(const gemm_product<T> &, const act_out<T> &); \
    template int act_sm90<1>(const gemm_product<T> &, const act_out<T> &, cudaStream_t); \
    template int act_sm90<2>(const gemm_product<T> &, const act_out<T> &, cudaStream_t);
INSTANCES(bf16) INSTANCES(f16)
#undef INSTANCES
