// nccl.cu: a wire over NCCL, called from C on a communicator of its own.
//
//   counts   one group: every rank sends its n numbers to every rank, itself included
//   rows     one group: a send and a receive for each pair that has bytes; both sides know the matrix, so both skip the
//            same pairs
// Launch order. Two communicators in flight (this one and torch's) deadlock if two ranks queue them in different orders
// on streams that wait for each other. So every call goes to the caller's current stream, in program order, and nothing
// runs beside it: collectives of another communicator belong on the same stream, or in the same order on all ranks.
//
// The communicator does not block: NCCL's calls return at once, this file asks for their outcome until the deadline and
// then aborts the communicator, which also ends its kernels. Queued rows are watched by a thread, because nothing on
// the host waits for them; it asks events, so this wire cannot be captured in a CUDA graph. NCCL does not say which
// rank is missing.
//
// libnccl.so.2 is opened at run time, the copy that torch has loaded if there is one; nothing is linked.
#include <dlfcn.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>

#include "common.cuh"
#if __has_include(<nccl.h>)
#include <nccl.h>
#endif

namespace {
// ---- the part of nccl.h that is used --------------------------------------------------------------------------------
struct communicator;
struct unique_id { char bytes[MOE_NCCL_ID_BYTES]; };
struct configuration {                      // as of 2.14; a newer NCCL fills in the rest by `version`
    size_t   size;
    unsigned magic, version;
    int      blocking;
};
constexpr int SUCCESS = 0, IN_PROGRESS = 7, BYTES = 0;
#ifdef NCCL_MAJOR
static_assert(SUCCESS == ncclSuccess && IN_PROGRESS == ncclInProgress && BYTES == ncclInt8);
static_assert(sizeof(unique_id) == sizeof(ncclUniqueId));
static_assert(offsetof(configuration, version) == offsetof(ncclConfig_t, version));
static_assert(offsetof(configuration, blocking) == offsetof(ncclConfig_t, blocking));
#endif

struct library {
    const char *(*GetErrorString)(int);
    int (*GetUniqueId)(unique_id *);
    int (*CommInitRankConfig)(communicator **, int, unique_id, int, configuration *);
    int (*CommGetAsyncError)(communicator *, int *);
    int (*CommAbort)(communicator *);
    int (*CommDestroy)(communicator *);
    int (*CommFinalize)(communicator *);
    int (*GroupStart)();
    int (*GroupEnd)();
    int (*Send)(const void *, size_t, int, int, communicator *, cudaStream_t);
    int (*Recv)(void *, size_t, int, int, communicator *, cudaStream_t);
};

// NULL, and why as the error, where it is missing.
const library *nccl() {
    static library found;
    static std::string why;
    static std::once_flag once;
    std::call_once(once, [] {
        void *so = dlopen("libnccl.so.2", RTLD_NOW | RTLD_NOLOAD);
        if (!so) so = dlopen("libnccl.so.2", RTLD_NOW);
        const char *error = so ? nullptr : dlerror();
        auto find = [&](auto &function, const char *name) {
            if (!why.empty()) return;
            if (so) *reinterpret_cast<void **>(&function) = dlsym(so, name);
            if (!so || !function)
                why = "NCCL is not to be had (" + std::string(error ? error : name) +
                      "). Hint: a torch built for CUDA brings it; or pip install nvidia-nccl-cu13";
        };
#define X(name) find(found.name, "nccl" #name);
        X(GetErrorString) X(GetUniqueId) X(CommInitRankConfig) X(CommGetAsyncError) X(CommAbort) X(CommDestroy)
        X(CommFinalize) X(GroupStart) X(GroupEnd) X(Send) X(Recv)
#undef X
    });
    if (why.empty()) return &found;
    cuda_failed("%s", why.c_str());
    return nullptr;
}

using timer = std::chrono::steady_clock;

// ---- the wire -------------------------------------------------------------------------------------------------------
class nccl_wire final : public moe_wire {
    const library &nccl;
    const int      ranks, rank, device;
    const double   seconds;
    communicator  *comm = nullptr;
    cudaEvent_t    done = nullptr;                  // the newest call's end on its stream
    int32_t       *all_device = nullptr, *all_host = nullptr;
    int64_t        room = 0;                        // numbers that these two hold
    // Between the calls and the watching thread.
    std::mutex              lock;
    std::condition_variable news;
    bool                    watched = false, closing = false;
    timer::time_point       deadline;
    std::string             broken;                 // why, once it is
    std::thread             watch;

