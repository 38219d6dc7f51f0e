// moe.h: the whole C API of the core. No torch, no Python; the caller owns every byte.
//
// Shapes (row-major, contiguous unless a moe_mat says otherwise)
//   T tokens   K choices per token   N = T*K copies   R rows given to the experts (T, or rows received)
//   E experts  D model width   F expert width   U = 2F if gated else F   C bin capacity   V vocabulary   P output rows
// Index contract (that of MegaBlocks)
//   flat id   f = token*K + slot
//   order_N   flat id of each copy sorted by expert, stable; entries from bins_E[E-1] on are -1
//   inverse_N sorted position of each flat id, -1 where the id is -1
//   bins_E    int32 inclusive ends: the copies of expert e are order[bins[e-1] .. bins[e])
//   An expert id of -1 means "not here" and is skipped everywhere.
// Arithmetic: "real" is double for MOE_F64 and float for the rest. Sums run in real, in a fixed order whatever the
//   number of threads; results are rounded once, to nearest even. Gradients are written, never accumulated into.
// Errors: every function returns a moe_status and touches no output if it is not MOE_OK (index ops may have written
//   part of theirs). Nothing exits, throws or allocates: `*_workspace` says how many bytes the caller lends, 64-byte
//   aligned; the number of threads must not change between that call and the next.
// Order of arguments: sizes and options, inputs, workspace, outputs.
#ifndef MOE_H
#define MOE_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

// The first four are floating.
typedef enum { MOE_F64, MOE_F32, MOE_BF16, MOE_F16, MOE_I16, MOE_I32, MOE_I64 } moe_dtype;
static inline int64_t moe_size(int dtype) {         // bytes of an element
    static const int8_t bytes[] = {8, 4, 2, 2, 2, 4, 8};
    return bytes[dtype];
}

typedef enum {
    MOE_OK,
    MOE_BAD_DTYPE,      // dtype not taken by this function
    MOE_BAD_SHAPE,      // a negative size, K > E, a product past int64
    MOE_BAD_INDEX,      // an id outside [-1, limit)
    MOE_BAD_BINS,       // bins decrease, are negative or pass the number of rows
    MOE_BAD_VALUE,      // NaN among logits, an unknown enum
    MOE_NO_ISA,         // MOE_ISA names an instruction set that this CPU lacks or that nobody knows
    MOE_CUDA_FAILED,    // from libmoe_cuda.so alone: queueing work on the device failed (cuda/api.h: error() says why)
    MOE_PEER_SILENT,    // from libmoe_cuda.so alone: a rank did not answer in time
    MOE_WIRE_FAILED,    // from windows.c and slots.c: a rank is dead or silent, no memory (moe_peers_error() says)
} moe_status;
const char *moe_status_text(int status);

// ---- run time (isa.c, pool.c) --------------------------------------------------------------------------------------
// Kernels are picked once: the best of base, avx2, avx512, avx512bf16, amx that the CPU has, or what the environment's
// MOE_ISA names.
int         moe_init(void);                 // MOE_OK or MOE_NO_ISA; later calls return the first answer
const char *moe_isa(void);                  // "base", "avx2", ..; NULL if moe_init failed
// One parallel region: calls body(begin, end, arg) on disjoint pieces of [begin, end). One thread until a pool is set.
typedef void    (*moe_body)(int64_t begin, int64_t end, void *arg);
typedef int32_t (*moe_pool)(int64_t begin, int64_t end, int64_t grain, moe_body body, void *arg);
void moe_set_pool(moe_pool pool, int (*threads)(void));   // threads() bounds the pieces of one region
int  moe_threads(void);

// ---- index.c -------------------------------------------------------------------------------------------------------
// Stable ascending sort of x_n (I16, I32, I64) by value, or by its low `end_bit` bits as unsigned if they are not all
// of them; indices have x's dtype.
size_t moe_sort_workspace(int64_t n);
int moe_sort(int dtype, int64_t n, int end_bit, const void *x_n, void *workspace, void *sorted_n, void *indices_n);
// Values outside [0, bins) are ignored.
int moe_histogram(int dtype, int64_t rows, int64_t n, int64_t bins, const void *x_rn, int32_t *counts_rb);
// Along each row.
int moe_cumsum(int dtype, int64_t rows, int64_t n, int exclusive, const void *x_rn, void *y_rn);
int moe_topology(int64_t E, int64_t block, int64_t rows, int64_t cols, const int32_t *padded_bins_E,
                 int16_t *columns_rc);
