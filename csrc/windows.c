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
// A window is a memory file (memfd), which has no name: nobody has to remove it, whatever is killed when, and the size
// of /dev/shm does not bound it. Peers open it as /proc/PID/fd/N; a random number in handle and window says that it is
// the right one. Pages that no row has reached take no memory.
//
// A wait sleeps on the flag (a futex), and looks up every SLICE: at its peers' pidfds, which see a death at once, a
// zombie's too; at the deadline; and at `culprit`, where a rank that gives up names the one that it waited for. So all
// give up, all name the same rank, and each says it again at every later call. If there is a core per rank, a wait
// begins with some microseconds of spinning: a flag arrives in 0.2 us where a wake takes 10. With fewer cores spinning
// only keeps a core from the rank that is waited for.
#include "kernels.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdalign.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434              // on every architecture, since Linux 5.3; older headers lack it
#endif

enum { MAX_RANKS = 128, LINE = 128, PAGE = 4096, HUGE = 1 << 21, SPINS = 100 };
enum { COUNTS = 1024 };                 // numbers of one rank that a call of counts takes, at least
enum { GRAIN = 1 << 18 };               // bytes of a copy that are worth a thread
static const struct timespec SLICE = {0, 10000000};     // ns

typedef struct { alignas(LINE) _Atomic uint32_t epoch; } flag;
typedef struct {                        // the first bytes of a window
    uint64_t                       number;      // random
    alignas(LINE) _Atomic uint32_t asleep;      // 1 + the rank on whose flag the owner sleeps, 0 if it is awake
    alignas(LINE) _Atomic uint32_t culprit;     // 1 + the rank that has broken the wire
    flag                           raised[MAX_RANKS];
} header;

typedef struct { int64_t pid, file; uint64_t number; } ticket;          // the first bytes of a handle
_Static_assert(sizeof(ticket) <= MOE_WINDOW_HANDLE_BYTES, "a handle holds a ticket");

struct moe_windows {
    int           ranks, rank, file, spins;
    int64_t       half;                 // bytes
    double        seconds;
    uint32_t      epoch;                // the one whose rows are being written
    header       *window[MAX_RANKS];
    struct pollfd life[MAX_RANKS];      // pidfds; -1, which poll passes over, at `rank`
    int           pid[MAX_RANKS];
    char          why[256];             // what broke the wire
};

