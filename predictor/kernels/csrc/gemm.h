/* What the GEMM kernels share: block sizes, quantization of activations, and what happens to sums. */
#ifndef GEMM_H
#define GEMM_H

#include "kernels.h"
#include "simd_avx512.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    BLOCK_N = 32,         /* output features: two registers, or two tiles, of LANES each */
    BLOCK_K = 64,         /* input features: the width of a tile */
    AMX_BLOCK_M = 32,     /* tokens per block with AMX: two tiles */
    PREFETCH_BYTES = 2048 /* prefetch distance: hides memory latency at batch size 1 */
};

static const float MIN_SCALE = 1e-30f; /* avoids a division by zero for tokens of zeros */

typedef struct {
    const float *act_scales;     /* (M) */
    const int32_t *act_row_sums; /* (M), of the quantized activations */
    const float *weight_scales;  /* (N), or NULL */
    const float *bias;           /* (N), or NULL */
    const float *residual;       /* (M, N), or NULL */
    float *output;               /* (M, N) */
    size_t n;
} Epilogue;

static inline size_t round_up(size_t number, size_t multiple) { return (number + multiple - 1) / multiple * multiple; }

/* Panels that a thread takes at a time. A thread that another process holds up takes fewer of them in all, and each
 * time it reads consecutive memory for long. */
static inline int panels_at_a_time(size_t n, int num_threads) {
    const size_t panels = n / BLOCK_N / (8 * (size_t)num_threads);
    return panels > 1 ? (int)panels : 1;
}

static inline __m512 silu(__m512 x) {
    const __m512 exp_minus_x = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), exp_minus_x));
}

/* Floats between two tokens of the input. */
static inline size_t input_stride(const LinearArguments *layer) {
    return layer->silu_and_mul ? 2 * layer->k : layer->k;
}

/* Quantize one token to int8 by its largest magnitude. RMSNorm's per-token factor is folded into the scale.
 * With `silu_and_mul` silu(gate) * up replaces gate first. */
static inline void quantize_row_int8(
    const LinearArguments *layer, size_t token, int8_t *quantized, float *act_scale, int32_t *act_row_sum) {
    const size_t k = layer->k;
    const int silu_and_mul = layer->silu_and_mul;
    const float *norm_weight = layer->norm_weight;
    float *row = layer->input + token * input_stride(layer);
    __m512 abs_max = _mm512_set1_ps(MIN_SCALE), square_sum = _mm512_setzero_ps();
    __mmask16 has_nan = 0;
    for (size_t i = 0; i < k; i += LANES) {
        const __mmask16 mask = tail_mask(k - i);
        __m512 x = _mm512_maskz_loadu_ps(mask, row + i);
        if (silu_and_mul) {
            x = _mm512_mul_ps(silu(x), _mm512_maskz_loadu_ps(mask, row + k + i));
            _mm512_mask_storeu_ps(row + i, mask, x);
        }
        if (norm_weight) {
            square_sum = _mm512_fmadd_ps(x, x, square_sum);
            x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(mask, norm_weight + i));
        }
        has_nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        abs_max = _mm512_max_ps(abs_max, _mm512_abs_ps(x));
    }
    const float row_max = has_nan ? NAN : _mm512_reduce_max_ps(abs_max);
    const __m512 inverse_scale = _mm512_set1_ps(127 / row_max);
    __m512i row_sum = _mm512_setzero_si512();
    for (size_t i = 0; i < k; i += LANES) {
        const __mmask16 mask = tail_mask(k - i);
        __m512 x = _mm512_maskz_loadu_ps(mask, row + i);
        if (norm_weight) x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(mask, norm_weight + i));
        const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse_scale));
        row_sum = _mm512_add_epi32(row_sum, integers);
        _mm_storeu_si128((__m128i *)(quantized + i), _mm512_cvtepi32_epi8(integers));
    }
    memset(quantized + round_up(k, LANES), 0, round_up(k, BLOCK_K) - round_up(k, LANES));
    const float inverse_rms = norm_weight ? 1 / sqrtf(_mm512_reduce_add_ps(square_sum) / (float)k + layer->epsilon) : 1;
    *act_scale = row_max / 127 * inverse_rms;
    *act_row_sum = _mm512_reduce_add_epi32(row_sum);
}

