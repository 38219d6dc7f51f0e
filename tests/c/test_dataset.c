// test_dataset.c: the index arrays of a dataset against what they are defined to be, element by element.
#include "check.h"
#include "philox.h"

static void test_shuffle(void) {
    enum { N = 1000 };
    int64_t a[N], b[N], seen[N] = {0};
    CHECK_OK(moe_shuffle(MOE_I64, 1, 0, N, a));
    CHECK_OK(moe_shuffle(MOE_I64, 1, 0, N, b));
    CHECK(!memcmp(a, b, sizeof a), "not a function of its arguments");
    for (int i = 0; i < N; i++) seen[a[i] >= 0 && a[i] < N ? a[i] : 0]++;
    for (int i = 0; i < N; i++) CHECK(seen[i] == 1, "%d appears %d times", i, (int)seen[i]);
    for (uint64_t seed = 1; seed < 3; seed++)       // another seed, another stream: about one element stays in place
        for (int64_t stream = 0; stream < 2; stream++) {
            CHECK_OK(moe_shuffle(MOE_I64, seed, stream, N, b));
            int same = 0;
            for (int i = 0; i < N; i++) same += a[i] == b[i];
            CHECK((seed == 1 && stream == 0) == (same == N) && (same == N || same < 10), "%d of %d in place", same, N);
        }
    int first[3][3] = {{0}};                        // each of 3 items as often in each of 3 places
    for (int64_t stream = 0; stream < 3000; stream++) {
        CHECK_OK(moe_shuffle(MOE_I64, 9, stream, 3, b));
        for (int i = 0; i < 3; i++) first[b[i]][i]++;
    }
    for (int i = 0; i < 9; i++)
        CHECK(abs(first[i / 3][i % 3] - 1000) < 130, "item %d in place %d: %d", i / 3, i % 3, first[i / 3][i % 3]);
    CHECK_OK(moe_shuffle(MOE_I64, 1, 0, 0, NULL));
    CHECK_STATUS(moe_shuffle(MOE_I64, 1, 0, -1, a), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_shuffle(MOE_I32, 1, 0, (int64_t)INT32_MAX + 1, a), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_shuffle(MOE_I16, 1, 0, 1, a), MOE_BAD_DTYPE);
}

// Element by element, as the comment in dataset.c has it, around the length of its blocks; both dtypes.
static void test_shuffle_is_fisher_yates(void) {
    enum { N = 300 };
    const uint64_t seed = 0x123456789abcdef0;
    const int64_t stream = 0x100000003;
    for (int n = 0; n < N; n++) {
        int64_t want[N], wide[N];
        int32_t narrow[N];
        for (int i = 0; i < n; i++) want[i] = i;
        for (int i = n - 1; i > 0; i--) {
            const philox_block bits = philox((philox_block){{(uint32_t)i, 0, 3, 1}}, 0x9abcdef0, 0x12345678);
            const int j = (int)(((uint64_t)bits.word[1] << 32 | bits.word[0]) % ((uint64_t)i + 1));
            const int64_t swap = want[i];
            want[i] = want[j];
            want[j] = swap;
        }
        CHECK_OK(moe_shuffle(MOE_I64, seed, stream, n, wide));
        CHECK_OK(moe_shuffle(MOE_I32, seed, stream, n, narrow));
        for (int i = 0; i < n; i++)
            CHECK(wide[i] == want[i] && narrow[i] == want[i], "place %d of %d: %d and %d, want %d", i, n, (int)wide[i],
                  (int)narrow[i], (int)want[i]);
    }
}

static void test_sample_index(void) {
    const int32_t sizes[] = {5, 0, 1, 7, 0};        // in the order below: 7 tokens, 0, 5, 1, 7, 0 = 20
    const int64_t docs[] = {3, 1, 0, 2, 3, 4}, bad_docs[] = {3, 5};
    const int32_t narrow_docs[] = {3, 1, 0, 2, 3, 4};
    int64_t at_doc[20], at_offset[20];              // each token of the documents laid end to end
    int n = 0;
    for (int d = 0; d < 6; d++)
        for (int t = 0; t < sizes[docs[d]]; t++, n++) at_doc[n] = d, at_offset[n] = t;
    for (int64_t length = 1; length < 20; length++) {
        const int64_t samples = 19 / length;        // room for one more, which is refused
        int64_t *doc = check_alloc(8 * (samples + 1));
        int32_t *offset = check_alloc(4 * (samples + 1)), *narrow = check_alloc(4 * (samples + 1));
        CHECK_STATUS(moe_sample_index(MOE_I64, 6, docs, 5, sizes, length, samples + 1, doc, offset), MOE_BAD_SHAPE);
        for (int dtype = MOE_I32; dtype <= MOE_I64; dtype++) {
            memset(offset, 0xff, 4 * (size_t)samples);
            CHECK_OK(dtype == MOE_I32
                     ? moe_sample_index(dtype, 6, narrow_docs, 5, sizes, length, samples, narrow, offset)
                     : moe_sample_index(dtype, 6, docs, 5, sizes, length, samples, doc, offset));
            for (int64_t i = 0; i < samples; i++) {
                const int64_t got = dtype == MOE_I32 ? narrow[i] : doc[i];
                CHECK(got == at_doc[i * length] && offset[i] == at_offset[i * length],
                      "length %d, sample %d begins in %d at %d", (int)length, (int)i, (int)got, (int)offset[i]);
            }
        }
        free(doc); free(offset); free(narrow);
    }
    int64_t doc;
    int32_t offset;
    const int32_t negative[] = {5, -1};
    CHECK_OK(moe_sample_index(MOE_I64, 0, NULL, 0, NULL, 4, 0, NULL, NULL));
    CHECK_STATUS(moe_sample_index(MOE_I64, 2, bad_docs, 5, sizes, 7, 1, &doc, &offset), MOE_BAD_INDEX);
    CHECK_STATUS(moe_sample_index(MOE_I64, 2, (const int64_t[]){0, 1}, 2, negative, 5, 1, &doc, &offset), MOE_BAD_VALUE);
    CHECK_STATUS(moe_sample_index(MOE_I64, 6, docs, 5, sizes, 0, 1, &doc, &offset), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_sample_index(MOE_I64, 6, docs, 5, sizes, INT64_MAX, 2, &doc, &offset), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_sample_index(MOE_F32, 6, docs, 5, sizes, 1, 1, &doc, &offset), MOE_BAD_DTYPE);
}

