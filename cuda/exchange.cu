// exchange.cu: the twins of csrc/exchange.c, bit for bit: the plan of a deduplicated token exchange, and the kernels
// that pack, unpack and add its messages.
//
// plan, three launches: a block owns 256 tokens of one rank and counts them; one block scans the counts in the order of
//   send (rank, then tokens); the first blocks come again and place their tokens from there.
// pack, unpack: a warp owns a row and moves its values 16 bytes a lane, four loads under way, where D and the addresses
//   allow it. combine: a warp owns a token; its rows are added in registers.
// An id, a send or a place that is out of range is skipped (its row is zeros) and named by a verdict.
#include "../csrc/message.h"
#include "common.cuh"

static constexpr int THREADS = 256, WARPS = THREADS / 32, SCAN_THREADS = 1024;

// ---- plan -----------------------------------------------------------------------------------------------------------
struct plan_job {
    int64_t        T, K, E, P, chunks, M;       // chunks of THREADS tokens; entries of send
    const int32_t *ids;
    int32_t       *rows_PC, *copies_PC;         // workspace, [P, chunks]; rows_PC becomes the first row of each, then S
    int32_t       *counts, *send, *place;
};

// How many of token t's experts live on rank p.
static __device__ inline int copies_at(const plan_job &j, int64_t t, int64_t p) {
    const int64_t local = j.E / j.P;
    int copies = 0;
    for (int64_t k = 0; t < j.T && k < j.K; k++) {
        const int32_t id = j.ids[t * j.K + k];
        copies += id >= p * local && id < (p + 1) * local;
    }
    return copies;
}

__global__ void plan_count_kernel(plan_job j, verdict bad) {
    auto *sums = reinterpret_cast<int *>(shared_memory());
    const int64_t p = blockIdx.x / j.chunks, chunk = blockIdx.x % j.chunks, t = chunk * THREADS + threadIdx.x;
    for (int64_t k = 0; p == 0 && t < j.T && k < j.K; k++)
        if (const int32_t id = j.ids[t * j.K + k]; id < -1 || id >= j.E) bad(MOE_BAD_INDEX, t * j.K + k);
    const int copies = copies_at(j, t, p);
    const int rows = block_sum(static_cast<int>(copies > 0), sums);
    const int all = block_sum(copies, sums);
    if (threadIdx.x == 0) j.rows_PC[blockIdx.x] = rows, j.copies_PC[blockIdx.x] = all;
}

__global__ void plan_scan_kernel(plan_job j) {
    auto *sums = reinterpret_cast<int *>(shared_memory());
    const int64_t n = j.P * j.chunks;
    int base = 0;
    for (int64_t i = 0; i < n; i += SCAN_THREADS) {
        const int64_t at = i + threadIdx.x;
        int total;
        const int before = block_exclusive_scan(at < n ? j.rows_PC[at] : 0, sums, &total);
        if (at < n) j.rows_PC[at] = base + before;
        base += total;
    }
    if (threadIdx.x == 0) j.rows_PC[n] = base;
    __syncthreads();
    for (int64_t p = warp_id(); p < j.P; p += SCAN_THREADS / 32) {
        int copies = 0;
        for (int64_t c = lane_id(); c < j.chunks; c += 32) copies += j.copies_PC[p * j.chunks + c];
        copies = warp_sum(copies);
        if (lane_id()) continue;
        j.counts[2 * p] = j.rows_PC[(p + 1) * j.chunks] - j.rows_PC[p * j.chunks];
        j.counts[2 * p + 1] = copies;
    }
}

__global__ void plan_place_kernel(plan_job j) {
    auto *sums = reinterpret_cast<int *>(shared_memory());
    const int64_t p = blockIdx.x / j.chunks, t = blockIdx.x % j.chunks * THREADS + threadIdx.x;
    const bool goes = copies_at(j, t, p) > 0;
    int total;
    const int row = j.rows_PC[blockIdx.x] + block_exclusive_scan(static_cast<int>(goes), sums, &total);
    if (goes) j.send[row] = static_cast<int32_t>(t * j.P + p);
    if (t < j.T) j.place[t * j.P + p] = goes ? row : -1;
    const int64_t tail = j.rows_PC[j.P * j.chunks] + static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (tail < j.M) j.send[tail] = -1;          // there are at least M threads
}