/* Scale LANES sums of a token, add bias and residual, and store them from output feature `column` on. */
static inline void store_sums(__m512 sums, const Epilogue *epilogue, size_t row, size_t column) {
    if (column >= epilogue->n) return;
    const __mmask16 mask = tail_mask(epilogue->n - column);
    const size_t offset = row * epilogue->n + column;
    if (epilogue->weight_scales)
        sums = _mm512_mul_ps(sums, _mm512_maskz_loadu_ps(mask, epilogue->weight_scales + column));
    __m512 base = _mm512_setzero_ps();
    if (epilogue->bias) base = _mm512_maskz_loadu_ps(mask, epilogue->bias + column);
    if (epilogue->residual) base = _mm512_add_ps(base, _mm512_maskz_loadu_ps(mask, epilogue->residual + offset));
    const __m512 act_scale = _mm512_set1_ps(epilogue->act_scales[row]);
    _mm512_mask_storeu_ps(epilogue->output + offset, mask, _mm512_fmadd_ps(sums, act_scale, base));
}

/* The same for integer accumulators of weights + 128. */
static inline void store_epilogue(__m512i accumulators, const Epilogue *epilogue, size_t row, size_t column) {
    const __m512i zero_point = _mm512_slli_epi32(_mm512_set1_epi32(epilogue->act_row_sums[row]), 7);
    store_sums(_mm512_cvtepi32_ps(_mm512_sub_epi32(accumulators, zero_point)), epilogue, row, column);
}

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} TileConfig;

static const TileConfig TILE_CONFIG = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* Assembly, because gcc 12's intrinsic treats only the first 8 bytes of its argument as read. */
#ifndef LOAD_TILE_CONFIG /* Tests emulate AMX. */
#define LOAD_TILE_CONFIG(config) __asm__ volatile("ldtilecfg %0" ::"m"(config))
#endif

/* Sums of a block of tokens, in the four bytes of an int32 or float. */
enum { SUM_BYTES = 4, SUMS_ROW_BYTES = BLOCK_N * SUM_BYTES };

/* Tiles 0 to 3 are accumulators, 4 and 5 activations of up to LANES tokens each, 6 and 7 weights. */
static inline void zero_tiles(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Multiply the activations from `rows` on by a panel's next weights. A macro, since products are instructions. */
#define ACCUMULATE_TILES(product, rows, stride, panel, has_two_tiles)                                                  \
    do {                                                                                                               \
        _tile_loadd(6, panel, SUMS_ROW_BYTES);                                                                         \
        _tile_loadd(7, (panel) + SUMS_ROW_BYTES / 2, SUMS_ROW_BYTES);                                                  \
        _tile_loadd(4, rows, stride);                                                                                  \
        product(0, 4, 6);                                                                                              \
        product(1, 4, 7);                                                                                              \
        if (has_two_tiles) {                                                                                           \
            _tile_loadd(5, (rows) + LANES * (stride), stride);                                                         \
            product(2, 5, 6);                                                                                          \
            product(3, 5, 7);                                                                                          \
        }                                                                                                              \
    } while (0)

/* Write the accumulators to sums[AMX_BLOCK_M][BLOCK_N], or their first LANES rows. */
static inline void store_tiles(uint8_t *sums, int has_two_tiles) {
    _tile_stored(0, sums, SUMS_ROW_BYTES);
    _tile_stored(1, sums + SUMS_ROW_BYTES / 2, SUMS_ROW_BYTES);
    if (has_two_tiles) {
        _tile_stored(2, sums + LANES * SUMS_ROW_BYTES, SUMS_ROW_BYTES);
        _tile_stored(3, sums + LANES * SUMS_ROW_BYTES + SUMS_ROW_BYTES / 2, SUMS_ROW_BYTES);
    }
}

/* Cases of a switch over the tokens of a block, so that kernels are compiled for each number of them. */
#define CASES_1_TO_10(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10)
#define CASES_1_TO_12(CASE) CASES_1_TO_10(CASE) CASE(11) CASE(12)

#endif
