/* Causal attention over a paged KV cache that is read in place, and over the keys of the step, which need not be in it.
 *
 * A job is a few queries of one sequence, with all heads that share a KV head, over blocks of keys with an online
 * softmax, in float32. Blocks start at multiples of BLOCK_KEYS in the sequence, whatever the query, and a key that a
 * query does not see adds an exact zero to its sums. The result of a query is therefore bit-identical in any batch,
 * chunk of its prompt, and number of threads.
 */
#include "int8_heads.h"

#include <math.h>

enum { TILE_ROWS = 6 }; /* rows of a product that are computed at once: 24 accumulators, and 4 registers of keys */

/* One call's arguments, as in kernels.h. */
typedef struct {
    const void *query, *key, *value, *key_cache, *value_cache;
    size_t query_stride, key_stride, value_stride, slot_stride, num_queries_per_kv, head_dim, window;
    const int64_t *slot_mapping;
    float scale, softcap;
    const float *sinks;
} Arguments;

/* Where the keys of a sequence are: a row of `sequences`. */
typedef struct {
    int64_t first_token; /* of the step's tokens, the sequence's first one */
    int64_t past_length; /* tokens before the step */
    int64_t first_key;   /* position of the first key in the cache: later ones up to the step are there as well */
    int64_t first_slot;  /* index of its slot in `slot_mapping` */
} Sequence;

/* Queries of a job: a row of `tiles`. */
typedef struct {
    int64_t sequence, first_query, num_queries;
} Tile;

typedef struct {
    _Alignas(64) float query[MAX_ROWS * MAX_HEAD_DIM]; /* cache lines, so that registers are in one line each */
    float output[MAX_ROWS * MAX_HEAD_DIM];
    float keys[MAX_HEAD_DIM * BLOCK_KEYS];   /* transposed: (head_dim, BLOCK_KEYS) */
    float values[BLOCK_KEYS * MAX_HEAD_DIM]; /* (BLOCK_KEYS, width) */
    float max[MAX_ROWS], sum[MAX_ROWS];
    Int8Queries int8_queries; /* instead of `query` and `keys`, if keys are int8 */
    Int8Keys int8_keys;
} Workspace;

/* Transpose LANES keys into a column of `output`, (head_dim, BLOCK_KEYS). NULL is a key of zeros. */
static inline __attribute__((always_inline)) void transpose_keys(
    const void *const *keys, size_t head_dim, int is_float32, float *output) {
    const size_t step = is_float32 ? LANES : 2 * LANES; /* features in a register */
    for (size_t i = 0; i < head_dim; i += step) {
        const size_t remaining = (head_dim - i) * LANES / step;
        const __mmask16 mask = tail_mask(remaining);
        __m512i rows[LANES];
#pragma GCC unroll 16
        for (size_t k = 0; k < LANES; k++) {
            const char *features = (const char *)keys[k] + i * element_bytes(is_float32);
            rows[k] = keys[k] ? _mm512_maskz_loadu_epi32(mask, features) : _mm512_setzero_si512();
        }
        transpose_16x16(rows);
        float *target = output + i * BLOCK_KEYS;
#pragma GCC unroll 16
        for (size_t j = 0; j < LANES; j++) {
            if (is_float32) {
                _mm512_storeu_si512(target + j * BLOCK_KEYS, rows[j]);
            } else if (j < remaining) { /* pairs of features */
                _mm512_storeu_si512(target + 2 * j * BLOCK_KEYS, _mm512_slli_epi32(rows[j], 16));
                const __m512i odd = _mm512_and_si512(rows[j], _mm512_set1_epi32((int)0xffff0000));
                _mm512_storeu_si512(target + (2 * j + 1) * BLOCK_KEYS, odd);
            }
        }
    }
}

