/* Heads of keys and values in int8, and products of queries with such keys.
 *
 * A head is head_dim numbers and, after them, a bfloat16 scale for each group of SCALE_GROUP numbers. It depends on
 * nothing but the token that it belongs to. `int8_heads.py` computes the same with torch.
 */
#ifndef INT8_HEADS_H
#define INT8_HEADS_H

#include "attention.h"

#include <string.h>

enum {
    SCALE_GROUP = 32,
    MAX_GROUPS = MAX_HEAD_DIM / SCALE_GROUP,
    INT8_TILE_ROWS = 4, /* rows of a product with keys: 16 accumulators, 8 sums and 2 registers of keys */
    INT8_TILE_KEYS = 2 * LANES,
    MAX_QUERY_NUMBER = 127 * 128
};

static const float LEAST_MAGNITUDE = 0x1p-100f; /* smaller groups are zeros: their scales have too few bits */

static inline size_t num_groups(size_t head_dim) { return (head_dim + SCALE_GROUP - 1) / SCALE_GROUP; }

static inline size_t int8_head_bytes(size_t head_dim) { return head_dim + num_groups(head_dim) * sizeof(bfloat16); }

static inline size_t group_end(size_t begin, size_t head_dim) {
    return head_dim - begin < SCALE_GROUP ? head_dim : begin + SCALE_GROUP;
}

static inline float float_of_bits(uint32_t bits) {
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* Scale of a group of a head. */
static inline float load_scale(const int8_t *head, size_t head_dim, size_t group) {
    bfloat16 scale;
    memcpy(&scale, head + head_dim + group * sizeof scale, sizeof scale);
    return float_of_bits((uint32_t)scale << 16);
}

/* The larger magnitudes of two registers, as bits: in their order NaN is the largest. */
static inline __m512i max_magnitude(__m512i magnitudes, __m512 numbers) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(numbers), _mm512_set1_epi32(0x7fffffff));
    return _mm512_max_epi32(magnitudes, bits);
}

/* Queries of a job in 15 bits. Products with two planes of int8 are exact, and cost half of those in float32. */
typedef struct {
    int8_t high[MAX_ROWS * MAX_HEAD_DIM], low[MAX_ROWS * MAX_HEAD_DIM]; /* 128 high + low */
    /* What the 128 that is added to each key contributes to the products of a group, negative. */
    int32_t high_offsets[MAX_ROWS * MAX_GROUPS], low_offsets[MAX_ROWS * MAX_GROUPS];
    float scales[MAX_ROWS];
} Int8Queries;

typedef struct {
    uint8_t numbers[MAX_HEAD_DIM * BLOCK_KEYS]; /* + 128, (head_dim / 4, BLOCK_KEYS, 4) */
    float scales[MAX_GROUPS * BLOCK_KEYS];      /* (groups, BLOCK_KEYS) */
} Int8Keys;

static inline void quantize_query(const float *query, size_t head_dim, size_t row, Int8Queries *queries) {
    __m512i magnitudes = _mm512_setzero_si512();
    for (size_t i = 0; i < head_dim; i += LANES) magnitudes = max_magnitude(magnitudes, _mm512_loadu_ps(query + i));
    const float magnitude = float_of_bits((uint32_t)_mm512_reduce_max_epi32(magnitudes));
    const float scale = magnitude / MAX_QUERY_NUMBER;
    const __m512 divisor = _mm512_set1_ps(magnitude < LEAST_MAGNITUDE ? 1 : scale);
    const __m512 limit = _mm512_set1_ps(MAX_QUERY_NUMBER);
    queries->scales[row] = scale;
    for (size_t begin = 0; begin < head_dim; begin += SCALE_GROUP) {
        __m512i high_sum = _mm512_setzero_si512(), low_sum = _mm512_setzero_si512();
        for (size_t i = begin; i < group_end(begin, head_dim); i += LANES) {
            const __m512 ratio = _mm512_div_ps(_mm512_loadu_ps(query + i), divisor);
            /* NaN becomes the limit: the scale is NaN as well, and so are the scores. */
            const __m512 limited =
                _mm512_max_ps(_mm512_min_ps(ratio, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
            const __m512i numbers = _mm512_cvtps_epi32(limited);
            const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(numbers, _mm512_set1_epi32(64)), 7);
            const __m512i low = _mm512_sub_epi32(numbers, _mm512_slli_epi32(high, 7));
            _mm_storeu_si128((__m128i *)(queries->high + row * head_dim + i), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128((__m128i *)(queries->low + row * head_dim + i), _mm512_cvtepi32_epi8(low));
            high_sum = _mm512_add_epi32(high_sum, high);
            low_sum = _mm512_add_epi32(low_sum, low);
        }
        const size_t group = row * num_groups(head_dim) + begin / SCALE_GROUP;
        queries->high_offsets[group] = -128 * _mm512_reduce_add_epi32(high_sum);
        queries->low_offsets[group] = -128 * _mm512_reduce_add_epi32(low_sum);
    }
}

/* Transpose LANES keys, the first of which is key `column` of the block. NULL is a key of zeros. */
static inline void transpose_int8_keys(const int8_t *const *keys, size_t head_dim, size_t column, Int8Keys *block) {
    for (size_t i = 0; i < head_dim; i += 4 * LANES) {
        const size_t remaining = (head_dim - i) / 4;
        const __mmask16 mask = tail_mask(remaining);
        __m512i rows[LANES];
#pragma GCC unroll 16
        for (size_t k = 0; k < LANES; k++)
            rows[k] = keys[k] ? _mm512_maskz_loadu_epi32(mask, keys[k] + i) : _mm512_setzero_si512();
        transpose_16x16(rows);
        uint8_t *target = block->numbers + i * BLOCK_KEYS + 4 * column;
#pragma GCC unroll 16
        for (size_t j = 0; j < LANES; j++)
            if (j < remaining)
                _mm512_storeu_si512(
                    target + 4 * j * BLOCK_KEYS, _mm512_xor_si512(rows[j], _mm512_set1_epi8((char)0x80)));
    }
}

static inline void dequantize(const int8_t *numbers, __m512 scale, float *output) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)numbers));
    _mm512_storeu_ps(output, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), scale));
}

