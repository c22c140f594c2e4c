/* Products of float32 tokens with int8 weights on an x86 CPU: AMX where it is there, else AVX-512 VNNI.
 *
 * A token is rounded to int8 by a scale of its own, and sums of integers are exact: its result is bit by bit the same
 * whoever else is in the batch, and on either kind of instruction. Both read the same order of weights:
 *
 *     a panel      PANEL outputs, one after the other through memory
 *     in a panel   for each 4 inputs, of each output those 4 weights: [inputs / 4][PANEL][4]
 *     a weight     + 128: the instructions multiply signed by unsigned; 128 times a token's sum is taken off again
 *
 * Inputs are filled up to a multiple of BLOCK, outputs to one of PANEL. Threads are OpenMP's, by the runtime that torch
 * has loaded: its team is the one that computes everything else. Knows nothing of models; `native.py` says what the
 * functions want.
 */
#include "simd_avx512.h"
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    PANEL = 32,  /* outputs: two registers, or two tiles, of LANES each */
    BLOCK = 64,  /* inputs: a tile's width */
    ROWS = 12,   /* tokens at once without AMX: two sums of each fit into the registers */
    TILED = 32,  /* tokens at once with AMX: two tiles */
    AHEAD = 2048 /* bytes: so far ahead weights are asked for. At 1 token nothing else hides the memory's latency. */
};

enum { NONE, VNNI, AMX }; /* as `native.py` has them */

typedef struct {
    const float *gains;   /* (tokens) */
    const int32_t *sums;  /* (tokens), of the rounded inputs */
    const float *scales;  /* (outputs) */
    const float *bias;    /* (outputs), or NULL */
    const float *onto;    /* (tokens, outputs), or NULL */
    float *outputs;       /* (tokens, outputs) */
    size_t width;         /* of a row of those */
} Epilogue;

static size_t round_up(size_t number, size_t of) { return (number + of - 1) / of * of; }

static __mmask16 mask_of(size_t left) { return left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1); }

/* What asks the CPU must itself run on any. */
__attribute__((target("no-avx"))) int int8_level(void) {
    const int xcomp_perm = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM: Linux keeps tiles from who did not ask */
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("fma") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vnni"))
        return NONE;
    return __builtin_cpu_supports("amx-int8") && !syscall(SYS_arch_prctl, xcomp_perm, tile_data) ? AMX : VNNI;
}

size_t int8_packed_bytes(size_t outputs, size_t inputs) { return round_up(outputs, PANEL) * round_up(inputs, BLOCK); }

size_t int8_scratch_bytes(size_t tokens, size_t inputs) {
    return round_up(tokens, TILED) * (round_up(inputs, BLOCK) + BLOCK) + tokens * (sizeof(float) + sizeof(int32_t));
}

void int8_pack(const int8_t *weights, uint8_t *packed, size_t outputs, size_t inputs) {
    const size_t fours = round_up(inputs, BLOCK) / 4, whole = inputs / 4;
    for (size_t panel = 0; panel < round_up(outputs, PANEL) / PANEL; panel++) {
        uint8_t *to = packed + panel * fours * 4 * PANEL;
        for (size_t four = 0; four < fours; four++)
            for (size_t column = 0; column < PANEL; column++, to += 4) {
                const size_t output = panel * PANEL + column;
                uint32_t taken = 0;
                if (output < outputs && four < whole)
                    memcpy(&taken, weights + output * inputs + four * 4, 4);
                else if (output < outputs && four * 4 < inputs)
                    memcpy(&taken, weights + output * inputs + four * 4, inputs % 4);
                taken ^= 0x80808080;
                memcpy(to, &taken, 4);
            }
    }
}

static __m512 silu(__m512 x) {
    const __m512 other = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), other));
}

/* One token to int8: over its largest number, times 127. What a norm multiplies all of it with joins the gain.
 * Where it is gated, as many numbers follow, and it becomes silu(it) * those first, in place. */
