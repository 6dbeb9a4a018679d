// Loops over rows that plain torch takes in several passes: compiled when first wanted, see native.py.
//
// Tensors are float32 or bfloat16, read and written once; arithmetic is float32. Threads share out rows, or channels
// where a sum runs over rows, by fixed rules, so that results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct bf16 {
    uint16_t bits;
};

static inline float wide(float v) { return v; }

static inline float wide(bf16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

static inline void put(float &out, float v) { out = v; }

static inline void put(bf16 &out, float v) {  // to nearest, ties to even; what is no number stays none
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = v == v ? uint16_t(rounded) : uint16_t(0x7fc0);
}

static const float LOG2_E = 1.4426950408889634f;

static inline float exp2_(float x) {  // bounded to normal numbers; relative error 2e-7
    x = x < -126.f ? -126.f : (x > 126.f ? 126.f : x);
    float whole = std::rint(x), r = x - whole;
    float p = 1.525273380405984e-5f;
    p = p * r + 1.540353039338161e-4f;
    p = p * r + 1.333355814642844e-3f;
    p = p * r + 9.618129107628477e-3f;
    p = p * r + 5.550410866482158e-2f;
    p = p * r + 2.402265069591007e-1f;
    p = p * r + 6.931471805599453e-1f;
    p = p * r + 1.f;
    uint32_t bits = uint32_t(int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

static inline float sigmoid(float x) { return 1.f / (1.f + exp2_(-x * LOG2_E)); }
static inline float silu(float x) { return x * sigmoid(x); }

static inline float silu_slope(float x) {
    float s = sigmoid(x);
    return s * (1.f + x * (1.f - s));
}

// ---- causal convolution: x, y (B, T, C); taps (k, C) by distance; index (B, T) of documents or null ----

static const long TILE = 64, TAPS = 16, SUM_SPAN = 256;

static inline long reach_of(const int32_t *index, long t, long k) {  // taps that t may read, itself included
    long reach = std::min(k, t + 1);
    if (index)
        for (long d = 1; d < reach; d++)
            if (index[t - d] != index[t]) return d;
    return reach;
}

template <class T>
static inline void convolve(const T *x, long xt, const float *taps, const float *bias, long C, long reach, long n,
                            float *h) {  // n channels of one token
    for (long c = 0; c < n; c++) h[c] = bias ? bias[c] : 0.f;
    for (long d = 0; d < reach; d++) {
        const T *row = x - d * xt;
        const float *tap = taps + d * C;
#pragma omp simd
        for (long c = 0; c < n; c++) h[c] += tap[c] * wide(row[c]);
    }
}

template <class T>
static void conv_forward(const T *x, long xb, long xt, const float *taps, const float *bias, const int32_t *index, T *y,
                         long B, long S, long C, long k, int activate) {
    const long span = 32, spans = (S + span - 1) / span;
#pragma omp parallel for collapse(2) schedule(static)
    for (long b = 0; b < B; b++)
        for (long part = 0; part < spans; part++) {
            float h[4 * TILE];
            for (long t = part * span; t < std::min(S, (part + 1) * span); t++) {
                long reach = reach_of(index ? index + b * S : nullptr, t, k);
                for (long c0 = 0; c0 < C; c0 += 4 * TILE) {
                    long n = std::min(4 * TILE, C - c0);
                    convolve(x + b * xb + t * xt + c0, xt, taps + c0, bias ? bias + c0 : nullptr, C, reach, n, h);
                    T *out = y + (b * S + t) * C + c0;
                    if (activate) {
#pragma omp simd
                        for (long c = 0; c < n; c++) put(out[c], silu(h[c]));
                    } else {
#pragma omp simd
                        for (long c = 0; c < n; c++) put(out[c], h[c]);
                    }
                }
            }
        }
}

template <class T>
static void conv_backward(const T *x, long xb, long xt, const float *taps, const float *bias, const int32_t *index,
                          const T *dy, long dyb, long dyt, T *dx, float *dtaps, float *dbias, long B, long S, long C,
                          long k, int activate) {
    const long tiles = (C + TILE - 1) / TILE;
#pragma omp parallel for schedule(static)
    for (long tile = 0; tile < tiles; tile++) {
        const long c0 = tile * TILE, n = std::min(TILE, C - c0);
        float total[TAPS + 1][TILE] = {}, part[TAPS + 1][TILE], open[TAPS][TILE], h[TILE], dh[TILE];
        for (long b = 0; b < B; b++) {
            for (long t = 0; t < S + k - 1; t++) {
                if (t < S) {
                    if (t % SUM_SPAN == 0) std::memset(part, 0, sizeof part);
                    const T *row = x + b * xb + t * xt + c0, *slope = dy + b * dyb + t * dyt + c0;
                    long reach = reach_of(index ? index + b * S : nullptr, t, k);
                    if (activate) {
                        convolve(row, xt, taps + c0, bias ? bias + c0 : nullptr, C, reach, n, h);
#pragma omp simd
                        for (long c = 0; c < n; c++) dh[c] = wide(slope[c]) * silu_slope(h[c]);
                    } else {
#pragma omp simd
                        for (long c = 0; c < n; c++) dh[c] = wide(slope[c]);
                    }
                    float *fresh = open[t % k];
#pragma omp simd
                    for (long c = 0; c < n; c++) {
                        fresh[c] = taps[c0 + c] * dh[c];
                        part[0][c] += dh[c] * wide(row[c]);
                        part[k][c] += dh[c];
                    }
                    for (long d = 1; d < reach; d++) {
                        float *earlier = open[(t - d) % k], *sum = part[d];
                        const float *tap = taps + d * C + c0;
                        const T *before = row - d * xt;
#pragma omp simd
                        for (long c = 0; c < n; c++) {
                            earlier[c] += tap[c] * dh[c];
                            sum[c] += dh[c] * wide(before[c]);
                        }
                    }
                    if (t % SUM_SPAN == SUM_SPAN - 1 || t == S - 1)
                        for (long d = 0; d <= k; d++)
                            for (long c = 0; c < n; c++) total[d][c] += part[d][c];
                }
                long done = t - (k - 1);  // no later token reads it
                if (done >= 0 && done < S) {
                    T *out = dx + (b * S + done) * C + c0;
                    const float *value = open[done % k];
#pragma omp simd
                    for (long c = 0; c < n; c++) put(out[c], value[c]);
                }
            }
        }
        for (long d = 0; d < k; d++) std::memcpy(dtaps + d * C + c0, total[d], n * sizeof(float));
        if (dbias) std::memcpy(dbias + c0, total[k], n * sizeof(float));
    }
}

// ---- RMS norm of n rows of D in G groups, plain or gated by silu(z), before or after the norm ----

enum Gate { NONE = 0, GATE_FIRST = 1, NORM_FIRST = 2 };

template <class T, class O>
static void norm_forward(const T *x, long xs, const T *z, long zs, const float *weight, O *y, float *scale, long n, long D,
                         long G, float eps, int gate) {
    const long width = D / G;
#pragma omp parallel
    {
        std::vector<float> room(D);
        float *h = room.data();
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++) {
            const T *row = x + i * xs, *zrow = z ? z + i * zs : nullptr;
            for (long g = 0; g < G; g++) {
                const long first = g * width, last = first + width;
                float sum = 0.f;
                if (gate == GATE_FIRST) {
#pragma omp simd reduction(+ : sum)
                    for (long c = first; c < last; c++) {
                        h[c] = wide(row[c]) * silu(wide(zrow[c]));
                        sum += h[c] * h[c];
                    }
                } else {
#pragma omp simd reduction(+ : sum)
                    for (long c = first; c < last; c++) {
                        h[c] = wide(row[c]);
                        sum += h[c] * h[c];
                    }
                }
                const float r = 1.f / std::sqrt(sum / width + eps);
                scale[i * G + g] = r;
                O *out = y + i * D;
                if (gate == NORM_FIRST) {
#pragma omp simd
                    for (long c = first; c < last; c++) put(out[c], h[c] * r * weight[c] * silu(wide(zrow[c])));
                } else {
#pragma omp simd
                    for (long c = first; c < last; c++) put(out[c], h[c] * r * weight[c]);
                }
            }
        }
    }
}

static const long ROWS = 64;  // whose share of the weight's gradient is summed by one thread

template <class T, class O>
static void norm_backward(const T *x, long xs, const T *z, long zs, const float *weight, const float *scale, const O *dy,
                          long ds, T *dx, T *dz, float *dweight, long n, long D, long G, int gate) {
    const long width = D / G, parts = (n + ROWS - 1) / ROWS;
    std::vector<float> sums(parts * D, 0.f);
#pragma omp parallel
    {
        std::vector<float> room(3 * D);
        float *normal = room.data(), *slope = normal + D, *s = slope + D;
#pragma omp for schedule(static)
        for (long part = 0; part < parts; part++) {
            float *dw = sums.data() + part * D;
            for (long i = part * ROWS; i < std::min(n, (part + 1) * ROWS); i++) {
                const T *row = x + i * xs, *zrow = z ? z + i * zs : nullptr;
                const O *dout = dy + i * ds;
                T *dxrow = dx + i * D, *dzrow = dz ? dz + i * D : nullptr;
                for (long g = 0; g < G; g++) {
                    const long first = g * width, last = first + width;
                    const float r = scale[i * G + g];
                    float along = 0.f;
                    if (gate == NONE) {
#pragma omp simd reduction(+ : along)
                        for (long c = first; c < last; c++) {
                            normal[c] = wide(row[c]) * r;
                            dw[c] += wide(dout[c]) * normal[c];
                            slope[c] = wide(dout[c]) * weight[c];
                            along += slope[c] * normal[c];
                        }
                    } else if (gate == GATE_FIRST) {
#pragma omp simd reduction(+ : along)
                        for (long c = first; c < last; c++) {
                            s[c] = sigmoid(wide(zrow[c]));
                            normal[c] = wide(row[c]) * wide(zrow[c]) * s[c] * r;
                            dw[c] += wide(dout[c]) * normal[c];
                            slope[c] = wide(dout[c]) * weight[c];
                            along += slope[c] * normal[c];
                        }
                    } else {
#pragma omp simd reduction(+ : along)
                        for (long c = first; c < last; c++) {
                            s[c] = sigmoid(wide(zrow[c]));
                            normal[c] = wide(row[c]) * r;
                            float gated = wide(dout[c]) * wide(zrow[c]) * s[c];
                            dw[c] += gated * normal[c];
                            slope[c] = gated * weight[c];
                            along += slope[c] * normal[c];
                        }
                    }
                    along /= width;
                    if (gate == NONE) {
#pragma omp simd
                        for (long c = first; c < last; c++) put(dxrow[c], r * (slope[c] - normal[c] * along));
                    } else if (gate == GATE_FIRST) {
#pragma omp simd
                        for (long c = first; c < last; c++) {
                            float dh = r * (slope[c] - normal[c] * along), v = wide(zrow[c]);
                            put(dxrow[c], dh * v * s[c]);
                            put(dzrow[c], dh * wide(row[c]) * s[c] * (1.f + v * (1.f - s[c])));
                        }
                    } else {
#pragma omp simd
                        for (long c = first; c < last; c++) {
                            float v = wide(zrow[c]), at = wide(dout[c]) * normal[c] * weight[c];
                            put(dxrow[c], r * (slope[c] - normal[c] * along));
                            put(dzrow[c], at * s[c] * (1.f + v * (1.f - s[c])));
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
#pragma omp simd
        for (long c = 0; c < D; c++) put(out[i * D + c], silu(wide(gate[i * gs + c])) * wide(up[i * us + c]));
}

template <class T>
static void swiglu_backward(const T *gate, long gs, const T *up, long us, const T *dy, long ds, T *dgate, T *dup, long os,
                            long n, long D) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++)
#pragma omp simd
        for (long c = 0; c < D; c++) {
            float g = wide(gate[i * gs + c]), u = wide(up[i * us + c]), d = wide(dy[i * ds + c]), s = sigmoid(g);
            put(dup[i * os + c], d * g * s);
            put(dgate[i * os + c], d * u * s * (1.f + g * (1.f - s)));
        }
}

template <class T>
static void relu2_forward(const T *x, long xs, T *out, long n, long D) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++)
#pragma omp simd
        for (long c = 0; c < D; c++) {
            float v = wide(x[i * xs + c]);
            v = v < 0.f ? 0.f : v;
            put(out[i * D + c], v * v);
        }
}

template <class T>
static void relu2_backward(const T *x, long xs, const T *dy, long ds, T *dx, long n, long D) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++)
#pragma omp simd
        for (long c = 0; c < D; c++) {
            float v = wide(x[i * xs + c]);
            v = v < 0.f ? 0.f : v;
            put(dx[i * D + c], 2.f * v * wide(dy[i * ds + c]));
        }
}

// ---- softmax of n rows of V logits ----

template <class T>
static void log_sum_exp(const T *logits, float *lse, long n, long V) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++) {
        const T *row = logits + i * V;
        float top = -INFINITY, sum = 0.f;
#pragma omp simd reduction(max : top)
        for (long c = 0; c < V; c++) top = std::max(top, wide(row[c]));
#pragma omp simd reduction(+ : sum)
        for (long c = 0; c < V; c++) sum += exp2_((wide(row[c]) - top) * LOG2_E);
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
#pragma omp simd
        for (long c = 0; c < V; c++) put(row[c], by * exp2_((wide(row[c]) - at) * LOG2_E));
        put(row[aim], aimed);
    }
}

