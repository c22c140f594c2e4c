/* GEMM of float32 activations and int8 weights on x86: AMX where available, else AVX-512 VNNI.
 *
 * Each token is quantized to int8 with its own scale, and integer sums are exact. A token's result is therefore
 * bit-identical in any batch and with either instruction set. Both read the same packed weight layout:
 *
 *     panel    BLOCK_N output features, contiguous in memory
 *     in it    for each group of 4 input features, the 4 weights of every output: [K / 4][BLOCK_N][4]
 *     weight   + 128, as the instructions multiply signed by unsigned; 128 * (sum of the token) is subtracted again
 *
 * K is padded to a multiple of BLOCK_K, N to a multiple of BLOCK_N. Threads are those of the OpenMP runtime that torch
 * has loaded.
 */
#include "gemm.h"
#include "kernels.h"

#include <omp.h>

enum { VNNI_BLOCK_M = 12 }; /* tokens per block without AMX: two accumulators per token fit into the registers */

size_t int8_packed_bytes(size_t n, size_t k) { return round_up(n, BLOCK_N) * round_up(k, BLOCK_K); }

size_t int8_scratch_bytes(size_t m, size_t k) {
    return round_up(m, AMX_BLOCK_M) * (round_up(k, BLOCK_K) + BLOCK_K) + m * (sizeof(float) + sizeof(int32_t));
}

void int8_pack_weight(const int8_t *weight, uint8_t *packed_weight, size_t n, size_t k) {
    for (size_t panel = 0; panel < n; panel += BLOCK_N)
        for (size_t group = 0; group < round_up(k, BLOCK_K); group += 4)
            for (size_t row = panel; row < panel + BLOCK_N; row++, packed_weight += 4) {
                uint32_t four = 0;
                if (row < n && group < k) memcpy(&four, weight + row * k + group, k - group < 4 ? k - group : 4);
                four ^= 0x80808080;
                memcpy(packed_weight, &four, 4);
            }
}

/* A block of tokens by one panel. `block_m` is constant where inlined, to keep accumulators in registers. */
static inline __attribute__((always_inline)) void gemm_kernel_vnni(const size_t block_m, const int8_t *quantized,
    size_t stride, const uint8_t *panel, size_t k, const Epilogue *epilogue, size_t row, size_t column) {
    __m512i left[VNNI_BLOCK_M], right[VNNI_BLOCK_M];
    for (size_t i = 0; i < block_m; i++) left[i] = right[i] = _mm512_setzero_si512();
    for (size_t j = 0; j < k; j += 4, panel += 4 * BLOCK_N) {
        _mm_prefetch(panel + PREFETCH_BYTES, _MM_HINT_T0);
        _mm_prefetch(panel + PREFETCH_BYTES + 64, _MM_HINT_T0);
        const __m512i left_weights = _mm512_loadu_si512(panel), right_weights = _mm512_loadu_si512(panel + 64);
#pragma GCC unroll 12
        for (size_t i = 0; i < block_m; i++) {
            int32_t four;
            memcpy(&four, quantized + i * stride + j, 4);
            left[i] = _mm512_dpbusd_epi32(left[i], left_weights, _mm512_set1_epi32(four));
            right[i] = _mm512_dpbusd_epi32(right[i], right_weights, _mm512_set1_epi32(four));
        }
    }
#pragma GCC unroll 12
    for (size_t i = 0; i < block_m; i++) {
        store_epilogue(left[i], epilogue, row + i, column);
        store_epilogue(right[i], epilogue, row + i, column + LANES);
    }
}

static void dispatch_vnni(size_t block_m, const int8_t *quantized, size_t stride, const uint8_t *panel, size_t k,
    const Epilogue *epilogue, size_t row, size_t column) {
#define CASE_ROWS(rows)                                                                                                \
    case rows:                                                                                                         \
        gemm_kernel_vnni(rows, quantized, stride, panel, k, epilogue, row, column);                                    \
        break;
    switch (block_m) {
        CASE_ROWS(1)
        CASE_ROWS(2)
        CASE_ROWS(3)
        CASE_ROWS(4)
        CASE_ROWS(5)
        CASE_ROWS(6)
        CASE_ROWS(7)
        CASE_ROWS(8)
        CASE_ROWS(9)
        CASE_ROWS(10)
        CASE_ROWS(11)
        CASE_ROWS(12)
    }
#undef CASE_ROWS
}

