// windows.cu: a wire among the GPUs of one host: each rank owns a window of device memory that the others have opened
// by CUDA IPC, and every rank writes its rows straight to their place in the receiver's window.
//
//   window  [ a flag per rank, 128 bytes apart | half 0 | half 1 ]
//   epoch e (each call of counts or rows is one):
//     push    my piece for p -> half e%2 of p's window, behind the pieces of the ranks before me
//     meet    flag `me` of every window = e, released; then wait until all flags of mine have reached e, acquired
//     copy    my half e%2 -> the caller's tensor
// Two halves are enough: p writes half e%2 again in epoch e+2, for which it has passed the meeting of e+1, which no
// rank joins before its copy of epoch e is done (its stream is in order). Every rank raises its flag in every epoch,
// rows or not.
//
// A wait has a deadline: the kernel then names the silent rank in its window, in host memory and in a verdict, and
// ends; what was queued behind it sees the name and ends at once. The next call says it. Limit: MAX_RANKS ranks.
#include <cstdio>

#include "common.cuh"

namespace {
constexpr int MAX_RANKS = 32, THREADS = 256, AHEAD = 4, FLAG_STRIDE = 128;
constexpr int64_t SLICE = 64 * 1024;                // bytes of a piece that are worth a block
constexpr int64_t COUNTS = 4 * MAX_RANKS * MAX_RANKS;   // numbers of all ranks that one call exchanges, at most

struct header {                                     // the first bytes of a window
    struct alignas(FLAG_STRIDE) { uint32_t epoch; } flag[MAX_RANKS];
    alignas(FLAG_STRIDE) uint32_t silent;           // 1 + the rank that did not answer
};

struct push_job {
    unsigned char *to[MAX_RANKS];                   // where my piece begins in each window
    int64_t        from[MAX_RANKS], bytes[MAX_RANKS];
    int            slices;                          // blocks per piece
};

template <class Unit>
__global__ void push_kernel(push_job j, const unsigned char *sent, const header *mine) {
    const int p = static_cast<int>(blockIdx.x) / j.slices, slice = static_cast<int>(blockIdx.x) % j.slices;
    if (mine->silent) return;
    const auto *x = reinterpret_cast<const Unit *>(sent + j.from[p]);
    auto *y = reinterpret_cast<Unit *>(j.to[p]);
    const int64_t n = j.bytes[p] / static_cast<int64_t>(sizeof(Unit));
    const int64_t stride = static_cast<int64_t>(j.slices) * THREADS;
    int64_t i = static_cast<int64_t>(slice) * THREADS + threadIdx.x;
    for (; i + stride * (AHEAD - 1) < n; i += stride * AHEAD) {
        Unit v[AHEAD];
        for (int a = 0; a < AHEAD; a++) v[a] = x[i + stride * a];
        for (int a = 0; a < AHEAD; a++) y[i + stride * a] = v[a];
    }
    for (; i < n; i += stride) y[i] = x[i];
    fence_system();
}

struct meet_job {
    header  *window[MAX_RANKS];
    int      rank;
    uint32_t epoch;
    uint64_t nanoseconds;
    uint32_t *silent;                               // in host memory
};

// One thread per rank.
__global__ void meet_kernel(meet_job j, verdict bad) {
    header *mine = j.window[j.rank];
    const bool over = mine->silent;
    __syncthreads();                                // before anyone writes it
    if (over) return;
    fence_system();
    store_release_system(&j.window[threadIdx.x]->flag[j.rank].epoch, j.epoch);
    const uint64_t start = nanoseconds();
    while (static_cast<int32_t>(load_acquire_system(&mine->flag[threadIdx.x].epoch) - j.epoch) < 0) {
        if (nanoseconds() - start > j.nanoseconds) {
            atomicCAS_system(&mine->silent, 0u, threadIdx.x + 1);       // the first one is named
            atomicCAS_system(j.silent, 0u, threadIdx.x + 1);
            bad(MOE_PEER_SILENT, threadIdx.x);
            return;
        }
        spin();
    }
}

// ---- the wire -------------------------------------------------------------------------------------------------------
class window_wire final : public moe_wire {
    const int      ranks, rank;
    const int64_t  half;                            // bytes
    const double   seconds;
    header        *window[MAX_RANKS] = {};
    bool           opened[MAX_RANKS] = {};
    uint32_t       epoch = 0;
    int32_t       *host = nullptr;                  // silent, then the counts of all ranks

    unsigned char *half_of(int p) const {
        return reinterpret_cast<unsigned char *>(window[p] + 1) + (epoch & 1) * half;
    }

    int alive() const {
        const int silent = __atomic_load_n(host, __ATOMIC_RELAXED);
        if (silent)
            return cuda_failed("rank %d did not answer rank %d through its window within %g s", silent - 1, rank,
                               seconds);
        for (int p = 0; p < ranks; p++)
            if (!window[p]) return cuda_failed("the window of rank %d is not open yet", p);
        return MOE_OK;
    }

