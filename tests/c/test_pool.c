// test_pool.c: every piece once, whoever helps; threads that never come, or too late, hold up nobody; lent threads that
// are late are left alone for a while; tasks that await others. The pool is compiled in, so that the test decides which
// threads it gets.
#include "check.h"
static bool no_threads;                 // they are promised and never come
static int  made;
static int  give_thread(pthread_t *thread, void *(*body)(void *)) {
    made++;
    if (!no_threads) return pthread_create(thread, NULL, body, NULL);
    *thread = pthread_self();
    return 0;
}
static int give_detach(pthread_t thread) { return no_threads ? 0 : pthread_detach(thread); }
#define pthread_create(thread, none, body, arg) give_thread(thread, body)
#define pthread_detach give_detach
#define pthread_setname_np(thread, name) ((void)0)
#define moe_set_pool test_set_pool
#define moe_threads  test_threads
#define moe_parallel test_parallel
#define moe_arrive   test_arrive
#define moe_await    test_await
#include "../../csrc/pool.c"
#undef pthread_create
#undef pthread_detach
#undef pthread_setname_np

enum { MANY = 1000 };
typedef struct { _Atomic int times[MANY], calls; pthread_t caller; _Atomic int others; } count;
static void count_rows(int64_t begin, int64_t end, void *arg) {
    count *c = arg;
    c->calls++;
    if (!pthread_equal(pthread_self(), c->caller)) c->others++;
    for (int64_t i = begin; i < end; i++) c->times[i]++;
}
static int wrong_rows(const count *c, int64_t n) {
    int wrong = 0;
    for (int64_t i = 0; i < MANY; i++) wrong += c->times[i] != (i < n);
    return wrong;
}
static _Atomic int wrong;                                       // CHECK is not for several threads
static void run(int64_t n, int64_t grain) {
    count c = {.caller = pthread_self()};
    moe_parallel(n, grain, count_rows, &c);
    wrong += wrong_rows(&c, n);
}
static void check_wrong(const char *what) { CHECK(wrong == 0, "%s: %d rows not done once", what, wrong); }

// -- threads that never come, or too late -----------------------------------------------------------------------------
static void test_alone(void) {
    no_threads = true, made = 0;
    moe_set_pool(NULL, check_thread_count);
    check_threads = 5;
    count c = {.caller = pthread_self()};
    moe_parallel(MANY, 1, count_rows, &c);
    CHECK(wrong_rows(&c, MANY) == 0, "rows not done once");
    CHECK(c.others == 0 && made == 4, "%d pieces by others, %d threads wanted", c.others, made);
    const count before = c;
    help();                             // who wakes up now
    CHECK(c.calls == before.calls, "a late thread found work in a closed region");
    in_child();                         // forgets them, as a child process does
    no_threads = false;
}

// -- every row once ---------------------------------------------------------------------------------------------------
static void test_rows(void) {
    const int64_t ns[] = {0, 1, 2, 5, 16, 17, MANY}, grains[] = {0, 1, 3, 100, 2000};
    moe_set_pool(NULL, check_thread_count);
    for (int round = 0; round < 20; round++)
        for (int n = 0; n < 7; n++)
            for (int g = 0; g < 5; g++) {
                const int threads[] = {1, 2, 3, 5, 2};          // more and fewer than before
                check_threads = threads[(round + n + g) % 5];
                run(ns[n], grains[g]);
            }
    check_wrong("own");
    CHECK(own.threads == 4, "%lld threads", (long long)own.threads);
}

// Both threads meet in the region: the caller's pieces are not done until a helper has come.
static void meet(int64_t begin, int64_t end, void *arg) {
    (void)begin, (void)end;
    moe_missing *missing = arg;
    moe_arrive(missing);
    moe_await(missing);
}
static void test_helpers_come(void) {
    moe_set_pool(NULL, check_thread_count);
    for (check_threads = 2; check_threads <= 5; check_threads++) {
        moe_missing missing = (uint32_t)check_threads;
        moe_parallel(check_threads, 1, meet, &missing);
        CHECK(missing == 0, "%u have not met", missing);
    }
}

