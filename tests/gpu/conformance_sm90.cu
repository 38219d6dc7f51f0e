// conformance_sm90.cu: as conformance.cu, for the instructions of ptx_sm90.cuh. On another device than Hopper: {}.
#include <cuda.h>

#include "conformance.cuh"
#include "../../cuda/ptx_sm90.cuh"

enum { ROWS = 70, COLUMNS = 128, BEFORE = 64, THREADS = 128, SHARED = 65 * 1024 };
struct maps {
    tensor_map rows, panels, tail;      // boxes of 32 rows of 64 columns; of 16 rows of two times 64; of 64 rows of 64,
                                        // the last one before row z
};

// Small numbers, exact in 16 bits.
static __device__ inline int number(int i) { return static_cast<int>(bits_of(static_cast<uint32_t>(i)) >> 7 & 15) - 8; }
static __device__ inline uint32_t at(int offset) { return shared_u32(shared_memory()) + static_cast<uint32_t>(offset); }
static __device__ inline uint32_t barrier(int i) { return at(64 * 1024 + 8 * i); }
static __device__ void start(int arrivals) {
    for (int i = threadIdx.x; i < 64 * 256; i += blockDim.x)
        reinterpret_cast<uint32_t *>(shared_memory())[i] = 0xabababab;
    fence_async();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) mbarrier_init(barrier(i), arrivals);
        fence_mbarrier_init();
    }
    __syncthreads();
}
// Shared memory as it lies there.
static __device__ void show(uint32_t *out, int words) {
    for (int i = threadIdx.x; i < words; i += blockDim.x) out[i] = reinterpret_cast<uint32_t *>(shared_memory())[i];
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------
// What a thread is told of both parities, after each arrival and each landing.
static __global__ void mbarrier_phases(const __grid_constant__ maps m, uint32_t *out, int) {
    start(2);
    if (threadIdx.x) return;
    int i = 0;
    const auto ask = [&] {
        for (uint32_t parity = 0; parity < 2; parity++) out[i++] = mbarrier_try_wait(barrier(0), parity) ? 1 : 2;
    };
    for (int phase = 0; phase < 3; phase++) {
        ask();
        mbarrier_arrive(barrier(0));
        ask();
        mbarrier_arrive(barrier(0));
        ask();
    }
    mbarrier_arrive_expect(barrier(0), 64 * 32 * 2);
    mbarrier_arrive(barrier(0));
    ask();
    tma_load(at(0), &m.rows, barrier(0), 0, 0);
    mbarrier_wait(barrier(0), 1);
    ask();
    tma_load(at(4096), &m.rows, barrier(1), 0, 0);          // bytes that land before they are expected
    mbarrier_arrive(barrier(1));
    mbarrier_arrive_expect(barrier(1), 64 * 32 * 2);
    mbarrier_wait(barrier(1), 0);
    out[i] = 1;
}

// ---- TMA ------------------------------------------------------------------------------------------------------------
// Boxes that leave the matrix on every side, by negative coordinates too, at addresses that swizzle differently.
static __global__ void tma_boxes(const __grid_constant__ maps m, uint32_t *out, int words) {
    start(1);
    if (threadIdx.x == 0) {
        const int corners[7][2] = {{0, 0}, {64, 10}, {-3, -5}, {100, 50}, {101, -31}, {-64, 0}, {1 << 30, -(1 << 30)}};
        mbarrier_arrive_expect(barrier(0), 7 * 4096);
        for (int i = 0; i < 7; i++)
            tma_load(at(i * 4096 + (i + 4) % 8 * 128), &m.rows, barrier(0), corners[i][0], corners[i][1]);
    }
    mbarrier_wait(barrier(0), 0);
    __syncthreads();
    show(out, words);
}
static __global__ void tma_panels(const __grid_constant__ maps m, uint32_t *out, int words) {
    start(1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), 3 * 4096 + 3 * 16384);
        tma_load(at(0), &m.panels, barrier(0), 0, 8, 0);
        tma_load(at(4096), &m.panels, barrier(0), 0, 60, 1);
        tma_load(at(8192), &m.panels, barrier(0), 5, -9, -1);
        for (int i = 0; i < 2; i++) {
            tma_load(at(16384 + i * 8192), &m.tail, barrier(0), i * 64, 40, 50);        // rows 26 .. 49, then zeros
            tma_load(at(32768 + i * 8192), &m.tail, barrier(0), 64 + i * 64, 0, 70);    // rows 6 .. 69, and no columns
            tma_load(at(49152 + i * 8192), &m.tail, barrier(0), i * 64, 63, 1);         // row 0
        }
    }
    mbarrier_wait(barrier(0), 0);
    __syncthreads();
    show(out, words);
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------
// Two products of 16 terms at steps of 16 along the sum, the second added to the first, of operands of small numbers
// that lie in swizzled lines of 64: those of a, then those of b.
template <class T, int n, bool a_along_k, bool b_along_k>
static __global__ void products(const __grid_constant__ maps, uint32_t *out, int) {
    start(1);
    const int t = threadIdx.x, B = 8192;
    for (int i = t; i < (64 + 256) * 64; i += THREADS) {
        const int line = i / 64, place = (line * 128 + i % 64 * 2) ^ (line % 8 * 16);
        *reinterpret_cast<uint16_t *>(shared_memory() + place) = from_float<T>(static_cast<float>(number(i))).bits;
    }
    fence_async();
    __syncthreads();
    float d[n / 2];
    wgmma_fence();
    for (int k = 16; k < 64; k += 32)
        wgmma<n, a_along_k, b_along_k>(T{}, d, wgmma_operand(at((a_along_k ? 2 : 128) * k)),
                                       wgmma_operand(at(B + (b_along_k ? 2 : 128) * k)), k > 16);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(d);
#pragma unroll
    for (int i = 0; i < n / 2; i++) out[t * (n / 2) + i] = static_cast<uint32_t>(static_cast<int32_t>(d[i]));
}