/* Convert a head to float32. */
static inline void dequantize_head(const int8_t *head, size_t head_dim, float *output) {
    size_t i = 0;
    for (; i + SCALE_GROUP <= head_dim; i += SCALE_GROUP) {
        const __m512 scale = _mm512_set1_ps(load_scale(head, head_dim, i / SCALE_GROUP));
        dequantize(head + i, scale, output + i);
        dequantize(head + i + LANES, scale, output + i + LANES);
    }
    if (i < head_dim) dequantize(head + i, _mm512_set1_ps(load_scale(head, head_dim, i / SCALE_GROUP)), output + i);
}

static inline __m512i broadcast_four(const int8_t *numbers) {
    int32_t four;
    memcpy(&four, numbers, sizeof four);
    return _mm512_set1_epi32(four);
}

/* Scores of `rows` queries from `row` on, and of INT8_TILE_KEYS keys from `column` on. */
static inline __attribute__((always_inline)) void score_int8_tile(const Int8Queries *queries, const Int8Keys *keys,
    size_t head_dim, size_t row, size_t column, float *scores, size_t rows) {
    const size_t groups = num_groups(head_dim);
    __m512 sums[INT8_TILE_ROWS][2];
#pragma GCC unroll 4
    for (size_t r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (size_t group = 0; group < groups; group++) {
        __m512i high[INT8_TILE_ROWS][2], low[INT8_TILE_ROWS][2];
#pragma GCC unroll 4
        for (size_t r = 0; r < rows; r++) {
            high[r][0] = high[r][1] = _mm512_set1_epi32(queries->high_offsets[(row + r) * groups + group]);
            low[r][0] = low[r][1] = _mm512_set1_epi32(queries->low_offsets[(row + r) * groups + group]);
        }
        for (size_t i = group * SCALE_GROUP; i < group_end(group * SCALE_GROUP, head_dim); i += 4) {
            const uint8_t *numbers = keys->numbers + i * BLOCK_KEYS + 4 * column;
            const __m512i left = _mm512_loadu_si512(numbers), right = _mm512_loadu_si512(numbers + 4 * LANES);
#pragma GCC unroll 4
            for (size_t r = 0; r < rows; r++) {
                const __m512i high_four = broadcast_four(queries->high + (row + r) * head_dim + i);
                const __m512i low_four = broadcast_four(queries->low + (row + r) * head_dim + i);
                high[r][0] = _mm512_dpbusd_epi32(high[r][0], left, high_four);
                high[r][1] = _mm512_dpbusd_epi32(high[r][1], right, high_four);
                low[r][0] = _mm512_dpbusd_epi32(low[r][0], left, low_four);
                low[r][1] = _mm512_dpbusd_epi32(low[r][1], right, low_four);
            }
        }
#pragma GCC unroll 2
        for (size_t v = 0; v < 2; v++) {
            const __m512 scale = _mm512_loadu_ps(keys->scales + group * BLOCK_KEYS + column + v * LANES);
#pragma GCC unroll 4
            for (size_t r = 0; r < rows; r++) {
                const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(high[r][v], 7), low[r][v]);
                sums[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, sums[r][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (size_t r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (size_t v = 0; v < 2; v++)
            _mm512_storeu_ps(scores + r * BLOCK_KEYS + column + v * LANES,
                _mm512_mul_ps(sums[r][v], _mm512_set1_ps(queries->scales[row + r])));
}

/* Scores of at most INT8_TILE_ROWS queries from `row` on, (rows, BLOCK_KEYS), of the first `num_keys` keys at least. */
static inline void score_int8(const Int8Queries *queries, const Int8Keys *keys, size_t head_dim, size_t row,
    size_t rows, size_t num_keys, float *scores) {
    for (size_t column = 0; column < num_keys; column += INT8_TILE_KEYS) switch (rows) {
        case 1:
            score_int8_tile(queries, keys, head_dim, row, column, scores, 1);
            break;
        case 2:
            score_int8_tile(queries, keys, head_dim, row, column, scores, 2);
            break;
        case 3:
            score_int8_tile(queries, keys, head_dim, row, column, scores, 3);
            break;
        case 4:
            score_int8_tile(queries, keys, head_dim, row, column, scores, 4);
            break;
        }
}

#endif