static void round_token(
    float *token, int gated, const float *norm, float epsilon, size_t inputs, int8_t *rounded, float *gain, int32_t *sum
) {
    __m512 largest = _mm512_set1_ps(1e-30f), squares = _mm512_setzero_ps(); /* no scale is zero, not even of zeros */
    __mmask16 nan = 0;
    for (size_t k = 0; k < inputs; k += LANES) {
        const __mmask16 in = mask_of(inputs - k);
        __m512 numbers = _mm512_maskz_loadu_ps(in, token + k);
        if (gated) {
            numbers = _mm512_mul_ps(silu(numbers), _mm512_maskz_loadu_ps(in, token + inputs + k));
            _mm512_mask_storeu_ps(token + k, in, numbers);
        }
        if (norm) {
            squares = _mm512_fmadd_ps(numbers, numbers, squares);
            numbers = _mm512_mul_ps(numbers, _mm512_maskz_loadu_ps(in, norm + k));
        }
        nan |= _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(numbers));
    }
    const float most = nan ? NAN : _mm512_reduce_max_ps(largest);
    const __m512 by = _mm512_set1_ps(127 / most);
    __m512i total = _mm512_setzero_si512();
    for (size_t k = 0; k < inputs; k += LANES) {
        const __mmask16 in = mask_of(inputs - k);
        __m512 numbers = _mm512_maskz_loadu_ps(in, token + k);
        if (norm) numbers = _mm512_mul_ps(numbers, _mm512_maskz_loadu_ps(in, norm + k));
        const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(numbers, by));
        total = _mm512_add_epi32(total, integers);
        _mm_storeu_si128((__m128i *)(rounded + k), _mm512_cvtepi32_epi8(integers));
    }
    memset(rounded + round_up(inputs, LANES), 0, round_up(inputs, BLOCK) - round_up(inputs, LANES));
    *gain = most / 127 * (norm ? 1 / sqrtf(_mm512_reduce_add_ps(squares) / (float)inputs + epsilon) : 1);
    *sum = _mm512_reduce_add_epi32(total);
}

/* LANES sums of a token, from `output` on, become outputs. */
static void store(__m512i products, const Epilogue *epilogue, size_t token, size_t output) {
    if (output >= epilogue->width) return;
    const __mmask16 in = mask_of(epilogue->width - output);
    const size_t place = token * epilogue->width + output;
    const __m512i exact = _mm512_sub_epi32(products, _mm512_slli_epi32(_mm512_set1_epi32(epilogue->sums[token]), 7));
    const __m512 scales = _mm512_maskz_loadu_ps(in, epilogue->scales + output);
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scales);
    __m512 base = _mm512_setzero_ps();
    if (epilogue->bias) base = _mm512_maskz_loadu_ps(in, epilogue->bias + output);
    if (epilogue->onto) base = _mm512_add_ps(base, _mm512_maskz_loadu_ps(in, epilogue->onto + place));
    const __m512 gain = _mm512_set1_ps(epilogue->gains[token]);
    _mm512_mask_storeu_ps(epilogue->outputs + place, in, _mm512_fmadd_ps(scaled, gain, base));
}

/* `rows` tokens from `token` on by a panel. How many is a constant wherever this is inlined: sums stay in registers. */
static inline __attribute__((always_inline)) void by_vnni(
    const size_t rows, const int8_t *rounded, size_t stride, const uint8_t *weights, size_t inputs,
    const Epilogue *epilogue, size_t token, size_t output
) {
    __m512i left[ROWS], right[ROWS];
    for (size_t row = 0; row < rows; row++) left[row] = right[row] = _mm512_setzero_si512();
    for (size_t k = 0; k < inputs; k += 4, weights += 4 * PANEL) {
        _mm_prefetch(weights + AHEAD, _MM_HINT_T0);
        _mm_prefetch(weights + AHEAD + 64, _MM_HINT_T0);
        const __m512i some = _mm512_loadu_si512(weights), others = _mm512_loadu_si512(weights + 64);
#pragma GCC unroll 12
        for (size_t row = 0; row < rows; row++) {
            int32_t four;
            memcpy(&four, rounded + row * stride + k, 4);
            left[row] = _mm512_dpbusd_epi32(left[row], some, _mm512_set1_epi32(four));
            right[row] = _mm512_dpbusd_epi32(right[row], others, _mm512_set1_epi32(four));
        }
    }
#pragma GCC unroll 12
    for (size_t row = 0; row < rows; row++) {
        store(left[row], epilogue, token + row, output);
        store(right[row], epilogue, token + row, output + LANES);
    }
}

