// sm90.cpp: the host's twins of Hopper's instructions: mbarriers, TMA, wgmma, named barriers, setmaxnreg, stmatrix; and
// the driver's encoder of tensor maps.
//
// What is asynchronous is in a list here from its issue until it is done, which by SIMT_ASYNC happens
//   early    at once;
//   late     when somebody waits for it and no thread can run: loads; at its wait: wgmma;
//   random   at a moment in between that the seed picks.
// Until then the target of a load, and the accumulators of wgmma up to their wait whatever the timing, are NaN.
#include <cuda.h>
#include <cuda_runtime.h>

#include "../../cuda/ptx_sm90.cuh"

#include <algorithm>
#include <deque>
#include <memory>
#include <tuple>
#include <vector>

#include "internal.h"

namespace simt {
namespace {
enum { THREADS = 1024, SHARED = 227 * 1024, GROUP = 128, REGISTERS = 65536, MAX_BYTES = (1 << 20) - 1,
       BARRIERS = race::UNITS - race::LOADS };

bool random_turn() { return async_timing() == RANDOM && random_number() % 4 == 0; }
void tick();                                    // under `random`, something asynchronous may happen now

const char *line(place at) {                    // two at a time
    static std::string texts[2];
    static int turn;
    return (texts[turn ^= 1] = line_of(at)).c_str();
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------
// The 64 bits in shared memory hold a mark that says whether somebody overwrote them; the state is here.
struct waiter { int thread; long long phase; };
struct mbarrier {
    int                  number;
    uint32_t             address;
    unsigned char       *memory;
    int                  count, pending;        // arrivals of a phase, those that are still to come
    long long            bytes = 0;             // expected less landed
    long long            phase = 0;             // the running one
    int                  by;                    // who initialised it, where
    place                at;
    bool                 fenced = false, shared = false;    // by fence_mbarrier_init, then by __syncthreads
    std::vector<waiter>  waiters;               // threads inside mbarrier_wait
    std::vector<long long> told;                // by thread: the last phase whose end mbarrier_wait told it; -2: none
    int                  loads = 0;             // that have not landed
    place                load;                  // the newest
    bool                 unseen = false;        // nobody has waited for it

    uint64_t mark() const { return 0x5eed0ba441e40000u ^ address; }
    const char *name() const {
        static char text[64];
        snprintf(text, sizeof text, "the mbarrier at shared memory + %td", memory - shared_memory());
        return text;
    }
    const char *state() const {
        static char text[128];
        snprintf(text, sizeof text, "phase %lld, %d of %d arrivals and %lld bytes to come", phase, pending,
                 count, bytes);
        return text;
    }
};
std::deque<mbarrier> barriers;
int16_t              barrier_at[SHARED / 8];    // 1 + its number, at its place in shared memory
int                  threads;                   // of the block

void check_mark(const mbarrier &b) {
    uint64_t mark;
    memcpy(&mark, b.memory, 8);
    if (mark != b.mark()) fail("%s (%s) has been overwritten", b.name(), line(b.at));
}

mbarrier &barrier_of(uint32_t address, const char *what, place at) {
    const ptrdiff_t offset = shared_at(address, 8, 8) - shared_memory();
    const int i = barrier_at[offset / 8];
    if (!i) fail("%s (%s) of shared memory + %td, which mbarrier_init has not made a barrier", what, line(at), offset);
    mbarrier &b = barriers[static_cast<size_t>(i - 1)];
    check_mark(b);
    if (!b.shared && b.by != self->linear)
        fail("%s (%s): no __syncthreads since thread %d initialised %s (%s)", what, line(at), b.by, b.name(),
             line(b.at));
    return b;
}

[[maybe_unused]] race::instant landed_until(const mbarrier &b);     // the loads that began until then

void end_phase(mbarrier &b) {
    for (const waiter &w : b.waiters)
        if (w.phase != b.phase)
            fail("a phase misread: phase %lld of %s ends before thread %d, which waits for phase %lld, "
                 "has seen the end of that",
                 b.phase, b.name(), w.thread, w.phase);
    RACE(end_phase(b.number, landed_until(b)));
    b.phase++;
    b.pending = b.count;
    for (const waiter &w : b.waiters) wake(w.thread);
}
void settle(mbarrier &b) {
    if (b.bytes > MAX_BYTES || b.bytes < -MAX_BYTES) fail("%lld bytes under way at %s", b.bytes, b.name());
    if (b.pending) return;
    if (b.bytes < 0) fail("%lld bytes more than expected have landed in phase %lld of %s", -b.bytes,
                          b.phase, b.name());
    if (!b.bytes) end_phase(b);
}
void arrive(mbarrier &b, const char *what, place at) {
    if (!b.pending) fail("%s (%s): an arrival too many at %s, %s", what, line(at), b.name(), b.state());
    b.pending--;
    settle(b);
}
// The running thread is told of the end of a phase.
void tell(mbarrier &b) {
    RACE(told(b.number));
    if (!b.loads) b.unseen = false;
}
bool has_ended(const mbarrier &b, uint32_t parity, place at) {
    if (parity > 1) fail("a wait (%s) for parity %u", line(at), parity);
    return (b.phase & 1) != parity;
}

// ---- tensor maps ----------------------------------------------------------------------------------------------------
struct tensor {                                 // what the 128 bytes hold
    uint32_t magic, rank;
    uint64_t base;
    uint64_t size[5], stride[4];                // stride[i] in bytes, of dimension i + 1
    uint16_t box[5];
    uint16_t type;
    uint32_t check;
};
static_assert(sizeof(tensor) <= 128);
enum { MAGIC = 0x7e4504a9 };
uint32_t checksum(const tensor &t) {
    uint32_t sum = 1;
    for (size_t i = 0; i < offsetof(tensor, check); i++)
        sum = sum * 31 + reinterpret_cast<const unsigned char *>(&t)[i];
    return sum;
}
tensor tensor_of(const void *map, const char *what, int rank) {
    tensor t;
    if (reinterpret_cast<uintptr_t>(map) % 64) fail("%s: the tensor map's address is not a multiple of 64", what);
    memcpy(&t, map, sizeof t);
    if (t.magic != MAGIC || t.check != checksum(t))
        fail("%s: this is no tensor map that cuTensorMapEncodeTiled made", what);
    if (rank && static_cast<int>(t.rank) != rank)
        fail("%s: %d coordinates for a tensor map of rank %u", what, rank, t.rank);
    return t;
}

// f(shared, global, first, n) for the box's lines of 128 bytes: elements first .. first + n - 1 of the line at `shared`
// are at `global`, the others outside the tensor.
template <class F>
void for_lines(const tensor &t, uint32_t address, const int (&c)[5], F f) {
    int lines = 1, at[5] = {};
    for (uint32_t d = 1; d < t.rank; d++) lines *= t.box[d];
    const int64_t left = std::max<int64_t>(0, -static_cast<int64_t>(c[0]));
    const int64_t right = std::min<int64_t>(t.box[0], static_cast<int64_t>(t.size[0]) - c[0]);
    for (int l = 0; l < lines; l++) {
        bool inside = right > left;
        uint64_t global = t.base + static_cast<uint64_t>(c[0] + left) * 2;
        for (uint32_t d = 1; d < t.rank; d++) {
            const int64_t x = static_cast<int64_t>(c[d]) + at[d];
            inside = inside && x >= 0 && x < static_cast<int64_t>(t.size[d]);
            global += static_cast<uint64_t>(x) * t.stride[d - 1];
        }
        f(address + static_cast<uint32_t>(l) * 128, reinterpret_cast<unsigned char *>(global), static_cast<int>(left),
          inside ? static_cast<int>(right - left) : 0);
        for (uint32_t d = 1; d < t.rank && ++at[d] == t.box[d]; d++) at[d] = 0;
    }
}
int box_bytes(const tensor &t) {
    int bytes = 2;
    for (uint32_t d = 0; d < t.rank; d++) bytes *= t.box[d];
    return bytes;
}
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// ---- TMA loads ------------------------------------------------------------------------------------------------------
struct load { tensor t; uint32_t to; mbarrier *b; int c[5]; race::instant time; };
std::deque<load> loads;                         // that have not landed

race::instant landed_until(const mbarrier &b) {
    for (const load &l : loads) if (l.b == &b) return l.time - 1;
    return race::time();
}

void land_load(size_t i) {
    const load l = loads[i];
    loads.erase(loads.begin() + static_cast<ptrdiff_t>(i));
    for_lines(l.t, l.to, l.c, [&](uint32_t to, const unsigned char *from, int first, int n) {
        alignas(16) unsigned char line[128] = {};
        if (n) memcpy(line + 2 * first, from, static_cast<size_t>(2 * n));
        for (uint32_t chunk = 0; chunk < 128; chunk += 16)
            memcpy(shared_at(swizzled(to + chunk), 16, 16), line + chunk, 16);
    });
    l.b->loads--;
    l.b->bytes -= box_bytes(l.t);
    settle(*l.b);
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------
// All 128 threads of a warpgroup go through the same events in the same order: the last to come makes one happen. Only
// a wait, and setmaxnreg, keep the others until then.
enum kind { FENCE, MMA, COMMIT, WAIT, REGISTER };
const char *const KINDS[] = {"wgmma_fence", "wgmma", "wgmma_commit", "wgmma_wait", "setmaxnreg"};
struct sums {                                   // accumulators in flight, or that are about to be
    float   *d[GROUP] = {};
    int      columns, last_group = 0;
    std::vector<float> s;                       // [64][columns]
};
struct event {
    kind        what;
    place       at;
    const char *type;
    int         columns, number;                // number: groups that may be pending, or registers
    bool        a_along_k, b_along_k, add;      // add: setmaxnreg.inc
    uint64_t    a, b;
    sums       *d = nullptr;
    bool        first = false;                  // that uses these accumulators since they were at rest
    int         came = 0;
};
struct product { event e; int group; };
struct warpgroup {
    std::deque<event> events;                   // not all have come to
    uint64_t          gone = 0, next[GROUP] = {};       // events before them; of each thread
    std::vector<std::unique_ptr<sums>> in_flight;
    std::deque<product> products;               // not done
    std::deque<std::pair<int, race::instant>> times;    // of products not waited for: their group, and when they began
    int  groups = 0;                            // committed
    bool fenced = false;                        // since the last commit
    int  registers = 0;                         // of each thread
    int  wants = 0;                             // setmaxnreg.inc waits for so many
} warpgroups[THREADS / GROUP];

// Of the fields of an operand that count 16 bytes: the address at bit 0, leading at 16, stride at 32.
int field(uint64_t operand, int bit) { return static_cast<int>(operand >> bit & 0x3fff) << 4; }
// f(i, k, p): 8 elements at p, along k (i, k .. k + 7) or along i (i .. i + 7, k), of the n rows or columns i.
template <class F>
void for_pieces(uint64_t operand, bool along_k, int n, F f) {
    const auto piece = [&](int i, int k, int offset) {
        f(i, k, shared_at(swizzled(static_cast<uint32_t>(field(operand, 0) + offset)), 16, 16));
    };
    if (along_k)
        for (int i = 0; i < n; i++)
            for (int k = 0; k < 16; k += 8) piece(i, k, i * 128 + k * 2);
    else
        for (int k = 0; k < 16; k++)
            for (int i = 0; i < n; i += 8) piece(i, k, i / 64 * field(operand, 16) + k * 128 + i % 64 * 2);
}
void check_operand(uint64_t operand, bool along_k, int n, const char *which, place at) {
    const int beyond = field(operand, 0) % 1024;
    const char *wrong = nullptr;
    if ((operand & 0xffffc000c000c000u) != 1ull << 62) wrong = "is not of 128-byte swizzle with base 0";
    else if (field(operand, 32) != 1024) wrong = "has another stride than 1024";
    else if (along_k ? beyond % 32 || beyond > 96 : beyond) wrong = "is no whole step of 16 from a multiple of 1024";
    else if (!along_k && n > 64 && field(operand, 16) != 8192) wrong = "has another leading dimension than 8192";
    if (wrong) fail("wgmma (%s): operand %s %s (%016lx)", line(at), which, wrong, operand);
    for_pieces(operand, along_k, n, [](int, int, const unsigned char *) {});    // all within shared memory
}

float number(uint16_t h, bool half) {
    if (half) return static_cast<float>(__builtin_bit_cast(_Float16, h));
    return __builtin_bit_cast(float, static_cast<uint32_t>(h) << 16);
}
template <bool half, int columns>
void multiply(const event &e) {
    static float A[64][16], B[16][columns];
    for_pieces(e.a, e.a_along_k, 64, [&](int i, int k, const unsigned char *p) {
        uint16_t h[8];
        memcpy(h, p, 16);
        for (int v = 0; v < 8; v++) A[e.a_along_k ? i : i + v][e.a_along_k ? k + v : k] = number(h[v], half);
    });
    for_pieces(e.b, e.b_along_k, columns, [&](int j, int k, const unsigned char *p) {
        uint16_t h[8];
        memcpy(h, p, 16);
        for (int v = 0; v < 8; v++) B[e.b_along_k ? k + v : k][e.b_along_k ? j : j + v] = number(h[v], half);
    });
    if (!e.add) std::fill(e.d->s.begin(), e.d->s.end(), 0.0f);
    for (int i = 0; i < 64; i++) {
        float *__restrict s = &e.d->s[static_cast<size_t>(i * columns)];
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < columns; j++) s[j] += A[i][k] * B[k][j];
    }
}
template <bool half>
void multiply(const event &e) {
    switch (e.columns) {
    case 64:  return multiply<half, 64>(e);
    case 128: return multiply<half, 128>(e);
    case 192: return multiply<half, 192>(e);
    default:  return multiply<half, 256>(e);
    }
}
void run_product(warpgroup &g) {
    const product p = g.products.front();
    g.products.pop_front();
    if (p.e.type[0] == 'f') multiply<true>(p.e);
    else multiply<false>(p.e);
}

// The place of d[i] of thread t in [64][columns].
size_t place_of(int t, int i, int columns) {
    const int l = t % 32, row = 16 * (t / 32) + l / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (l % 4) + i % 2;
    return static_cast<size_t>(row * columns + column);
}
void come_to_rest(const sums &d, int group) {
    for (int t = 0; t < GROUP; t++)
        for (int i = 0; i < d.columns / 2; i++) {
            uint32_t poison;
            memcpy(&poison, &d.d[t][i], 4);
            if (poison != ~0u)
                fail("d[%d] of thread %d was written while a wgmma on it was under way", i, group * GROUP + t);
            d.d[t][i] = d.s[place_of(t, i, d.columns)];
        }
}

void make_registers_fit(int group);

void happen(const event &e, int group) {
    warpgroup &g = warpgroups[group];
    switch (e.what) {
    case FENCE: g.fenced = true; break;
    case MMA:
        check_operand(e.a, e.a_along_k, 64, "a", e.at);
        check_operand(e.b, e.b_along_k, e.columns, "b", e.at);
        if (e.first && !g.fenced) fail("wgmma (%s) uses d without a wgmma_fence before it", line(e.at));
        e.d->last_group = g.groups;
        for (const bool is_a : {true, false})
            for_pieces(is_a ? e.a : e.b, is_a ? e.a_along_k : e.b_along_k, is_a ? 64 : e.columns,
                       [&](int, int, [[maybe_unused]] const void *p) {
                RACE(unit_reads(p, 16, race::WGMMA + group, LINE(e.at)));
            });
        g.products.push_back({e, g.groups});
        g.times.push_back({g.groups, race::time()});
        if (async_timing() == EARLY) run_product(g);
        break;
    case COMMIT: g.groups++, g.fenced = false; break;
    case WAIT: {
        const int done = g.groups - e.number;
        while (!g.products.empty() && g.products.front().group < done) run_product(g);
        for (; !g.times.empty() && g.times.front().first < done; g.times.pop_front())
            for (int t = 0; t < GROUP; t++)
                RACE(unit_done(race::WGMMA + group, g.times.front().second, group * GROUP + t));
        auto &list = g.in_flight;
        for (size_t i = 0; i < list.size();) {
            if (list[i]->last_group >= done) { i++; continue; }
            come_to_rest(*list[i], group);
            list.erase(list.begin() + static_cast<ptrdiff_t>(i));
        }
        break;
    }
    case REGISTER:
        if (e.add ? e.number < g.registers : e.number > g.registers)
            fail("setmaxnreg (%s): %d registers are not %s than %d", line(e.at), e.number, e.add ? "more" : "fewer",
                 g.registers);
        g.wants = e.number;
        break;
    }
}

// The running thread comes to its next event, of which `mine` is its view. Returns it.
event &come(const event &mine) {
    const int group = self->linear / GROUP, t = self->linear % GROUP;
    if (threads < (group + 1) * GROUP)
        fail("%s (%s) by a warpgroup of %d threads", KINDS[mine.what], line(mine.at), threads - group * GROUP);
    warpgroup &g = warpgroups[group];
    const uint64_t i = g.next[t]++ - g.gone;
    if (i == g.events.size()) g.events.push_back(mine);
    event &e = g.events[i];
    const auto same = [](const event &x) { return std::tuple(x.what, x.at.line(), x.columns, x.number, x.a, x.b, x.add);
                                          };
    if (same(e) != same(mine))
        fail("threads of a warpgroup differ: thread %d is at %s (%s, a %016lx, b %016lx, add %d), another at %s (%s, "
             "a %016lx, b %016lx, add %d)", self->linear, KINDS[mine.what], line(mine.at), mine.a, mine.b, mine.add,
             KINDS[e.what], line(e.at), e.a, e.b, e.add);
    e.came++;
    return e;
}
bool happens(event &e) {                        // if the running thread is the last; then it is no more
    const int group = self->linear / GROUP;
    if (e.came < GROUP) return false;
    const event now = e;
    warpgroups[group].events.pop_front();
    warpgroups[group].gone++;
    happen(now, group);
    return true;
}
void come_and_go(kind what, place at) {
    tick();
    happens(come({what, at, "", 0, 0, false, false, false, 0, 0}));
}
void wake_group(int group, int but) {
    for (int t = group * GROUP; t < (group + 1) * GROUP; t++)
        if (t != but) wake(t);
}
// Warpgroups that want more registers get them as soon as there are enough.
void make_registers_fit(int group) {
    const auto grant = [](warpgroup &g) { g.registers = g.wants, g.wants = 0; };
    if (warpgroups[group].wants <= warpgroups[group].registers) grant(warpgroups[group]);
    for (int o = 0; o < threads / GROUP; o++) {
        warpgroup &g = warpgroups[o];
        if (!g.wants) continue;
        int sum = 0;
        for (int w = 0; w < threads / GROUP; w++) sum += GROUP * (w == o ? g.wants : warpgroups[w].registers);
        if (sum > REGISTERS) continue;
        grant(g);
        wake_group(o, self->linear);
    }
}

// ---- named barriers -------------------------------------------------------------------------------------------------
struct named { int threads = 0; std::vector<int> here; } named_barriers[16];

// ---- what happens when ----------------------------------------------------------------------------------------------
void tick() {
    if (!random_turn()) return;
    const size_t i = random_number();
    switch (random_number() % 4) {              // or neither: what is slow shows more
    case 0: if (!loads.empty()) land_load(i % loads.size()); break;
    case 3: if (warpgroup &g = warpgroups[i % 8]; !g.products.empty()) run_product(g);
    }
}
// The first of the list that `is_wanted` names, or a random one, happens.
template <class List, class F, class G>
bool step(const List &list, F is_wanted, G happen) {
    const size_t first = async_timing() == RANDOM && !list.empty() ? random_number() % list.size() : 0;
    for (size_t i = 0; i < list.size(); i++) {
        const size_t at = (i + first) % list.size();
        if (is_wanted(list[at])) return happen(at), true;
    }
    return false;
}
}  // namespace

bool async_step(bool anything) {
    const auto wanted = [=](const auto &x) { return anything || !x.b->waiters.empty(); };
    return step(loads, wanted, land_load);
}
void block_begins(int n) {
    threads = n;
    if (!barriers.empty()) memset(barrier_at, 0, sizeof barrier_at);
    barriers.clear(), loads.clear();
    for (warpgroup &g : warpgroups) g = {}, g.registers = std::min(REGISTERS / n / 8 * 8, 248);
    for (named &b : named_barriers) b = {};
}
void block_meets() {
    for (mbarrier &b : barriers) {
        if (b.shared) continue;
        if (!b.fenced)
            fail("a __syncthreads, but no fence_mbarrier_init by thread %d after its init of %s (%s)", b.by, b.name(),
                            line(b.at));
        b.shared = true;
    }
}
void block_ends() {
    for (const mbarrier &b : barriers) {
        check_mark(b);
        if (b.unseen) fail("the block has ended, but nobody waited for the TMA load of %s", line(b.load));
    }
}
void thread_ends() {
    const int me = self->linear;
    for (const auto &d : warpgroups[me / GROUP].in_flight)
        if (d->d[me % GROUP]) fail("a thread ends without wgmma_wait for what is in flight");
}
bool in_flight(const void *p, size_t bytes) {
    const int me = self->linear;
    const void *end = static_cast<const char *>(p) + bytes;
    for (const auto &d : warpgroups[me / GROUP].in_flight)
        if (const float *mine = d->d[me % GROUP]; mine && p < mine + d->columns / 2 && mine < end) return true;
    return false;
}
std::string waits_for(int thread) {
    for (const mbarrier &b : barriers)
        for (const waiter &w : b.waiters)
            if (w.thread == thread)
                return " for phase " + std::to_string(w.phase) + " of " + b.name() + " (" + b.state() + ")";
    for (int i = 1; i < 16; i++) {
        const named &b = named_barriers[i];
        if (std::find(b.here.begin(), b.here.end(), thread) != b.here.end())
            return " for " + std::to_string(b.threads) + " threads at barrier " + std::to_string(i) + ", of which " +
                   std::to_string(b.here.size()) + " have come";
    }
    if (const warpgroup &g = warpgroups[thread / GROUP]; g.wants)
        return " for " + std::to_string(g.wants) + " registers a thread, where it has " + std::to_string(g.registers);
    return " for its warpgroup";
}

// ---- the twins that are not inline ----------------------------------------------------------------------------------
void tma_load(uint32_t to, const void *map, uint32_t barrier, int rank, const int *coordinates, place at) {
    tick();
    load l = {tensor_of(map, "tma_load", rank), to, &barrier_of(barrier, "tma_load", at), {}, 0};
    std::copy(coordinates, coordinates + rank, l.c);
    const size_t bytes = static_cast<size_t>(box_bytes(l.t));
    unsigned char *target = shared_at(to, static_cast<int>(bytes), 128);
    RACE(unit_writes(target, bytes, race::LOADS + l.b->number, LINE(at)));
    l.time = race::time();
    for_lines(l.t, to, l.c,
              [&]([[maybe_unused]] uint32_t, [[maybe_unused]] const void *from, int, [[maybe_unused]] int n) {
        RACE(access(race::READ, from, static_cast<size_t>(2 * n), LINE(at)));
    });
    memset(target, 0xff, bytes);
    l.b->loads++, l.b->load = at, l.b->unseen = true;
    loads.push_back(l);
    if (async_timing() == EARLY) land_load(loads.size() - 1);
}
void set_registers(bool more, int registers, place at) {
    if (registers % 8 || registers < 24 || registers > 256) fail("setmaxnreg (%s) to %d", line(at), registers);
    const int me = self->linear, group = me / GROUP;
    if (!happens(come({REGISTER, at, "", 0, registers, false, false, more, 0, 0}))) return wait("setmaxnreg", at);
    make_registers_fit(group);
    if (warpgroups[group].wants) return wait("setmaxnreg", at);
    wake_group(group, me);
}
void wgmma(const char *type, int columns, bool a_along_k, bool b_along_k, float *d, uint64_t a, uint64_t b, bool add,
           place at) {
    tick();
    event &e = come({MMA, at, type, columns, 0, a_along_k, b_along_k, add, a, b});
    const int t = self->linear % GROUP;
    auto &list = warpgroups[self->linear / GROUP].in_flight;
    if (!e.d) {
        for (const auto &open : list) if (open->d[t] == d) e.d = open.get();
        if (!e.d) {
            list.push_back(std::make_unique<sums>());
            e.d = list.back().get(), e.first = true;
            e.d->columns = columns;
            e.d->s.resize(static_cast<size_t>(64 * columns));
        }
    }
    if (e.first) {
        e.d->d[t] = d;
        for (int i = 0; i < columns / 2; i++) {
            if (add) e.d->s[place_of(t, i, columns)] = d[i];
            memset(&d[i], 0xff, 4);
        }
    }
    if (e.d->d[t] != d || e.d->columns != columns)
        fail("wgmma (%s) on other accumulators than those in flight", line(at));
    happens(e);
}
void wgmma_wait(int pending, place at) {
    tick();
    const int me = self->linear;
    if (happens(come({WAIT, at, "", 0, pending, false, false, false, 0, 0}))) wake_group(me / GROUP, me);
    else wait("wgmma_wait", at);
}
void wgmma_pin(const float *, int, place) {}

void sync_threads(int barrier, int n, place at) {
    tick();
    const int me = self->linear;
    if (barrier < 1 || barrier > 15) fail("sync_threads (%s) at barrier %d: 1 to 15", line(at), barrier);
    if (n < 32 || n % 32 || n > threads)
        fail("sync_threads (%s) of %d threads, the block has %d", line(at), n, threads);
    named &b = named_barriers[barrier];
    if (!b.here.empty() && b.threads != n)
        fail("sync_threads (%s) of %d threads at barrier %d, where thread %d waits for %d", line(at), n, barrier,
             b.here[0], b.threads);
    b.threads = n;
    b.here.push_back(me);
    if (static_cast<int>(b.here.size()) < n) return wait("sync_threads", at);
    uint32_t lanes[THREADS / 32] = {};
    for (int t : b.here) lanes[t / 32] |= 1u << t % 32;
    for (int w = 0; w < THREADS / 32; w++)
        if (lanes[w] && ~lanes[w])
            fail("sync_threads (%s): of warp %d only lanes %08x came to barrier %d", line(at), w, lanes[w], barrier);
    RACE(meet(b.here.data(), n));
    for (int t : b.here) if (t != me) wake(t);
    b.here.clear();
}
}  // namespace simt

using simt::fail, simt::line, simt::place;

void mbarrier_init(uint32_t barrier, int arrivals, place at) {
    if (arrivals < 1 || arrivals > simt::MAX_BYTES) fail("mbarrier_init (%s) of %d arrivals", line(at), arrivals);
    unsigned char *memory = simt::shared_at(barrier, 8, 8);
    int16_t &number = simt::barrier_at[(memory - shared_memory()) / 8];
    if (number)
        fail("mbarrier_init (%s) of %s again", line(at), simt::barriers[static_cast<size_t>(number - 1)].name());
    if (simt::barriers.size() == simt::BARRIERS)
        fail("mbarrier_init (%s): the harness has %d barriers", line(at), simt::BARRIERS);
    simt::mbarrier b;
    b.number = static_cast<int>(simt::barriers.size());
    b.address = barrier, b.memory = memory, b.count = b.pending = arrivals, b.by = simt::self->linear, b.at = at;
    b.told.assign(static_cast<size_t>(simt::threads), -2);
    const uint64_t mark = b.mark();
    memcpy(memory, &mark, 8);
    simt::barriers.push_back(b);
    number = static_cast<int16_t>(simt::barriers.size());
}
void fence_mbarrier_init() {
    for (simt::mbarrier &b : simt::barriers) if (b.by == simt::self->linear) b.fenced = true;
}
void mbarrier_arrive(uint32_t barrier, place at) {
    simt::tick();
    simt::mbarrier &b = simt::barrier_of(barrier, "mbarrier_arrive", at);
    RACE(arrive(b.number, simt::self->linear));
    arrive(b, "mbarrier_arrive", at);
}
void mbarrier_arrive_expect(uint32_t barrier, int bytes, place at) {
    simt::tick();
    if (bytes < 0) fail("mbarrier_arrive_expect (%s) of %d bytes", line(at), bytes);
    simt::mbarrier &b = simt::barrier_of(barrier, "mbarrier_arrive_expect", at);
    b.bytes += bytes;
    RACE(arrive(b.number, simt::self->linear));
    arrive(b, "mbarrier_arrive_expect", at);
}
bool mbarrier_try_wait(uint32_t barrier, uint32_t parity, place at) {
    simt::tick();
    simt::mbarrier &b = simt::barrier_of(barrier, "mbarrier_try_wait", at);
    if (!has_ended(b, parity, at)) simt::yield(at);
    if (!has_ended(b, parity, at)) return false;
    tell(b);
    return true;
}
void mbarrier_wait(uint32_t barrier, uint32_t parity, place at) {
    simt::tick();
    simt::mbarrier &b = simt::barrier_of(barrier, "mbarrier_wait", at);
    const int me = simt::self->linear;
    long long &told = b.told[static_cast<size_t>(me)];
    if (has_ended(b, parity, at)) {
        if (told == b.phase - 1)
            fail("a phase misread: mbarrier_wait (%s) for parity %u of %s is told again of the end of phase %lld, not "
                 "of phase %lld", line(at),
                 parity, b.name(), told, told + 2);
        told = b.phase - 1;
    } else {
        told = b.phase;
        b.waiters.push_back({me, b.phase});
        simt::wait("mbarrier_wait", at);
        b.waiters.erase(std::find_if(b.waiters.begin(), b.waiters.end(),
                                     [=](const auto &w) { return w.thread == me; }));
    }
    tell(b);
}

void fence_async() {
    simt::tick();
    RACE(fence_async());
}

void wgmma_fence(place at) { simt::come_and_go(simt::FENCE, at); }
void wgmma_commit(place at) { simt::come_and_go(simt::COMMIT, at); }

// ---- 16-bit tiles out of registers ----------------------------------------------------------------------------------
namespace {
struct stmatrix_args { uint32_t row, r[4]; };
void stmatrix_meet(void **args, uint32_t) {
    for (int m = 0; m < 4; m++)
        for (int l = 0; l < 32; l++)
            memcpy(simt::shared_at(static_cast<stmatrix_args *>(args[8 * m + l / 4])->row, 16, 16) + l % 4 * 4,
                   &static_cast<stmatrix_args *>(args[l])->r[m], 4);
}
}  // namespace
void stmatrix_x4(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3, place at) {
    stmatrix_args a = {row, {r0, r1, r2, r3}};
    RACE(access(race::WRITE, simt::shared_at(row, 16, 16), 16, __builtin_return_address(0)));
    simt::warp_meet("stmatrix", 0xffffffffu, &a, stmatrix_meet, at);
}
uint32_t pack2(bf16, float low, float high) { return static_cast<uint32_t>(bits_bf16(high)) << 16 | bits_bf16(low); }
uint32_t pack2(f16, float low, float high) { return static_cast<uint32_t>(bits_f16(high)) << 16 | bits_f16(low); }

// ---- the driver -----------------------------------------------------------------------------------------------------
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
                                const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box,
                                const cuuint32_t *element_stride, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
    const auto multiple = [](const void *p, uintptr_t of) { return p && reinterpret_cast<uintptr_t>(p) % of == 0; };
    bool right = multiple(map, 64) && multiple(base, 16) && rank >= 1 && rank <= 5 &&
                 (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16) &&
                 interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
                 promotion <= CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
    for (cuuint32_t d = 0; right && d < rank; d++)
        right = size[d] >= 1 && size[d] <= 1ull << 32 && box[d] >= 1 && box[d] <= 256 && element_stride[d] == 1 &&
                (!d || (stride[d - 1] % 16 == 0 && stride[d - 1] < 1ull << 40));
    if (!right) return CUDA_ERROR_INVALID_VALUE;
    if (box[0] * 2 > 128) return CUDA_ERROR_INVALID_VALUE;
    if (swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * 2 != 128) return CUDA_ERROR_NOT_SUPPORTED;        // here
    simt::tensor t = {};
    t.magic = simt::MAGIC, t.rank = rank, t.type = static_cast<uint16_t>(type);
    t.base = reinterpret_cast<uint64_t>(base);
    for (cuuint32_t d = 0; d < rank; d++) {
        t.size[d] = size[d], t.box[d] = static_cast<uint16_t>(box[d]);
        if (d) t.stride[d - 1] = stride[d - 1];
    }
    t.check = checksum(t);
    memset(map, 0, sizeof *map);
    memcpy(map, &t, sizeof t);
    return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *found) {
    const bool known = !strcmp(name, "cuTensorMapEncodeTiled");
    *function = known ? reinterpret_cast<void *>(&cuTensorMapEncodeTiled) : nullptr;
    if (found) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
