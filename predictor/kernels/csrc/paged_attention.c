/* Attention of sequences that decode, one query each, over a paged cache in bfloat16: keys and values are read where
 * they lie.
 *
 * A sequence is computed by itself, in blocks of keys with a running softmax, in float32: its result is bit by bit the
 * same whoever else is in the batch. Knows nothing of models; `native.py` says what the function wants.
 */
#include "simd_avx512.h"
#include <math.h>
#include <stdint.h>

enum {
    KEYS = 32,     /* at once: they and their values stay in the first cache */
    QUERIES = 16,  /* at most, that share a key head; `attends` in `native.py` holds callers to that and to sizes */
    SIZE = 128     /* at most, of a head */
};

typedef uint16_t bfloat16;

static __m512 wide(const bfloat16 *numbers) {
    const __m256i halves = _mm256_loadu_si256((const __m256i *)numbers);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

static inline __m512 ps(__m512d of) { return _mm512_castpd_ps(of); }

/* The sum of each of LANES registers, in their order: four times two registers become one. */
static inline __m512 sums_of(const __m512 *of) {
    __m512 half[8], quarter[4], eighth[2];
    for (int i = 0; i < 8; i++, of += 2)
        half[i] = _mm512_add_ps(_mm512_unpacklo_ps(of[0], of[1]), _mm512_unpackhi_ps(of[0], of[1]));
    for (int i = 0; i < 4; i++) {
        const __m512d one = _mm512_castps_pd(half[2 * i]), other = _mm512_castps_pd(half[2 * i + 1]);
        quarter[i] = _mm512_add_ps(ps(_mm512_unpacklo_pd(one, other)), ps(_mm512_unpackhi_pd(one, other)));
    }
    for (int i = 0; i < 2; i++) {
        const __m512 one = quarter[2 * i], other = quarter[2 * i + 1];
        eighth[i] = _mm512_add_ps(_mm512_shuffle_f32x4(one, other, 0x88), _mm512_shuffle_f32x4(one, other, 0xdd));
    }
    return _mm512_add_ps(
        _mm512_shuffle_f32x4(eighth[0], eighth[1], 0x88), _mm512_shuffle_f32x4(eighth[0], eighth[1], 0xdd)
    );
}

/* The whole head of a key or a value, as float32. */
static inline void widen(const bfloat16 *numbers, size_t size, float *to) {
    for (size_t i = 0; i < size; i += LANES) _mm512_storeu_ps(to + i, wide(numbers + i));
}

/* `queries` queries of one sequence that share a key head. The size is a constant wherever this is inlined: its loops
 * unroll. */
static inline __attribute__((always_inline)) void attend(
    const bfloat16 *query, const bfloat16 *keys, const bfloat16 *values, size_t stride, const int64_t *place,
    const int64_t *end, size_t queries, size_t size, float scaling, float *outputs
) {
    float asked[QUERIES][SIZE], block[KEYS][SIZE], scores[QUERIES][KEYS], most[QUERIES], sums[QUERIES];
    for (size_t q = 0; q < queries; q++) {
        most[q] = -INFINITY;
        sums[q] = 0;
        for (size_t i = 0; i < size; i += LANES) {
            _mm512_storeu_ps(asked[q] + i, _mm512_mul_ps(wide(query + q * size + i), _mm512_set1_ps(scaling)));
            _mm512_storeu_ps(outputs + q * size + i, _mm512_setzero_ps());
        }
    }
    for (; place < end; place += KEYS) {
        const size_t many = end - place < KEYS ? (size_t)(end - place) : KEYS;
        for (size_t k = 0; k < many; k++) widen(keys + place[k] * stride, size, block[k]);
        for (size_t q = 0; q < queries; q++) {
            for (size_t some = 0; some < KEYS; some += LANES) {
                __m512 sum[LANES];
#pragma GCC unroll 16
                for (size_t k = 0; k < LANES; k++) {
                    sum[k] = _mm512_setzero_ps();
#pragma GCC unroll 8
                    for (size_t i = 0; i < size; i += LANES) {
                        const __m512 key = _mm512_loadu_ps(block[some + k] + i);
                        sum[k] = _mm512_fmadd_ps(_mm512_loadu_ps(asked[q] + i), key, sum[k]);
                    }
                }
                _mm512_storeu_ps(scores[q] + some, sums_of(sum));
            }
            for (size_t k = many; k < KEYS; k++) scores[q][k] = -INFINITY;
        }
        for (size_t k = 0; k < many; k++) widen(values + place[k] * stride, size, block[k]);
        for (size_t q = 0; q < queries; q++) {
            const __m512 left = _mm512_loadu_ps(scores[q]), right = _mm512_loadu_ps(scores[q] + LANES);
            const float highest = _mm512_reduce_max_ps(_mm512_max_ps(left, right));
            const float now = highest > most[q] ? highest : most[q];
            const __m512 less = _mm512_set1_ps(now);
            const __m512 a = exponential(_mm512_sub_ps(left, less)), b = exponential(_mm512_sub_ps(right, less));
            const float keep = _mm512_cvtss_f32(exponential(_mm512_set1_ps(most[q] - now)));
            _mm512_storeu_ps(scores[q], a);
            _mm512_storeu_ps(scores[q] + LANES, b);
            most[q] = now;
            sums[q] = sums[q] * keep + _mm512_reduce_add_ps(_mm512_add_ps(a, b));
            __m512 sum[SIZE / LANES];
#pragma GCC unroll 8
            for (size_t i = 0; i < size / LANES; i++)
                sum[i] = _mm512_mul_ps(_mm512_loadu_ps(outputs + q * size + i * LANES), _mm512_set1_ps(keep));
            for (size_t k = 0; k < many; k++)
#pragma GCC unroll 8
                for (size_t i = 0; i < size / LANES; i++) {
                    const __m512 value = _mm512_loadu_ps(block[k] + i * LANES);
                    sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(scores[q][k]), value, sum[i]);
                }
#pragma GCC unroll 8
            for (size_t i = 0; i < size / LANES; i++) _mm512_storeu_ps(outputs + q * size + i * LANES, sum[i]);
        }
    }
    for (size_t q = 0; q < queries; q++)
        for (size_t i = 0; i < size; i += LANES) {
            float *output = outputs + q * size + i;
            _mm512_storeu_ps(output, _mm512_div_ps(_mm512_loadu_ps(output), _mm512_set1_ps(sums[q])));
        }
}

void paged_attention(
    const bfloat16 *queries, size_t query_stride, const bfloat16 *keys, const bfloat16 *values, size_t stride,
    const int64_t *places, const int64_t *spans, const int64_t *tokens, size_t sequences, size_t heads,
    size_t key_heads, size_t size, float scaling, float *outputs, int threads
) {
    const size_t group = heads / key_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic) /* lengths differ */
    for (size_t job = 0; job < sequences * key_heads; job++) {
        const size_t sequence = job / key_heads, head = job % key_heads, token = (size_t)tokens[sequence];
        const bfloat16 *query = queries + token * query_stride + head * group * size;
        const int64_t *from = places + spans[2 * sequence], *to = places + spans[2 * sequence + 1];
        const bfloat16 *key = keys + head * size, *value = values + head * size;
        float *output = outputs + (sequence * heads + head * group) * size;
#define OF(number) case number: attend(query, key, value, stride, from, to, group, number, scaling, output); break;
        switch (size) { OF(32) OF(64) OF(96) OF(128) }
#undef OF
    }
}
