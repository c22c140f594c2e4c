/* Functions exported by libnative.so. `ops.py` and `gemm_ops.py` in `predictor/kernels/cpu` call them through ctypes
 * and document shapes.
 *
 * M is the number of tokens, N of output features, K of input features.
 */
#ifndef KERNELS_H
#define KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* In the order of `CPU_ISAS` and `BF16_ISAS` in ops.py. */
enum { ISA_NONE, ISA_AVX512_VNNI, ISA_AMX };
enum { BF16_ISA_NONE, BF16_ISA_AVX512, BF16_ISA_AVX512_BF16, BF16_ISA_AMX };

typedef uint16_t bfloat16;

/* A linear layer with what is fused into it. `LinearArguments` in gemm_ops.py has the same fields. */
typedef struct {
    float *input;             /* (M, K), or gate and up, (M, 2 K), with `silu_and_mul` */
    const float *norm_weight; /* (K), of an RMSNorm of the input; or NULL */
    float epsilon;
    int silu_and_mul;      /* the input is silu(gate) * up */
    const float *bias;     /* (N), or NULL */
    const float *residual; /* (M, N), added to the output; or NULL */
    float *output;         /* (M, N) */
    void *scratch;
    size_t m, k, n;
    int num_threads;
} LinearArguments;

int cpu_isa(void);

int bf16_isa(void);

size_t int8_packed_bytes(size_t n, size_t k);

size_t int8_scratch_bytes(size_t m, size_t k);

void int8_pack_weight(const int8_t *weight, uint8_t *packed_weight, size_t n, size_t k);

/* With `silu_and_mul` the product replaces gate in the input. */
void int8_scaled_mm(const LinearArguments *layer, const uint8_t *packed_weight, const float *weight_scales, int isa);

size_t int8_argmax_scratch_bytes(size_t m, size_t k, int num_threads);

/* Of the first N outputs the largest, without norm, activation, residual and output of the layer. */
void int8_argmax(const LinearArguments *layer, const uint8_t *packed_weight, const float *weight_scales,
    int64_t *largest_outputs, int isa);

size_t bf16_packed_bytes(size_t n, size_t k);

size_t bf16_scratch_bytes(size_t m, size_t k, int isa);

void bf16_pack_weight(const bfloat16 *weight, bfloat16 *packed_weight, size_t n, size_t k);

void bf16_mm(const LinearArguments *layer, const bfloat16 *packed_weight, int isa);

size_t int4_packed_bytes(size_t n, size_t k, size_t group_size, int has_zero_points);

size_t int4_scratch_bytes(size_t m, size_t k, size_t group_size);

void int4_pack_weight(const uint8_t *weight, const uint16_t *group_scales, const uint8_t *zero_points,
    uint8_t *packed_weight, size_t n, size_t k, size_t group_size);

/* With `silu_and_mul` the product replaces gate in the input. */
void int4_scaled_mm(const LinearArguments *layer, const uint8_t *packed_weight, const float *weight_scales,
    size_t group_size, int has_zero_points, int isa);

void rotate_to_bf16(const float *heads, const float *cos, const float *sin, bfloat16 *output, size_t num_tokens,
    size_t num_heads, size_t num_rotated_heads, size_t head_dim, size_t rotary_dim, int num_threads);

void quantize_kv(const void *key, const void *value, size_t key_stride, size_t value_stride, int8_t *output,
    size_t num_tokens, size_t num_heads, size_t head_dim, int is_float32, int num_threads);

void paged_attention(const void *query, const void *key, const void *value, size_t query_stride, size_t key_stride,
    size_t value_stride, const void *key_cache, const void *value_cache, size_t slot_stride,
    const int64_t *slot_mapping, const int64_t *sequences, const int64_t *tiles, size_t num_tiles, size_t num_heads,
    size_t num_kv_heads, size_t head_dim, size_t window, float scale, float softcap, const float *sinks, float *output,
    int is_float32, int is_int8, int num_threads);

#endif
