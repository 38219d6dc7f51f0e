// slots.cu: tensors between the stages of a pipeline on the GPUs of one host: each rank owns 2n slots of device memory,
// which the ranks in its place of the stages before and after have opened by CUDA IPC. What has come, and what is free,
// is known in the host's memory: csrc/slots.c.
//
//   send    [ copy x to the receiver's slot | raise: it has come   ]    on the sender's stream, when the slot is free
//   take    [ copy the slot to x            | raise: it was taken  ]    on the receiver's, when it has come
//
// raise is a host function, which the driver calls when the copy before it is done: nobody sees a tensor whose bytes
// are still under way, and no call waits for the device.
//
// Verified on the host harness alone: on GPUs nothing of this file has run yet, neither peer copies nor host functions.
#include <cstdio>

#include "common.cuh"

namespace {
class device_slots final : public moe_device_slots {
    const int      ranks, rank, stage;
    const int64_t  n, bytes, stride;                // of a tensor, and from slot to slot
    unsigned char *own = nullptr, *after = nullptr, *before = nullptr;      // slots of the rank one stage on, and back
    cudaStream_t   last = nullptr;                  // the one stream, from the first copy on

    int move(void *to, const void *from, void (*raise)(void *), void *claim, cudaStream_t stream) {
        last = stream;
        TRY(cuda_status(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, stream),
                        "moving a tensor between stages"));
        return cuda_status(cudaLaunchHostFunc(stream, raise, claim), "moving a tensor between stages");
    }

    int open_peer(const cudaIpcMemHandle_t *handles, int p, unsigned char **slots) {
        char what[64];
        snprintf(what, sizeof what, "opening the slots of rank %d", p);
        void *memory = nullptr;
        TRY(cuda_status(cudaIpcOpenMemHandle(&memory, handles[p], cudaIpcMemLazyEnablePeerAccess), what));
        *slots = static_cast<unsigned char *>(memory);
        return MOE_OK;
    }

   public:
    device_slots(int ranks, int rank, int stage, int64_t n, int64_t bytes)
        : ranks(ranks), rank(rank), stage(stage), n(n), bytes(bytes), stride(round_up(bytes, 256)) {}

    int open(void *handle) {
        if (bytes < 0 || bytes > (INT64_C(1) << 62) / (2 * n) - 256) return MOE_BAD_SHAPE;
        void *memory = nullptr;
        // Whole pages of the device: the handle of a smaller piece would open its neighbours too.
        const auto size = static_cast<size_t>(round_up(max64(2 * n * stride, 1), 2 << 20));
        TRY(cuda_status(cudaMalloc(&memory, size), "making slots"));
        own = static_cast<unsigned char *>(memory);
        static_assert(sizeof(cudaIpcMemHandle_t) == MOE_WINDOW_HANDLE_BYTES);
        return cuda_status(cudaIpcGetMemHandle(static_cast<cudaIpcMemHandle_t *>(handle), memory), "sharing slots");
    }

    int join(const void *handles_P) override {
        const auto *handles = static_cast<const cudaIpcMemHandle_t *>(handles_P);
        const int next = (rank + stage) % ranks, previous = (rank + ranks - stage) % ranks;
        TRY(open_peer(handles, next, &after));
        if (previous != next) return open_peer(handles, previous, &before);
        before = after;                             // of two stages
        return MOE_OK;
    }

    int send(int64_t slot, const void *x, void (*raise)(void *), void *claim, cudaStream_t stream) override {
        return move((slot < n ? after : before) + slot * stride, x, raise, claim, stream);
    }
    int take(int64_t slot, void *x, void (*raise)(void *), void *claim, cudaStream_t stream) override {
        return move(x, own + slot * stride, raise, claim, stream);
    }

    int leave() override {
        const int status = cuda_status(cudaStreamSynchronize(last), "leaving the slots");
        if (before && before != after) (void)cudaIpcCloseMemHandle(before);
        if (after) (void)cudaIpcCloseMemHandle(after);
        before = after = nullptr;
        return status;
    }

    ~device_slots() override {
        (void)leave();
        (void)cudaFree(own);
    }
};
}  // namespace

int moe_slots_open(int ranks, int rank, int stage, int64_t n, int64_t bytes, void *handle, moe_device_slots **slots) {
    auto *opened = new device_slots(ranks, rank, stage, n, bytes);
    const int status = opened->open(handle);
    if (status == MOE_OK) *slots = opened;
    else delete opened;
    return status;
}