// ---- SSD, one chunk of Q tokens from `start` on of rows of S; H = G R heads of P; see ssd_native.py ----

template <class T>
static void ssd_lay(const T *x, long xb, long xt, const float *first, const float *second, T *heads, T *groups, long B,
                    long S, long start, long Q, long G, long R, long P) {
    // heads (B, H, Q, P) = first x; groups (B, G, Q, R P) = second first x; first, second (B, S, H), first null for ones
    const long H = G * R;
#pragma omp parallel for collapse(2) schedule(static)
    for (long b = 0; b < B; b++)
        for (long q = 0; q < Q; q++) {
            const long t = start + q;
            for (long h = 0; h < H; h++) {
                const float f = first ? first[(b * S + t) * H + h] : 1.f, s = second[(b * S + t) * H + h];
                const T *from = x + b * xb + t * xt + h * P;
                T *one = heads + ((b * H + h) * Q + q) * P;
                T *other = groups + (((b * G + h / R) * Q + q) * R + h % R) * P;
#pragma omp simd
                for (long c = 0; c < P; c++) {
                    const float v = wide(from[c]) * f;
                    put(one[c], v);
                    put(other[c], v * s);
                }
            }
        }
}

static inline float decay(float exponent) {  // at most 1, at least what keeps products normal: others are slow
    return exp2_(std::max(std::min(exponent, 0.f), -63.f));
}

