// slots.c: tensors between the stages of a pipeline on one host, one slot per tensor of a step, whose arrival can be
// seen without waiting; and the one order that the ranks of a stage share.
//
//   file of a rank  [ head: events, whom it waits for, decisions | 2n states | board of 2n decisions | 2n slots ]
//   send    claims the slot: waits until it is free; copies straight into it; then raises its state to the step,
//           released, and wakes the receiver and the first rank of its stage, the leader
//   arrived looks at the states of all ranks of the stage in their own files: no messages
//   decide  the leader writes decision number d to its board, at d % 2n; the others follow. It waits for one that is a
//           whole board behind
// A slot has one writer, and its owner says which step's tensor it has taken from there: until then the writer waits.
//
// Whoever waits sleeps on `events` of its own file, which others raise after what they have changed, and publishes whom
// it waits for. At the deadline the one that keeps the others waiting is found by following these from rank to rank, to
// one that waits for nobody, or no longer looks whether it still must. Files, deaths and the end of a wait: peers.h.
#include "peers.h"
#include <stdlib.h>
#include <string.h>

typedef struct {
    alignas(32) _Atomic int64_t sent;   // step of the tensor that lies here, by its sender
    _Atomic int64_t             due;    // ns of CLOCK_MONOTONIC, before which it counts as not arrived
    _Atomic int64_t             taken;  // step of the tensor taken last, by the owner
} state;

typedef struct { moe_slots *slots; _Atomic int64_t step, delay; } claim;    // the last one of a slot and a way

typedef struct { uint64_t bits[MAX_RANKS / 64]; } rank_set;
static void add(rank_set *s, int p) { s->bits[p / 64] |= UINT64_C(1) << p % 64; }
static bool has(const rank_set *s, int p) { return s->bits[p / 64] >> p % 64 & 1; }

typedef struct {                        // the first bytes of a file
    moe_peer_head                  peer;
    alignas(LINE) _Atomic uint32_t events, asleep;
    _Atomic uint64_t               waits_for[MAX_RANKS / 64];
    _Atomic int64_t                looked;      // ns of CLOCK_MONOTONIC, when the owner last saw that it must wait
    alignas(LINE) _Atomic int64_t  decisions;   // made by the owner, or followed
    alignas(LINE) state            states[];
} head;

struct moe_slots {
    moe_peers peers;
    int       ranks, rank, stage, leader;
    int64_t   n, bytes, stride;         // slots of each direction; of a tensor, and from slot to slot
    int64_t   step, decisions;
    claim    *claims;                   // of 2n slots that this rank sends to, then of the 2n that it takes from
};

static head *file_of(const moe_slots *s, int p) { return (head *)s->peers.memory[p]; }
static state *state_of(const moe_slots *s, int p, int64_t slot) { return &file_of(s, p)->states[slot]; }
static _Atomic int64_t *board_of(const moe_slots *s, int p) { return (_Atomic int64_t *)state_of(s, p, 2 * s->n); }
static int64_t slots_at(int64_t n) {
    return (int64_t)((sizeof(head) + 2 * (size_t)n * (sizeof(state) + 8) + PAGE - 1) / PAGE * PAGE);
}
static char *slot_of(const moe_slots *s, int p, int64_t slot) {
    return (char *)file_of(s, p) + slots_at(s->n) + slot * s->stride;
}
static int sender_of(const moe_slots *s, int p, int64_t slot) {
    return (p + (slot < s->n ? s->ranks - s->stage : s->stage)) % s->ranks;
}
static int receiver_of(const moe_slots *s, int64_t slot) {
    return (s->rank + (slot < s->n ? s->stage : s->ranks - s->stage)) % s->ranks;
}
static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

// -- waits ------------------------------------------------------------------------------------------------------------
// What is waited for: one of n slots on all ranks of a stage from `first` on; or, if n is 0, other things.
typedef struct wish {
    bool (*met)(const moe_slots *s, const struct wish *w, rank_set *missing, int64_t *due);
    int64_t        n;
    const int64_t *slots;
    int            first, ranks;
} wish;

// Whether it has come to rank p. due: the earliest time at which something that lies there will count.
static bool is_here(const moe_slots *s, int p, int64_t slot, int64_t *due) {
    state *x = state_of(s, p, slot);
    if (atomic_load(&x->sent) != s->step) return false;
    const int64_t at = atomic_load_explicit(&x->due, memory_order_relaxed);
    if (at == 0 || at <= nanoseconds()) return true;
    if (at < *due) *due = at;
    return false;
}

