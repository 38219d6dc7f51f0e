// pipe_sm90.cuh: what the products on Hopper have in common: the ring of panels between the warps that load and those
// that multiply, the sums of a tile, and the way of its rows from registers to memory.
//
// A block is three warpgroups, one block a multiprocessor. Warpgroup 0 loads: a stage of the ring holds a panel of A
// and one of B, PIPE_DEPTH deep in the sum, in 128-byte swizzle. Warpgroups 1 and 2 multiply, by one of two schedules:
//   together   each half the rows of every tile                  long sums: the widest tile reads the least
//   by turns   each every second tile of the block               short sums: the rows of one tile leave while the other
//                                                                warpgroup multiplies
// A panel is boxes of 64 lines of 128 bytes: along k 64 rows (or columns) of c after the other, along i 64 elements of
// the sum for every 64 rows (or columns).
//
// Barriers   full[stage]    its panels have landed: the loading threads arrive, TMA counts its bytes
//            empty[stage]   the warps that multiply it have read it: one arrival each
//            turn[group]    by turns: the other warpgroup has asked for all stages of its tile, so the tensor cores are
//                           this one's. To be passed before the first full stage of a tile is waited for: who waits
//                           while the other is still a lap behind takes the parity of an older lap for its own.
#ifndef MOE_PIPE_SM90_CUH
#define MOE_PIPE_SM90_CUH
#include "common.cuh"
#include "ptx_sm90.cuh"

static constexpr int PIPE_THREADS = 384, PIPE_LOADERS = 128, PIPE_WARPS = 8, PIPE_DEPTH = 64, PIPE_BOX = 64 * 128;
static constexpr int AREA_ROWS = 16, AREA_COLUMNS = 64, AREA_BYTES = AREA_ROWS * AREA_COLUMNS * 2;  // of a warp's rows
static constexpr int BLOCK_BYTES = 227 * 1024;      // of shared memory, at most

static constexpr int dtype_of(bf16) { return MOE_BF16; }
static constexpr int dtype_of(f16) { return MOE_F16; }

// A tile of m x n by one of the schedules. Registers: of each thread that loads and that multiplies, together 504.
template <int m, int n, int stages_, bool by_turns_, int loader_registers_>
struct pipe_tile {
    static constexpr int  tile_m = m, tile_n = n, stages = stages_;
    static constexpr bool by_turns = by_turns_;
    static constexpr int  loader_registers = loader_registers_, registers = (504 - loader_registers) / 2;
    static constexpr int  group_m = by_turns ? m : m / 2, slices = group_m / 64;    // of a warpgroup: rows, in 64s
    static constexpr int  pieces = slices * n > 256 ? 1 : 4;        // of store_rows16 at once: registers that c leaves
    static constexpr int  a_bytes = m * 128, b_bytes = n * 128, stage_bytes = a_bytes + b_bytes;
    static constexpr int  areas_at = stages * stage_bytes, barriers_at = areas_at + PIPE_WARPS * AREA_BYTES;
    static constexpr int  bytes = barriers_at + (2 * stages + 2) * 8;       // more may follow
};

// Where a thread is in the ring: the stage, and the parity of the lap.
template <class Tile>
struct ring_place {
    int      stage = 0;
    uint32_t lap = 0;

    __device__ __forceinline__ void next() {
        if (++stage == Tile::stages) stage = 0, lap ^= 1;
    }
    __device__ __forceinline__ void skip(int n) {
        stage += n;
        lap ^= static_cast<uint32_t>(stage / Tile::stages) & 1;
        stage %= Tile::stages;
    }
};

template <class Tile>
struct pipe {
    uint32_t base = shared_u32(shared_memory());

    __device__ __forceinline__ uint32_t a(int stage) const { return base + stage * Tile::stage_bytes; }
    __device__ __forceinline__ uint32_t b(int stage) const { return a(stage) + Tile::a_bytes; }
    __device__ __forceinline__ uint32_t full(int stage) const { return base + Tile::barriers_at + stage * 8; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return full(Tile::stages + stage); }
    __device__ __forceinline__ uint32_t turn(int group) const { return full(2 * Tile::stages + group); }
    // Of this warp, which multiplies.
    __device__ __forceinline__ unsigned char *area() const {
        return shared_memory() + Tile::areas_at + (warp_id() - PIPE_LOADERS / 32) * AREA_BYTES;
    }

    // By all threads, before a __syncthreads(). loads: arrivals that make a stage full.
    __device__ void init(int loads) const {
        if (threadIdx.x) return;
        for (int stage = 0; stage < Tile::stages; stage++) {
            mbarrier_init(full(stage), loads);
            mbarrier_init(empty(stage), Tile::by_turns ? PIPE_WARPS / 2 : PIPE_WARPS);
        }
        for (int group = 0; group < 2; group++) mbarrier_init(turn(group), PIPE_WARPS / 2);
        fence_mbarrier_init();
    }
    __device__ __forceinline__ void wait_empty(const ring_place<Tile> &at) const {
        mbarrier_wait(empty(at.stage), at.lap ^ 1);
    }
    __device__ __forceinline__ void arrive(uint32_t barrier) const {        // once a warp, after all its lanes
        __syncwarp();
        if (lane_id() == 0) mbarrier_arrive(barrier);
    }
};

