// gemm_tile.cuh: one tile of a product inside a block: panels in shared memory, and the sums over them.
//
// A panel is `width` rows (or columns) of c by 64 bytes of the sum: 32 elements of 16 bits or 16 floats. It lies in
// shared memory in chunks of 16 bytes, along k or along i as its operand does in global memory, so that a chunk is one
// cp.async. The position of a chunk in its line is XORed with the line, so that the eight lanes that read or write at
// one time touch all banks once:
//
//   along k   line i: 4 chunks of 64 bytes        chunk c at  c ^ (i/2 & 3)     two lines are 128 bytes, all banks
//   along i   line k: width elements              chunk c at  c ^ (k & 7)
#ifndef MOE_GEMM_TILE_CUH
#define MOE_GEMM_TILE_CUH
#include "common.cuh"

// Element (i, k) of expert e at p + e*se + i*si + k*sk; i along rows or columns of c, k along the sum.
// With `index`, position p on the axis of rows stands for row index[p] / index_div; outside [0, index_rows): zeros.
template <class T>
struct gemm_operand {
    const T       *p;
    int64_t        se, si, sk;
    const int32_t *index = nullptr;
    int32_t        index_div = 1;
    int64_t        index_rows = 0;

    __device__ int row(int position, verdict bad) const {           // -1: there is none
        return index ? row_of(index[position], position, bad) : position;
    }
    __device__ int row_of(int32_t flat, int position, verdict bad) const {
        const int32_t row = flat / index_div;
        if (flat >= 0 && row < index_rows) return row;
        bad(MOE_BAD_INDEX, position);
        return -1;
    }
};

static __device__ inline int min32(int a, int b) { return a < b ? a : b; }
static __device__ inline int max32(int a, int b) { return a > b ? a : b; }
template <class T> constexpr int chunk_size = 16 / sizeof(T);       // elements
template <class T> constexpr int panel_depth = 64 / sizeof(T);

// Byte offset of the chunk with element (i, k).
template <class T, bool along_k, int width>
static __device__ __forceinline__ int chunk_at(int i, int k) {
    if (along_k) return i * 64 + ((k / chunk_size<T> ^ (i >> 1 & 3)) << 4);
    return k * width * static_cast<int>(sizeof(T)) + ((i / chunk_size<T> ^ (k & 7)) << 4);
}

// `some` elements (0 .. a chunk), `stride` apart, and zeros up to a whole chunk.
template <bool vector, class T>
static __device__ __forceinline__ void load_chunk(unsigned char *to, const T *from, int64_t stride, int some) {
    constexpr int n = chunk_size<T>;
    some = max32(0, min32(some, n));
    if (vector) cp_async_16(shared_u32(to), from, some * static_cast<int>(sizeof(T)));
    else {
        vec16<T> x;
        for (int v = 0; v < n; v++) x.v[v] = v < some ? from[v * stride] : T{};
        *reinterpret_cast<vec16<T> *>(to) = x;
    }
}

// ---- loaders: each thread copies the same few chunks of every panel -------------------------------------------------
// vector: the operand is contiguous along its chunks, and every chunk begins at a multiple of 16 bytes.
// indexed: the lines may have an index.
template <class T, bool along_k, bool vector, bool indexed, int width, int threads>
struct panel_loader;

template <class T, bool vector, bool indexed, int width, int threads>
struct panel_loader<T, true, vector, indexed, width, threads> {
    static constexpr int lines = threads / 4, mine = width / lines;
    const T *line[indexed ? mine : 1];      // without an index, one line is `jump` after the other
    int64_t  jump, sk;
    int      k_end;
    uint32_t present;

    // Rows i0 .. i_end of the panel; the sum ends at k_end.
    __device__ void begin(const gemm_operand<T> &x, int64_t e, int i0, int i_end, int, int k_end_, verdict bad) {
        const int first = i0 + static_cast<int>(threadIdx.x) / 4;
        sk = vector ? 1 : x.sk;
        jump = lines * x.si;
        k_end = k_end_;
        present = 0;
        line[0] = x.p + e * x.se + (indexed || first >= i_end ? 0 : first * x.si);
#pragma unroll
        for (int u = 0; u < mine; u++) {
            const int i = first + u * lines, row = i >= i_end ? -1 : indexed ? x.row(i, bad) : i;
            if (indexed) line[u] = x.p + max32(row, 0) * x.si;
            if (row >= 0) present |= 1u << u;
        }
    }
    __device__ __forceinline__ void load(unsigned char *panel, int k0, const gemm_operand<T> &, verdict) const {
        const int i = static_cast<int>(threadIdx.x) / 4, k = static_cast<int>(threadIdx.x) % 4 * chunk_size<T>;
        const int64_t at = (k0 + k) * sk;
#pragma unroll
        for (int u = 0; u < mine; u++) {
            const bool here = present >> u & 1;
            const T *const from = indexed ? line[indexed ? u : 0] : line[0] + (here ? u * jump : 0);
            load_chunk<vector>(panel + chunk_at<T, true, width>(i + u * lines, k), from + at, sk,
                               here ? k_end - k0 - k : 0);
        }
    }
};

