// peers.c: memory files of the ranks of one host; see peers.h.
#include "peers.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434              // on every architecture, since Linux 5.3; older headers lack it
#endif

enum { SPINS = 100 };
enum { GRAIN = 1 << 18 };               // bytes of a copy that are worth a thread

typedef struct { int64_t pid, file; uint64_t number; } ticket;          // the first bytes of a handle
_Static_assert(sizeof(ticket) <= MOE_WINDOW_HANDLE_BYTES, "a handle holds a ticket");

static _Thread_local char last_error[256];
const char *moe_peers_error(void) { return last_error; }
int moe_failed(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(last_error, sizeof last_error, format, values);
    va_end(values);
    return MOE_WIRE_FAILED;
}

void moe_futex_wait(_Atomic uint32_t *word, uint32_t seen, const struct timespec *timeout) {
    syscall(SYS_futex, word, FUTEX_WAIT, seen, timeout, NULL, 0);
}
void moe_futex_wake(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0); }

typedef struct { char *to; const char *from; } copy_job;
static void copy_part(int64_t begin, int64_t end, void *arg) {
    const copy_job *j = arg;
    memcpy(j->to + begin, j->from + begin, (size_t)(end - begin));
}
void moe_copy(void *to, const void *from, int64_t bytes) {
    moe_parallel(bytes, GRAIN, copy_part, &(copy_job){to, from});
}

// The file of rank 0 is where the first one to give up is known; then its culprit is everybody's.
int moe_peers_give_up(moe_peers *p, int culprit) {
    uint32_t first = 0;
    if (!atomic_compare_exchange_strong(&p->memory[0]->culprit, &first, (uint32_t)culprit + 1))
        culprit = (int)first - 1;
    for (int q = 0; q < p->ranks; q++) atomic_store(&p->memory[q]->culprit, (uint32_t)culprit + 1);
    snprintf(p->why, sizeof p->why, "rank %d (pid %d) ", culprit, p->pid[culprit]);
    const size_t n = strlen(p->why);
    if (p->life[culprit].revents) snprintf(p->why + n, sizeof p->why - n, "has died");
    else snprintf(p->why + n, sizeof p->why - n, "%s within %g s", p->silence, p->seconds);
    return moe_failed("%s", p->why);
}

int moe_peers_ready(const moe_peers *p) {
    if (*p->why) return moe_failed("%s", p->why);
    for (int q = 0; q < p->ranks; q++)
        if (!p->memory[q]) return moe_failed("the %s of rank %d is not open yet", p->what, q);
    return MOE_OK;
}

// -- open and close ---------------------------------------------------------------------------------------------------
static int map(moe_peers *p, int q, int file) {
    void *memory = mmap(NULL, p->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED)
        return moe_failed("no %s of %zu bytes at rank %d: %s", p->what, p->bytes, q, strerror(errno));
    p->memory[q] = memory;
    return MOE_OK;
}

static void unmap(moe_peers *p, int q) {
    if (p->memory[q]) munmap(p->memory[q], p->bytes);
    if (p->life[q].fd >= 0) close(p->life[q].fd);
    p->memory[q] = NULL, p->life[q].fd = -1;
}

int moe_peers_open(moe_peers *p, void *handle) {
    char name[32];
    snprintf(name, sizeof name, "moe_%s", p->what);
    p->file = memfd_create(name, MFD_CLOEXEC);
    for (int q = 0; q < p->ranks; q++) p->life[q] = (struct pollfd){.fd = -1, .events = POLLIN};
    cpu_set_t cores;
    if (!sched_getaffinity(0, sizeof cores, &cores) && CPU_COUNT(&cores) >= p->ranks) p->spins = SPINS;
    ticket own = {.pid = getpid(), .file = p->file};
    if (p->file < 0 || ftruncate(p->file, (off_t)p->bytes) ||
        getrandom(&own.number, sizeof own.number, 0) != sizeof own.number)
        return moe_failed("no %s of %zu bytes at rank %d: %s", p->what, p->bytes, p->rank, strerror(errno));
    const int status = map(p, p->rank, p->file);
    if (status != MOE_OK) return status;
    p->pid[p->rank] = (int)own.pid;
    p->memory[p->rank]->number = own.number;
    memset(handle, 0, MOE_WINDOW_HANDLE_BYTES);
    memcpy(handle, &own, sizeof own);
    return MOE_OK;
}

// The pidfd comes first: if the process is another by now, so is the file behind /proc, and its number is wrong.
static int open_peer(moe_peers *p, int q, const ticket *t) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)t->pid, (int)t->file);
    p->pid[q] = (int)t->pid;
    p->life[q].fd = (int)syscall(SYS_pidfd_open, p->pid[q], 0);
    const int file = p->life[q].fd < 0 ? -1 : open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return moe_failed("the %s of rank %d (pid %d) cannot be opened: %s. Are all ranks on one host, and alive?",
                          p->what, q, p->pid[q], strerror(errno));
    struct stat is;
    const bool  fits = !fstat(file, &is) && (size_t)is.st_size == p->bytes;
    const int   status = fits ? map(p, q, file) : MOE_OK;
    close(file);
    if (status != MOE_OK || (fits && p->memory[q]->number == t->number)) return status;
    unmap(p, q);
    return moe_failed("%s is not the %s of rank %d, or not of %zu bytes as that of rank %d", path, p->what, q, p->bytes,
                      p->rank);
}

int moe_peers_join(moe_peers *p, const void *handles_P) {
    for (int q = 0; q < p->ranks; q++) {
        ticket t;
        memcpy(&t, (const char *)handles_P + q * MOE_WINDOW_HANDLE_BYTES, sizeof t);
        const int status = p->memory[q] ? MOE_OK : open_peer(p, q, &t);
        if (status != MOE_OK) return status;
    }
    return MOE_OK;
}

int moe_peers_leave(moe_peers *p) {
    for (int q = 0; q < p->ranks; q++)
        if (q != p->rank) unmap(p, q);
    return *p->why ? moe_failed("%s", p->why) : MOE_OK;
}

void moe_peers_close(moe_peers *p) {
    for (int q = 0; q < p->ranks; q++) unmap(p, q);
    if (p->file >= 0) close(p->file);
}