// y[r, bins[i-1]..bins[i]) = x[r,i]; the tail past bins[nb-1] is zero. Any dtype. Backward: segment sums in real (or
// int64).
int moe_replicate(int dtype, int64_t rows, int64_t nb, int64_t n, const void *x_rb, const int32_t *bins_b, void *y_rn);
int moe_replicate_backward(int dtype, int64_t rows, int64_t nb, int64_t n, const void *dy_rn,
                           const int32_t *bins_b, void *dx_rb);
// The one-pass routing index: counts, bins, order and inverse from ids_N in [-1, E).
size_t moe_route_index_workspace(int64_t N, int64_t E);
int moe_route_index(int64_t N, int64_t E, const int32_t *ids_N, void *workspace,
                    int32_t *counts_E, int32_t *bins_E, int32_t *order_N, int32_t *inverse_N);
// Bins at the door: non-decreasing, >= 0, the last <= rows.
int moe_check_bins(int64_t E, int64_t rows, const int32_t *bins_E);

// ---- permute.c -----------------------------------------------------------------------------------------------------
// Where sorted position p of expert e stands among the P expert rows:
//   plain   p                                     out_bins = NULL, capacity = 0   P = N
//   padded  out_bins[e-1] + (p - bins[e-1])       out_bins given                  P >= out_bins[E-1]
//   binned  e*C + (p - bins[e-1]), dropped if >= C    capacity = C                P = E*C
// Rows that no copy has are zeros.
// order_N may end in -1; only the first bins[E-1] entries are read.
typedef struct {
    int64_t        N, K, E, P;
    int64_t        capacity;
    const int32_t *order_N, *bins_E, *out_bins_E;
} moe_layout;
// y_PD[row(p)] = w[order[p]] * x_TD[order[p]/K]; weights NULL: a bitwise copy. wdtype: of weights_N, F32 or dtype.
int moe_gather(int dtype, int wdtype, int64_t D, const moe_layout *layout, const void *x_TD,
               const void *weights_N, void *y_PD);
// y_TD[t] = sum over slots of w[f] * x_PD[row(f)], in slot order, fma in real. T = N/K. Also the backward of gather.
size_t moe_scatter_workspace(const moe_layout *layout);
int moe_scatter(int dtype, int wdtype, int64_t D, const moe_layout *layout, const void *x_PD,
                const void *weights_N, void *workspace, void *y_TD);
// dweights_N[f] = <x_PD[row(f)], dy_TD[f/K]>, zero where f has no row.
size_t moe_scatter_dweights_workspace(const moe_layout *layout);
int moe_scatter_dweights(int dtype, int wdtype, int64_t D, const moe_layout *layout, const void *x_PD,
                         const void *dy_TD, void *workspace, void *dweights_N);

// ---- gemm.c --------------------------------------------------------------------------------------------------------
// One matrix per expert: element (e, r, c) at p + (e*se + r*sr + c*sc) * size of dtype. Any strides; fast if one is 1.
typedef struct { void *p; int64_t se, sr, sc; } moe_mat;
// y_RO[rows of e] = x_RI[rows of e] @ w_EIO[e]. The other transposition is the same call with sr and sc exchanged.
// Rows from bins[E-1] on are zeroed.
size_t moe_grouped_gemm_workspace(int dtype, int64_t R, int64_t E, int64_t I, int64_t O);
int moe_grouped_gemm(int dtype, int64_t R, int64_t E, int64_t I, int64_t O, const void *x_RI, moe_mat w_EIO,
                     const int32_t *bins_E, void *workspace, void *y_RO);
// dw_EIO[e] = x_RI[rows of e]^T @ dy_RO[rows of e]; an empty expert gets zeros.
size_t moe_grouped_gemm_wgrad_workspace(int dtype, int64_t R, int64_t E, int64_t I, int64_t O);
int moe_grouped_gemm_wgrad(int dtype, int64_t R, int64_t E, int64_t I, int64_t O, const void *x_RI, const void *dy_RO,
                           const int32_t *bins_E, void *workspace, moe_mat dw_EIO);

