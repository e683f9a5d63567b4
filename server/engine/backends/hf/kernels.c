/* The fast path's arithmetic on x86 CPUs with AMX: linear maps as fast as the weights can be read, and what lies between
 * them without a pass over memory for every operation. All numbers outside are bf16, all arithmetic inside is float32
 * (int32 for 8-bit weights). Threads come from OpenMP.
 *
 * A weight [n, k] is packed once into tiles of 16 outputs by 64 bytes of inputs (32 bf16 or 64 int8), two tiles of
 * neighbouring outputs behind each other, along k first: a thread reads its share of the weight as one stream, fetched
 * ahead, and every byte of it once for up to 32 tokens. Activations are row-major.
 * Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, "AMX instructions";
 * Linux, Documentation/arch/x86/xstate.rst, for the permission.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,amx-int8")))
#define INLINE static inline __attribute__((always_inline))

enum {
    ROWS = 16,              /* of a tile */
    LINE = 64,              /* bytes in a tile's row */
    TILE = ROWS * LINE,     /* bytes */
    PAIR = 2 * TILE,        /* two tiles side by side */
    WIDTH = 2 * ROWS,       /* tokens, and outputs, of one block of four accumulators */
    TOKENS = 256,           /* that share one pass over the weight */
    AHEAD = 8192,           /* bytes between what is fetched and what is used */
    REQUEST_PERMISSION = 0x1023,
    TILE_DATA = 18,
};

typedef enum { BF16, INT8 } Kind;

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t line_bytes[16];
    uint8_t rows[16];
} TileConfig;

typedef struct {
    const char *x;           /* [m, line] */
    const float *x_scales;   /* [m], int8 only */
    const char *w;           /* packed */
    const float *w_scales;   /* [n], int8 only */
    const float *bias;       /* [n] or null */
    uint16_t *y;             /* [m, n], bf16 */
    long m, n, line;         /* tokens, outputs, bytes of a token's inputs */
} Linear;

AMX INLINE __m512 widen(__m256i bf16) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16); }
AMX INLINE __m256i narrow(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }
AMX INLINE __m512 load(const uint16_t *from) { return widen(_mm256_loadu_si256((const __m256i *)from)); }
AMX INLINE void store(uint16_t *to, __m512 values) { _mm256_storeu_si256((__m256i *)to, narrow(values)); }

/* --- linear maps --- */

/* 0 if this process may use the tiles. To be asked once, before anything else here. */
int amx_request(void) { return (int)syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA); }

/* Tiles 0 to 3 accumulate (tokens x outputs: 00, 01, 10, 11), 4 and 5 hold tokens, 6 and 7 weights. */
AMX static void configure(int first, int second) {
    const int rows[8] = {first, first, second, second, first, second, ROWS, ROWS};
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)rows[i];
        config.line_bytes[i] = rows[i] ? LINE : 0;
    }
    _tile_loadconfig(&config);
}

#define DOT(kind, sum, x, w) \
    do { \
        if (kind == BF16) \
            _tile_dpbf16ps(sum, x, w); \
        else \
            _tile_dpbssd(sum, x, w); \
    } while (0)

/* Makes the tiles ready for the next up to 32 of `tokens`; returns how many of them the second tile of tokens holds. */
AMX INLINE int fit(long tokens, int *configured) {
    int live = (int)(tokens < WIDTH ? tokens : WIDTH);
    int second = live > ROWS ? live - ROWS : 0;
    if (live != *configured)
        configure(live - second, second);
    *configured = live;
    return second;
}

