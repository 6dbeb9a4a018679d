// Matmuls small enough for the cache, with work on their results while those are in registers.
//
// A tile is 4 rows of up to 64 columns. Its left factor lies in rows, its right factor in a panel; both in words of 32
// bits along the dimension that is summed: a word is one float32, or two bfloat16 (what the processor multiplies in one
// instruction, adding in float32). panel[k][column] is the k-th word of a column. Heights and widths are multiples of
// 32, filled up with zeros.
#pragma once

#include <vector>

#include "numbers.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINED __attribute__((always_inline))  // what works on a tile: else it leaves the registers

static const long LANES = 16;

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint16_t Pairs __attribute__((vector_size(64)));

static const Ints STEPS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const Pairs PAIRED = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
static const Pairs PAIRED_OF_TWO = PAIRED + (PAIRED & 16);  // 0, 32, 1, 33, ...

template <class V>
static inline V load(const void *from) {
    V out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

template <class V>
static inline void store(void *to, V v) {
    std::memcpy(to, &v, sizeof v);
}

static inline Lanes lanes(const float *from) { return load<Lanes>(from); }

static inline Lanes lanes(const bf16 *from) {
#ifdef __AVX512F__
    return (Lanes)((Words)_mm512_cvtepu16_epi32((__m256i)load<Halves>(from)) << 16);
#else
    return (Lanes)(__builtin_convertvector(load<Halves>(from), Words) << 16);
#endif
}

static inline Words rounded(Lanes v) {  // bfloat16 in the upper half of each word; see put
    const Words bits = (Words)v;
    return v == v ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

static inline void keep(float *to, Lanes v) { store(to, v); }

static inline void keep(bf16 *to, Lanes v) {
#ifdef __AVX512BF16__
    store(to, _mm512_cvtneps_pbh((__m512)v));
#else
    store(to, __builtin_convertvector(rounded(v) >> 16, Halves));
#endif
}

// Words of two bfloat16: `even` in the lower halves, `odd` in the upper
static inline Words in_pairs(Lanes even, Lanes odd) {
#ifdef __AVX512BF16__
    const Pairs halves = (Pairs)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return (Words)__builtin_shuffle(halves, PAIRED);
#else
    return (rounded(even) >> 16) | (rounded(odd) & 0xffff0000u);
#endif
}

template <class T>
static inline Lanes some_lanes(const T *from, long n) {  // the first n, zeros after them
    if (n >= LANES) return lanes(from);
    T few[LANES] = {};
    std::copy_n(from, std::max(n, 0L), few);
    return lanes(few);
}

template <class T>
static inline void keep_some(T *to, Lanes v, long n) {
    if (n >= LANES) return keep(to, v);
    T few[LANES];
    keep(few, v);
    std::copy_n(few, std::max(n, 0L), to);
}

static inline float sum_of(Lanes v) {
    v += __builtin_shuffle(v, Words{8, 9, 10, 11, 12, 13, 14, 15});
    v += __builtin_shuffle(v, Words{4, 5, 6, 7});
    v += __builtin_shuffle(v, Words{2, 3});
    return v[0] + v[1];
}

static inline Lanes larger(Lanes a, Lanes b) {  // b where either is no number
#ifdef __AVX512F__
    return (Lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

static inline Lanes smaller(Lanes a, Lanes b) {  // likewise
#ifdef __AVX512F__
    return (Lanes)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}

static inline Lanes exp2_(Lanes x) {  // as of one number
    const Lanes magic = 12582912.f - Lanes{};  // 1.5 * 2^23: what is added to it is rounded to a whole number
    x = smaller(126.f - Lanes{}, larger(-126.f - Lanes{}, x));
    const Lanes shifted = x + magic;
    return exp2_of_fraction(x - (shifted - magic)) * (Lanes)(((Words)shifted << 23) + (127u << 23));
}

static inline Lanes reciprocal(Lanes v) {  // of normal numbers; relative error 1e-7
#ifdef __AVX512F__
    const Lanes near = (Lanes)_mm512_rcp14_ps((__m512)v);
    return near * (2.f - v * near);
#else
    return 1.f / v;
#endif
}

static inline Lanes sigmoid(Lanes x) { return reciprocal(1.f + exp2_(x * -LOG2_E)); }
static inline Lanes silu(Lanes x) { return x * sigmoid(x); }

static inline Lanes silu_slope(Lanes x) {
    const Lanes s = sigmoid(x);
    return s * (1.f + x * (1.f - s));
}

static inline float largest_of(Lanes v) {
    v = larger(v, __builtin_shuffle(v, Words{8, 9, 10, 11, 12, 13, 14, 15}));
    v = larger(v, __builtin_shuffle(v, Words{4, 5, 6, 7}));
    v = larger(v, __builtin_shuffle(v, Words{2, 3}));
    return std::max(v[0], v[1]);
}

template <class T>
static const long PER_WORD = sizeof(uint32_t) / sizeof(T);

template <class T>
static inline Lanes multiply_add(Lanes sum, uint32_t left, Words right);

template <>
inline Lanes multiply_add<float>(Lanes sum, uint32_t left, Words right) {
    return sum + (Lanes)(left - Words{}) * (Lanes)right;
}

template <>
inline Lanes multiply_add<bf16>(Lanes sum, uint32_t left, Words right) {
#ifdef __AVX512BF16__
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
#else
    sum += (Lanes)((left << 16) - Words{}) * (Lanes)(right << 16);
    return sum + (Lanes)((left & 0xffff0000u) - Words{}) * (Lanes)(right & 0xffff0000u);
#endif
}

// tile += left right: rows `stride` words apart, `words` of them, `step` apart
template <class T, int V>
INLINED static inline void add_multiple(Lanes (&tile)[4][V], const T *left, long stride, const uint32_t *panel, long width,
                                        long words, long step = 1) {
    const uint32_t *rows = reinterpret_cast<const uint32_t *>(left);
    Lanes sum[4][V];
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < V; v++) sum[r][v] = tile[r][v];
    for (long k = 0; k < words; k++) {
        Words right[V];
        for (int v = 0; v < V; v++) right[v] = load<Words>(panel + k * width + v * LANES);
        for (int r = 0; r < 4; r++)
            for (int v = 0; v < V; v++) sum[r][v] = multiply_add<T>(sum[r][v], rows[r * stride + k * step], right[v]);
    }
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < V; v++) tile[r][v] = sum[r][v];
}

// tile = left right, likewise
template <class T, int V>
INLINED static inline void multiply(Lanes (&tile)[4][V], const T *left, long stride, const uint32_t *panel, long width,
                                    long words, long step = 1) {
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < V; v++) tile[r][v] = Lanes{};
    add_multiple(tile, left, stride, panel, width, words, step);
}

#define WIDE(tile) int(sizeof(tile[0]) / sizeof(tile[0][0]))

template <int V, class F>
static inline void tiles_down(long rows, long column, F work) {
    for (long row = 0; row < rows; row += 4) {
        Lanes tile[4][V];
        work(row, column, tile);
    }
}

// work(row, column, tile) for every tile of `rows` rows and the columns from `first` to `end`. What it captures by value
// stays in registers.
template <class F>
static inline void tiles(long rows, long first, long end, F work) {
    for (long column = first; column < end;) switch (std::min<long>(4, (end - column) / LANES)) {
            case 1: tiles_down<1>(rows, column, work), column += 1 * LANES; break;
            case 2: tiles_down<2>(rows, column, work), column += 2 * LANES; break;
            case 3: tiles_down<3>(rows, column, work), column += 3 * LANES; break;
            default: tiles_down<4>(rows, column, work), column += 4 * LANES;
        }
}

// sum (rows, columns) += left right, of as many rows `words` long
template <class T>
static inline void add_product(const T *left, long rows, const uint32_t *panel, long columns, long words, float *sum) {
    tiles(rows, 0, columns, [=](long r, long c, auto &tile) {
        multiply(tile, left + r * words * PER_WORD<T>, words, panel + c, columns, words);
        for (int n = 0; n < 4; n++)
            for (auto &v : tile[n]) {
                float *at = sum + (r + n) * columns + c + (&v - tile[n]) * LANES;
                keep(at, lanes(at) + v);
            }
    });
}

template <class T>
static void keep_corner(const float *from, long width, T *to, long stride, long rows, long columns) {
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < columns; c++) put(to[r * stride + c], from[r * width + c]);
}