static int64_t plan_chunks(int64_t T) { return ceil_div(T, THREADS); }

size_t moe_exchange_plan_workspace(int64_t T, int64_t P, cudaStream_t) {
    return static_cast<size_t>(max64(0, 2 * P * plan_chunks(max64(T, 0)) + 1)) * sizeof(int32_t);
}

int moe_exchange_plan(int64_t T, int64_t K, int64_t E, int64_t P, const int32_t *ids_TK, void *workspace,
                      int32_t *counts_P2, int32_t *send_M, int32_t *place_TP, cudaStream_t stream) {
    TRY(exchange_check(T, E, P));
    if (K < 0 || K > MOE_MAX_EXPERTS) return MOE_BAD_SHAPE;
    const int64_t chunks = plan_chunks(T), blocks = P * chunks;
    auto *rows_PC = static_cast<int32_t *>(workspace);
    const plan_job j = {T, K, E, P, chunks, T * min64(P, K), ids_TK, rows_PC, rows_PC + blocks + 1, counts_P2, send_M,
                        place_TP};
    const size_t shared = 32 * sizeof(int);
    TRY(launch(plan_count_kernel, blocks, THREADS, shared, stream, j, verdict_of(OP_exchange_plan)));
    TRY(launch(plan_scan_kernel, 1, SCAN_THREADS, shared, stream, j));
    return launch(plan_place_kernel, blocks, THREADS, shared, stream, j);
}

// ---- messages -------------------------------------------------------------------------------------------------------
struct message_job {
    int64_t              D, K, S, T, P, local;  // S rows of the message
    message_parts        at;
    bool                 ids, weights;
    int                  wsize;                 // bytes of a weight
    const int32_t       *send, *place, *ids_TK;
    const unsigned char *x, *w, *rows;          // in
    unsigned char       *to, *to_w;             // out
    int32_t             *to_ids;
};

static __device__ inline int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * WARPS + warp_id(); }
static __device__ inline int64_t row_stride() { return static_cast<int64_t>(gridDim.x) * WARPS; }

// n units by the lanes of a warp; from NULL gives zeros.
template <class Unit>
static __device__ inline void move_units(int64_t n, const void *from, void *to) {
    constexpr int AHEAD = 4;
    const Unit *x = static_cast<const Unit *>(from);
    Unit *y = static_cast<Unit *>(to);
    int64_t i = lane_id();
    for (; x && i + 32 * (AHEAD - 1) < n; i += 32 * AHEAD) {
        Unit v[AHEAD];
        for (int a = 0; a < AHEAD; a++) v[a] = x[i + 32 * a];
        for (int a = 0; a < AHEAD; a++) y[i + 32 * a] = v[a];
    }
    for (; i < n; i += 32) y[i] = x ? x[i] : Unit{};
}

// The K weights, 2 bytes at a time, and zeros behind them up to `end` bytes.
static __device__ inline void move_weights(int64_t bytes, int64_t end, const unsigned char *from, unsigned char *to) {
    for (int64_t i = lane_id(); i < end / 2; i += 32)
        reinterpret_cast<uint16_t *>(to)[i] = i < bytes / 2 ? reinterpret_cast<const uint16_t *>(from)[i] : 0;
}

template <class T, class Unit>
__global__ void pack_kernel(message_job j, verdict bad) {
    for (int64_t s = first_row(); s < j.S; s += row_stride()) {
        const int64_t flat = j.send ? j.send[s] : s * j.P, t = flat / j.P, p = flat % j.P;
        const bool known = flat >= 0 && t < j.T;
        if (!known && lane_id() == 0) bad(MOE_BAD_INDEX, s);
        unsigned char *row = j.to + s * j.at.bytes;
        const int64_t bytes = j.D * static_cast<int64_t>(sizeof(T));
        move_units<Unit>(bytes / sizeof(Unit), known ? j.x + t * bytes : nullptr, row);
        move_units<T>((j.at.ids - bytes) / sizeof(T), nullptr, row + bytes);
        if (j.ids) {
            auto *word_K = reinterpret_cast<int32_t *>(row + j.at.ids);
            for (int64_t k = lane_id(); k < (j.at.weights - j.at.ids) / 4; k += 32) {
                const int64_t id = k < j.K && known ? j.ids_TK[t * j.K + k] : -1;
                word_K[k] = id >= 0 && id / j.local == p ? static_cast<int32_t>(id % j.local) + 1 : 0;
            }
        }
        const int64_t w_bytes = known ? j.K * j.wsize : 0;
        if (j.weights) move_weights(w_bytes, j.at.bytes - j.at.weights, j.w + t * w_bytes, row + j.at.weights);
    }
}

