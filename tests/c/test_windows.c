// test_windows.c: forked ranks that exchange counts and rows through shared memory, and write rows there themselves:
// random sizes over many rounds, ranks that come late; and how a wire ends: refusals, a killed rank, a silent one,
// handles of nobody.
//
// Deadlines are far (SECONDS) where a test is to end without one; alarm() ends a rank that hangs.
#include "check.h"
#include <dirent.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX = 8, HALF = 1 << 16, SECONDS = 1000 };
typedef void (*rank_body)(moe_windows *w, int ranks, int rank);
static struct {
    char        handle[MAX][MOE_WINDOW_HANDLE_BYTES];
    _Atomic int arrived;
} *shared;                                      // by all ranks

static void meet(int at) {
    atomic_fetch_add(&shared->arrived, 1);
    while (atomic_load(&shared->arrived) < at) usleep(100);
}

static int open_files(void) {
    int  n = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (readdir(folder)) n++;
    closedir(folder);
    return n;
}

static void run_rank(int ranks, int rank, double seconds, rank_body body) {
    alarm(30);
    check_failures = 0;
    moe_windows *w = NULL;
    const int    files = open_files();
    CHECK_OK(moe_windows_open(ranks, rank, HALF, seconds, shared->handle[rank], &w));
    meet(ranks);
    CHECK_OK(moe_windows_join(w, shared->handle));
    body(w, ranks, rank);
    moe_windows_close(w);
    CHECK(open_files() == files, "rank %d has %d files open, had %d", rank, open_files(), files);
    _exit(check_failures != 0);
}

// Every rank that is not `killed` must end well. They stay zombies until all have ended, as under a launcher.
static void run(int ranks, double seconds, int killed, rank_body body) {
    pid_t pid[MAX];
    atomic_store(&shared->arrived, 0);
    fflush(NULL);
    for (int rank = 0; rank < ranks; rank++)
        if (!(pid[rank] = fork())) run_rank(ranks, rank, seconds, body);
    for (int rank = ranks; rank--;) {
        int status;
        if (rank == killed) continue;
        waitpid(pid[rank], &status, 0);
        CHECK(status == 0, "rank %d of %d ended with status %#x", rank, ranks, status);
    }
    if (killed >= 0) waitpid(pid[killed], NULL, 0);
}