static bool one_is_here(const moe_slots *s, const wish *w, rank_set *missing, int64_t *due) {
    for (int64_t i = 0; i < w->n; i++) {
        bool all = true;
        for (int p = w->first; p < w->first + w->ranks; p++)
            if (!is_here(s, p, w->slots[i], due)) all = false, add(missing, sender_of(s, p, w->slots[i]));
        if (all) return true;
    }
    return false;
}

static bool is_free(const moe_slots *s, const wish *w, rank_set *missing, int64_t *due) {
    (void)due;
    add(missing, w->first);
    return atomic_load(&state_of(s, w->first, *w->slots)->taken) == s->claims[*w->slots].step;
}

static bool is_decided(const moe_slots *s, const wish *w, rank_set *missing, int64_t *due) {
    (void)w, (void)due;
    add(missing, s->leader);
    return atomic_load(&file_of(s, s->leader)->decisions) > s->decisions;
}

static bool has_room(const moe_slots *s, const wish *w, rank_set *missing, int64_t *due) {
    (void)due;
    bool room = true;
    for (int p = w->first; p < w->first + w->ranks; p++)
        if (p != s->rank && s->decisions - atomic_load(&file_of(s, p)->decisions) >= 2 * s->n)
            room = false, add(missing, p);
    return room;
}

// The rank that keeps the others waiting; one that is waited for, if they all wait for each other.
static int find_culprit(const moe_slots *s, const rank_set *missing) {
    rank_set found = *missing, asked = {0};
    int      any   = s->rank;
    for (int p = 0; p < s->ranks; p++) {
        if (!has(&found, p) || has(&asked, p)) continue;
        if (any == s->rank) any = p;
        uint64_t waits = 0;
        for (int i = 0; i < MAX_RANKS / 64; i++) {
            const uint64_t bits = atomic_load(&file_of(s, p)->waits_for[i]);
            found.bits[i] |= bits, waits |= bits;
        }
        const int64_t looked = atomic_load(&file_of(s, p)->looked);
        if (!waits || 1e-9 * (double)(nanoseconds() - looked) > s->peers.seconds / 2) return p;
        add(&asked, p);
        p = -1;                         // what it waits for may be before it
    }
    return any;
}

static void publish(const moe_slots *s, const rank_set *set) {
    atomic_store(&file_of(s, s->rank)->looked, nanoseconds());
    for (int i = 0; i < MAX_RANKS / 64; i++) atomic_store(&file_of(s, s->rank)->waits_for[i], set->bits[i]);
}

// What was waited for is looked at after a rank was seen dead: it may have come just before. A rank that gives up goes
// on saying whom it waited for.
static int await(moe_slots *s, const wish *w) {
    head    *mine    = file_of(s, s->rank);
    rank_set missing = {0};
    int64_t  due     = INT64_MAX;
    int      status  = moe_peers_ready(&s->peers);
    if (status != MOE_OK || w->met(s, w, &missing, &due)) return status;
    const double began = moe_now();
    for (int i = 0; i < s->peers.spins; i++, moe_relax())
        if (w->met(s, w, &missing, &due)) return MOE_OK;
    atomic_store(&mine->asleep, 1);
    for (;;) {
        const uint32_t seen = atomic_load(&mine->events);
        poll(s->peers.life, (nfds_t)s->ranks, 0);
        missing = (rank_set){0}, due = INT64_MAX;
        if (w->met(s, w, &missing, &due)) break;
        publish(s, &missing);
        const uint32_t culprit = atomic_load(&mine->peer.culprit);
        if (culprit) return moe_peers_give_up(&s->peers, (int)culprit - 1);
        for (int p = 0; p < s->ranks; p++)
            if (s->peers.life[p].revents) return moe_peers_give_up(&s->peers, p);
        const double now = moe_now();
        if (now > began + s->peers.seconds) return moe_peers_give_up(&s->peers, find_culprit(s, &missing));
        const double    left  = due == INT64_MAX ? 1 : 1e-9 * (double)due - now;
        struct timespec slice = MOE_SLICE;
        if (left < 1e-9 * (double)slice.tv_nsec) slice.tv_nsec = left > 0 ? (long)(1e9 * left) + 1 : 0;
        moe_futex_wait(&mine->events, seen, &slice);
    }
    atomic_store_explicit(&mine->asleep, 0, memory_order_relaxed);
    publish(s, &(rank_set){0});
    return MOE_OK;
}

