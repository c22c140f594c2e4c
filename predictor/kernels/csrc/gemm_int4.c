/* GEMM of float32 activations and int4 weights on x86: AMX where available, else AVX-512 VNNI.
 *
 * Activations are quantized as in `gemm_int8.c`. Each output has a scale per group of input features, and its own one.
 * Sums within a group are exact integers; groups are added in float32, in their order. A token's result is therefore
 * bit-identical in any batch and with either instruction set. Packed weights are read from start to end:
 *
 *     panel    BLOCK_N output features, contiguous in memory
 *     in it    for each group: the scales in float16 [BLOCK_N], the zero points [BLOCK_N] if there are any, and for
 *              each 4 input features the weights of every output [LANES][4]: in the low halves of bytes those of the
 *              first LANES outputs, in the high halves those of the others
 *     weight   0 to 15; the zero point, without zero points 8, is subtracted
 *
 * K is padded to a multiple of the group size, N to a multiple of BLOCK_N.
 */
#include "gemm.h"

enum {
    INT4_BLOCK_M = 6,         /* tokens per block without AMX: two integer and two float accumulators per token */
    INT4_SINGLE_BLOCK_M = 10, /* with at most these, one block: reading the panel twice costs more than a spill */
    MAX_GROUP_SIZE = 128,
    SYMMETRIC_ZERO_POINT = 8
};

typedef struct {
    const int8_t *quantized; /* (M, stride) */
    size_t stride;
    const int32_t *group_sums; /* (M, num_groups), of the quantized activations, negated */
    size_t num_groups, group_size;
} Activations;

/* What the outputs of a panel have in common within a group. */
typedef struct {
    __m512 left_scales, right_scales;
    __m512i left_zero_points, right_zero_points;
    const uint8_t *weights;
} Group;

/* Input features in a tile of activations. */
static size_t tile_depth(size_t group_size) { return group_size < BLOCK_K ? group_size : BLOCK_K; }

static size_t padded_k(size_t k, size_t group_size) { return round_up(k, group_size > BLOCK_K ? group_size : BLOCK_K); }

static size_t group_bytes(size_t group_size, int has_zero_points) {
    return BLOCK_N * (sizeof(uint16_t) + (has_zero_points ? 1 : 0) + group_size / 2);
}

size_t int4_packed_bytes(size_t n, size_t k, size_t group_size, int has_zero_points) {
    const size_t num_groups = round_up(k, group_size) / group_size;
    return round_up(n, BLOCK_N) / BLOCK_N * num_groups * group_bytes(group_size, has_zero_points);
}

size_t int4_scratch_bytes(size_t m, size_t k, size_t group_size) {
    const size_t num_groups = round_up(k, group_size) / group_size;
    const size_t per_token = sizeof(float) + sizeof(int32_t) * (1 + num_groups);
    return round_up(m, AMX_BLOCK_M) * (padded_k(k, group_size) + BLOCK_K) + m * per_token;
}

/* 4 weights of an output; zeros beyond the end of a row. */
static uint32_t four_weights(const uint8_t *weight, size_t n, size_t k, size_t row, size_t column) {
    uint32_t four = 0;
    if (row < n && column < k) memcpy(&four, weight + row * k + column, k - column < 4 ? k - column : 4);
    return four;
}

void int4_pack_weight(const uint8_t *weight, const uint16_t *group_scales, const uint8_t *zero_points,
    uint8_t *packed_weight, size_t n, size_t k, size_t group_size) {
    const size_t num_groups = round_up(k, group_size) / group_size;
    for (size_t panel = 0; panel < n; panel += BLOCK_N)
        for (size_t group = 0; group < num_groups; group++) {
            for (size_t row = panel; row < panel + BLOCK_N; row++, packed_weight += sizeof(uint16_t)) {
                const uint16_t scale = row < n ? group_scales[row * num_groups + group] : 0;
                memcpy(packed_weight, &scale, sizeof scale);
            }
            for (size_t row = panel; zero_points && row < panel + BLOCK_N; row++)
                *packed_weight++ = row < n ? zero_points[row * num_groups + group] : 0;
            for (size_t column = group * group_size; column < (group + 1) * group_size; column += 4)
                for (size_t row = panel; row < panel + LANES; row++, packed_weight += 4) {
                    const uint32_t both =
                        four_weights(weight, n, k, row, column) | four_weights(weight, n, k, row + LANES, column) << 4;
                    memcpy(packed_weight, &both, 4);
                }
        }
}

static inline __m512 load_scales(const uint8_t *scales) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));
}

static inline __m512i load_zero_points(const uint8_t *zero_points) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)zero_points));
}

static inline Group read_group(const uint8_t *panel, int has_zero_points) {
    Group group = {load_scales(panel), load_scales(panel + BLOCK_N), _mm512_set1_epi32(SYMMETRIC_ZERO_POINT),
        _mm512_set1_epi32(SYMMETRIC_ZERO_POINT), panel + 2 * BLOCK_N};
    if (has_zero_points) {
        group.left_zero_points = load_zero_points(group.weights);
        group.right_zero_points = load_zero_points(group.weights + LANES);
        group.weights += BLOCK_N;
    }
    return group;
}

