// Loops over rows that plain torch takes in several passes.

#include "tiles.h"

// ---- causal convolution: x, y (B, T, C); taps (k, C) by distance; index (B, T) of documents or null ----

static const long TILE = 64, TAPS = 16;
static const long SPAN = 32;  // tokens of which 16 channels are taken before the next 16

// TAPS_KNOWN: k, or 0 for any.
template <class T, long TAPS_KNOWN>
static void conv_forward_span(const T *x, long xt, const float *taps, const float *bias, const int32_t *index, T *y,
                              long first, long end, long C, long taps_given, int activate) {
    static const long MOST = TAPS_KNOWN ? TAPS_KNOWN : TAPS;
    const long k = TAPS_KNOWN ? TAPS_KNOWN : taps_given;
    for (long c = 0; c < C; c += LANES) {
        const long width = C - c;
        Lanes tap[MOST], past[MOST] = {};  // past[d]: of token t-d
        for (long d = 0; d < k; d++) tap[d] = some_lanes(taps + d * C + c, width);
        for (long d = 1; d < std::min(k, first + 1); d++) {
            if (index && index[first - d] != index[first]) break;
            past[d - 1] = some_lanes(x + (first - d) * xt + c, width);
        }
        const Lanes shift = bias ? some_lanes(bias + c, width) : Lanes{};
        for (long t = first; t < end; t++) {
            __builtin_prefetch(x + t * xt + c + TILE);
            for (long d = k - 1; d > 0; d--) past[d] = past[d - 1];
            if (index && t > first && index[t] != index[t - 1])
                for (long d = 1; d < k; d++) past[d] = Lanes{};
            past[0] = some_lanes(x + t * xt + c, width);
            Lanes h = shift;
            for (long d = 0; d < k; d++) h += tap[d] * past[d];
            keep_some(y + t * C + c, activate ? silu(h) : h, width);
        }
    }
}

template <class T>
static void conv_forward(const T *x, long xb, long xt, const float *taps, const float *bias, const int32_t *index, T *y,
                         long B, long S, long C, long k, int activate) {
    const auto span_of = k == 4 ? conv_forward_span<T, 4> : conv_forward_span<T, 0>;
#pragma omp parallel for collapse(2) schedule(static)
    for (long b = 0; b < B; b++)
        for (long t = 0; t < S; t += SPAN)
            span_of(x + b * xb, xt, taps, bias, index ? index + b * S : nullptr, y + b * S * C, t, std::min(S, t + SPAN),
                    C, k, activate);
}

// One tile of n channels. ends (B, S): how many of the tokens t .. t+k-1 read t.
template <class T, long TAPS_KNOWN>
static void conv_backward_tile(const T *x, long xb, long xt, const float *taps, const float *bias, const uint8_t *ends,
                               const T *dy, long dyb, long dyt, T *dx, long dxb, long dxt, float *dtaps, float *dbias,
                               long B, long S, long C, long taps_given, long n, int activate) {
    static const long VECTORS = TILE / LANES, MOST = TAPS_KNOWN ? TAPS_KNOWN : TAPS;
    const long k = TAPS_KNOWN ? TAPS_KNOWN : taps_given;
    Lanes total[VECTORS][MOST + 1] = {}, inputs[VECTORS][MOST], slopes[VECTORS][MOST];
    for (long b = 0; b < B; b++) {
        const uint8_t *end = ends + b * S;
        std::memset(inputs, 0, sizeof inputs);
        std::memset(slopes, 0, sizeof slopes);
        for (long first = 0; first < S + k - 1; first += SPAN)
            for (long v = 0; v * LANES < n; v++) {
                const long c0 = v * LANES, width = n - c0;
                const T *row = x + b * xb + c0, *slope = dy + b * dyb + c0;
                T *out = dx + b * dxb + c0;
                Lanes tap[MOST], past[MOST], dh[MOST], sum[MOST + 1] = {};  // past[d], dh[d]: of token t-d
                for (long d = 0; d < k; d++) {
                    tap[d] = some_lanes(taps + d * C + c0, width);
                    past[d] = inputs[v][d];
                    dh[d] = slopes[v][d];
                }
                const Lanes shift = bias ? some_lanes(bias + c0, width) : Lanes{};
                for (long t = first; t < std::min(first + SPAN, S + k - 1); t++) {
                    for (long d = k - 1; d > 0; d--) {
                        past[d] = past[d - 1];
                        dh[d] = dh[d - 1];
                    }
                    if (t < S) {
                        __builtin_prefetch(row + (t + SPAN) * xt);
                        __builtin_prefetch(slope + (t + SPAN) * dyt);
                        __builtin_prefetch(out + (t + SPAN) * dxt, 1);
                        if (t > 0 && end[t - 1] == 1)  // a document begins
                            for (long d = 1; d < k; d++) past[d] = Lanes{};
                        past[0] = some_lanes(row + t * xt, width);
                        dh[0] = some_lanes(slope + t * dyt, width);
                        if (activate) {
                            Lanes h = shift;
                            for (long d = 0; d < k; d++) h += tap[d] * past[d];
                            dh[0] *= silu_slope(h);
                        }
                        for (long d = 0; d < k; d++) sum[d] += dh[0] * past[d];
                        sum[k] += dh[0];
                    }
                    if (const long done = t - (k - 1); done >= 0) {  // no later token reads it
                        Lanes value{};
                        if (end[done] == k)
                            for (long d = 0; d < k; d++) value += tap[d] * dh[k - 1 - d];
                        else
                            for (long d = 0; d < end[done]; d++) value += tap[d] * dh[k - 1 - d];
                        keep_some(out + done * dxt, value, width);
                    }
                }
                for (long d = 0; d < k; d++) {
                    inputs[v][d] = past[d];
                    slopes[v][d] = dh[d];
                }
                for (long d = 0; d <= k; d++) total[v][d] += sum[d];
            }
    }
    for (long v = 0; v * LANES < n; v++) {
        for (long d = 0; d < k; d++) keep_some(dtaps + d * C + v * LANES, total[v][d], n - v * LANES);
        if (dbias) keep_some(dbias + v * LANES, total[v][k], n - v * LANES);
    }
}

