/* Quantization of keys and values for a KV cache in int8. */
#include "int8_heads.h"

#include <float.h>

enum { PARALLEL_TOKENS = 64 }; /* fewer take less time than waking threads up */

/* The bfloat16 scale of a group, rounded up, so that no number exceeds 127; NaN if the group is not finite. */
static inline bfloat16 scale_of(float magnitude) {
    if (!(magnitude <= FLT_MAX)) return 0x7fc0;
    if (magnitude < LEAST_MAGNITUDE) return 0;
    const float scale = magnitude / 127;
    uint32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    return (bfloat16)((bits + 0xffff) >> 16);
}

static inline void quantize_head(const void *head, size_t first, size_t head_dim, int is_float32, int8_t *output) {
    for (size_t begin = 0; begin < head_dim; begin += SCALE_GROUP) {
        const size_t end = group_end(begin, head_dim);
        __m512i magnitudes = _mm512_setzero_si512();
        for (size_t i = begin; i < end; i += LANES)
            magnitudes = max_magnitude(magnitudes, load(head, first + i, is_float32));
        const bfloat16 scale = scale_of(float_of_bits((uint32_t)_mm512_reduce_max_epi32(magnitudes)));
        const float divisor = float_of_bits((uint32_t)scale << 16);
        const __mmask16 is_scaled = divisor > 0 ? 0xffff : 0;
        for (size_t i = begin; i < end; i += LANES) {
            const __m512 ratios = _mm512_div_ps(load(head, first + i, is_float32), _mm512_set1_ps(divisor));
            const __m512i numbers = _mm512_maskz_cvtps_epi32(is_scaled, ratios);
            _mm_storeu_si128((__m128i *)(output + i), _mm512_cvtepi32_epi8(numbers));
        }
        memcpy(output + head_dim + begin / SCALE_GROUP * sizeof scale, &scale, sizeof scale);
    }
}

void quantize_kv(const void *key, const void *value, size_t key_stride, size_t value_stride, int8_t *output,
    size_t num_tokens, size_t num_heads, size_t head_dim, int is_float32, int num_threads) {
    const size_t bytes = int8_head_bytes(head_dim);
#pragma omp parallel for num_threads(num_threads) if (num_tokens >= PARALLEL_TOKENS)
    for (size_t row = 0; row < 2 * num_tokens; row++) {
        const size_t token = row % num_tokens;
        const int of_value = row >= num_tokens;
        for (size_t head = 0; head < num_heads; head++)
            quantize_head(of_value ? value : key, token * (of_value ? value_stride : key_stride) + head * head_dim,
                head_dim, is_float32, output + (row * num_heads + head) * bytes);
    }
}