static inline long first_seen(const int32_t *index, long q) {  // of the chunk's tokens, by token q
    if (!index) return 0;
    long first = q;
    while (first > 0 && index[first - 1] == index[q]) first--;
    return first;
}

template <class T>
static void ssd_mask(const T *CB, const float *cs, const int32_t *index, T *M, long B, long S, long start, long Q, long G,
                     long R) {  // M (B, H, Q, Q) = decay from j to i times CB (B, G, Q, Q), 0 where i does not see j
    const long H = G * R;
#pragma omp parallel for collapse(2) schedule(static)
    for (long b = 0; b < B; b++)
        for (long h = 0; h < H; h++) {
            const float *sum = cs + (b * H + h) * S + start;
            const T *dots = CB + (b * G + h / R) * Q * Q;
            T *out = M + (b * H + h) * Q * Q;
            for (long i = 0; i < Q; i++) {
                const long low = first_seen(index ? index + b * S + start : nullptr, i);
                std::memset(out + i * Q, 0, low * sizeof(T));
#pragma omp simd
                for (long j = low; j <= i; j++)
                    put(out[i * Q + j], decay(sum[i] - sum[j]) * wide(dots[i * Q + j]));
                std::memset(out + i * Q + i + 1, 0, (Q - i - 1) * sizeof(T));
            }
        }
}