template <class T>
static void conv_backward(const T *x, long xb, long xt, const float *taps, const float *bias, const int32_t *index,
                          const T *dy, long dyb, long dyt, T *dx, long dxb, long dxt, float *dtaps, float *dbias,
                          long B, long S, long C, long k, int activate) {
    std::vector<uint8_t> ends(B * S);
    for (long b = 0; b < B; b++)
        for (long t = 0; t < S; t++) {
            long d = 1;
            while (d < std::min(k, S - t) && (!index || index[b * S + t + d] == index[b * S + t])) d++;
            ends[b * S + t] = d;
        }
    const auto tile_of = k == 4 ? conv_backward_tile<T, 4> : conv_backward_tile<T, 0>;
#pragma omp parallel for schedule(static)
    for (long c = 0; c < C; c += TILE)
        tile_of(x + c, xb, xt, taps + c, bias ? bias + c : nullptr, ends.data(), dy + c, dyb, dyt, dx + c, dxb, dxt,
                dtaps + c, dbias ? dbias + c : nullptr, B, S, C, k, std::min(TILE, C - c), activate);
}

// ---- RMS norm of n rows of D in G groups, plain or gated by silu(z), before or after the norm ----

enum Gate { NONE = 0, GATE_FIRST = 1, NORM_FIRST = 2 };

// Rows are fetched two before they are read: the processor's own guesses end with each page.
static const long ROWS_AHEAD = 2;

template <class T, class O>
static void norm_forward(const T *x, long xs, const T *z, long zs, const float *weight, O *y, float *scale, long n, long D,
                         long G, float eps, int gate) {
    const long width = D / G;
#pragma omp parallel
    {
        std::vector<float> room(D + LANES);
        float *h = room.data();
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++) {
            const T *row = x + i * xs, *zrow = z ? z + i * zs : nullptr;
            O *out = y + i * D;
            for (long first = 0; first < D; first += width) {
                const long last = first + width;
                Lanes squares{};
                for (long c = first; c < last; c += LANES) {
                    __builtin_prefetch(row + ROWS_AHEAD * xs + c);
                    Lanes v = some_lanes(row + c, last - c);
                    if (gate == GATE_FIRST) {
                        __builtin_prefetch(zrow + ROWS_AHEAD * zs + c);
                        v *= silu(some_lanes(zrow + c, last - c));
                    }
                    squares += v * v;
                    keep(h + c, v);
                }
                const float r = 1.f / std::sqrt(sum_of(squares) / width + eps);
                scale[i * G + first / width] = r;
                for (long c = first; c < last; c += LANES) {
                    Lanes v = lanes(h + c) * r * some_lanes(weight + c, last - c);
                    if (gate == NORM_FIRST) v *= silu(some_lanes(zrow + c, last - c));
                    keep_some(out + c, v, last - c);
                }
            }
        }
    }
}

static const long ROWS = 64;  // whose share of the weight's gradient is summed by one thread

