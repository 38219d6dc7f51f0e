// memory.c: the arena of memory.h.
//
//   base                          top      open                           limit
//   | lent | free | lent | free     | unused | not yet writable             |
//
// One array lists the pieces of [base, top) in the order of their addresses; no two free ones are neighbours.
#include "memory.h"
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

enum { SMALLEST = 128 << 10, UNIT = 4096, HUGE_PAGE = 2 << 20, WINDOW = 16 };
// It ends where the next begins. Of a free one what lies behind `reach` has not been lent in this window.
typedef struct { char *begin, *reach; bool lent; } piece;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char   *base, *top, *open_end, *limit;
static int64_t passed;                                      // bytes lent in this window
static int64_t lent, most_lent;                             // bytes at once: now, and at the most (moe_memory_peak)
static piece  *pieces;
static int64_t pieces_n, pieces_room;

static char *up(char *p)   { return (char *)(((uintptr_t)p + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1)); }
static char *down(char *p) { return (char *)((uintptr_t)p & ~(uintptr_t)(HUGE_PAGE - 1)); }

#ifdef __SANITIZE_ADDRESS__
static void reserve(void) {}
#else
// A fork waits for a call of another thread to end, so that the child finds the list whole.
static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork(void)  { pthread_mutex_unlock(&lock); }

static void reserve(void) {
    struct rlimit addresses;
    if (getrlimit(RLIMIT_AS, &addresses) || addresses.rlim_cur != RLIM_INFINITY) return;
    const size_t size = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    char *p = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || pthread_atfork(before_fork, after_fork, after_fork)) return;
    base = top = open_end = up(p);
    limit = down(p + size);
#ifdef MADV_HUGEPAGE
    madvise(base, (size_t)(limit - base), MADV_HUGEPAGE);   // a system without them loses nothing
#endif
}
#endif

static char *end_of(int64_t i) { return i + 1 < pieces_n ? pieces[i + 1].begin : top; }

static void insert(int64_t i, piece p) {
    memmove(pieces + i + 1, pieces + i, (size_t)(pieces_n++ - i) * sizeof *pieces);
    pieces[i] = p;
}
static void erase(int64_t i) { memmove(pieces + i, pieces + i + 1, (size_t)(--pieces_n - i) * sizeof *pieces); }

// Back to the system, in whole huge pages.
static void drop(char *begin, char *end) {
    if (up(begin) < down(end)) madvise(up(begin), (size_t)(down(end) - up(begin)), MADV_DONTNEED);
}
// All that lies behind `end`, and behind every lent block.
static void cut(char *end) {
    if (!pieces_n || pieces[pieces_n - 1].lent || end >= top) return;
    char *last = pieces[pieces_n - 1].begin;
    if (end <= last) end = last, pieces_n--;
    drop(top = end, open_end);
}
static char *last_lent_end(void) {
    return pieces_n && !pieces[pieces_n - 1].lent ? pieces[pieces_n - 1].begin : top;
}

// The smallest free piece of at least `size`, at the lowest address; else a new last one, in place of one too small.
static int64_t find(int64_t size) {
    int64_t best = -1;
    for (int64_t i = 0; i < pieces_n; i++) {
        if (pieces[i].lent || end_of(i) - pieces[i].begin < size) continue;
        if (best < 0 || end_of(i) - pieces[i].begin < end_of(best) - pieces[best].begin) best = i;
    }
    if (best >= 0) return best;
    char *begin = last_lent_end();
    if (size > limit - begin) return -1;
    if (begin + size > open_end) {
        if (mprotect(open_end, (size_t)(up(begin + size) - open_end), PROT_READ | PROT_WRITE)) return -1;
        open_end = up(begin + size);
    }
    if (begin == top) insert(pieces_n, (piece){begin, begin, false});
    top = begin + size;
    return pieces_n - 1;
}

// The window ends: what was not lent in it goes back.
static void trim(void) {
    if (pieces_n) cut(pieces[pieces_n - 1].reach);
    for (int64_t i = 0; i < pieces_n; i++) {
        if (pieces[i].lent) continue;
        drop(pieces[i].reach, end_of(i));
        pieces[i].reach = pieces[i].begin;
    }
    passed = 0;
}

static bool room_for_two_more(void) {
    if (pieces_n + 2 <= pieces_room) return true;
    const int64_t room = 2 * pieces_room + 64;
    piece *more = realloc(pieces, (size_t)room * sizeof *pieces);
    if (more) pieces = more, pieces_room = room;
    return more;
}

void *moe_memory_take(int64_t bytes) {
    static bool tried;
    if (bytes < SMALLEST || bytes > INT64_MAX - UNIT) return NULL;
    const int64_t size = (bytes + UNIT - 1) / UNIT * UNIT;
    char *block = NULL;
    pthread_mutex_lock(&lock);
    if (!tried) reserve(), tried = true;
    const int64_t i = base && room_for_two_more() ? find(size) : -1;
    if (i >= 0) {
        block = pieces[i].begin;
        if (end_of(i) > block + size) {
            char *reach = pieces[i].reach;
            insert(i + 1, (piece){block + size, reach > block + size ? reach : block + size, false});
        }
        pieces[i].lent = true;
        lent += size;
        if (lent > most_lent) most_lent = lent;
        if ((passed += size) / WINDOW > top - base) trim();
    }
    pthread_mutex_unlock(&lock);
    return block;
}

void moe_memory_give(void *block) {
    pthread_mutex_lock(&lock);
    int64_t i = 0, end = pieces_n;
    while (end - i > 1) {
        const int64_t middle = (i + end) / 2;
        if (pieces[middle].begin <= (char *)block) i = middle;
        else end = middle;
    }
    pieces[i].lent  = false;
    pieces[i].reach = end_of(i);
    lent -= end_of(i) - pieces[i].begin;
    if (i + 1 < pieces_n && !pieces[i + 1].lent) pieces[i].reach = pieces[i + 1].reach, erase(i + 1);
    if (i > 0 && !pieces[i - 1].lent) pieces[i - 1].reach = pieces[i].reach, erase(i);
    pthread_mutex_unlock(&lock);
}

void moe_memory_release(void) {
    pthread_mutex_lock(&lock);
    cut(base);
    for (int64_t i = 0; i < pieces_n; i++)
        if (!pieces[i].lent) drop(pieces[i].begin, end_of(i));
    passed = 0;
    pthread_mutex_unlock(&lock);
}

int64_t moe_memory_peak(void) {
    pthread_mutex_lock(&lock);
    const int64_t most = most_lent;
    most_lent = lent;
    pthread_mutex_unlock(&lock);
    return most;
}
