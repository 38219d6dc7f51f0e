// policy_sm90.cuh: how a product of gemm.cuh is computed on Hopper: pure functions of its shape and of the device.
//
//   way                rows                                 sums
//   MOE_SM90_128x256   two warpgroups share a tile          the same            the fastest main loop, its epilogue shows
//   MOE_SM90_128x192   two warpgroups take tiles by turns   -                   one's epilogue behind the other's sums
//   MOE_SM90_128x128   the same                             they share a tile   where the others are too wide
//
// The time of a product is that of its rounds over the device, a tile each, half a round more for the end, at which not
// all multiprocessors are at work:
//     rounds * tile * (depth + exposed) / speed
// in units that only compare. `exposed` is what a tile's epilogue costs, in steps of the sum that the tensor cores could
// have done meanwhile; `speed` is that of the main loop. Both are fits to what an H200 showed: without stores 128x256
// reaches 100 % of a dense product, with them 93 % at depth 2048 and 80 to 84 % at 768, which is 140 steps; 128x192 reaches
// 100 % of a batched product at 768, where 128x256 has 94, and 98 at 14336, where it has 100.
//
// Example, Qwen3-30B's layer of 32,768 tokens on 132 multiprocessors: R = 262144 copies, E = 128, D = 2048, F = 768.
//   up     gathered in the load: 128x256, the only way, with a gate or without
//   down   2048 columns, depth 768    128x256:  (2048 + 64) * 8 / 132 + .5 rounds *  32768 * (768 + 140) / 1   = 3.82e9
//                                     128x192:  (2048 + 64) * 11 / 132 + .5       *  24576 * (768 + 20) / .94  = 3.64e9
//   dA'    768 columns, depth 2048    128x256:  (2048 + 64) * 3 / 132 + .5        *  32768 * (2048 + 140)      = 3.48e9
//                                     128x192:  (2048 + 64) * 4 / 132 + .5        *  24576 * (2048 + 20) / .94 = 3.49e9
//   dW     1536 x 2048 each           128x256:  128 * 12 * 8 / 132 + .5           *  32768 * (2048 + 60)       = 6.47e9
//
// The order of tiles, within an expert: `group` rows of tiles together, down the group's first column, then its next
// (swizzle in gemm.cuh). So a round reads the group's rows of A and sms / group columns of B, and the next round the
// same rows of A. They still are in L2 if all that a round reads fits there, of which a quarter is left to the rows on
// their way out; then only B comes from memory. The group is that of 8, 16, 32 which lets a round read the least. No
// results depend on it.
//
// Example, Mixtral's 28672 columns of up, depth 4096, by 128x256 on 132 multiprocessors with 60 MiB of L2, 45 for this:
//      8   1024 rows of A and 16.5 columns = 4224 rows of B    41 MiB, fits     4224 rows of 8 KiB from memory
//     16   2048 rows of A and 2112 rows of B                   33 MiB, fits     2112
//     32   4096 rows of A and 1056 rows of B                   40 MiB, fits     1056: the choice
// At equal shares an expert has 16 row tiles, so that 32 is 16 and B is read once; with 8 it is read twice, 1.9 GB more,
// which is .45 of 5.4 ms were it not hidden. dx, depth 28672, fits with none: 5248, 4160, 5152 rows, so 16. Qwen3's 16
// row tiles by 6 columns of an expert are no whole round: each operand is read once in any order.
#ifndef MOE_POLICY_SM90_CUH
#define MOE_POLICY_SM90_CUH
#include "api.h"

// What needs no function, for it is the same at every shape. Sums begin with the longest expert: under Zipf's law 675
// TFLOP/s instead of 577. No sum is split among blocks, be it an expert's of a million rows: that never paid on a card.
// Gathered or copied: rows are gathered in the load of a forward, where that costs 2 to 3 %, a copy 18; a product that
// sums over them (wgrad) would lose half its speed, so there they are copied into sorted order first, and dA' reads
// that copy too (expert.cu).

inline double sm90_cost(double down, double columns, int tile_n, double depth, double exposed, double speed, int sms) {
    const double across = static_cast<double>((static_cast<int64_t>(columns) + tile_n - 1) / tile_n);
    const double rounds = down * across / sms;
    return (rounds <= 1 ? 1 : rounds + 0.5) * 128 * tile_n * (depth + exposed) / speed;
}
// Ragged rows: columns of all parts, depth of all terms. Of the rows half a tile per expert is lost.
inline moe_way sm90_rows_way(int64_t R, int64_t E, int64_t columns, int64_t depth, bool gathered, int parts, int sms) {
    if (gathered || parts == 2) return MOE_SM90_128x256;        // by turns, the gather is a third slower
    const double down = static_cast<double>(R) / 128 + 0.5 * static_cast<double>(E), n = static_cast<double>(columns);
    const double k = static_cast<double>(depth);
    const double wide = sm90_cost(down, n, 256, k, 140, 1, sms);
    const double turns = sm90_cost(down, n, 192, k, 20, 0.94, sms);
    const double narrow = sm90_cost(down, n, 128, k, 20, 0.9, sms);
    return wide <= turns && wide <= narrow ? MOE_SM90_128x256 : turns <= narrow ? MOE_SM90_128x192 : MOE_SM90_128x128;
}
// Ragged sums: dw of M x N for each of E experts, over R rows of all.
inline moe_way sm90_sums_way(int64_t R, int64_t E, int64_t M, int64_t N, int sms) {
    const double down = static_cast<double>(E * ((M + 127) / 128)), n = static_cast<double>(N);
    const double k = static_cast<double>(R) / static_cast<double>(E);
    return sm90_cost(down, n, 256, k, 60, 1, sms) <= sm90_cost(down, n, 128, k, 60, 0.92, sms) ? MOE_SM90_128x256
                                                                                                : MOE_SM90_128x128;
}
// How many row tiles are done together: depth of all terms; of sums, the mean over experts. l2: bytes.
inline int sm90_group(int tile_n, int64_t depth, int sms, int64_t l2) {
    int    best = 0;
    double least = 0;
    for (int group = 8; group <= 32; group *= 2) {
        const double a = 128 * group, b = static_cast<double>(sms) / group * tile_n;    // rows that a round reads
        const bool   stays = 2 * (a + b) * static_cast<double>(depth) <= 0.75 * static_cast<double>(l2);
        const double read = stays ? b : a + b;
        if (best == 0 || read < least) best = group, least = read;
    }
    return best;
}
#endif