template <class T, class O>
static void norm_backward(const T *x, long xs, const T *z, long zs, const float *weight, const float *scale, const O *dy,
                          long ds, T *dx, T *dz, long dzs, float *dweight, long n, long D, long G, int gate) {
    const long width = D / G, parts = (n + ROWS - 1) / ROWS;
    std::vector<float> sums(parts * D, 0.f);
#pragma omp parallel
    {
        std::vector<float> room(3 * (D + LANES));
        float *normal = room.data(), *slope = normal + D + LANES, *s = slope + D + LANES;
#pragma omp for schedule(static)
        for (long part = 0; part < parts; part++) {
            float *dw = sums.data() + part * D;
            for (long i = part * ROWS; i < std::min(n, (part + 1) * ROWS); i++) {
                const T *row = x + i * xs, *zrow = z ? z + i * zs : nullptr;
                const O *dout = dy + i * ds;
                T *dxrow = dx + i * D, *dzrow = dz ? dz + i * dzs : nullptr;
                for (long first = 0; first < D; first += width) {
                    const long last = first + width;
                    const float r = scale[i * G + first / width];
                    Lanes sum{};
                    for (long c = first; c < last; c += LANES) {
                        const long rest = last - c;
                        __builtin_prefetch(row + ROWS_AHEAD * xs + c);
                        __builtin_prefetch(dout + ROWS_AHEAD * ds + c);
                        Lanes unit = some_lanes(row + c, rest) * r, given = some_lanes(dout + c, rest);
                        if (gate != NONE) {
                            __builtin_prefetch(zrow + ROWS_AHEAD * zs + c);
                            const Lanes v = some_lanes(zrow + c, rest), open = sigmoid(v);
                            keep(s + c, open);
                            (gate == GATE_FIRST ? unit : given) *= v * open;
                        }
                        const Lanes by_weight = given * some_lanes(weight + c, rest);
                        keep_some(dw + c, some_lanes(dw + c, rest) + given * unit, rest);
                        sum += by_weight * unit;
                        keep(normal + c, unit);
                        keep(slope + c, by_weight);
                    }
                    const float along = sum_of(sum) / width;
                    for (long c = first; c < last; c += LANES) {
                        const long rest = last - c;
                        const Lanes unit = lanes(normal + c), dh = r * (lanes(slope + c) - unit * along);
                        if (gate == NONE) {
                            keep_some(dxrow + c, dh, rest);
                            continue;
                        }
                        const Lanes v = some_lanes(zrow + c, rest), open = lanes(s + c), bend = open * (1.f + v * (1.f - open));
                        if (gate == GATE_FIRST) {
                            keep_some(dxrow + c, dh * v * open, rest);
                            keep_some(dzrow + c, dh * some_lanes(row + c, rest) * bend, rest);
                        } else {
                            const Lanes ungated = some_lanes(dout + c, rest) * unit * some_lanes(weight + c, rest);
                            keep_some(dxrow + c, dh, rest);
                            keep_some(dzrow + c, ungated * bend, rest);
                        }
                    }
                }
            }
        }
#pragma omp for schedule(static)
        for (long block = 0; block < (D + TILE - 1) / TILE; block++)
            for (long c = block * TILE; c < std::min(D, (block + 1) * TILE); c++) {
                float sum = 0.f;
                for (long part = 0; part < parts; part++) sum += sums[part * D + c];
                dweight[c] = sum;
            }
    }
}

// ---- activations of n rows of D ----

template <class T>
static void swiglu_forward(const T *gate, long gs, const T *up, long us, T *out, long n, long D) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++)
        for (long c = 0; c < D; c += LANES)
            keep_some(out + i * D + c, silu(some_lanes(gate + i * gs + c, D - c)) * some_lanes(up + i * us + c, D - c), D - c);
}

template <class T>
static void swiglu_backward(const T *gate, long gs, const T *up, long us, const T *dy, long ds, T *dgate, T *dup, long os,
                            long n, long D) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++)
        for (long c = 0; c < D; c += LANES) {
            const Lanes g = some_lanes(gate + i * gs + c, D - c), u = some_lanes(up + i * us + c, D - c);
            const Lanes d = some_lanes(dy + i * ds + c, D - c), s = sigmoid(g);
            keep_some(dup + i * os + c, d * g * s, D - c);
            keep_some(dgate + i * os + c, d * u * s * (1.f + g * (1.f - s)), D - c);
        }
}

template <class T>
static void relu2_forward(const T *x, long xs, T *out, long n, long D) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++)
        for (long c = 0; c < D; c += LANES) {
            const Lanes v = larger(Lanes{}, some_lanes(x + i * xs + c, D - c));
            keep_some(out + i * D + c, v * v, D - c);
        }
}

template <class T>
static void relu2_backward(const T *x, long xs, const T *dy, long ds, T *dx, long n, long D) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++)
        for (long c = 0; c < D; c += LANES) {
            const Lanes v = larger(Lanes{}, some_lanes(x + i * xs + c, D - c));
            keep_some(dx + i * D + c, 2.f * v * some_lanes(dy + i * ds + c, D - c), D - c);
        }
}

