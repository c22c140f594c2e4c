/* AMX instructions as plain C, to test kernels on CPUs without AMX. Compile with `-include emulated_amx.h`.
 *
 * Tiles belong to a thread, as registers do. A wrong shape, or a tile used without a configuration, aborts.
 */
#ifndef EMULATED_AMX_H
#define EMULATED_AMX_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} EmulatedTileConfig;

enum { EMULATED_TILES = 8, EMULATED_ROWS = 16, EMULATED_ROW_BYTES = 64 };

static __thread EmulatedTileConfig emulated_config;
static __thread uint8_t emulated_tiles[EMULATED_TILES][EMULATED_ROWS][EMULATED_ROW_BYTES];

static inline void emulated_check(int holds) {
    if (!holds) abort();
}

static inline void emulated_load_config(const void *config) {
    memcpy(&emulated_config, config, sizeof emulated_config);
    emulated_check(emulated_config.palette == 1 && emulated_config.start_row == 0);
    for (int tile = 0; tile < EMULATED_TILES; tile++)
        emulated_check(
            emulated_config.rows[tile] <= EMULATED_ROWS && emulated_config.bytes_per_row[tile] <= EMULATED_ROW_BYTES
        );
    memset(emulated_tiles, 0, sizeof emulated_tiles);
}

static inline void emulated_release(void) { memset(&emulated_config, 0, sizeof emulated_config); }

static inline void emulated_zero(int tile) {
    emulated_check(emulated_config.palette == 1);
    memset(emulated_tiles[tile], 0, sizeof emulated_tiles[tile]);
}

static inline void emulated_load(int tile, const void *base, size_t stride) {
    emulated_zero(tile);
    for (size_t row = 0; row < emulated_config.rows[tile]; row++)
        memcpy(emulated_tiles[tile][row], (const uint8_t *)base + row * stride, emulated_config.bytes_per_row[tile]);
}

static inline void emulated_store(int tile, void *base, size_t stride) {
    emulated_check(emulated_config.palette == 1);
    for (size_t row = 0; row < emulated_config.rows[tile]; row++)
        memcpy((uint8_t *)base + row * stride, emulated_tiles[tile][row], emulated_config.bytes_per_row[tile]);
}

/* (rows of a) x (bytes of a / 4) x (bytes of b / 4): each row of b holds 4 bytes of each column. */
static inline void emulated_check_product(int sums, int a, int b) {
    const EmulatedTileConfig *config = &emulated_config;
    emulated_check(
        config->palette == 1 && config->rows[sums] == config->rows[a] &&
        config->bytes_per_row[sums] == config->bytes_per_row[b] && config->bytes_per_row[a] == 4 * config->rows[b] &&
        config->bytes_per_row[sums] % 4 == 0
    );
}

static inline void emulated_dot_int8(int sums, int a, int b, int a_is_signed, int b_is_signed) {
    emulated_check_product(sums, a, b);
    for (size_t row = 0; row < emulated_config.rows[a]; row++) {
        uint32_t outputs[EMULATED_ROW_BYTES / 4]; /* unsigned, because sums wrap around */
        memcpy(outputs, emulated_tiles[sums][row], sizeof outputs);
        for (size_t group = 0; group < emulated_config.rows[b]; group++)
            for (size_t column = 0; column < EMULATED_ROW_BYTES / 4; column++)
                for (size_t i = 0; i < 4; i++) {
                    const uint8_t left = emulated_tiles[a][row][4 * group + i];
                    const uint8_t right = emulated_tiles[b][group][4 * column + i];
                    const int32_t factor = b_is_signed ? (int8_t)right : right;
                    outputs[column] += (uint32_t)((a_is_signed ? (int8_t)left : left) * factor);
                }
        memcpy(emulated_tiles[sums][row], outputs, sizeof outputs);
    }
}

/* Denormal numbers are zero, as in the instruction. */
static inline float emulated_flush(float number) { return __builtin_fabsf(number) < __FLT_MIN__ ? 0 : number; }

static inline float emulated_bfloat16(const uint8_t *bytes) {
    float number;
    memcpy(&number, (const uint8_t[4]){0, 0, bytes[0], bytes[1]}, sizeof number);
    return emulated_flush(number);
}

/* Even and odd features are summed apart, then added to each other and to the former sum. */
static inline void emulated_dot_bfloat16(int sums, int a, int b) {
    emulated_check_product(sums, a, b);
    for (size_t row = 0; row < emulated_config.rows[a]; row++) {
        float outputs[EMULATED_ROW_BYTES / 4], even[EMULATED_ROW_BYTES / 4] = {0}, odd[EMULATED_ROW_BYTES / 4] = {0};
        memcpy(outputs, emulated_tiles[sums][row], sizeof outputs);
        for (size_t pair = 0; pair < emulated_config.rows[b]; pair++) {
            const uint8_t *factors = emulated_tiles[a][row] + 4 * pair;
            const float even_factor = emulated_bfloat16(factors), odd_factor = emulated_bfloat16(factors + 2);
            for (size_t column = 0; column < EMULATED_ROW_BYTES / 4; column++) {
                const uint8_t *two = emulated_tiles[b][pair] + 4 * column;
                even[column] = emulated_flush(__builtin_fmaf(even_factor, emulated_bfloat16(two), even[column]));
                odd[column] = emulated_flush(__builtin_fmaf(odd_factor, emulated_bfloat16(two + 2), odd[column]));
            }
        }
        for (size_t column = 0; column < EMULATED_ROW_BYTES / 4; column++)
            outputs[column] = emulated_flush(outputs[column] + emulated_flush(even[column] + odd[column]));
        memcpy(emulated_tiles[sums][row], outputs, sizeof outputs);
    }
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#undef _tile_dpbf16ps
#define LOAD_TILE_CONFIG(config) emulated_load_config(&(config))
#define _tile_release() emulated_release()
#define _tile_zero(tile) emulated_zero(tile)
#define _tile_loadd(tile, base, stride) emulated_load(tile, base, stride)
#define _tile_stream_loadd(tile, base, stride) emulated_load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_store(tile, base, stride)
#define _tile_dpbssd(sums, a, b) emulated_dot_int8(sums, a, b, 1, 1)
#define _tile_dpbsud(sums, a, b) emulated_dot_int8(sums, a, b, 1, 0)
#define _tile_dpbusd(sums, a, b) emulated_dot_int8(sums, a, b, 0, 1)
#define _tile_dpbuud(sums, a, b) emulated_dot_int8(sums, a, b, 0, 0)
#define _tile_dpbf16ps(sums, a, b) emulated_dot_bfloat16(sums, a, b)

#endif
