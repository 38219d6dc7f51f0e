// tensor_map.cu: maps are encoded by the driver, whose function is found at run time: nothing is linked to libcuda.so.
//
// A map is 128 bytes that depend on an address, sizes and strides, encoded in the caller's memory by the host alone,
// without a call into the kernel or to the device. It costs no more than looking it up would, in a table that threads
// share and that addresses, which change with every allocation, never cease to fill: so none is kept. The kernel has it
// as a parameter, and a captured CUDA graph has the parameters of its kernels: it reads the addresses of its capture.
#include "tensor_map.cuh"

#include <cuda.h>

#include <string>

static_assert(sizeof(tensor_map) == sizeof(CUtensorMap) && alignof(tensor_map) >= alignof(CUtensorMap));

namespace {
using encoder = decltype(&cuTensorMapEncodeTiled);
encoder find_encoder() {
    static const encoder found = [] {
        void *function = nullptr;
        cudaDriverEntryPointQueryResult said = cudaDriverEntryPointSymbolNotFound;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &said);
        if (error != cudaSuccess) (void)cudaGetLastError();
        const bool there = error == cudaSuccess && said == cudaDriverEntryPointSuccess;
        return there ? reinterpret_cast<encoder>(function) : nullptr;
    }();
    return found;
}
std::string words(int n, const int64_t *x) {
    std::string text;
    for (int i = 0; i < n; i++) text += (i ? ", " : "") + std::to_string(x[i]);
    return text;
}
}  // namespace

bool tensor_maps_here() { return find_encoder(); }

int encode_tensor_map(tensor_map *map, int dtype, const void *base, int rank, const int64_t *size, const int64_t *stride,
                      const int *box) {
    const encoder encode = find_encoder();
    if (!encode) return cuda_failed("this driver encodes no tensor maps. Hint: a newer driver, or MOE_SM90=0");
    if (rank < 2 || rank > 4) return cuda_failed("a tensor map of rank %d, wanted 2 to 4", rank);
    cuuint64_t sizes[4], strides[3];
    cuuint32_t boxes[4];
    const cuuint32_t every[4] = {1, 1, 1, 1};
    for (int i = 0; i < rank; i++) {
        sizes[i] = static_cast<cuuint64_t>(size[i]), boxes[i] = static_cast<cuuint32_t>(box[i]);
        if (i) strides[i - 1] = static_cast<cuuint64_t>(stride[i - 1]);
    }
    const CUresult said = encode(
        reinterpret_cast<CUtensorMap *>(map),
        dtype == MOE_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        static_cast<cuuint32_t>(rank), const_cast<void *>(base), sizes, strides, boxes, every,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (said == CUDA_SUCCESS) return MOE_OK;
    const int64_t wide[4] = {box[0], box[1], rank > 2 ? box[2] : 0, rank > 3 ? box[3] : 0};
    return cuda_failed("the driver refuses a tensor map (CUresult %d): base %p, sizes %s, strides %s bytes, box %s. "
                       "Hint: MOE_SM90=0", static_cast<int>(said), base, words(rank, size).c_str(),
                       words(rank - 1, stride).c_str(), words(rank, wide).c_str());
}