// -- regions beside and inside each other -----------------------------------------------------------------------------
static void *many_regions(void *none) {
    for (int i = 0; i < 300; i++) run(1 + i % 50, 1);
    return none;
}
static void test_callers(void) {
    pthread_t other[2];
    check_threads = 3;
    moe_set_pool(NULL, check_thread_count);
    for (int i = 0; i < 2; i++)
        if (pthread_create(&other[i], NULL, many_regions, NULL)) abort();
    many_regions(NULL);
    for (int i = 0; i < 2; i++) pthread_join(other[i], NULL);
    check_wrong("beside");
}
static void region_inside(int64_t begin, int64_t end, void *arg) {
    for (int64_t i = begin; i < end; i++) run(20, 1);
    count_rows(begin, end, arg);
}
static void test_nested(void) {
    count c = {.caller = pthread_self()};
    check_threads = 3;
    for (int lends = 0; lends < 2; lends++) {
        memset(&c.times, 0, sizeof c.times);
        moe_set_pool(lends ? check_pool : NULL, check_thread_count);
        moe_parallel(50, 1, region_inside, &c);
        wrong += wrong_rows(&c, 50);
        check_wrong("inside");
    }
}

// -- lent threads -----------------------------------------------------------------------------------------------------
static int     lent_regions;
static bool    comes_late;
static int32_t lending(int64_t begin, int64_t end, int64_t grain, moe_body body, void *arg) {
    (void)grain;
    lent_regions++;
    for (int64_t i = begin; i < end; i++) body(i, i + 1, arg);
    if (comes_late) nanosleep(&(struct timespec){0, 4 * LATE}, NULL);
    return 0;
}
static int lent_of(int regions) {
    lent_regions = 0;
    for (int i = 0; i < regions; i++) run(100, 1);
    return lent_regions;
}
static void test_late(void) {
    check_threads = 2;
    moe_set_pool(lending, check_thread_count);
    left_own = 0, most_own = LEAST_OWN, comes_late = true;
    CHECK(lent_of(1 + LEAST_OWN) == 1, "%d regions were lent's while it was late", lent_regions);
    CHECK(lent_of(1 + 2 * LEAST_OWN) == 1, "%d regions were lent's when it was late again", lent_regions);
    for (int i = 0; i < 20; i++) left_own = 0, lent_of(1);
    CHECK(left_own == MOST_OWN, "%lld regions without lent, at most", (long long)left_own);
    in_child();
    CHECK(lent_of(5) == 0, "a child used threads that it does not have");
    left_own = 0;
    check_wrong("lent");
}

// -- tasks that await others ------------------------------------------------------------------------------------------
// A chain of 200 tasks, each awaiting the one before it, taken in order by as many threads as come.
typedef struct { moe_missing missing[200]; int order[200], next; _Atomic int64_t task; } chain;
static void links(int64_t begin, int64_t end, void *arg) {
    (void)begin, (void)end;
    chain *c = arg;
    for (int64_t i; (i = c->task++) < 200; moe_arrive(&c->missing[i])) {
        if (i) moe_await(&c->missing[i - 1]);
        c->order[c->next++] = (int)i;                           // a race, unless the wait orders them
    }
}
static void test_chain(void) {
    moe_set_pool(NULL, check_thread_count);
    for (check_threads = 1; check_threads <= 5; check_threads++) {
        chain c = {.next = 0};
        for (int i = 0; i < 200; i++) c.missing[i] = 1;
        moe_parallel(check_threads, 1, links, &c);
        int early = c.next != 200;
        for (int i = 0; i < 200; i++) early += c.order[i] != i;
        CHECK(early == 0, "%d tasks out of their order", early);
    }
}

static void tests(void) {
    test_alone();
    test_rows();
    test_helpers_come();
    test_callers();
    test_nested();
    test_late();
    test_chain();
}
int main(void) { return check_main(tests); }