template <class T, bool vector, bool indexed, int width, int threads>
struct panel_loader<T, false, vector, indexed, width, threads> {
    static constexpr int across = width / chunk_size<T>, lines = threads / across, mine = panel_depth<T> / lines;
    const T *from;
    int64_t  si, sk;
    int      some, k_end, row[mine];        // row: of the next panel; an index is read one panel ahead of its use

    __device__ void begin(const gemm_operand<T> &x, int64_t e, int i0, int i_end, int k0, int k_end_, verdict bad) {
        const int i = i0 + static_cast<int>(threadIdx.x) % across * chunk_size<T>;
        si = vector ? 1 : x.si, sk = x.sk, k_end = k_end_;
        some = i_end - i;
        from = x.p + e * x.se + (some > 0 ? i * si : 0);
        look_up(k0, x, bad);
    }
    __device__ __forceinline__ void look_up(int k0, const gemm_operand<T> &x, verdict bad) {
#pragma unroll
        for (int u = 0; u < mine; u++) {
            const int k = k0 + static_cast<int>(threadIdx.x) / across + u * lines;
            row[u] = k >= k_end ? -1 : indexed ? x.row(k, bad) : k;
        }
    }
    __device__ __forceinline__ void load(unsigned char *panel, int k0, const gemm_operand<T> &x, verdict bad) {
        const int i = static_cast<int>(threadIdx.x) % across * chunk_size<T>;
        if (!indexed) look_up(k0, x, bad);
#pragma unroll
        for (int u = 0; u < mine; u++) {
            const int k = static_cast<int>(threadIdx.x) / across + u * lines;
            load_chunk<vector>(panel + chunk_at<T, false, width>(i, k), from + max32(row[u], 0) * sk, si,
                               row[u] < 0 ? 0 : some);
        }
        if (indexed) look_up(k0 + panel_depth<T>, x, bad);
    }
};

// ---- sums of one warp: c[m, 64] += A[m, depth] B[64, depth] ---------------------------------------------------------
// parts = 2: the first 32 columns are of the first panel of B, the others of the second. m0, n0: where the warp's rows
// and columns begin in a panel of A [width_a] and in each panel of B [width_b].
//   load(slot, a, b, step)    operands of one step of the sum, from shared memory to registers
//   multiply(slot)            adds their product
//   end_panel(step)           after panel `step` of the sum
//   put(pass, area)           writes `pass_rows` rows of c to area[pass_rows][WARP_STRIDE]
enum { WARP_COLUMNS = 64, WARP_STRIDE = WARP_COLUMNS + 8 };     // the 8 spread rows over the banks

template <class T, int m, int parts, bool a_along_k, bool b_along_k, int width_a, int width_b>
struct warp_sums {                          // tensor cores
    struct alignas(8) pair { float x, y; };
    static constexpr int  steps = 2, slots = 2, pass_rows = 8, passes = m / pass_rows;
    static constexpr int  rows = m / 16, columns = WARP_COLUMNS / 8, per_part = columns / parts;
    float    c[rows][columns][4];
    uint32_t a[slots][rows][4], b[slots][columns][2];
    int      m0, n0;

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < rows; i++)
#pragma unroll
            for (int j = 0; j < columns; j++)
