// toy_sm90.cu: as toy.cu, with Hopper's instructions: a block of one warpgroup or two, out[i] = i + 1 for i < 128.
#include <cuda.h>
#include <cuda_runtime.h>

#include "../../cuda/ptx_sm90.cuh"

namespace {
enum { N = 128, ROWS = 70, COLUMNS = 128, BEFORE = 64, SHARED = 65 * 1024 };

// x_RC, behind 64 rows that no box is to bring: NaN.
uint16_t memory[BEFORE + ROWS][COLUMNS] __attribute__((aligned(128)));
struct maps {
    tensor_map rows, panels, tail;      // boxes of 32 rows; of 16 rows and all columns; of 64, the last one before row z
};

__device__ int number(int r, int c) {
    return r < 0 || r >= ROWS || c < 0 || c >= COLUMNS ? 0 : (5 * r + 3 * c) % 7 - 3;
}
__device__ float value(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
// Element c of line r in 128-byte swizzle.
__device__ uint16_t &element(int at, int r, int c) {
    const uint32_t offset = static_cast<uint32_t>(at + r * 128 + c * 2);
    const uint32_t chunk = shared_u32(shared_memory() + offset) >> 7 & 7;
    return *reinterpret_cast<uint16_t *>(shared_memory() + (offset ^ chunk << 4));
}
__device__ uint32_t at(int offset) { return shared_u32(shared_memory()) + static_cast<uint32_t>(offset); }
// An mbarrier of so many arrivals behind the first 64 KiB.
__device__ uint32_t barrier(int i) { return at(64 * 1024 + 8 * i); }
__device__ void start(int arrivals, int n = 1) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < n; i++) mbarrier_init(barrier(i), arrivals);
        fence_mbarrier_init();
    }
    __syncthreads();
}
__device__ void finish(float *out, float error = 0) {
    if (threadIdx.x < N) out[threadIdx.x] = static_cast<float>(threadIdx.x + 1) + error;
}
__device__ float &word(int i) { return reinterpret_cast<float *>(shared_memory())[i]; }

#define TOY(name) template <bool bad> __global__ void name([[maybe_unused]] const __grid_constant__ maps m, float *out)