AMX INLINE void start_sums(int second) {
    _tile_zero(0);
    _tile_zero(1);
    if (second) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

/* Adds up to 32 tokens times 32 outputs, or 16 if the weight is not in pairs of tiles. `line` bytes of each token, the
 * next one `stride` bytes on. `fetch`: the weight comes from memory, not from a cache. */
AMX INLINE void add_sums(
    Kind kind, const char *x, long stride, const char *w, long line, int second, int pairs, int fetch) {
    const long step = pairs ? PAIR : TILE;
    for (long at = 0; at < line; at += LINE, w += step) {
        if (fetch)
            for (int i = 0; i < step; i += LINE)
                _mm_prefetch(w + AHEAD + i, _MM_HINT_T1);
        _tile_loadd(4, x + at, stride);
        if (second)
            _tile_loadd(5, x + at + ROWS * stride, stride);
        _tile_loadd(6, w, LINE);
        if (pairs)
            _tile_loadd(7, w + TILE, LINE);
        DOT(kind, 0, 4, 6);
        if (pairs)
            DOT(kind, 1, 4, 7);
        if (second) {
            DOT(kind, 2, 5, 6);
            if (pairs)
                DOT(kind, 3, 5, 7);
        }
    }
}

AMX INLINE void store_sums(int second, char *sums) {
    _tile_stored(0, sums, LINE);
    _tile_stored(1, sums + TILE, LINE);
    if (second) {
        _tile_stored(2, sums + PAIR, LINE);
        _tile_stored(3, sums + PAIR + TILE, LINE);
    }
}

/* Where `store_sums` puts 16 outputs of one token; `side`: the first 16 or the second. */
INLINE const char *sums_of(const char *sums, int row, int side) {
    return sums + row / ROWS * PAIR + side * TILE + row % ROWS * LINE;
}

/* Scales and bias: 16 outputs of one token. */
AMX INLINE __m512 finish(Kind kind, const Linear *map, const char *sums, long token, long output) {
    __m512 value;
    if (kind == BF16) {
        value = _mm512_loadu_ps(sums);
    } else {
        __m512 scales = _mm512_mul_ps(_mm512_loadu_ps(map->w_scales + output), _mm512_set1_ps(map->x_scales[token]));
        value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums)), scales);
    }
    if (map->bias)
        value = _mm512_add_ps(value, _mm512_loadu_ps(map->bias + output));
    return value;
}

/* One block of 32 outputs for `tokens` tokens from `first` on. */
AMX INLINE void block(Kind kind, const Linear *map, long first, long tokens, long output, int *configured) {
    char sums[2 * PAIR] __attribute__((aligned(LINE)));
    const char *w = map->w + output * map->line;
    for (long start = 0; start < tokens; start += WIDTH) {
        int second = fit(tokens - start, configured);
        const char *x = map->x + (first + start) * map->line;
        start_sums(second);
        if (second)
            add_sums(kind, x, map->line, w, map->line, 1, 1, start == 0);
        else
            add_sums(kind, x, map->line, w, map->line, 0, 1, start == 0);
        store_sums(second, sums);
        for (int row = 0; row < *configured; row++)
            for (int side = 0; side < 2; side++) {
                long token = first + start + row, column = output + side * ROWS;
                store(map->y + token * map->n + column, finish(kind, map, sums_of(sums, row, side), token, column));
            }
    }
}

/* To be called by all threads of a team. */
AMX INLINE void linear(Kind kind, const Linear *map) {
    int configured = 0;
    for (long first = 0; first < map->m; first += TOKENS) {
        long tokens = map->m - first < TOKENS ? map->m - first : TOKENS;
#pragma omp for schedule(static) nowait
        for (long output = 0; output < map->n; output += WIDTH)
            block(kind, map, first, tokens, output, &configured);
    }
    _tile_release();
}

/* One token to int8, symmetric; returns its scale, NaN if one of its numbers is. */
AMX static float quantize(const uint16_t *x, long k, int8_t *out) {
    __m512 peaks = _mm512_setzero_ps();
    __mmask16 strange = 0;
    for (long i = 0; i < k; i += 16) {
        __m512 value = load(x + i);
        strange |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);  /* a maximum forgets NaN */
        peaks = _mm512_max_ps(peaks, _mm512_abs_ps(value));
    }
    float peak = strange ? NAN : _mm512_reduce_max_ps(peaks);
    __m512 factor = _mm512_set1_ps(peak > 0 ? 127 / peak : 0);
    for (long i = 0; i < k; i += 16)
        _mm_storeu_si128((__m128i *)(out + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(load(x + i), factor))));
    return peak / 127;
}