// ---- the rest -------------------------------------------------------------------------------------------------------
static __global__ void stmatrix(const __grid_constant__ maps, uint32_t *out, int words) {
    start(1);
    const int l = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t row = at(warp * 1024 + (l * 37 + 11) % 64 * 16);
    const uint32_t i = threadIdx.x;
    stmatrix_x4(row, bits_of(i), bits_of(i + 128), bits_of(i + 256), bits_of(i + 384));
    __syncthreads();
    show(out, words);
}
static __global__ void pairs(const __grid_constant__ maps, uint32_t *out, int words) {
    for (int i = threadIdx.x; i < words / 2; i += THREADS) {
        const float low = __uint_as_float(bits_of(2 * i) & 0xbfffffffu);
        const float high = __uint_as_float(bits_of(2 * i + 1) & 0xbfffffffu);
        out[2 * i] = pack2(bf16{}, low, high), out[2 * i + 1] = pack2(f16{}, low, high);
    }
}
// Three warpgroups share out the registers, and meet in pairs.
static __global__ void __launch_bounds__(384, 1) registers(const __grid_constant__ maps, uint32_t *out, int) {
    auto *shared = reinterpret_cast<uint32_t *>(shared_memory());
    const int t = threadIdx.x, group = t / 128;
    if (group == 0) fewer_registers<40>();
    else more_registers<232>();
    shared[t] = bits_of(t);
    if (group < 2) sync_threads<1, 256>();
    if (group) sync_threads<2, 256>();
    out[t] = group ? shared[t - 128] : shared[t];
}

// ---- the list -------------------------------------------------------------------------------------------------------
static const struct { test t; void (*kernel)(maps, uint32_t *, int); } TESTS[] = {
    {{"mbarrier phases", 64, 1, THREADS, SHARED}, mbarrier_phases},
    {{"TMA boxes", 8 * 1024, 1, THREADS, SHARED}, tma_boxes},
    {{"TMA panels and tails", 16 * 1024, 1, THREADS, SHARED}, tma_panels},
    {{"wgmma bf16 n64, both along k", 64 * 64, 1, THREADS, SHARED}, products<bf16, 64, true, true>},
    {{"wgmma bf16 n128, b along i", 64 * 128, 1, THREADS, SHARED}, products<bf16, 128, true, false>},
    {{"wgmma bf16 n192, a along i", 64 * 192, 1, THREADS, SHARED}, products<bf16, 192, false, true>},
    {{"wgmma bf16 n256, both along i", 64 * 256, 1, THREADS, SHARED}, products<bf16, 256, false, false>},
    {{"wgmma f16 n256, both along k", 64 * 256, 1, THREADS, SHARED}, products<f16, 256, true, true>},
    {{"wgmma f16 n192, both along i", 64 * 192, 1, THREADS, SHARED}, products<f16, 192, false, false>},
    {{"stmatrix", 1024, 1, THREADS, SHARED}, stmatrix},
    {{"pairs of 16 bits", 1 << 14, 1, THREADS, 0}, pairs},
    {{"registers", 384, 1, 384, 1536}, registers},
};

static bool encode(tensor_map *map, void *base, cuuint32_t rank, const cuuint64_t *size, const cuuint64_t *stride,
                   const cuuint32_t *box) {
    void *f = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found) || !f)
        return false;
    const auto encoder = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f);
    const cuuint32_t every[5] = {1, 1, 1, 1, 1};
    return encoder(reinterpret_cast<CUtensorMap *>(map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, base, size, stride,
                   box,
                   every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
static bool encode_all(maps *m, uint16_t *x) {
    uint16_t *const x_RC = x + BEFORE * COLUMNS;
    const cuuint64_t row = COLUMNS * 2, of_panels[] = {row, row / 2}, of_tail[] = {row, row};
    const cuuint64_t rows[] = {COLUMNS, ROWS}, panels[] = {64, ROWS, 2}, tail[] = {COLUMNS, 64, ROWS + 1};
    const cuuint32_t row_box[] = {64, 32}, panel_box[] = {64, 16, 2}, tail_box[] = {64, 64, 1};
    return encode(&m->rows, x_RC, 2, rows, of_panels, row_box) &&
           encode(&m->panels, x_RC, 3, panels, of_panels, panel_box) && encode(&m->tail, x, 3, tail, of_tail, tail_box);
}

int main() {
    int major = 0, minor = 0;
    if (cuda_status(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "the device")) return 1;
    if (cuda_status(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "the device")) return 1;
    if (major != 9 || minor != 0) {
        fprintf(stderr, "left out: the instructions of compute capability 9.0, this device has %d.%d\n", major, minor);
        printf("{}\n");
        return 0;
    }
    const int n = (BEFORE + ROWS) * COLUMNS;
    static uint16_t x[n];
    for (int i = 0; i < n; i++) x[i] = static_cast<uint16_t>(bits_of(static_cast<uint32_t>(i)));
    void *memory;
    maps m;
    if (cuda_status(cudaMalloc(&memory, sizeof x), "cudaMalloc")) return 1;
    if (cuda_status(cudaMemcpyAsync(memory, x, sizeof x, cudaMemcpyDefault, nullptr), "cudaMemcpyAsync")) return 1;
    if (!encode_all(&m, static_cast<uint16_t *>(memory))) { fprintf(stderr, "a tensor map was refused\n"); return 1; }
    for (const auto &[t, kernel] : TESTS)
        if (!print_hash(t, kernel, m)) return 1;
    printf("\n}\n");
    return 0;
}
