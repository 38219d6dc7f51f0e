// sm90.h: the twins of ptx_sm90.cuh on the host. sm90.cpp says what they do and what they find.
#ifndef SIMT_SM90_H
#define SIMT_SM90_H
#include "simt.h"

#define AT simt::place at = simt::place::current()
namespace simt {
void tma_load(uint32_t to, const void *map, uint32_t barrier, int rank, const int *coordinates, place at);
void set_registers(bool more, int registers, place at);
void wgmma(const char *type, int columns, bool a_along_k, bool b_along_k, float *d, uint64_t a, uint64_t b, bool add,
           place at);
void wgmma_wait(int pending, place at);
void wgmma_pin(const float *d, int n, place at);
void sync_threads(int barrier, int threads, place at);
}  // namespace simt

void mbarrier_init(uint32_t barrier, int arrivals, AT);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier, AT);
void mbarrier_arrive_expect(uint32_t barrier, int bytes, AT);
bool mbarrier_try_wait(uint32_t barrier, uint32_t parity, AT);
void mbarrier_wait(uint32_t barrier, uint32_t parity, AT);

template <int barrier, int threads>
inline void sync_threads(AT) { simt::sync_threads(barrier, threads, at); }

inline void tma_load(uint32_t to, const tensor_map *map, uint32_t barrier, int x, int y, AT) {
    const int c[] = {x, y};
    simt::tma_load(to, map, barrier, 2, c, at);
}
inline void tma_load(uint32_t to, const tensor_map *map, uint32_t barrier, int x, int y, int z, AT) {
    const int c[] = {x, y, z};
    simt::tma_load(to, map, barrier, 3, c, at);
}
void fence_async();

template <int registers> inline void fewer_registers(AT) { simt::set_registers(false, registers, at); }
template <int registers> inline void more_registers(AT) { simt::set_registers(true, registers, at); }

void wgmma_fence(AT);
void wgmma_commit(AT);
template <int pending> inline void wgmma_wait(AT) { simt::wgmma_wait(pending, at); }
template <int n> inline void wgmma_pin(float (&d)[n], AT) { simt::wgmma_pin(d, n, at); }
#define WGMMA(T)                                                                                                \
    template <int columns, bool a_along_k, bool b_along_k>                                                      \
        requires (columns == 64 || columns == 128 || columns == 192 || columns == 256)                          \
    inline void wgmma(T, float (&d)[columns / 2], uint64_t a, uint64_t b, bool add, AT) {                       \
        simt::wgmma(#T, columns, a_along_k, b_along_k, d, a, b, add, at);                                       \
    }
WGMMA(bf16)
WGMMA(f16)
#undef WGMMA

void stmatrix_x4(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3, AT);
uint32_t pack2(bf16, float low, float high);
uint32_t pack2(f16, float low, float high);
#undef AT
#endif
