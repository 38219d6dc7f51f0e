// pool.c: parallel regions, and whose threads help in them.
//
// A region is a number of pieces that threads take one by one; the caller takes them too, until none is left. There are
// two kinds of helpers:
//   lent   those of moe_set_pool, in practice torch's OpenMP threads. They spin between torch's ops and so begin at
//          once; any other thread would have to share their cores with their spinning. But a region of theirs ends when
//          all have come to its end, and on a machine with more work than cores one that found no core in time, and did
//          nothing, is waited for by a caller that spins.
//   own    threads of this file, which sleep between regions. The caller waits for the pieces that others have begun
//          and for nothing else: a thread that wakes up late finds the region closed and has cost nothing.
// So regions are lent's until the caller has had to wait for more than LATE after the last piece of one had ended. The
// next ones are own: more of them each time that it happens again, fewer the longer it does not.
//
//   ticket   region number << 32 | pieces that nobody has taken     taking one is one compare-and-swap. A late thread
//                                                                   holds an old number or finds 0, and reads nothing
//   ended    pieces that are done                                   the last one wakes the caller
//   bell     region number; sleepers wait for its change            who takes a piece wakes two more if any is left
//
// One region at a time: one inside another, or beside that of another thread, is run by its caller alone. Own threads
// are made when first needed and never joined. A child process has none, and since the lent ones are gone there too, it
// makes its own. No thread waits in a spin for longer than going to sleep and waking up would take.
#include "pool.h"
#include "kernels.h"
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    SPINS  = 200,               // some 5 us
    PIECES = 4,                 // of a range of rows for each thread, so that a slow one holds up little
    LATE   = 500000,            // ns: a sleeping thread is up in 100000, one that waits for its turn takes a time slice
    LEAST_OWN = 32, MOST_OWN = 4096,            // regions
};

// -- waiting ----------------------------------------------------------------------------------------------------------
static void futex_wait(_Atomic uint32_t *word, uint32_t seen) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}
static void futex_wake(_Atomic uint32_t *word, int sleepers) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, sleepers, NULL, NULL, 0);
}
// Until *word is `wanted`; whoever makes it so wakes us.
static void await(_Atomic uint32_t *word, uint32_t wanted) {
    uint32_t seen;
    for (int spins = 0; (seen = atomic_load_explicit(word, memory_order_acquire)) != wanted; spins++) {
        if (spins >= SPINS) futex_wait(word, seen);
#ifdef __x86_64__
        else __builtin_ia32_pause();
#endif
    }
}
void moe_await(moe_missing *missing) { await(missing, 0); }
void moe_arrive(moe_missing *missing) {
    if (atomic_fetch_sub(missing, 1) == 1) futex_wake(missing, INT_MAX);
}

// -- own threads -----------------------------------------------------------------------------------------------------
static struct {
    _Atomic uint64_t ticket;
    _Atomic uint32_t ended, bell;
    uint32_t         pieces;                    // read, as body and arg, by who has taken a piece
    moe_body         body;
    void            *arg;
    int64_t          threads;                   // made so far
} own;

static void help(void) {
    bool first = true;
    uint64_t ticket = atomic_load_explicit(&own.ticket, memory_order_acquire);
    for (uint32_t left; (left = (uint32_t)ticket);) {
        if (!atomic_compare_exchange_weak(&own.ticket, &ticket, ticket - 1)) continue;
        if (first && left > 1) futex_wake(&own.bell, left > 2 ? 2 : 1);
        first = false;
        const uint32_t pieces = own.pieces;
        own.body(pieces - left, pieces - left + 1, own.arg);
        if (atomic_fetch_add(&own.ended, 1) + 1 == pieces) futex_wake(&own.ended, 1);
        ticket = atomic_load_explicit(&own.ticket, memory_order_acquire);
    }
}

