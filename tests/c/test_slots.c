// test_slots.c: forked ranks in stages that send tensors to the slots of others: many steps under random delays, one
// order for a stage, slots that are used again; and how it ends: refusals, a killed rank, one that computes for ever,
// one that has stopped while it waited.
//
// Deadlines are far (SECONDS) where a test is to end without one; alarm() ends a rank that hangs.
#include "check.h"
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX = 8, N = 6, BYTES = 1000, SECONDS = 1000 };
typedef void (*rank_body)(moe_slots *s, int ranks, int rank, int stage);
static struct {
    char            handle[MAX][MOE_WINDOW_HANDLE_BYTES];
    _Atomic int     arrived, late;
    _Atomic int64_t order[MAX][2 * N];
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

static void run_rank(int ranks, int rank, int stage, double seconds, rank_body body) {
    alarm(60);
    check_failures = 0;
    moe_slots *s = NULL;
    const int  files = open_files();
    CHECK_OK(moe_slots_open(ranks, rank, stage, N, BYTES, seconds, shared->handle[rank], &s));
    meet(ranks);
    CHECK_OK(moe_slots_join(s, shared->handle));
    body(s, ranks, rank, stage);
    moe_slots_close(s);
    CHECK(open_files() == files, "rank %d has %d files open, had %d", rank, open_files(), files);
    _exit(check_failures != 0);
}

// Every rank that is not `lost` must end well; that one is killed when they have.
static void run(int ranks, int stage, double seconds, int lost, rank_body body) {
    pid_t pid[MAX];
    atomic_store(&shared->arrived, 0);
    fflush(NULL);
    for (int rank = 0; rank < ranks; rank++)
        if (!(pid[rank] = fork())) run_rank(ranks, rank, stage, seconds, body);
    for (int rank = 0; rank < ranks; rank++) {
        int status;
        if (rank == lost) continue;
        waitpid(pid[rank], &status, 0);
        CHECK(status == 0, "rank %d of %d ended with status %#x", rank, ranks, status);
    }
    if (lost >= 0) kill(pid[lost], SIGKILL), waitpid(pid[lost], NULL, 0);
}

#define CHECK_SAID(call, text)                                                                                         \
    do {                                                                                                               \
        CHECK_STATUS(call, MOE_WIRE_FAILED);                                                                           \
        CHECK(strstr(moe_peers_error(), text), "%s said \"%s\", want \"%s\"", #call, moe_peers_error(), text);         \
    } while (0)

// -- steps ------------------------------------------------------------------------------------------------------------
static char byte_of(int64_t step, int64_t slot, int to, int i) {
    return (char)(step * 31 + slot * 7 + to * 3 + i % 251);
}

static void send(moe_slots *s, int64_t step, int64_t slot, int to, int64_t delay) {
    char data[BYTES];
    for (int i = 0; i < BYTES; i++) data[i] = byte_of(step, slot, to, i);
    CHECK_OK(moe_slots_send(s, slot, delay, data));
}

static void take(moe_slots *s, int64_t step, int64_t slot, int rank) {
    char data[BYTES];
    int  wrong = 0;
    CHECK_OK(moe_slots_take(s, slot, data));
    for (int i = 0; i < BYTES; i++) wrong += data[i] != byte_of(step, slot, rank, i);
    CHECK(wrong == 0, "step %d: %d bytes of slot %d are wrong at rank %d", (int)step, wrong, (int)slot, rank);
}

static int receiver(int ranks, int rank, int stage, int64_t slot) {
    return (rank + (slot < N ? stage : ranks - stage)) % ranks;
}

static void shuffle(uint64_t *seed, int64_t n, int64_t *x) {
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = check_below(seed, i + 1), t = x[i];
        x[i] = x[j], x[j] = t;
    }
}

// The leader takes what has come to all of its stage; the others follow. Sends lie between the actions, forth and back
// in turn, in an order that a stage has in common: nobody waits for what is not sent yet. They come late, and a rank
// that has ended a step may be a step ahead of its neighbours.
static void random_steps(moe_slots *s, int ranks, int rank, int stage) {
    const int leader = rank / stage * stage;
    uint64_t  own = (uint64_t)rank, common = (uint64_t)leader;
    for (int step = 1; step <= 60; step++) {
        int64_t forth[N], back[N], left[2 * N];
        int32_t here[2 * N];
        for (int64_t i = 0; i < 2 * N; i++) left[i] = i;
        for (int64_t i = 0; i < N; i++) forth[i] = i, back[i] = N + i;
        shuffle(&common, N, forth), shuffle(&common, N, back), shuffle(&own, 2 * N, left);
        CHECK_OK(moe_slots_begin(s, step));
        for (int n = 0, sent = 0; n < 2 * N; n++) {
            for (; sent < N && (sent <= n / 2 || check_below(&own, 2)); sent++) {
                send(s, step, forth[sent], receiver(ranks, rank, stage, 0), check_below(&own, 4) * 100000);
                send(s, step, back[sent], receiver(ranks, rank, stage, N), check_below(&own, 4) * 100000);
            }
            int64_t slot = -1;
            if (rank == leader) {
                CHECK_OK(moe_slots_arrived(s, 2 * N - n, left, here));
                for (int i = 0; i < 2 * N - n && slot < 0; i++)
                    if (here[left[i]]) slot = left[i], left[i] = left[2 * N - n - 1];
                CHECK(slot >= 0, "step %d: nothing has arrived", step);
                CHECK_OK(moe_slots_decide(s, slot));
            } else {
                CHECK_OK(moe_slots_decision(s, &slot));
            }
            take(s, step, slot, rank);
            atomic_store(&shared->order[rank][n], slot);
        }
        CHECK_OK(moe_slots_end(s));
        if (step == 60) meet(2 * ranks);
    }
    for (int n = 0; n < 2 * N; n++)
        CHECK(atomic_load(&shared->order[rank][n]) == atomic_load(&shared->order[leader][n]), "rank %d has an order of "
              "its own", rank);
    meet(3 * ranks);
    CHECK_OK(moe_slots_leave(s));
}

// A sender that is steps ahead waits until its slot is free; a leader that is a board ahead, until it is read.
static void ahead(moe_slots *s, int ranks, int rank, int stage) {
    (void)ranks;
    for (int64_t step = 1; step <= 20; step++) {
        CHECK_OK(moe_slots_begin(s, step));
        if (rank == 0) send(s, step, 2, 2, 0);
        if (rank % stage) usleep(step % 5 ? 0 : 3000);
        if (rank == 2) take(s, step, 2, rank);
        for (int64_t i = 0; i < N; i++) {
            int64_t slot = -1;
            if (rank % stage == 0) CHECK_OK(moe_slots_decide(s, (step + i) % N));
            else CHECK_OK(moe_slots_decision(s, &slot));
            CHECK(rank % stage == 0 || slot == (step + i) % N, "step %d: decision %d is %d", (int)step, (int)i,
                  (int)slot);
        }
        CHECK_OK(moe_slots_end(s));
    }
    meet(8);
}

// Copies that others make: rank 0 claims and goes on, and a thread makes the copy, here to shared->late, and raises. A
// step later its next claim of the slot waits for the whole of that.
static void *copy_late(void *claim) {
    usleep(20000);
    atomic_fetch_add(&shared->late, 1);
    moe_slots_raise(claim);
    return NULL;
}
static void claims(moe_slots *s, int ranks, int rank, int stage) {
    (void)ranks, (void)stage;
    pthread_t copies[3];
    void     *claim = NULL;
    for (int step = 1; step <= 3; step++) {
        CHECK_OK(moe_slots_begin(s, step));
        if (rank == 0) {
            CHECK_OK(moe_slots_claim_send(s, 2, 0, &claim));
            CHECK_SAID(moe_slots_claim_send(s, 2, 0, &claim), "slot 2 has been sent in step ");
        } else {
            CHECK_OK(moe_slots_claim_take(s, 2, &claim));
            CHECK_SAID(moe_slots_claim_take(s, 2, &claim), "slot 2 has been taken in step ");
        }
        const int done = atomic_load(&shared->late), least = 2 * step - 2 + rank;
        CHECK(done >= least, "rank %d, step %d: %d copies are done, wanted %d", rank, step, done, least);
        pthread_create(&copies[step - 1], NULL, copy_late, claim);
        CHECK_OK(moe_slots_end(s));
    }
    for (int i = 0; i < 3; i++) pthread_join(copies[i], NULL);
    meet(4);
}

// -- refusals ---------------------------------------------------------------------------------------------------------
static void refusals(moe_slots *s, int ranks, int rank, int stage) {
    char          data[BYTES] = {0};
    int32_t       here[2 * N];
    int64_t       slot;
    const int64_t bad[] = {2 * N};
    CHECK_STATUS(moe_slots_send(s, 0, 0, data), MOE_BAD_INDEX);        // before a step
    CHECK_SAID(moe_slots_begin(s, 0), "step 0 begins after step 0");
    CHECK_OK(moe_slots_begin(s, 5));
    CHECK_SAID(moe_slots_begin(s, 5), "step 5 begins after step 5");
    CHECK_STATUS(moe_slots_send(s, 2 * N, 0, data), MOE_BAD_INDEX);
    CHECK_STATUS(moe_slots_send(s, 0, -1, data), MOE_BAD_INDEX);
    CHECK_STATUS(moe_slots_take(s, -1, data), MOE_BAD_INDEX);
    CHECK_STATUS(moe_slots_arrived(s, 1, bad, here), MOE_BAD_INDEX);
    CHECK_STATUS(moe_slots_decide(s, 2 * N), MOE_BAD_INDEX);
    if (rank % stage) CHECK_SAID(moe_slots_decide(s, 0), "the leader of its stage is rank ");
    else CHECK_SAID(moe_slots_decision(s, &slot), "leads its stage, and follows nobody");
    send(s, 5, 1, receiver(ranks, rank, stage, 1), 0);
    CHECK_SAID(moe_slots_send(s, 1, 0, data), "slot 1 has been sent in step 5 before");
    meet(2 * ranks);
    CHECK_SAID(moe_slots_end(s), "the tensor of slot 1 has not been taken");
    take(s, 5, 1, rank);
    CHECK_SAID(moe_slots_take(s, 1, data), "slot 1 has been taken in step 5 before");
    CHECK_OK(moe_slots_end(s));
    meet(3 * ranks);
    CHECK_OK(moe_slots_leave(s));
    CHECK_SAID(moe_slots_send(s, 0, 0, data), "is not open");
    CHECK_SAID(moe_slots_take(s, 0, data), "is not open");
    CHECK_SAID(moe_slots_arrived(s, 0, NULL, here), "is not open");
    CHECK_SAID(moe_slots_begin(s, 6), "is not open");
}

static void test_refusals(void) {
    moe_slots *s = NULL;
    char       handle[MOE_WINDOW_HANDLE_BYTES];
    run(4, 2, SECONDS, -1, refusals);
    CHECK_STATUS(moe_slots_open(2, 2, 1, N, 1, 1, handle, &s), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_slots_open(3, 0, 2, N, 1, 1, handle, &s), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_slots_open(2, 0, 2, N, 1, 1, handle, &s), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_slots_open(2, 0, 1, 0, 1, 1, handle, &s), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_slots_open(2, 0, 1, N, -1, 1, handle, &s), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_slots_open(2, 0, 1, N, INT64_MAX / 8, 1, handle, &s), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_slots_open(2, 0, 1, N, 1, 0, handle, &s), MOE_BAD_SHAPE);
    CHECK_SAID(moe_slots_open(1000, 0, 1, N, 1, 1, handle, &s), "at most 128 ranks, not 1000");
    CHECK_SAID(moe_slots_open(2, 0, 1, 1, INT64_C(1) << 60, 1, handle, &s), "no link of");
    CHECK(!s, "slots were made");
}

// -- ranks that are lost: rank 2 of four stages, for which the last waits, and the first two, one for the other -------
static void lose_rank_2(moe_slots *s, int ranks, int rank, int stage, int how, const char *text) {
    char said[256], data[BYTES];
    CHECK_OK(moe_slots_begin(s, 1));
    send(s, 1, 0, receiver(ranks, rank, stage, 0), 0);
    take(s, 1, 0, rank);
    if (rank == 2 && how) raise(how);
    if (rank == 2) pause();
    CHECK_SAID(moe_slots_take(s, rank == 3 ? 1 : N, data), "rank 2 (pid ");
    CHECK(strstr(moe_peers_error(), text), "rank %d said \"%s\"", rank, moe_peers_error());
    strcpy(said, moe_peers_error());
    meet(2 * ranks - 1);                        // dead ones among the living would be another story
    CHECK_SAID(moe_slots_send(s, N, 0, data), said);
    CHECK_SAID(moe_slots_begin(s, 2), said);
    CHECK_SAID(moe_slots_end(s), said);
    CHECK_SAID(moe_slots_leave(s), said);
}

static void rank_2_is_killed(moe_slots *s, int ranks, int rank, int stage) {
    if (rank == 2) usleep(20000);               // the others sleep
    lose_rank_2(s, ranks, rank, stage, SIGKILL, "has died");
}
static const char STALLED[] = "has sent nothing of what the others wait for within 1 s";
static void rank_2_computes(moe_slots *s, int ranks, int rank, int stage) {
    lose_rank_2(s, ranks, rank, stage, 0, STALLED);
}
static void rank_2_is_stopped(moe_slots *s, int ranks, int rank, int stage) {
    lose_rank_2(s, ranks, rank, stage, SIGSTOP, STALLED);
}
// It says that it waits for rank 1, which waits for it.
static void rank_2_is_stopped_in_a_wait(moe_slots *s, int ranks, int rank, int stage) {
    if (rank == 2) {
        const pid_t me = getpid();
        if (!fork()) usleep(100000), kill(me, SIGSTOP), _exit(0);
        char data[BYTES];
        CHECK_OK(moe_slots_begin(s, 1));
        send(s, 1, 0, receiver(ranks, rank, stage, 0), 0);
        take(s, 1, 0, rank);
        moe_slots_take(s, 1, data);
    }
    lose_rank_2(s, ranks, rank, stage, 0, STALLED);
}

static void tests(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) abort();
    run(2, 1, SECONDS, -1, random_steps);
    run(6, 2, SECONDS, -1, random_steps);
    run(MAX, 4, SECONDS, -1, random_steps);
    run(4, 2, SECONDS, -1, ahead);
    run(2, 1, SECONDS, -1, claims);
    test_refusals();
    run(4, 1, SECONDS, 2, rank_2_is_killed);
    run(4, 1, 1, 2, rank_2_computes);
    run(4, 1, 1, 2, rank_2_is_stopped);
    run(4, 1, 1, 2, rank_2_is_stopped_in_a_wait);
}
int main(void) { return check_main(tests); }