// ---- mbarriers ------------------------------------------------------------------------------------------------------
TOY(init_without_fence) {
    if (threadIdx.x == 0) {
        mbarrier_init(barrier(0), N);
        if (!bad) fence_mbarrier_init();
    }
    __syncthreads();
    mbarrier_arrive(barrier(0));
    mbarrier_wait(barrier(0), 0);
    finish(out);
}
TOY(init_without_syncthreads) {
    if (threadIdx.x == 0) mbarrier_init(barrier(0), N), fence_mbarrier_init();
    if (!bad) __syncthreads();
    mbarrier_arrive(barrier(0));
    finish(out);
}
TOY(init_twice) {
    start(1);
    if (threadIdx.x == 5) mbarrier_init(barrier(bad ? 0 : 1), 1), fence_mbarrier_init();
    __syncthreads();
    finish(out);
}
TOY(init_at_4) {
    if (threadIdx.x == 0) mbarrier_init(barrier(0) + (bad ? 4 : 8), 1), fence_mbarrier_init();
    __syncthreads();
    finish(out);
}
TOY(no_init) {
    start(1);
    if (threadIdx.x == 9) mbarrier_arrive(barrier(bad ? 1 : 0));
    finish(out);
}
TOY(arrival_too_many) {
    start(N + 1);
    mbarrier_arrive(barrier(0));
    if (threadIdx.x == 0) mbarrier_arrive_expect(barrier(0), 16);     // so that the phase does not end
    if (bad && threadIdx.x == 0) mbarrier_arrive(barrier(0));
    finish(out);
}
TOY(arrival_missing) {
    start(2);
    if (threadIdx.x < (bad ? 1 : 2)) mbarrier_arrive(barrier(0));
    mbarrier_wait(barrier(0), 0);
    finish(out);
}
TOY(overwritten) {
    start(1);
    if (threadIdx.x == 5) word(64 * 256 + (bad ? 1 : 2)) = 0;
    __syncthreads();
    if (threadIdx.x == 0) mbarrier_arrive(barrier(0));
    finish(out);
}
// The other half waits for what the first half wrote.
TOY(wait_missing) {
    start(N / 2);
    const int t = threadIdx.x;
    if (t >= N / 2) {
        word(t) = static_cast<float>(t + 1);
        mbarrier_arrive(barrier(0));
        out[t] = static_cast<float>(t + 1);
    } else {
        if (!bad) mbarrier_wait(barrier(0), 0);
        out[t] = word(t + N / 2) - N / 2;
    }
}
TOY(arrives_before_it_writes) {
    start(N);
    const int t = threadIdx.x;
    if (bad) mbarrier_arrive(barrier(0));
    word(t) = static_cast<float>(t + 1);
    if (!bad) mbarrier_arrive(barrier(0));
    while (!mbarrier_try_wait(barrier(0), 0)) {}
    out[t ^ 32] = word(t ^ 32);
}
// Thread 0 ends phases that the others have not seen.
TOY(lapped) {
    start(1, 2);
    if (threadIdx.x == 0)
        for (int i = 0; i < 3; i++) {
            mbarrier_arrive(barrier(0));
            if (!bad) mbarrier_wait(barrier(1), i & 1);
        }
    else if (threadIdx.x >= 32)
        for (int i = 0; i < 3; i++) {
            mbarrier_wait(barrier(0), i & 1);
            sync_threads<1, 96>();
            if (threadIdx.x == 32) mbarrier_arrive(barrier(1));
        }
    finish(out);
}
// A turn of the ring ahead: the old phase's end is taken for the new one's.
TOY(a_turn_ahead) {
    start(1);
    if (threadIdx.x == 0) mbarrier_arrive(barrier(0));
    mbarrier_wait(barrier(0), 0);
    __syncthreads();
    if (!bad) {
        if (threadIdx.x == 0) mbarrier_arrive(barrier(0));
        mbarrier_wait(barrier(0), 1);
        __syncthreads();
    }
    if (!bad && threadIdx.x == 0) mbarrier_arrive(barrier(0));
    mbarrier_wait(barrier(0), 0);
    finish(out);
}
// What cp.async brings is there when the barrier says so, and not before.
TOY(copies_not_awaited) {
    start(N);
    const int t = threadIdx.x;
    const uint16_t *from = &memory[BEFORE + t / 2][t % 2 * 8];
    cp_async_16(at(16 * t), from, 16);
    cp_async_commit();
    if (!bad) cp_async_wait<0>();
    mbarrier_arrive(barrier(0));
    mbarrier_wait(barrier(0), 0);
    const int o = t ^ 32;
    const uint16_t got = reinterpret_cast<const uint16_t *>(shared_memory())[8 * o];
    finish(out, value(got) - static_cast<float>(number(o / 2, o % 2 * 8)));
}