// to = tile, of whose 4 rows so many are there, and so many columns
template <class T, int V>
INLINED static inline void keep_tile(const Lanes (&tile)[4][V], T *to, long stride, long rows, long columns) {
    if (rows >= 4 && columns >= V * LANES) {
        for (int r = 0; r < 4; r++)
            for (int v = 0; v < V; v++) keep(to + r * stride + v * LANES, tile[r][v]);
        return;
    }
    float copy[4 * V * LANES];  // so that the tile itself need not be in memory
    for (int r = 0; r < 4; r++)
        for (int v = 0; v < V; v++) keep(copy + (r * V + v) * LANES, tile[r][v]);
    keep_corner(copy, V * LANES, to, stride, std::min(4L, rows), std::min<long>(V * LANES, columns));
}

static inline void turn_block(Words (&v)[16]) {  // 16 x 16 words, by halves
#define STEP(s, low, high)                                          \
    for (int i = 0; i < 16; i++)                                    \
        if (!(i & s)) {                                             \
            const Words a = v[i], b = v[i + s];                     \
            v[i] = __builtin_shuffle(a, b, low);                    \
            v[i + s] = __builtin_shuffle(a, b, high);               \
        }
    STEP(8, (Words{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}),
         (Words{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}))
    STEP(4, (Words{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}),
         (Words{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31}))
    STEP(2, (Words{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}),
         (Words{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31}))
    STEP(1, (Words{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}),
         (Words{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31}))
#undef STEP
}

