// The matmuls of a projection in bfloat16, y = x W^T, dx = dy W and dW = dy^T x, with sums in float32: tiles of tiles.h,
// the right factor in panels of 64 columns that are laid out once for all threads. Any number of rows; what is summed
// in y and dx comes in pairs. Every number is summed in one order, whatever the number of rows or threads.

#include <omp.h>

#include "tiles.h"

static const long COLUMNS = 64;  // of a panel
static const long ROWS = 64;     // of a result that a thread makes at a time, of which the left factor stays in its cache

static inline long panels(long columns) { return (columns + COLUMNS - 1) / COLUMNS; }

// panel (words, 64) = two rows a word, of which `rows` and `columns` are there, zeros beyond
template <class T>
static inline void lay_panel(const T *from, long stride, long rows, long columns, uint32_t *panel, long words) {
    pack<T, bf16>(from, stride, rows, columns, nullptr, panel, 2 * words, COLUMNS);
}

// The same of a transpose: `from` has up to 64 rows, two columns a word
template <class T>
static void lay_turned(const T *from, long stride, long rows, long words, uint32_t *panel) {
    const long width = padded(2 * words);
    bf16 *narrow = room.take<bf16>(COLUMNS * width);
    uint32_t *turned = room.take<uint32_t>(COLUMNS * width / 2);
    for (long r = 0; r < COLUMNS; r++)
        for (long c = 0; c < width; c += LANES)
            keep(narrow + r * width + c, r < rows ? some_lanes(from + r * stride + c, 2 * words - c) : Lanes{});
    turn(narrow, turned, COLUMNS, width / 2);
    std::copy(turned, turned + words * COLUMNS, panel);
}

template <class T>
static void matmul(const bf16 *x, long x_row, const T *w, long w_row, int transposed, bf16 *y, long y_row,
                   uint32_t *panel, long rows, long K, long N) {
    // y (rows, N) = x (rows, K) w, w (K, N), or (N, K) where it is transposed; panel (N / 64, K / 2, 64) is room
    const long words = K / 2, blocks = (rows + ROWS - 1) / ROWS;
    const long shares = std::min(panels(N), std::max(1L, 4L * omp_get_max_threads() / std::max(1L, blocks)));
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long p = 0; p < panels(N); p++) {
            room.reset();
            const long first = p * COLUMNS, columns = std::min(COLUMNS, N - first);
            uint32_t *into = panel + first * words;
            if (transposed)
                lay_turned(w + first * w_row, w_row, columns, words, into);
            else
                lay_panel(w + first, w_row, K, columns, into, words);
        }
#pragma omp for collapse(2) schedule(dynamic)
        for (long start = 0; start < rows; start += ROWS)
            for (long share = 0; share < shares; share++) {
                room.reset();
                const long there = std::min(ROWS, rows - start), whole = there / 4 * 4;
                const bf16 *x_ = x + start * x_row;
                bf16 *rest = room.take<bf16>(4 * K);  // rows that fill no tile
                if (whole < there) lay(x_ + whole * x_row, x_row, there - whole, K, rest, 4, K);
                for (long p = panels(N) * share / shares; p < panels(N) * (share + 1) / shares; p++) {
                    const long first = p * COLUMNS;
                    const uint32_t *right = panel + first * words;
                    bf16 *y_ = y + start * y_row + first;
                    tiles_down<4>(there, 0, [=](long r, long, auto &tile) {
                        const bool filled = r < whole;
                        multiply(tile, filled ? x_ + r * x_row : rest, filled ? x_row / 2 : words, right, COLUMNS, words);
                        keep_tile(tile, y_ + r * y_row, y_row, there - r, N - first);
                    });
                }
            }
    }
}

static const long SPAN = 256;   // rows that a weight's gradient is summed over at a time
static const long GROUP = 512;  // of its columns that a thread makes at a time

static void weight_gradient(const bf16 *dy, long dy_row, const bf16 *x, long x_row, float *dw, uint32_t *panel,
                            long rows, long O, long I, int add) {
    // dw (O, I) = dy^T x, or that is added to it; dy (rows, O), x (rows, I); panel (rows / 256, I / 64, 128, 64) is room
    const long spans = (rows + SPAN - 1) / SPAN, words = SPAN / 2;
    const auto filled = [=](long span) { return std::min(words, (rows - span * SPAN + 1) / 2); };
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (long span = 0; span < spans; span++)
            for (long group = 0; group < I; group += GROUP)
                for (long k = 0; k < filled(span); k++)  // whole rows are what memory gives fast
                    for (long first = group; first < std::min(group + GROUP, I); first += COLUMNS) {
                        const long row = span * SPAN + 2 * k;
                        lay_panel(x + row * x_row + first, x_row, rows - row, std::min(COLUMNS, I - first),
                                  panel + ((span * panels(I) + first / COLUMNS) * words + k) * COLUMNS, 1);
                    }
#pragma omp for collapse(2) schedule(dynamic)
        for (long group = 0; group < I; group += GROUP)
            for (long out = 0; out < O; out += ROWS) {
                room.reset();
                const long there = std::min(ROWS, O - out), end = std::min(group + GROUP, I);
                uint32_t *left = room.take<uint32_t>(words * ROWS);
                float *sums = room.take<float>(ROWS * GROUP);  // panel by panel
                std::fill(sums, sums + ROWS * GROUP, 0.f);
                for (long span = 0; span < spans; span++) {
                    const long used = filled(span);
                    lay_panel(dy + span * SPAN * dy_row + out, dy_row, rows - span * SPAN, there, left, used);
                    for (long first = group; first < end; first += COLUMNS) {
                        const uint32_t *right = panel + (span * panels(I) + first / COLUMNS) * words * COLUMNS;
                        float *sums_ = sums + (first - group) * ROWS;
                        tiles_down<4>(there, 0, [=](long r, long, auto &tile) {
                            multiply(tile, reinterpret_cast<const bf16 *>(left + r), 1, right, COLUMNS, used, ROWS);
                            for (int k = 0; k < 4; k++)
                                for (int v = 0; v < WIDE(tile); v++) {
                                    float *sum = sums_ + (r + k) * COLUMNS + v * LANES;
                                    keep(sum, lanes(sum) + tile[k][v]);
                                }
                        });
                    }
                }
                for (long r = 0; r < there; r++)
                    for (long c = group; c < end; c += LANES) {
                        float *into = dw + (out + r) * I + c;
                        const Lanes sum = lanes(sums + (c - group) / COLUMNS * COLUMNS * ROWS + r * COLUMNS + c % COLUMNS);
                        keep_some(into, add ? some_lanes(into, I - c) + sum : sum, I - c);
                    }
            }
    }
}

#define MATMUL(T)                                                                                              \
    (const bf16 *x, long x_row, const T *w, long w_row, int transposed, bf16 *y, long y_row, uint32_t *panel, \
     long rows, long K, long N)
BOTH(matmul, MATMUL, (x, x_row, w, w_row, transposed, y, y_row, panel, rows, K, N))

extern "C" void weight_gradient_bf16(const bf16 *dy, long dy_row, const bf16 *x, long x_row, float *dw, uint32_t *panel,
                                     long rows, long O, long I, int add) {
    weight_gradient(dy, dy_row, x, x_row, dw, panel, rows, O, I, add);
}

// Whether they are faster than torch's: the processor multiplies pairs, and has no AMX, which torch would use.
extern "C" int matmul_is_faster() {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    return 1;
#else
    return 0;
#endif
}

extern "C" int matmul_columns() { return COLUMNS; }
extern "C" int matmul_span() { return SPAN; }