// Either the owner sees what has changed before it sleeps, or its `events` are not those that it saw, or it is woken:
// all these accesses are in one order.
static void wake(const moe_slots *s, int p) {
    head *its = file_of(s, p);
    atomic_fetch_add(&its->events, 1);
    if (atomic_load(&its->asleep)) moe_futex_wake(&its->events);
}

// -- a step -----------------------------------------------------------------------------------------------------------
int moe_slots_begin(moe_slots *s, int64_t step) {
    if (step <= s->step)
        return moe_failed("step %lld begins after step %lld", (long long)step, (long long)s->step);
    s->step = step;
    return moe_peers_ready(&s->peers);
}

int moe_slots_end(moe_slots *s) {
    const int status = moe_peers_ready(&s->peers);
    for (int64_t slot = 0; status == MOE_OK && slot < 2 * s->n; slot++) {
        if (atomic_load(&state_of(s, s->rank, slot)->sent) == s->step && s->claims[2 * s->n + slot].step != s->step)
            return moe_failed("step %lld ends, but the tensor of slot %lld has not been taken", (long long)s->step,
                              (long long)slot);
    }
    return status;
}

static bool is_slot(const moe_slots *s, int64_t slot) { return s->step > 0 && slot >= 0 && slot < 2 * s->n; }

int moe_slots_claim_send(moe_slots *s, int64_t slot, int64_t delay, void **to_raise) {
    if (!is_slot(s, slot) || delay < 0) return MOE_BAD_INDEX;
    int status = moe_peers_ready(&s->peers);
    if (status != MOE_OK) return status;
    claim *c = &s->claims[slot];
    if (c->step == s->step)
        return moe_failed("the tensor of slot %lld has been sent in step %lld before", (long long)slot,
                          (long long)s->step);
    status = await(s, &(wish){.met = is_free, .slots = &slot, .first = receiver_of(s, slot)});
    if (status != MOE_OK) return status;
    c->step  = s->step;
    c->delay = delay;
    *to_raise = c;
    return MOE_OK;
}

int moe_slots_claim_take(moe_slots *s, int64_t slot, void **to_raise) {
    if (!is_slot(s, slot)) return MOE_BAD_INDEX;
    int status = moe_peers_ready(&s->peers);
    if (status != MOE_OK) return status;
    claim *c = &s->claims[2 * s->n + slot];
    if (c->step == s->step)
        return moe_failed("the tensor of slot %lld has been taken in step %lld before", (long long)slot,
                          (long long)s->step);
    status = await(s, &(wish){.met = one_is_here, .n = 1, .slots = &slot, .first = s->rank, .ranks = 1});
    if (status != MOE_OK) return status;
    c->step = s->step;
    *to_raise = c;
    return MOE_OK;
}

// A claim is not written again before it was raised, and the other side has answered that.
void moe_slots_raise(void *claimed) {
    const claim     *c    = claimed;
    const moe_slots *s    = c->slots;
    const int64_t    slot = (c - s->claims) % (2 * s->n);
    if (c - s->claims != slot) {
        atomic_store(&state_of(s, s->rank, slot)->taken, c->step);
        return;                             // wakes nobody: hardly ever does anybody wait for this, and looks up then
    }
    const int to = receiver_of(s, slot), leader = to / s->stage * s->stage;
    state    *x  = state_of(s, to, slot);
    atomic_store_explicit(&x->due, c->delay ? nanoseconds() + c->delay : 0, memory_order_relaxed);
    atomic_store(&x->sent, c->step);
    wake(s, to);
    if (leader != to) wake(s, leader);
}

int moe_slots_send(moe_slots *s, int64_t slot, int64_t delay, const void *data) {
    void     *c      = NULL;
    const int status = moe_slots_claim_send(s, slot, delay, &c);
    if (status != MOE_OK) return status;
    moe_copy(slot_of(s, receiver_of(s, slot), slot), data, s->bytes);
    moe_slots_raise(c);
    return MOE_OK;
}

int moe_slots_take(moe_slots *s, int64_t slot, void *data) {
    void     *c      = NULL;
    const int status = moe_slots_claim_take(s, slot, &c);
    if (status != MOE_OK) return status;
    moe_copy(data, slot_of(s, s->rank, slot), s->bytes);
    moe_slots_raise(c);
    return MOE_OK;
}

