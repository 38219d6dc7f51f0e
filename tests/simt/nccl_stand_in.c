// nccl_stand_in.c: the part of NCCL that cuda/nccl.cu calls, among processes of one host, over POSIX shared memory.
// Built by the tests as libnccl.so.2; "device" memory is the host's.
//
// Each ordered pair of ranks has a mailbox of CHUNK bytes. As in NCCL on a communicator that does not block, a group
// only collects calls; they advance when somebody asks for the asynchronous error, which is ncclInProgress until the
// last has ended. A receive that finds a message of another size is ncclInvalidUsage: both sides must agree on every
// pair, and skip the same ones.
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_USAGE = 5, IN_PROGRESS = 7, CHUNK = 4096, MAX_CALLS = 256 };

typedef struct { char bytes[128]; } unique_id;
typedef struct {
    _Atomic uint64_t written, read;         // bytes since the beginning; a piece is whole or not there
    _Atomic uint64_t size;                  // of the message under way; 0: none
    char             chunk[CHUNK];
} mailbox;
typedef struct { _Atomic int arrived; mailbox box[]; } board;
typedef struct { char *p; size_t bytes, done; int send, peer, begun; } call;
typedef struct {
    int    ranks, rank, state, opening, n;
    board *board;
    size_t board_bytes;
    call   calls[MAX_CALLS];
} communicator;

static int           group;
static communicator *grouped;

#define API __attribute__((visibility("default")))

API const char *ncclGetErrorString(int result) {
    return result == INVALID_USAGE ? "invalid usage" : result == SYSTEM_ERROR ? "unhandled system error" : "no error";
}

API int ncclGetUniqueId(unique_id *id) {
    static int made;
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "/nccl_stand_in_%d_%d", (int)getpid(), made++);
    return SUCCESS;
}

API int ncclCommInitRankConfig(communicator **made, int ranks, unique_id id, int rank, const void *config) {
    size_t   size = *(const size_t *)config;
    uint32_t magic = ((const uint32_t *)config)[2];
    int      blocking = ((const int *)config)[4];
    if (size < 24 || magic != 0xcafebeef || blocking) return INVALID_USAGE;
    communicator *c = calloc(1, sizeof *c);
    int           file = shm_open(id.bytes, O_RDWR | O_CREAT, 0600);
    c->ranks = ranks, c->rank = rank, c->opening = 1, c->state = IN_PROGRESS;
    c->board_bytes = sizeof(board) + (size_t)(ranks * ranks) * sizeof(mailbox);
    if (file < 0 || ftruncate(file, (off_t)c->board_bytes)) return SYSTEM_ERROR;
    c->board = mmap(NULL, c->board_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (atomic_fetch_add(&c->board->arrived, 1) == ranks - 1) shm_unlink(id.bytes);
    *made = c;
    return IN_PROGRESS;
}

static int advance(communicator *c, call *m) {
    const int from = m->send ? c->rank : m->peer, to = m->send ? m->peer : c->rank;
    mailbox  *b = &c->board->box[from * c->ranks + to];
    if (!m->begun) {
        uint64_t size = atomic_load(&b->size);
        if (m->send) {
            if (size) return SUCCESS;                           // the last message is still being read
            atomic_store(&b->size, m->bytes);
        } else {
            if (!size) return SUCCESS;
            if (size != m->bytes) return INVALID_USAGE;
        }
        m->begun = 1;
    }
    const uint64_t written = atomic_load(&b->written), read = atomic_load(&b->read);
    size_t         n = m->bytes - m->done < CHUNK ? m->bytes - m->done : CHUNK;
    if (m->send && written == read && n) {
        memcpy(b->chunk, m->p + m->done, n);
        atomic_store(&b->written, written + n);
        m->done += n;
    }
    if (!m->send && written != read) {
        n = written - read;
        memcpy(m->p + m->done, b->chunk, n);
        m->done += n;
        if (m->done == m->bytes) atomic_store(&b->size, 0);
        atomic_store(&b->read, written);
    }
    return SUCCESS;
}

API int ncclCommGetAsyncError(communicator *c, int *state) {
    if (c->opening && atomic_load(&c->board->arrived) >= c->ranks) c->opening = 0, c->state = SUCCESS;
    int left = c->opening, result = SUCCESS;
    for (int i = 0; i < c->n && !c->opening; i++) {
        call *m = &c->calls[i];
        int   waits = 0;                                        // behind an earlier call of the same pair
        for (int e = 0; e < i; e++)
            waits |= c->calls[e].done < c->calls[e].bytes && c->calls[e].send == m->send && c->calls[e].peer == m->peer;
        if (!waits && m->done < m->bytes && result == SUCCESS) result = advance(c, m);
        left |= m->done < m->bytes;
    }
    if (result == SUCCESS && left) result = IN_PROGRESS;
    if (c->state == SUCCESS || c->state == IN_PROGRESS) c->state = result;
    if (!left) c->n = 0;
    *state = c->state;
    return SUCCESS;
}

static int post(void *p, size_t count, int type, int peer, communicator *c, int send) {
    if (type != 0 || !count || peer < 0 || peer >= c->ranks || c->n == MAX_CALLS || !group) return INVALID_USAGE;
    if (c->state != SUCCESS && c->n == 0) return INVALID_USAGE; // the last group has not ended
    c->calls[c->n++] = (call){p, count, 0, send, peer, 0};
    grouped = c;
    return SUCCESS;
}
API int ncclSend(const void *p, size_t count, int type, int peer, communicator *c, void *stream) {
    (void)stream;
    return post((void *)(uintptr_t)p, count, type, peer, c, 1);
}
API int ncclRecv(void *p, size_t count, int type, int peer, communicator *c, void *stream) {
    (void)stream;
    return post(p, count, type, peer, c, 0);
}
API int ncclGroupStart(void) { return group++, SUCCESS; }
API int ncclGroupEnd(void) {
    if (--group) return group < 0 ? INVALID_USAGE : SUCCESS;
    if (!grouped) return SUCCESS;
    grouped->state = IN_PROGRESS, grouped = NULL;
    return IN_PROGRESS;
}

API int ncclCommFinalize(communicator *c) { return c->n ? INVALID_USAGE : SUCCESS; }
API int ncclCommDestroy(communicator *c) {
    munmap(c->board, c->board_bytes);
    free(c);
    return SUCCESS;
}
API int ncclCommAbort(communicator *c) { return ncclCommDestroy(c); }
