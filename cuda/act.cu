// act.cu: the twins of csrc/act.c.
//
//   gated   h_NU = [gate | up], U = 2F    a = act(gate) * u    dgate = da * u * act'(gate)    dup = da * act(gate) * u'
//   plain   h_NU, U = F                   a = act(h)           dh = da * act'(h)
//
// with u = u(up), which is up but for swiglu_oai (csrc/acts.h).
// A thread owns eight neighbouring columns of a, in float; results are rounded once. `whole`: every piece of eight is
// there and aligned, so that its loads have no branch between them.
#include "act.cuh"

enum { THREADS = 256 };

// Without a gate rows do not matter: all of h is one row, whose pieces of eight are aligned whatever F is.
struct act_job {
    int     plain;
    int64_t N, F;
};
static int job_of(int dtype, int act, int64_t N, int64_t F, act_job *job) {
    if (!is_float(dtype)) return MOE_BAD_DTYPE;
    if (!known_act(act)) return MOE_BAD_VALUE;
    if (N < 0 || F < 0 || (F > 0 && N > INT64_MAX / 16 / F)) return MOE_BAD_SHAPE;
    *job = gated_act(act) ? act_job{act_plain(act), N, F} : act_job{act_plain(act), 1, N * F};
    return MOE_OK;
}
static int64_t grid_of(const act_job &job) { return strided_grid(job.N * ceil_div(job.F, 8), THREADS); }

static bool is_whole(const act_job &job, const void *x, const void *y, const void *z) {
    return job.F % 8 == 0 && aligned16(x) && aligned16(y) && aligned16(z);
}

// body(row, first column, number of columns) for each piece.
template <bool whole, class Body>
static __device__ inline void for_pieces(const act_job &job, Body body) {
    const int64_t pieces = ceil_div(job.F, 8), stride = static_cast<int64_t>(gridDim.x) * THREADS;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < job.N * pieces; i += stride) {
        const int64_t row = i / pieces, j = (i - row * pieces) * 8;
        body(row, j, whole ? 8 : static_cast<int>(min64(8, job.F - j)));
    }
}

// ---- a = act(h) -----------------------------------------------------------------------------------------------------
template <class T, bool gated, bool whole>
__global__ void __launch_bounds__(THREADS) act_kernel(act_job job, const T *h_NU, T *a_NF) {
    for_pieces<whole>(job, [&](int64_t row, int64_t j, int n) {
        const T *h = h_NU + row * (gated ? 2 * job.F : job.F) + j;
        float gate[8], up[8], a[8], slope[8], unused;
        load8(piece_at<whole>(h), n, gate);
        if (gated) load8(piece_at<whole>(h + job.F), n, up);
        act8(job.plain, gate, a, slope);
        if (gated)
            for (int v = 0; v < 8; v++) a[v] *= up_value_f32(job.plain, up[v], &unused);
        store8(piece_at<whole>(a_NF + row * job.F + j), n, a);
    });
}

int moe_activation(int dtype, int act, int64_t N, int64_t F, const void *h_NU, void *a_NF, cudaStream_t stream) {
    act_job job;
    TRY(job_of(dtype, act, N, F, &job));
    const bool whole = is_whole(job, h_NU, a_NF, nullptr);
    return by_float(dtype, [&]<class T>(T) {
        void (*const kernel)(act_job, const T *, T *) =
            gated_act(act) ? whole ? act_kernel<T, true, true> : act_kernel<T, true, false>
                           : whole ? act_kernel<T, false, true> : act_kernel<T, false, false>;
        return launch(kernel, grid_of(job), THREADS, 0, stream, job, static_cast<const T *>(h_NU),
                      static_cast<T *>(a_NF));
    });
}

// ---- a = act(gate) * u(up)  gives  dgate = da * u * act'(gate), dup = da * act(gate) * u' ---------------------------
template <class T, bool gated, bool whole>
__global__ void __launch_bounds__(THREADS) dact_kernel(act_job job, const T *h_NU, const T *da_NF, T *dh_NU) {
    for_pieces<whole>(job, [&](int64_t row, int64_t j, int n) {
        const int64_t at = row * (gated ? 2 * job.F : job.F) + j;
        float gate[8], up[8], da[8], dgate[8], dup[8], value[8], slope[8];
        load8(piece_at<whole>(h_NU + at), n, gate);
        if (gated) load8(piece_at<whole>(h_NU + at + job.F), n, up);
        load8(piece_at<whole>(da_NF + row * job.F + j), n, da);
        act8(job.plain, gate, value, slope);
        for (int v = 0; v < 8; v++) {
            float du, u = gated ? up_value_f32(job.plain, up[v], &du) : du = 1;
            dgate[v] = da[v] * u * slope[v];
            dup[v] = da[v] * value[v] * du;
        }
        store8(piece_at<whole>(dh_NU + at), n, dgate);
        if (gated) store8(piece_at<whole>(dh_NU + at + job.F), n, dup);
    });
}

int moe_activation_backward(int dtype, int act, int64_t N, int64_t F, const void *h_NU, const void *da_NF, void *dh_NU,
                            cudaStream_t stream) {
    act_job job;
    TRY(job_of(dtype, act, N, F, &job));
    const bool whole = is_whole(job, h_NU, da_NF, dh_NU);
    return by_float(dtype, [&]<class T>(T) {
        void (*const kernel)(act_job, const T *, const T *, T *) =
            gated_act(act) ? whole ? dact_kernel<T, true, true> : dact_kernel<T, true, false>
                           : whole ? dact_kernel<T, false, true> : dact_kernel<T, false, false>;
        return launch(kernel, grid_of(job), THREADS, 0, stream, job, static_cast<const T *>(h_NU),
                      static_cast<const T *>(da_NF), static_cast<T *>(dh_NU));
    });
}