// ---- softmax of n rows of V logits ----

template <class T>
static void log_sum_exp(const T *logits, float *lse, long n, long V) {
    const long whole = V / LANES * LANES;
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++) {
        const T *row = logits + i * V;
        Lanes tops = -INFINITY - Lanes{}, sums{};
        for (long c = 0; c < whole; c += LANES) tops = larger(tops, lanes(row + c));
        float top = largest_of(tops);
        for (long c = whole; c < V; c++) top = std::max(top, wide(row[c]));
        for (long c = 0; c < whole; c += LANES) sums += exp2_((lanes(row + c) - top) * LOG2_E);
        float sum = sum_of(sums);
        for (long c = whole; c < V; c++) sum += exp2_((wide(row[c]) - top) * LOG2_E);
        lse[i] = top + std::log(sum);
    }
}

template <class T>
static void softmax_slope(T *logits, const float *lse, const float *share, const float *own, const int64_t *target, long n,
                          long V) {  // logits become share * softmax - own at the target
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++) {
        T *row = logits + i * V;
        const float at = lse[i], by = share[i];
        const long aim = std::max<long>(target[i], 0);
        const float aimed = by * exp2_((wide(row[aim]) - at) * LOG2_E) - own[i];
        for (long c = 0; c < V; c += LANES)
            keep_some(row + c, exp2_((some_lanes(row + c, V - c) - at) * LOG2_E) * by, V - c);
        put(row[aim], aimed);
    }
}

#define CONV_FORWARD(T)                                                                                        \
    (const T *x, long xb, long xt, const float *taps, const float *bias, const int32_t *index, T *y, long B, long S, \
     long C, long k, int activate)
BOTH(conv_forward, CONV_FORWARD, (x, xb, xt, taps, bias, index, y, B, S, C, k, activate))

#define CONV_BACKWARD(T)                                                                                               \
    (const T *x, long xb, long xt, const float *taps, const float *bias, const int32_t *index, const T *dy, long dyb, \
     long dyt, T *dx, long dxb, long dxt, float *dtaps, float *dbias, long B, long S, long C, long k, int activate)
BOTH(conv_backward, CONV_BACKWARD,
     (x, xb, xt, taps, bias, index, dy, dyb, dyt, dx, dxb, dxt, dtaps, dbias, B, S, C, k, activate))

#define SWIGLU_FORWARD(T) (const T *gate, long gs, const T *up, long us, T *out, long n, long D)
BOTH(swiglu_forward, SWIGLU_FORWARD, (gate, gs, up, us, out, n, D))

#define SWIGLU_BACKWARD(T) \
    (const T *gate, long gs, const T *up, long us, const T *dy, long ds, T *dgate, T *dup, long os, long n, long D)
BOTH(swiglu_backward, SWIGLU_BACKWARD, (gate, gs, up, us, dy, ds, dgate, dup, os, n, D))

#define RELU2_FORWARD(T) (const T *x, long xs, T *out, long n, long D)
BOTH(relu2_forward, RELU2_FORWARD, (x, xs, out, n, D))

#define RELU2_BACKWARD(T) (const T *x, long xs, const T *dy, long ds, T *dx, long n, long D)
BOTH(relu2_backward, RELU2_BACKWARD, (x, xs, dy, ds, dx, n, D))

#define LOG_SUM_EXP(T) (const T *logits, float *lse, long n, long V)
BOTH(log_sum_exp, LOG_SUM_EXP, (logits, lse, n, V))

#define SOFTMAX_SLOPE(T) \
    (T *logits, const float *lse, const float *share, const float *own, const int64_t *target, long n, long V)
BOTH(softmax_slope, SOFTMAX_SLOPE, (logits, lse, share, own, target, n, V))

#define NORM(T, t, O, o)                                                                                                \
    extern "C" void norm_forward_##t##_##o(const T *x, long xs, const T *z, long zs, const float *weight, O *y,         \
                                           float *scale, long n, long D, long G, float eps, int gate) {                 \
        norm_forward<T, O>(x, xs, z, zs, weight, y, scale, n, D, G, eps, gate);                                         \
    }                                                                                                                   \
    extern "C" void norm_backward_##t##_##o(const T *x, long xs, const T *z, long zs, const float *weight,              \
                                            const float *scale, const O *dy, long ds, T *dx, T *dz, long dzs,           \
                                            float *dweight, long n, long D, long G, int gate) {                         \
        norm_backward<T, O>(x, xs, z, zs, weight, scale, dy, ds, dx, dz, dzs, dweight, n, D, G, gate);                  \
    }
NORM(float, f32, float, f32)
NORM(float, f32, bf16, bf16)
NORM(bf16, bf16, bf16, bf16)
NORM(bf16, bf16, float, f32)
