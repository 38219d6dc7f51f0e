// ipc.h: device memory that other processes can open (memory files under it), events, and what else the transports of
// cuda/ ask of the runtime. On the host everything queued is done at once; but while a test has set simt_held, copies and host
// functions are kept, until it has simt_run(n) of them, or somebody waits for the stream. Kernels are not kept.
#ifndef SIMT_IPC_H
#define SIMT_IPC_H
typedef struct CUevent_st *cudaEvent_t;
typedef struct { char reserved[64]; } cudaIpcMemHandle_t;
enum { cudaEventDisableTiming = 2, cudaIpcMemLazyEnablePeerAccess = 1 };
cudaError_t cudaSetDevice(int device);
cudaError_t cudaMalloc(void **p, size_t bytes);
cudaError_t cudaFree(void *p);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaMemset(void *p, int value, size_t bytes);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
// Not ready while a test has set simt_stuck: a stream that waits for a dead peer.
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void *), void *arg);
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *p);
cudaError_t cudaIpcOpenMemHandle(void **p, cudaIpcMemHandle_t handle, unsigned flags);
cudaError_t cudaIpcCloseMemHandle(void *p);
#endif
