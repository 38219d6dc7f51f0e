// gemm_sums_sm90.cu: products over ragged sums on Hopper: sums_sm90 of sm90.cuh.
//
// Both operands lie in shared memory as they do in global memory, along i: a stage holds 64 rows of the sum, in boxes
// of 64 columns. One block per multiprocessor; two warpgroups share a tile by its rows. Warps and what they do:
//   0        loads: TMA into the ring of pipe_sm90.cuh
//   1 to 3   deal: which tile this block computes next, into a short queue that all others read
//   4 to 11  multiply, and store
//
// The end of a sum. The last stage of an expert must not hold rows of the next, whose NaN would pass a product with
// zero. It is read through a second map of the same memory, three-dimensional: [column, row of 64, end], where `end` is
// the row at which the expert ends and the 64 rows are those before it. Its base stands 64 rows before the matrix, and
// (column, 64 - rest + k, end) is row end - rest + k; the rows from 64 on are outside the map, so that they are zeros.
// Nothing before the matrix is ever read: `rest` rows of the expert stand before its end, so end - rest >= 0, and
// coordinates are the only way into a map, whose base is but a number to add to. Of the last stage only the steps of 16
// rows that hold one are multiplied.
//
// The order of tiles. All experts have as many, but of very different lengths. Every block sorts the experts, longest
// first, and deals out their tiles as if it were all blocks: half a grid of tiles at a time, to those blocks that have
// the least to do so far. In a model of 132 blocks that reaches .96 to 1 of perfect shares under Zipf's law, where
// turns reach .77 to .99: as good as a queue that blocks share, which would need memory to be cleared first.
// Neighbours in time get neighbouring tiles, whose operands meet in L2.
#include "pipe_sm90.cuh"
#include "policy_sm90.cuh"
#include "sm90.cuh"
#include "tensor_map.cuh"

using wide_tile   = pipe_tile<128, 256, 4, false, 56>;
using narrow_tile = pipe_tile<128, 128, 6, false, 56>;

template <class T>
struct sums_job {
    int            R, E, M, N, down, across;    // down, across: tiles of dw
    int            group;                       // rows of tiles that are done together
    const int32_t *bins_E;
    moe_mat        dw;                          // sc = 1
    verdict        bad;
    tensor_map     a, b, a_end, b_end;
};

// Rows of expert e, which begin at *begin; -1 where its bin is wrong.
static __device__ __forceinline__ int rows_of(const int32_t *bins_E, int R, int e, int *begin) {
    const int end = bins_E[e];
    *begin = e ? bins_E[e - 1] : 0;
    return *begin < 0 || end < *begin || end > R ? -1 : end - *begin;
}

// ---- the order of experts -------------------------------------------------------------------------------------------
// A key holds an expert's rows, in units of 2^shift so that 20 bits are enough, and its name: the lower goes first.
struct expert_key {
    static constexpr int id_bits = 12;
    static_assert(MOE_MAX_EXPERTS <= 1 << id_bits);
    static __device__ uint32_t of(int rows, int shift, int e) {
        return static_cast<uint32_t>(rows >> shift) << id_bits | ((1 << id_bits) - 1 - e);
    }
    static __device__ int expert(uint32_t key) { return (1 << id_bits) - 1 - (key & ((1 << id_bits) - 1)); }
    static __device__ int rows(uint32_t key, int shift) { return static_cast<int>(key >> id_bits << shift); }
};
static __host__ __device__ inline int shift_of(int64_t R) {
    int shift = 0;
    while (R >> shift >= 1 << 20) shift++;
    return shift;
}
static inline int power_of_two(int64_t n) {
    int p = 1;
    while (p < n) p *= 2;
    return p;
}
// A bitonic sort by all threads, largest first; n a power of two. 28 rounds for 128 experts, 78 for 4096: 1 and 8 us.
static __device__ void sort_descending(uint32_t *key, int n) {
    for (int run = 2; run <= n; run *= 2)
        for (int apart = run / 2; apart; apart /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < n / 2; i += PIPE_THREADS) {
                const int low = 2 * i - (i & (apart - 1)), high = low + apart;
                const uint32_t x = key[low], y = key[high];
                if ((x < y) == !(low & run)) key[low] = y, key[high] = x;
            }
        }
    __syncthreads();
}