// A bound OpenMP (OMP_PROC_BIND, GOMP_CPU_AFFINITY) has left the caller, whose CPUs a new thread inherits, one place of
// many. Ours may run in all of them. Weak: where there is no OpenMP these are NULL.
int  omp_get_num_places(void) __attribute__((weak));
int  omp_get_place_num_procs(int place) __attribute__((weak));
void omp_get_place_proc_ids(int place, int *ids) __attribute__((weak));
static void let_roam(pthread_t thread) {
    cpu_set_t cpus;
    const int places = omp_get_num_places ? omp_get_num_places() : 0;
    CPU_ZERO(&cpus);
    for (int place = 0; place < places; place++) {
        int ids[CPU_SETSIZE];
        const int n = omp_get_place_num_procs(place);
        if (n > CPU_SETSIZE) return;
        omp_get_place_proc_ids(place, ids);
        for (int i = 0; i < n; i++) CPU_SET((size_t)ids[i], &cpus);
    }
    if (places) pthread_setaffinity_np(thread, sizeof cpus, &cpus);
}
static void *thread_main(void *none) {
    for (;;) {
        const uint32_t heard = atomic_load(&own.bell);
        help();
        futex_wait(&own.bell, heard);
    }
    return none;
}

// Signals are for the threads of the program. If the system gives no more threads, those that there are do the work.
static void make_threads(int64_t wanted) {
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (pthread_t thread; own.threads < wanted; own.threads++) {
        if (pthread_create(&thread, NULL, thread_main, NULL)) break;
        pthread_setname_np(thread, "moe_ext");
        let_roam(thread);
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static void run_own(int64_t pieces, moe_body body, void *arg) {
    own.pieces = (uint32_t)pieces, own.body = body, own.arg = arg;
    own.ended  = 0;
    const uint32_t number = own.bell + 1;
    atomic_store(&own.ticket, (uint64_t)number << 32 | own.pieces);
    atomic_store(&own.bell, number);
    if (own.threads < pieces - 1) make_threads(pieces - 1);
    help();
    await(&own.ended, own.pieces);
}

// -- regions ----------------------------------------------------------------------------------------------------------
static moe_pool    lent;
static int       (*pool_threads)(void);
static atomic_flag busy = ATOMIC_FLAG_INIT;             // who sets it has `own` and what follows
static int64_t     left_own, most_own = LEAST_OWN;      // regions until lent is tried again; and if it is late then

static void in_child(void) {
    own.threads = 0;
    own.ticket  = 0;
    lent        = NULL;
    atomic_flag_clear(&busy);
}
static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

void moe_set_pool(moe_pool pool, int (*threads)(void)) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    lent         = pool;
    pool_threads = threads;
}
int moe_threads(void) { return pool_threads ? pool_threads() : 1; }

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}
// A piece of the pool is a thread, which takes pieces of the range.
typedef struct { moe_body body; void *arg; int64_t n, piece; _Atomic int64_t next, ended; } range;
static void run_pieces(int64_t begin, int64_t end, void *arg) {
    (void)begin, (void)end;
    range *r = arg;
    int64_t at = atomic_fetch_add(&r->next, r->piece);
    if (at >= r->n) return;
    for (; at < r->n; at = atomic_fetch_add(&r->next, r->piece))
        r->body(at, at + r->piece < r->n ? at + r->piece : r->n, r->arg);
    const int64_t time = now();
    for (int64_t last = r->ended; last < time && !atomic_compare_exchange_weak(&r->ended, &last, time);) {}
}
// The pool's status is not read: bodies are C functions that cannot fail, and so it has nothing to report.
static void run_lent(int64_t threads, range *r) {
    lent(0, threads, 1, run_pieces, r);
    const bool late = now() - r->ended > LATE;
    if (late) left_own = most_own;
    most_own += late ? most_own : -1;
    most_own = most_own < LEAST_OWN ? LEAST_OWN : most_own > MOST_OWN ? MOST_OWN : most_own;
}

void moe_parallel(int64_t n, int64_t grain, moe_body body, void *arg) {
    if (n <= 0) return;
    const int64_t threads = n > grain ? moe_threads() : 1;
    if (threads == 1 || atomic_flag_test_and_set(&busy)) {
        body(0, n, arg);
        return;
    }
    const int64_t even = (n - 1) / (PIECES * threads) + 1;
    range r = {.body = body, .arg = arg, .n = n, .piece = even > grain ? even : grain > 1 ? grain : 1};
    const int64_t pieces = (n - 1) / r.piece + 1, hands = pieces < threads ? pieces : threads;
    if (lent && left_own == 0) run_lent(hands, &r);
    else {
        run_own(hands, run_pieces, &r);
        left_own -= left_own > 0;
    }
    atomic_flag_clear(&busy);
}