// ---- TMA ------------------------------------------------------------------------------------------------------------
enum { BOX = 64 * 32 * 2 };
__device__ float compare(int at, int rows, int row, int column) {      // its column of the box of x that begins there
    const int c = threadIdx.x % 64;
    float error = 0;
    for (int r = 0; r < rows; r++)
        error += fabsf(value(element(at, r, c)) - static_cast<float>(number(row + r, column + c)));
    return error;
}
// Boxes that leave the matrix on every side, at an address that swizzles otherwise; the wrong one forgets to wait.
TOY(load_not_awaited) {
    start(1);
    const int corners[4][2] = {{-3, -5}, {100, 50}, {100, -40}, {0, 10}};
    float error = 0;
    for (int i = 0; i < 4; i++) {
        const int to = 384 + i * 8192;
        if (threadIdx.x == 0) {
            tma_load(at(to), &m.rows, barrier(0), corners[i][0], corners[i][1]);
            mbarrier_arrive_expect(barrier(0), BOX);
        }
        if (!bad) mbarrier_wait(barrier(0), i & 1);
        __syncthreads();
        error += compare(to, 32, corners[i][1], corners[i][0]);
    }
    finish(out, error);
}
TOY(load_swizzled) {
    start(1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), 2 * 64 * 16 * 2);
        tma_load(at(0), &m.panels, barrier(0), 0, 60, 0);
    }
    mbarrier_wait(barrier(0), 0);
    const int t = threadIdx.x;
    float error = 0;
    for (int r = 0; r < 16; r++) {
        const uint16_t plain = reinterpret_cast<const uint16_t *>(shared_memory())[t / 64 * 1024 + r * 64 + t % 64];
        error += fabsf(value(bad ? plain : element(t / 64 * 2048, r, t % 64)) - static_cast<float>(number(60 + r, t)));
    }
    finish(out, error);
}
// The last 24 rows before row 50, and zeros behind them.
TOY(tail) {
    start(1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), 2 * 64 * 64 * 2);
        for (int c = 0; c < 128; c += 64) tma_load(at(c * 128), &m.tail, barrier(0), c, 40, bad ? 49 : 50);
    }
    mbarrier_wait(barrier(0), 0);
    float error = 0;
    for (int r = 0; r < 64; r++)
        error += fabsf(value(element(threadIdx.x / 64 * 8192, r, threadIdx.x % 64)) -
                       static_cast<float>(r < 24 ? number(26 + r, threadIdx.x) : 0));
    finish(out, error);
}
template <int to, int bytes, int rank>
__device__ void load_one(const maps &m, const tensor_map *map) {
    start(1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), bytes);
        if (rank == 2) tma_load(at(to), map, barrier(0), 0, 0);
        else tma_load(at(to), &m.rows, barrier(0), 0, 0, 0);
    }
    mbarrier_wait(barrier(0), 0);
}
TOY(expects_too_little) { load_one<0, bad ? BOX - 128 : BOX, 2>(m, &m.rows); finish(out); }
TOY(expects_too_much) { load_one<0, bad ? BOX + 128 : BOX, 2>(m, &m.rows); finish(out); }
TOY(load_to_64) { load_one<bad ? 64 : 128, BOX, 2>(m, &m.rows); finish(out); }
TOY(load_beyond) { load_one<bad ? 62 * 1024 : 60 * 1024, BOX, 2>(m, &m.rows); finish(out); }
TOY(load_of_another_rank) { load_one<0, BOX, bad ? 3 : 2>(m, &m.rows); finish(out); }
TOY(no_map) {
    tensor_map map = m.rows;
    if (bad) map.word[3]++;
    load_one<0, BOX, 2>(m, &map);
    finish(out);
}
TOY(load_left_alone) {
    start(1);
    if (threadIdx.x == 0) mbarrier_arrive_expect(barrier(0), BOX), tma_load(at(0), &m.rows, barrier(0), 0, 0);
    if (!bad) mbarrier_wait(barrier(0), 0);
    finish(out);
}
// A ring of one stage; the wrong producer does not wait until it is empty.
TOY(refilled_early) {
    if (threadIdx.x == 0) mbarrier_init(barrier(0), 1), mbarrier_init(barrier(1), 4), fence_mbarrier_init();
    __syncthreads();
    float error = 0;
    for (int i = 0; i < 3; i++) {
        if (threadIdx.x == 0) {
            if (!bad) mbarrier_wait(barrier(1), i & 1 ? 0 : 1);
            mbarrier_arrive_expect(barrier(0), BOX);
            tma_load(at(0), &m.rows, barrier(0), 0, 16 * i);
        }
        mbarrier_wait(barrier(0), i & 1);
        sync_threads<1, N>();
        error += compare(0, 32, 16 * i, 0);
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier(1));
    }
    finish(out, error);
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------
// a: 64 rows, b: 64 columns of the product, both of x; 16 terms from `first` on, along k (rows of x) or along i.
enum { A = 0, B = 8192 };
__device__ void load_operands(const maps &m) {          // rows 0 .. 63 of x, columns 0 .. 63 and 64 .. 127
    start(1);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier(0), 4 * BOX);
        for (int i = 0; i < 4; i++) tma_load(at(i * BOX), &m.rows, barrier(0), i / 2 * 64, i % 2 * 32);
    }
    mbarrier_wait(barrier(0), 0);
}
__device__ float wrong_by(const float (&d)[32], bool a_along_k, bool b_along_k, int first, int terms) {
    const int t = threadIdx.x, l = t % 32;
    float error = 0;
    for (int v = 0; v < 32; v++) {
        const int i = 16 * (t / 32) + l / 4 + 8 * (v / 2 % 2), j = 8 * (v / 4) + 2 * (l % 4) + v % 2;
        int sum = 0;
        for (int k = first; k < first + terms; k++)
            sum += (a_along_k ? number(i, k) : number(k, i)) * (b_along_k ? number(j, 64 + k) : number(k, 64 + j));
        error += fabsf(d[v] - static_cast<float>(sum));
    }
    return error;
}
template <class T, bool a_along_k, bool b_along_k>
__device__ void step(float (&d)[32], int k, bool add) {
    wgmma<64, a_along_k, b_along_k>(T{}, d, wgmma_operand(at(A + (a_along_k ? 2 : 128) * k)),
                                    wgmma_operand(at(B + (b_along_k ? 2 : 128) * k)), add);
}
TOY(wgmma_without_fence) {
    load_operands(m);
    float d[32];
    if (!bad) wgmma_fence();
    step<bf16, true, true>(d, 16, false);
    step<bf16, true, true>(d, 32, true);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(d);
    finish(out, wrong_by(d, true, true, 16, 32));
}
// d is used by a thread between two products: a fence belongs there.
TOY(second_fence_missing) {
    load_operands(m);
    float d[32];
    for (float &x : d) x = 0;
    for (int k = 0; k < 64; k += 16) {
        if (!bad || !k) wgmma_fence();
        step<bf16, true, false>(d, k, true);
        wgmma_commit();
        wgmma_wait<0>();
    }
    finish(out, wrong_by(d, true, false, 0, 64));
}
TOY(used_before_wait) {
    load_operands(m);
    float d[32];
    wgmma_fence();
    step<bf16, false, false>(d, 0, false);
    wgmma_commit();
    if (!bad) wgmma_wait<0>();
    const float error = wrong_by(d, false, false, 0, 16);
    if (bad) wgmma_wait<0>();
    finish(out, error);
}
TOY(wait_too_short) {
    load_operands(m);
    float d[32];
    wgmma_fence();
    step<bf16, false, true>(d, 0, false);
    wgmma_commit();
    step<bf16, false, true>(d, 16, true);
    wgmma_commit();
    wgmma_wait<bad ? 1 : 0>();
    const float error = wrong_by(d, false, true, 0, 32);
    wgmma_wait<0>();
    finish(out, error);
}
TOY(never_awaited) {
    load_operands(m);
    float d[32];
    wgmma_fence();
    step<bf16, true, true>(d, 0, false);
    wgmma_commit();
    if (!bad) wgmma_wait<0>();
    finish(out);
}
TOY(accumulators_overwritten) {
    load_operands(m);
    float d[32];
    wgmma_fence();
    step<bf16, true, true>(d, 0, false);
    wgmma_commit();
    if (bad && threadIdx.x == 77) d[5] = 1;
    wgmma_wait<0>();
    finish(out, wrong_by(d, true, true, 0, 16));
}
TOY(operands_overwritten) {
    load_operands(m);
    float d[32];
    wgmma_fence();
    step<bf16, true, true>(d, 0, false);
    wgmma_commit();
    if (!bad) wgmma_wait<0>();
    __syncthreads();
    element(A, threadIdx.x / 2, threadIdx.x % 2) = 0x4000;
    if (bad) wgmma_wait<0>();
    finish(out, wrong_by(d, true, true, 0, 16));
}
// The stage is given back, and filled again, while wgmma reads it.
TOY(released_early) {
    if (threadIdx.x == 0) mbarrier_init(barrier(0), 1), mbarrier_init(barrier(1), 4), fence_mbarrier_init();
    __syncthreads();
    float d[32], error = 0;
    for (int i = 0; i < 2; i++) {
        if (threadIdx.x == 0) {
            mbarrier_wait(barrier(1), i & 1 ? 0 : 1);
            mbarrier_arrive_expect(barrier(0), 4 * BOX);
            for (int j = 0; j < 4; j++) tma_load(at(j * BOX), &m.rows, barrier(0), j / 2 * 64, j % 2 * 32 + 100 * i);
        }
        mbarrier_wait(barrier(0), i & 1);
        sync_threads<1, N>();
        wgmma_fence();
        step<bf16, true, true>(d, 0, i);
        wgmma_commit();
        if (!bad) wgmma_wait<0>();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier(1));
        if (bad && i) wgmma_wait<0>();
    }
    error = wrong_by(d, true, true, 0, 16);
    finish(out, error);
}
template <bool along_k> __device__ void one_product(const maps &m, float *out, uint64_t a, uint64_t b) {
    load_operands(m);
    float d[64];
    wgmma_fence();
    wgmma<128, true, along_k>(bf16{}, d, a, b, false);
    wgmma_commit();
    wgmma_wait<0>();
    finish(out);
}
TOY(operands_differ) {
    one_product<true>(m, out, wgmma_operand(at(A + (bad && threadIdx.x == 100 ? 32 : 0))), wgmma_operand(at(A)));
}
TOY(stride_wrong) { one_product<true>(m, out, wgmma_operand(at(A)) + (bad ? 1ull << 32 : 0), wgmma_operand(at(A))); }
TOY(leading_wrong) { one_product<false>(m, out, wgmma_operand(at(A)), wgmma_operand(at(A)) - (bad ? 1ull << 16 : 0)); }
TOY(swizzle_wrong) { one_product<true>(m, out, wgmma_operand(at(A)), wgmma_operand(at(A)) ^ (bad ? 1ull << 63 : 0)); }
TOY(operand_at_128) { one_product<true>(m, out, wgmma_operand(at(A)), wgmma_operand(at(bad ? 128 : 96))); }
TOY(operand_at_64_along_i) { one_product<false>(m, out, wgmma_operand(at(A)), wgmma_operand(at(bad ? 64 : 0))); }
TOY(operand_beyond) { one_product<true>(m, out, wgmma_operand(at(A)), wgmma_operand(at(bad ? 56 * 1024 : 0))); }
TOY(a_warp_missing) {
    load_operands(m);
    float d[32];
    if (bad && threadIdx.x >= 96) return finish(out);
    wgmma_fence();
    step<bf16, true, true>(d, 0, false);
    wgmma_commit();
    wgmma_wait<0>();
    finish(out, wrong_by(d, true, true, 0, 16));
}
// f16, of operands that the threads store themselves, or copy.
__device__ uint16_t small(int x) { return bits_f16(static_cast<float>(x)); }
template <bool copied, bool fence>
__device__ void by_threads(float *out) {
    start(N);
    const int t = threadIdx.x;
    if (!copied)
        for (int k = 0; k < 16; k++) element(t / 64 * B, t % 64, k) = small(number(t % 64, t / 64 * 64 + k));
    else
        for (int k = 0; k < 16; k += 8) {
            uint32_t to = at(t / 64 * B + t % 64 * 128 + k * 2);
            to ^= (to >> 7 & 7) << 4;
            cp_async_16(to, &memory[BEFORE + t % 64][t / 64 * 64 + k], 16);
        }
    if (copied) cp_async_commit(), cp_async_wait<0>();
    if (fence) fence_async();
    mbarrier_arrive(barrier(0));
    mbarrier_wait(barrier(0), 0);
    float d[32];
    wgmma_fence();
    if (copied) step<bf16, true, true>(d, 0, false);
    else step<f16, true, true>(d, 0, false);
    wgmma_commit();
    wgmma_wait<0>();
    finish(out, wrong_by(d, true, true, 0, 16));
}
TOY(stored_without_fence) { by_threads<false, !bad>(out); }
TOY(copied_without_fence) { by_threads<true, !bad>(out); }
// TMA writes where a thread wrote before.
TOY(load_over_stores) {
    start(1);
    element(0, threadIdx.x / 64, threadIdx.x % 64) = 1;
    if (!bad) fence_async();
    __syncthreads();
    if (threadIdx.x == 0) mbarrier_arrive_expect(barrier(0), BOX), tma_load(at(0), &m.rows, barrier(0), 0, 0);
    mbarrier_wait(barrier(0), 0);
    finish(out, compare(0, 32, 0, 0));
}

