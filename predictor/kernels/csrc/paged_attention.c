/* Attention of decoding sequences, one query each, over a paged bfloat16 KV cache that is read in place.
 *
 * Each sequence is computed by itself in float32, in blocks of keys with an online softmax. Its result is therefore
 * bit-identical in any batch.
 */
#include "kernels.h"
#include "simd_avx512.h"

#include <math.h>

enum {
    BLOCK_KEYS = 32,  /* keys per block: they and their values stay in the L1 cache */
    MAX_QUERIES = 16, /* query heads per KV head; `supports_paged_attention` in ops.py enforces both limits */
    MAX_HEAD_DIM = 128
};

static inline __m512 bf16_to_f32(const bfloat16 *numbers) {
    const __m256i halves = _mm256_loadu_si256((const __m256i *)numbers);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

static inline void bf16_row_to_f32(const bfloat16 *row, size_t head_dim, float *output) {
    for (size_t i = 0; i < head_dim; i += LANES) _mm512_storeu_ps(output + i, bf16_to_f32(row + i));
}

/* Horizontal sums of 16 registers, as one register: four rounds that each halve the number of registers. */
static inline __m512 reduce_add_16x16(const __m512 *rows) {
    __m512 eight[8], four[4], two[2];
    for (int i = 0; i < 8; i++, rows += 2)
        eight[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[0], rows[1]));
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(eight[2 * i]), b = _mm512_castps_pd(eight[2 * i + 1]);
        const __m512d low = _mm512_unpacklo_pd(a, b), high = _mm512_unpackhi_pd(a, b);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    }
    for (int i = 0; i < 2; i++) {
        const __m512 a = four[2 * i], b = four[2 * i + 1];
        two[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
}

/* The queries of one sequence that share a KV head. `head_dim` is constant where inlined, to unroll its loops. */
static inline __attribute__((always_inline)) void attend_kv_head(const bfloat16 *query, const bfloat16 *key_cache,
    const bfloat16 *value_cache, size_t slot_stride, const int64_t *slot, const int64_t *slot_end, size_t num_queries,
    size_t head_dim, float scale, float *output) {
    float q[MAX_QUERIES][MAX_HEAD_DIM], block[BLOCK_KEYS][MAX_HEAD_DIM], scores[MAX_QUERIES][BLOCK_KEYS];
    float running_max[MAX_QUERIES], running_sum[MAX_QUERIES];
    for (size_t h = 0; h < num_queries; h++) {
        running_max[h] = -INFINITY;
        running_sum[h] = 0;
        for (size_t i = 0; i < head_dim; i += LANES) {
            const __m512 row = bf16_to_f32(query + h * head_dim + i);
            _mm512_storeu_ps(q[h] + i, _mm512_mul_ps(row, _mm512_set1_ps(scale)));
            _mm512_storeu_ps(output + h * head_dim + i, _mm512_setzero_ps());
        }
    }
    for (; slot < slot_end; slot += BLOCK_KEYS) {
        const size_t n_keys = slot_end - slot < BLOCK_KEYS ? (size_t)(slot_end - slot) : BLOCK_KEYS;
        for (size_t k = 0; k < n_keys; k++) bf16_row_to_f32(key_cache + slot[k] * slot_stride, head_dim, block[k]);
        for (size_t h = 0; h < num_queries; h++) {
            for (size_t first = 0; first < BLOCK_KEYS; first += LANES) {
                __m512 products[LANES];
#pragma GCC unroll 16
                for (size_t k = 0; k < LANES; k++) {
                    products[k] = _mm512_setzero_ps();
#pragma GCC unroll 8
                    for (size_t i = 0; i < head_dim; i += LANES) {
                        const __m512 key = _mm512_loadu_ps(block[first + k] + i);
                        products[k] = _mm512_fmadd_ps(_mm512_loadu_ps(q[h] + i), key, products[k]);
                    }
                }
                _mm512_storeu_ps(scores[h] + first, reduce_add_16x16(products));
            }
            for (size_t k = n_keys; k < BLOCK_KEYS; k++) scores[h][k] = -INFINITY;
        }
        for (size_t k = 0; k < n_keys; k++) bf16_row_to_f32(value_cache + slot[k] * slot_stride, head_dim, block[k]);
        for (size_t h = 0; h < num_queries; h++) {
            const __m512 left = _mm512_loadu_ps(scores[h]), right = _mm512_loadu_ps(scores[h] + LANES);
            const float block_max = _mm512_reduce_max_ps(_mm512_max_ps(left, right));
            const float new_max = block_max > running_max[h] ? block_max : running_max[h];
            const __m512 shift = _mm512_set1_ps(new_max);
            const __m512 left_exp = exp_ps(_mm512_sub_ps(left, shift)), right_exp = exp_ps(_mm512_sub_ps(right, shift));
            const float rescale = _mm512_cvtss_f32(exp_ps(_mm512_set1_ps(running_max[h] - new_max)));
            _mm512_storeu_ps(scores[h], left_exp);
            _mm512_storeu_ps(scores[h] + LANES, right_exp);
            running_max[h] = new_max;
            running_sum[h] = running_sum[h] * rescale + _mm512_reduce_add_ps(_mm512_add_ps(left_exp, right_exp));
            __m512 sum[MAX_HEAD_DIM / LANES];
#pragma GCC unroll 8
            for (size_t i = 0; i < head_dim / LANES; i++)
                sum[i] = _mm512_mul_ps(_mm512_loadu_ps(output + h * head_dim + i * LANES), _mm512_set1_ps(rescale));
            for (size_t k = 0; k < n_keys; k++)
#pragma GCC unroll 8
                for (size_t i = 0; i < head_dim / LANES; i++) {
                    const __m512 value = _mm512_loadu_ps(block[k] + i * LANES);
                    sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(scores[h][k]), value, sum[i]);
                }
#pragma GCC unroll 8
            for (size_t i = 0; i < head_dim / LANES; i++) _mm512_storeu_ps(output + h * head_dim + i * LANES, sum[i]);
        }
    }
    for (size_t h = 0; h < num_queries; h++)
        for (size_t i = 0; i < head_dim; i += LANES) {
            float *row = output + h * head_dim + i;
            _mm512_storeu_ps(row, _mm512_div_ps(_mm512_loadu_ps(row), _mm512_set1_ps(running_sum[h])));
        }
}

