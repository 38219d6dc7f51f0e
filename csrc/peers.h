// peers.h: the ranks of one host: each owns a memory file that the others have mapped, and learns which of them is
// lost. What windows.c and slots.c stand on. Inside the core only.
//
// A memory file (memfd) has no name: nobody has to remove it, whatever is killed when, and the size of /dev/shm does
// not bound it. Peers open it as /proc/PID/fd/N; a random number in handle and file says that it is the right one.
// Pages that nobody has written take no memory.
//
// A wait sleeps on a futex in its own file, and looks up every MOE_SLICE: at its peers' pidfds, which see a death at
// once, a zombie's too; at the deadline; and at `culprit`, where a rank that gives up names the one that it waited for.
// So all give up, all name the same rank, and each says it again at every later call. If there is a core per rank, a
// wait begins with some microseconds of spinning: a flag arrives in 0.2 us where a wake takes 10. With fewer cores
// spinning only keeps a core from the rank that is waited for.
#ifndef MOE_PEERS_H
#define MOE_PEERS_H
#include "kernels.h"
#include <poll.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <time.h>

enum { MAX_RANKS = 128, LINE = 128, PAGE = 4096 };
static const struct timespec MOE_SLICE = {0, 10000000};     // ns

typedef struct {                        // the first bytes of a file
    uint64_t                       number;      // random
    alignas(LINE) _Atomic uint32_t culprit;     // 1 + the rank that all have given up
} moe_peer_head;

typedef struct {
    const char    *what;                // a file is called in sentences: "window"
    const char    *silence;             // what a rank has done that is late: "did not answer"
    int            ranks, rank, file, spins;
    size_t         bytes;               // of a file
    double         seconds;             // until a rank is late
    moe_peer_head *memory[MAX_RANKS];
    struct pollfd  life[MAX_RANKS];     // pidfds; -1, which poll passes over, at `rank`
    int            pid[MAX_RANKS];
    char           why[256];            // all have given up
} moe_peers;

// Sets the sentence of moe_peers_error() and returns MOE_WIRE_FAILED.
__attribute__((format(printf, 1, 2))) int moe_failed(const char *format, ...);

// The caller has set what, silence, ranks, rank, bytes and seconds, the rest is 0. handle: MOE_WINDOW_HANDLE_BYTES. If
// it fails, close is still to be called.
int  moe_peers_open(moe_peers *p, void *handle);
int  moe_peers_join(moe_peers *p, const void *handles_P);
int  moe_peers_ready(const moe_peers *p);               // all files are open, nobody was given up
int  moe_peers_give_up(moe_peers *p, int culprit);
int  moe_peers_leave(moe_peers *p);
void moe_peers_close(moe_peers *p);

static inline double moe_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void moe_relax(void) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void moe_futex_wait(_Atomic uint32_t *word, uint32_t seen, const struct timespec *timeout);
void moe_futex_wake(_Atomic uint32_t *word);
void moe_copy(void *to, const void *from, int64_t bytes);       // by the threads that it is worth
#endif
