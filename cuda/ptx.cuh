// ptx.cuh: the instructions that C++ has no words for, one tiny function each. Under nvcc the body is the instruction;
// otherwise it is a call of its twin in tests/simt/simt.h, which runs the kernels thread by thread on the host.
//
// Lane l of a warp holds (mma.sync m16n8k16):
//   A  a[0..3] = (row l/4, k 2(l%4)+{0,1}), row+8, k+8, both          B  b[0], b[1] = (n l/4, k 2(l%4)+{0,1}), k+8
//   C  c[0..3] = (row l/4, column 2(l%4)+{0,1}), then row+8
// ldmatrix: lane i gives the address of row i%8 of matrix i/8 (16-byte rows, aligned); register m of lane l is
// (row l/4, columns 2(l%4)+{0,1}) of matrix m, or with trans (rows 2(l%4)+{0,1}, column l/4).
#ifndef MOE_PTX_CUH
#define MOE_PTX_CUH
#include <cstdint>

struct bf16 { uint16_t bits; };         // storage only: arithmetic is in float
struct f16  { uint16_t bits; };

#ifdef __CUDACC__
#define PTX static __device__ __forceinline__

// The dynamic shared memory of the block, 1024-byte aligned; there is no other.
PTX unsigned char *shared_memory() {
    extern __shared__ __align__(1024) unsigned char moe_shared[];
    return moe_shared;
}
PTX uint32_t shared_u32(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes of global memory to shared memory, both aligned, of which the first `bytes` are read and the rest is zero.
PTX void cp_async_16(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's newest groups are still under way.
template <int pending>
PTX void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

PTX void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
PTX void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
// c[16,8] += a[16,16] b[16,8]
PTX void mma_16816(bf16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
PTX void mma_16816(f16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// To nearest even; overflow is infinity, NaN stays NaN (sign and payload may go).
PTX uint16_t bits_bf16(float x) { uint16_t h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x)); return h; }
PTX uint16_t bits_f16(float x) { uint16_t h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x)); return h; }
PTX float float_f16(uint16_t h) { float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h)); return x; }

// Flags between GPUs, or between a GPU and the host: what was written before a release is seen after the acquire.
PTX uint32_t load_acquire_system(const uint32_t *p) {
    uint32_t v; asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v;
}
PTX void store_release_system(uint32_t *p, uint32_t v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}
PTX void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
// Called in every loop that waits for another thread's store.
PTX void spin() { asm volatile("nanosleep.u32 64;"); }
PTX uint64_t nanoseconds() { uint64_t t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)); return t; }
#undef PTX
#else
#include "simt.h"       // the host harness: functions of the same names

template <int pending>
inline void cp_async_wait() { simt::cp_async_wait(pending); }
#endif
#endif
