// race.cpp: the race detector. cuda/*.cu are compiled with -fsanitize=thread, and the functions that the compiler then
// calls at every access to memory are here in place of its library's.
//
// Two accesses to one place by different threads, one of them a write, race unless something orders them:
//   __syncthreads   everything before it, of all threads of the block, and everything after it;
//   __syncwarp      the same for the lanes of its mask. Shuffles, votes and mma order nothing in memory;
//   atomics         do not race with one another, and order nothing (they are relaxed);
//   cp.async        writes from its issue to the wait_group that covers it: until then nobody may touch the target, not
//                   even its own thread, and others not before the barrier after that;
//   mbarriers       what a thread did before an arrival, and who waits for the end of that phase after the wait; named
//                   barriers likewise among those who meet;
//   TMA, wgmma      touch shared memory from their issue until a wait says that they are done: the mbarrier's,
//                   wgmma_wait. They come through another proxy: what a thread wrote or copied is ordered before what
//                   they read or overwrite only if it called fence_async() in between. wgmma comes after what all 128
//                   threads come after;
//   blocks          of one launch are never ordered.
// A clock ticks at every such event, and each place keeps the time of its last write, of its last reads and atomics by
// two warps, and of its last reads by three units. A thread knows, of each other and of each unit, until when it comes
// after what that one did; blocks and full warps have one time for all that is before their barrier.
#ifdef SIMT_RACE
#include "race.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <unordered_map>
#include <vector>

#include "internal.h"