void paged_attention(const bfloat16 *query, size_t query_stride, const bfloat16 *key_cache, const bfloat16 *value_cache,
    size_t slot_stride, const int64_t *slot_mapping, const int64_t *kv_ranges, const int64_t *query_indices,
    size_t num_seqs, size_t num_heads, size_t num_kv_heads, size_t head_dim, float scale, float *output,
    int num_threads) {
    const size_t num_queries = num_heads / num_kv_heads;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic) /* Sequences differ in length. */
    for (size_t job = 0; job < num_seqs * num_kv_heads; job++) {
        const size_t seq = job / num_kv_heads, kv_head = job % num_kv_heads, head = kv_head * num_queries;
        const bfloat16 *q = query + (size_t)query_indices[seq] * query_stride + head * head_dim;
        const bfloat16 *keys = key_cache + kv_head * head_dim, *values = value_cache + kv_head * head_dim;
        const int64_t *slot = slot_mapping + kv_ranges[2 * seq], *slot_end = slot_mapping + kv_ranges[2 * seq + 1];
        float *attn_output = output + (seq * num_heads + head) * head_dim;
#define CASE_HEAD_DIM(dim)                                                                                             \
    case dim:                                                                                                          \
        attend_kv_head(q, keys, values, slot_stride, slot, slot_end, num_queries, dim, scale, attn_output);            \
        break;
        switch (head_dim) {
            CASE_HEAD_DIM(32)
            CASE_HEAD_DIM(64)
            CASE_HEAD_DIM(96)
            CASE_HEAD_DIM(128)
        }
#undef CASE_HEAD_DIM
    }
}
