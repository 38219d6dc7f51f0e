// windows.c: a wire among the ranks of one host: each rank owns a window of shared memory that the others have mapped,
// and every rank writes its rows straight to their place in the receiver's window. The twin of cuda/windows.cu.
//
//   window  [ a flag per rank, 128 bytes apart | half 0 | half 1 ]
//   epoch e (from one turn to the next):
//     room    my piece for p has its place in half e%2 of p's window, behind the pieces of the ranks before me. The
//             caller writes it there, straight from what it has
//     turn    with each peer p, the next rank first: flag `me` of p's window = e, released
//             with each peer p, the rank before me first: flag p of my window has reached e, acquired
//     read    my half e%2 holds the pieces of all ranks, one behind the other. The caller takes what it wants from
//             there, and is done before its next turn
// Two halves are enough: p writes half e%2 again in epoch e+2, after its turn e+1, for which it has seen my flag of
// e+1, and I raised that after my reads of epoch e. Every rank raises every flag in every epoch, rows or not. Before
// its turn nobody looks at what a rank has written: it may fail, and begin the epoch again.
//
// The window is a memory file, and waits end as peers.h says.
#include "peers.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { COUNTS = 1024 };                 // numbers of one rank that a call of counts takes, at least

typedef struct { alignas(LINE) _Atomic uint32_t epoch; } flag;
typedef struct {                        // the first bytes of a window
    moe_peer_head                  peer;
    alignas(LINE) _Atomic uint32_t asleep;      // 1 + the rank on whose flag the owner sleeps, 0 if it is awake
    flag                           raised[MAX_RANKS];
} header;

struct moe_windows {
    moe_peers peers;
    int       ranks, rank;
    int64_t   half;                     // bytes
    uint32_t  epoch;                    // the one whose rows are being written
};

static header *window(const moe_windows *w, int p) { return (header *)w->peers.memory[p]; }

// -- waits ------------------------------------------------------------------------------------------------------------
static bool reached(uint32_t epoch, const moe_windows *w) { return (int32_t)(epoch - w->epoch) >= 0; }

// Either the owner sees the flag before it sleeps, or the flag's rank sees it asleep: both write one word and then read
// the other, in the one order of all sequentially consistent accesses.
static void raise_flag(const moe_windows *w, int p) {
    _Atomic uint32_t *epoch = &window(w, p)->raised[w->rank].epoch;
    atomic_store(epoch, w->epoch);
    if (atomic_load(&window(w, p)->asleep) == (uint32_t)w->rank + 1) moe_futex_wake(epoch);
}

// Whether to wait on for rank p. A flag is read after its rank was seen dead: it may have come just before.
static int look_up(moe_windows *w, int p, double deadline) {
    header *mine = window(w, w->rank);
    poll(w->peers.life, (nfds_t)w->ranks, 0);
    const uint32_t culprit = atomic_load(&mine->peer.culprit);
    if (culprit) return moe_peers_give_up(&w->peers, (int)culprit - 1);
    const bool late = moe_now() > deadline;
    for (int q = 0; q < w->ranks; q++)
        if ((w->peers.life[q].revents || (late && q == p)) && !reached(atomic_load(&mine->raised[q].epoch), w))
            return moe_peers_give_up(&w->peers, q);
    return MOE_OK;
}

static int await_flag(moe_windows *w, int p, double deadline) {
    header           *mine = window(w, w->rank);
    _Atomic uint32_t *epoch = &mine->raised[p].epoch;
    for (int i = 0; i < w->peers.spins; i++, moe_relax())
        if (reached(atomic_load_explicit(epoch, memory_order_acquire), w)) return MOE_OK;
    int      status = MOE_OK;
    uint32_t seen;
    atomic_store(&mine->asleep, (uint32_t)p + 1);
    while (!reached(seen = atomic_load(epoch), w) && (status = look_up(w, p, deadline)) == MOE_OK)
        moe_futex_wait(epoch, seen, &MOE_SLICE);
    atomic_store_explicit(&mine->asleep, 0, memory_order_relaxed);
    return status;
}

// -- one epoch --------------------------------------------------------------------------------------------------------
static char *half_of(const moe_windows *w, int p) { return (char *)(window(w, p) + 1) + (w->epoch & 1) * w->half; }