/* Tiles 0 to 3 are accumulators, 4 and 5 activations, 6 and 7 weights. */
static void gemm_kernel_amx(size_t block_m, const int8_t *quantized, size_t stride, const uint8_t *panel, size_t k,
    const Epilogue *epilogue, size_t row, size_t column) {
    int32_t accumulators[2][2][LANES][LANES] __attribute__((aligned(64)));
    const int two_tiles = block_m > LANES;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t j = 0; j < k; j += BLOCK_K, panel += BLOCK_K * BLOCK_N) {
        if (row == 0) /* Later blocks of tokens find the panel in the cache. */
            for (size_t line = 0; line < BLOCK_K * BLOCK_N; line += 64)
                _mm_prefetch(panel + PREFETCH_BYTES + line, _MM_HINT_T0);
        _tile_loadd(6, panel, 4 * BLOCK_N);
        _tile_loadd(7, panel + 64, 4 * BLOCK_N);
        _tile_loadd(4, quantized + j, stride);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (two_tiles) {
            _tile_loadd(5, quantized + LANES * stride + j, stride);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, accumulators[0][0], sizeof accumulators[0][0][0]);
    _tile_stored(1, accumulators[0][1], sizeof accumulators[0][0][0]);
    _tile_stored(2, accumulators[1][0], sizeof accumulators[0][0][0]);
    _tile_stored(3, accumulators[1][1], sizeof accumulators[0][0][0]);
    for (size_t i = 0; i < block_m; i++)
        for (size_t half = 0; half < 2; half++) {
            const __m512i sums = _mm512_load_si512(accumulators[i / LANES][half][i % LANES]);
            store_epilogue(sums, epilogue, row + i, column + half * LANES);
        }
}

/* One panel for all tokens; with AMX the tiles are configured. Without, blocks are as equal as possible: a block of few
 * tokens takes as long as one of more. */
static void multiply_panel(const int8_t *quantized, size_t stride, const uint8_t *panel, size_t m, size_t k,
    const Epilogue *epilogue, size_t column, int isa) {
    const size_t num_blocks = round_up(m, VNNI_BLOCK_M) / VNNI_BLOCK_M;
    if (isa == ISA_AMX)
        for (size_t row = 0; row < m; row += AMX_BLOCK_M) {
            const size_t block_m = m - row < AMX_BLOCK_M ? m - row : AMX_BLOCK_M;
            gemm_kernel_amx(block_m, quantized + row * stride, stride, panel, k, epilogue, row, column);
        }
    else
        for (size_t block = 0; block < num_blocks; block++) {
            const size_t row = m * block / num_blocks, block_m = m * (block + 1) / num_blocks - row;
            dispatch_vnni(block_m, quantized + row * stride, stride, panel, k, epilogue, row, column);
        }
}

void int8_scaled_mm(float *input, const uint8_t *packed_weight, const float *weight_scales, const float *bias,
    const float *norm_weight, float epsilon, int silu_and_mul, const float *residual, float *output, int8_t *scratch,
    size_t m, size_t k, size_t n, int isa, int num_threads) {
    const size_t padded_k = round_up(k, BLOCK_K), input_stride = silu_and_mul ? 2 * k : k;
    const size_t stride = padded_k + BLOCK_K; /* A power of two would map all tokens to the same few cache lines. */
    float *act_scales = (float *)(scratch + round_up(m, AMX_BLOCK_M) * stride);
    int32_t *act_row_sums = (int32_t *)(act_scales + m);
    const Epilogue epilogue = {act_scales, act_row_sums, weight_scales, bias, residual, output, n};
    const int chunk = panels_at_a_time(n, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        if (isa == ISA_AMX) LOAD_TILE_CONFIG(TILE_CONFIG);
#pragma omp for
        for (size_t row = 0; row < m; row++)
            quantize_row_int8(input + row * input_stride, silu_and_mul, norm_weight, epsilon, k, scratch + row * stride,
                act_scales + row, act_row_sums + row);
#pragma omp for schedule(dynamic, chunk)
        for (size_t column = 0; column < n; column += BLOCK_N)
            multiply_panel(scratch, stride, packed_weight + column * padded_k, m, padded_k, &epilogue, column, isa);
        if (isa == ISA_AMX) _tile_release();
    }
}

