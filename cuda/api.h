// api.h: the functions of libmoe_cuda.so as ops.cpp finds them at run time: those of moe.h, stream last.
//
// A function here and its twin in csrc/ have one name, one order of arguments and, promise by promise, one result; the
// pointers are device memory (structs of arguments and moe_mat are read on the host during the call). A call only
// queues work on the stream. What the CPU refuses because of values in memory (an id out of range, bins that decrease,
// NaN logits) does not stop a kernel: it skips the bad piece, touches no memory that is not its own, and leaves a
// verdict in the device's error word, which the next call and moe_ext.synchronize() read.
// dtypes: MOE_F32, MOE_BF16, MOE_F16 and the integers; MOE_F64 is MOE_BAD_DTYPE.
#ifndef MOE_API_H
#define MOE_API_H
#include "../csrc/moe.h"

typedef struct CUstream_st *moe_stream;         // cudaStream_t, without CUDA's headers

// The functions that a kernel's verdict may name, and those that have none.
#define MOE_CUDA_OPS(X) \
    X(sort) X(histogram) X(cumsum) X(topology) X(replicate) X(replicate_backward) X(route_index) \
    X(gather) X(scatter) X(scatter_dweights) \
    X(grouped_gemm) X(grouped_gemm_wgrad) X(activation) X(activation_backward) \
    X(expert_mlp) X(expert_mlp_backward) \
    X(exchange_plan) X(exchange_pack) X(exchange_unpack) X(exchange_combine) \
    X(router) X(router_backward) X(capacity) X(balance_counts) X(balance_loss) X(balance_loss_backward) \
    X(z_loss) X(z_loss_backward) X(select_bias_update) X(xent) X(uniform) X(normal) X(dropout) \
    X(rms_norm) X(rms_norm_backward) X(add_norm) X(add_norm_backward) X(rotate) X(square_sum)
#define MOE_CUDA_WORKSPACES(X) \
    X(sort_workspace) X(route_index_workspace) X(scatter_workspace) X(scatter_dweights_workspace) \
    X(grouped_gemm_workspace) X(grouped_gemm_wgrad_workspace) X(expert_mlp_workspace) \
    X(expert_mlp_backward_workspace) X(capacity_workspace) X(balance_loss_workspace) X(exchange_plan_workspace) \
    X(rms_norm_workspace) X(rms_norm_backward_workspace) X(add_norm_backward_workspace) X(square_sum_workspace)

enum moe_cuda_op {
#define X(name) OP_##name,
    MOE_CUDA_OPS(X)
#undef X
    OP_window,
};

template <class Result, class... Args>
auto with_stream(Result (*)(Args...)) -> Result (*)(Args..., moe_stream);

// Moves rows between ranks: nccl.cu, windows.cu, and in csrc/wires.cpp the C core's windows. All ranks of a wire make the
// same calls in the same order, each on one stream. A rank that does not answer within the timeout breaks the wire:
// MOE_CUDA_FAILED, and error() says who.
struct moe_wire {
    // mine_n int32 on the device -> all_Pn on the host, those of every rank. Waits: the one host read of an exchange.
    virtual int counts(int64_t n, const int32_t *mine_n, int32_t *all_Pn, moe_stream stream) = 0;
    // bytes_PP[p][q], on the host and the same everywhere: what p sends to q. `sent` holds a rank's pieces in the order
    // of their receivers, `received` in that of their senders. Only queues.
    virtual int rows(const int64_t *bytes_PP, const void *sent, void *received, moe_stream stream) = 0;
    // Once, before the first call: what each rank's open returned, 64 bytes each.
    virtual int join(const void *handles_P) = 0;
    // Waits for the stream and lets go of what belongs to other ranks. When all have left, the wire may be deleted.
    virtual int leave(moe_stream stream) = 0;
    virtual ~moe_wire() = default;
};
enum { MOE_NCCL_ID_BYTES = 128 };

// How a grouped product is computed: by the kernel of gemm.cuh, or on Hopper by TMA and wgmma with one of these tiles.
enum moe_way { MOE_GEMM, MOE_SM90_128x256, MOE_SM90_128x192, MOE_SM90_128x128, MOE_WAYS };

// The tensors of csrc/slots.c where they are in device memory: slots.cu. send and take only queue, all on one stream;
// raise(claim) is called behind the copy, by a thread of the driver.
struct moe_device_slots {
    virtual int send(int64_t slot, const void *x, void (*raise)(void *), void *claim, moe_stream stream) = 0;
    virtual int take(int64_t slot, void *x, void (*raise)(void *), void *claim, moe_stream stream) = 0;
    // Once, before the first call: the handles of all ranks, 64 bytes each.
    virtual int join(const void *handles_P) = 0;
    // Waits for the stream and lets go of what belongs to other ranks. The destructor waits for it too.
    virtual int leave() = 0;
    virtual ~moe_device_slots() = default;
};

struct moe_cuda {
    size_t size;        // sizeof(moe_cuda): two builds that do not fit are not used together
    // MOE_OK if `device` can run these kernels (sm_80 or newer); the first call of a process makes its error word.
    int (*ready)(int device);
    // Why the last call of this thread failed, in a sentence.
    const char *(*error)(void);
    // Waits for the stream, or returns what is known without waiting. MOE_OK, or the verdict: who said it, and at which
    // flat position. Reading a verdict clears it.
    int (*verdict)(bool wait, const char **op, int64_t *position, moe_stream stream);
    // A name for a new communicator, made by one rank; then what each rank makes of it.
    int (*nccl_id)(void *id);
    int (*nccl_open)(const void *id, int ranks, int rank, double seconds, moe_wire **wire);
    // A window of two halves of `bytes` each, and the handle that lets the other ranks into it.
    int (*window_open)(int ranks, int rank, int64_t bytes, double seconds, void *handle, moe_wire **wire);
    // 2n slots of `bytes` of a rank, one of stages of `stage` ranks each, as those of moe_slots_open; and its handle.
    int (*slots_open)(int ranks, int rank, int stage, int64_t n, int64_t bytes, void *handle, moe_device_slots **slots);
    // The yardstick of benchmarks, one cublasGemmEx per expert: it reads bins on the host, so it waits for the stream.
    decltype(with_stream(&moe_grouped_gemm)) cublas_gemm;
    decltype(with_stream(&moe_grouped_gemm_wgrad)) cublas_gemm_wgrad;
    // For benchmarks and tests. How many products this process has launched in each way, MOE_WAYS counts; and from now on
    // every product that can takes this way, and every product of Hopper's does so many row tiles together, instead of
    // its policy's (-1 and 0: the policy's again).
    void (*products)(int64_t *counts);
    void (*force)(int way, int group);
#define X(name) decltype(with_stream(&moe_##name)) name;
    MOE_CUDA_OPS(X)
    MOE_CUDA_WORKSPACES(X)
#undef X
};
extern "C" __attribute__((visibility("default"))) const moe_cuda *moe_cuda_table(void);
#endif