// ---- the sums of a tile ---------------------------------------------------------------------------------------------
// c[i] = sums of rows first_row + 64 i .. of the tile, all its columns, over `steps` stages from `at` on, in the layout
// of wgmma; of the last stage, over its first `last_pieces` times 16. begin returns while the last product runs: c is
// not to be touched before end. Without a step they are zeros.
template <class Tile, class T, bool a_along_k, bool b_along_k>
struct tile_sums {
    static constexpr int all_pieces = PIPE_DEPTH / 16;
    using sums = float[Tile::slices][Tile::tile_n / 2];
    int last = 0;                       // the stage whose product runs

    // No branch may stand between products that are asked for together: `pieces` is a constant.
    template <int pieces>
    __device__ __forceinline__ void multiply(const pipe<Tile> &ring, ring_place<Tile> &at, int first_row, int step,
                                             sums &c) {
        constexpr int a_step = (a_along_k ? 32 : 16 * 128) >> 4, b_step = (b_along_k ? 32 : 16 * 128) >> 4;
        mbarrier_wait(ring.full(at.stage), at.lap);
        const uint64_t a = wgmma_operand(ring.a(at.stage) + first_row * 128), b = wgmma_operand(ring.b(at.stage));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < pieces; k++)
#pragma unroll
            for (int i = 0; i < Tile::slices; i++)
                wgmma<Tile::tile_n, a_along_k, b_along_k>(T{}, c[i], a + (i * (PIPE_BOX >> 4) + k * a_step),
                                                          b + k * b_step, (step | k) != 0);
        wgmma_commit();
        if (step) {                     // one product runs while the next is asked for
            wgmma_wait<1>();
            ring.arrive(ring.empty(last));
        }
        last = at.stage;
        at.next();
    }
    __device__ __forceinline__ void begin(const pipe<Tile> &ring, ring_place<Tile> &at, int first_row, int steps,
                                          sums &c, int last_pieces = all_pieces) {
        const int whole = last_pieces == all_pieces ? steps : steps - 1;
#pragma unroll 1
        for (int step = 0; step < whole; step++) multiply<all_pieces>(ring, at, first_row, step, c);
        switch (last_pieces) {
        case 1: multiply<1>(ring, at, first_row, whole, c); break;
        case 2: multiply<2>(ring, at, first_row, whole, c); break;
        case 3: multiply<3>(ring, at, first_row, whole, c); break;
        }
    }
    __device__ __forceinline__ void end(const pipe<Tile> &ring, int steps, sums &c) const {
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < Tile::slices; i++) {
            wgmma_pin(c[i]);
            if (steps == 0)
#pragma unroll
                for (int v = 0; v < Tile::tile_n / 2; v++) c[i][v] = 0;
        }
        if (steps) ring.arrive(ring.empty(last));
    }
};

// ---- rows to memory -------------------------------------------------------------------------------------------------
__extension__ typedef unsigned __int128 bytes16;        // moved as one, where a struct may come apart

// 64 columns of a warp's 16 rows, x[4 i + v] as wgmma leaves them: row lane/4 + 8 (v/2), column 8 i + 2 (lane%4) + v%2.
// They go through the area, so that eight lanes write 128 bytes of a row. The first `rows` rows and `columns` columns,
// a multiple of 8, are stored; `to` and the rows' stride are multiples of 16 bytes. By all lanes, of which each has
// at_once pieces under way.
template <int at_once = 4, class T>
static __device__ __forceinline__ void store_rows16(unsigned char *area, const float *x, T *to, int64_t stride,
                                                    int rows, int columns) {
    const int lane = lane_id(), row = lane & 15, half = lane >> 4;      // of stmatrix: chunk 2 i + half of this row
    const uint32_t line = shared_u32(area) + row * 128;
    __syncwarp();                                                       // the area's last rows have been read
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *const v = x + 8 * i;
        stmatrix_x4(line + (((2 * i + half) ^ (row & 7)) << 4), pack2(T{}, v[0], v[1]), pack2(T{}, v[2], v[3]),
                    pack2(T{}, v[4], v[5]), pack2(T{}, v[6], v[7]));
    }
    __syncwarp();
    const int chunk = lane & 7, first = lane >> 3;
    T *place = to + first * stride + chunk * 8;
    rows = chunk * 8 < columns ? rows - first : 0;
#pragma unroll
    for (int i = 0; i < 4; i += at_once) {
        bytes16 piece[at_once];
#pragma unroll
        for (int u = 0; u < at_once; u++) {
            const int r = first + 4 * (i + u);
            piece[u] = *reinterpret_cast<const bytes16 *>(area + r * 128 + ((chunk ^ (r & 7)) << 4));
        }
#pragma unroll
        for (int u = 0; u < at_once; u++, place += 4 * stride)
            if (4 * (i + u) < rows) *reinterpret_cast<bytes16 *>(place) = piece[u];
    }
}
#endif