static inline Lanes sums_of(const float *rows) {  // of 16 rows of 16 numbers
    Words v[16];
    for (int i = 0; i < 16; i++) v[i] = load<Words>(rows + i * LANES);
    turn_block(v);
    Lanes sum{};
    for (int i = 0; i < 16; i++) sum += (Lanes)v[i];
    return sum;
}

// to (columns, rows) = from (rows, columns), in words
static inline void turn(const void *from, uint32_t *to, long rows, long columns) {
    const uint32_t *words = static_cast<const uint32_t *>(from);
    for (long r = 0; r < rows; r += 16)
        for (long c = 0; c < columns; c += 16) {
            Words block[16];
            for (int i = 0; i < 16; i++) block[i] = load<Words>(words + (r + i) * columns + c);
            turn_block(block);
            for (int i = 0; i < 16; i++) store(to + (c + i) * rows + r, block[i]);
        }
}

static const long AHEAD = 12;  // rows that lie far apart are fetched so many before they are read

template <class T>
static inline void fetch(const T *row, long columns) {
    for (long c = 0; c < columns; c += 64 / sizeof(T)) __builtin_prefetch(row + c);
}

// Into the second level of the cache, for later
static inline void call_for(const void *from, long bytes) {
    for (long at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char *>(from) + at, 0, 2);
}

template <class T>
static inline void fetch_to_write(T *row, long columns) {
    for (long c = 0; c < columns; c += 64 / sizeof(T)) __builtin_prefetch(row + c, 1);
}

template <class T>
static inline void row_lanes(const T *from, long stride, long row, long rows, long column, long columns,
                             const float *factor, Lanes &v) {
    if (row >= rows)
        v = Lanes{};
    else {
        v = some_lanes(from + row * stride + column, columns - column);
        if (factor) v *= factor[row];
    }
}

// panel = pairs of two rows of bfloat16, as far as they fill vectors; returns the columns done
static inline long pack_pair(const bf16 *even, const bf16 *odd, long columns, const float *factor, uint32_t *panel) {
    long c = 0;
    if (factor) {
        for (; c + LANES <= columns; c += LANES)
            store(panel + c, in_pairs(lanes(even + c) * factor[0], lanes(odd + c) * factor[1]));
        return c;
    }
    for (; c + 2 * LANES <= columns; c += 2 * LANES) {
        const Pairs a = load<Pairs>(even + c), b = load<Pairs>(odd + c);
        store(panel + c, __builtin_shuffle(a, b, PAIRED_OF_TWO));
        store(panel + c + LANES, __builtin_shuffle(a, b, PAIRED_OF_TWO + 16));
    }
    return c;
}