/* y = x w^T + bias. x [m, k] and y [m, n] are bf16, w is packed bf16; n and k are multiples of 32. */
AMX void amx_linear_bf16(
    const void *x, const void *w, const float *bias, uint16_t *y, long m, long n, long k, int num_threads) {
    Linear map = {.x = x, .w = w, .bias = bias, .y = y, .m = m, .n = n, .line = 2 * k};
#pragma omp parallel num_threads(num_threads)
    linear(BF16, &map);
}

/* The same with packed int8 weights, a scale for each output and one for each token; k is a multiple of 64. Returns 0,
 * or -1 if memory ran out. */
AMX int amx_linear_int8(
    const uint16_t *x, const void *w, const float *w_scales, const float *bias, uint16_t *y, long m, long n, long k,
    int num_threads) {
    float *scales = malloc((size_t)m * (sizeof(float) + (size_t)k));
    if (!scales)
        return -1;
    int8_t *quantized = (int8_t *)(scales + m);
    Linear map = {
        .x = (const char *)quantized, .x_scales = scales, .w = w, .w_scales = w_scales,
        .bias = bias, .y = y, .m = m, .n = n, .line = k,
    };
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (long token = 0; token < m; token++)
            scales[token] = quantize(x + token * k, k, quantized + token * k);
        linear(INT8, &map);
    }
    free(scales);
    return 0;
}

/* --- between them --- */

/* hidden += delta (unless that is null), out = hidden / rms(hidden) * weight: `tokens` rows of `size`, a multiple of 16.
 * RMSNorm: https://arxiv.org/abs/1910.07467. */
AMX void add_and_norm(
    uint16_t *hidden, const uint16_t *delta, const uint16_t *weight, uint16_t *out, long tokens, long size,
    float epsilon, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (tokens > 1)
    for (long token = 0; token < tokens; token++) {
        uint16_t *row = hidden + token * size;
        __m512 squares = _mm512_setzero_ps();
        for (long i = 0; i < size; i += 16) {
            __m512 value = load(row + i);
            if (delta) {
                value = widen(narrow(_mm512_add_ps(value, load(delta + token * size + i))));
                store(row + i, value);
            }
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        __m512 scale = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / (float)size + epsilon));
        for (long i = 0; i < size; i += 16)
            store(out + token * size + i, _mm512_mul_ps(_mm512_mul_ps(load(row + i), scale), load(weight + i)));
    }
}

/* 2^x by its Taylor series on [-0.5, 0.5]: wrong by less than 3e-6 of itself, bf16 keeps 4e-3. */
AMX INLINE __m512 power_of_two(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole);
    const float factors[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    __m512 sum = _mm512_set1_ps(factors[0]);
    for (int i = 1; i < 6; i++)
        sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(sum, whole);
}

/* out = silu(gate) * up: `both` holds gate and up of a token side by side, `size` of each, a multiple of 16.
 * SwiGLU: https://arxiv.org/abs/2002.05202. */
AMX void silu_and_multiply(const uint16_t *both, uint16_t *out, long tokens, long size, int num_threads) {
    const __m512 one = _mm512_set1_ps(1), minus_log2_e = _mm512_set1_ps(-1.44269504f);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (tokens > 1)
    for (long token = 0; token < tokens; token++) {
        const uint16_t *gate = both + 2 * token * size, *up = gate + size;
        for (long i = 0; i < size; i += 16) {
            __m512 x = load(gate + i);
            __m512 below = _mm512_add_ps(one, power_of_two(_mm512_mul_ps(x, minus_log2_e)));
            store(out + token * size + i, _mm512_mul_ps(_mm512_div_ps(x, below), load(up + i)));
        }
    }
}