template <class T, class Unit>
__global__ void unpack_kernel(message_job j) {
    for (int64_t r = first_row(); r < j.S; r += row_stride()) {
        const unsigned char *row = j.rows + r * j.at.bytes;
        const int64_t bytes = j.D * static_cast<int64_t>(sizeof(T)), w_bytes = j.K * j.wsize;
        move_units<Unit>(bytes / sizeof(Unit), row, j.to + r * bytes);
        const auto *word_K = reinterpret_cast<const uint32_t *>(row + j.at.ids);
        for (int64_t k = lane_id(); j.ids && k < j.K; k += 32)
            j.to_ids[r * j.K + k] = static_cast<int32_t>(word_K[k] - 1);
        if (j.weights) move_weights(w_bytes, w_bytes, row + j.at.weights, j.to_w + r * w_bytes);
    }
}

// y[t] = sum over p of row place[t,p]: from +0, in rank order, in float, rounded once. Lane p % 32 holds place[t,p].
// n values at once per lane, AHEAD times; every lane makes every step, because the lanes ask each other for places.
template <class T, int n, int AHEAD>
static __device__ inline void combine_values(const message_job &j, const int32_t *place_P, unsigned char *y) {
    struct alignas(n * sizeof(T)) unit { T v[n]; };
    const int64_t units = j.D / n;
    for (int64_t base = 0; base < units; base += 32 * AHEAD) {
        const int64_t first = base + lane_id();
        float sum[AHEAD][n] = {};
        for (int64_t group = 0; group < j.P; group += 32) {
            const int64_t p = group + lane_id();
            int32_t place = p < j.P ? place_P[p] : -1;
            if (place >= j.S) place = -1;
            for (uint32_t left = __ballot_sync(0xffffffffu, place >= 0); left; left &= left - 1) {
                const int64_t row = __shfl_sync(0xffffffffu, place, __ffs(static_cast<int>(left)) - 1);
                const auto *x = reinterpret_cast<const unit *>(j.rows + row * j.at.bytes);
                unit ahead[AHEAD];
                for (int a = 0; a < AHEAD; a++)
                    if (first + 32 * a < units) ahead[a] = x[first + 32 * a];
                for (int a = 0; a < AHEAD; a++)
                    for (int i = 0; first + 32 * a < units && i < n; i++) sum[a][i] += to_float(ahead[a].v[i]);
            }
        }
        for (int a = 0; a < AHEAD; a++) {
            if (first + 32 * a >= units) continue;
            unit rounded;
            for (int i = 0; i < n; i++) rounded.v[i] = from_float<T>(sum[a][i]);
            reinterpret_cast<unit *>(y)[first + 32 * a] = rounded;
        }
    }
}

template <class T, bool vector>
__global__ void combine_kernel(message_job j, verdict bad) {
    constexpr int n = vector ? vec16<T>::n : 1;
    for (int64_t t = first_row(); t < j.T; t += row_stride()) {
        const int32_t *place_P = j.place + t * j.P;
        for (int64_t p = lane_id(); p < j.P; p += 32)
            if (place_P[p] < -1 || place_P[p] >= j.S) bad(MOE_BAD_INDEX, t * j.P + p);
        combine_values<T, n, vector ? 2 : 4>(j, place_P, j.to + t * j.D * static_cast<int64_t>(sizeof(T)));
        for (int64_t k = lane_id(); j.weights && k < j.K; k += 32) {
            const int64_t id = j.ids_TK[t * j.K + k], f = t * j.K + k;
            const bool known = id >= 0 && id < j.P * j.local;
            if (!known && id != -1) bad(MOE_BAD_INDEX, f);
            int64_t row = known ? place_P[id / j.local] : -1;
            if (row >= j.S) row = -1;
            auto *to = reinterpret_cast<uint16_t *>(j.to_w + f * j.wsize);
            const auto *w_K = j.rows + row * j.at.bytes + j.at.weights;
            const auto *from = reinterpret_cast<const uint16_t *>(w_K + k * j.wsize);
            for (int h = 0; h < j.wsize / 2; h++) to[h] = row < 0 ? 0 : from[h];
        }
    }
}