static void test_blend(void) {
    enum { R = 1000 };
    const double weights[] = {0.5, 0.25, 0.25};
    const int32_t want[] = {0, 1, 2, 0, 0, 1, 2, 0};        // Megatron-Core 0.16.1 gives these
    int32_t set[R], part[R];
    int64_t row[R], part_row[R], taken[3] = {0}, again[3] = {0}, seen[3] = {0};
    CHECK_OK(moe_blend(3, weights, 0, R, taken, set, row));
    for (int r = 0; r < 8; r++) CHECK(set[r] == want[r], "row %d is of set %d", r, set[r]);
    for (int r = 0; r < R; r++) {
        CHECK(row[r] == seen[set[r]]++, "row %d is row %d of its set", r, (int)row[r]);
        for (int k = 0; k < 3; k++)
            CHECK(fabs((double)seen[k] - weights[k] * (r + 1)) <= 1, "%d of %d rows are of set %d", (int)seen[k], r, k);
    }
    for (int k = 0; k < 3; k++) CHECK(taken[k] == seen[k], "took %d of set %d", (int)taken[k], k);
    for (int r = 0; r < R; r += 37)                         // in pieces it is the same
        CHECK_OK(moe_blend(3, weights, r, R - r < 37 ? R - r : 37, again, part + r, part_row + r));
    CHECK(!memcmp(part, set, sizeof set) && !memcmp(part_row, row, sizeof row), "the pieces differ from the whole");
    CHECK_STATUS(moe_blend(0, weights, 0, 1, taken, set, row), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_blend(3, weights, -1, 1, taken, set, row), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_blend(3, weights, INT64_MAX, 1, taken, set, row), MOE_BAD_SHAPE);
}

static void test_samples(void) {
    const uint16_t tokens[] = {10, 11, 12, 20, 30, 31};
    const int64_t starts[] = {0, 3, 3, 4, 6}, docs[] = {3, 1, 0, 2}, doc[] = {0, 2}, offset[] = {1, 0};
    const uint16_t want[] = {31, 10, 11, 10, 11, 12};       // an empty document counts for none
    const int32_t want_documents[] = {0, 1, 1, 0, 0, 0}, narrow_docs[] = {3, 1, 0, 2};
    for (int dtype = MOE_I32; dtype <= MOE_I64; dtype++) {
        uint16_t got[6] = {0};
        int32_t documents[6] = {0};
        const void *order = dtype == MOE_I32 ? (const void *)narrow_docs : docs;
        CHECK_OK(moe_samples(dtype, 2, tokens, 5, starts, 4, order, 2, doc, offset, 3, got, documents));
        CHECK(!memcmp(got, want, sizeof want) && !memcmp(documents, want_documents, sizeof documents), "other tokens");
        memset(documents, 0, sizeof documents);
        CHECK_OK(moe_samples(dtype, 2, tokens, 5, starts, 4, order, 2, doc, offset, 3, NULL, documents));
        CHECK(!memcmp(documents, want_documents, sizeof documents), "other documents");
    }
    uint16_t got[6];
    int32_t documents[6];
    const int64_t bad_docs[] = {4}, bad_doc[] = {4}, bad_offset[] = {-1}, far[] = {3};
    CHECK_STATUS(moe_samples(MOE_I64, 2, tokens, 5, starts, 4, docs, 1, doc + 1, offset, 4, got, documents),
                 MOE_BAD_INDEX);
    CHECK_STATUS(moe_samples(MOE_I64, 2, tokens, 5, starts, 1, bad_docs, 1, doc, offset, 3, got, documents),
                 MOE_BAD_INDEX);
    CHECK_STATUS(moe_samples(MOE_I64, 2, tokens, 5, starts, 4, docs, 1, bad_doc, offset, 3, got, documents),
                 MOE_BAD_INDEX);
    CHECK_STATUS(moe_samples(MOE_I64, 2, tokens, 5, starts, 4, docs, 1, doc, bad_offset, 3, got, documents),
                 MOE_BAD_INDEX);
    CHECK_STATUS(moe_samples(MOE_I64, 2, tokens, 5, starts, 4, docs, 1, doc, far, 3, got, documents), MOE_BAD_INDEX);
    CHECK_STATUS(moe_samples(MOE_I64, 0, tokens, 5, starts, 4, docs, 1, doc, offset, 3, got, documents), MOE_BAD_SHAPE);
}

static void tests(void) {
    test_shuffle();
    test_shuffle_is_fisher_yates();
    test_sample_index();
    test_blend();
    test_samples();
}
int main(void) { return check_main(tests); }
