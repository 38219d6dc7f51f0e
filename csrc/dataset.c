// dataset.c: the order in which training reads its documents, as index arrays over a .bin of tokens; and the reading.
//
//   shuffle       order_n: a permutation of 0..n-1, a function of (seed, stream, n) alone; a stream is an epoch
//   sample_index  where each sample of length+1 tokens begins, the documents being laid end to end; neighbouring
//                 samples share one token, the last target of one and the first input of the next
//   blend         which data set each row of a mixture comes from, and which row of that set's own it is
//   samples       the tokens of some samples, with the number of the document that each token is of
//
// Document and sample numbers are I32 or I64 (`dtype`): at 10^8 samples half the bytes are half the time. Serial: a
// shuffle is a chain of swaps, an index is one pass over the documents. Both touch memory at random, so what will be
// touched is asked for a few dozen steps ahead.
#include <string.h>
#include "moe.h"
#include "philox.h"

enum { AHEAD = 64 };        // steps between asking for a cache line and using it

static bool is_number(int dtype) { return dtype == MOE_I32 || dtype == MOE_I64; }
static inline int64_t get(int dtype, const void *x, int64_t i) {
    return dtype == MOE_I32 ? ((const int32_t *)x)[i] : ((const int64_t *)x)[i];
}
static inline void put(int dtype, void *y, int64_t i, int64_t value) {
    if (dtype == MOE_I32) ((int32_t *)y)[i] = (int32_t)value;
    else ((int64_t *)y)[i] = value;
}
static inline void fetch(int dtype, const void *x, int64_t i) {
    __builtin_prefetch((const char *)x + i * moe_size(dtype));
}