// ---- the queue of a block -------------------------------------------------------------------------------------------
struct alignas(16) sums_tile {
    int e, begin, rows, tile;                   // rows begin .. begin + rows of expert e; e < 0: no more
};
// Barriers: full[slot] when its tile is written; empty[slot] when the loading thread and all that multiply have it.
// Behind a block's ring: barriers, tiles, what each block has to do so far, the experts in order.
template <class Tile>
struct sums_queue {
    static constexpr int slots = 4, dealers = 96, most_blocks = 2 * dealers;
    static constexpr int tiles_at = Tile::bytes + 2 * slots * 8, loads_at = tiles_at + slots * 16;
    static constexpr int keys_at = loads_at + most_blocks * 4;
    static_assert(tiles_at % 16 == 0 && loads_at % 16 == 0);
    static_assert(keys_at + MOE_MAX_EXPERTS * 4 <= BLOCK_BYTES);
    int      slot = 0;
    uint32_t lap = 0;

    static __device__ __forceinline__ float *loads() {
        return reinterpret_cast<float *>(shared_memory() + loads_at);
    }
    static __device__ __forceinline__ uint32_t *keys() {
        return reinterpret_cast<uint32_t *>(shared_memory() + keys_at);
    }
    __device__ __forceinline__ uint32_t full() const { return shared_u32(shared_memory()) + Tile::bytes + slot * 8; }
    __device__ __forceinline__ uint32_t empty() const { return full() + slots * 8; }
    __device__ __forceinline__ sums_tile *at() const {
        return reinterpret_cast<sums_tile *>(shared_memory() + tiles_at) + slot;
    }
    __device__ __forceinline__ void next() {
        if (++slot == slots) slot = 0, lap ^= 1;
    }
    __device__ void init() const {              // as pipe::init, before it
        if (threadIdx.x) return;
        for (sums_queue q; q.lap == 0; q.next()) {
            mbarrier_init(q.full(), 1);
            mbarrier_init(q.empty(), PIPE_WARPS + 1);
        }
    }
    __device__ void put(const sums_tile &tile) {
        mbarrier_wait(empty(), lap ^ 1);
        *at() = tile;
        mbarrier_arrive(full());
        next();
    }
    // By a whole warp, or by one thread where `alone`.
    template <bool alone>
    __device__ __forceinline__ sums_tile get() {
        mbarrier_wait(full(), lap);
        const sums_tile tile = *at();
        if (!alone) __syncwarp();
        if (alone || lane_id() == 0) mbarrier_arrive(empty());
        next();
        return tile;
    }
};

// What a tile costs besides its sums: an epilogue, in steps of 16 rows.
static constexpr int EXPOSED_STEPS = 12;

// By the 96 threads of warps 1 to 3, each of which keeps the account of two blocks.
template <class Tile, class T>
static __device__ void deal(const sums_job<T> &g, int shift) {
    using queue_of = sums_queue<Tile>;
    constexpr int dealers = queue_of::dealers;
    const int me = static_cast<int>(threadIdx.x) - 32, blocks = static_cast<int>(gridDim.x), hand = (blocks + 1) / 2;
    const int per_expert = g.down * g.across, tiles = g.E * per_expert;
    float *const load = queue_of::loads();
    const uint32_t *const keys = queue_of::keys();
    queue_of queue;
    float mine[2] = {0, 0};
    for (int u = 0; u < 2; u++)                 // no block beyond the grid is ever given anything
        load[me + u * dealers] = mine[u] = me + u * dealers < blocks ? 0 : INFINITY;
    sync_threads<1, dealers>();
    for (int first = 0; first < tiles; first += hand) {
        int rank[2] = {0, 0};
        for (int b = 0; b < blocks; b += 4) {
            const auto other = *reinterpret_cast<const vec16<float> *>(load + b);
#pragma unroll
            for (int v = 0; v < 4; v++)
#pragma unroll
                for (int u = 0; u < 2; u++)
                    rank[u] += other.v[v] < mine[u] || (other.v[v] == mine[u] && b + v < me + u * dealers);
        }
        sync_threads<1, dealers>();             // all have read the loads
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const int block = me + u * dealers, t = first + rank[u];
            if (block >= blocks || rank[u] >= hand || t >= tiles) continue;
            const uint32_t key = keys[t / per_expert];
            mine[u] += static_cast<float>((expert_key::rows(key, shift) + 15) / 16 + EXPOSED_STEPS);
            load[block] = mine[u];
            if (block != static_cast<int>(blockIdx.x)) continue;
            sums_tile tile = {expert_key::expert(key), 0, 0, t % per_expert};
            tile.rows = max32(0, rows_of(g.bins_E, g.R, tile.e, &tile.begin));
            queue.put(tile);
        }
        sync_threads<1, dealers>();
    }
    if (me == static_cast<int>(blockIdx.x) % dealers) queue.put({-1, 0, 0, 0});
}

