// race.cpp: the race detector. cuda/*.cu are compiled with -fsanitize=thread, and the functions that the compiler then
// calls at every access to memory are here in place of its library's.
//
// Two accesses to one place by different threads, one of them a write, race unless something orders them:
//   __syncthreads   everything before it, of all threads of the block, and everything after it;
//   __syncwarp      the same for the lanes of its mask. Shuffles, votes and mma order nothing in memory;
//   atomics         do not race with one another, and order nothing (they are relaxed);
//   cp.async        writes from its issue to the wait_group that covers it: until then nobody may touch the target, not
//                   even its own thread, and others not before the barrier after that;
//   blocks          of one launch are never ordered.
// A clock ticks at every such event, and each place keeps the time of its last write and of its last reads and atomics
// by two warps: with a warp's lanes in a mask, two are enough to see one of another warp.
#ifdef SIMT_RACE
#include "race.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "internal.h"

namespace race {
namespace {
enum { GRAIN = 2, PAGE = 4096, CELLS = PAGE / GRAIN, MAX_PAGES = 12 * 1024, WARPS = 32 };

typedef uint32_t instant;                       // 0: never
struct write_mark { instant time; uint32_t pc; uint16_t thread; bool under_way; };
struct group_mark { instant time; uint32_t lanes, pc; int warp; };      // accesses of one warp, the newest at `time`
struct cell {
    write_mark write;
    group_mark reads[2], atomics[2];
};

instant now = 1, launch_start, block_start, barrier_time;
instant horizon;                                // of the access at hand: what is older cannot race with it
instant warp_time[WARPS];                       // the last __syncwarp of a full warp
instant seen[WARPS][32][32];                    // [warp][lane][other]: what lane knows of other by smaller masks
std::vector<instant> block_starts;
bool active;
const char *stacks, *stacks_end, *shared, *shared_end, *room, *room_end, *here;
std::unordered_map<uintptr_t, cell *> pages;
struct { uintptr_t page; cell *cells; } recent[256];

uint32_t offset_of(const void *pc) { return static_cast<uint32_t>(static_cast<const char *>(pc) - here); }

cell *cells_of(uintptr_t page) {
    auto &r = recent[page % 256];
    if (r.page == page && r.cells) return r.cells;
    cell *&cells = pages[page];
    if (!cells) {
        void *p = mmap(nullptr, sizeof(cell) * CELLS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) simt::fail("no memory for the race detector");
        cells = static_cast<cell *>(p);
    }
    r = {page, cells};
    return cells;
}

void forget() {
    for (auto &[page, cells] : pages) munmap(cells, sizeof(cell) * CELLS);
    pages.clear();
    memset(recent, 0, sizeof recent);
}

// ---- order ----------------------------------------------------------------------------------------------------------
// Whether what `thread` did at `time` comes before what the running thread does now.
bool before(instant time, int thread) {
    const int me = simt::self->linear;
    if (time <= horizon) return true;
    if (time <= block_start) return false;      // another block
    if (time <= barrier_time || thread == me) return true;
    const int warp = me / 32;
    return thread / 32 == warp && time <= std::max(warp_time[warp], seen[warp][me & 31][thread & 31]);
}
// A thread of the mark that is not ordered before now, or -1.
int unordered(const group_mark &m) {
    if (m.time <= horizon) return -1;
    for (uint32_t lanes = m.lanes; lanes; lanes &= lanes - 1) {
        const int thread = m.warp * 32 + __builtin_ctz(lanes);
        if (!before(m.time, thread)) return thread;
    }
    return -1;
}
// Adds the running thread; the lanes that are ordered before it need not be remembered: who comes after it comes after
// them.
void add(group_mark (&marks)[2], uint32_t pc) {
    const int me = simt::self->linear, warp = me / 32;
    const uint32_t bit = 1u << (me & 31);
    int i = 0;
    while (i < 2 && !(marks[i].time > block_start && marks[i].warp == warp)) i++;
    if (i == 2) i = marks[0].time <= barrier_time ? 0 : 1;
    group_mark &m = marks[i];
    uint32_t kept = 0;
    if (m.time > barrier_time && m.warp == warp && m.time > warp_time[warp])
        for (uint32_t lanes = m.lanes; lanes; lanes &= lanes - 1)
            if (m.time > seen[warp][me & 31][__builtin_ctz(lanes)]) kept |= lanes & -lanes;
    m = {now, kept | bit, pc, warp};
}

// ---- reports --------------------------------------------------------------------------------------------------------
int block_of(instant time) {                    // in the order in which blocks ran
    return static_cast<int>(std::lower_bound(block_starts.begin(), block_starts.end(), time) - block_starts.begin()) - 1;
}
[[noreturn]] void report(const char *p, const char *mine, const void *pc, const char *theirs, int thread, instant time,
                         uint32_t their_pc) {
    active = false;
    const bool in_shared = p >= shared && p < shared_end;
    const std::string line = simt::line_of(pc), their_line = simt::line_of(here + their_pc);
    char where[64], whose[64] = "";
    if (in_shared) snprintf(where, sizeof where, "shared memory + %td", p - shared);
    else snprintf(where, sizeof where, "global memory %p", static_cast<const void *>(p));
    if (time <= block_start)
        snprintf(whose, sizeof whose, " of another block (run as number %d, this is %d)", block_of(time), block_of(now));
    simt::fail("race on %s: %s by thread %d (%s) and %s by thread %d%s (%s) are not ordered", where, mine,
               simt::self->linear, line.c_str(), theirs, thread, whose, their_line.c_str());
}

template <kind what>
void check(cell &c, const char *p, const void *pc) {
    static const char *const names[] = {"a read", "a write", "an atomic"};
    const int me = simt::self->linear;
    if (c.write.under_way && c.write.time > block_start)
        report(p, names[what], pc, "a cp.async under way", c.write.thread, c.write.time, c.write.pc);
    if (!before(c.write.time, c.write.thread))
        report(p, names[what], pc, "a write", c.write.thread, c.write.time, c.write.pc);
    if (what == WRITE || what == ATOMIC)
        for (const group_mark &m : c.reads)
            if (const int t = unordered(m); t >= 0) report(p, names[what], pc, "a read", t, m.time, m.pc);
    if (what != ATOMIC)
        for (const group_mark &m : c.atomics)
            if (const int t = unordered(m); t >= 0) report(p, names[what], pc, "an atomic", t, m.time, m.pc);
    if (what == READ) add(c.reads, offset_of(pc));
    else if (what == ATOMIC) add(c.atomics, offset_of(pc));
    else c.write = {now, offset_of(pc), static_cast<uint16_t>(me), false};
}

template <class F>
void for_cells(const void *p, size_t bytes, F f) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(p) / GRAIN, last = (reinterpret_cast<uintptr_t>(p) + bytes - 1) / GRAIN;
    for (uintptr_t g = first; g <= last; g++)
        f(cells_of(g / CELLS)[g % CELLS], reinterpret_cast<const char *>(g * GRAIN));
}

template <kind what>
inline void touch(const void *at, size_t bytes, const void *pc) {
    const char *p = static_cast<const char *>(at);
    if (!active || !simt::self || (p >= stacks && p < stacks_end) || !bytes) return;
    if (p + bytes > room && p < room_end && (p < shared || p + bytes > shared_end)) {
        active = false;
        simt::fail("%zu bytes at shared memory + %td (%s), which has %td", bytes, p - shared, simt::line_of(pc).c_str(),
                   shared_end - shared);
    }
    horizon = p >= shared && p < shared_end ? block_start : launch_start;
    for_cells(p, bytes, [&](cell &c, const char *q) { check<what>(c, q, pc); });
}
}  // namespace

