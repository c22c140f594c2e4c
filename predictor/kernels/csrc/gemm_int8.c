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
#define CASE(rows)                                                                                                     \
    case rows:                                                                                                         \
        gemm_kernel_vnni(rows, quantized, stride, panel, k, epilogue, row, column);                                    \
        break;
    switch (block_m) { CASES_1_TO_12(CASE) }
#undef CASE
}

static void gemm_kernel_amx(size_t block_m, const int8_t *quantized, size_t stride, const uint8_t *panel, size_t k,
    const Epilogue *epilogue, size_t row, size_t column) {
    int32_t sums[AMX_BLOCK_M][BLOCK_N] __attribute__((aligned(64)));
    const int has_two_tiles = block_m > LANES;
    zero_tiles();
    for (size_t j = 0; j < k; j += BLOCK_K, panel += BLOCK_K * BLOCK_N) {
        if (row == 0) /* Later blocks of tokens find the panel in the cache. */
            for (size_t line = 0; line < BLOCK_K * BLOCK_N; line += 64)
                _mm_prefetch(panel + PREFETCH_BYTES + line, _MM_HINT_T0);
        ACCUMULATE_TILES(_tile_dpbsud, quantized + j, stride, panel, has_two_tiles);
    }
    store_tiles((uint8_t *)sums, has_two_tiles);
    for (size_t i = 0; i < block_m; i++)
        for (size_t lane = 0; lane < BLOCK_N; lane += LANES)
            store_epilogue(_mm512_load_si512(sums[i] + lane), epilogue, row + i, column + lane);
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

/* Where the quantized tokens are in the scratch memory. */
typedef struct {
    int8_t *tokens;
    size_t stride, padded_k;
    float *scales;
    int32_t *row_sums;
} Quantized;

static Quantized quantized_in_scratch(const LinearArguments *layer) {
    const size_t padded_k = round_up(layer->k, BLOCK_K);
    const size_t stride = padded_k + BLOCK_K; /* A power of two would map all tokens to the same few cache lines. */
    int8_t *tokens = layer->scratch;
    float *scales = (float *)(tokens + round_up(layer->m, AMX_BLOCK_M) * stride);
    return (Quantized){tokens, stride, padded_k, scales, (int32_t *)(scales + layer->m)};
}

void int8_scaled_mm(const LinearArguments *layer, const uint8_t *packed_weight, const float *weight_scales, int isa) {
    const size_t m = layer->m, n = layer->n;
    const int num_threads = layer->num_threads, chunk = panels_at_a_time(n, num_threads);
    const Quantized rows = quantized_in_scratch(layer);
    const Epilogue epilogue = {
        rows.scales, rows.row_sums, weight_scales, layer->bias, layer->residual, layer->output, n};
#pragma omp parallel num_threads(num_threads)
    {
        if (isa == ISA_AMX) LOAD_TILE_CONFIG(TILE_CONFIG);
#pragma omp for
        for (size_t row = 0; row < m; row++)
            quantize_row_int8(layer, row, rows.tokens + row * rows.stride, rows.scales + row, rows.row_sums + row);
#pragma omp for schedule(dynamic, chunk)
        for (size_t column = 0; column < n; column += BLOCK_N)
            multiply_panel(rows.tokens, rows.stride, packed_weight + column * rows.padded_k, m, rows.padded_k,
                &epilogue, column, isa);
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

void int8_argmax(const LinearArguments *layer, const uint8_t *packed_weight, const float *weight_scales,
    int64_t *largest_outputs, int isa) {
    const size_t m = layer->m, n = layer->n;
    const int num_threads = layer->num_threads, chunk = panels_at_a_time(n, num_threads);
    const Quantized rows = quantized_in_scratch(layer);
    const float *bias = layer->bias;
    Largest *all_largest = (Largest *)(rows.tokens + int8_scratch_bytes(m, layer->k));
    float *all_outputs = (float *)(all_largest + (size_t)num_threads * m);
    for (size_t i = 0; i < (size_t)num_threads * m; i++)
        for (size_t lane = 0; lane < LANES; lane++) all_largest[i].values[lane] = -INFINITY;
#pragma omp parallel num_threads(num_threads)
    {
        Largest *largest = all_largest + (size_t)omp_get_thread_num() * m;
        float *outputs = all_outputs + (size_t)omp_get_thread_num() * m * BLOCK_N;
        if (isa == ISA_AMX) LOAD_TILE_CONFIG(TILE_CONFIG);
#pragma omp for
        for (size_t row = 0; row < m; row++)
            quantize_row_int8(layer, row, rows.tokens + row * rows.stride, rows.scales + row, rows.row_sums + row);
#pragma omp for schedule(monotonic : dynamic, chunk) /* Of equal values, the first one is kept. */
        for (size_t column = 0; column < n; column += BLOCK_N) {
            const size_t count = n - column < BLOCK_N ? n - column : BLOCK_N;
            const Epilogue epilogue = {
                rows.scales, rows.row_sums, weight_scales + column, bias ? bias + column : NULL, NULL, outputs, count};
            multiply_panel(
                rows.tokens, rows.stride, packed_weight + column * rows.padded_k, m, rows.padded_k, &epilogue, 0, isa);
            for (size_t row = 0; row < m; row++) update_largest(largest + row, outputs + row * count, count, column);
        }
        if (isa == ISA_AMX) _tile_release();
    }
    for (size_t row = 0; row < m; row++) largest_outputs[row] = first_largest(all_largest + row, m, num_threads);
}