static void rows_by_vnni(
    size_t rows, const int8_t *rounded, size_t stride, const uint8_t *weights, size_t inputs,
    const Epilogue *epilogue, size_t token, size_t output
) {
#define OF(number) case number: by_vnni(number, rounded, stride, weights, inputs, epilogue, token, output); break;
    switch (rows) { OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8) OF(9) OF(10) OF(11) OF(12) }
#undef OF
}

/* Tiles 0 to 3 are sums, 4 and 5 tokens, 6 and 7 weights. */
static void rows_by_amx(
    size_t rows, const int8_t *rounded, size_t stride, const uint8_t *weights, size_t inputs,
    const Epilogue *epilogue, size_t token, size_t output
) {
    int32_t sums[2][2][LANES][LANES] __attribute__((aligned(64)));
    const int two = rows > LANES;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (size_t k = 0; k < inputs; k += BLOCK, weights += BLOCK * PANEL) {
        if (!token) /* later tokens find them in the cache */
            for (size_t line = 0; line < BLOCK * PANEL; line += 64) _mm_prefetch(weights + AHEAD + line, _MM_HINT_T0);
        _tile_loadd(6, weights, 4 * PANEL);
        _tile_loadd(7, weights + 64, 4 * PANEL);
        _tile_loadd(4, rounded + k, stride);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (two) {
            _tile_loadd(5, rounded + LANES * stride + k, stride);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0][0], sizeof sums[0][0][0]);
    _tile_stored(1, sums[0][1], sizeof sums[0][0][0]);
    _tile_stored(2, sums[1][0], sizeof sums[0][0][0]);
    _tile_stored(3, sums[1][1], sizeof sums[0][0][0]);
    for (size_t row = 0; row < rows; row++)
        for (size_t half = 0; half < 2; half++) {
            const __m512i products = _mm512_load_si512(sums[row / LANES][half][row % LANES]);
            store(products, epilogue, token + row, output + half * LANES);
        }
}

static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_in_row[16];
    uint8_t rows[16];
} TILES = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void int8_product(
    float *tokens, const uint8_t *packed, const float *scales, const float *bias, const float *norm, float epsilon,
    int gated, const float *onto, float *outputs, int8_t *scratch, size_t count, size_t inputs, size_t width, int level,
    int threads
) {
    const size_t padded = round_up(inputs, BLOCK), row = inputs * (gated ? 2 : 1);
    const size_t stride = padded + BLOCK; /* a power of two would have all tokens share few lines of a cache */
    const size_t at_once = level == AMX ? TILED : ROWS;
    float *gains = (float *)(scratch + round_up(count, TILED) * stride);
    int32_t *sums = (int32_t *)(gains + count);
    const Epilogue epilogue = {gains, sums, scales, bias, onto, outputs, width};
#pragma omp parallel num_threads(threads)
    {
        /* Not by the intrinsic, of whose argument gcc 12 keeps the first 8 bytes. */
        if (level == AMX) __asm__ volatile("ldtilecfg %0" ::"m"(TILES));
#pragma omp for
        for (size_t token = 0; token < count; token++) {
            int8_t *rounded = scratch + token * stride;
            round_token(tokens + token * row, gated, norm, epsilon, inputs, rounded, gains + token, sums + token);
        }
#pragma omp for
        for (size_t output = 0; output < width; output += PANEL)
            for (size_t token = 0; token < count; token += at_once) {
                const size_t rows = count - token < at_once ? count - token : at_once;
                const uint8_t *weights = packed + output * padded;
                (level == AMX ? rows_by_amx : rows_by_vnni)(
                    rows, scratch + token * stride, stride, weights, padded, &epilogue, token, output
                );
            }
        if (level == AMX) _tile_release();
    }
}