// -- the order of a stage ---------------------------------------------------------------------------------------------
int moe_slots_arrived(moe_slots *s, int64_t n, const int64_t *awaited, int32_t *here) {
    for (int64_t i = 0; i < n; i++)
        if (!is_slot(s, awaited[i])) return MOE_BAD_INDEX;
    int status = moe_peers_ready(&s->peers);
    if (status == MOE_OK && n)
        status = await(s, &(wish){.met = one_is_here, .n = n, .slots = awaited, .first = s->leader, .ranks = s->stage});
    int64_t due = INT64_MAX;
    for (int64_t slot = 0; status == MOE_OK && slot < 2 * s->n; slot++) {
        here[slot] = 1;
        for (int p = s->leader; p < s->leader + s->stage; p++) here[slot] &= is_here(s, p, slot, &due);
    }
    return status;
}

int moe_slots_decide(moe_slots *s, int64_t slot) {
    if (!is_slot(s, slot)) return MOE_BAD_INDEX;
    if (s->rank != s->leader)
        return moe_failed("rank %d decides, but the leader of its stage is rank %d", s->rank, s->leader);
    const int status = await(s, &(wish){.met = has_room, .first = s->leader, .ranks = s->stage});
    if (status != MOE_OK) return status;
    atomic_store_explicit(&board_of(s, s->rank)[s->decisions % (2 * s->n)], slot, memory_order_relaxed);
    atomic_store(&file_of(s, s->rank)->decisions, ++s->decisions);
    for (int p = s->leader + 1; p < s->leader + s->stage; p++) wake(s, p);
    return MOE_OK;
}

int moe_slots_decision(moe_slots *s, int64_t *slot) {
    if (s->rank == s->leader) return moe_failed("rank %d leads its stage, and follows nobody", s->rank);
    const int status = await(s, &(wish){.met = is_decided});
    if (status != MOE_OK) return status;
    *slot = atomic_load_explicit(&board_of(s, s->leader)[s->decisions % (2 * s->n)], memory_order_relaxed);
    atomic_store(&file_of(s, s->rank)->decisions, ++s->decisions);
    return MOE_OK;
}

// -- open and close ---------------------------------------------------------------------------------------------------
int moe_slots_open(int ranks, int rank, int stage, int64_t n, int64_t bytes, double seconds, void *handle,
                   moe_slots **slots) {
    if (ranks > MAX_RANKS) return moe_failed("slots join at most %d ranks, not %d", MAX_RANKS, ranks);
    if (stage < 1 || ranks < 2 * stage || ranks % stage || rank < 0 || rank >= ranks || !(seconds > 0))
        return MOE_BAD_SHAPE;
    if (n < 1 || n > 1 << 20 || bytes < 0 || bytes > (INT64_C(1) << 62) / (2 * n) - LINE) return MOE_BAD_SHAPE;
    moe_slots *s      = calloc(1, sizeof *s);
    claim     *claims = calloc(4 * (size_t)n, sizeof *claims);
    if (!s || !claims) {
        free(s), free(claims);
        return moe_failed("no memory for the slots of rank %d", rank);
    }
    for (int64_t i = 0; i < 4 * n; i++) claims[i].slots = s;
    const int64_t stride = (bytes + LINE - 1) / LINE * LINE;
    *s = (moe_slots){.ranks = ranks, .rank = rank, .stage = stage, .leader = rank / stage * stage,
                     .n = n, .bytes = bytes, .stride = stride, .claims = claims,
                     .peers = {.what = "link", .silence = "has sent nothing of what the others wait for",
                               .ranks = ranks, .rank = rank, .bytes = (size_t)(slots_at(n) + 2 * n * stride),
                               .seconds = seconds}};
    const int status = moe_peers_open(&s->peers, handle);
    if (status == MOE_OK) *slots = s;
    else moe_slots_close(s);
    return status;
}

int moe_slots_join(moe_slots *s, const void *handles_P) { return moe_peers_join(&s->peers, handles_P); }
int moe_slots_leave(moe_slots *s) { return moe_peers_leave(&s->peers); }
void moe_slots_close(moe_slots *s) {
    moe_peers_close(&s->peers);
    free(s->claims), free(s);
}
