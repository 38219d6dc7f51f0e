// simt.cpp: fibers, the schedules, collectives, and how a launch fails. The instructions are in twins.cpp.
//
// A fiber runs until a collective makes it wait; it then hands over to the next ready fiber by itself, and to the
// scheduler (run_block, on the caller's stack) only when none is ready: the block has ended, all that is left spins,
// or nothing can move any more. Blocks run one after the other: kernels never wait for another block.
#include "../../cuda/ptx.cuh"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <string>

#include "internal.h"

dim3 blockIdx, blockDim, gridDim;

namespace simt {
thread *self;

namespace {
enum { STACK = 256 * 1024, MAX_THREADS = 1024, MAX_SHARED = 227 * 1024, WARPS = MAX_THREADS / 32 };
// Nanoseconds without progress while threads spin.
const uint64_t SPIN_LIMIT = 1'000'000'000 * strtoull(getenv("SIMT_PATIENCE") ? getenv("SIMT_PATIENCE") : "20", nullptr, 0);

// ---- schedules ------------------------------------------------------------------------------------------------------
enum schedule { IN_ORDER, REVERSE, SHUFFLED, WARP_PRIORITY };
const char *const SCHEDULES[] = {"inorder", "reverse", "shuffled", "warps"}, *const TIMINGS[] = {"early", "late", "random"};
struct settings {
    int      schedule = IN_ORDER, async = EARLY;
    uint64_t seed = 0;
} chosen;
uint64_t random_state;

template <size_t n>
bool choose(int *into, const char *name, const char *const (&names)[n]) {
    for (size_t i = 0; name && i < n; i++)
        if (!strcmp(name, names[i])) return *into = static_cast<int>(i), true;
    return !name;
}
const bool from_environment = [] {
    const char *seed = getenv("SIMT_SEED");
    if (simt_configure(getenv("SIMT_SCHEDULE"), getenv("SIMT_ASYNC"), seed ? strtoull(seed, nullptr, 0) : 0)) {
        fprintf(stderr, "simt: SIMT_SCHEDULE is inorder, reverse, shuffled or warps; SIMT_ASYNC early, late or random\n");
        abort();
    }
    return true;
}();

// The i-th of n blocks, in the order of the schedule: a permutation i -> (i * step + first) mod n.
uint64_t block_at(uint64_t i, uint64_t n) {
    if (chosen.schedule == IN_ORDER) return i;
    if (chosen.schedule == REVERSE) return n - 1 - i;
    uint64_t step = n / 2 + chosen.seed % 97 + 1;
    while (std::gcd(step, n) != 1) step++;
    return (i * step + chosen.seed) % n;
}

// ---- fibers ---------------------------------------------------------------------------------------------------------
enum state { READY, AT_BARRIER, IN_WARP, WAITING, SPINNING, ENDED };
struct fiber : thread {
    void       *stack_pointer;
    state       is;
    place       at;                     // where it waits, at what, with whom
    const char *what;
    uint32_t    mask;
    void       *args;
};
// A set of threads by their turn in the schedule's order.
struct turns {
    uint64_t word[MAX_THREADS / 64];
    void add(int turn) { word[turn / 64] |= 1ull << turn % 64; }
    void remove(int turn) { word[turn / 64] &= ~(1ull << turn % 64); }
    int  next(int from, int end) const {            // the first at or after `from`, or -1
        for (int w = from / 64; w * 64 < end; w++) {
            const uint64_t bits = word[w] & (w == from / 64 ? ~0ull << from % 64 : ~0ull);
            if (bits) return w * 64 + __builtin_ctzll(bits);
        }
        return -1;
    }
};

struct block_state {
    int            n, arrived, spinning, left;      // threads; at the barrier; spinning; not ended
    uint64_t       progress;                        // meetings so far
    int            cursor;                          // the turn after the one that ran last
    turns          ready;
    int16_t        turn_of[MAX_THREADS], fiber_at[MAX_THREADS];
    uint32_t       in_warp[WARPS], ended[WARPS];    // lanes that wait for their warp, that ended
    fiber          fibers[MAX_THREADS];
    unsigned char *shared;
    size_t         shared_bytes;
    uint32_t       shared_base;                     // the address that PTX sees
    const void    *kernel;
    void (*body)(void *);
    void *arg;
} block;
void *scheduler_stack;
unsigned char *stacks;
std::mutex one_launch;

struct failure {};                                  // thrown on the scheduler's stack
bool failed;
char reason[4096];                                  // what failed, then with the names of kernel and thread

fiber *running() { return static_cast<fiber *>(self); }

extern "C" void simt_switch(void **save, void *to);
asm(R"(
.text
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

void make_ready(fiber &f) {
    f.is = READY;
    block.ready.add(block.turn_of[f.linear]);
}

// The schedule's choice among the ready fibers, or NULL.
fiber *next_ready() {
    const int from = chosen.schedule == SHUFFLED ? static_cast<int>(random_number() % static_cast<unsigned>(block.n))
                     : chosen.schedule == WARP_PRIORITY ? 0 : block.cursor;
    int turn = block.ready.next(from, block.n);
    if (turn < 0 && from > 0) turn = block.ready.next(0, from);
    if (turn < 0) return nullptr;
    block.ready.remove(turn);
    block.cursor = turn + 1 < block.n ? turn + 1 : 0;
    return &block.fibers[block.fiber_at[turn]];
}

// The running fiber, which is no longer ready, gives way.
void leave() {
    fiber *me = running(), *next = failed ? nullptr : next_ready();
    if (next == me) return;
    self = next ? next : me;
    simt_switch(&me->stack_pointer, next ? next->stack_pointer : scheduler_stack);
}

void fiber_main() {
    block.body(block.arg);
    thread_ends();
    fiber *me = running();
    me->is = ENDED;
    block.ended[me->linear / 32] |= 1u << (me->linear & 31);
    block.left--;
    block.progress++;
    leave();
    abort();
}

// ---- reports --------------------------------------------------------------------------------------------------------
const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// What addr2line says of an address in this library: the function's name (without arguments) and file:line.
void ask_addr2line(const void *pc, char *name, char *line, size_t room) {
    snprintf(name, room, "?");
    snprintf(line, room, "?");
    Dl_info info;
    if (!dladdr(pc, &info)) return;
    char command[1024];
    snprintf(command, sizeof command, "LD_PRELOAD= addr2line -Cfe '%s' %#zx", info.dli_fname,
             static_cast<size_t>(static_cast<const char *>(pc) - static_cast<const char *>(info.dli_fbase)));
    FILE *pipe = popen(command, "r");
    char text[2048];
    if (pipe && fgets(text, sizeof text, pipe)) {
        text[strcspn(text, "\n")] = 0;
        char *from = text;
        for (const char *prefix : {"void ", "(anonymous namespace)::"})
            if (!strncmp(from, prefix, strlen(prefix))) from += strlen(prefix);
        int angles = 0;
        for (char *p = from; *p; p++) {             // f<(enum)0, T>(int) -> f<(enum)0, T>
            angles += (*p == '<') - (*p == '>');
            if (*p == '(' && !angles) { *p = 0; break; }
        }
        snprintf(name, room, "%.200s", from);
        if (fgets(text, sizeof text, pipe)) {
            text[strcspn(text, " \n")] = 0;
            snprintf(line, room, "%.100s", base_name(text));
        }
    }
    if (pipe) pclose(pipe);
}

// "3 threads wait at __syncthreads (gemm.cu:120): 0-2": a line for every state and place.
std::string who_waits_where() {
    static const char *const names[] = {"are ready", "wait at", "wait at", "wait at", "spin at", "ended"};
    std::string text;
    bool told[MAX_THREADS] = {};
    for (int i = 0; i < block.n; i++) {
        if (told[i]) continue;
        const fiber &f = block.fibers[i];
        const bool placed = f.is != READY && f.is != ENDED;
        const std::string why = f.is == WAITING ? waits_for(i) : "";
        int n = 0, since = -1;
        char list[512] = "";
        for (int j = i; j <= block.n; j++) {
            const fiber &g = block.fibers[std::min(j, block.n - 1)];
            const bool like = j < block.n && g.is == f.is &&
                              (!placed || (g.what == f.what && g.at.line() == f.at.line() && g.mask == f.mask)) &&
                              (f.is != WAITING || waits_for(j) == why);
            if (like && since < 0) since = j;
            if (like) told[j] = true, n++;
            if (like || since < 0) continue;
            const size_t length = strlen(list);
            snprintf(list + length, sizeof list - length, j - 1 > since ? " %d-%d" : " %d", since, j - 1);
            since = -1;
        }
        char line[256];
        snprintf(line, sizeof line, "; %d %s", n, names[f.is]);
        text += line;
        if (placed) {
            snprintf(line, sizeof line, " %s (%s:%u", f.what, base_name(f.at.file_name()), f.at.line());
            text += line;
            if (f.is == IN_WARP) snprintf(line, sizeof line, ", mask %08x", f.mask), text += line;
            text += ")" + why;
        }
        text += ":";
        text += list;
    }
    return text;
}

// The whole story, once the fibers have stopped.
void tell() {
    char name[256], line[256], story[sizeof reason];
    ask_addr2line(block.kernel, name, line, sizeof name);
    int n = snprintf(story, sizeof story, "%.3000s [%s (%s), block %u,%u,%u", reason, name, line, blockIdx.x, blockIdx.y,
                     blockIdx.z);
    if (self) n += snprintf(story + n, sizeof story - static_cast<size_t>(n), ", thread %d", self->linear);
    snprintf(story + n, sizeof story - static_cast<size_t>(n), " of %d, %s %s seed %llu]", block.n, SCHEDULES[chosen.schedule],
             TIMINGS[chosen.async], static_cast<unsigned long long>(chosen.seed));
    memcpy(reason, story, sizeof reason);
    fprintf(stderr, "simt: %s\n", reason);
}

// ---- a block --------------------------------------------------------------------------------------------------------
void start_block() {
    block.left = block.n;
    block.arrived = block.spinning = block.cursor = 0;
    memset(&block.ready, 0, sizeof block.ready);
    memset(block.in_warp, 0, sizeof block.in_warp);
    memset(block.ended, 0, sizeof block.ended);
    for (int i = 0; i < block.n; i++) {
        fiber &f = block.fibers[i];
        make_ready(f);
        // Stacks start at different lines of the cache, and look as a call would leave them.
        unsigned char *stack = stacks + static_cast<size_t>(i + 1) * STACK - 64 - i % 61 * 320;
        void **top = reinterpret_cast<void **>(stack);
        *--top = nullptr;
        *--top = reinterpret_cast<void *>(fiber_main);
        for (int r = 0; r < 6; r++) *--top = nullptr;
        f.stack_pointer = top;
    }
}

void run_block() {
    start_block();
    uint64_t progress = 0, since = 0;
    while (block.left) {
        if (fiber *next = next_ready()) {
            self = next;
            simt_switch(&scheduler_stack, next->stack_pointer);
            if (failed) throw failure();
        } else if (self = nullptr, async_step(false)) {
            block.progress++;
        } else if (block.spinning) {                // memory that another process writes may still change
            if (!since || progress != block.progress) progress = block.progress, since = nanoseconds();
            else if (nanoseconds() - since > SPIN_LIMIT) fail("a wait without end%s", who_waits_where().c_str());
            sched_yield();
            if (async_step(true)) block.progress++;
            block.spinning = 0;
            for (int i = 0; i < block.n; i++)
                if (block.fibers[i].is == SPINNING) make_ready(block.fibers[i]);
        } else {
            fail("deadlock%s", who_waits_where().c_str());
        }
    }
    self = nullptr;
}

// Fresh shared memory: NaN everywhere, at an address that is a multiple of 1024 and else unknown.
#ifdef __SANITIZE_ADDRESS__
unsigned char *shared_piece(size_t bytes) {         // exactly as large as asked
    static void *piece;
    free(piece);
    if (posix_memalign(&piece, 1024, bytes)) abort();
    return static_cast<unsigned char *>(piece);
}
#else
enum { ROOM = 512 * 1024 };
alignas(1024) unsigned char room[ROOM];
unsigned char *shared_piece(size_t) { return room + 64 * 1024 + random_number() % 64 * 1024; }
#endif

void run_grid(dim3 grid, dim3 dim, size_t shared) {
    if (block.n < 1 || block.n > MAX_THREADS) fail("a block of %d threads", block.n);
    if (shared > MAX_SHARED) fail("%zu bytes of shared memory, a block has %d", shared, MAX_SHARED);
    if (!stacks) {
        const size_t bytes = static_cast<size_t>(STACK) * MAX_THREADS;
        void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) fail("no memory for the stacks of the threads");
        stacks = static_cast<unsigned char *>(p);
    }
    block.shared = shared_piece(shared);
    block.shared_bytes = shared;
    block.shared_base = 1024 + random_number() % 16 * 1024;
    const int warps = block.n / 32, first = chosen.schedule == WARP_PRIORITY && warps ? static_cast<int>(chosen.seed % warps) : 0;
    for (int turn = 0; turn < block.n; turn++) {    // reverse, or by warps from the first on
        const int i = chosen.schedule == REVERSE ? block.n - 1 - turn : (turn + 32 * first) % block.n;
        block.fiber_at[turn] = static_cast<int16_t>(i);
        block.turn_of[i] = static_cast<int16_t>(turn);
        fiber &f = block.fibers[i];
        const unsigned u = static_cast<unsigned>(i);
        f.index = {u % dim.x, u / dim.x % dim.y, u / dim.x / dim.y};
        f.linear = i;
    }
    blockDim = dim, gridDim = grid;
    RACE(begin_launch(stacks, static_cast<size_t>(STACK) * MAX_THREADS));
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks; i++) {
        const uint64_t b = block_at(i, blocks);
        blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                    static_cast<unsigned>(b / grid.x / grid.y)};
        memset(block.shared, 0xff, shared);
        forget_copies();
        block_begins(block.n);
        RACE(begin_block(block.n, block.shared, shared, room, ROOM));
        run_block();
        block_ends();
    }
}
}  // namespace