int moe_windows_room(moe_windows *w, const int64_t *bytes_PP, void **to_P) {
    const int status = moe_peers_ready(&w->peers);
    if (status != MOE_OK) return status;
    for (int p = 0; p < w->ranks; p++) {
        int64_t all = 0;
        for (int q = 0; q < w->ranks; q++) {
            const int64_t bytes = bytes_PP[q * w->ranks + p];
            if (bytes < 0) return MOE_BAD_SHAPE;
            if (bytes > w->half - all)
                return moe_failed("a window holds %lld bytes, rank %d is to receive more", (long long)w->half, p);
            if (q == w->rank) to_P[p] = half_of(w, p) + all;
            all += bytes;
        }
    }
    return MOE_OK;
}

int moe_windows_turn(moe_windows *w, const void **received) {
    int status = moe_peers_ready(&w->peers);
    const double deadline = moe_now() + w->peers.seconds;
    for (int i = 1; status == MOE_OK && i < w->ranks; i++) raise_flag(w, (w->rank + i) % w->ranks);
    for (int i = 1; status == MOE_OK && i < w->ranks; i++)
        status = await_flag(w, (w->rank + w->ranks - i) % w->ranks, deadline);
    if (status != MOE_OK) return status;
    *received = half_of(w, w->rank);
    w->epoch++;
    return MOE_OK;
}

int moe_windows_counts(moe_windows *w, int64_t n, const int32_t *mine_n, int32_t *all_Pn) {
    if (n < 0) return MOE_BAD_SHAPE;
    if (n > w->half / 4 / w->ranks)
        return moe_failed("a window holds %lld bytes, not %lld counts of %d ranks", (long long)w->half, (long long)n,
                      w->ranks);
    int status = moe_peers_ready(&w->peers);
    for (int p = 0; status == MOE_OK && p < w->ranks; p++)
        memcpy(half_of(w, p) + 4 * n * w->rank, mine_n, (size_t)(4 * n));
    const void *received;
    if (status == MOE_OK) status = moe_windows_turn(w, &received);
    if (status == MOE_OK) memcpy(all_Pn, received, (size_t)(4 * n * w->ranks));
    return status;
}

int moe_windows_rows(moe_windows *w, const int64_t *bytes_PP, const void *sent, void *received) {
    void       *to_P[MAX_RANKS];
    const void *pieces;
    int         status = moe_windows_room(w, bytes_PP, to_P);
    if (status != MOE_OK) return status;
    const char *x = sent;
    int64_t     bytes = 0;
    for (int p = 0; p < w->ranks; p++) {
        moe_copy(to_P[p], x, bytes_PP[w->rank * w->ranks + p]);
        x += bytes_PP[w->rank * w->ranks + p];
        bytes += bytes_PP[p * w->ranks + w->rank];
    }
    status = moe_windows_turn(w, &pieces);
    if (status == MOE_OK) moe_copy(received, pieces, bytes);
    return status;
}

// -- open and close ---------------------------------------------------------------------------------------------------
int moe_windows_open(int ranks, int rank, int64_t bytes, double seconds, void *handle, moe_windows **windows) {
    if (ranks > MAX_RANKS) return moe_failed("windows join at most %d ranks, not %d", MAX_RANKS, ranks);
    if (ranks < 1 || rank < 0 || rank >= ranks || !(seconds > 0)) return MOE_BAD_SHAPE;
    if (bytes < 0 || bytes > INT64_MAX / 4) return MOE_BAD_SHAPE;
    moe_windows *w = calloc(1, sizeof *w);
    if (!w) return moe_failed("no memory for the wire of rank %d", rank);
    const int64_t least = 4 * COUNTS * ranks, half = ((bytes > least ? bytes : least) + PAGE - 1) / PAGE * PAGE;
    *w = (moe_windows){.ranks = ranks, .rank = rank, .epoch = 1, .half = half,
                       .peers = {.what = "window", .silence = "did not answer the others' windows", .ranks = ranks,
                                 .rank = rank, .bytes = sizeof(header) + 2 * (size_t)half, .seconds = seconds}};
    const int status = moe_peers_open(&w->peers, handle);
    if (status == MOE_OK) *windows = w;
    else moe_windows_close(w);
    return status;
}

int moe_windows_join(moe_windows *w, const void *handles_P) { return moe_peers_join(&w->peers, handles_P); }
int moe_windows_leave(moe_windows *w) { return moe_peers_leave(&w->peers); }
void moe_windows_close(moe_windows *w) {
    moe_peers_close(&w->peers);
    free(w);
}