// 16 bytes at once where every row of values and of messages allows it.
static bool by_vectors(const message_job &j, int64_t size, const void *values, const void *rows) {
    return j.D * size % 16 == 0 && aligned16(values) && aligned16(rows);
}
static int64_t warp_grid(int64_t rows) { return strided_grid(rows, WARPS); }

static message_job job_of(const moe_message *m, int64_t S, int64_t T, int64_t E, int64_t P) {
    message_job j = {};
    j.D = m->D, j.K = m->K, j.S = S, j.T = T, j.P = P, j.local = E / P;
    j.at = message_layout(m);
    j.ids = m->ids, j.weights = m->weights, j.wsize = static_cast<int>(message_size(m->wdtype));
    return j;
}

static int message_check_cuda(const moe_message *m) {
    return m->dtype == MOE_F64 || (m->weights && m->wdtype == MOE_F64) ? MOE_BAD_DTYPE : message_check(m);
}

int moe_exchange_pack(const moe_message *m, int64_t T, int64_t S, int64_t E, int64_t P, const int32_t *send_S,
                      const void *x_TD, const int32_t *ids_TK, const void *weights_TK, void *rows_SB,
                      cudaStream_t stream) {
    TRY(message_check_cuda(m));
    TRY(exchange_check(T, E, P));
    if (S < 0 || S > T * P || (!send_S && S > 0 && (S != T || m->ids))) return MOE_BAD_SHAPE;
    message_job j = job_of(m, S, T, E, P);
    j.send = send_S, j.ids_TK = ids_TK;
    j.x = static_cast<const unsigned char *>(x_TD), j.w = static_cast<const unsigned char *>(weights_TK);
    j.to = static_cast<unsigned char *>(rows_SB);
    return by_float(m->dtype, [&]<class V>(V) {
        const bool vector = by_vectors(j, sizeof(V), x_TD, rows_SB);
        return launch(vector ? pack_kernel<V, vec16<V>> : pack_kernel<V, V>, warp_grid(S), THREADS, 0, stream, j,
                      verdict_of(OP_exchange_pack));
    });
}

int moe_exchange_unpack(const moe_message *m, int64_t R, const void *rows_RB, void *x_RD, int32_t *ids_RK,
                        void *weights_RK, cudaStream_t stream) {
    TRY(message_check_cuda(m));
    if (R < 0 || R > INT32_MAX) return MOE_BAD_SHAPE;
    message_job j = job_of(m, R, R, 0, 1);
    j.rows = static_cast<const unsigned char *>(rows_RB);
    j.to = static_cast<unsigned char *>(x_RD), j.to_ids = ids_RK, j.to_w = static_cast<unsigned char *>(weights_RK);
    return by_float(m->dtype, [&]<class V>(V) {
        const bool vector = by_vectors(j, sizeof(V), x_RD, rows_RB);
        return launch(vector ? unpack_kernel<V, vec16<V>> : unpack_kernel<V, V>, warp_grid(R), THREADS, 0, stream, j);
    });
}

int moe_exchange_combine(const moe_message *m, int64_t T, int64_t S, int64_t E, int64_t P, const int32_t *place_TP,
                         const int32_t *ids_TK, const void *rows_SB, void *y_TD, void *weights_TK,
                         cudaStream_t stream) {
    TRY(message_check_cuda(m));
    TRY(exchange_check(T, E, P));
    if (S < 0 || S > T * P) return MOE_BAD_SHAPE;
    message_job j = job_of(m, S, T, E, P);
    j.place = place_TP, j.ids_TK = ids_TK, j.rows = static_cast<const unsigned char *>(rows_SB);
    j.to = static_cast<unsigned char *>(y_TD), j.to_w = static_cast<unsigned char *>(weights_TK);
    return by_float(m->dtype, [&]<class V>(V) {
        const bool vector = by_vectors(j, sizeof(V), y_TD, rows_SB);
        return launch(vector ? combine_kernel<V, true> : combine_kernel<V, false>, warp_grid(T), THREADS, 0, stream, j,
                      verdict_of(OP_exchange_combine));
    });
}