static _Thread_local char last_error[256];
const char *moe_windows_error(void) { return last_error; }
__attribute__((format(printf, 1, 2))) static int failed(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(last_error, sizeof last_error, format, values);
    va_end(values);
    return MOE_WIRE_FAILED;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// -- waits ------------------------------------------------------------------------------------------------------------
static bool reached(uint32_t epoch, const moe_windows *w) { return (int32_t)(epoch - w->epoch) >= 0; }

static void relax(void) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Either the owner sees the flag before it sleeps, or the flag's rank sees it asleep: both write one word and then read
// the other, in the one order of all sequentially consistent accesses.
static void raise_flag(const moe_windows *w, int p) {
    _Atomic uint32_t *epoch = &w->window[p]->raised[w->rank].epoch;
    atomic_store(epoch, w->epoch);
    if (atomic_load(&w->window[p]->asleep) == (uint32_t)w->rank + 1)
        syscall(SYS_futex, epoch, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static int give_up(moe_windows *w, int culprit) {
    for (int p = 0; p < w->ranks; p++) {
        uint32_t nobody = 0;
        atomic_compare_exchange_strong(&w->window[p]->culprit, &nobody, (uint32_t)culprit + 1);
    }
    snprintf(w->why, sizeof w->why, "rank %d (pid %d) ", culprit, w->pid[culprit]);
    const size_t n = strlen(w->why);
    if (w->life[culprit].revents) snprintf(w->why + n, sizeof w->why - n, "has died");
    else snprintf(w->why + n, sizeof w->why - n, "did not answer the others' windows within %g s", w->seconds);
    return failed("%s", w->why);
}

// Whether to wait on for rank p. A flag is read after its rank was seen dead: it may have come just before.
static int look_up(moe_windows *w, int p, double deadline) {
    header *mine = w->window[w->rank];
    poll(w->life, (nfds_t)w->ranks, 0);
    const uint32_t culprit = atomic_load(&mine->culprit);
    if (culprit) return give_up(w, (int)culprit - 1);
    const bool late = now() > deadline;
    for (int q = 0; q < w->ranks; q++)
        if ((w->life[q].revents || (late && q == p)) && !reached(atomic_load(&mine->raised[q].epoch), w))
            return give_up(w, q);
    return MOE_OK;
}

static int await_flag(moe_windows *w, int p, double deadline) {
    header           *mine = w->window[w->rank];
    _Atomic uint32_t *epoch = &mine->raised[p].epoch;
    for (int i = 0; i < w->spins; i++, relax())
        if (reached(atomic_load_explicit(epoch, memory_order_acquire), w)) return MOE_OK;
    int      status = MOE_OK;
    uint32_t seen;
    atomic_store(&mine->asleep, (uint32_t)p + 1);
    while (!reached(seen = atomic_load(epoch), w) && (status = look_up(w, p, deadline)) == MOE_OK)
        syscall(SYS_futex, epoch, FUTEX_WAIT, seen, &SLICE, NULL, 0);
    atomic_store_explicit(&mine->asleep, 0, memory_order_relaxed);
    return status;
}

// -- one epoch --------------------------------------------------------------------------------------------------------
typedef struct { char *to; const char *from; } copy_job;
static void copy_part(int64_t begin, int64_t end, void *arg) {
    const copy_job *j = arg;
    memcpy(j->to + begin, j->from + begin, (size_t)(end - begin));
}
static void copy(char *to, const char *from, int64_t bytes) {
    moe_parallel(bytes, GRAIN, copy_part, &(copy_job){to, from});
}

static char *half_of(const moe_windows *w, int p) { return (char *)(w->window[p] + 1) + (w->epoch & 1) * w->half; }

static int ready(const moe_windows *w) {
    if (*w->why) return failed("%s", w->why);
    for (int p = 0; p < w->ranks; p++)
        if (!w->window[p]) return failed("the window of rank %d is not open yet", p);
    return MOE_OK;
}

int moe_windows_room(moe_windows *w, const int64_t *bytes_PP, void **to_P) {
    const int status = ready(w);
    if (status != MOE_OK) return status;
    for (int p = 0; p < w->ranks; p++) {
        int64_t all = 0;
        for (int q = 0; q < w->ranks; q++) {
            const int64_t bytes = bytes_PP[q * w->ranks + p];
            if (bytes < 0) return MOE_BAD_SHAPE;
            if (bytes > w->half - all)
                return failed("a window holds %lld bytes, rank %d is to receive more", (long long)w->half, p);
            if (q == w->rank) to_P[p] = half_of(w, p) + all;
            all += bytes;
        }
    }
    return MOE_OK;
}

int moe_windows_turn(moe_windows *w, const void **received) {
    int status = ready(w);
    const double deadline = now() + w->seconds;
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
        return failed("a window holds %lld bytes, not %lld counts of %d ranks", (long long)w->half, (long long)n,
                      w->ranks);
    int status = ready(w);
    for (int p = 0; status == MOE_OK && p < w->ranks; p++)
        memcpy(half_of(w, p) + 4 * n * w->rank, mine_n, (size_t)(4 * n));
    const void *received;
    if (status == MOE_OK) status = moe_windows_turn(w, &received);
    if (status == MOE_OK) memcpy(all_Pn, received, (size_t)(4 * n * w->ranks));
    return status;
}

void moe_huge_pages(void *memory, int64_t bytes) {
    const uintptr_t begin = ((uintptr_t)memory + HUGE - 1) / HUGE * HUGE;
    const uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) / HUGE * HUGE;
    if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE);    // a system without them loses nothing
}

int moe_windows_rows(moe_windows *w, const int64_t *bytes_PP, const void *sent, void *received) {
    void       *to_P[MAX_RANKS];
    const void *pieces;
    int         status = moe_windows_room(w, bytes_PP, to_P);
    if (status != MOE_OK) return status;
    const char *x = sent;
    int64_t     bytes = 0;
    for (int p = 0; p < w->ranks; p++) {
        copy(to_P[p], x, bytes_PP[w->rank * w->ranks + p]);
        x += bytes_PP[w->rank * w->ranks + p];
        bytes += bytes_PP[p * w->ranks + w->rank];
    }
    moe_huge_pages(received, bytes);
    status = moe_windows_turn(w, &pieces);
    if (status == MOE_OK) copy(received, pieces, bytes);
    return status;
}

// -- open and close ---------------------------------------------------------------------------------------------------
static size_t window_bytes(const moe_windows *w) { return sizeof(header) + 2 * (size_t)w->half; }

static int map(moe_windows *w, int p, int file) {
    void *memory = mmap(NULL, window_bytes(w), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED)
        return failed("no window of %zu bytes at rank %d: %s", window_bytes(w), p, strerror(errno));
    w->window[p] = memory;
    return MOE_OK;
}

static void unmap(moe_windows *w, int p) {
    if (w->window[p]) munmap(w->window[p], window_bytes(w));
    if (w->life[p].fd >= 0) close(w->life[p].fd);
    w->window[p] = NULL, w->life[p].fd = -1;
}

static int open_own(moe_windows *w, void *handle) {
    ticket own = {.pid = getpid(), .file = w->file};
    if (w->file < 0 || ftruncate(w->file, (off_t)window_bytes(w)) ||
        getrandom(&own.number, sizeof own.number, 0) != sizeof own.number)
        return failed("no window of %zu bytes at rank %d: %s", window_bytes(w), w->rank, strerror(errno));
    const int status = map(w, w->rank, w->file);
    if (status != MOE_OK) return status;
    w->pid[w->rank] = (int)own.pid;
    w->window[w->rank]->number = own.number;
    memset(handle, 0, MOE_WINDOW_HANDLE_BYTES);
    memcpy(handle, &own, sizeof own);
    return MOE_OK;
}

int moe_windows_open(int ranks, int rank, int64_t bytes, double seconds, void *handle, moe_windows **windows) {
    if (ranks > MAX_RANKS) return failed("windows join at most %d ranks, not %d", MAX_RANKS, ranks);
    if (ranks < 1 || rank < 0 || rank >= ranks || !(seconds > 0)) return MOE_BAD_SHAPE;
    if (bytes < 0 || bytes > INT64_MAX / 4) return MOE_BAD_SHAPE;
    moe_windows *w = calloc(1, sizeof *w);
    if (!w) return failed("no memory for the wire of rank %d", rank);
    const int64_t least = 4 * COUNTS * ranks;
    cpu_set_t     cores;
    *w = (moe_windows){.ranks = ranks, .rank = rank, .seconds = seconds, .epoch = 1,
                       .file = memfd_create("moe_window", MFD_CLOEXEC),
                       .half = ((bytes > least ? bytes : least) + PAGE - 1) / PAGE * PAGE};
    if (!sched_getaffinity(0, sizeof cores, &cores) && CPU_COUNT(&cores) >= ranks) w->spins = SPINS;
    for (int p = 0; p < ranks; p++) w->life[p] = (struct pollfd){.fd = -1, .events = POLLIN};
    const int status = open_own(w, handle);
    if (status == MOE_OK) *windows = w;
    else moe_windows_close(w);
    return status;
}

// The pidfd comes first: if the process is another by now, so is the file behind /proc, and its number is wrong.
static int open_peer(moe_windows *w, int p, const ticket *t) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)t->pid, (int)t->file);
    w->pid[p] = (int)t->pid;
    w->life[p].fd = (int)syscall(SYS_pidfd_open, w->pid[p], 0);
    const int file = w->life[p].fd < 0 ? -1 : open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return failed("the window of rank %d (pid %d) cannot be opened: %s. Are all ranks on one host, and alive?", p,
                      w->pid[p], strerror(errno));
    struct stat is;
    const bool  fits = !fstat(file, &is) && (size_t)is.st_size == window_bytes(w);
    const int   status = fits ? map(w, p, file) : MOE_OK;
    close(file);
    if (status != MOE_OK || (fits && w->window[p]->number == t->number)) return status;
    unmap(w, p);
    return failed("%s is not the window of rank %d, or not of %zu bytes as that of rank %d", path, p, window_bytes(w),
                  w->rank);
}

int moe_windows_join(moe_windows *w, const void *handles_P) {
    for (int p = 0; p < w->ranks; p++) {
        ticket t;
        memcpy(&t, (const char *)handles_P + p * MOE_WINDOW_HANDLE_BYTES, sizeof t);
        const int status = w->window[p] ? MOE_OK : open_peer(w, p, &t);
        if (status != MOE_OK) return status;
    }
    return MOE_OK;
}

int moe_windows_leave(moe_windows *w) {
    for (int p = 0; p < w->ranks; p++)
        if (p != w->rank) unmap(w, p);
    return *w->why ? failed("%s", w->why) : MOE_OK;
}

void moe_windows_close(moe_windows *w) {
    for (int p = 0; p < w->ranks; p++) unmap(w, p);
    if (w->file >= 0) close(w->file);
    free(w);
}