/* A block of tokens by one panel. `block_m` is constant where inlined, to keep accumulators in registers.
 * High halves of bytes are multiplied in their place, by 16 too large. */
static inline __attribute__((always_inline)) void gemm_kernel_vnni(const size_t block_m, const Activations *activations,
    const uint8_t *panel, int has_zero_points, const Epilogue *epilogue, size_t row, size_t column) {
    const size_t stride = activations->stride, group_size = activations->group_size;
    const int8_t *quantized = activations->quantized + row * stride;
    const __m512i low = _mm512_set1_epi8(0x0f), high = _mm512_set1_epi8((char)0xf0);
    __m512 left[INT4_SINGLE_BLOCK_M], right[INT4_SINGLE_BLOCK_M];
    for (size_t i = 0; i < block_m; i++) left[i] = right[i] = _mm512_setzero_ps();
    for (size_t g = 0; g < activations->num_groups; g++, quantized += group_size) {
        Group group = read_group(panel, has_zero_points);
        group.right_scales = _mm512_mul_ps(group.right_scales, _mm512_set1_ps(1.f / 16));
        group.right_zero_points = _mm512_slli_epi32(group.right_zero_points, 4);
        __m512i left_sums[INT4_SINGLE_BLOCK_M], right_sums[INT4_SINGLE_BLOCK_M];
#pragma GCC unroll 10
        for (size_t i = 0; i < block_m; i++) {
            const __m512i sum = _mm512_set1_epi32(activations->group_sums[(row + i) * activations->num_groups + g]);
            left_sums[i] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), group.left_zero_points, sum);
            right_sums[i] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), group.right_zero_points, sum);
        }
        for (size_t j = 0; j < group_size; j += 4, group.weights += 4 * LANES) {
            _mm_prefetch(group.weights + PREFETCH_BYTES, _MM_HINT_T0);
            const __m512i weights = _mm512_loadu_si512(group.weights);
            const __m512i left_weights = _mm512_and_si512(weights, low),
                          right_weights = _mm512_and_si512(weights, high);
#pragma GCC unroll 10
            for (size_t i = 0; i < block_m; i++) {
                int32_t four;
                memcpy(&four, quantized + i * stride + j, 4);
                left_sums[i] = _mm512_dpbusd_epi32(left_sums[i], left_weights, _mm512_set1_epi32(four));
                right_sums[i] = _mm512_dpbusd_epi32(right_sums[i], right_weights, _mm512_set1_epi32(four));
            }
        }
#pragma GCC unroll 10
        for (size_t i = 0; i < block_m; i++) {
            left[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(left_sums[i]), group.left_scales, left[i]);
            right[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(right_sums[i]), group.right_scales, right[i]);
        }
        panel = group.weights;
    }
#pragma GCC unroll 10
    for (size_t i = 0; i < block_m; i++) {
        store_sums(left[i], epilogue, row + i, column);
        store_sums(right[i], epilogue, row + i, column + LANES);
    }
}

static void dispatch_vnni(size_t block_m, const Activations *activations, const uint8_t *panel, int has_zero_points,
    const Epilogue *epilogue, size_t row, size_t column) {
#define CASE(rows)                                                                                                     \
    case rows:                                                                                                         \
        gemm_kernel_vnni(rows, activations, panel, has_zero_points, epilogue, row, column);                            \
        break;
    switch (block_m) { CASES_1_TO_10(CASE) }
#undef CASE
}

/* Write the weights of a group in the layout of tiles, [group_size / 4][BLOCK_N][4]; return where the next group
 * starts. */