    int give_up(const char *what, const std::string &why) {
        if (broken.empty()) {
            broken = std::string(what) + " over NCCL failed: " + why;
            if (comm) nccl.CommAbort(comm);
            comm = nullptr;
        }
        return cuda_failed("%s", broken.c_str());
    }
    std::string silence() const {
        char text[96];
        snprintf(text, sizeof text, "one of %d ranks did not answer rank %d within %g s", ranks, rank, seconds);
        return text;
    }
    timer::time_point from_now() const {
        return timer::now() + std::chrono::duration_cast<timer::duration>(std::chrono::duration<double>(seconds));
    }

    // Until NCCL has taken what was asked of it and, if `event`, the device has done it.
    int settle(const char *what, bool event, timer::time_point end) {
        for (;;) {
            int state = SUCCESS;
            const int asked = nccl.CommGetAsyncError(comm, &state);
            if (asked != SUCCESS) state = asked;
            if (state != SUCCESS && state != IN_PROGRESS) return give_up(what, nccl.GetErrorString(state));
            if (state == SUCCESS) {
                const cudaError_t query = event ? cudaEventQuery(done) : cudaSuccess;
                if (query == cudaSuccess) return MOE_OK;
                if (query != cudaErrorNotReady) return give_up(what, cudaGetErrorString(query));
            }
            if (timer::now() > end) return give_up(what, silence());
            std::this_thread::sleep_for(std::chrono::microseconds(20));
        }
    }
    int started(const char *what, int result) {
        return result == SUCCESS || result == IN_PROGRESS ? MOE_OK : give_up(what, nccl.GetErrorString(result));
    }

    void watching() {
        (void)cudaSetDevice(device);
        std::unique_lock<std::mutex> guard(lock);
        while (!closing) {
            if (!watched) {
                news.wait(guard);
                continue;
            }
            if (comm && cudaEventQuery(done) == cudaErrorNotReady) {
                if (timer::now() > deadline) give_up("moving rows", silence());
                else news.wait_for(guard, std::chrono::milliseconds(20));
            } else watched = false;
        }
    }

   public:
    nccl_wire(const library &nccl, int ranks, int rank, int device, double seconds)
        : nccl(nccl), ranks(ranks), rank(rank), device(device), seconds(seconds) {}

    int open(const void *id) {
        const timer::time_point end = from_now();
        unique_id name;
        memcpy(&name, id, sizeof name);
        configuration config = {sizeof config, 0xcafebeef, 21400, 0};
        TRY(cuda_status(cudaEventCreateWithFlags(&done, cudaEventDisableTiming), "making an event"));
        TRY(started("opening", nccl.CommInitRankConfig(&comm, ranks, name, rank, &config)));
        TRY(settle("opening", false, end));
        watch = std::thread([this] { watching(); });
        return MOE_OK;
    }

    int join(const void *) override { return MOE_OK; }
    int leave(cudaStream_t) override { return MOE_OK; }

