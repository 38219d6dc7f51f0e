// message.h: where the parts of one row of an exchanged message begin. Shared by csrc/exchange.c and cuda/exchange.cu.
//
//   [ D values | K words: local id + 1, 0 elsewhere | K weights ]
// Each part that there is starts at a multiple of 16 bytes, and so does the next row; between them zeros. Values alone
// have no padding. (No word is -1: read as a float of any kind, a message holds no NaN that its values do not hold.)
#ifndef MOE_MESSAGE_H
#define MOE_MESSAGE_H
#include "moe.h"

typedef struct { int64_t ids, weights, bytes; } message_parts;      // offsets in a row, and its length

static inline int64_t message_size(int dtype) { return dtype == MOE_F64 ? 8 : dtype == MOE_F32 ? 4 : 2; }
static inline int64_t message_align(int64_t bytes) { return (bytes + 15) / 16 * 16; }
static inline message_parts message_layout(const moe_message *m) {
    message_parts p;
    p.ids     = m->D * message_size(m->dtype);
    if (!m->ids && !m->weights) {
        p.weights = p.bytes = p.ids;
        return p;
    }
    p.ids     = message_align(p.ids);
    p.weights = p.ids + (m->ids ? message_align(4 * m->K) : 0);
    p.bytes   = p.weights + (m->weights ? message_align(m->K * message_size(m->wdtype)) : 0);
    return p;
}

// What both sides ask of a message and of a plan before they touch memory.
static inline int message_check(const moe_message *m) {
    if (m->dtype < MOE_F64 || m->dtype > MOE_F16) return MOE_BAD_DTYPE;
    if (m->weights && m->wdtype != MOE_F32 && m->wdtype != m->dtype) return MOE_BAD_DTYPE;
    if (m->D < 0 || m->D > INT32_MAX || m->K < 0 || m->K > MOE_MAX_EXPERTS) return MOE_BAD_SHAPE;
    return MOE_OK;
}
// T tokens or rows, at most P messages each, over E experts.
static inline int exchange_check(int64_t T, int64_t E, int64_t P) {
    if (T < 0 || E < 0 || P < 1 || P > MOE_MAX_EXPERTS || E % P || E > INT32_MAX) return MOE_BAD_SHAPE;
    return T > INT32_MAX / P ? MOE_BAD_SHAPE : MOE_OK;
}
#endif
