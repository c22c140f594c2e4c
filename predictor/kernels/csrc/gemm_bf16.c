/* GEMM of float32 activations and bfloat16 weights on x86: AMX, else AVX512-BF16 where it is fast, else AVX-512.
 *
 * AMX and AVX512-BF16 round activations to bfloat16, AVX-512 multiplies them in float32. Sums are float32. Each is
 * formed in the order of K whatever the number of tokens, so a token's result is bit-identical in any batch. It differs
 * between instruction sets. All read the same packed weight layout:
 *
 *     panel    BLOCK_N output features, contiguous in memory
 *     in it    for each pair of input features, the 2 weights of every output: [K / 2][BLOCK_N][2]
 *
 * K is padded to a multiple of TILE_K, N to a multiple of BLOCK_N.
 */
#include "gemm.h"

enum {
    TILE_K = 32,             /* input features: the width of a tile */
    PAIR_BYTES = 4,          /* two input features of a token or an output */
    AVX512_BLOCK_M = 12,     /* tokens per block without AMX: two accumulators per token fit into the registers */
    CACHED_TOKENS = 96,      /* tokens for which a panel is read from memory once: they fit into the L2 cache */
    SERIAL_FEATURES = 32768, /* activations that one thread converts */
    ROW_PADDING_BYTES = 64   /* A power of two would map all tokens to the same few cache lines. */
};

/* Multiplies a block of tokens by one panel. */
typedef void GemmKernel(size_t block_m, const uint8_t *rows, size_t stride, const uint8_t *panel, size_t k,
    const Epilogue *epilogue, size_t row, size_t column);

static size_t row_bytes(size_t k, int isa) {
    return round_up(k, TILE_K) * (isa == BF16_ISA_AVX512 ? sizeof(float) : sizeof(bfloat16)) + ROW_PADDING_BYTES;
}

size_t bf16_packed_bytes(size_t n, size_t k) { return round_up(n, BLOCK_N) * round_up(k, TILE_K) * sizeof(bfloat16); }

size_t bf16_scratch_bytes(size_t m, size_t k, int isa) {
    return round_up(m, AMX_BLOCK_M) * row_bytes(k, isa) + m * sizeof(float);
}

void bf16_pack_weight(const bfloat16 *weight, bfloat16 *packed_weight, size_t n, size_t k) {
    for (size_t panel = 0; panel < n; panel += BLOCK_N)
        for (size_t pair = 0; pair < round_up(k, TILE_K); pair += 2)
            for (size_t row = panel; row < panel + BLOCK_N; row++, packed_weight += 2) {
                uint32_t two = 0;
                if (row < n && pair < k)
                    memcpy(&two, weight + row * k + pair, (k - pair < 2 ? k - pair : 2) * sizeof(bfloat16));
                memcpy(packed_weight, &two, sizeof two);
            }
}

/* Convert one token to the kernel's operand; return RMSNorm's factor, by which sums are multiplied.
 * With `silu_and_mul` the operand is silu(gate) * up. */
static inline float convert_row(const LinearArguments *layer, size_t token, int to_float32, uint8_t *converted) {
    const size_t k = layer->k;
    const int silu_and_mul = layer->silu_and_mul;
    const float *norm_weight = layer->norm_weight, *row = layer->input + token * input_stride(layer);
    const size_t size = to_float32 ? sizeof(float) : sizeof(bfloat16);
    __m512 square_sum = _mm512_setzero_ps();
    for (size_t i = 0; i < k; i += LANES) {
        const __mmask16 mask = tail_mask(k - i);
        __m512 x = _mm512_maskz_loadu_ps(mask, row + i);
        if (silu_and_mul) x = _mm512_mul_ps(silu(x), _mm512_maskz_loadu_ps(mask, row + k + i));
        if (norm_weight) {
            square_sum = _mm512_fmadd_ps(x, x, square_sum);
            x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(mask, norm_weight + i));
        }
        if (to_float32) _mm512_storeu_ps(converted + i * size, x);
        else _mm256_storeu_si256((__m256i *)(converted + i * size), to_bfloat16(x));
    }
    memset(converted + round_up(k, LANES) * size, 0, (round_up(k, TILE_K) - round_up(k, LANES)) * size);
    return norm_weight ? 1 / sqrtf(_mm512_reduce_add_ps(square_sum) / (float)k + layer->epsilon) : 1;
}

