/* Calls the kernels with odd sizes on exactly sized buffers, for AddressSanitizer and UBSan. */
#include "int8_heads.h"

#include <stdlib.h>

static float *floats(size_t count) {
    float *numbers = malloc(count * sizeof *numbers);
    for (size_t i = 0; i < count; i++) numbers[i] = (float)(rand() % 201 - 100) / 50;
    return numbers;
}

static void test_gemm(size_t m, size_t n, size_t k, int isa) {
    int8_t *weight = malloc(n * k), *scratch = malloc(int8_scratch_bytes(m, k));
    uint8_t *packed_weight = malloc(int8_packed_bytes(n, k));
    float *input = floats(2 * m * k), *scales = floats(n), *bias = floats(n), *norm = floats(k),
          *residual = floats(m * n);
    float *output = malloc(m * n * sizeof *output);
    for (size_t i = 0; i < n * k; i++) weight[i] = (int8_t)(rand() % 255 - 127);
    int8_pack_weight(weight, packed_weight, n, k);
    const LinearArguments with_norm = {input, norm, 0.1f, 0, bias, residual, output, scratch, m, k, n, 2};
    const LinearArguments gated = {input, NULL, 0, 1, NULL, NULL, output, scratch, m, k, n, 2};
    int8_scaled_mm(&with_norm, packed_weight, scales, isa);
    int8_scaled_mm(&gated, packed_weight, scales, isa);
    int8_t *argmax_scratch = malloc(int8_argmax_scratch_bytes(m, k, 2));
    int64_t *largest = malloc(m * sizeof *largest);
    const LinearArguments head = {input, NULL, 0, 0, bias, NULL, NULL, argmax_scratch, m, k, n, 2};
    int8_argmax(&head, packed_weight, scales, largest, isa);
    free(argmax_scratch), free(largest);
    free(weight), free(scratch), free(packed_weight), free(input), free(scales), free(bias), free(norm), free(residual);
    free(output);
}

static void test_int4_gemm(size_t m, size_t n, size_t k, size_t group_size, int has_zero_points, int isa) {
    const size_t num_groups = (k + group_size - 1) / group_size;
    uint8_t *weight = malloc(n * k), *zero_points = has_zero_points ? calloc(n, num_groups) : NULL;
    uint16_t *group_scales = calloc(n * num_groups, sizeof *group_scales);
    uint8_t *packed_weight = malloc(int4_packed_bytes(n, k, group_size, has_zero_points));
    int8_t *scratch = malloc(int4_scratch_bytes(m, k, group_size));
    float *input = floats(2 * m * k), *scales = floats(n), *bias = floats(n), *norm = floats(k),
          *residual = floats(m * n);
    float *output = malloc(m * n * sizeof *output);
    for (size_t i = 0; i < n * k; i++) weight[i] = (uint8_t)(rand() % 16);
    int4_pack_weight(weight, group_scales, zero_points, packed_weight, n, k, group_size);
    const LinearArguments with_norm = {input, norm, 0.1f, 0, bias, residual, output, scratch, m, k, n, 2};
    const LinearArguments gated = {input, NULL, 0, 1, NULL, NULL, output, scratch, m, k, n, 2};
    int4_scaled_mm(&with_norm, packed_weight, scales, group_size, has_zero_points, isa);
    int4_scaled_mm(&gated, packed_weight, scales, group_size, has_zero_points, isa);
    free(weight), free(zero_points), free(group_scales), free(packed_weight), free(scratch), free(input), free(scales);
    free(bias), free(norm), free(residual), free(output);
}

static void test_bf16_gemm(size_t m, size_t n, size_t k, int isa) {
    bfloat16 *weight = malloc(n * k * sizeof *weight), *packed_weight = malloc(bf16_packed_bytes(n, k));
    uint8_t *scratch = malloc(bf16_scratch_bytes(m, k, isa));
    float *input = floats(2 * m * k), *bias = floats(n), *norm = floats(k), *residual = floats(m * n);
    float *output = malloc(m * n * sizeof *output);
    for (size_t i = 0; i < n * k; i++) weight[i] = (bfloat16)(0x3f00 + rand() % 256);
    bf16_pack_weight(weight, packed_weight, n, k);
    const LinearArguments with_norm = {input, norm, 0.1f, 0, bias, residual, output, scratch, m, k, n, 2};
    const LinearArguments gated = {input, NULL, 0, 1, NULL, NULL, output, scratch, m, k, n, 2};
    bf16_mm(&with_norm, packed_weight, isa);
    bf16_mm(&gated, packed_weight, isa);
    free(weight), free(packed_weight), free(scratch), free(input), free(bias), free(norm), free(residual), free(output);
}

