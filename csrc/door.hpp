// door.hpp: what every torch op of ops.cpp and wires.cpp does before and after it calls the core: check arguments,
// allocate, report.
//
// A Door belongs to one call of one op. `in` checks one tensor and returns its data; the first tensor decides where the
// call runs: RUN(name, ...) is moe_<name>(...) on the CPU and its twin on torch's current stream on a GPU. `done` turns
// a status into an exception. Messages name op, argument, got and wanted, and where possible what to type.
// What a kernel finds wrong in memory comes later: the next call, or moe_ext.synchronize(), raises it. MOE_CHECK=1 in the
// environment waits after every call instead.
#ifndef MOE_DOOR_HPP
#define MOE_DOOR_HPP
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/api.h"
#include "cuda.h"
#include "memory.h"
#include "moe.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using In = const Tensor &;
using MaybeIn = const Maybe &;

// ---- dtypes ---------------------------------------------------------------------------------------------------------

struct Dtype {
    ScalarType scalar;
    const char *name;
};
inline const Dtype DTYPES[] = {  // in the order of moe_dtype
    {ScalarType::Double, "float64"}, {ScalarType::Float, "float32"}, {ScalarType::BFloat16, "bfloat16"},
    {ScalarType::Half, "float16"},   {ScalarType::Short, "int16"},   {ScalarType::Int, "int32"},
    {ScalarType::Long, "int64"},
};
constexpr int N_DTYPES = sizeof DTYPES / sizeof *DTYPES;

constexpr unsigned only(int dtype) { return 1u << dtype; }  // sets of dtypes are bit masks
constexpr unsigned FLOATS = only(MOE_F64) | only(MOE_F32) | only(MOE_BF16) | only(MOE_F16);
constexpr unsigned INTS = only(MOE_I16) | only(MOE_I32) | only(MOE_I64);

inline int dtype_of(ScalarType scalar) {  // N_DTYPES if the core does not know it
    int i = 0;
    while (i < N_DTYPES && DTYPES[i].scalar != scalar) i++;
    return i;
}
inline int dtype_of(In t) { return dtype_of(t.scalar_type()); }
inline int real_of(int dtype) { return dtype == MOE_F64 ? MOE_F64 : MOE_F32; }
inline unsigned weight_dtypes(In x) { return only(MOE_F32) | only(dtype_of(x)); }
inline int dtype_of_weights(MaybeIn weights) { return weights ? dtype_of(*weights) : MOE_F32; }

inline bool checked() {  // MOE_CHECK=1 in the environment
    static const bool is = std::getenv("MOE_CHECK") && *std::getenv("MOE_CHECK") == '1';
    return is;
}

// ---- the door -------------------------------------------------------------------------------------------------------

// A size with a name. The first argument that has it sets it; all others must agree.
struct Dim {
    const char *name;
    int64_t n = -1;
    operator int64_t() const { return n; }
};
using Shape = std::initializer_list<Dim *>;
enum Strides { CONTIGUOUS, ANY };

enum DeviceType : int32_t { CPU = 0, CUDA = 1 };  // torch's numbers
struct Place {
    int32_t type, index;
    explicit Place(In t) : index(t.get_device_index()) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    }
    bool operator==(const Place &other) const { return type == other.type && index == other.index; }
    std::string text() const {
        return type == CPU ? "cpu" : type == CUDA ? "cuda:" + std::to_string(index) : "another device";
    }
};