static inline void prefetch_panel(const uint8_t *panel) {
    _mm_prefetch(panel + PREFETCH_BYTES, _MM_HINT_T0);
    _mm_prefetch(panel + PREFETCH_BYTES + 64, _MM_HINT_T0);
}

/* A block of tokens by one panel. `block_m` is constant where inlined, to keep accumulators in registers. */
static inline __attribute__((always_inline, target("avx512bf16"))) void gemm_kernel_avx512_bf16(const size_t block_m,
    const uint8_t *rows, size_t stride, const uint8_t *panel, size_t k, const Epilogue *epilogue, size_t row,
    size_t column) {
    __m512 left[AVX512_BLOCK_M], right[AVX512_BLOCK_M];
    for (size_t i = 0; i < block_m; i++) left[i] = right[i] = _mm512_setzero_ps();
    for (size_t j = 0; j < k * sizeof(bfloat16); j += PAIR_BYTES, panel += PAIR_BYTES * BLOCK_N) {
        prefetch_panel(panel);
        const __m512bh left_weights = (__m512bh)_mm512_loadu_si512(panel);
        const __m512bh right_weights = (__m512bh)_mm512_loadu_si512(panel + PAIR_BYTES * LANES);
#pragma GCC unroll 12
        for (size_t i = 0; i < block_m; i++) {
            int32_t pair;
            memcpy(&pair, rows + i * stride + j, sizeof pair);
            left[i] = _mm512_dpbf16_ps(left[i], left_weights, (__m512bh)_mm512_set1_epi32(pair));
            right[i] = _mm512_dpbf16_ps(right[i], right_weights, (__m512bh)_mm512_set1_epi32(pair));
        }
    }
#pragma GCC unroll 12
    for (size_t i = 0; i < block_m; i++) {
        store_sums(left[i], epilogue, row + i, column);
        store_sums(right[i], epilogue, row + i, column + LANES);
    }
}

/* The same with weights converted to float32, and float32 activations. */
static inline __attribute__((always_inline)) void gemm_kernel_avx512(const size_t block_m, const uint8_t *rows,
    size_t stride, const uint8_t *panel, size_t k, const Epilogue *epilogue, size_t row, size_t column) {
    const __m512i high_half = _mm512_set1_epi32((int32_t)0xffff0000);
    __m512 left[AVX512_BLOCK_M], right[AVX512_BLOCK_M];
    for (size_t i = 0; i < block_m; i++) left[i] = right[i] = _mm512_setzero_ps();
    for (size_t j = 0; j < k * sizeof(float); j += 2 * sizeof(float), panel += PAIR_BYTES * BLOCK_N) {
        prefetch_panel(panel);
        const __m512i left_pairs = _mm512_loadu_si512(panel);
        const __m512i right_pairs = _mm512_loadu_si512(panel + PAIR_BYTES * LANES);
        const __m512 left_even = _mm512_castsi512_ps(_mm512_slli_epi32(left_pairs, 16));
        const __m512 left_odd = _mm512_castsi512_ps(_mm512_and_si512(left_pairs, high_half));
        const __m512 right_even = _mm512_castsi512_ps(_mm512_slli_epi32(right_pairs, 16));
        const __m512 right_odd = _mm512_castsi512_ps(_mm512_and_si512(right_pairs, high_half));
#pragma GCC unroll 12
        for (size_t i = 0; i < block_m; i++) {
            float pair[2];
            memcpy(pair, rows + i * stride + j, sizeof pair);
            const __m512 even = _mm512_set1_ps(pair[0]), odd = _mm512_set1_ps(pair[1]);
            left[i] = _mm512_fmadd_ps(odd, left_odd, _mm512_fmadd_ps(even, left_even, left[i]));
            right[i] = _mm512_fmadd_ps(odd, right_odd, _mm512_fmadd_ps(even, right_even, right[i]));
        }
    }
#pragma GCC unroll 12
    for (size_t i = 0; i < block_m; i++) {
        store_sums(left[i], epilogue, row + i, column);
        store_sums(right[i], epilogue, row + i, column + LANES);
    }
}

#define CASE_AVX512_BF16(rows_of_block)                                                                                \
    case rows_of_block:                                                                                                \
        gemm_kernel_avx512_bf16(rows_of_block, rows, stride, panel, k, epilogue, row, column);                         \
        break;