    // One epoch. to_P: the offset of my piece in each half; `all` bytes come.
    int exchange(const int64_t *from_P, const int64_t *bytes_P, const int64_t *to_P, int64_t all, const void *sent,
                 void *received, cudaStream_t stream) {
        TRY(alive());
        epoch++;
        push_job push = {};
        int64_t longest = 0;
        bool vector = aligned16(sent);
        for (int p = 0; p < ranks; p++) {
            push.from[p] = from_P[p], push.bytes[p] = bytes_P[p];
            push.to[p] = half_of(p) + to_P[p];
            longest = max64(longest, bytes_P[p]);
            vector &= (from_P[p] | bytes_P[p] | to_P[p]) % 16 == 0;
        }
        push.slices = static_cast<int>(min64(ceil_div(longest, SLICE), max64(1, multiprocessors() / ranks)));
        const auto *x = static_cast<const unsigned char *>(sent);
        TRY(launch(vector ? push_kernel<vec16<uint16_t>> : push_kernel<uint16_t>, ranks * push.slices, THREADS, 0,
                   stream, push, x, window[rank]));
        meet_job meet = {{}, rank, epoch, static_cast<uint64_t>(seconds * 1e9), reinterpret_cast<uint32_t *>(host)};
        for (int p = 0; p < ranks; p++) meet.window[p] = window[p];
        TRY(launch(meet_kernel, 1, ranks, 0, stream, meet, verdict_of(OP_window)));
        if (all == 0) return MOE_OK;
        const auto bytes = static_cast<size_t>(all);
        return cuda_status(cudaMemcpyAsync(received, half_of(rank), bytes, cudaMemcpyDefault, stream),
                           "reading the window");
    }

   public:
    window_wire(int ranks, int rank, int64_t half, double seconds)
        : ranks(ranks), rank(rank), half(half), seconds(seconds) {}

    int open(void *handle) {
        void *memory = nullptr, *word = nullptr;
        // Whole pages of the device: the handle of a smaller piece would open its neighbours too.
        const auto bytes = static_cast<size_t>(round_up(static_cast<int64_t>(sizeof(header)) + 2 * half, 2 << 20));
        TRY(cuda_status(cudaMalloc(&memory, bytes), "making a window"));
        window[rank] = static_cast<header *>(memory);
        TRY(cuda_status(cudaMemset(memory, 0, sizeof(header)), "making a window"));
        TRY(cuda_status(cudaStreamSynchronize(nullptr), "making a window"));
        TRY(cuda_status(cudaHostAlloc(&word, sizeof(int32_t) * (1 + COUNTS), cudaHostAllocMapped), "making a window"));
        host = static_cast<int32_t *>(word);
        *host = 0;
        static_assert(sizeof(cudaIpcMemHandle_t) == MOE_WINDOW_HANDLE_BYTES);
        return cuda_status(cudaIpcGetMemHandle(static_cast<cudaIpcMemHandle_t *>(handle), memory), "sharing a window");
    }

    int join(const void *handles_P) override {
        const auto *handles = static_cast<const cudaIpcMemHandle_t *>(handles_P);
        for (int p = 0; p < ranks; p++) {
            if (window[p]) continue;
            char what[64];
            snprintf(what, sizeof what, "opening the window of rank %d", p);
            void *memory = nullptr;
            TRY(cuda_status(cudaIpcOpenMemHandle(&memory, handles[p], cudaIpcMemLazyEnablePeerAccess), what));
            window[p] = static_cast<header *>(memory);
            opened[p] = true;
        }
        return MOE_OK;
    }

    int counts(int64_t n, const int32_t *mine_n, int32_t *all_Pn, cudaStream_t stream) override {
        const int64_t bytes = n * static_cast<int64_t>(sizeof(int32_t));
        if (n < 0 || n * ranks > COUNTS) return MOE_BAD_SHAPE;
        int64_t from_P[MAX_RANKS] = {}, bytes_P[MAX_RANKS], to_P[MAX_RANKS];
        for (int p = 0; p < ranks; p++) bytes_P[p] = bytes, to_P[p] = rank * bytes;
        TRY(exchange(from_P, bytes_P, to_P, bytes * ranks, mine_n, host + 1, stream));
        TRY(cuda_status(cudaStreamSynchronize(stream), "waiting for counts"));
        TRY(alive());
        for (int64_t i = 0; i < n * ranks; i++) all_Pn[i] = host[1 + i];
        return MOE_OK;
    }

    int rows(const int64_t *bytes_PP, const void *sent, void *received, cudaStream_t stream) override {
        int64_t from_P[MAX_RANKS], to_P[MAX_RANKS], from = 0, mine = 0;
        for (int p = 0; p < ranks; p++) {
            int64_t all = 0;
            for (int q = 0; q < ranks; q++) {
                if (q == rank) to_P[p] = all;
                all += bytes_PP[q * ranks + p];
            }
            if (all > half)
                return cuda_failed("a window holds %lld bytes, rank %d is to receive %lld",
                                   static_cast<long long>(half), p, static_cast<long long>(all));
            if (p == rank) mine = all;
            from_P[p] = from;
            from += bytes_PP[rank * ranks + p];
        }
        return exchange(from_P, bytes_PP + rank * ranks, to_P, mine, sent, received, stream);
    }

    int leave(cudaStream_t stream) override {
        TRY(cuda_status(cudaStreamSynchronize(stream), "leaving the windows"));
        for (int p = 0; p < ranks; p++)
            if (opened[p]) (void)cudaIpcCloseMemHandle(window[p]), window[p] = nullptr, opened[p] = false;
        return MOE_OK;
    }

    ~window_wire() override {
        (void)cudaFree(window[rank]), (void)cudaFreeHost(host);
    }
};
}  // namespace

int moe_window_open(int ranks, int rank, int64_t bytes, double seconds, void *handle, moe_wire **wire) {
    if (ranks > MAX_RANKS) return cuda_failed("windows join at most %d ranks, not %d", MAX_RANKS, ranks);
    if (ranks < 1 || rank < 0 || rank >= ranks || !(seconds > 0)) return MOE_BAD_SHAPE;
    if (bytes < 0 || bytes > INT64_MAX / 4) return MOE_BAD_SHAPE;
    auto *opened = new window_wire(ranks, rank, round_up(max64(bytes, COUNTS * 4), 256), seconds);
    const int status = opened->open(handle);
    if (status == MOE_OK) *wire = opened;
    else delete opened;
    return status;
}