// ---- what the harness tells -----------------------------------------------------------------------------------------
void access(kind what, const void *p, size_t bytes, const void *pc) {
    if (what == READ) touch<READ>(p, bytes, pc);
    else if (what == WRITE) touch<WRITE>(p, bytes, pc);
    else touch<ATOMIC>(p, bytes, pc);
}
void async_begin(const void *p, size_t bytes, const void *pc) {
    touch<WRITE>(p, bytes, pc);
    for_cells(p, bytes, [](cell &c, const char *) { c.write.under_way = true; });
}
void async_end(const void *p, size_t bytes, int thread, const void *pc) {
    for_cells(p, bytes, [&](cell &c, const char *) {
        c.write = {now, offset_of(pc), static_cast<uint16_t>(thread), false};
    });
}
void begin_launch(const void *first_stack, size_t stack_bytes) {
    Dl_info info;
    if (!here && dladdr(reinterpret_cast<const void *>(&forget), &info)) here = static_cast<const char *>(info.dli_fbase);
    if (pages.size() > MAX_PAGES) forget();
    if (now > UINT32_MAX / 2) forget(), now = 1;
    stacks = static_cast<const char *>(first_stack), stacks_end = stacks + stack_bytes;
    launch_start = now++;
    block_starts.clear();
}
void begin_block(const void *memory, size_t bytes, const void *around, size_t room_bytes) {
    shared = static_cast<const char *>(memory), shared_end = shared + bytes;
    room = static_cast<const char *>(around), room_end = room + room_bytes;
    block_start = barrier_time = now++;
    block_starts.push_back(block_start);
    memset(warp_time, 0, sizeof warp_time);
    memset(seen, 0, sizeof seen);
    active = true;
}
void block_barrier() { barrier_time = now++; }
void warp_barrier(int warp, uint32_t mask) {
    if (mask == ~0u) { warp_time[warp] = now++; return; }
    instant joined[32] = {};
    for (int l = 0; l < 32; l++)
        for (int o = 0; o < 32 && mask >> l & 1; o++) joined[o] = std::max(joined[o], seen[warp][l][o]);
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) joined[l] = now;
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) memcpy(seen[warp][l], joined, sizeof joined);
    now++;
}
void end_launch() { active = false; }
}  // namespace race

