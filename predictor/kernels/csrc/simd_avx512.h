/* What both `int8.c` and `paged.c` need of AVX-512. */
#include <immintrin.h>

enum { LANES = 16 }; /* 32-bit numbers in a register */

/* exp(x): 2^whole * exp(rest) with |rest| <= ln(2) / 2, and that is Taylor's polynomial: within 2e-7, and 1e-7 * |x|.
 * Of -inf it is 0: rest is no number then, and scalef by -inf makes 0 of that. */
static inline __m512 exponential(__m512 x) {
    const __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(power, whole), _mm512_set1_ps(0.69314718f));
    __m512 sum = _mm512_set1_ps(1.f / 720);
    for (int n = 5, of = 720; n >= 0; n--) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.f / (of /= n + 1)));
    return _mm512_scalef_ps(sum, whole);
}