// ---- the interface --------------------------------------------------------------------------------------------------
bool launch(const void *kernel, dim3 grid, dim3 dim, size_t shared, void (*body)(void *), void *arg) {
    std::lock_guard<std::mutex> guard(one_launch);
    failed = false;
    random_state = chosen.seed * 0x9e3779b97f4a7c15u + 1;
    block.n = static_cast<int>(dim.x * dim.y * dim.z);
    block.kernel = kernel, block.body = body, block.arg = arg;
    try {
        run_grid(grid, dim, shared);
    } catch (failure) {
        tell();
    }
    self = nullptr;
    RACE(end_launch());
    return !failed;
}

const char *why() { return reason; }

void fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(reason, sizeof reason, format, list);
    va_end(list);
    failed = true;
    if (!self) throw failure();
    leave();
    abort();
}

std::string line_of(place at) {
    char text[128];
    snprintf(text, sizeof text, "%s:%u", base_name(at.file_name()), at.line());
    return text;
}
std::string line_of(const void *pc) {
    char name[256], line[256];
    ask_addr2line(static_cast<const char *>(pc) - 1, name, line, sizeof name);
    return line;
}

uint32_t random_number() {                          // splitmix64
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(z >> 32);
}

int async_timing() { return chosen.async; }

// ---- collectives ----------------------------------------------------------------------------------------------------
void barrier(place at) {
    fiber *me = running();
    me->is = AT_BARRIER, me->what = "__syncthreads", me->at = at, me->mask = 0;
    if (++block.arrived == block.n) {
        for (int i = 0; i < block.n; i++) {
            fiber &f = block.fibers[i];
            if (f.at.line() != at.line() || strcmp(f.at.file_name(), at.file_name())) fail("a divergent barrier%s", who_waits_where().c_str());
        }
        for (int i = 0; i < block.n; i++) make_ready(block.fibers[i]);
        block.arrived = 0;
        block.progress++;
        RACE(block_barrier());
        block_meets();
    }
    leave();
}