// The panel of a right factor of `rows` rows, times `factor` of each unless null, zeros beyond: (height / PER_WORD, width),
// in words of `To`
template <class T, class To = T>
static inline void pack(const T *from, long stride, long rows, long columns, const float *factor, uint32_t *panel,
                        long height, long width) {
    for (long k = 0; k < height / PER_WORD<To>; k++) {
        for (long r = 0; r < PER_WORD<To>; r++) fetch(from + (PER_WORD<To> * k + r + AHEAD) * stride, columns);
        long c = 0;
        if constexpr (PER_WORD<T> == 2 && PER_WORD<To> == 2)
            if (2 * k + 1 < rows)
                c = pack_pair(from + 2 * k * stride, from + (2 * k + 1) * stride, columns,
                              factor ? factor + 2 * k : nullptr, panel + k * width);
        for (; c < width; c += LANES) {
            Lanes even, odd;
            row_lanes(from, stride, PER_WORD<To> * k, rows, c, columns, factor, even);
            if (PER_WORD<To> == 2) {
                row_lanes(from, stride, 2 * k + 1, rows, c, columns, factor, odd);
                store(panel + k * width + c, in_pairs(even, odd));
            } else
                store(panel + k * width + c, even);
        }
    }
}

// panel = 4 rows of a right factor
template <class T, int V>
INLINED static inline void keep_panel(const Lanes (&tile)[4][V], uint32_t *panel, long width) {
    for (int v = 0; v < V; v++)
        for (int r = 0; r < 4; r += PER_WORD<T>)
            store(panel + r / PER_WORD<T> * width + v * LANES,
                  PER_WORD<T> == 2 ? in_pairs(tile[r][v], tile[r + PER_WORD<T> - 1][v]) : (Words)tile[r][v]);
}

static const Pairs EVEN = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                           32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};

// One row of a panel
template <class T>
static inline Lanes row_of_panel(const uint32_t *panel, long width, long row) {
    const Words words = load<Words>(panel + row / PER_WORD<T> * width);
    return (Lanes)(PER_WORD<T> == 1 ? words : row % 2 ? words & 0xffff0000u : words << 16);
}

// The rows of a panel
static inline void unpack(const uint32_t *panel, bf16 *to, long height, long width) {
    for (long r = 0; r < height; r += 2)
        for (long c = 0; c < width; c += 2 * LANES) {
            const Pairs a = load<Pairs>(panel + r / 2 * width + c), b = load<Pairs>(panel + r / 2 * width + c + LANES);
            store(to + r * width + c, __builtin_shuffle(a, b, EVEN));
            store(to + (r + 1) * width + c, __builtin_shuffle(a, b, EVEN + 1));
        }
}

static inline void unpack(const uint32_t *panel, float *to, long height, long width) {
    std::memcpy(to, panel, height * width * sizeof *to);
}

// A copy in rows of `width`, zeros beyond `rows` and `columns`
template <class T>
static inline void lay(const T *from, long stride, long rows, long columns, T *to, long height, long width) {
    for (long r = 0; r < height; r++) {
        const long filled = r < rows ? columns : 0;
        fetch(from + (r + AHEAD) * stride, columns);
        std::copy(from + r * stride, from + r * stride + filled, to + r * width);
        std::fill(to + r * width + filled, to + (r + 1) * width, T{});
    }
}

static inline long padded(long n) { return (n + 31) / 32 * 32; }  // 16 words of bfloat16

// A thread's memory: kept between calls, because fresh memory is slow. What was taken lasts until the next reset.
class Room {
    std::vector<std::vector<char>> kept;
    size_t next = 0;

  public:
    void reset() { next = 0; }

    template <class V>
    V *take(long n) {
        if (next == kept.size()) kept.emplace_back();
        std::vector<char> &bytes = kept[next++];
        if (bytes.size() < n * sizeof(V) + 64) bytes.resize(n * sizeof(V) + 64);
        return reinterpret_cast<V *>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
    }
};

static thread_local Room room;