// ---- act.c ---------------------------------------------------------------------------------------------------------
// The first four are gated: act(gate) * up, or with its clamps (clamp(up) + 1) that of swiglu_oai.
typedef enum { MOE_SWIGLU, MOE_GEGLU, MOE_GEGLU_TANH, MOE_SWIGLU_OAI,
               MOE_SILU, MOE_GELU, MOE_GELU_TANH, MOE_RELU } moe_act;
int moe_act_gated(int act);
// a_NF = act(h): gated h_NU = [gate | up] along a row, U = 2F.
int moe_activation(int dtype, int act, int64_t N, int64_t F, const void *h_NU, void *a_NF);
int moe_activation_backward(int dtype, int act, int64_t N, int64_t F, const void *h_NU, const void *da_NF, void *dh_NU);

// ---- expert.c: the fused expert MLP --------------------------------------------------------------------------------
// For each row r and slot k with expert e = ids[r,k] >= 0 (copy n at sorted position inverse[r*K+k]):
//   h_n = [x_r Wg_e^T + bg_e | x_r Wu_e^T + bu_e]     a_n = act(h_n)     y_r = sum_k s_rk (a_n Wd_e^T + bd_e)
// gate_EFD, up_EFD, down_EDF are [E, out, in] whatever their strides. up.p is NULL if act is not gated. Biases may be
// NULL; they are [E, out] with expert stride `*_se`. weights_RK in F32 or dtype (wdtype). h_NU holds N = bins[E-1]
// sorted copies.
typedef struct {
    int            dtype, wdtype, act;
    int64_t        R, K, E, D, F, N;
    const int32_t *order_RK, *inverse_RK, *bins_E;
    const void    *x_RD, *weights_RK;
    moe_mat        gate_EFD, up_EFD, down_EDF;
    const void    *gate_bias_EF, *up_bias_EF, *down_bias_ED;
    int64_t        gate_bias_se, up_bias_se, down_bias_se;
} moe_expert_args;
size_t moe_expert_mlp_workspace(const moe_expert_args *a);
int moe_expert_mlp(const moe_expert_args *a, void *workspace, void *y_RD, void *h_NU);
// Backward: dA' = Wd^T dy, A = act(h) recomputed, dh = s dA' act'(h), ds = <dA', A> + <dy, bd>, dbd = sum s dy.
typedef struct {
    const void *dy_RD, *h_NU;                                   // in
    void       *dx_RD, *dweights_RK;                            // out; slots with id -1 get a zero dweight
    moe_mat     dgate_EFD, dup_EFD, ddown_EDF;
    void       *dgate_bias_EF, *dup_bias_EF, *ddown_bias_ED;    // NULL where the bias is NULL; strides as the bias
    int64_t     dgate_bias_se, dup_bias_se, ddown_bias_se;
} moe_expert_grads;
// Each output pointer may be NULL: that gradient is not wanted, and what only it needs is neither computed nor lent.
// The others have the same bits whichever are wanted. x is read for dgate and dup alone, and may be NULL without them.
size_t moe_expert_mlp_backward_workspace(const moe_expert_args *a, const moe_expert_grads *g);
int moe_expert_mlp_backward(const moe_expert_args *a, void *workspace, const moe_expert_grads *g);

