/* AVX-512 helpers shared by the kernels. */
#ifndef SIMD_AVX512_H
#define SIMD_AVX512_H

#include <immintrin.h>
#include <stddef.h>

enum { LANES = 16 }; /* 32-bit numbers in a register */

/* The lanes of numbers that remain, at most all. */
static inline __mmask16 tail_mask(size_t remaining) {
    return remaining >= LANES ? 0xffff : (__mmask16)((1u << remaining) - 1);
}

/* exp(x) = 2^exponent * exp(remainder) with |remainder| <= ln(2) / 2, where exp is its Taylor polynomial of degree 6.
 * The relative error is below 2e-7 + 1e-7 * |x|. exp(-inf) is 0: scalef by -inf also turns a NaN remainder into 0. */
static inline __m512 exp_ps(__m512 x) {
    const __m512 log2_exp = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 exponent = _mm512_roundscale_ps(log2_exp, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 remainder = _mm512_mul_ps(_mm512_sub_ps(log2_exp, exponent), _mm512_set1_ps(0.69314718f));
    __m512 sum = _mm512_set1_ps(1.f / 720);
    for (int n = 5, factorial = 720; n >= 0; n--)
        sum = _mm512_fmadd_ps(sum, remainder, _mm512_set1_ps(1.f / (factorial /= n + 1)));
    return _mm512_scalef_ps(sum, exponent);
}

/* Convert to bfloat16: round to nearest, halves to even. */
static inline __m256i to_bfloat16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan, _mm512_set1_epi32(0x7fc0)));
}

#endif