template <class T>
static void ssd_mask_backward(const T *CB, const float *cs, const int32_t *index, const T *dM, T *M, T *dCB, float *dcs,
                              long B, long S, long start, long Q, long G, long R) {
    // M as above; dCB (B, G, Q, Q) = sum over heads of dM L; dcs (B, H, Q) = row sums less column sums of dM M
    const long H = G * R, span = 16, parts = (Q + span - 1) / span;
    std::vector<float> columns(B * G * parts * R * Q, 0.f);
#pragma omp parallel
    {
        std::vector<float> room(2 * Q);
        float *total = room.data(), *weighted = total + Q;
#pragma omp for collapse(2) schedule(dynamic)
        for (long bg = 0; bg < B * G; bg++)
            for (long part = 0; part < parts; part++) {
                const long b = bg / G, g = bg % G;
                const T *dots = CB + bg * Q * Q;
                float *column = columns.data() + (bg * parts + part) * R * Q;
                for (long i = part * span; i < std::min(Q, (part + 1) * span); i++) {
                    const long low = first_seen(index ? index + b * S + start : nullptr, i);
                    std::fill(total, total + Q, 0.f);
                    for (long r = 0; r < R; r++) {
                        const long h = g * R + r, at = ((b * H + h) * Q + i) * Q;
                        const float *sum = cs + (b * H + h) * S + start;
                        float row = 0.f;
                        std::memset(M + at, 0, low * sizeof(T));
#pragma omp simd reduction(+ : row)
                        for (long j = low; j <= i; j++) {
                            const float L = decay(sum[i] - sum[j]), dot = wide(dots[i * Q + j]);
                            const float d = wide(dM[at + j]) * L;
                            total[j] += d;
                            weighted[j] = d * dot;
                            row += d * dot;
                            put(M[at + j], L * dot);
                        }
                        std::memset(M + at + i + 1, 0, (Q - i - 1) * sizeof(T));
                        for (long j = low; j <= i; j++) column[r * Q + j] += weighted[j];
                        dcs[(b * H + h) * Q + i] = row;
                    }
                    for (long j = 0; j < Q; j++) put(dCB[(bg * Q + i) * Q + j], total[j]);
                }
            }
#pragma omp for collapse(2) schedule(static)
        for (long bg = 0; bg < B * G; bg++)
            for (long r = 0; r < R; r++)
                for (long part = 0; part < parts; part++) {
                    const float *column = columns.data() + ((bg * parts + part) * R + r) * Q;
                    float *out = dcs + (bg * R + r) * Q;
                    for (long j = 0; j < Q; j++) out[j] -= column[j];
                }
    }
}