// ---- route.c, balance.c --------------------------------------------------------------------------------------------
// All of it takes 1 <= E <= MOE_MAX_EXPERTS (else MOE_BAD_SHAPE), and scopes of S rows where S divides T; S = 0 only
// if T = 0, and then there is one empty scope.
enum { MOE_MAX_EXPERTS = 4096 };
typedef enum { MOE_SOFTMAX_TOPK, MOE_TOPK_SOFTMAX, MOE_SIGMOID } moe_score;
// scores_TE = softmax(logits) (sigmoid(logits) for MOE_SIGMOID). ids = the K largest of: scores (+ select_bias_E) or,
// for MOE_TOPK_SOFTMAX, logits; the lowest id wins a tie. weights = scores at ids, or the softmax over the K kept
// logits; then divided by their p-norm if norm_p > 0 (INFINITY is the max norm), then multiplied by scale.
// balanced != 0: ids[t,k] = (t*K + k) mod E instead of the K largest (throughput tests); weights follow those ids.
// forced_TK, if not NULL: ids are these instead (replay), a token's distinct; -1: absent, a weight of 0 that no norm or
// softmax counts. Others are MOE_BAD_INDEX.
// Outputs are of logits' dtype; ids and weights are taken before scores are rounded to it. A logit of -inf masks its
// expert (score 0, never chosen) while K others remain; a row with fewer, any masked logit if balanced, NaN or +inf:
// MOE_BAD_VALUE.
typedef struct { int dtype, score, balanced; int64_t T, E, K; double norm_p, scale; } moe_router_args;
int moe_router(const moe_router_args *a, const void *logits_TE, const float *select_bias_E, const int32_t *forced_TK,
               void *weights_TK, int32_t *ids_TK, void *scores_TE);
// Either of dweights and dscores may be NULL.
int moe_router_backward(const moe_router_args *a, const void *logits_TE, const void *scores_TE,
                        const int32_t *ids_TK, const void *dweights_TK, const void *dscores_TE, void *dlogits_TE);
// Capacity: in each scope g of S rows (T = G*S) an expert keeps capacity[g] copies: the first by flat id, or the largest
// by priority_TK (real of dtype, lowest flat id wins a tie) if it is not NULL. Dropped ids become -1. A priority of NaN
// and a capacity below 0 are MOE_BAD_VALUE.
size_t moe_capacity_workspace(int64_t S, int64_t K, int64_t E);
int moe_capacity(int dtype, int64_t T, int64_t S, int64_t K, int64_t E, const int32_t *ids_TK, const void *priority_TK,
                 const int32_t *capacity_G, void *workspace, int32_t *kept_TK);
// Losses and their gradients dloss are one real each, in memory.
// Balance loss per scope g of S rows, then the mean over scopes. counts_GE: copies per expert, given, so that a mesh
// can sum them.
//   MOE_BALANCE_SWITCH  E / (S*K) * sum_e counts[g,e] * mean_{t in g} scores[t,e]      (MegaBlocks; 1.0 when balanced)
//   MOE_BALANCE_MSE     mean_e (mean_{t in g} scores[t,e] - 1/E)^2                     (seed 000; reads no counts)
typedef enum { MOE_BALANCE_SWITCH, MOE_BALANCE_MSE } moe_balance;
int moe_balance_counts(int64_t T, int64_t S, int64_t K, int64_t E, const int32_t *ids_TK, int32_t *counts_GE);
size_t moe_balance_loss_workspace(int64_t T, int64_t S, int64_t E);
int moe_balance_loss(int dtype, int form, int64_t T, int64_t S, int64_t K, int64_t E, const void *scores_TE,
                     const int32_t *counts_GE, void *workspace, void *loss);
int moe_balance_loss_backward(int dtype, int form, int64_t T, int64_t S, int64_t K, int64_t E, const void *scores_TE,
                              const int32_t *counts_GE, const void *dloss, void *workspace, void *dscores_TE);
// mean_t logsumexp(logits[t])^2; lse_T is kept for the backward (real). NaN gives NaN.
int moe_z_loss(int dtype, int64_t T, int64_t E, const void *logits_TE, void *lse_T, void *loss);
int moe_z_loss_backward(int dtype, int64_t T, int64_t E, const void *logits_TE, const void *lse_T, const void *dloss,
                        void *dlogits_TE);
// Selection bias of sigmoid routing, once per optimizer step: bias += rate * sign(mean(counts) - counts).
int moe_select_bias_update(int64_t E, double rate, const int64_t *counts_E, float *bias_E);

// ---- xent.c: the softmax pass of a chunked linear + cross-entropy --------------------------------------------------
// Per row: loss = lse - logit[target] (0 where target == ignore_index, and lse too); logits_MV is overwritten by
// grad_scale * (softmax - onehot), zeros on ignored rows. loss_M and lse_M are real. A target outside [0,V) that is
// not ignore_index: MOE_BAD_INDEX.
int moe_xent(int dtype, int64_t M, int64_t V, int64_t ignore_index, double grad_scale, const int64_t *targets_M,
             void *logits_MV, void *loss_M, void *lse_M);

