// ptx_sm90.cuh: the instructions that only Hopper has, one tiny function each, as in ptx.cuh: under nvcc the body is the
// instruction, otherwise its twin in tests/simt/sm90.h. Included by *_sm90.cu alone, which are compiled for sm_90a.
//
// mbarrier   64 bits of shared memory, 8-byte aligned. Its phases have parity 0, 1, 0, ..; a phase ends when all its
//            arrivals and all the bytes that it expects have come. wait(parity) returns once the phase of that parity has
//            ended: who waits for a barrier that nobody has used begins with parity 1.
// TMA        a box of a tensor map (tensor_map.cuh), innermost coordinate first, in elements; places outside the tensor
//            read as zero and count their bytes. Boxes are 64 elements of 16 bits wide and lie in shared memory as lines
//            of 128 bytes, of which the 16-byte chunk c is at c ^ (address >> 7 & 7): begin them at multiples of 1024.
// wgmma      d[64, n] (+)= a[64, 16] b[16, n] by the 128 threads of a warpgroup, asynchronously: d and the operands are
//            not to be touched before wgmma_wait. d[i] of thread t, w = t / 32 and l = t % 32, is
//            (row 16 w + l/4 + 8 (i/2 % 2), column 8 (i/4) + 2 (l%4) + i%2).
// Proxies    TMA and wgmma see shared memory through the async proxy. Ordinary stores and cp.async reach it only after
//            fence_async() by the thread that made them, then a barrier.
#ifndef MOE_PTX_SM90_CUH
#define MOE_PTX_SM90_CUH
#include "ptx.cuh"

struct alignas(128) tensor_map { uint64_t word[16]; };      // opaque; a __grid_constant__ parameter of the kernel

// A matrix operand of wgmma in 128-byte swizzle at shared address `at` (a multiple of 1024, or `steps` of 16 along the sum
// further: 32 bytes each along k, 2048 along i).
//   along k  lines are rows (or columns) of d, each 64 elements of the sum            leading ignored, 1024 between 8 lines
//   along i  lines are elements of the sum, each 64 rows (or columns) of d            8192 to the next 64, 1024 between 8
static constexpr int WGMMA_LEADING = 64 * 128, WGMMA_STRIDE = 8 * 128;
static __host__ __device__ constexpr uint64_t wgmma_operand(uint32_t at) {
    return static_cast<uint64_t>(at >> 4 & 0x3fff) | static_cast<uint64_t>(WGMMA_LEADING >> 4) << 16 |
           static_cast<uint64_t>(WGMMA_STRIDE >> 4) << 32 | 1ull << 62;
}

#ifdef __CUDACC__
#define PTX static __device__ __forceinline__

// ---- mbarriers ------------------------------------------------------------------------------------------------------
PTX void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}
// After the last init, before the __syncthreads that lets others use them.
PTX void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PTX void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
// One arrival, and the phase waits for so many bytes more.
PTX void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
PTX bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}
// A wait of twenty seconds is a fault of the kernel: it traps, so that the launch fails and nothing hangs. A right kernel
// waits for microseconds, but by the clock on the wall, which a sanitizer or a stop in a debugger lets run on: two were too
// few. What must not wait so long has a limit of its own, as the processes of tests/gpu have.
PTX void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    if (mbarrier_try_wait(barrier, parity)) return;
    const uint64_t start = nanoseconds();
    while (!mbarrier_try_wait(barrier, parity))
        if (nanoseconds() - start > 20000000000ull) __trap();
}

// ---- named barriers: `threads` of the block, a multiple of 32, meet at barrier 1 .. 15 -------------------------------
template <int barrier, int threads>
PTX void sync_threads() { asm volatile("bar.sync %0, %1;" :: "n"(barrier), "n"(threads) : "memory"); }

// ---- TMA ------------------------------------------------------------------------------------------------------------
// The box at these coordinates to shared memory; its bytes are counted at the barrier. By one thread.
PTX void tma_load(uint32_t to, const tensor_map *map, uint32_t barrier, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 :: "r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y) : "memory");
}
PTX void tma_load(uint32_t to, const tensor_map *map, uint32_t barrier, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];"
                 :: "r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z) : "memory");
}
PTX void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers: of each thread of the warpgroup, a multiple of 8 -----------------------------------------------------
template <int registers>
PTX void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(registers)); }
template <int registers>
PTX void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(registers)); }

// ---- wgmma ----------------------------------------------------------------------------------------------------------
PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }      // before the first that uses d
PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
PTX void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(pending) : "memory"); }
// No use of d moves above this; after a wait.
template <int n>
PTX void wgmma_pin(float (&d)[n]) {
#pragma unroll
    for (int i = 0; i < n; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

// wgmma<n, a_along_k, b_along_k>(T{}, d, a, b, add): d = a b, or d += a b.
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
              "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
#define S32_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define S32_1 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define S32_2 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define S32_3 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA(T, type, n, sums, a_, b_, add_, ta_, tb_, ...)                                                                 \
    template <int columns, bool a_along_k, bool b_along_k>                                                                   \
        requires (columns == n)                                                                                              \
    PTX void wgmma(T, float (&d)[n / 2], uint64_t a, uint64_t b, bool add) {                                                 \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add_ ", 0;\n"                                                     \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" sums "}, "                         \
                     "%" #a_ ", %" #b_ ", p, 1, 1, %" #ta_ ", %" #tb_ ";\n}\n"                                               \
                     : __VA_ARGS__                                                                                           \
                     : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(!a_along_k), "n"(!b_along_k));                        \
    }
#define WGMMAS(T, type)                                                                                                      \
    WGMMA(T, type, 64, S32_0, 32, 33, 34, 35, 36, D32(0))                                                                    \
    WGMMA(T, type, 128, S32_0 S32_1, 64, 65, 66, 67, 68, D32(0), D32(32))                                                    \
    WGMMA(T, type, 192, S32_0 S32_1 S32_2, 96, 97, 98, 99, 100, D32(0), D32(32), D32(64))                                    \
    WGMMA(T, type, 256, S32_0 S32_1 S32_2 S32_3, 128, 129, 130, 131, 132, D32(0), D32(32), D32(64), D32(96))
WGMMAS(bf16, "bf16")
WGMMAS(f16, "f16")
#undef WGMMAS
#undef WGMMA
#undef S32_0
#undef S32_1
#undef S32_2
#undef S32_3
#undef D32
#undef D8

// ---- 16-bit tiles out of registers ----------------------------------------------------------------------------------
// The counterpart of ldmatrix_x4: lane i gives the address of row i%8 of matrix i/8, register m of lane l is
// (row l/4, columns 2(l%4)+{0,1}) of matrix m.
PTX void stmatrix_x4(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(row), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}
// Two floats to nearest even, the first in the low half.
PTX uint32_t pack2(bf16, float low, float high) {
    uint32_t r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
}
PTX uint32_t pack2(f16, float low, float high) {
    uint32_t r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
}
#undef PTX
#else
#include "sm90.h"       // the host harness: functions of the same names
#endif
#endif