static const uint8_t *unpack_group(const uint8_t *weights, size_t group_size, uint8_t *unpacked) {
    const __m512i low = _mm512_set1_epi8(0x0f);
    for (size_t j = 0; j < group_size; j += 4, weights += 4 * LANES, unpacked += 4 * BLOCK_N) {
        _mm_prefetch(weights + PREFETCH_BYTES, _MM_HINT_T0);
        const __m512i both = _mm512_loadu_si512(weights);
        _mm512_store_si512(unpacked, _mm512_and_si512(both, low));
        _mm512_store_si512(unpacked + 4 * LANES, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    }
    return weights;
}

/* Integer sums of a block of up to AMX_BLOCK_M tokens within a group, whose tiles have `depth` input features. */
static void sum_group_amx(size_t block_m, const int8_t *quantized, size_t stride, const uint8_t *unpacked,
    size_t group_size, size_t depth, int32_t sums[AMX_BLOCK_M][BLOCK_N]) {
    const int has_two_tiles = block_m > LANES;
    zero_tiles();
    for (size_t j = 0; j < group_size; j += depth, unpacked += depth * BLOCK_N)
        ACCUMULATE_TILES(_tile_dpbsud, quantized + j, stride, unpacked, has_two_tiles);
    store_tiles((uint8_t *)sums, has_two_tiles);
}

static void gemm_kernel_amx(size_t block_m, const Activations *activations, const uint8_t *panel, int has_zero_points,
    const Epilogue *epilogue, size_t row, size_t column) {
    const size_t stride = activations->stride, group_size = activations->group_size;
    const int8_t *quantized = activations->quantized + row * stride;
    int32_t sums[AMX_BLOCK_M][BLOCK_N] __attribute__((aligned(64)));
    uint8_t unpacked[MAX_GROUP_SIZE * BLOCK_N] __attribute__((aligned(64)));
    __m512 totals[AMX_BLOCK_M][2];
    for (size_t i = 0; i < block_m; i++) totals[i][0] = totals[i][1] = _mm512_setzero_ps();
    for (size_t g = 0; g < activations->num_groups; g++, quantized += group_size) {
        const Group group = read_group(panel, has_zero_points);
        panel = unpack_group(group.weights, group_size, unpacked);
        sum_group_amx(block_m, quantized, stride, unpacked, group_size, tile_depth(group_size), sums);
        for (size_t i = 0; i < block_m; i++) {
            const __m512i sum = _mm512_set1_epi32(activations->group_sums[(row + i) * activations->num_groups + g]);
            const __m512i left = _mm512_dpwssd_epi32(_mm512_load_si512(sums[i]), group.left_zero_points, sum);
            const __m512i right = _mm512_dpwssd_epi32(_mm512_load_si512(sums[i] + LANES), group.right_zero_points, sum);
            totals[i][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(left), group.left_scales, totals[i][0]);
            totals[i][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(right), group.right_scales, totals[i][1]);
        }
    }
    for (size_t i = 0; i < block_m; i++)
        for (size_t half = 0; half < 2; half++) store_sums(totals[i][half], epilogue, row + i, column + half * LANES);
}

/* Sums of a token within each group, negated: zero points times them are added. */
static void sum_groups(int8_t *quantized, size_t group_size, size_t num_groups, int32_t *group_sums) {
    const __mmask64 mask = group_size < BLOCK_K ? (1ull << group_size) - 1 : ~0ull;
    for (size_t g = 0; g < num_groups; g++, quantized += group_size) {
        __m512i sums = _mm512_setzero_si512();
        for (size_t j = 0; j < group_size; j += BLOCK_K)
            sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(mask, quantized + j));
        group_sums[g] = -_mm512_reduce_add_epi32(sums);
    }
}

void int4_scaled_mm(const LinearArguments *layer, const uint8_t *packed_weight, const float *weight_scales,
    size_t group_size, int has_zero_points, int isa) {
    const size_t m = layer->m, k = layer->k, n = layer->n, num_groups = round_up(k, group_size) / group_size;
    int8_t *scratch = layer->scratch;
    const size_t width = padded_k(k, group_size), panel_bytes = num_groups * group_bytes(group_size, has_zero_points);
    const size_t stride = width + BLOCK_K; /* A power of two would map all tokens to the same few cache lines. */
    float *act_scales = (float *)(scratch + round_up(m, AMX_BLOCK_M) * stride);
    int32_t *act_row_sums = (int32_t *)(act_scales + m), *group_sums = act_row_sums + m;
    const Epilogue epilogue = {act_scales, act_row_sums, weight_scales, layer->bias, layer->residual, layer->output, n};
    const Activations activations = {scratch, stride, group_sums, num_groups, group_size};
    const size_t vnni_block_m = m <= INT4_SINGLE_BLOCK_M ? INT4_SINGLE_BLOCK_M : INT4_BLOCK_M;
    const size_t max_block_m = isa == ISA_AMX ? AMX_BLOCK_M : vnni_block_m;
    const size_t num_blocks = round_up(m, max_block_m) / max_block_m;
    TileConfig tile_config = TILE_CONFIG;
    tile_config.bytes_per_row[4] = tile_config.bytes_per_row[5] = (uint16_t)tile_depth(group_size);
    tile_config.rows[6] = tile_config.rows[7] = (uint8_t)(tile_depth(group_size) / 4);
    const int chunk = panels_at_a_time(n, layer->num_threads);
#pragma omp parallel num_threads(layer->num_threads)
    {
        if (isa == ISA_AMX) LOAD_TILE_CONFIG(tile_config);
#pragma omp for
        for (size_t row = 0; row < m; row++) {
            int8_t *quantized = scratch + row * stride;
            quantize_row_int8(layer, row, quantized, act_scales + row, act_row_sums + row);
            memset(quantized + round_up(k, BLOCK_K), 0, width - round_up(k, BLOCK_K));
            sum_groups(quantized, group_size, num_groups, group_sums + row * num_groups);
        }
#pragma omp for schedule(dynamic, chunk)
        for (size_t column = 0; column < n; column += BLOCK_N)
            for (size_t block = 0; block < num_blocks; block++) {
                const size_t row = m * block / num_blocks, block_m = m * (block + 1) / num_blocks - row;
                const uint8_t *panel = packed_weight + column / BLOCK_N * panel_bytes;
                if (isa == ISA_AMX)
                    gemm_kernel_amx(block_m, &activations, panel, has_zero_points, &epilogue, row, column);
                else dispatch_vnni(block_m, &activations, panel, has_zero_points, &epilogue, row, column);
            }
        if (isa == ISA_AMX) _tile_release();
    }
}