static void test_attention(
    size_t num_heads, size_t num_kv_heads, size_t head_dim, size_t window, int is_float32, int is_int8) {
    enum { SEQS = 3, SLOTS = 104, TOKENS = 37 };
    /* First token, tokens before the step, position of the first key in the cache, its slot. */
    const int64_t sequences[4 * SEQS] = {0, 1, 0, 0, 1, 130, 130 - 33, 1, 2, 70, 0, 34};
    const int64_t tiles[3 * 5] = {0, 0, 1, 1, 0, 1, 2, 0, 5, 2, 5, 16, 2, 21, 14};
    const size_t key_head = is_int8 ? int8_head_bytes(head_dim) : head_dim;
    const size_t key_stride = num_kv_heads * key_head, query_stride = num_heads * head_dim;
    const size_t bytes = is_float32 ? sizeof(float) : sizeof(bfloat16), key_bytes = is_int8 ? 1 : bytes;
    int64_t *slot_mapping = malloc(SLOTS * sizeof *slot_mapping);
    void *cache = calloc(SLOTS * key_stride, key_bytes), *key = calloc(TOKENS * key_stride, key_bytes);
    void *query = calloc(TOKENS * query_stride, bytes);
    float *output = malloc(TOKENS * query_stride * sizeof *output), *sinks = floats(num_heads);
    for (int64_t i = 0; i < SLOTS; i++) slot_mapping[i] = SLOTS - 1 - i;
    paged_attention(
        query, key, key, query_stride, key_stride, key_stride, cache, cache, key_stride, slot_mapping, sequences, tiles, 5,
        num_heads, num_kv_heads, head_dim, window, 0.125f, 30, sinks, output, is_float32, is_int8, 2
    );
    free(slot_mapping), free(cache), free(key), free(query), free(output), free(sinks);
}

static void test_quantize_kv(size_t tokens, size_t head_dim, int is_float32) {
    enum { HEADS = 3 };
    float *key = floats(tokens * HEADS * head_dim), *value = calloc(tokens * HEADS * head_dim, sizeof *value);
    int8_t *output = malloc(2 * tokens * HEADS * int8_head_bytes(head_dim));
    const size_t stride = HEADS * head_dim;
    /* As bfloat16, floats are numbers of any size, and NaN. */
    quantize_kv(key, value, stride, stride, output, tokens, HEADS, head_dim, is_float32, 2);
    free(key), free(value), free(output);
}

#ifdef EMULATED_AMX_H
enum { HAS_EMULATED_AMX = 1 };
#else
enum { HAS_EMULATED_AMX = 0 };
#endif

static void test_rotation(size_t tokens, size_t head_dim, size_t rotary_dim) {
    enum { HEADS = 3 };
    float *heads = floats(tokens * HEADS * head_dim), *cos = floats(tokens * rotary_dim);
    bfloat16 *output = malloc(tokens * HEADS * head_dim * sizeof *output);
    rotate_to_bf16(heads, cos, cos, output, tokens, HEADS, 2, head_dim, rotary_dim, 2);
    free(heads), free(cos), free(output);
}

int main(void) {
    const size_t sizes[] = {1, 13, 33, 70};
    const int best_isa = HAS_EMULATED_AMX ? ISA_AMX : cpu_isa();
    const int has_bf16_isa[] = {
        [BF16_ISA_AVX512] = 1,
        [BF16_ISA_AVX512_BF16] = __builtin_cpu_supports("avx512bf16"),
        [BF16_ISA_AMX] = HAS_EMULATED_AMX || bf16_isa() == BF16_ISA_AMX,
    };
    for (int isa = ISA_AVX512_VNNI; isa <= best_isa; isa++)
        for (size_t m = 0; m < 4; m++)
            for (size_t n = 0; n < 4; n++)
                for (size_t k = 0; k < 4; k++) {
                    test_gemm(sizes[m], sizes[n], sizes[k], isa);
                    for (size_t group_size = 32; group_size <= 128; group_size *= 2)
                        test_int4_gemm(sizes[m], sizes[n], sizes[k], group_size, (m + n + k) % 2, isa);
                }
    for (int isa = BF16_ISA_AVX512; isa <= BF16_ISA_AMX; isa++)
        for (size_t m = 0; m < 4 && has_bf16_isa[isa]; m++)
            for (size_t n = 0; n < 4; n++)
                for (size_t k = 0; k < 4; k++) test_bf16_gemm(sizes[m], sizes[n], sizes[k], isa);
    for (size_t head_dim = 16; head_dim <= 256; head_dim += 48)
        for (int is_float32 = 0; is_float32 < 2; is_float32++)
            for (int is_int8 = 0; is_int8 < 2; is_int8++)
                test_attention(5, 1, head_dim, 34, is_float32, is_int8),
                    test_attention(6, 3, head_dim, 34, is_float32, is_int8);
    for (size_t head_dim = 16; head_dim <= 256; head_dim += 48)
        for (int is_float32 = 0; is_float32 < 2; is_float32++)
            test_quantize_kv(1, head_dim, is_float32), test_quantize_kv(70, head_dim, is_float32);
    test_rotation(1, 64, 64), test_rotation(13, 50, 20);
    return 0;
}