    int counts(int64_t n, const int32_t *mine_n, int32_t *all_Pn, cudaStream_t stream) override {
        std::lock_guard<std::mutex> guard(lock);
        if (!comm) return cuda_failed("%s", broken.c_str());
        const timer::time_point end = from_now();
        const size_t bytes = static_cast<size_t>(n) * sizeof(int32_t), all = bytes * static_cast<size_t>(ranks);
        if (n * ranks > room) {
            (void)cudaFree(all_device), (void)cudaFreeHost(all_host);
            all_device = all_host = nullptr, room = 0;
            TRY(cuda_status(cudaMalloc(reinterpret_cast<void **>(&all_device), all), "making room for counts"));
            TRY(cuda_status(cudaHostAlloc(reinterpret_cast<void **>(&all_host), all, cudaHostAllocMapped),
                            "making room for counts"));
            room = n * ranks;
        }
        TRY(started("counting", nccl.GroupStart()));
        for (int p = 0; p < ranks; p++) {
            TRY(started("counting", nccl.Send(mine_n, bytes, BYTES, p, comm, stream)));
            TRY(started("counting", nccl.Recv(all_device + p * n, bytes, BYTES, p, comm, stream)));
        }
        TRY(started("counting", nccl.GroupEnd()));
        TRY(settle("counting", false, end));
        TRY(cuda_status(cudaMemcpyAsync(all_host, all_device, all, cudaMemcpyDefault, stream), "reading counts"));
        TRY(cuda_status(cudaEventRecord(done, stream), "reading counts"));
        TRY(settle("counting", true, end));
        memcpy(all_Pn, all_host, all);
        return MOE_OK;
    }

    int rows(const int64_t *bytes_PP, const void *sent, void *received, cudaStream_t stream) override {
        std::lock_guard<std::mutex> guard(lock);
        if (!comm) return cuda_failed("%s", broken.c_str());
        const auto *from = static_cast<const char *>(sent);
        auto *to = static_cast<char *>(received);
        const timer::time_point end = from_now();
        TRY(started("moving rows", nccl.GroupStart()));
        for (int p = 0; p < ranks; p++) {
            const int64_t out = bytes_PP[rank * ranks + p], in = bytes_PP[p * ranks + rank];
            if (out) TRY(started("moving rows", nccl.Send(from, static_cast<size_t>(out), BYTES, p, comm, stream)));
            if (in) TRY(started("moving rows", nccl.Recv(to, static_cast<size_t>(in), BYTES, p, comm, stream)));
            from += out, to += in;
        }
        TRY(started("moving rows", nccl.GroupEnd()));
        TRY(settle("moving rows", false, end));
        TRY(cuda_status(cudaEventRecord(done, stream), "moving rows"));
        watched = true, deadline = end;
        news.notify_one();
        return MOE_OK;
    }

    ~nccl_wire() override {
        {
            std::lock_guard<std::mutex> guard(lock);
            closing = true;
            news.notify_one();
        }
        if (watch.joinable()) watch.join();
        if (comm && settle("closing", true, from_now()) == MOE_OK &&
            started("closing", nccl.CommFinalize(comm)) == MOE_OK && settle("closing", false, from_now()) == MOE_OK)
            nccl.CommDestroy(comm);
        if (done) (void)cudaEventDestroy(done);
        (void)cudaFree(all_device), (void)cudaFreeHost(all_host);
    }
};
}  // namespace

int moe_nccl_id(void *id) {
    const library *so = nccl();
    if (!so) return MOE_CUDA_FAILED;
    const int result = so->GetUniqueId(static_cast<unique_id *>(id));
    return result == SUCCESS ? MOE_OK : cuda_failed("naming a communicator failed: %s", so->GetErrorString(result));
}

int moe_nccl_open(const void *id, int ranks, int rank, double seconds, moe_wire **wire) {
    const library *so = nccl();
    if (!so) return MOE_CUDA_FAILED;
    if (ranks < 1 || rank < 0 || rank >= ranks || !(seconds > 0)) return MOE_BAD_SHAPE;
    int device = 0;
    TRY(cuda_status(cudaGetDevice(&device), "reading the device"));
    auto *opened = new nccl_wire(*so, ranks, rank, device, seconds);
    const int status = opened->open(id);
    if (status == MOE_OK) *wire = opened;
    else delete opened;
    return status;
}