/* The largest output of each token so far, and the first column that has it, in LANES interleaved parts. */
typedef struct {
    float values[LANES];
    int32_t columns[LANES];
} Largest;

size_t int8_argmax_scratch_bytes(size_t m, size_t k, int num_threads) {
    return int8_scratch_bytes(m, k) + (size_t)num_threads * m * (sizeof(Largest) + BLOCK_N * sizeof(float));
}

/* Whether x comes before `largest` in torch's order: NaN is the largest number. */
static inline __mmask16 is_larger(__m512 x, __m512 largest) {
    return _mm512_cmp_ps_mask(x, largest, _CMP_NLE_UQ) & _mm512_cmp_ps_mask(largest, largest, _CMP_ORD_Q);
}

static void update_largest(Largest *largest, const float *outputs, size_t count, size_t column) {
    for (size_t i = 0; i < count; i += LANES) {
        const __m512 x = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), tail_mask(count - i), outputs + i);
        const __mmask16 mask = is_larger(x, _mm512_loadu_ps(largest->values));
        const __m512i columns = _mm512_add_epi32(_mm512_set1_epi32((int32_t)(column + i)),
            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
        _mm512_mask_storeu_ps(largest->values, mask, x);
        _mm512_mask_storeu_epi32(largest->columns, mask, columns);
    }
}

/* The first column with the largest value in `parts` of one token, `part_stride` apart. */
static int64_t first_largest(const Largest *parts, size_t part_stride, int num_parts) {
    float best = -INFINITY;
    int32_t column = 0; /* if all values are -inf */
    for (int part = 0; part < num_parts; part++)
        for (size_t lane = 0; lane < LANES; lane++) {
            const float value = parts[(size_t)part * part_stride].values[lane];
            const int32_t candidate = parts[(size_t)part * part_stride].columns[lane];
            if (value == -INFINITY) continue;
            const int is_equal = value == best || (isnan(value) && isnan(best));
            const int is_larger_value = isnan(value) ? !isnan(best) : value > best;
            if (is_larger_value || (is_equal && candidate < column)) {
                best = value;
                column = candidate;
            }
        }
    return column;
}

void int8_argmax(float *input, const uint8_t *packed_weight, const float *weight_scales, const float *bias,
    int64_t *output, int8_t *scratch, size_t m, size_t k, size_t n, int isa, int num_threads) {
    const size_t padded_k = round_up(k, BLOCK_K), stride = padded_k + BLOCK_K;
    float *act_scales = (float *)(scratch + round_up(m, AMX_BLOCK_M) * stride);
    int32_t *act_row_sums = (int32_t *)(act_scales + m);
    Largest *all_largest = (Largest *)(scratch + int8_scratch_bytes(m, k));
    float *all_outputs = (float *)(all_largest + (size_t)num_threads * m);
    const int chunk = panels_at_a_time(n, num_threads);
    for (size_t i = 0; i < (size_t)num_threads * m; i++)
        for (size_t lane = 0; lane < LANES; lane++) all_largest[i].values[lane] = -INFINITY;
#pragma omp parallel num_threads(num_threads)
    {
        Largest *largest = all_largest + (size_t)omp_get_thread_num() * m;
        float *outputs = all_outputs + (size_t)omp_get_thread_num() * m * BLOCK_N;
        if (isa == ISA_AMX) LOAD_TILE_CONFIG(TILE_CONFIG);
#pragma omp for
        for (size_t row = 0; row < m; row++)
            quantize_row_int8(
                input + row * k, 0, NULL, 0, k, scratch + row * stride, act_scales + row, act_row_sums + row);
#pragma omp for schedule(monotonic : dynamic, chunk) /* Of equal values, the first one is kept. */
        for (size_t column = 0; column < n; column += BLOCK_N) {
            const size_t count = n - column < BLOCK_N ? n - column : BLOCK_N;
            const Epilogue epilogue = {
                act_scales, act_row_sums, weight_scales + column, bias ? bias + column : NULL, NULL, outputs, count};
            multiply_panel(scratch, stride, packed_weight + column * padded_k, m, padded_k, &epilogue, 0, isa);
            for (size_t row = 0; row < m; row++) update_largest(largest + row, outputs + row * count, count, column);
        }
        if (isa == ISA_AMX) _tile_release();
    }
    for (size_t row = 0; row < m; row++) output[row] = first_largest(all_largest + row, m, num_threads);
}