// ---- loading --------------------------------------------------------------------------------------------------------
template <class Tile, class T>
static __device__ void load_tiles(const pipe<Tile> &ring, const sums_job<T> &g) {
    sums_queue<Tile> queue;
    ring_place<Tile> at;
    for (;;) {
        const sums_tile t = queue.template get<true>();
        if (t.e < 0) return;
        int i, j;
        swizzle(t.tile, g.down, g.across, g.group, &i, &j);
        for (int done = 0; done < t.rows; done += PIPE_DEPTH) {
            const int rest = t.rows - done, row = t.begin + done;
            ring.wait_empty(at);
            const uint32_t full = ring.full(at.stage);
            mbarrier_arrive_expect(full, Tile::stage_bytes);
            const auto load = [&](uint32_t to, int column, int width, const tensor_map &map, const tensor_map &end) {
#pragma unroll
                for (int w = 0; w < width; w += 64)
                    if (rest >= PIPE_DEPTH) tma_load(to + w * 128, &map, full, column + w, row);
                    else tma_load(to + w * 128, &end, full, column + w, PIPE_DEPTH - rest, row + rest);
            };
            load(ring.a(at.stage), i * Tile::tile_m, Tile::tile_m, g.a, g.a_end);
            load(ring.b(at.stage), j * Tile::tile_n, Tile::tile_n, g.b, g.b_end);
            at.next();
        }
    }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------
template <class Tile, class T>
__global__ void __launch_bounds__(PIPE_THREADS, 1)
sums_kernel(const __grid_constant__ sums_job<T> g, int keys, int shift) {
    using queue_of = sums_queue<Tile>;
    const pipe<Tile> ring;
    queue_of         queue;
    for (int e = threadIdx.x; e < keys; e += PIPE_THREADS) {
        int begin, rows = e < g.E ? rows_of(g.bins_E, g.R, e, &begin) : 0;
        if (rows < 0 && blockIdx.x == 0) g.bad(MOE_BAD_BINS, e);
        queue_of::keys()[e] = e < g.E ? expert_key::of(max32(0, rows), shift, e) : 0;
    }
    queue.init();
    ring.init(1);
    sort_descending(queue_of::keys(), keys);

    if (warp_id() < PIPE_LOADERS / 32) {
        fewer_registers<Tile::loader_registers>();
        if (threadIdx.x == 0) load_tiles(ring, g);
        else if (warp_id() > 0) deal<Tile>(g, shift);
        return;
    }
    more_registers<Tile::registers>();
    const int first_row = (warp_id() / 4 - 1) * Tile::group_m;
    ring_place<Tile> at;
    for (;;) {
        const sums_tile t = queue.template get<false>();
        if (t.e < 0) return;
        const int steps = (t.rows + PIPE_DEPTH - 1) / PIPE_DEPTH, last = t.rows - (steps - 1) * PIPE_DEPTH;
        tile_sums<Tile, T, false, false> sums;
        float c[Tile::slices][Tile::tile_n / 2];
        sums.begin(ring, at, first_row, steps, c, (last + 15) / 16);
        sums.end(ring, steps, c);
        int i, j;
        swizzle(t.tile, g.down, g.across, g.group, &i, &j);
        j *= Tile::tile_n;
#pragma unroll
        for (int s = 0; s < Tile::slices; s++) {
            const int row = i * Tile::tile_m + first_row + s * 64 + warp_id() % 4 * AREA_ROWS;
            if (row >= g.M) continue;
            T *const to = static_cast<T *>(g.dw.p) + t.e * g.dw.se + row * g.dw.sr + j;
#pragma unroll
            for (int n = 0; n < Tile::tile_n; n += AREA_COLUMNS)
                store_rows16(ring.area(), c[s] + n / 2, to + n, g.dw.sr, g.M - row, g.N - j - n);
        }
    }
}

// ---- who may come, and the launch -----------------------------------------------------------------------------------
template <class T>
static bool operand_takes(const gemm_operand<T> &x) {       // TMA: strides below 2^40 bytes
    return !x.index && gemm_vector(x, false, 1) && x.sk > 0 && x.sk < 1ll << 38;
}
template <class T>
bool sums_sm90_takes(const gemm_product<T> &g, moe_mat dw) {
    constexpr int64_t most = INT32_MAX - 1024;              // coordinates are 32 bits wide, with room for a tile
    return g.R >= 1 && g.M >= 1 && g.N >= 1 && g.E >= 1 && g.E <= MOE_MAX_EXPERTS && g.R <= most && g.M <= most &&
           g.N <= most && g.N % 8 == 0 && operand_takes(g.a[0]) && operand_takes(g.b[0]) && dw.sc == 1 &&
           aligned16(dw.p) && dw.sr % 8 == 0 && (g.E == 1 || dw.se % 8 == 0) &&
           ceil_div(g.M, 128) * ceil_div(g.N, 128) < INT32_MAX / 2 / g.E;
}

// The rows of x, and those that end where the third coordinate says.
template <class T>
static int encode(const gemm_operand<T> &x, int64_t R, int64_t columns, tensor_map *map, tensor_map *end) {
    const int64_t size[] = {columns, R}, row = x.sk * 2, size_end[] = {columns, PIPE_DEPTH, R + 1}, rows[] = {row, row};
    const int     box[] = {64, PIPE_DEPTH, 1};
    const auto    before = reinterpret_cast<uintptr_t>(x.p) - static_cast<uintptr_t>(PIPE_DEPTH * row);
    TRY(encode_tensor_map(map, dtype_of(T{}), x.p, 2, size, rows, box));
    return encode_tensor_map(end, dtype_of(T{}), reinterpret_cast<const void *>(before), 3, size_end, rows, box);
}
template <class Tile, class T>
static int launch_sums(const gemm_product<T> &g, moe_mat dw, cudaStream_t stream) {
    const int forced = forced_group();
    sums_job<T> job = {
        static_cast<int>(g.R), static_cast<int>(g.E), static_cast<int>(g.M), static_cast<int>(g.N),
        static_cast<int>(ceil_div(g.M, Tile::tile_m)), static_cast<int>(ceil_div(g.N, Tile::tile_n)),
        forced ? forced : sm90_group(Tile::tile_n, g.R / g.E, multiprocessors(), l2_bytes()), g.bins_E, dw, g.bad,
        {}, {}, {}, {},
    };
    TRY(encode(g.a[0], g.R, g.M, &job.a, &job.a_end));
    TRY(encode(g.b[0], g.R, g.N, &job.b, &job.b_end));
    const int     keys = power_of_two(g.E);
    const int64_t grid = min64(g.E * job.down * job.across, min64(multiprocessors(), sums_queue<Tile>::most_blocks));
    return launch(sums_kernel<Tile, T>, grid, PIPE_THREADS, sums_queue<Tile>::keys_at + keys * sizeof(uint32_t),
                  stream, job, keys, shift_of(g.R));
}
template <class T>
int sums_sm90(const gemm_product<T> &g, moe_mat dw, cudaStream_t stream) {
    const int wanted = forced_way();
    const moe_way way = wanted == MOE_SM90_128x256 || wanted == MOE_SM90_128x128
                            ? static_cast<moe_way>(wanted) : sm90_sums_way(g.R, g.E, g.M, g.N, multiprocessors());
    count_product(way);
    return way == MOE_SM90_128x256 ? launch_sums<wide_tile>(g, dw, stream) : launch_sums<narrow_tile>(g, dw, stream);
}
#define INSTANCES(T) \
    template bool sums_sm90_takes(const gemm_product<T> &, moe_mat); \
    template int sums_sm90(const gemm_product<T> &, moe_mat, cudaStream_t);
INSTANCES(bf16) INSTANCES(f16)
#undef INSTANCES