// ---- random.c: numbers that do not know the mesh (Philox4x32-10) ---------------------------------------------------
// Element (r, col) of a site is a pure function of (seed, step, site, row, col), where row is the global number of the
// matrix's row r: row0 + r, or row0 + r / run * stride + r % run if run > 0, for a rank that holds `run` rows of every
// `stride`. run >= 0; stride >= run where there is more than one run.
//   counter = {low row, high row, col / 4, step}; key = {low seed, high seed ^ site}; word col % 4.
// Numbers are computed in float whatever the dtype, so that MOE_F64 sees those of MOE_F32, and rounded once; philox.h
// says how. step, site < 2^32.
typedef struct { uint64_t seed; int64_t step, site, row0, run, stride; } moe_random_key;
// In [low, high), before rounding to bf16 or fp16.
int moe_uniform(int dtype, moe_random_key key, int64_t rows, int64_t cols, double low, double high, void *y);
// Box-Muller on words (0,1), (2,3).
int moe_normal(int dtype, moe_random_key key, int64_t rows, int64_t cols, double mean, double std, void *y);
// y = x * keep / (1-p), keep where the uniform number is >= p; p = 1 gives zeros. Its backward is the same call on dy.
int moe_dropout(int dtype, moe_random_key key, int64_t rows, int64_t cols, double p, const void *x, void *y);

// ---- exchange.c: a token goes once to each rank that owns one of its experts ----------------------------------------
// E experts over P ranks (here P is not the expert rows): expert e is local expert e mod E/P of rank e / (E/P).
// T*P fits int32; P, K <= MOE_MAX_EXPERTS; P divides E.
//   counts_P2   rows, and copies (ids), that go to each rank
//   send_M      t*P + p for each row sent, sorted by rank p, then by token t; S = sum of rows entries, then -1;
//               M = T * min(P,K)
//   place_TP    its inverse: the sent row of token t for rank p, -1 if there is none
size_t moe_exchange_plan_workspace(int64_t T, int64_t P);
int moe_exchange_plan(int64_t T, int64_t K, int64_t E, int64_t P, const int32_t *ids_TK, void *workspace,
                      int32_t *counts_P2, int32_t *send_M, int32_t *place_TP);
// A row of a message: D values, then K ids and K weights where `ids`, `weights` say so (message.h). wdtype: F32 or
// dtype.
typedef struct { int dtype, wdtype; int64_t D, K; int ids, weights; } moe_message;
int64_t moe_message_bytes(const moe_message *m);
// Row s carries token send[s] / P to rank send[s] mod P: its ids become that rank's, -1 where another owns the expert.
// send_S NULL: row s is x[s] (S = T, no ids).
int moe_exchange_pack(const moe_message *m, int64_t T, int64_t S, int64_t E, int64_t P, const int32_t *send_S,
                      const void *x_TD, const int32_t *ids_TK, const void *weights_TK, void *rows_SB);
int moe_exchange_unpack(const moe_message *m, int64_t R, const void *rows_RB, void *x_RD, int32_t *ids_RK,
                        void *weights_RK);
// y[t] = sum over ranks p, in their order, of row place[t,p]; weights[t,k] (if m->weights) from the rank that owns
// ids[t,k], 0 where that is -1. Backward of pack, and of a sent row per rank.
int moe_exchange_combine(const moe_message *m, int64_t T, int64_t S, int64_t E, int64_t P, const int32_t *place_TP,
                         const int32_t *ids_TK, const void *rows_SB, void *y_TD, void *weights_TK);