#pragma unroll
                for (int v = 0; v < 4; v++) c[i][j][v] = 0;
    }
    __device__ __forceinline__ void load(int slot, const unsigned char *A, const unsigned char *B, int step) {
        // Matrices 0..3 of an ldmatrix: halves (of 16 rows, of k) of A 00 10 01 11; (of 16 columns, of k) of B 00 01
        // 10 11.
        const int lane = lane_id(), line = lane & 7, low = lane >> 3 & 1, high = lane >> 4;
#pragma unroll
        for (int i = 0; i < rows; i++) {
            const int at_i = m0 + i * 16 + low * 8 + (a_along_k ? line : 0);
            const int at_k = step * 16 + high * 8 + (a_along_k ? 0 : line);
            const uint32_t from = shared_u32(A + chunk_at<T, a_along_k, width_a>(at_i, at_k));
            if (a_along_k) ldmatrix_x4(a[slot][i], from);
            else           ldmatrix_x4_trans(a[slot][i], from);
        }
#pragma unroll
        for (int j = 0; j < columns; j += 2) {
            const int at_i = n0 + j % per_part * 8 + high * 8 + (b_along_k ? line : 0);
            const int at_k = step * 16 + low * 8 + (b_along_k ? 0 : line);
            const unsigned char *panel = B + j / per_part * (width_b * 64);
            const uint32_t from = shared_u32(panel + chunk_at<T, b_along_k, width_b>(at_i, at_k));
            uint32_t r[4];
            if (b_along_k) ldmatrix_x4(r, from);
            else           ldmatrix_x4_trans(r, from);
            b[slot][j][0] = r[0], b[slot][j][1] = r[1], b[slot][j + 1][0] = r[2], b[slot][j + 1][1] = r[3];
        }
    }
    __device__ __forceinline__ void multiply(int slot) {
#pragma unroll
        for (int i = 0; i < rows; i++)
#pragma unroll
            for (int j = 0; j < columns; j++) mma_16816(T{}, c[i][j], a[slot][i], b[slot][j]);
    }
    __device__ __forceinline__ void end_panel(int) {}
    __device__ __forceinline__ void put(int pass, float *area) const {
        float *to = area + (lane_id() >> 2) * WARP_STRIDE + 2 * (lane_id() & 3);
#pragma unroll
        for (int p = 0; p < passes; p++)            // registers have no index at run time
            if (p == pass)
#pragma unroll
                for (int j = 0; j < columns; j++)
                    *reinterpret_cast<pair *>(to + j * 8) = {c[p / 2][j][p % 2 * 2], c[p / 2][j][p % 2 * 2 + 1]};
    }
};

// floats: a warp is 4 x 8 lanes of 8 x 8 sums. Of a panel along k a lane reads lines 4 (8) apart, of one along i
// chunks. The error of one chain of n roundings grows like n; that of n/b chains whose sums are added like the root of
// n b + n n/b, which is least at b = sqrt(n). BLOCK panels are that b for n = 4096.
template <int m, int parts, bool a_along_k, bool b_along_k, int width_a, int width_b>
struct warp_sums<float, m, parts, a_along_k, b_along_k, width_a, width_b> {
    static_assert(m == 32, "8 sums for each of 4 lanes");
    static constexpr int steps = 4, slots = 1, pass_rows = 16, passes = 2, BLOCK = 4;
    float total[8][8], c[8][8], a[8][4], b[8][4];       // the sum is total + c
    int   m0, n0;

    static __device__ __forceinline__ int row(int i) {
        const int y = lane_id() >> 3;
        return a_along_k ? y + 4 * i : 4 * y + i % 4 + i / 4 * 16;
    }
    static __device__ __forceinline__ int column(int j) {
        const int x = lane_id() & 7;
        return b_along_k ? x + 8 * j : 4 * x + j % 4 + j / 4 * 32;
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int j = 0; j < 8; j++) total[i][j] = c[i][j] = 0;
    }
    static __device__ __forceinline__ void get(float (&to)[4], const unsigned char *from) {
        const auto x = *reinterpret_cast<const vec16<float> *>(from);
#pragma unroll
        for (int v = 0; v < 4; v++) to[v] = x.v[v];
    }
    __device__ __forceinline__ void load(int, const unsigned char *A, const unsigned char *B, int step) {
        const int k = step * 4;
        float     x[4];
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (a_along_k) get(a[i], A + chunk_at<float, true, width_a>(m0 + row(i), k));
            else {                                  // i: half of the rows, and k
                get(x, A + chunk_at<float, false, width_a>(m0 + row(i / 4 * 4), k + i % 4));
#pragma unroll
                for (int v = 0; v < 4; v++) a[i / 4 * 4 + v][i % 4] = x[v];
            }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const unsigned char *panel = B + (parts == 2 ? j / 4 : 0) * (width_b * 64);
            if (b_along_k) get(b[j], panel + chunk_at<float, true, width_b>(n0 + column(j) % (64 / parts), k));
            else {
                const int at = n0 + column(j / 4 * 4) % (64 / parts);
                get(x, panel + chunk_at<float, false, width_b>(at, k + j % 4));
#pragma unroll
                for (int v = 0; v < 4; v++) b[j / 4 * 4 + v][j % 4] = x[v];
            }
        }
    }
    __device__ __forceinline__ void multiply(int) {
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) c[i][j] = fmaf(a[i][k], b[j][k], c[i][j]);
    }
    __device__ __forceinline__ void end_panel(int step) {
        if (step % BLOCK != BLOCK - 1) return;
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int j = 0; j < 8; j++) total[i][j] += c[i][j], c[i][j] = 0;
    }
    __device__ __forceinline__ void put(int pass, float *area) const {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i / 4 == pass)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    area[(row(i) - pass * 16) * WARP_STRIDE + column(j)] = total[i][j] + c[i][j];
    }
};
#endif