// ---- what the compiler calls ----------------------------------------------------------------------------------------
using race::READ, race::WRITE, race::ATOMIC, race::touch;
#define PC __builtin_return_address(0)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
void __tsan_read_range(void *p, size_t n) { touch<READ>(p, n, PC); }
void __tsan_write_range(void *p, size_t n) { touch<WRITE>(p, n, PC); }
#define SIZE(n) \
    void __tsan_read##n(void *p) { touch<READ>(p, n, PC); } \
    void __tsan_write##n(void *p) { touch<WRITE>(p, n, PC); } \
    void __tsan_unaligned_read##n(void *p) { touch<READ>(p, n, PC); } \
    void __tsan_unaligned_write##n(void *p) { touch<WRITE>(p, n, PC); }
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16)
void *__tsan_memcpy(void *to, const void *from, size_t n) {
    touch<READ>(from, n, PC);
    touch<WRITE>(to, n, PC);
    return memcpy(to, from, n);
}
void *__tsan_memset(void *to, int value, size_t n) {
    touch<WRITE>(to, n, PC);
    return memset(to, value, n);
}
// std::atomic on the host.
#define ATOMICS(bits, T) \
    T __tsan_atomic##bits##_load(const T *p, int) { touch<ATOMIC>(p, sizeof *p, PC); return __atomic_load_n(p, 5); } \
    void __tsan_atomic##bits##_store(T *p, T x, int) { touch<ATOMIC>(p, sizeof *p, PC); __atomic_store_n(p, x, 5); } \
    T __tsan_atomic##bits##_exchange(T *p, T x, int) { touch<ATOMIC>(p, sizeof *p, PC); return __atomic_exchange_n(p, x, 5); } \
    T __tsan_atomic##bits##_fetch_add(T *p, T x, int) { touch<ATOMIC>(p, sizeof *p, PC); return __atomic_fetch_add(p, x, 5); } \
    T __tsan_atomic##bits##_fetch_sub(T *p, T x, int) { touch<ATOMIC>(p, sizeof *p, PC); return __atomic_fetch_sub(p, x, 5); } \
    bool __tsan_atomic##bits##_compare_exchange_strong(T *p, T *expected, T x, int, int) { \
        touch<ATOMIC>(p, sizeof *p, PC); \
        return __atomic_compare_exchange_n(p, expected, x, false, 5, 5); \
    }
ATOMICS(8, uint8_t) ATOMICS(16, uint16_t) ATOMICS(32, uint32_t) ATOMICS(64, uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(5); }
}
#endif