void wait(const char *what, place at) {
    fiber *me = running();
    me->is = WAITING, me->what = what, me->at = at, me->mask = 0;
    leave();
}

void wake(int thread) {
    make_ready(block.fibers[thread]);
    block.progress++;
}

void yield(place at) {
    fiber *me = running();
    me->is = SPINNING, me->what = "spin", me->at = at, me->mask = 0;
    block.spinning++;
    leave();
}

void maybe_yield() {
    if (chosen.schedule != SHUFFLED || random_number() % 4) return;
    make_ready(*running());
    leave();
}

void warp_meet(const char *what, uint32_t mask, void *args, meeting meet, place at) {
    fiber *me = running();
    const int warp = me->linear / 32, lane = me->linear & 31, n = std::min(32, block.n - warp * 32);
    if (!(mask >> lane & 1)) fail("%s (%s:%u): lane %d is not in its own mask %08x", what, base_name(at.file_name()), at.line(), lane, mask);
    if (n < 32 && mask >> n) fail("%s (%s:%u): mask %08x, but the warp has %d threads", what, base_name(at.file_name()), at.line(), mask, n);
    if (mask & block.ended[warp]) fail("%s (%s:%u): of mask %08x lanes %08x have ended", what, base_name(at.file_name()), at.line(), mask, mask & block.ended[warp]);
    me->is = IN_WARP, me->what = what, me->at = at, me->mask = mask, me->args = args;
    block.in_warp[warp] |= 1u << lane;
    if ((block.in_warp[warp] & mask) != mask) { leave(); return; }
    fiber *const first = &block.fibers[warp * 32];
    void *args_of_lane[32] = {};
    for (int l = 0; l < n; l++) {
        if (!(mask >> l & 1)) continue;
        const fiber &f = first[l];
        if (f.mask != mask || f.at.line() != at.line() || strcmp(f.what, what))
            fail("lanes %d and %d of a warp meet at different places: %s (%s:%u, mask %08x) and %s (%s:%u, mask %08x)", lane, l,
                 what, base_name(at.file_name()), at.line(), mask, f.what, base_name(f.at.file_name()), f.at.line(), f.mask);
        args_of_lane[l] = f.args;
    }
    meet(args_of_lane, mask);
    block.in_warp[warp] &= ~mask;
    block.progress++;
    for (int l = 0; l < n; l++)
        if (mask >> l & 1) make_ready(first[l]);
    leave();
}