// ---- windows.c: rows between the ranks of one host, through shared memory -------------------------------------------
// Unlike the rest these functions allocate and wait. All ranks make the same calls in the same order, one at a time. A
// rank that dies, or is silent for `seconds`, ends the call of every other with MOE_WIRE_FAILED, and every later one.
typedef struct moe_windows moe_windows;
enum { MOE_WINDOW_HANDLE_BYTES = 64 };
// Why the last MOE_WIRE_FAILED of this thread, in a sentence.
const char *moe_peers_error(void);
// This rank's window, with room to receive `bytes` (the same on all ranks), and the handle that lets the others in.
int moe_windows_open(int ranks, int rank, int64_t bytes, double seconds, void *handle, moe_windows **windows);
// Once, before the first exchange: the handles of all ranks.
int moe_windows_join(moe_windows *windows, const void *handles_P);
// all_Pn[p] = mine_n of rank p.
int moe_windows_counts(moe_windows *windows, int64_t n, const int32_t *mine_n, int32_t *all_Pn);
// An exchange of rows: room, then the caller writes its pieces, then turn, then the caller reads theirs.
//   room    bytes_PP[p][q], the same everywhere: what p sends to q. to_P[p] is where this rank's piece for p belongs,
//           its own among them. No other rank notices room, or what is written: it may be called again.
//   turn    hands over what was written and waits for the others. `received` holds the pieces of all ranks in the order
//           of their senders, and stays until this rank's next call of counts, rows or turn.
int moe_windows_room(moe_windows *windows, const int64_t *bytes_PP, void **to_P);
int moe_windows_turn(moe_windows *windows, const void **received);
// Both, around copies: `sent` holds a rank's pieces in the order of their receivers.
int moe_windows_rows(moe_windows *windows, const int64_t *bytes_PP, const void *sent, void *received);
// Lets go of what belongs to other ranks. When all have left, each may close.
int  moe_windows_leave(moe_windows *windows);
void moe_windows_close(moe_windows *windows);

// ---- slots.c: tensors between the stages of a pipeline on one host, whose arrival can be seen without waiting -------
// The ranks 0 .. ranks-1 are stages of `stage` ranks each, in a ring. Each has 2 n slots of `bytes`, one for each
// tensor that a step can bring it: slots 0 .. n-1 from the rank in its place of the stage before, n .. 2n-1 from that of the
// stage after. Waits, failures and handles are those of windows.c; calls need no common order.
typedef struct moe_slots moe_slots;
int moe_slots_open(int ranks, int rank, int stage, int64_t n, int64_t bytes, double seconds, void *handle,
                   moe_slots **slots);
int moe_slots_join(moe_slots *slots, const void *handles_P);
// A step with a greater number than the last, >= 1: none of its tensors has arrived. end: of the step, whose tensors
// have all been taken where they came to this rank.
int moe_slots_begin(moe_slots *slots, int64_t step);
int moe_slots_end(moe_slots *slots);
// Into the slot of the rank that gets it, where it counts as not arrived for `delay` ns yet. Waits if the tensor of an
// earlier step has not been taken from there.
int moe_slots_send(moe_slots *slots, int64_t slot, int64_t delay, const void *data);
// Waits for the tensor and copies it.
int moe_slots_take(moe_slots *slots, int64_t slot, void *data);
// The same in two, where another moves the bytes (cuda/slots.cu): a claim ends the wait, and when the copy is done raise
// lets the other side see it. raise is called once for a claim, before leave, by any thread.
int  moe_slots_claim_send(moe_slots *slots, int64_t slot, int64_t delay, void **claim);
int  moe_slots_claim_take(moe_slots *slots, int64_t slot, void **claim);
void moe_slots_raise(void *claim);
// here_2n: whether each slot's tensor has come to ALL ranks of this one's stage. awaited: waits until one of these has.
int moe_slots_arrived(moe_slots *slots, int64_t awaited_n, const int64_t *awaited, int32_t *here_2n);
// The one order that a stage's ranks share: its first rank decides for a slot number, the others wait for it.
int moe_slots_decide(moe_slots *slots, int64_t slot);
int moe_slots_decision(moe_slots *slots, int64_t *slot);
int  moe_slots_leave(moe_slots *slots);
void moe_slots_close(moe_slots *slots);

// ---- dataset.c -----------------------------------------------------------------------------------------------------
// Numbers of documents and of samples are I32 or I64: `dtype`. sizes and starts are in tokens.
// Fisher-Yates by Philox, so that an epoch's order is a function of (seed, epoch) alone, the same in both dtypes.
int moe_shuffle(int dtype, uint64_t seed, int64_t stream, int64_t n, void *order_n);
// Sample i of `samples` covers tokens [i*length, i*length + length + 1) of the documents, laid end to end in the order
// of `docs`: docs[doc[i]] at token offset[i] is where it begins (never at the end of a document). docs and doc are
// of `dtype`. Returns MOE_BAD_SHAPE if the documents are too short.
int moe_sample_index(int dtype, int64_t docs_n, const void *docs, int64_t sizes_n, const int32_t *sizes,
                     int64_t length, int64_t samples, void *doc, int32_t *offset);