template <class T>
static void ssd_output(const T *within, const T *before, const float *enter, const T *x, long xb, long xt, const float *D,
                       T *y, long B, long S, long start, long Q, long G, long R, long P) {
    // y (B, S, H, P) = within (B, H, Q, P) + enter before (B, G, Q, R P) + D x
    const long H = G * R;
#pragma omp parallel for collapse(2) schedule(static)
    for (long b = 0; b < B; b++)
        for (long q = 0; q < Q; q++)
            for (long h = 0; h < H; h++) {
                const long t = start + q;
                const float e = enter[(b * S + t) * H + h], skip = D ? D[h] : 0.f;
                const T *one = within + ((b * H + h) * Q + q) * P;
                const T *other = before + (((b * G + h / R) * Q + q) * R + h % R) * P;
                const T *from = x + b * xb + t * xt + h * P;
                T *out = y + ((b * S + t) * H + h) * P;
#pragma omp simd
                for (long c = 0; c < P; c++) put(out[c], wide(one[c]) + wide(other[c]) * e + wide(from[c]) * skip);
            }
}

template <class T>
static void ssd_output_backward(const T *within, const T *after, const T *before, const float *enter, const float *leave,
                                const float *dt, const float *D, const T *x, long xb, long xt, const T *dy, long dyb,
                                long dyt, T *dx, float *d_dt, float *d_enter, float *d_leave, float *dD, long B, long S,
                                long start, long Q, long G, long R, long P) {
    // within (B, H, Q, P) = M^T dy; after = B dS_out, before = C S_in (B, G, Q, R P). The gradient of dt x is
    // within + leave after. d_dt, d_enter, d_leave (those of log2's slopes: enter dy before, leave after dt x) and
    // dD (dy x), all (B, S, H), are sums over P.
    const long H = G * R;
#pragma omp parallel for collapse(2) schedule(static)
    for (long b = 0; b < B; b++)
        for (long q = 0; q < Q; q++)
            for (long h = 0; h < H; h++) {
                const long t = start + q, at = (b * S + t) * H + h, grouped = (((b * G + h / R) * Q + q) * R + h % R) * P;
                const float l = leave[at], step = dt[at], skip = D ? D[h] : 0.f;
                const T *one = within + ((b * H + h) * Q + q) * P, *two = after + grouped, *three = before + grouped;
                const T *from = x + b * xb + t * xt + h * P, *slope = dy + b * dyb + t * dyt + h * P;
                T *out = dx + at * P;
                float sum_dt = 0.f, sum_enter = 0.f, sum_leave = 0.f, sum_skip = 0.f;
#pragma omp simd reduction(+ : sum_dt, sum_enter, sum_leave, sum_skip)
                for (long c = 0; c < P; c++) {
                    const float left = wide(two[c]) * l, d = wide(one[c]) + left, v = wide(from[c]), g = wide(slope[c]);
                    sum_dt += d * v;
                    sum_enter += g * wide(three[c]);
                    sum_leave += left * v;
                    sum_skip += g * v;
                    put(out[c], d * step + g * skip);
                }
                d_dt[at] = sum_dt;
                d_enter[at] = sum_enter * enter[at];
                d_leave[at] = sum_leave * step;
                dD[at] = sum_skip;
            }
}