namespace race {
namespace {
enum { GRAIN = 2, PAGE = 4096, CELLS = PAGE / GRAIN, MAX_PAGES = 12 * 1024, WARPS = 32, GROUP = 128,
       PIECE = 16, ROOM_PIECES = 512 * 1024 / PIECE };
constexpr int THREADS = 1024, BARRIERS = UNITS - LOADS;

// Of instants: 0: never. Actors are the units, then the threads.
typedef int actor;
actor of(int thread) { return UNITS + thread; }
struct write_mark { instant time; uint32_t pc; uint16_t by; bool under_way; };
struct unit_mark { instant time; uint32_t pc; int unit; };              // a read
struct piece { unit_mark reads[3]; };
struct group_mark { instant time; uint32_t lanes, pc; int warp; };      // accesses of one warp, the newest at `time`
struct cell {
    write_mark write;
    group_mark reads[2], atomics[2];
};

instant now = 1, launch_start, block_start, barrier_time;
instant horizon;                                // of the access at hand: what is older cannot race with it
instant warp_time[WARPS];                       // the last __syncwarp of a full warp
struct knowledge {                              // of one thread, or of all who arrived at an mbarrier
    instant seen[UNITS + THREADS];              // of each actor: all until then is before
    instant fenced[UNITS + THREADS];            // of each thread: and fence_async came between
} threads[THREADS], arrived[BARRIERS], ended[BARRIERS];
bool spread;                                    // threads know, since the last barrier of the block, what others do not
int actors;                                     // units and threads of the block
struct group_view { bool valid; knowledge all; } views[THREADS / GROUP];
piece pieces[ROOM_PIECES];                      // of shared memory and its surroundings
std::vector<std::pair<const char *, unsigned>> lines;
std::vector<instant> block_starts;
bool active;
const char *stacks, *stacks_end, *shared, *shared_end, *room, *room_end, *here;
std::unordered_map<uintptr_t, cell *> pages;
struct { uintptr_t page; cell *cells; } recent[256];

enum { IS_LINE = 1u << 31 };                     // an offset that numbers a line
uint32_t offset_of(const void *pc) { return static_cast<uint32_t>(static_cast<const char *>(pc) - here); }
std::string line_of(const void *pc) {
    const uint32_t offset = offset_of(pc);
    if (!(offset & IS_LINE)) return simt::line_of(pc);
    const auto &[file, line] = lines[offset & ~IS_LINE];
    const char *slash = strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

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
// What the thread knows, after what barriers of its warp have told it.
knowledge &known(int thread) {
    knowledge &k = threads[thread];
    const int warp = thread / 32;
    for (actor a = of(warp * 32); a < std::min(of(warp * 32 + 32), actors); a++)
        k.seen[a] = std::max(k.seen[a], warp_time[warp]);
    return k;
}
void join(instant *into, const instant *from) {
    for (actor a = 0; a < actors; a++) into[a] = std::max(into[a], from[a]);
}
void join(knowledge &into, const knowledge &from) { join(into.seen, from.seen), join(into.fenced, from.fenced); }
// The thread knows more now than others of its block.
void learns(int thread) { spread = true, views[thread / GROUP].valid = false; }
// All that these threads did and knew comes before what they do next.
template <class List>
void join_all(const List &list) {
    static knowledge all;
    memset(&all, 0, sizeof all);
    for (int t : list) {
        join(all, known(t));
        all.seen[of(t)] = now;
    }
    for (int t : list) {
        memcpy(threads[t].seen, all.seen, sizeof(instant) * static_cast<size_t>(actors));
        memcpy(threads[t].fenced, all.fenced, sizeof(instant) * static_cast<size_t>(actors));
        learns(t);
    }
}

// Whether what `a` did at `time` comes before what the running thread does now.
bool before(instant time, actor a) {
    const int me = simt::self->linear;
    if (time <= horizon) return true;
    if (time <= block_start) return false;      // another block
    if (a >= UNITS && (time <= barrier_time || a == of(me))) return true;
    const int warp = me / 32;
    return time <= threads[me].seen[a] || (a >= of(warp * 32) && a < of(warp * 32 + 32) && time <= warp_time[warp]);
}
// A thread of the mark that is not ordered before now, or -1.
int unordered(const group_mark &m) {
    if (m.time <= horizon) return -1;
    for (uint32_t lanes = m.lanes; lanes; lanes &= lanes - 1) {
        const int thread = m.warp * 32 + __builtin_ctz(lanes);
        if (!before(m.time, of(thread))) return thread;
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
    if (i == 2) i = marks[0].time <= barrier_time || unordered(marks[0]) < 0 ? 0 : 1;
    group_mark &m = marks[i];
    uint32_t kept = 0;
    if (m.time > barrier_time && m.warp == warp && m.time > warp_time[warp])
        for (uint32_t lanes = m.lanes; lanes; lanes &= lanes - 1)
            if (m.time > threads[me].seen[of(warp * 32 + __builtin_ctz(lanes))]) kept |= lanes & -lanes;
    m = {now, kept | bit, pc, warp};
}

// ---- reports --------------------------------------------------------------------------------------------------------
int block_of(instant time) {                    // in the order in which blocks ran
    return static_cast<int>(std::lower_bound(block_starts.begin(), block_starts.end(),
                                             time) - block_starts.begin()) - 1;
}
// "a write by thread 3", or the unit that did it.
std::string who(const char *what, actor a) {
    if (a >= UNITS) return std::string(what) + " by thread " + std::to_string(a - UNITS);
    return a >= LOADS ? "a TMA load" : "a wgmma of warpgroup " + std::to_string(a);
}
[[noreturn]] void report(const char *p, const std::string &mine, const void *pc, const char *theirs, actor a,
                         instant time, uint32_t their_pc, const char *more = "") {
    active = false;
    const bool in_shared = p >= shared && p < shared_end;
    const std::string line = line_of(pc), their_line = line_of(here + their_pc);
    char where[64], whose[64] = "";
    if (in_shared) snprintf(where, sizeof where, "shared memory + %td", p - shared);
    else snprintf(where, sizeof where, "global memory %p", static_cast<const void *>(p));
    if (time <= block_start)
        snprintf(whose, sizeof whose, " of another block (run as number %d, this is %d)", block_of(time),
                 block_of(now));
    simt::fail("race on %s: %s (%s) and %s%s (%s) are not ordered%s", where, mine.c_str(), line.c_str(),
               who(theirs, a).c_str(), whose, their_line.c_str(), more);
}

template <kind what>
void check(cell &c, const char *p, const void *pc, actor as) {
    static const char *const names[] = {"a read", "a write", "an atomic"};
    const int me = simt::self->linear;
    const auto mine = [=] { return who(names[what], as); };
    if (c.write.under_way && c.write.time > block_start)
        report(p, mine(), pc, "a cp.async under way", c.write.by, c.write.time, c.write.pc);
    if (!before(c.write.time, c.write.by))
        report(p, mine(), pc, "a write", c.write.by, c.write.time, c.write.pc);
    if (what == WRITE || what == ATOMIC)
        for (const group_mark &m : c.reads)
            if (const int t = unordered(m); t >= 0) report(p, mine(), pc, "a read", of(t), m.time, m.pc);
    if (what != ATOMIC)
        for (const group_mark &m : c.atomics)
            if (const int t = unordered(m); t >= 0) report(p, mine(), pc, "an atomic", of(t), m.time, m.pc);
    if (what == READ) add(c.reads, offset_of(pc));
    else if (what == ATOMIC) add(c.atomics, offset_of(pc));
    else c.write = {now, offset_of(pc), static_cast<uint16_t>(of(me)), false};
}

template <class F>
void for_pieces(const void *p, size_t bytes, F f) {
    const size_t first = static_cast<size_t>(static_cast<const char *>(p) - room);
    for (size_t i = first / PIECE; i <= (first + bytes - 1) / PIECE; i++) f(pieces[i]);
}
// Nobody may overwrite what a unit still reads.
void check_units(const char *p, size_t bytes, const std::string &mine, const void *pc) {
    for_pieces(p, bytes, [&](const piece &x) {
        for (const unit_mark &m : x.reads)
            if (!before(m.time, m.unit)) report(p, mine, pc, "", m.unit, m.time, m.pc);
    });
}

template <class F>
void for_cells(const void *p, size_t bytes, F f) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(p) / GRAIN,
        last = (reinterpret_cast<uintptr_t>(p) + bytes - 1) / GRAIN;
    for (uintptr_t g = first; g <= last; g++)
        f(cells_of(g / CELLS)[g % CELLS], reinterpret_cast<const char *>(g * GRAIN));
}

template <kind what>
inline void touch(const void *at, size_t bytes, const void *pc) {
    const char *p = static_cast<const char *>(at);
    if (!active || !simt::self || !bytes) return;
    if (p >= stacks && p < stacks_end) {
        if (simt::in_flight(p, bytes)) {
            active = false;
            simt::fail("thread %d touches accumulators (%s) while a wgmma on them is under way", simt::self->linear,
                       simt::line_of(pc).c_str());
        }
        return;
    }
    if (p + bytes > room && p < room_end && (p < shared || p + bytes > shared_end)) {
        active = false;
        simt::fail("%zu bytes at shared memory + %td (%s), which has %td", bytes, p - shared, simt::line_of(pc).c_str(),
                   shared_end - shared);
    }
    horizon = p >= shared && p < shared_end ? block_start : launch_start;
    for_cells(p, bytes, [&](cell &c, const char *q) { check<what>(c, q, pc, of(simt::self->linear)); });
    if (what != READ && p >= shared && p < shared_end)
        check_units(p, bytes, who("a write", of(simt::self->linear)), pc);
}

// ---- units ----------------------------------------------------------------------------------------------------------
// What all 128 threads of a warpgroup know.
const group_view &view_of(int group) {
    group_view &v = views[group];
    if (v.valid) return v;
    memset(&v.all, 0xff, sizeof v.all);
    for (int t = group * GROUP; t < (group + 1) * GROUP; t++) {
        const knowledge &k = known(t);
        for (actor a = 0; a < actors; a++) {
            if (a != of(t)) v.all.seen[a] = std::min(v.all.seen[a], k.seen[a]);
            v.all.fenced[a] = std::min(v.all.fenced[a], k.fenced[a]);
        }
    }
    v.valid = true;
    return v;
}
const char *const NO_FENCE = " between the proxies: no fence_async";
}  // namespace

// ---- what the harness tells -----------------------------------------------------------------------------------------
void access(kind what, const void *p, size_t bytes, const void *pc) {
    if (what == READ) touch<READ>(p, bytes, pc);
    else if (what == WRITE) touch<WRITE>(p, bytes, pc);
    else touch<ATOMIC>(p, bytes, pc);
}
const void *pc_of(const char *file, unsigned line) {
    const std::pair<const char *, unsigned> wanted = {file, line};
    size_t i = static_cast<size_t>(std::find(lines.begin(), lines.end(), wanted) - lines.begin());
    if (i == lines.size()) lines.push_back(wanted);
    return here + (IS_LINE | i);
}
instant time() { return now++; }
void async_begin(const void *p, size_t bytes, const void *pc) {
    touch<WRITE>(p, bytes, pc);
    for_cells(p, bytes, [](cell &c, const char *) { c.write.under_way = true; });
}
void async_end(const void *p, size_t bytes, int thread) {
    for_cells(p, bytes, [&](cell &c, const char *) {
        c.write = {now, c.write.pc, static_cast<uint16_t>(of(thread)), false};
    });
}
void unit_reads(const void *at, size_t bytes, int unit, const void *pc) {
    if (!active) return;
    horizon = block_start;
    const knowledge &k = view_of(unit).all;
    for_cells(at, bytes, [&](cell &c, const char *p) {
        const write_mark &w = c.write;
        if (w.time <= horizon) return;
        const auto mine = [=] { return who("", unit); };
        if (w.under_way) report(p, mine(), pc, "a cp.async under way", w.by, w.time, w.pc);
        if (w.time > k.seen[w.by] && (w.by < UNITS || w.time > barrier_time))
            report(p, mine(), pc, "a write", w.by, w.time, w.pc);
        if (w.by < UNITS || w.time <= k.fenced[w.by]) return;
        report(p, mine(), pc, "a write", w.by, w.time, w.pc, NO_FENCE);
    });
    for_pieces(at, bytes, [&](piece &x) {
        int i = 0;
        while (i < 2 && x.reads[i].unit != unit && x.reads[i].time > block_start &&
               !before(x.reads[i].time, x.reads[i].unit)) i++;
        x.reads[i] = {now, offset_of(pc), unit};
    });
}
void unit_writes(const void *at, size_t bytes, int unit, const void *pc) {
    if (!active) return;
    horizon = block_start;
    const knowledge &k = known(simt::self->linear);
    for_cells(at, bytes, [&](cell &c, const char *p) {
        const write_mark w = c.write;
        const auto mine = [=] { return who("", unit); };
        if (w.time > horizon && !w.under_way && w.by >= UNITS && before(w.time, w.by) && w.time > k.fenced[w.by])
            report(p, mine(), pc, "a write", w.by, w.time, w.pc, NO_FENCE);
        check<WRITE>(c, p, pc, unit);
        c.write = {now, offset_of(pc), static_cast<uint16_t>(unit), false};
    });
    check_units(static_cast<const char *>(at), bytes, who("", unit), pc);
}
void unit_done(int unit, instant upto, int thread) {
    threads[thread].seen[unit] = std::max(threads[thread].seen[unit], upto);
    learns(thread);
}
void fence_async() {
    const int me = simt::self->linear;
    threads[me].fenced[of(me)] = now++;
    learns(me);
}
void arrive(int barrier, int thread) {
    join(arrived[barrier], known(thread));
    arrived[barrier].seen[of(thread)] = now++;
}
void end_phase(int barrier, instant upto) {
    arrived[barrier].seen[LOADS + barrier] = upto;
    memcpy(&ended[barrier], &arrived[barrier], sizeof(knowledge));
    now++;
}
void told(int barrier) {
    const int me = simt::self->linear;
    join(threads[me], ended[barrier]);
    learns(me);
}
void meet(const int *list, int n) {
    join_all(std::vector<int>(list, list + n));
    now++;
}
void begin_launch(const void *first_stack, size_t stack_bytes) {
    Dl_info info;
    if (!here && dladdr(reinterpret_cast<const void *>(&forget), &info))
        here = static_cast<const char *>(info.dli_fbase);
    if (pages.size() > MAX_PAGES) forget();
    if (now > UINT32_MAX / 2) {                 // what threads knew is of the past
        forget();
        now = 1;
        memset(threads, 0, sizeof threads), memset(arrived, 0, sizeof arrived);
        memset(pieces, 0, sizeof pieces);
    }
    stacks = static_cast<const char *>(first_stack), stacks_end = stacks + stack_bytes;
    launch_start = now++;
    block_starts.clear();
}
void begin_block(int n, const void *memory, size_t bytes, const void *around, size_t room_bytes) {
    shared = static_cast<const char *>(memory), shared_end = shared + bytes;
    room = static_cast<const char *>(around), room_end = room + room_bytes;
    block_start = barrier_time = now++;
    block_starts.push_back(block_start);
    memset(warp_time, 0, sizeof warp_time);
    actors = of(n);
    spread = false;
    for (group_view &v : views) v.valid = false;
    active = true;
}
void block_barrier() {
    if (spread) {
        std::vector<int> all(static_cast<size_t>(actors - UNITS));
        std::iota(all.begin(), all.end(), 0);
        join_all(all);
    }
    for (group_view &v : views) v.valid = false;
    spread = false;
    barrier_time = now++;
}
void warp_barrier(int warp, uint32_t mask) {
    if (mask != ~0u || spread) {
        std::vector<int> lanes;
        for (int l = 0; l < 32; l++) if (mask >> l & 1) lanes.push_back(warp * 32 + l);
        const bool before = spread;
        join_all(lanes);
        spread = before;
    }
    if (mask == ~0u) warp_time[warp] = now;
    views[warp / 4].valid = false;
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
