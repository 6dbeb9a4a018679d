// Causal attention by blocks of queries and keys with the softmax on the way (arXiv 2205.14135), for documents, windows
// and caps. What query i sees is an interval of keys, from low[i] to i: documents follow one another.
//
// Legend: B rows of T queries, the last of S keys; H = K R heads of P (filled up to PW), blocks of 64.

#include <type_traits>

#include "tiles.h"

static const long BLOCK = 64;
static const float HIDDEN = -1e30f;

struct Attention {
    long B, T, S, K, R, P, limit;
    float scale, cap;
    long H = K * R, PW = padded(P), L = S - T, query_blocks = (T + BLOCK - 1) / BLOCK, key_blocks = (S + BLOCK - 1) / BLOCK;

    // Of a score in units of log2: its factor, and whether it is bounded
    float factor() const { return cap > 0 ? scale / cap : scale * LOG2_E; }

    void lows(const int32_t *document, int32_t *low) const {  // (T + BLOCK) of one row; beyond it nothing is seen
        long begin = 0;
        for (long j = 0; j < S; j++) {
            if (document && j && document[j] != document[j - 1]) begin = j;
            if (j >= L) low[j - L] = std::max(begin, j - limit + 1);
        }
        std::fill(low + T, low + T + BLOCK, INT32_MAX);
    }
};

static inline Lanes tanh_(Lanes x) { return 1.f - 2.f / (exp2_(x * (2 * LOG2_E)) + 1.f); }

template <class T>
static void attention_forward(const T *q, long qb, long qt, const T *k, long kb, long kt, const T *v, long vb, long vt,
                              const int32_t *document, T *y, float *lse, T *turned_k, T *packed_v, int32_t *low, long B,
                              long T_, long S, long K, long R, long P, long limit, float scale, float cap) {
    // y (B, T, H, P); lse (B, H, T), log2 of the sum of weights; turned_k, packed_v (B, K, key blocks, BLOCK PW) and low
    // (B, T + BLOCK) are room
    const Attention a{B, T_, S, K, R, P, limit, scale, cap};
    const long W = PER_WORD<T>, H = a.H, PW = a.PW, size = BLOCK * PW;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long b = 0; b < B; b++) a.lows(document ? document + b * S : nullptr, low + b * (T_ + BLOCK));
#pragma omp for collapse(3) schedule(static)
        for (long b = 0; b < B; b++)
            for (long one = 0; one < K; one++)
                for (long block = 0; block < a.key_blocks; block++) {
                    room.reset();
                    const long at = ((b * K + one) * a.key_blocks + block) * size, first = block * BLOCK;
                    const long rows = std::min(BLOCK, S - first);
                    T *laid = room.take<T>(size);
                    lay(k + b * kb + first * kt + one * P, kt, rows, P, laid, BLOCK, PW);
                    turn(laid, reinterpret_cast<uint32_t *>(turned_k + at), BLOCK, PW / W);
                    pack(v + b * vb + first * vt + one * P, vt, rows, P, (float *)nullptr,
                         reinterpret_cast<uint32_t *>(packed_v + at), BLOCK, PW);
                }
