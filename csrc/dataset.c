// dataset.c: the order in which training reads its documents, as index arrays over a .bin of tokens.
//
//   shuffle       order_n: a permutation of 0..n-1, a function of (seed, stream, n) alone; a stream is an epoch
//   sample_index  where each sample of length+1 tokens begins, the documents being laid end to end; neighbouring
//                 samples share one token, the last target of one and the first input of the next
//
// Serial: a shuffle is a chain of swaps, an index is one pass over the documents.
#include "moe.h"
#include "philox.h"

// Fisher-Yates: place i takes a random one of the places 0..i. Counter {low i, high i, low stream, high stream}, key
// {low seed, high seed}. 64 random bits modulo i+1 favour no place by more than (i+1) / 2^64.
int moe_shuffle(uint64_t seed, int64_t stream, int64_t n, int64_t *order_n) {
    if (n < 0) return MOE_BAD_SHAPE;
    for (int64_t i = 0; i < n; i++) order_n[i] = i;
    for (int64_t i = n - 1; i > 0; i--) {
        const philox_block counter = {{(uint32_t)i, (uint32_t)((uint64_t)i >> 32),
                                       (uint32_t)stream, (uint32_t)((uint64_t)stream >> 32)}};
        const philox_block bits = philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
        const uint64_t j = ((uint64_t)bits.word[1] << 32 | bits.word[0]) % ((uint64_t)i + 1);
        const int64_t swap = order_n[i];
        order_n[i] = order_n[j];
        order_n[j] = swap;
    }
    return MOE_OK;
}

int moe_sample_index(int64_t docs_n, const int64_t *docs, int64_t sizes_n, const int32_t *sizes, int64_t length,
                     int64_t samples, int64_t *doc, int64_t *offset) {
    if (docs_n < 0 || sizes_n < 0 || length < 1 || samples < 0) return MOE_BAD_SHAPE;
    if (samples > (INT64_MAX - 1) / length) return MOE_BAD_SHAPE;
    int64_t tokens = 0;
    for (int64_t d = 0; d < docs_n; d++) {
        if (docs[d] < 0 || docs[d] >= sizes_n) return MOE_BAD_INDEX;
        if (sizes[docs[d]] < 0) return MOE_BAD_VALUE;
        tokens += sizes[docs[d]];
    }
    if (samples > 0 && tokens < samples * length + 1) return MOE_BAD_SHAPE;

    int64_t d = 0, at = 0;                      // token `at` of document docs[d]
    for (int64_t i = 0; i < samples; i++) {
        while (at >= sizes[docs[d]]) at -= sizes[docs[d++]];
        doc[i] = d;
        offset[i] = at;
        at += length;
    }
    return MOE_OK;
}