template <class T>
static void ssd_state(float *state, const T *into, const float *through, long tb, T *narrow, const T *other, float *sums,
                      long B, long G, long N, long R, long P) {
    // state (B, G, N, R, P) becomes through state + into, and narrow its copy; sums (B, G, R), unless null, are those of
    // state times other as they were. through (B, G, R), tb apart.
#pragma omp parallel for collapse(2) schedule(static)
    for (long bg = 0; bg < B * G; bg++)
        for (long r = 0; r < R; r++) {
            const float by = through[bg / G * tb + bg % G * R + r];
            float sum = 0.f;
            for (long n = 0; n < N; n++) {
                const long at = ((bg * N + n) * R + r) * P;
                if (sums) {
#pragma omp simd reduction(+ : sum)
                    for (long c = 0; c < P; c++) sum += state[at + c] * wide(other[at + c]);
                }
#pragma omp simd
                for (long c = 0; c < P; c++) {
                    const float v = state[at + c] * by + wide(into[at + c]);
                    state[at + c] = v;
                    put(narrow[at + c], v);
                }
            }
            if (sums) sums[bg * R + r] = sum * by;
        }
}

#define EXPORT(name, T, suffix, parameters, arguments) \
    extern "C" void name##_##suffix parameters { name<T> arguments; }
#define BOTH(name, parameters_of, arguments)                     \
    EXPORT(name, float, f32, parameters_of(float), arguments)    \
    EXPORT(name, bf16, bf16, parameters_of(bf16), arguments)

#define CONV_FORWARD(T)                                                                                        \
    (const T *x, long xb, long xt, const float *taps, const float *bias, const int32_t *index, T *y, long B, long S, \
     long C, long k, int activate)
