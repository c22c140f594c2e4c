/* Rotary position embedding of queries and keys, and their conversion, with that of the values, to bfloat16. */
#include "kernels.h"
#include "simd_avx512.h"

enum { SERIAL_TOKENS = 8 }; /* below, waking threads takes longer than the work */

static inline void store_bfloat16(bfloat16 *output, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(output, mask, to_bfloat16(x));
}

static void convert(const float *input, bfloat16 *output, size_t count) {
    for (size_t i = 0; i < count; i += LANES) {
        const __mmask16 mask = tail_mask(count - i);
        store_bfloat16(output + i, mask, _mm512_maskz_loadu_ps(mask, input + i));
    }
}

/* `sin` has the sign of each feature's partner: the first half is negated. */
static void rotate_head(const float *head, const float *cos, const float *sin, bfloat16 *output, size_t half) {
    for (size_t i = 0; i < half; i += LANES) {
        const __mmask16 mask = tail_mask(half - i);
        const __m512 left = _mm512_maskz_loadu_ps(mask, head + i), right = _mm512_maskz_loadu_ps(mask, head + half + i);
        const __m512 cos_left = _mm512_maskz_loadu_ps(mask, cos + i), sin_left = _mm512_maskz_loadu_ps(mask, sin + i);
        const __m512 cos_right = _mm512_maskz_loadu_ps(mask, cos + half + i);
        const __m512 sin_right = _mm512_maskz_loadu_ps(mask, sin + half + i);
        store_bfloat16(output + i, mask, _mm512_fmadd_ps(right, sin_left, _mm512_mul_ps(left, cos_left)));
        store_bfloat16(output + half + i, mask, _mm512_fmadd_ps(left, sin_right, _mm512_mul_ps(right, cos_right)));
    }
}

void rotate_to_bf16(const float *heads, const float *cos, const float *sin, bfloat16 *output, size_t num_tokens,
    size_t num_heads, size_t num_rotated_heads, size_t head_dim, size_t rotary_dim, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_tokens >= SERIAL_TOKENS)
    for (size_t token = 0; token < num_tokens; token++)
        for (size_t head = 0; head < num_heads; head++) {
            const size_t offset = (token * num_heads + head) * head_dim, angles = token * rotary_dim;
            const size_t rotated = head < num_rotated_heads ? rotary_dim : 0;
            rotate_head(heads + offset, cos + angles, sin + angles, output + offset, rotated / 2);
            convert(heads + offset + rotated, output + offset + rotated, head_dim - rotated);
        }
}