typedef struct {
    const uint16_t *projected;      /* [tokens, heads + 2 kv_heads, size]: queries, keys, values */
    const uint16_t *cos, *sin;      /* [tokens, size], the first half of the sines negated */
    const uint16_t *query_norm, *key_norm; /* [size], or null */
    const int64_t *rows, *cells;    /* [tokens]: where keys and values belong */
    uint16_t *queries;              /* out: [tokens, heads, size] */
    uint16_t *keys, *values;        /* out: [rows, kv_heads, capacity, size] */
    long tokens, heads, kv_heads, size, capacity;
    float epsilon;
} Heads;

/* One head of one token: normed if there is a weight for it, turned, stored. `size` is a multiple of 32. */
AMX INLINE void turn(const uint16_t *x, const uint16_t *norm, const Heads *all, long token, uint16_t *out) {
    const long half = all->size / 2;
    const uint16_t *cos = all->cos + token * all->size, *sin = all->sin + token * all->size;
    __m512 scale = _mm512_set1_ps(1);
    if (norm) {
        __m512 squares = _mm512_setzero_ps();
        for (long i = 0; i < all->size; i += 16)
            squares = _mm512_fmadd_ps(load(x + i), load(x + i), squares);
        scale = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / (float)all->size + all->epsilon));
    }
    for (long i = 0; i < half; i += 16) {
        __m512 left = load(x + i), right = load(x + half + i);
        if (norm) {
            left = _mm512_mul_ps(_mm512_mul_ps(left, scale), load(norm + i));
            right = _mm512_mul_ps(_mm512_mul_ps(right, scale), load(norm + half + i));
        }
        store(out + i, _mm512_fmadd_ps(right, load(sin + i), _mm512_mul_ps(left, load(cos + i))));
        store(out + half + i, _mm512_fmadd_ps(left, load(sin + half + i), _mm512_mul_ps(right, load(cos + half + i))));
    }
}

/* Rotary positions (https://arxiv.org/abs/2104.09864) on queries and keys; keys and values go to their cells. */
AMX void turn_and_store(const Heads *all, int num_threads) {
    const long size = all->size, width = all->heads + 2 * all->kv_heads;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (all->tokens > 1)
    for (long token = 0; token < all->tokens; token++) {
        const uint16_t *x = all->projected + token * width * size;
        for (long head = 0; head < all->heads; head++, x += size)
            turn(x, all->query_norm, all, token, all->queries + (token * all->heads + head) * size);
        for (long head = 0; head < all->kv_heads; head++, x += size) {
            long cell = ((all->rows[token] * all->kv_heads + head) * all->capacity + all->cells[token]) * size;
            turn(x, all->key_norm, all, token, all->keys + cell);
            for (long i = 0; i < size; i += 16)
                store(all->values + cell + i, load(x + all->kv_heads * size + i));
        }
    }
}

/* --- adapters --- */

typedef struct {
    const char *x;       /* [tokens, inputs] */
    const char *a, *b;   /* packed, a block of 32 columns behind the other: [parts, 2, inputs, 16], [outputs, 32] */
    const int32_t *ends; /* [parts]: where each part's outputs end */
    const int32_t *own;  /* [tokens, 2]: the columns that are the token's own, first and end; none if they are equal */
    const int32_t *live; /* [num_live]: the blocks that some token needs */
    uint16_t *y;         /* [tokens, outputs], added to */
    long tokens, inputs, outputs, parts, num_live;
} Lora;