#pragma omp for collapse(3) schedule(dynamic)
        for (long b = 0; b < B; b++)
            for (long h = 0; h < H; h++)
                for (long turn_ = 0; turn_ < a.query_blocks; turn_++) {
                    room.reset();
                    const long start = (a.query_blocks - 1 - turn_) * BLOCK;  // the longest first
                    const long queries = std::min(BLOCK, T_ - start), rows = (queries + 3) / 4 * 4;
                    const int32_t *lows = low + b * (T_ + BLOCK) + start;
                    T *Q = room.take<T>(size), *weights = room.take<T>(BLOCK * BLOCK);
                    float *sum = room.take<float>(size), *scores = room.take<float>(BLOCK * BLOCK);
                    float top[BLOCK], total[BLOCK], fade[BLOCK];
                    lay(q + b * qb + start * qt + h * P, qt, queries, P, Q, BLOCK, PW);
                    std::fill(sum, sum + size, 0.f);
                    std::fill(top, top + BLOCK, HIDDEN);
                    std::fill(total, total + BLOCK, 0.f);
                    const long end = a.L + start + queries;
                    for (long first = lows[0] / BLOCK * BLOCK; first < end; first += BLOCK) {
                        const long at = ((b * K + h / R) * a.key_blocks + first / BLOCK) * size;
                        const uint32_t *Kt = reinterpret_cast<const uint32_t *>(turned_k + at);
                        const uint32_t *V = reinterpret_cast<const uint32_t *>(packed_v + at);
                        const bool whole = first + BLOCK <= a.L + start + 1 && lows[rows - 1] <= first;
                        tiles(rows, 0, BLOCK, [=](long r, long j, auto &tile) {
                            multiply(tile, Q + r * PW, PW / W, Kt + j, BLOCK, PW / W);
                            for (int n = 0; n < 4; n++)
                                for (auto &s : tile[n]) {
                                    const long c = j + (&s - tile[n]) * LANES;
                                    s *= a.factor();
                                    if (cap > 0) s = tanh_(s) * (cap * LOG2_E);
                                    if (!whole) {
                                        const Ints key = STEPS + int32_t(first + c);
                                        const Ints seen = (key >= lows[r + n]) & (key <= int32_t(a.L + start + r + n));
                                        s = seen ? s : HIDDEN - Lanes{};
                                    }
                                    keep(scores + (r + n) * BLOCK + c, s);
                                }
                        });
                        for (long r = 0; r < rows; r++) {
                            const float *row = scores + r * BLOCK;
                            Lanes most = lanes(row), all = {};
                            for (long j = LANES; j < BLOCK; j += LANES) most = larger(most, lanes(row + j));
                            const float now = std::max(top[r], largest_of(most));
                            for (long j = 0; j < BLOCK; j += LANES) {
                                const Lanes s = lanes(row + j);
                                const Lanes w = s <= HIDDEN / 2 ? Lanes{} : exp2_(s - now);  // no number stays none
                                all += w;
                                keep(weights + r * BLOCK + j, w);
                            }
                            fade[r] = exp2_(top[r] - now);
                            total[r] = total[r] * fade[r] + sum_of(all);
                            top[r] = now;
                        }
                        tiles(rows, 0, PW, [&](long r, long p, auto &tile) {
                            for (int n = 0; n < 4; n++)
                                for (auto &s : tile[n])
                                    s = lanes(sum + (r + n) * PW + p + (&s - tile[n]) * LANES) * fade[r + n];
                            add_multiple(tile, weights + r * BLOCK, BLOCK / W, V + p, PW, BLOCK / W);
                            for (int n = 0; n < 4; n++)
                                for (auto &s : tile[n]) keep(sum + (r + n) * PW + p + (&s - tile[n]) * LANES, s);
                        });
                    }
                    for (long r = 0; r < queries; r++) {
                        T *out = y + ((b * T_ + start + r) * H + h) * P;
                        for (long p = 0; p < P; p += LANES) keep_some(out + p, lanes(sum + r * PW + p) / total[r], P - p);
                        lse[(b * H + h) * T_ + start + r] = top[r] + std::log2(total[r]);
                    }
                }
    }
}

template <class T>
static void attention_backward(const T *q, long qb, long qt, const T *k, long kb, long kt, const T *v, long vb, long vt,
                               const int32_t *document, const T *y, const float *lse, const T *dy, long dyb, long dyt,
                               T *dq, T *dk, T *dv, float *each_dk, float *each_dv, int32_t *low, long B, long T_, long S,
                               long K, long R, long P, long limit, float scale, float cap) {
    // dq (B, T, H, P); dk, dv (B, S, K, P); each_dk, each_dv (B, H, S, PW), of each query head, are room, and low
    const Attention a{B, T_, S, K, R, P, limit, scale, cap};
    const long W = PER_WORD<T>, H = a.H, PW = a.PW, size = BLOCK * PW;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long b = 0; b < B; b++) a.lows(document ? document + b * S : nullptr, low + b * (T_ + BLOCK));