void warp_barrier(uint32_t mask, place at) {
    warp_meet("__syncwarp", mask, nullptr, [](void **, [[maybe_unused]] uint32_t met) {
        RACE(warp_barrier(self->linear / 32, met));
    }, at);
}

// ---- shared memory --------------------------------------------------------------------------------------------------
unsigned char *shared_memory() { return block.shared; }
uint32_t shared_u32(const void *p) {
    const auto *at = static_cast<const unsigned char *>(p);
    if (at < block.shared || at > block.shared + block.shared_bytes) fail("shared_u32 of an address outside shared memory");
    return static_cast<uint32_t>(at - block.shared) + block.shared_base;
}
unsigned char *shared_at(uint32_t address, int bytes, int align) {
    const int64_t at = static_cast<int64_t>(address) - block.shared_base;
    if (address % static_cast<uint32_t>(align)) fail("shared address 0x%llx is not a multiple of %d", static_cast<long long>(at), align);
    if (at < 0 || at + bytes > static_cast<int64_t>(block.shared_bytes))
        fail("%d bytes at shared address %lld, shared memory ends at %zu", bytes, static_cast<long long>(at), block.shared_bytes);
    return block.shared + at;
}
}  // namespace simt

int simt_configure(const char *schedule, const char *async, uint64_t seed) {
    simt::settings s = simt::chosen;
    s.seed = seed;
    if (!simt::choose(&s.schedule, schedule, simt::SCHEDULES) || !simt::choose(&s.async, async, simt::TIMINGS)) return -1;
    simt::chosen = s;
    return 0;
}