#define CASE_AVX512(rows_of_block)                                                                                     \
    case rows_of_block:                                                                                                \
        gemm_kernel_avx512(rows_of_block, rows, stride, panel, k, epilogue, row, column);                              \
        break;

__attribute__((target("avx512bf16"))) static void dispatch_avx512_bf16(size_t block_m, const uint8_t *rows,
    size_t stride, const uint8_t *panel, size_t k, const Epilogue *epilogue, size_t row, size_t column) {
    switch (block_m) { CASES_1_TO_12(CASE_AVX512_BF16) }
}

static void dispatch_avx512(size_t block_m, const uint8_t *rows, size_t stride, const uint8_t *panel, size_t k,
    const Epilogue *epilogue, size_t row, size_t column) {
    switch (block_m) { CASES_1_TO_12(CASE_AVX512) }
}

static void gemm_kernel_amx(size_t block_m, const uint8_t *rows, size_t stride, const uint8_t *panel, size_t k,
    const Epilogue *epilogue, size_t row, size_t column) {
    float sums[AMX_BLOCK_M][BLOCK_N] __attribute__((aligned(64)));
    const int has_two_tiles = block_m > LANES;
    const size_t tile_bytes = TILE_K * sizeof(bfloat16), panel_step = TILE_K * BLOCK_N * sizeof(bfloat16);
    zero_tiles();
    for (size_t j = 0; j < k * sizeof(bfloat16); j += tile_bytes, panel += panel_step) {
        if (row % CACHED_TOKENS == 0) /* Later blocks of tokens find the panel in the cache. */
            for (size_t line = 0; line < panel_step; line += 64)
                _mm_prefetch(panel + PREFETCH_BYTES + line, _MM_HINT_T0);
        ACCUMULATE_TILES(_tile_dpbf16ps, rows + j, stride, panel, has_two_tiles);
    }
    store_tiles((uint8_t *)sums, has_two_tiles);
    for (size_t i = 0; i < block_m; i++)
        for (size_t lane = 0; lane < BLOCK_N; lane += LANES)
            store_sums(_mm512_load_ps(sums[i] + lane), epilogue, row + i, column + lane);
}

void bf16_mm(const LinearArguments *layer, const bfloat16 *packed_weight, int isa) {
    const size_t m = layer->m, k = layer->k, n = layer->n, padded_k = round_up(k, TILE_K), stride = row_bytes(k, isa);
    const int num_threads = layer->num_threads;
    uint8_t *scratch = layer->scratch;
    const size_t max_block_m = isa == BF16_ISA_AMX ? AMX_BLOCK_M : AVX512_BLOCK_M;
    GemmKernel *const kernel = isa == BF16_ISA_AMX           ? gemm_kernel_amx
                               : isa == BF16_ISA_AVX512_BF16 ? dispatch_avx512_bf16
                                                             : dispatch_avx512;
    float *inverse_rms = (float *)(scratch + round_up(m, AMX_BLOCK_M) * stride);
    const Epilogue epilogue = {inverse_rms, NULL, NULL, layer->bias, layer->residual, layer->output, n};
    /* For a few tokens, waiting for other threads takes longer than their work. */
#pragma omp parallel for num_threads(num_threads) if (m * k > SERIAL_FEATURES)
    for (size_t row = 0; row < m; row++)
        inverse_rms[row] = convert_row(layer, row, isa == BF16_ISA_AVX512, scratch + row * stride);
#pragma omp parallel num_threads(num_threads)
    {
        if (isa == BF16_ISA_AMX) LOAD_TILE_CONFIG(TILE_CONFIG);
        for (size_t first = 0; first < m; first += CACHED_TOKENS) {
            const size_t last = m - first < CACHED_TOKENS ? m : first + CACHED_TOKENS;
#pragma omp for nowait
            for (size_t column = 0; column < n; column += BLOCK_N)
                for (size_t row = first; row < last; row += max_block_m)
                    kernel(last - row < max_block_m ? last - row : max_block_m, scratch + row * stride, stride,
                        (const uint8_t *)(packed_weight + column * padded_k), padded_k, &epilogue, row, column);
        }
        if (isa == BF16_ISA_AMX) _tile_release();
    }
}