#pragma omp for collapse(2) schedule(dynamic)
        for (long b = 0; b < B; b++)
            for (long h = 0; h < H; h++) {
                room.reset();
                const long width = a.query_blocks * BLOCK;
                const int32_t *lows = low + b * (T_ + BLOCK);
                // Of the queries, block by block: turned (P, queries) and packed (queries, P)
                uint32_t *Qt = room.take<uint32_t>(width * PW / W), *Qp = room.take<uint32_t>(width * PW / W);
                uint32_t *dYt = room.take<uint32_t>(width * PW / W), *dYp = room.take<uint32_t>(width * PW / W);
                float *dQt = room.take<float>(width * PW), *along = room.take<float>(width), *norm = room.take<float>(width);
                T *laid = room.take<T>(size), *Kr = room.take<T>(size), *Vr = room.take<T>(size), *Kt = room.take<T>(size);
                T *weights = room.take<T>(BLOCK * BLOCK), *slopes = room.take<T>(BLOCK * BLOCK);
                uint32_t *panel = room.take<uint32_t>(BLOCK * std::max(PW, BLOCK));
                float *dK = room.take<float>(size), *dV = room.take<float>(size);
                std::fill(dQt, dQt + width * PW, 0.f);
                std::fill(along, along + width, 0.f);
                std::fill(norm, norm + width, 0.f);
                for (long start = 0; start < T_; start += BLOCK) {
                    const long rows = std::min(BLOCK, T_ - start), at = start * PW / W;
                    lay(q + b * qb + start * qt + h * P, qt, rows, P, laid, BLOCK, PW);
                    turn(laid, Qt + at, BLOCK, PW / W);
                    pack(laid, PW, BLOCK, PW, (float *)nullptr, Qp + at, BLOCK, PW);
                    lay(dy + b * dyb + start * dyt + h * P, dyt, rows, P, laid, BLOCK, PW);
                    turn(laid, dYt + at, BLOCK, PW / W);
                    pack(laid, PW, BLOCK, PW, (float *)nullptr, dYp + at, BLOCK, PW);
                    for (long r = 0; r < rows; r++) {
                        const T *out = y + ((b * T_ + start + r) * H + h) * P;
                        Lanes sum = {};
                        for (long p = 0; p < P; p += LANES) sum += some_lanes(out + p, P - p) * lanes(laid + r * PW + p);
                        along[start + r] = sum_of(sum);
                        norm[start + r] = lse[(b * H + h) * T_ + start + r];
                    }
                }
                for (long first = 0; first < S; first += BLOCK) {
                    const long rows = std::min(BLOCK, S - first);
                    lay(k + b * kb + first * kt + h / R * P, kt, rows, P, Kr, BLOCK, PW);
                    lay(v + b * vb + first * vt + h / R * P, vt, rows, P, Vr, BLOCK, PW);
                    pack(Kr, PW, BLOCK, PW, (float *)nullptr, panel, BLOCK, PW);
                    turn(panel, reinterpret_cast<uint32_t *>(Kt), BLOCK / W, PW);
                    std::fill(dK, dK + size, 0.f);
                    std::fill(dV, dV + size, 0.f);
                    for (long start = std::max(first - a.L, 0L) / BLOCK * BLOCK; start < T_ && lows[start] < first + BLOCK;
                         start += BLOCK) {
                        const uint32_t *Qt_ = Qt + start * PW / W, *dYt_ = dYt + start * PW / W;
                        const bool whole = first + BLOCK <= a.L + start + 1 && lows[start + BLOCK - 1] <= first;
                        tiles(BLOCK, 0, BLOCK, [=](long r, long i, auto &tile) {
                            std::remove_reference_t<decltype(tile)> score;
                            multiply(score, Kr + r * PW, PW / W, Qt_ + i, BLOCK, PW / W);
                            multiply(tile, Vr + r * PW, PW / W, dYt_ + i, BLOCK, PW / W);
                            for (int n = 0; n < 4; n++)
                                for (auto &d : tile[n]) {
                                    const long c = i + (&d - tile[n]) * LANES;
                                    Lanes s = score[n][&d - tile[n]] * a.factor(), slope = scale - Lanes{};
                                    if (cap > 0) {
                                        s = tanh_(s);
                                        slope *= 1.f - s * s;
                                        s *= cap * LOG2_E;
                                    }
                                    Lanes w = exp2_(s - lanes(norm + start + c));
                                    if (!whole) {
                                        const int32_t key = first + r + n;
                                        const Ints seen = (load<Ints>(lows + start + c) <= key) &
                                                          (STEPS + int32_t(a.L + start + c) >= key);
                                        w = seen ? w : Lanes{};
                                    }
                                    keep(weights + (r + n) * BLOCK + c, w);
                                    keep(slopes + (r + n) * BLOCK + c, w * (d - lanes(along + start + c)) * slope);
                                }
                        });
                        pack(slopes, BLOCK, BLOCK, BLOCK, (float *)nullptr, panel, BLOCK, BLOCK);
                        add_product(weights, BLOCK, dYp + start * PW / W, PW, BLOCK / W, dV);
                        add_product(slopes, BLOCK, Qp + start * PW / W, PW, BLOCK / W, dK);
                        add_product(Kt, PW, panel, BLOCK, BLOCK / W, dQt + start * PW);
                    }
                    const long to = ((b * H + h) * S + first) * PW;
                    std::copy(dK, dK + rows * PW, each_dk + to);
                    std::copy(dV, dV + rows * PW, each_dv + to);
                }
                uint32_t *turned = room.take<uint32_t>(size);
                for (long start = 0; start < T_; start += BLOCK) {
                    turn(dQt + start * PW, turned, PW, BLOCK);
                    for (long r = 0; r < std::min(BLOCK, T_ - start); r++)
                        for (long p = 0; p < P; p += LANES)
                            keep_some(dq + ((b * T_ + start + r) * H + h) * P + p, load<Lanes>(turned + r * PW + p), P - p);
                }
            }