// place_b[b] for each i = end - b above 0, b below AHEAD: a random one of the places 0..i. Counter {low i, high i, low
// stream, high stream}, key {low seed, high seed}, 64 random bits modulo i+1, which favours no place by more than (i+1) /
// 2^64. The rounds are those of philox(), for all of the block side by side, so that the compiler makes vectors of them.
static inline void draw(int dtype, uint64_t seed, int64_t stream, int64_t end, const void *order_n, int64_t *place_b) {
    uint32_t w0[AHEAD], w1[AHEAD], w2[AHEAD], w3[AHEAD], key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int b = 0; b < AHEAD; b++) {
        w0[b] = (uint32_t)(end - b);
        w1[b] = (uint32_t)((uint64_t)(end - b) >> 32);
        w2[b] = (uint32_t)stream;
        w3[b] = (uint32_t)((uint64_t)stream >> 32);
    }
    for (int round = 0; round < 10; round++) {
        for (int b = 0; b < AHEAD; b++) {
            const uint64_t x = (uint64_t)w0[b] * 0xD2511F53u, y = (uint64_t)w2[b] * 0xCD9E8D57u;
            w0[b] = (uint32_t)(y >> 32) ^ w1[b] ^ key0;
            w1[b] = (uint32_t)y;
            w2[b] = (uint32_t)(x >> 32) ^ w3[b] ^ key1;
            w3[b] = (uint32_t)x;
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    for (int b = 0; b < AHEAD && b < end; b++) {
        place_b[b] = (int64_t)(((uint64_t)w1[b] << 32 | w0[b]) % ((uint64_t)(end - b) + 1));
        fetch(dtype, order_n, place_b[b]);
    }
}

// Fisher-Yates: place i takes a random one of the places 0..i. The places of the next block are drawn, and asked for,
// before this block's swaps.
static inline void shuffle(int dtype, uint64_t seed, int64_t stream, int64_t n, void *order_n) {
    int64_t places[2][AHEAD];
    for (int64_t i = 0; i < n; i++) put(dtype, order_n, i, i);
    draw(dtype, seed, stream, n - 1, order_n, places[0]);
    for (int64_t end = n - 1, now = 0; end > 0; end -= AHEAD, now = !now) {
        draw(dtype, seed, stream, end - AHEAD, order_n, places[!now]);
        for (int64_t i = end; i > end - AHEAD && i > 0; i--) {
            const int64_t j = places[now][end - i], swap = get(dtype, order_n, i);
            put(dtype, order_n, i, get(dtype, order_n, j));
            put(dtype, order_n, j, swap);
        }
    }
}

int moe_shuffle(int dtype, uint64_t seed, int64_t stream, int64_t n, void *order_n) {
    if (!is_number(dtype)) return MOE_BAD_DTYPE;
    if (n < 0 || (dtype == MOE_I32 && n > INT32_MAX)) return MOE_BAD_SHAPE;
    if (dtype == MOE_I32) shuffle(MOE_I32, seed, stream, n, order_n);
    else shuffle(MOE_I64, seed, stream, n, order_n);
    return MOE_OK;
}

static inline int sample_index(int dtype, int64_t docs_n, const void *docs, int64_t sizes_n, const int32_t *sizes,
                               int64_t length, int64_t samples, void *doc, int32_t *offset) {
    const int64_t wanted = samples ? samples * length + 1 : 0;
    int64_t tokens = 0, i = 0, begin = 0;       // sample i begins at token `begin` of document d, or later
    for (int64_t d = 0; tokens < wanted; d++) {
        if (d == docs_n) return MOE_BAD_SHAPE;
        const int64_t document = get(dtype, docs, d);
        if (document < 0 || document >= sizes_n) return MOE_BAD_INDEX;
        if (sizes[document] < 0) return MOE_BAD_VALUE;
        if (d + AHEAD < docs_n) fetch(MOE_I32, sizes, get(dtype, docs, d + AHEAD));
        for (; begin < sizes[document] && i < samples; i++, begin += length) {
            put(dtype, doc, i, d);
            offset[i] = (int32_t)begin;
        }
        begin -= sizes[document];
        tokens += sizes[document];
    }
    return MOE_OK;
}

int moe_sample_index(int dtype, int64_t docs_n, const void *docs, int64_t sizes_n, const int32_t *sizes,
                     int64_t length, int64_t samples, void *doc, int32_t *offset) {
    if (!is_number(dtype)) return MOE_BAD_DTYPE;
    if (docs_n < 0 || sizes_n < 0 || length < 1 || samples < 0) return MOE_BAD_SHAPE;
    if (samples > (INT64_MAX - 1) / length) return MOE_BAD_SHAPE;
    return dtype == MOE_I32 ? sample_index(MOE_I32, docs_n, docs, sizes_n, sizes, length, samples, doc, offset)
                            : sample_index(MOE_I64, docs_n, docs, sizes_n, sizes, length, samples, doc, offset);
}

// The set that is furthest behind its share gives the row, the first of several. Row 0 counts as row 1, so that it
// goes to the largest share: the rule and the arithmetic of Megatron-Core's build_blending_indices.
int moe_blend(int64_t sets, const double *weights, int64_t first, int64_t rows, int64_t *taken, int32_t *set_R,
              int64_t *row_R) {
    if (sets < 1 || sets > INT32_MAX || first < 0 || rows < 0 || first > INT64_MAX - rows) return MOE_BAD_SHAPE;
    for (int64_t r = 0; r < rows; r++) {
        const double so_far = first + r > 0 ? (double)(first + r) : 1.0;
        int32_t furthest = 0;
        double  behind = -INFINITY;
        for (int32_t k = 0; k < sets; k++) {
            const double by = weights[k] * so_far - (double)taken[k];
            if (by > behind) behind = by, furthest = k;
        }
        set_R[r] = furthest;
        row_R[r] = taken[furthest]++;
    }
    return MOE_OK;
}

int moe_samples(int dtype, int64_t bytes, const void *tokens, int64_t starts_n, const int64_t *starts, int64_t docs_n,
                const void *docs, int64_t rows, const int64_t *doc_R, const int64_t *offset_R, int64_t length,
                void *tokens_RL, int32_t *documents_RL) {
    if (!is_number(dtype)) return MOE_BAD_DTYPE;
    if (bytes < 1 || starts_n < 1 || docs_n < 0 || rows < 0 || length < 0) return MOE_BAD_SHAPE;
    for (int64_t r = 0; r < rows; r++) {
        int64_t place = doc_R[r], offset = offset_R[r], filled = 0;
        for (int32_t number = 0; filled < length; place++, offset = 0) {
            if (place < 0 || place >= docs_n) return MOE_BAD_INDEX;
            const int64_t document = get(dtype, docs, place);
            if (document < 0 || document >= starts_n - 1) return MOE_BAD_INDEX;
            const int64_t begin = starts[document] + offset, left = starts[document + 1] - begin;
            if (offset < 0 || left < 0) return MOE_BAD_INDEX;
            const int64_t take = left < length - filled ? left : length - filled, at = r * length + filled;
            if (tokens_RL)
                memcpy((char *)tokens_RL + at * bytes, (const char *)tokens + begin * bytes, (size_t)(take * bytes));
            for (int64_t t = 0; t < take; t++) documents_RL[at + t] = number;
            number += take > 0;
            filled += take;
        }
    }
    return MOE_OK;
}
