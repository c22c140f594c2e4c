/* What `paged_attention.c` and `int8_heads.h` share. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "kernels.h"
#include "simd_avx512.h"

enum {
    BLOCK_KEYS = 64, /* keys per block: 64 features of them and of their values fit into the L1 cache */
    MAX_ROWS = 96,   /* queries x heads per job; `ATTENTION_ROWS` in ops.py */
    MAX_HEAD_DIM = 256
};

static inline size_t element_bytes(int is_float32) { return is_float32 ? sizeof(float) : sizeof(bfloat16); }

/* LANES numbers from element `index` of a row on, in float32 or bfloat16. */
static inline __m512 load(const void *row, size_t index, int is_float32) {
    if (is_float32) return _mm512_loadu_ps((const float *)row + index);
    const __m256i halves = _mm256_loadu_si256((const __m256i *)((const bfloat16 *)row + index));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

static inline void transpose_16x16(__m512i *rows) {
    __m512i pairs[LANES], quads[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            quads[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            quads[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i low = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0xdd);
        rows[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        rows[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

#endif