#pragma omp for collapse(3) schedule(static)
        for (long b = 0; b < B; b++)
            for (long j = 0; j < S; j++)
                for (long one = 0; one < K; one++)
                    for (long p = 0; p < P; p += LANES) {
                        Lanes dK = {}, dV = {};
                        for (long h = one * R; h < (one + 1) * R; h++) {
                            const long at = ((b * H + h) * S + j) * PW + p;
                            dK += lanes(each_dk + at);
                            dV += lanes(each_dv + at);
                        }
                        const long to = ((b * S + j) * K + one) * P + p;
                        keep_some(dk + to, dK, P - p);
                        keep_some(dv + to, dV, P - p);
                    }
    }
}

#define ATTENTION_FORWARD(T)                                                                                              \
    (const T *q, long qb, long qt, const T *k, long kb, long kt, const T *v, long vb, long vt, const int32_t *document,   \
     T *y, float *lse, T *turned_k, T *packed_v, int32_t *low, long B, long T_, long S, long K, long R, long P, long limit, \
     float scale, float cap)
BOTH(attention_forward, ATTENTION_FORWARD,
     (q, qb, qt, k, kb, kt, v, vb, vt, document, y, lse, turned_k, packed_v, low, B, T_, S, K, R, P, limit, scale, cap))

#define ATTENTION_BACKWARD(T)                                                                                           \
    (const T *q, long qb, long qt, const T *k, long kb, long kt, const T *v, long vb, long vt, const int32_t *document, \
     const T *y, const float *lse, const T *dy, long dyb, long dyt, T *dq, T *dk, T *dv, float *each_dk, float *each_dv, \
     int32_t *low, long B, long T_, long S, long K, long R, long P, long limit, float scale, float cap)
BOTH(attention_backward, ATTENTION_BACKWARD,
     (q, qb, qt, k, kb, kt, v, vb, vt, document, y, lse, dy, dyb, dyt, dq, dk, dv, each_dk, each_dv, low, B, T_, S, K, R,
      P, limit, scale, cap))