// ---- named barriers, registers, stmatrix ----------------------------------------------------------------------------
TOY(half_a_block) {
    const int t = threadIdx.x, half = t / 64;
    word(t) = static_cast<float>(t + 1);
    if (!bad) half ? sync_threads<2, 64>() : sync_threads<1, 64>();
    out[t ^ 32] = word(t ^ 32);
}
TOY(counts_differ) {
    if (bad && threadIdx.x == 0) sync_threads<1, 64>();
    else sync_threads<1, 128>();
    finish(out);
}
TOY(too_few_come) {
    if (threadIdx.x < (bad ? 96 : 128)) sync_threads<3, 128>();
    finish(out);
}
TOY(lanes_missing) {
    if (threadIdx.x < 64 || threadIdx.x % 32 < (bad ? 16 : 32)) sync_threads<2, bad ? 96 : 128>();
    finish(out);
}
TOY(too_many_registers) {                       // of 384 threads
    if (threadIdx.x < 128) fewer_registers<bad ? 120 : 40>();
    else more_registers<232>();
    finish(out);
}
TOY(more_that_are_fewer) {
    more_registers<bad ? 40 : 256>();
    finish(out);
}
// A warp's 16 x 16 tile: each lane then reads a row's half.
TOY(stmatrix_without_syncwarp) {
    const int t = threadIdx.x, l = t % 32;
    const auto word_of = [&](int half, int row) {
        return static_cast<uint32_t>(t / 32 * 32 + row) | static_cast<uint32_t>(half * 8 + l % 4 * 2) << 16;
    };
    const uint32_t row = at(t / 32 * 512 + l % 16 * 32 + l / 16 * 16);
    stmatrix_x4(row, word_of(0, l / 4), word_of(0, l / 4 + 8), word_of(1, l / 4), word_of(1, l / 4 + 8));
    if (!bad) __syncwarp();
    const auto *line = reinterpret_cast<const uint16_t *>(shared_memory()) + t / 32 * 256 + l / 2 * 16 + l % 2 * 8;
    float error = 0;
    for (int c = 0; c < 8; c += 2)
        error += static_cast<float>(line[c] != t / 32 * 32 + l / 2) + static_cast<float>(line[c + 1] != l % 2 * 8 + c);
    error += fabsf(static_cast<float>(pack2(bf16{}, 1, 2)) - static_cast<float>(0x40003f80u));
    finish(out, error);
}