/* Which of the 16 columns from `column` on are the token's own. */
INLINE __mmask16 own_columns(const Lora *lora, long token, long column) {
    long first = lora->own[2 * token] - column, end = lora->own[2 * token + 1] - column;
    uint32_t before_first = first <= 0 ? 0 : first >= ROWS ? 0xffff : (1u << first) - 1;
    uint32_t before_end = end <= 0 ? 0 : end >= ROWS ? 0xffff : (1u << end) - 1;
    return (__mmask16)(before_end & ~before_first);
}

/* 16 columns of up to 32 tokens from `start` on: hidden = x A^T where the column is the token's own, else 0.
 * `tile` counts parts, then live blocks, then halves of them; so do the columns of `hidden`. */
AMX INLINE void make_hidden(const Lora *lora, long tile, long start, uint16_t *hidden, int *configured) {
    char sums[2 * PAIR] __attribute__((aligned(LINE)));
    const long width = lora->parts * lora->num_live * WIDTH, line = 2 * lora->inputs;
    const long part = tile / 2 / lora->num_live, block = lora->live[tile / 2 % lora->num_live], side = tile % 2;
    const char *a = lora->a + ((block * lora->parts + part) * 2 + side) * ROWS * line;
    int second = fit(lora->tokens - start, configured);
    start_sums(second);
    add_sums(BF16, lora->x + start * line, line, a, line, second, 0, start == 0);
    store_sums(second, sums);
    for (int row = 0; row < *configured; row++) {
        __mmask16 own = own_columns(lora, start + row, block * WIDTH + side * ROWS);
        __m512 value = _mm512_maskz_loadu_ps(own, sums_of(sums, row, 0));
        store(hidden + (start + row) * width + tile * ROWS, value);
    }
}

/* 32 outputs of up to 32 tokens from `start` on: y += hidden B. */
AMX INLINE void add_outputs(const Lora *lora, long output, long start, const uint16_t *hidden, int *configured) {
    char sums[2 * PAIR] __attribute__((aligned(LINE)));
    const long width = lora->parts * lora->num_live * WIDTH;
    long part = 0;
    while (output >= lora->ends[part])
        part++;
    const char *own = (const char *)(hidden + start * width + part * lora->num_live * WIDTH);
    int second = fit(lora->tokens - start, configured);
    start_sums(second);
    for (long i = 0; i < lora->num_live; i++) {
        const char *b = lora->b + (lora->live[i] * lora->outputs + output) * LINE;
        add_sums(BF16, own + i * LINE, 2 * width, b, LINE, second, 1, start == 0);
    }
    store_sums(second, sums);
    for (int row = 0; row < *configured; row++)
        for (int side = 0; side < 2; side++) {
            uint16_t *y = lora->y + (start + row) * lora->outputs + output + side * ROWS;
            store(y, _mm512_add_ps(load(y), _mm512_loadu_ps(sums_of(sums, row, side))));
        }
}

/* LoRA (https://arxiv.org/abs/2106.09685), each token with its own adapter or none: y += (x A^T) B. Every token goes
 * through all live columns, and what is not its own is set to zero in between. `inputs` and each part's outputs are
 * multiples of 32. Returns 0, or -1 if memory ran out. */
AMX int add_lora(const Lora *lora, int num_threads) {
    const long tiles = 2 * lora->parts * lora->num_live;
    uint16_t *hidden = aligned_alloc(LINE, (size_t)(lora->tokens * tiles * ROWS) * sizeof(uint16_t));
    if (!hidden)
        return -1;
#pragma omp parallel num_threads(num_threads)
    {
        int configured = 0;
#pragma omp for collapse(2) schedule(static)
        for (long tile = 0; tile < tiles; tile++)
            for (long start = 0; start < lora->tokens; start += WIDTH)
                make_hidden(lora, tile, start, hidden, &configured);
        for (long start = 0; start < lora->tokens; start += WIDTH) {
#pragma omp for schedule(static) nowait
            for (long output = 0; output < lora->outputs; output += WIDTH)
                add_outputs(lora, output, start, hidden, &configured);
        }
        _tile_release();
    }
    free(hidden);
    return 0;
}
