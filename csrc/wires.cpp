// wires.cpp: torch ops around what moves rows and tensors between ranks: the transports of cuda/api.h, and the windows
// and slots of the C core. A torch library of its own (moe_wire), whose schemas are in moe_ext/parallel.
//
// A wire is an int64, the address of what open made. The first argument says which device's wire it is.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "door.hpp"

namespace {

moe_wire *wire_at(int64_t wire) { return reinterpret_cast<moe_wire *>(static_cast<intptr_t>(wire)); }

struct host_windows final : moe_wire {
    moe_windows *windows = nullptr;
    const int ranks, rank;
    host_windows(int ranks, int rank) : ranks(ranks), rank(rank) {}
    static int open(int ranks, int rank, int64_t bytes, double seconds, void *handle, moe_wire **wire) {
        auto opened = std::make_unique<host_windows>(ranks, rank);
        const int status = moe_windows_open(ranks, rank, bytes, seconds, handle, &opened->windows);
        if (status == MOE_OK) *wire = opened.release();
        return status;
    }
    int counts(int64_t n, const int32_t *mine_n, int32_t *all_Pn, moe_stream) override {
        return moe_windows_counts(windows, n, mine_n, all_Pn);
    }
    int rows(const int64_t *bytes_PP, const void *sent, void *received, moe_stream) override {
        return moe_windows_rows(windows, bytes_PP, sent, received);
    }
    int join(const void *handles_P) override { return moe_windows_join(windows, handles_P); }
    int leave(moe_stream) override { return moe_windows_leave(windows); }
    ~host_windows() override {
        if (windows) moe_windows_close(windows);
    }
};

struct WireDoor : Door {
    void enter_cuda(In like) {
        enter(like);
        if (!cuda) fail("this transport moves CUDA tensors, got one on ", place->text(), ". Hint: WindowTransport");
    }
    template <class... Parts>
    void done(int status, const Parts &...wanted) const {
        if (status == MOE_WIRE_FAILED) fail(moe_peers_error());
        Door::done(status, wanted...);
    }
};

Tensor on_host(int dtype, int64_t rows, int64_t cols) {
    return empty(torch::stable::full({0}, 0), dtype, {rows, cols});
}

Tensor nccl_id(In like) {
    WireDoor door{"nccl_id"};
    door.enter_cuda(like);
    Tensor id = on_host(MOE_I64, 1, MOE_NCCL_ID_BYTES / 8);
    door.done(door.cuda->nccl_id(id.data_ptr()));
    return id;
}

int64_t nccl_open(In like, In id, int64_t ranks, int64_t rank, double seconds) {
    WireDoor door{"nccl_open"};
    Door host{"nccl_open"};
    door.enter_cuda(like);
    Dim one{"1", 1}, words{"16", MOE_NCCL_ID_BYTES / 8};
    const void *name = host.in("id", id, only(MOE_I64), {&one, &words});
    moe_wire *wire = nullptr;
    door.done(door.cuda->nccl_open(name, static_cast<int>(ranks), static_cast<int>(rank), seconds, &wire),
              "wanted 0 <= rank=", rank, " < ranks=", ranks, " and seconds=", seconds, " > 0");
    return static_cast<int64_t>(reinterpret_cast<intptr_t>(wire));
}

// -> the wire, its handle, and whether wire_forth and wire_back can write straight into its windows.
std::tuple<int64_t, Tensor, bool> window_open(In like, int64_t ranks, int64_t rank, int64_t bytes, double seconds) {
    WireDoor door{"window_open"};
    door.enter(like);
    Tensor handle = on_host(MOE_I64, 1, MOE_WINDOW_HANDLE_BYTES / 8);
    const auto open = door.cuda ? door.cuda->window_open : host_windows::open;
    moe_wire *wire = nullptr;
    door.done(open(static_cast<int>(ranks), static_cast<int>(rank), bytes, seconds, handle.data_ptr(), &wire),
              "wanted 0 <= rank=", rank, " < ranks=", ranks, ", bytes=", bytes, " >= 0 and seconds=", seconds, " > 0");
    return {static_cast<int64_t>(reinterpret_cast<intptr_t>(wire)), handle, !door.cuda};
}

void wire_join(In like, int64_t wire, In handles) {
    WireDoor door{"wire_join"};
    Door host{"wire_join"};
    door.enter(like);
    Dim P{"P"}, words{"8", MOE_WINDOW_HANDLE_BYTES / 8};
    const void *handles_P = host.in("handles", handles, only(MOE_I64), {&P, &words});
    door.done(wire_at(wire)->join(handles_P));
}

// -> [ranks, n] on the host.
Tensor wire_counts(In mine, int64_t wire, int64_t ranks) {
    WireDoor door{"wire_counts"};
    Dim n{"n"};
    auto *mine_n = door.i32("mine", mine, {&n});
    Tensor all = on_host(MOE_I32, ranks, n);
    door.done(wire_at(wire)->counts(n, mine_n, i32(all), door.stream));
    return all;
}

// bytes: [ranks, ranks], from row p to rank q. -> `rows` rows like those of `sent`, whose dtype is any.
Tensor wire_rows(In sent, int64_t wire, std::vector<int64_t> bytes, int64_t rows) {
    WireDoor door{"wire_rows"};
    door.enter(sent);
    if (sent.dim() != 2 || !sent.is_contiguous()) door.fail("sent is not a contiguous matrix. Hint: sent.contiguous()");
    if (door.cuda && sent.element_size() % 2) door.fail("between GPUs an element of sent has at least 2 bytes, got 1");
    Tensor received = empty(*door.place, sent.scalar_type(), {rows, sent.size(1)});
    door.done(wire_at(wire)->rows(bytes.data(), sent.data_ptr(), received.data_ptr(), door.stream));
    return received;
}

// One exchange over windows of the host, in which this rank sends `sent` rows and gets `received`. rows: [ranks,
// ranks], from p to q. What one rank refuses before the turn was no call, and it may call again; what it refuses after,
// a bad index of combine, finds it in step with the others.
struct Exchange {
    const WireDoor &door;
    const host_windows &wire;
    const int ranks;
    std::vector<int64_t> rows, bytes;
    int64_t sent = 0, received = 0;
    Exchange(const WireDoor &door, int64_t at, const std::vector<int64_t> &rows)
        : door(door), wire(*static_cast<const host_windows *>(wire_at(at))), ranks(wire.ranks), rows(rows) {
        const int64_t wanted = int64_t{ranks} * ranks, here = wire.rank;
        if (static_cast<int64_t>(rows.size()) != wanted) door.fail("rows has ", rows.size(), ", wanted ", wanted);
        for (int64_t n : rows)
            if (n < 0) door.fail("rows has ", n, ", wanted >= 0");
        for (int p = 0; p < ranks; p++) sent += rows[here * ranks + p], received += rows[p * ranks + here];
    }
    static Tensor result(In like, int dtype, int64_t rows, int64_t cols) {
        return empty(like, dtype, {rows, cols});
    }
    // pack(first, rows, to): writes the rows from `first` on. -> the rows received.
    template <class Pack>
    const void *swap(const moe_message &m, const Pack &pack) {
        for (int64_t n : rows) bytes.push_back(n * moe_message_bytes(&m));
        std::vector<void *> to_P(ranks);
        const void *received;
        door.done(moe_windows_room(wire.windows, bytes.data(), to_P.data()));
        for (int64_t p = 0, first = 0; p < ranks; first += rows[wire.rank * ranks + p++])
            pack(first, rows[wire.rank * ranks + p], to_P[p]);
        door.done(moe_windows_turn(wire.windows, &received));
        return received;
    }
};

// exchange_pack with send, the exchange, exchange_unpack. Without weights no ids travel either: both are empty.
std::tuple<Tensor, Tensor, Tensor> wire_forth(In x, MaybeIn weights, In ids, In send, int64_t num_experts, int64_t wire,
                                              std::vector<int64_t> rows) {
    WireDoor door{"wire_forth"};
    Dim T{"T"}, D{"D"}, K{"K"}, M{"M"};
    void *x_TD = door.in("x", x, FLOATS, {&T, &D});
    void *weights_TK = door.in("weights", weights, weight_dtypes(x), {&T, &K});
    auto *ids_TK = door.i32("ids", ids, {&T, &K}), *send_M = door.i32("send", send, {&M});
    Exchange exchange(door, wire, rows);
    const int64_t P = exchange.ranks, R = exchange.received;
    if (exchange.sent > M) door.fail("rows are ", exchange.sent, ", but send names ", M.n);
    const bool whole = weights.has_value();
    const moe_message m = {dtype_of(x), dtype_of_weights(weights), D, whole ? K.n : 0, whole, whole};
    Tensor x_RD = exchange.result(x, m.dtype, R, D);
    Tensor ids_RK = empty(x, MOE_I32, {whole ? R : 0, K}), weights_RK = empty(x, m.wdtype, {whole ? R : 0, K});
    const void *message = exchange.swap(m, [&](int64_t first, int64_t S, void *to) {
        door.done(moe_exchange_pack(&m, T, S, num_experts, P, send_M + first, x_TD, ids_TK, weights_TK, to),
                  "send must hold flat pairs of a token and a rank for each of rows=", exchange.sent, ", T=", T.n,
                  " and ranks=", P);
    });
    door.done(moe_exchange_unpack(&m, R, message, x_RD.data_ptr(), i32(ids_RK), weights_RK.data_ptr()));
    return {x_RD, ids_RK, weights_RK};
}

// exchange_pack without send, the exchange, exchange_combine. Without weights none return: then they are empty.
std::tuple<Tensor, Tensor> wire_back(In y, MaybeIn weights, In ids, In place, int64_t num_experts, int64_t wire,
                                     std::vector<int64_t> rows) {
    WireDoor door{"wire_back"};
    door.enter(y);
    Exchange exchange(door, wire, rows);
    Dim R{"R", exchange.sent}, T{"T"}, D{"D"}, K{"K"}, P{"P", exchange.ranks};
    auto *y_RD = static_cast<const char *>(door.in("y", y, FLOATS, {&R, &D}));
    auto *weights_RK = static_cast<const char *>(door.in("weights", weights, weight_dtypes(y), {&R, &K}));
    auto *ids_TK = door.i32("ids", ids, {&T, &K}), *place_TP = door.i32("place", place, {&T, &P});
    const bool whole = weights.has_value();
    const moe_message m = {dtype_of(y), dtype_of_weights(weights), D, whole ? K.n : 0, 0, whole};
    const int64_t row = D * moe_size(m.dtype), weight_row = m.K * moe_size(m.wdtype);
    Tensor y_TD = exchange.result(y, m.dtype, T, D), weights_TK = empty(y, m.wdtype, {whole ? T.n : 0, K});
    const void *message = exchange.swap(m, [&](int64_t first, int64_t S, void *to) {
        door.done(moe_exchange_pack(&m, S, S, num_experts, P, nullptr, y_RD + first * row, nullptr,
                                    whole ? weights_RK + first * weight_row : nullptr, to),
                  "ranks=", P.n, " must divide num_experts=", num_experts);
    });
    door.done(moe_exchange_combine(&m, T, exchange.received, num_experts, P, place_TP, ids_TK, message,
                                   y_TD.data_ptr(), weights_TK.data_ptr()),
              "place must hold rows below S=", exchange.received, " or -1, and ids lie in [-1, ", num_experts, ")");
    return {y_TD, weights_TK};
}

void wire_leave(In like, int64_t wire) {
    WireDoor door{"wire_leave"};
    door.enter(like);
    door.done(wire_at(wire)->leave(door.stream));
}

void wire_close(In like, int64_t wire) {
    WireDoor door{"wire_close"};
    door.enter(like);
    delete wire_at(wire);
}

// ---- slots: int64s like wires. Of GPUs those of the C core hold no bytes, but what has come and what is free --------

struct Slots {
    moe_slots *host = nullptr;
    std::unique_ptr<moe_device_slots> device;
    ~Slots() {
        device.reset();  // waits for what will still raise flags of the host
        if (host) moe_slots_close(host);
    }
};
Slots &slots_at(int64_t slots) { return *reinterpret_cast<Slots *>(static_cast<intptr_t>(slots)); }

struct SlotDoor : WireDoor {
    void whole(const char *arg, In x) {
        enter(x);
        if (!x.is_contiguous()) fail(arg, " is not contiguous. Hint: ", arg, ".contiguous()");
    }
};

// -> the slots and their handles, a row for those of the host and one for those of the device.
std::tuple<int64_t, Tensor> slots_open(In like, int64_t ranks, int64_t rank, int64_t stage, int64_t n, int64_t bytes,
                                       double seconds) {
    SlotDoor door{"slots_open"};
    door.enter(like);
    Tensor handles = on_host(MOE_I64, door.cuda ? 2 : 1, MOE_WINDOW_HANDLE_BYTES / 8);
    auto *handle = static_cast<char *>(handles.data_ptr());
    const int P = static_cast<int>(ranks), p = static_cast<int>(rank), of = static_cast<int>(stage);
    auto slots = std::make_unique<Slots>();
    int status = moe_slots_open(P, p, of, n, door.cuda ? 0 : bytes, seconds, handle, &slots->host);
    if (status == MOE_OK && door.cuda) {
        moe_device_slots *device = nullptr;
        status = door.cuda->slots_open(P, p, of, n, bytes, handle + MOE_WINDOW_HANDLE_BYTES, &device);
        slots->device.reset(device);
    }
    door.done(status, "wanted 0 <= rank=", rank, " < ranks=", ranks, ", two stages or more of stage=", stage,
              " ranks, n=", n, " > 0, bytes=", bytes, " >= 0 and seconds=", seconds, " > 0");
    return {static_cast<int64_t>(reinterpret_cast<intptr_t>(slots.release())), handles};
}

// handles: those of all ranks beside each other.
void slots_join(In like, int64_t slots, In handles) {
    SlotDoor door{"slots_join"};
    Door host{"slots_join"};
    door.enter(like);
    Dim rows{"rows", door.cuda ? 2 : 1}, words{"8 P"};
    auto *all = static_cast<const char *>(host.in("handles", handles, only(MOE_I64), {&rows, &words}));
    door.done(moe_slots_join(slots_at(slots).host, all));
    if (door.cuda) door.done(slots_at(slots).device->join(all + 8 * words));
}

void slots_begin(In like, int64_t slots, int64_t step) {
    SlotDoor door{"slots_begin"};
    door.enter(like);
    door.done(moe_slots_begin(slots_at(slots).host, step));
}

void slots_end(In like, int64_t slots) {
    SlotDoor door{"slots_end"};
    door.enter(like);
    door.done(moe_slots_end(slots_at(slots).host));
}

// x has the bytes of a slot; its dtype is any. Of a GPU both only wait on the host, and queue the copy.
void slots_send(In x, int64_t slots, int64_t slot, int64_t delay) {
    SlotDoor door{"slots_send"};
    door.whole("x", x);
    auto &[host, device] = slots_at(slots);
    if (!door.cuda) return door.done(moe_slots_send(host, slot, delay, x.data_ptr()), "slot=", slot, ", delay=", delay);
    void *claim = nullptr;
    door.done(moe_slots_claim_send(host, slot, delay, &claim), "slot=", slot, ", delay=", delay);
    door.done(device->send(slot, x.data_ptr(), moe_slots_raise, claim, door.stream));
}

void slots_take(In x, int64_t slots, int64_t slot) {
    SlotDoor door{"slots_take"};
    door.whole("x", x);
    auto &[host, device] = slots_at(slots);
    if (!door.cuda) return door.done(moe_slots_take(host, slot, x.data_ptr()), "slot=", slot);
    void *claim = nullptr;
    door.done(moe_slots_claim_take(host, slot, &claim), "slot=", slot);
    door.done(device->take(slot, x.data_ptr(), moe_slots_raise, claim, door.stream));
}

// -> int32 [n] on the host.
Tensor slots_arrived(In like, int64_t slots, std::vector<int64_t> awaited, int64_t n) {
    SlotDoor door{"slots_arrived"};
    door.enter(like);
    Tensor here = empty(torch::stable::full({0}, 0), MOE_I32, {n});
    door.done(moe_slots_arrived(slots_at(slots).host, static_cast<int64_t>(awaited.size()), awaited.data(), i32(here)));
    return here;
}

void slots_decide(In like, int64_t slots, int64_t slot) {
    SlotDoor door{"slots_decide"};
    door.enter(like);
    door.done(moe_slots_decide(slots_at(slots).host, slot), "slot=", slot);
}

int64_t slots_decision(In like, int64_t slots) {
    SlotDoor door{"slots_decision"};
    door.enter(like);
    int64_t slot = -1;
    door.done(moe_slots_decision(slots_at(slots).host, &slot));
    return slot;
}

void slots_leave(In like, int64_t slots) {
    SlotDoor door{"slots_leave"};
    door.enter(like);
    const int status = door.cuda ? slots_at(slots).device->leave() : MOE_OK;
    door.done(moe_slots_leave(slots_at(slots).host));
    door.done(status);
}

void slots_close(In, int64_t slots) { delete &slots_at(slots); }

// ---- the table ------------------------------------------------------------------------------------------------------

#define OP(name) {#name, TORCH_BOX(&name)}
const struct { const char *name; void (*boxed)(StableIValue *, uint64_t, uint64_t); } OPS[] = {
    OP(nccl_id), OP(nccl_open), OP(window_open), OP(wire_join), OP(wire_counts), OP(wire_rows), OP(wire_forth),
    OP(wire_back), OP(wire_leave), OP(wire_close),
    OP(slots_open), OP(slots_join), OP(slots_begin), OP(slots_end), OP(slots_send), OP(slots_take), OP(slots_arrived),
    OP(slots_decide), OP(slots_decision), OP(slots_leave), OP(slots_close),
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_wire, CPU, m) {
    for (const auto &op : OPS) m.impl(op.name, op.boxed);
}

STABLE_TORCH_LIBRARY_IMPL(moe_wire, CUDA, m) {
    for (const auto &op : OPS) m.impl(op.name, op.boxed);
}