struct toy {
    const char *name;
    void (*right)(maps, float *), (*wrong)(maps, float *);
    int threads;
};
#undef TOY
#define TOY(name) {#name, name<false>, name<true>, N}
const toy TOYS[] = {
    TOY(init_without_fence), TOY(init_without_syncthreads), TOY(init_twice), TOY(init_at_4), TOY(no_init),
    TOY(arrival_too_many), TOY(arrival_missing), TOY(overwritten), TOY(wait_missing), TOY(arrives_before_it_writes),
    TOY(lapped), TOY(a_turn_ahead), TOY(copies_not_awaited),
    TOY(load_not_awaited), TOY(load_swizzled), TOY(tail), TOY(expects_too_little), TOY(expects_too_much),
        TOY(load_to_64),
    TOY(load_beyond), TOY(load_of_another_rank), TOY(no_map), TOY(load_left_alone), TOY(refilled_early),
    TOY(wgmma_without_fence), TOY(second_fence_missing), TOY(used_before_wait), TOY(wait_too_short), TOY(never_awaited),
    TOY(accumulators_overwritten), TOY(operands_overwritten), TOY(released_early), TOY(operands_differ),
        TOY(stride_wrong),
    TOY(leading_wrong), TOY(swizzle_wrong), TOY(operand_at_128), TOY(operand_at_64_along_i), TOY(operand_beyond),
    TOY(a_warp_missing), TOY(stored_without_fence), TOY(copied_without_fence),
    TOY(load_over_stores), TOY(half_a_block), TOY(counts_differ), TOY(too_few_come), TOY(lanes_missing),
    {"too_many_registers", too_many_registers<false>, too_many_registers<true>, 3 * N}, TOY(more_that_are_fewer),
    TOY(stmatrix_without_syncwarp),
};