#define CHECK_SAID(call, text)                                                                                         \
    do {                                                                                                               \
        CHECK_STATUS(call, MOE_WIRE_FAILED);                                                                           \
        CHECK(strstr(moe_peers_error(), text), "%s said \"%s\", want \"%s\"", #call, moe_peers_error(), text);     \
    } while (0)

// -- rounds -----------------------------------------------------------------------------------------------------------
static char byte_of(int round, int p, int q, int64_t i) { return (char)(round * 31 + p * 7 + q * 3 + i % 251); }

static void check_counts(moe_windows *w, int ranks, int rank, int round, int64_t n) {
    int32_t *mine_n = check_alloc(4 * n), *all_Pn = check_alloc(4 * n * ranks);
    for (int64_t i = 0; i < n; i++) mine_n[i] = (int32_t)(round * 1000 + rank * 100 + i);
    CHECK_OK(moe_windows_counts(w, n, mine_n, all_Pn));
    for (int64_t i = 0; i < n * ranks; i++)
        CHECK(all_Pn[i] == round * 1000 + i / n * 100 + i % n, "round %d: count %d is %d", round, (int)i, all_Pn[i]);
    free(mine_n); free(all_Pn);
}

static void check_rows(moe_windows *w, int ranks, int rank, int round, const int64_t *bytes_PP) {
    int64_t sends = 0, gets = 0, wrong = 0;
    for (int p = 0; p < ranks; p++) sends += bytes_PP[rank * ranks + p], gets += bytes_PP[p * ranks + rank];
    char *sent = check_alloc(sends), *received = check_alloc(gets), *x = sent, *y = received;
    for (int p = 0; p < ranks; p++)
        for (int64_t i = 0; i < bytes_PP[rank * ranks + p]; i++) *x++ = byte_of(round, rank, p, i);
    CHECK_OK(moe_windows_rows(w, bytes_PP, sent, received));
    for (int p = 0; p < ranks; p++)
        for (int64_t i = 0; i < bytes_PP[p * ranks + rank]; i++) wrong += *y++ != byte_of(round, p, rank, i);
    CHECK(wrong == 0, "round %d: %d of %d bytes of rank %d are wrong", round, (int)wrong, (int)gets, rank);
    free(sent); free(received);
}

// What check_rows does, without its copies. The room is asked for twice, and first filled with what nobody may see.
static void check_turn(moe_windows *w, int ranks, int rank, int round, const int64_t *bytes_PP) {
    const void *received = NULL;
    void       *to_P[MAX];
    int64_t     wrong = 0;
    for (int attempt = 0; attempt < 2; attempt++) {
        CHECK_OK(moe_windows_room(w, bytes_PP, to_P));
        for (int p = 0; p < ranks; p++)
            for (int64_t i = 0; i < bytes_PP[rank * ranks + p]; i++)
                ((char *)to_P[p])[i] = attempt ? byte_of(round, rank, p, i) : -1;
    }
    CHECK_OK(moe_windows_turn(w, &received));
    CHECK_OK(moe_windows_room(w, bytes_PP, to_P));         // of the next epoch: elsewhere than what is read
    for (int p = 0; p < ranks; p++) memset(to_P[p], -1, (size_t)bytes_PP[rank * ranks + p]);
    const char *y = received;
    for (int p = 0; p < ranks; p++)
        for (int64_t i = 0; i < bytes_PP[p * ranks + rank]; i++) wrong += *y++ != byte_of(round, p, rank, i);
    CHECK(wrong == 0, "round %d: %d bytes in the window of rank %d are wrong", round, (int)wrong, rank);
}

static void random_rounds(moe_windows *w, int ranks, int rank) {
    uint64_t same = 7, own = (uint64_t)rank;
    int64_t  bytes_PP[MAX * MAX];
    for (int round = 0; round < 100; round++) {
        const int64_t n = check_below(&same, 20), longest = HALF / ranks >> check_below(&same, 12);
        for (int i = 0; i < ranks * ranks; i++)
            bytes_PP[i] = check_below(&same, 3) ? check_below(&same, longest + 1) : 0;
        if (!check_below(&own, 8)) usleep((unsigned)check_below(&own, 300));     // late, so that the others sleep
        check_counts(w, ranks, rank, round, n);
        check_rows(w, ranks, rank, round, bytes_PP);
        if (!check_below(&own, 4)) sched_yield();
        for (int turns = (int)check_below(&same, 4); turns--;) check_turn(w, ranks, rank, round + turns, bytes_PP);
        check_rows(w, ranks, rank, round, bytes_PP);
    }
    meet(2 * ranks);
    CHECK_OK(moe_windows_leave(w));
}

static void test_rounds(void) {
    static const int worlds[] = {1, 2, 3, 5, MAX};
    for (int i = 0; i < 5; i++) run(worlds[i], SECONDS, -1, random_rounds);
}

// -- refusals: the same on every rank, and the wire is as good as before ----------------------------------------------
static void refusals(moe_windows *w, int ranks, int rank) {
    const int64_t full_PP[] = {0, 0, 0, HALF - 8, 0, 0, 8, 0, 0}, more_PP[] = {0, 0, 0, HALF - 8, 0, 0, 9, 0, 0},
                  negative_PP[] = {0, 0, 0, 0, -1, 0, 0, 0, 0};
    char     row[16] = {0};
    int32_t  numbers[16] = {0};
    void    *to_P[3];
    const void *received;
    CHECK_SAID(moe_windows_room(w, more_PP, to_P), "holds 65536 bytes, rank 0 is to receive more");
    CHECK_STATUS(moe_windows_room(w, negative_PP, to_P), MOE_BAD_SHAPE);
    CHECK_SAID(moe_windows_rows(w, more_PP, row, row), "holds 65536 bytes, rank 0 is to receive more");
    CHECK_STATUS(moe_windows_rows(w, negative_PP, row, row), MOE_BAD_SHAPE);
    CHECK_SAID(moe_windows_counts(w, HALF, numbers, numbers), "holds 65536 bytes, not 65536 counts of 3 ranks");
    CHECK_STATUS(moe_windows_counts(w, -1, numbers, numbers), MOE_BAD_SHAPE);
    check_rows(w, ranks, rank, 0, full_PP);
    check_turn(w, ranks, rank, 1, full_PP);
    meet(2 * ranks);
    CHECK_OK(moe_windows_leave(w));
    CHECK_SAID(moe_windows_room(w, full_PP, to_P), "is not open");
    CHECK_SAID(moe_windows_turn(w, &received), "is not open");
    CHECK_SAID(moe_windows_counts(w, 1, numbers, numbers), "is not open");
}

static void test_refusals(void) {
    moe_windows *w = NULL;
    char         handle[MOE_WINDOW_HANDLE_BYTES];
    run(3, SECONDS, -1, refusals);
    CHECK_STATUS(moe_windows_open(0, 0, 0, 1, handle, &w), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_windows_open(2, 2, 0, 1, handle, &w), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_windows_open(2, 0, -1, 1, handle, &w), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_windows_open(2, 0, 0, 0, handle, &w), MOE_BAD_SHAPE);
    CHECK_SAID(moe_windows_open(1000, 0, 0, 1, handle, &w), "at most 128 ranks, not 1000");
    CHECK_SAID(moe_windows_open(2, 0, INT64_MAX / 4, 1, handle, &w), "no window of");
    CHECK(!w, "a wire was made");
}

static void test_handles_of_nobody(void) {
    moe_windows *w[2] = {NULL};
    char         handle[2][MOE_WINDOW_HANDLE_BYTES];
    const int    files = open_files();
    for (int p = 0; p < 2; p++) CHECK_OK(moe_windows_open(2, p, HALF * p, 1, handle[p], &w[p]));
    CHECK_SAID(moe_windows_join(w[0], handle), "is not the window of rank 1, or not of");
    moe_windows_close(w[1]);
    CHECK_OK(moe_windows_open(2, 1, 0, 1, handle[1], &w[1]));
    handle[1][16]++;                            // another number
    CHECK_SAID(moe_windows_join(w[0], handle), "is not the window of rank 1");
    const int64_t dead = fork();
    if (!dead) _exit(0);
    waitpid((pid_t)dead, NULL, 0);
    memcpy(handle[1], &dead, sizeof dead);
    CHECK_SAID(moe_windows_join(w[0], handle), "cannot be opened: No such process");
    moe_windows_close(w[1]);
    moe_windows_close(w[0]);
    CHECK(open_files() == files, "%d files open, were %d", open_files(), files);
}

// -- deaths -----------------------------------------------------------------------------------------------------------
static void rank_1_is_killed(moe_windows *w, int ranks, int rank) {
    int32_t one = 1, all[MAX];
    int64_t bytes_PP[MAX * MAX] = {0};
    void   *to_P[MAX];
    const void *received;
    char    said[256];
    CHECK_OK(moe_windows_counts(w, 1, &one, all));
    if (rank == 1) {
        usleep(20000);                          // the others sleep
        raise(SIGKILL);
    }
    CHECK_SAID(moe_windows_counts(w, 1, &one, all), "rank 1 (pid ");
    CHECK(strstr(moe_peers_error(), "has died"), "said \"%s\"", moe_peers_error());
    strcpy(said, moe_peers_error());
    CHECK_SAID(moe_windows_rows(w, bytes_PP, said, NULL), said);
    CHECK_SAID(moe_windows_room(w, bytes_PP, to_P), said);
    CHECK_SAID(moe_windows_turn(w, &received), said);
    meet(2 * ranks - 1);
    CHECK_SAID(moe_windows_leave(w), said);
}

static void rank_1_is_silent(moe_windows *w, int ranks, int rank) {
    int32_t one = 1, all[MAX];
    CHECK_OK(moe_windows_counts(w, 1, &one, all));
    if (rank == 1) {
        meet(2 * ranks);                        // the others have given up, after they had raised their flags
        CHECK_OK(moe_windows_counts(w, 1, &one, all));
    }
    CHECK_SAID(moe_windows_counts(w, 1, &one, all), "rank 1 (pid ");
    CHECK(strstr(moe_peers_error(), "did not answer the others' windows within 0.05 s"), "said \"%s\"",
          moe_peers_error());
    if (rank != 1) meet(2 * ranks);
    CHECK_SAID(moe_windows_counts(w, 1, &one, all), "rank 1 (pid ");
}

// Threads of the pool copy pieces that are long enough.
static void long_rows(moe_windows *w, int ranks, int rank) {
    enum { LONG = 3 << 18 };
    const int64_t bytes_PP[] = {5, LONG, LONG + 1, 0};
    char          handle[MOE_WINDOW_HANDLE_BYTES];
    moe_windows  *longer;
    check_threads = 3;
    CHECK_OK(moe_windows_leave(w));
    CHECK_OK(moe_windows_open(ranks, rank, LONG + 8, SECONDS, handle, &longer));
    meet(2 * ranks);                            // before the handles of the first windows go
    memcpy(shared->handle[rank], handle, sizeof handle);
    meet(3 * ranks);
    CHECK_OK(moe_windows_join(longer, shared->handle));
    check_rows(longer, ranks, rank, 1, bytes_PP);
    check_rows(longer, ranks, rank, 2, bytes_PP);
    meet(4 * ranks);
    moe_windows_close(longer);
}

static void tests(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) abort();
    test_rounds();
    test_refusals();
    test_handles_of_nobody();
    run(4, SECONDS, 1, rank_1_is_killed);
    run(3, 0.05, -1, rank_1_is_silent);
    run(2, SECONDS, -1, long_rows);
}
int main(void) { return check_main(tests); }