#define RUN(name, ...) \
    (door.cuda ? door.cuda->name(__VA_ARGS__ __VA_OPT__(,) door.stream) : moe_##name(__VA_ARGS__))

struct Door {
    const char *op;
    std::optional<Place> place = {};        // of the first argument
    const moe_cuda *cuda = nullptr;         // the kernels that run the call, or NULL: the C core
    moe_stream stream = nullptr;
    std::optional<torch::stable::accelerator::DeviceGuard> guard = {};

    void enter(In t) {
        place = Place(t);
        cuda = moe_cpu_served_by();
        if (place->type == CUDA) {
            const char *why;
            if (!(cuda = moe_cuda_find(&why))) fail(why);
            guard.emplace(place->index);
            if (!moe_cuda_stream(place->index, &stream)) fail("torch does not say which CUDA stream is current");
        }
        if (!cuda) return;
        if (cuda->ready(place->type == CUDA ? place->index : 0) != MOE_OK) fail(cuda->error());
        read_verdict(false);
    }

    // Raises what a kernel complained of.
    void read_verdict(bool wait) const {
        const char *said_by = op;
        int64_t position = -1;
        const int status = cuda->verdict(wait, &said_by, &position, stream);
        if (status == MOE_CUDA_FAILED) fail(cuda->error());
        if (status == MOE_PEER_SILENT) fail("rank ", position, " did not answer an exchange in time. Is it alive?");
        if (status != MOE_OK)
            fail(moe_status_text(status), ", at flat position ", position, " of an earlier ", said_by,
                 " on this device. Hint: MOE_CHECK=1 in the environment raises at the call itself");
    }

    template <class... Parts>
    [[noreturn]] void fail(const Parts &...parts) const {
        std::ostringstream s;
        s << "moe_ext::" << op << ": ";
        (s << ... << parts);
        throw std::runtime_error(s.str());
    }

    // Checks one tensor and returns its data.
    void *in(const char *arg, In t, unsigned dtypes, Shape shape, Strides strides = CONTIGUOUS) {
        if (!place) enter(t);
        if (const Place here(t); !(here == *place))
            fail(arg, " is on device ", here.text(), ", the first argument on ", place->text(), ". Hint: ", arg,
                 ".to(\"", place->text(), "\")");
        if (cuda) dtypes &= ~only(MOE_F64);
        const int dtype = dtype_of(t);
        if (dtype == N_DTYPES || !(dtypes & only(dtype))) bad_dtype(arg, dtype, dtypes);
        const auto sizes = t.sizes();
        bool fits = sizes.size() == shape.size();
        for (size_t i = 0; fits && i < shape.size(); i++) {
            Dim &d = *shape.begin()[i];
            if (d.n < 0) d.n = sizes[i];
            fits = d.n == sizes[i];
        }
        if (!fits) bad_shape(arg, t, shape);
        if (strides == CONTIGUOUS && !t.is_contiguous())
            fail(arg, " is not contiguous. Hint: ", arg, ".contiguous()");
        return t.data_ptr();
    }
    void *in(const char *arg, MaybeIn t, unsigned dtypes, Shape shape, Strides strides = CONTIGUOUS) {
        return t ? in(arg, *t, dtypes, shape, strides) : nullptr;
    }

    int32_t *i32(const char *arg, In t, Shape shape) {
        return static_cast<int32_t *>(in(arg, t, only(MOE_I32), shape));
    }
    int32_t *i32(const char *arg, MaybeIn t, Shape shape) { return t ? i32(arg, *t, shape) : nullptr; }

    [[noreturn]] void bad_dtype(const char *arg, int dtype, unsigned wanted) const {
        std::string names, first;
        for (int i = 0; i < N_DTYPES; i++) {
            if (!(wanted & only(i))) continue;
            if (first.empty() || i == MOE_F32) first = DTYPES[i].name;
            names += (names.empty() ? "" : " or ") + std::string(DTYPES[i].name);
        }
        if (dtype == MOE_F64 && cuda) names += " on a GPU";
        const char *got = dtype == N_DTYPES ? "that the core does not know" : DTYPES[dtype].name;
        fail(arg, " has dtype ", got, ", wanted ", names, ". Hint: ", arg, ".to(torch.", first, ")");
    }

    [[noreturn]] void bad_shape(const char *arg, In t, Shape shape) const {
        std::ostringstream got, wanted;
        for (int64_t n : t.sizes()) got << (got.tellp() ? ", " : "") << n;
        for (const Dim *d : shape) {
            wanted << (wanted.tellp() ? ", " : "") << d->name;
            if (d->n >= 0) wanted << "=" << d->n;
        }
        fail(arg, " has shape [", got.str(), "], wanted [", wanted.str(), "]");
    }

    // Throws unless the C function succeeded; `wanted` says what the values of the arguments must obey.
    template <class... Parts>
    void done(int status, const Parts &...wanted) const {
        if (status == MOE_CUDA_FAILED) fail(cuda->error());
        if (status != MOE_OK) fail(moe_status_text(status), ". ", wanted...);
        if (cuda && checked()) read_verdict(true);
    }

    // After MOE_BAD_INDEX: says which of n ids is outside [0, end) and not `other`.
    template <class Id>
    [[noreturn]] void bad_index(const char *arg, const Id *ids, int64_t n, int64_t end, int64_t other) const {
        int64_t i = 0;
        while (i < n - 1 && ((ids[i] >= 0 && ids[i] < end) || ids[i] == other)) i++;
        fail(arg, " has ", ids[i], " at flat position ", i, ", wanted 0 <= id < ", end, " or ", other);
    }

    // A value of an enum of moe.h. Python turns names into these numbers (moe_ext/ops/enums.py).
    int choice(const char *arg, int64_t number, int last) const {
        if (number < 0 || number > last) fail(arg, " is ", number, ", wanted 0 .. ", last);
        return static_cast<int>(number);
    }
};

// ---- memory ---------------------------------------------------------------------------------------------------------

// A new tensor, which the op fills. The large ones of the CPU come from the arena (memory.h), so their storage cannot
// be resized. MOE_CHECK=1 in the environment fills these with NaN, as torch's deterministic mode does the others.
inline Tensor empty(Place place, ScalarType scalar, const std::vector<int64_t> &shape,
                    const std::vector<int64_t> &strides) {
    const int64_t dims = static_cast<int64_t>(shape.size());
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar));
    int64_t elements = 1;
    for (int64_t n : shape) elements *= n;
    const int64_t bytes = elements * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
    // the host harness of cuda/ looks for what its kernels do beyond the borders of malloc's blocks
    void *kept = place.type == CPU && !moe_cpu_served_by() ? moe_memory_take(bytes) : nullptr;
    AtenTensorHandle made;
    if (kept) {
        if (checked()) std::memset(kept, 0xff, static_cast<size_t>(bytes));
        if (!torch_from_blob(kept, dims, shape.data(), strides.data(), 0, dtype, place.type, place.index, &made,
                             aoti_torch_layout_strided(), nullptr, 0,
                             [](void *data, void *) { moe_memory_give(data); }, nullptr))
            return Tensor(made);
        moe_memory_give(kept);
    }
    const auto of_torch = [&] {
        return aoti_torch_empty_strided(dims, shape.data(), strides.data(), dtype, place.type, place.index, &made);
    };
    if (of_torch() && (moe_memory_release(), of_torch()))
        throw std::runtime_error("moe_ext: torch has no memory for " + std::to_string(elements) + " elements on " +
                                 place.text() + ". Hint: fewer tokens in a batch");
    return Tensor(made);
}
inline Tensor empty(Place place, ScalarType scalar, const std::vector<int64_t> &shape) {
    std::vector<int64_t> strides(shape.size());
    for (int64_t i = std::ssize(shape) - 1, stride = 1; i >= 0; stride *= std::max<int64_t>(shape[i--], 1))
        strides[i] = stride;
    return empty(place, scalar, shape, strides);
}
inline Tensor empty(In like, int dtype, const std::vector<int64_t> &shape) {
    return empty(Place(like), DTYPES[dtype].scalar, shape);
}
// Of like's shape and dtype, dense, its axes in the order in which like's lie in memory.
inline Tensor dense_like(In like) {
    std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end()), strides(shape.size()), axes(shape.size());
    std::iota(axes.begin(), axes.end(), 0);
    std::stable_sort(axes.begin(), axes.end(), [&](auto i, auto j) { return like.stride(i) > like.stride(j); });
    for (int64_t i = std::ssize(axes) - 1, stride = 1; i >= 0; stride *= std::max<int64_t>(shape[axes[i--]], 1))
        strides[axes[i]] = stride;
    return empty(Place(like), like.scalar_type(), shape, strides);
}

// Bytes lent to one call of the core, for as long as the object lives.
class Workspace {
    Tensor lent;

   public:
    void *p;
    Workspace(const Door &door, size_t bytes)  // never none: a null pointer has no pieces
        : lent(empty(*door.place, ScalarType::Byte, {static_cast<int64_t>(bytes) + !bytes})), p(lent.data_ptr()) {}
};

inline int32_t *i32(In t) { return static_cast<int32_t *>(t.data_ptr()); }
inline moe_mat matrix(void *p, In t) { return {p, t.stride(0), t.stride(1), t.stride(2)}; }
#endif