/* c += a b with `rows` rows, `vectors` registers of columns, and sums in the order of `depth`. */
static inline __attribute__((always_inline)) void add_tile(const float *a, size_t a_stride, const float *b,
    size_t b_stride, size_t depth, float *c, size_t c_stride, size_t rows, size_t vectors) {
    __m512 sums[TILE_ROWS][4];
#pragma GCC unroll 6
    for (size_t r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (size_t v = 0; v < vectors; v++) sums[r][v] = _mm512_loadu_ps(c + r * c_stride + v * LANES);
    for (size_t i = 0; i < depth; i++) {
        __m512 columns[4];
#pragma GCC unroll 4
        for (size_t v = 0; v < vectors; v++) columns[v] = _mm512_loadu_ps(b + i * b_stride + v * LANES);
#pragma GCC unroll 6
        for (size_t r = 0; r < rows; r++) {
            const __m512 factor = _mm512_set1_ps(a[r * a_stride + i]);
#pragma GCC unroll 4
            for (size_t v = 0; v < vectors; v++) sums[r][v] = _mm512_fmadd_ps(factor, columns[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (size_t r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (size_t v = 0; v < vectors; v++) _mm512_storeu_ps(c + r * c_stride + v * LANES, sums[r][v]);
}

/* c += a b with at most TILE_ROWS rows; `columns` is a multiple of two registers. */
static void add_product(const float *a, size_t a_stride, const float *b, size_t b_stride, size_t depth, float *c,
    size_t c_stride, size_t rows, size_t columns) {
    for (size_t column = 0; column < columns; column += 4 * LANES) {
        const float *b_columns = b + column;
        float *c_columns = c + column;
#define CASE_ROWS(count)                                                                                               \
    case count:                                                                                                        \
        if (columns - column >= 4 * LANES)                                                                             \
            add_tile(a, a_stride, b_columns, b_stride, depth, c_columns, c_stride, count, 4);                          \
        else add_tile(a, a_stride, b_columns, b_stride, depth, c_columns, c_stride, count, 2);                         \
        break;
        switch (rows) {
            CASE_ROWS(1)
            CASE_ROWS(2)
            CASE_ROWS(3)
            CASE_ROWS(4)
            CASE_ROWS(5)
            CASE_ROWS(6)
        }
#undef CASE_ROWS
    }
}

/* cap * tanh(scores / cap) */
static inline __m512 soft_cap(__m512 scores, float cap) {
    const __m512 exp_twice = exp_ps(_mm512_mul_ps(scores, _mm512_set1_ps(2 / cap)));
    const __m512 distance = _mm512_div_ps(_mm512_set1_ps(2 * cap), _mm512_add_ps(exp_twice, _mm512_set1_ps(1)));
    return _mm512_sub_ps(_mm512_set1_ps(cap), distance);
}

/* Replace a row's scores by exp(score - maximum), those outside of [begin, end) by 0, and scale its earlier sums. */
static void update_softmax(float *scores, size_t begin, size_t end, float softcap, float *running_max,
    float *running_sum, float *output, size_t width) {
    const uint64_t visible = ~(uint64_t)0 << begin & ~(uint64_t)0 >> (BLOCK_KEYS - end);
    __m512 rows[BLOCK_KEYS / LANES];
#pragma GCC unroll 4
    for (size_t v = 0; v < BLOCK_KEYS / LANES; v++) {
        const __m512 row = _mm512_loadu_ps(scores + v * LANES);
        const __mmask16 mask = (__mmask16)(visible >> (v * LANES));
        rows[v] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, softcap > 0 ? soft_cap(row, softcap) : row);
    }
    const __m512 maximum = _mm512_max_ps(_mm512_max_ps(rows[0], rows[1]), _mm512_max_ps(rows[2], rows[3]));
    const float block_max = _mm512_reduce_max_ps(maximum);
    const float new_max = block_max > *running_max ? block_max : *running_max;
#pragma GCC unroll 4
    for (size_t v = 0; v < BLOCK_KEYS / LANES; v++) {
        rows[v] = exp_ps(_mm512_sub_ps(rows[v], _mm512_set1_ps(new_max)));
        _mm512_storeu_ps(scores + v * LANES, rows[v]);
    }
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(rows[0], rows[1]), _mm512_add_ps(rows[2], rows[3]));
    const __m512 rescale = exp_ps(_mm512_set1_ps(*running_max - new_max));
    *running_sum = *running_sum * _mm512_cvtss_f32(rescale) + _mm512_reduce_add_ps(sum);
    if (new_max == *running_max) return;
    *running_max = new_max;
    for (size_t i = 0; i < width; i += LANES)
        _mm512_storeu_ps(output + i, _mm512_mul_ps(_mm512_loadu_ps(output + i), rescale));
}

/* Keys and values of a sequence, and of one KV head. */
typedef struct {
    const Arguments *arguments;
    const Sequence *sequence;
    size_t kv_head;
    int is_float32, is_int8;
} Source;

/* Find the key and the value at a position: of the step, or in the cache. */
static inline __attribute__((always_inline)) void locate(
    const Source *source, int64_t position, const void **key, const void **value) {
    const Arguments *arguments = source->arguments;
    const Sequence *sequence = source->sequence;
    const size_t size = source->is_int8 ? 1 : element_bytes(source->is_float32);
    const size_t head =
        source->kv_head * (source->is_int8 ? int8_head_bytes(arguments->head_dim) : arguments->head_dim);
    if (position >= sequence->past_length) {
        const size_t token = (size_t)(sequence->first_token + position - sequence->past_length);
        *key = (const char *)arguments->key + (token * arguments->key_stride + head) * size;
        *value = (const char *)arguments->value + (token * arguments->value_stride + head) * size;
    } else {
        const int64_t slot = arguments->slot_mapping[sequence->first_slot + position - sequence->first_key];
        const size_t offset = ((size_t)slot * arguments->slot_stride + head) * size;
        *key = (const char *)arguments->key_cache + offset;
        *value = (const char *)arguments->value_cache + offset;
    }
}

/* Convert keys [begin, end) of the block at position `block`, and their values to float32. Other keys in the same
 * registers become zeros; further ones keep any numbers, and their scores are not visible. */
static inline __attribute__((always_inline)) void load_block(
    const Source *source, int64_t block, size_t begin, size_t end, size_t width, Workspace *workspace) {
    const size_t head_dim = source->arguments->head_dim;
    const void *keys[BLOCK_KEYS] = {NULL}, *values[BLOCK_KEYS];
    for (size_t k = begin; k < end; k++) locate(source, block + (int64_t)k, keys + k, values + k);
    for (size_t k = begin / LANES * LANES; k < end; k += LANES) {
        if (source->is_int8) transpose_int8_keys((const int8_t *const *)keys + k, head_dim, k, &workspace->int8_keys);
        else transpose_keys(keys + k, head_dim, source->is_float32, workspace->keys + k);
    }
    for (size_t k = begin; k < end; k++) {
        float *row = workspace->values + k * width;
        if (source->is_int8) {
            dequantize_head(values[k], head_dim, row);
            for (size_t group = 0; group < num_groups(head_dim); group++)
                workspace->int8_keys.scales[group * BLOCK_KEYS + k] = load_scale(keys[k], head_dim, group);
        } else
            for (size_t i = 0; i < head_dim; i += LANES)
                _mm512_storeu_ps(row + i, load(values[k], i, source->is_float32));
    }
}

/* Fetch the keys and values of a later block, at position `block`, into the cache; there are `num_keys` keys. */
static inline __attribute__((always_inline)) void prefetch_block(const Source *source, size_t block, size_t num_keys) {
    enum { CACHE_LINE = 64 };
    const size_t head_dim = source->arguments->head_dim;
    const size_t bytes = source->is_int8 ? int8_head_bytes(head_dim) : head_dim * element_bytes(source->is_float32);
    for (size_t position = block; position < num_keys && position < block + BLOCK_KEYS; position++) {
        const void *key, *value;
        locate(source, (int64_t)position, &key, &value);
        for (size_t offset = 0; offset < bytes; offset += CACHE_LINE) {
            _mm_prefetch((const char *)key + offset, _MM_HINT_T0);
            _mm_prefetch((const char *)value + offset, _MM_HINT_T0);
        }
    }
}

static inline size_t first_visible(const Arguments *arguments, int64_t position) {
    const int64_t first = position + 1 - (int64_t)arguments->window;
    return arguments->window && first > 0 ? (size_t)first : 0;
}

/* Rows [row, row + rows) of a job: queries from `position` on, over the block of keys at `block`. */
static void attend_rows(const Arguments *arguments, Workspace *workspace, int64_t position, size_t block, size_t row,
    size_t rows, size_t width, int is_int8) {
    const size_t heads = arguments->num_queries_per_kv, head_dim = arguments->head_dim;
    const int64_t last_query = position + (int64_t)((row + rows - 1) / heads);
    const size_t first_key = first_visible(arguments, position + (int64_t)(row / heads));
    if (last_query < (int64_t)block || first_key >= block + BLOCK_KEYS) return;
    const size_t n_keys = (size_t)last_query + 1 - block < BLOCK_KEYS ? (size_t)last_query + 1 - block : BLOCK_KEYS;
    _Alignas(64) float scores[TILE_ROWS * BLOCK_KEYS] = {0};
    if (is_int8) score_int8(&workspace->int8_queries, &workspace->int8_keys, head_dim, row, rows, n_keys, scores);
    else
        add_product(workspace->query + row * head_dim, head_dim, workspace->keys, BLOCK_KEYS, head_dim, scores,
            BLOCK_KEYS, rows, n_keys > BLOCK_KEYS / 2 ? BLOCK_KEYS : BLOCK_KEYS / 2);
    for (size_t r = 0; r < rows; r++) {
        const int64_t query = position + (int64_t)((row + r) / heads);
        const size_t first = first_visible(arguments, query);
        if (query < (int64_t)block || first >= block + BLOCK_KEYS) {
            memset(scores + r * BLOCK_KEYS, 0, BLOCK_KEYS * sizeof *scores);
            continue;
        }
        const size_t end = (size_t)query + 1 - block < BLOCK_KEYS ? (size_t)query + 1 - block : BLOCK_KEYS;
        update_softmax(scores + r * BLOCK_KEYS, first > block ? first - block : 0, end, arguments->softcap,
            workspace->max + row + r, workspace->sum + row + r, workspace->output + (row + r) * width, width);
    }
    const size_t begin = first_key > block ? first_key - block : 0;
    add_product(scores + begin, BLOCK_KEYS, workspace->values + begin * width, width, n_keys - begin,
        workspace->output + row * width, width, rows, width);
}

static inline __attribute__((always_inline)) void attend(const Arguments *arguments, const Sequence *sequence,
    const Tile *tile, size_t kv_head, float *output, size_t output_stride, Workspace *workspace, int is_float32,
    int is_int8) {
    const size_t heads = arguments->num_queries_per_kv, head_dim = arguments->head_dim;
    const size_t width = (head_dim + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
    const size_t rows = (size_t)tile->num_queries * heads;
    const int64_t position = sequence->past_length + tile->first_query;
    const size_t first_token = (size_t)(sequence->first_token + tile->first_query);
    for (size_t row = 0; row < rows; row++) {
        const size_t token = first_token + row / heads, head = kv_head * heads + row % heads;
        const char *query = arguments->query;
        query += (token * arguments->query_stride + head * head_dim) * element_bytes(is_float32);
        for (size_t i = 0; i < head_dim; i += LANES) {
            const __m512 features = _mm512_mul_ps(load(query, i, is_float32), _mm512_set1_ps(arguments->scale));
            _mm512_storeu_ps(workspace->query + row * head_dim + i, features);
        }
        if (is_int8) quantize_query(workspace->query + row * head_dim, head_dim, row, &workspace->int8_queries);
        /* An attention sink is a score without a value. */
        workspace->max[row] = arguments->sinks ? arguments->sinks[head] : -INFINITY;
        workspace->sum[row] = arguments->sinks ? 1 : 0;
    }
    memset(workspace->output, 0, rows * width * sizeof *workspace->output);
    for (size_t k = 0; k < BLOCK_KEYS; k++) /* the columns beyond head_dim */
        _mm512_storeu_ps(workspace->values + (k + 1) * width - LANES, _mm512_setzero_ps());
    const Source source = {arguments, sequence, kv_head, is_float32, is_int8};
    const size_t tile_rows = is_int8 ? INT8_TILE_ROWS : TILE_ROWS;
    const size_t n_keys = (size_t)(position + tile->num_queries), first_key = first_visible(arguments, position);
    for (size_t block = first_key / BLOCK_KEYS * BLOCK_KEYS; block < n_keys; block += BLOCK_KEYS) {
        const size_t begin = first_key > block ? first_key - block : 0;
        const size_t end = n_keys - block < BLOCK_KEYS ? n_keys - block : BLOCK_KEYS;
        load_block(&source, (int64_t)block, begin, end, width, workspace);
        prefetch_block(&source, block + BLOCK_KEYS, n_keys);
        for (size_t row = 0; row < rows; row += tile_rows)
            attend_rows(arguments, workspace, position, block, row, rows - row < tile_rows ? rows - row : tile_rows,
                width, is_int8);
    }
    for (size_t row = 0; row < rows; row++) {
        float *target =
            output + (first_token + row / heads) * output_stride + (kv_head * heads + row % heads) * head_dim;
        for (size_t i = 0; i < head_dim; i += LANES) {
            const __m512 sum = _mm512_loadu_ps(workspace->output + row * width + i);
            _mm512_storeu_ps(target + i, _mm512_div_ps(sum, _mm512_set1_ps(workspace->sum[row])));
        }
    }
}

void paged_attention(const void *query, const void *key, const void *value, size_t query_stride, size_t key_stride,
    size_t value_stride, const void *key_cache, const void *value_cache, size_t slot_stride,
    const int64_t *slot_mapping, const int64_t *sequences, const int64_t *tiles, size_t num_tiles, size_t num_heads,
    size_t num_kv_heads, size_t head_dim, size_t window, float scale, float softcap, const float *sinks, float *output,
    int is_float32, int is_int8, int num_threads) {
    const Arguments arguments = {query, key, value, key_cache, value_cache, query_stride, key_stride, value_stride,
        slot_stride, num_heads / num_kv_heads, head_dim, window, slot_mapping, scale, softcap, sinks};
    const size_t output_stride = num_heads * head_dim;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic) /* Jobs differ in length. */
    for (size_t job = 0; job < num_tiles * num_kv_heads; job++) {
        const Tile *tile = (const Tile *)tiles + job / num_kv_heads;
        const Sequence *sequence = (const Sequence *)sequences + tile->sequence;
        const size_t kv_head = job % num_kv_heads;
        Workspace workspace;
        if (is_float32 && is_int8) attend(&arguments, sequence, tile, kv_head, output, output_stride, &workspace, 1, 1);
        else if (is_float32) attend(&arguments, sequence, tile, kv_head, output, output_stride, &workspace, 1, 0);
        else if (is_int8) attend(&arguments, sequence, tile, kv_head, output, output_stride, &workspace, 0, 1);
        else attend(&arguments, sequence, tile, kv_head, output, output_stride, &workspace, 0, 0);
    }
}