typedef decltype(&cuTensorMapEncodeTiled) encoder;
encoder encode() {
    void *f = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<encoder>(f);
}
int encode_16(tensor_map *map, void *base, cuuint32_t rank, const cuuint64_t *size, const cuuint64_t *stride,
              const cuuint32_t *box) {
    const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
    return encode()(reinterpret_cast<CUtensorMap *>(map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, base, size, stride,
                    box, ones,
                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}
}  // namespace

// NULL, or what the harness found.
extern "C" __attribute__((visibility("default"))) const char *run_toy_sm90(const char *name, int wrong,
                                                                           const uint16_t *x, float *out) {
    memset(memory, 0xff, sizeof memory);
    memcpy(memory[BEFORE], x, ROWS * COLUMNS * 2);
    maps m;
    const cuuint64_t row = COLUMNS * 2, of_panels[] = {row, row / 2}, of_tail[] = {row, row};
    const cuuint64_t rows[] = {COLUMNS, ROWS}, panels[] = {64, ROWS, 2}, tail[] = {COLUMNS, 64, ROWS + 1};
    const cuuint32_t row_box[] = {64, 32}, panel_box[] = {64, 16, 2}, tail_box[] = {64, 64, 1};
    if (encode_16(&m.rows, memory[BEFORE], 2, rows, of_panels, row_box) ||
        encode_16(&m.panels, memory[BEFORE], 3, panels, of_panels, panel_box) ||
        encode_16(&m.tail, memory[0], 3, tail, of_tail, tail_box))
        return "a tensor map was refused";
    for (const toy &t : TOYS) {
        if (strcmp(t.name, name)) continue;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(1), config.blockDim = dim3(static_cast<unsigned>(t.threads)),
            config.dynamicSmemBytes = SHARED;
        const cudaError_t error = cudaLaunchKernelEx(&config, wrong ? t.wrong : t.right, m, out);
        return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    }
    return "no such toy";
}

// What the encoder says of a map of rank 2: 0, or why not.
extern "C" __attribute__((visibility("default"))) int encode_toy(uint64_t base, uint64_t columns, uint64_t rows,
                                                                 uint64_t stride,
                                                                 uint64_t box_columns, uint64_t box_rows) {
    tensor_map map;
    const cuuint64_t size[] = {columns, rows};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
    return encode_16(&map, reinterpret_cast<void *>(base), 2, size, &stride, box);
}