BOTH(conv_forward, CONV_FORWARD, (x, xb, xt, taps, bias, index, y, B, S, C, k, activate))

#define CONV_BACKWARD(T)                                                                                               \
    (const T *x, long xb, long xt, const float *taps, const float *bias, const int32_t *index, const T *dy, long dyb, \
     long dyt, T *dx, float *dtaps, float *dbias, long B, long S, long C, long k, int activate)
BOTH(conv_backward, CONV_BACKWARD, (x, xb, xt, taps, bias, index, dy, dyb, dyt, dx, dtaps, dbias, B, S, C, k, activate))

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

#define NORM(T, t, O, o)                                                                                                  \
    extern "C" void norm_forward_##t##_##o(const T *x, long xs, const T *z, long zs, const float *weight, O *y,           \
                                           float *scale, long n, long D, long G, float eps, int gate) {                   \
        norm_forward<T, O>(x, xs, z, zs, weight, y, scale, n, D, G, eps, gate);                                           \
    }                                                                                                                     \
    extern "C" void norm_backward_##t##_##o(const T *x, long xs, const T *z, long zs, const float *weight,                \
                                            const float *scale, const O *dy, long ds, T *dx, T *dz, float *dweight, long n, \
                                            long D, long G, int gate) {                                                   \
        norm_backward<T, O>(x, xs, z, zs, weight, scale, dy, ds, dx, dz, dweight, n, D, G, gate);                         \
    }
NORM(float, f32, float, f32)
NORM(float, f32, bf16, bf16)
NORM(bf16, bf16, bf16, bf16)
NORM(bf16, bf16, float, f32)

#define SSD_LAY(T)                                                                                                     \
    (const T *x, long xb, long xt, const float *first, const float *second, T *heads, T *groups, long B, long S,       \
     long start, long Q, long G, long R, long P)
BOTH(ssd_lay, SSD_LAY, (x, xb, xt, first, second, heads, groups, B, S, start, Q, G, R, P))

#define SSD_MASK(T) \
    (const T *CB, const float *cs, const int32_t *index, T *M, long B, long S, long start, long Q, long G, long R)
BOTH(ssd_mask, SSD_MASK, (CB, cs, index, M, B, S, start, Q, G, R))

#define SSD_MASK_BACKWARD(T)                                                                                           \
    (const T *CB, const float *cs, const int32_t *index, const T *dM, T *M, T *dCB, float *dcs, long B, long S,        \
     long start, long Q, long G, long R)
BOTH(ssd_mask_backward, SSD_MASK_BACKWARD, (CB, cs, index, dM, M, dCB, dcs, B, S, start, Q, G, R))

#define SSD_OUTPUT(T)                                                                                                  \
    (const T *within, const T *before, const float *enter, const T *x, long xb, long xt, const float *D, T *y, long B, \
     long S, long start, long Q, long G, long R, long P)
BOTH(ssd_output, SSD_OUTPUT, (within, before, enter, x, xb, xt, D, y, B, S, start, Q, G, R, P))

#define SSD_OUTPUT_BACKWARD(T)                                                                                         \
    (const T *within, const T *after, const T *before, const float *enter, const float *leave, const float *dt,        \
     const float *D, const T *x, long xb, long xt, const T *dy, long dyb, long dyt, T *dx, float *d_dt, float *d_enter, \
     float *d_leave, float *dD, long B, long S, long start, long Q, long G, long R, long P)
BOTH(ssd_output_backward, SSD_OUTPUT_BACKWARD,
     (within, after, before, enter, leave, dt, D, x, xb, xt, dy, dyb, dyt, dx, d_dt, d_enter, d_leave, dD, B, S, start, Q,
      G, R, P))

#define SSD_STATE(T)                                                                                                   \
    (float *state, const T *into, const float *through, long tb, T *narrow, const T *other, float *sums, long B, long G, \
     long N, long R, long P)
BOTH(ssd_state, SSD_STATE, (state, into, through, tb, narrow, other, sums, B, G, N, R, P))