// Rows [first, first + rows) of a mixture of `sets` data sets, by weights that sum to 1: row r is row row_R[r] of set
// set_R[r]. taken[k]: rows of set k before `first`, and on return before first + rows.
int moe_blend(int64_t sets, const double *weights, int64_t first, int64_t rows, int64_t *taken, int32_t *set_R,
              int64_t *row_R);
// Row r: `length` tokens of `bytes` each, from token offset_R[r] of document docs[doc_R[r]] on, through the documents
// that follow in docs; document d is tokens[starts[d]] to tokens[starts[d+1]], starts_n counts its entries.
// documents_RL: for each token the number of its document within the row, from 0. tokens_RL NULL: not wanted.
// Returns MOE_BAD_INDEX if the documents end before the row does.
int moe_samples(int dtype, int64_t bytes, const void *tokens, int64_t starts_n, const int64_t *starts, int64_t docs_n,
                const void *docs, int64_t rows, const int64_t *doc_R, const int64_t *offset_R, int64_t length,
                void *tokens_RL, int32_t *documents_RL);

// ---- norm.c, rope.c ------------------------------------------------------------------------------------------------
// y_Rn = r_R x_Rn w_n with r = 1 / sqrt(mean of x^2 + eps), real. wdtype: of w_n and dw_n, dtype or its real.
size_t moe_rms_norm_workspace(int64_t n);
int moe_rms_norm(int dtype, int wdtype, int64_t R, int64_t n, double eps, const void *x_Rn, const void *w_n,
                 void *workspace, void *y_Rn, void *r_R);
size_t moe_rms_norm_backward_workspace(int64_t R, int64_t n);
int moe_rms_norm_backward(int dtype, int wdtype, int64_t R, int64_t n, const void *x_Rn, const void *w_n,
                          const void *r_R, const void *dy_Rn, void *workspace, void *dx_Rn, void *dw_n);
// The residual stream's addition and norm, of which the latter goes on in `half` (MOE_BF16, MOE_F16; y, z and dy are):
//   s_Rn = x_Rn + y_Rn      z_Rn = (s - mean) r w_n + b_n, rounded once, with r = 1 / sqrt(mean of (s - mean)^2 + eps)
// all float; the mean is 0 if not `centred` (RMSNorm). stats_R2: mean and r. y_Rn NULL: s is x, and is not written; b_n
// NULL: zeros.
int moe_add_norm(int half, int centred, int64_t R, int64_t n, double eps, const float *x_Rn, const void *y_Rn,
                 const float *w_n, const float *b_n, float *s_Rn, void *z_Rn, float *stats_R2);
// dx_Rn = ds_Rn + what z gives it, dy_Rn the same rounded. ds_Rn NULL: zeros; dy_Rn or db_n NULL: not wanted.
size_t moe_add_norm_backward_workspace(int64_t R, int64_t n);
int moe_add_norm_backward(int half, int centred, int64_t R, int64_t n, const float *ds_Rn, const void *dz_Rn,
                          const float *s_Rn, const float *w_n, const float *stats_R2, void *workspace, float *dx_Rn,
                          void *dy_Rn, float *dw_n, float *db_n);
// The sum of x_n^2 in double.
size_t moe_square_sum_workspace(int64_t n);
int moe_square_sum(int dtype, int64_t n, const void *x_n, void *workspace, double *sum);
// Turns the pairs (x[i], x[i+n]) of each of H heads of d columns by the angle whose cosine and sine, real, stand in row
// r % P of cos_Pn and sin_Pn; backwards if inverse. P divides R.
int moe_rotate(int dtype, int64_t R, int64_t P, int64_t H, int64_t d, int64_t n, int inverse, const void *x_RHd,
               const void *cos_Pn, const void *sin_Pn, void *y_RHd);

#ifdef __cplusplus
}
#endif
#endif
