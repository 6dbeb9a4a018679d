// The chunked form of SSD (see ssd_chunked.py). Forward: decays and what the heads of a group share; then head by head,
// chunk after chunk, with the state in the cache. Backward: decays; the gradients of the states between chunks, head by
// head; what each chunk gives, chunk by chunk, because heads share B and C. Between the passes only decays, states and
// what heads share go through memory, and results do not depend on the number of threads.
//
// Legend: B rows of S tokens, H = G R heads of P, N state, chunks of Q tokens. A last chunk that is shorter is filled up
// with zeros, P and N to multiples of 32 (PW, NW).

#include "tiles.h"

static inline Lanes decay(Lanes exponent) {  // at most 1, at least what keeps products normal: others are slow
    return exp2_(larger(-63.f - Lanes{}, smaller(Lanes{}, exponent)));
}

static const float LEAST = -43.668274f;  // the least log-decay worth computing, log(FLT_MIN) / 2

struct Sizes {
    long B, S, G, R, P, N, Q;
    long H = G * R, chunks = (S + Q - 1) / Q, PW = padded(P), NW = padded(N);

    long tokens(long chunk) const { return std::min(Q, S - chunk * Q); }
};

struct Decays {  // (B, H, chunks, Q): log2 of the decay from the start of a run of one document in the chunk, the
                 // factor of the state that enters the chunk, the decay to the chunk's end (0 from other documents)
    double *sums;  // their small differences count
    float *enter, *leave;

    Decays(double *all, const Sizes &z)
        : sums(all),
          enter(reinterpret_cast<float *>(sums + z.B * z.H * z.chunks * z.Q)),
          leave(enter + z.B * z.H * z.chunks * z.Q) {}
};

static void documents_of(const int32_t *index, const Sizes &z, long b, long chunk, int32_t *document) {
    for (long q = 0; q < z.Q; q++) document[q] = index ? index[b * z.S + std::min(chunk * z.Q + q, z.S - 1)] : 0;
}

static inline Lanes differences(const double *sums, double from) {
    float out[LANES];
    for (long q = 0; q < LANES; q++) out[q] = sums[q] - from;
    return lanes(out);
}

static void decays_of(const float *dt, const float *A, const int32_t *index, const Sizes &z, long b, long chunk,
                      const Decays &d) {
    int32_t *document = room.take<int32_t>(z.Q);
    documents_of(index, z, b, chunk, document);
    const int32_t before = index && chunk ? index[b * z.S + chunk * z.Q - 1] : 0, last = document[z.Q - 1];
    for (long h = 0; h < z.H; h++) {
        const long at = ((b * z.H + h) * z.chunks + chunk) * z.Q;
        double *sums = d.sums + at;
        float *enter = d.enter + at, *leave = d.leave + at;
        double sum = 0;
        for (long q = 0; q < z.Q; q++) {
            if (q && document[q] != document[q - 1]) sum = 0;
            if (q < z.tokens(chunk)) sum += std::max(dt[(b * z.S + chunk * z.Q + q) * z.H + h] * A[h], LEAST);
            sums[q] = sum / std::log(2.0);
        }
        for (long q = 0; q < z.Q; q += LANES) {
            const Ints here = load<Ints>(document + q);
            keep(enter + q, here == before ? decay(differences(sums + q, 0)) : Lanes{});
            keep(leave + q, here == last ? decay(-differences(sums + q, sums[z.Q - 1])) : Lanes{});
        }
    }
}

// Decays inside a chunk, from token j to token i, 16 tokens at a time: a number of i times a number of j, both at most
// 1, by way of a token between them; only among the 16 one by one.
struct Between {
    const double *sums;
    const int32_t *document;

    void by(long middle, long first, long end, float *out) const {  // from tokens to the middle, or from it to them
        for (long q = first; q < end; q += LANES) {
            const Lanes apart = differences(sums + q, sums[middle]);
            const Ints same = load<Ints>(document + q) == document[middle];
            keep(out + q - first, same ? decay(apart < 0.f ? apart : -apart) : Lanes{});
        }
    }

    Lanes to(long i, long first) const {  // from each of 16 tokens to token i among them
        const Ints seen = (STEPS + int32_t(first) <= int32_t(i)) & (load<Ints>(document + first) == document[i]);
        return seen ? decay(-differences(sums + first, sums[i])) : Lanes{};
    }

    Lanes from(long j, long first) const {  // from token j to each of 16 tokens, it among them
        const Ints seen = (STEPS + int32_t(first) >= int32_t(j)) & (load<Ints>(document + first) == document[j]);
        return seen ? decay(differences(sums + first, sums[j])) : Lanes{};
    }
};

template <class T>
static void turned(const T *from, long stride, long tokens, const Sizes &z, T *out) {  // (Q, N) to (NW, Q)
    uint32_t *panel = room.take<uint32_t>(z.Q * z.NW / PER_WORD<T>);
    pack(from, stride, tokens, z.N, nullptr, panel, z.Q, z.NW);
    turn(panel, reinterpret_cast<uint32_t *>(out), z.Q / PER_WORD<T>, z.NW);
}

// First of all, for a team of threads: the decays, and what the heads of a group share.
template <class F>
static void prepare(const float *dt, const float *A, const int32_t *index, const Sizes &z, const Decays &d, F work) {
#pragma omp for collapse(2) schedule(static)
    for (long b = 0; b < z.B; b++)
        for (long chunk = 0; chunk < z.chunks; chunk++) {
            room.reset();
            decays_of(dt, A, index, z, b, chunk, d);
            for (long g = 0; g < z.G; g++) {
                room.reset();
                work(b, chunk, g);
            }
        }
}

// What the heads of a group share of a chunk in the forward, (B, G, chunks, ...)
template <class T>
struct Shared {
    T *turned, *rows;  // B (NW, Q), C (Q, NW)
    float *dots;       // C B^T (Q, Q), where a column is not after its row, and to the end of its 16
    Sizes z;

    long at(long b, long g, long chunk) const { return ((b * z.G + g) * z.chunks + chunk) * z.Q; }
    T *turned_of(long b, long g, long chunk) const { return turned + at(b, g, chunk) * z.NW; }
    T *rows_of(long b, long g, long chunk) const { return rows + at(b, g, chunk) * z.NW; }
    float *dots_of(long b, long g, long chunk) const { return dots + at(b, g, chunk) * z.Q; }
};

// A state as others have it, (P, N), null for zeros, to (NW, PW); and back, null if nobody wants it
static void take_state(const float *given, const Sizes &z, float *state) {
    if (given && z.P == z.PW && z.N == z.NW) return turn(given, reinterpret_cast<uint32_t *>(state), z.P, z.N);
    std::fill(state, state + z.NW * z.PW, 0.f);
    for (long p = 0; given && p < z.P; p++)
        for (long n = 0; n < z.N; n++) state[n * z.PW + p] = given[p * z.N + n];
}

static void give_state(const float *state, const Sizes &z, float *given) {
    if (given && z.P == z.PW && z.N == z.NW) return turn(state, reinterpret_cast<uint32_t *>(given), z.N, z.P);
    for (long p = 0; given && p < z.P; p++)
        for (long n = 0; n < z.N; n++) given[p * z.N + n] = state[n * z.PW + p];
}

template <class T>
static inline void keep_panel_of(const float *from, uint32_t *panel, long rows, long width) {
    tiles(rows, 0, width, [=](long r, long c, auto &tile) {
        for (int k = 0; k < 4; k++)
            for (int v = 0; v < WIDE(tile); v++) tile[k][v] = lanes(from + (r + k) * width + c + v * LANES);
        keep_panel<T>(tile, panel + r / PER_WORD<T> * width + c, width);
    });
}

template <class T>
static void ssd_forward(const T *x, long xb, long xt, const float *dt, const float *A, const T *B, long bb, long bt,
                        const T *C, long cb, long ct, const float *D, const int32_t *index, float *state, T *y, T *states,
                        double *decays, T *turned_B, T *rows_C, float *dots, long rows, long S, long G, long R, long P,
                        long N, long Q) {
    // y (B, S, H, P); state (B, H, P, N), the first, becomes the last, null for zeros and if nobody wants it; states
    // (B, H, chunks, NW / W, PW), panels, enter the chunks, null if nobody wants them; decays and what is shared are room
    const Sizes z{rows, S, G, R, P, N, Q};
    const Decays d(decays, z);
    const Shared<T> shared{turned_B, rows_C, dots, z};
    const long W = PER_WORD<T>, H = z.H, chunks = z.chunks, PW = z.PW, NW = z.NW;
#pragma omp parallel
    {
        prepare(dt, A, index, z, d, [=](long b, long chunk, long g) {
            const long start = chunk * Q, tokens = z.tokens(chunk);
            T *Br = room.take<T>(Q * NW), *Cr = shared.rows_of(b, g, chunk);
            uint32_t *Bp = room.take<uint32_t>(Q * NW / W);
            float *CB = shared.dots_of(b, g, chunk);
            turned(B + b * bb + start * bt + g * N, bt, tokens, z, shared.turned_of(b, g, chunk));
            lay(B + b * bb + start * bt + g * N, bt, tokens, N, Br, Q, NW);
            lay(C + b * cb + start * ct + g * N, ct, tokens, N, Cr, Q, NW);
            turn(Br, Bp, Q, NW / W);
            for (long i = 0; i < Q; i += 16)
                tiles(16, 0, i + 16, [=](long r, long j, auto &tile) {
                    multiply(tile, Cr + (i + r) * NW, NW / W, Bp + j, Q, NW / W);
                    for (int k = 0; k < 4; k++) std::memcpy(CB + (i + r + k) * Q + j, tile[k], sizeof tile[k]);
                });
        });
#pragma omp for collapse(2) schedule(dynamic)
        for (long b = 0; b < rows; b++)
            for (long h = 0; h < H; h++) {
                room.reset();
                float *S_ = room.take<float>(NW * PW), *given = state ? state + (b * H + h) * P * N : nullptr;
                float *weight = room.take<float>(Q), *from = room.take<float>(Q), *step = room.take<float>(Q);
                float *to = room.take<float>(16);
                uint32_t *left = room.take<uint32_t>(Q / W * PW), *xp = room.take<uint32_t>(Q / W * PW);
                uint32_t *Sp = room.take<uint32_t>(NW / W * PW);
                T *M = room.take<T>(16 * Q);
                int32_t *document = room.take<int32_t>(Q);
                const float skip = D ? D[h] : 0.f;
                take_state(given, z, S_);
                uint32_t *panel = states ? reinterpret_cast<uint32_t *>(states) + (b * H + h) * chunks * (NW / W) * PW : Sp;
                keep_panel_of<T>(S_, panel, NW, PW);
                std::fill(step, step + Q, 0.f);
                for (long chunk = 0; chunk < chunks; chunk++) {
                    const long at = ((b * H + h) * chunks + chunk) * Q, tokens = z.tokens(chunk), start = chunk * Q;
                    const T *x_ = x + b * xb + start * xt + h * P, *Cr = shared.rows_of(b, h / R, chunk);
                    const T *Bt = shared.turned_of(b, h / R, chunk);
                    const float *CB = shared.dots_of(b, h / R, chunk);
                    T *y_ = y + ((b * S + start) * H + h) * P;
                    const Between between{d.sums + at, document};
                    documents_of(index, z, b, chunk, document);
                    for (long q = 0; q < tokens; q++) step[q] = dt[(b * S + start + q) * H + h];
                    for (long q = 0; q < tokens; q++) weight[q] = d.leave[at + q] * step[q];
                    pack(x_, xt, tokens, P, (float *)nullptr, xp, Q, PW);
                    pack(x_, xt, tokens, P, weight, left, Q, PW);
                    for (long first = 0; first < tokens; first += 16) {
                        for (long r = 0; r < 16; r++) fetch_to_write(y_ + (first + r) * H * P, P);
                        between.by(first, 0, first, from);
                        between.by(first, first, first + 16, to);
                        for (long j = 0; j < first; j++) from[j] *= step[j];
                        for (long r = 0; r < 16; r++) {
                            const float *row = CB + (first + r) * Q;
                            for (long j = 0; j < first; j += LANES)
                                keep(M + r * Q + j, lanes(from + j) * lanes(row + j) * to[r]);
                            keep(M + r * Q + first,
                                 between.to(first + r, first) * lanes(step + first) * lanes(row + first));
                        }
                        tiles(16, 0, PW, [=](long r, long p, auto &tile) {
                            multiply(tile, Cr + (first + r) * NW, NW / W, panel + p, PW, NW / W);
                            for (int k = 0; k < 4; k++)
                                for (auto &v : tile[k]) v *= d.enter[at + first + r + k];
                            add_multiple(tile, M + r * Q, Q / W, xp + p, PW, (first + r + 4) / W);
                            const long q = first + r;
                            for (int k = 0; k < 4; k++)
                                for (int v = 0; v < WIDE(tile); v++)
                                    tile[k][v] += row_of_panel<T>(xp + p + v * LANES, PW, q + k) * skip;
                            keep_tile(tile, y_ + q * H * P + p, H * P, tokens - q, P - p);
                        });
                    }
                    const float through = d.enter[at + Q - 1];
                    panel = states && chunk + 1 < chunks ? panel + NW / W * PW : Sp;
                    tiles(NW, 0, PW, [=](long n, long p, auto &tile) {
                        multiply(tile, Bt + n * Q, Q / W, left + p, PW, Q / W);
                        for (int r = 0; r < 4; r++)
                            for (int v = 0; v < WIDE(tile); v++) {
                                float *into = S_ + (n + r) * PW + p + v * LANES;
                                tile[r][v] += lanes(into) * through;
                                keep(into, tile[r][v]);
                            }
                        keep_panel<T>(tile, panel + n / W * PW + p, PW);
                    });
                }
                give_state(S_, z, given);
            }
    }
}

// sum += tile, its columns times `by`; along += its product with `other`, over its rows. All of Q columns.
template <class T, int V>
INLINED static inline void add_scaled(const Lanes (&tile)[4][V], long row, long column, const float *by, long Q, float *sum,
                              const T *other, float *along) {
    for (int v = 0; v < V; v++) {
        const long c = column + v * LANES;
        const Lanes factor = lanes(by + c);
        Lanes down = lanes(along + c);
        for (int k = 0; k < 4; k++) {
            const long at = (row + k) * Q + c;
            const Lanes one = tile[k][v] * factor;
            keep(sum + at, lanes(sum + at) + one);
            down += one * lanes(other + at);
        }
        keep(along + c, down);
    }
}

template <class T>
static void ssd_backward(const T *x, long xb, long xt, const float *dt, const float *A, const T *B, long bb, long bt,
                         const T *C, long cb, long ct, const float *D, const int32_t *index, const T *dy, long dyb,
                         long dyt, const T *states, float *d_state, T *d_states, double *decays, T *turned_C,
                         float *d_through, T *dx, long dx_row, long dx_token, float *d_dt, T *dB, long dB_row,
                         long dB_token, T *dC, long dC_row, long dC_token, float *dA, float *dD, long rows, long S,
                         long G, long R, long P, long N, long Q) {
    // d_state (B, H, P, N), of the last state, becomes that of the first, null as state; d_states (B, H, chunks, NW, PW),
    // of those that leave the chunks, turned_C (B, G, chunks, NW, Q), d_through (B, H, chunks) and decays are room; dA and
    // dD (B, chunks, H)
    const Sizes z{rows, S, G, R, P, N, Q};
    const Decays d(decays, z);
    const long W = PER_WORD<T>, H = z.H, chunks = z.chunks, PW = z.PW, NW = z.NW;
#pragma omp parallel
    {
        prepare(dt, A, index, z, d, [=](long b, long chunk, long g) {
            turned(C + b * cb + chunk * Q * ct + g * N, ct, z.tokens(chunk), z,
                   turned_C + ((b * G + g) * chunks + chunk) * NW * Q);
        });
#pragma omp for collapse(2) schedule(dynamic)
        for (long b = 0; b < rows; b++)
            for (long h = 0; h < H; h++) {
                room.reset();
                float *dS = room.take<float>(NW * PW), *given = d_state ? d_state + (b * H + h) * P * N : nullptr;
                uint32_t *entered = room.take<uint32_t>(Q / W * PW);
                take_state(given, z, dS);
                for (long chunk = chunks - 1; chunk >= 0; chunk--) {
                    const long at = ((b * H + h) * chunks + chunk) * Q, one = at / Q * NW * PW;
                    const uint32_t *Sp = reinterpret_cast<const uint32_t *>(states) + one / W;
                    const T *Ct = turned_C + ((b * G + h / R) * chunks + chunk) * NW * Q;
                    const float through = d.enter[at + Q - 1];
                    Lanes along = {};
                    pack(dy + b * dyb + chunk * Q * dyt + h * P, dyt, z.tokens(chunk), P, d.enter + at, entered, Q, PW);
                    tiles(NW, 0, PW, [=, &along](long n, long p, auto &tile) {
                        multiply(tile, Ct + n * Q, Q / W, entered + p, PW, Q / W);
                        Lanes sum = {};
                        for (int r = 0; r < 4; r++)
                            for (int v = 0; v < WIDE(tile); v++) {
                                const long at = (n + r) * PW + p + v * LANES;
                                const Lanes after = lanes(dS + at);
                                sum += after * row_of_panel<T>(Sp + p + v * LANES, PW, n + r);
                                keep(d_states + one + at, after);
                                keep(dS + at, after * through + tile[r][v]);
                            }
                        along += sum;
                    });
                    d_through[at / Q] = sum_of(along) * through;
                }
                give_state(dS, z, given);
            }

#pragma omp for collapse(3) schedule(dynamic)
        for (long b = 0; b < rows; b++)
            for (long chunk = 0; chunk < chunks; chunk++)
                for (long g = 0; g < G; g++) {
                    room.reset();
                    const long start = chunk * Q, tokens = z.tokens(chunk);
                    int32_t *document = room.take<int32_t>(Q);
                    T *Br = room.take<T>(Q * NW), *Bt = room.take<T>(NW * Q), *xr = room.take<T>(Q * PW);
                    T *dyr = room.take<T>(Q * PW), *Mt = room.take<T>(Q * Q), *Sr = room.take<T>(NW * PW);
                    const T *Ct = turned_C + ((b * G + g) * chunks + chunk) * NW * Q;
                    uint32_t *xtp = room.take<uint32_t>(PW / W * Q), *dytp = room.take<uint32_t>(PW / W * Q);
                    uint32_t *dyp = room.take<uint32_t>(Q / W * PW), *dSp = room.take<uint32_t>(NW / W * PW);
                    float *CBt = room.take<float>(Q * Q), *dCBt = room.take<float>(Q * Q);
                    float *dBt = room.take<float>(NW * Q), *dCt = room.take<float>(NW * Q);
                    float *step = room.take<float>(Q), *weight = room.take<float>(Q), *from = room.take<float>(Q);
                    float *d_sums = room.take<float>(Q), *d_enter = room.take<float>(Q), *d_leave = room.take<float>(Q);
                    float *slopes = room.take<float>(Q), *along = room.take<float>(Q * LANES), *d_step = room.take<float>(Q);
                    float *to = room.take<float>(16), *near = room.take<float>(16 * 16);
                    documents_of(index, z, b, chunk, document);
                    lay(B + b * bb + start * bt + g * N, bt, tokens, N, Br, Q, NW);
                    turned(B + b * bb + start * bt + g * N, bt, tokens, z, Bt);
                    std::fill(dCBt, dCBt + Q * Q, 0.f);
                    std::fill(dBt, dBt + NW * Q, 0.f);
                    std::fill(dCt, dCt + NW * Q, 0.f);
                    {
                        T *Cr = room.take<T>(Q * NW);
                        uint32_t *Cp = room.take<uint32_t>(NW / W * Q);
                        lay(C + b * cb + start * ct + g * N, ct, tokens, N, Cr, Q, NW);
                        turn(Cr, Cp, Q, NW / W);
                        for (long j = 0; j < Q; j += 16)
                            tiles(16, j, Q, [=](long r, long i, auto &tile) {
                                multiply(tile, Br + (j + r) * NW, NW / W, Cp + i, Q, NW / W);
                                for (int k = 0; k < 4; k++)
                                    std::memcpy(CBt + (j + r + k) * Q + i, tile[k], sizeof tile[k]);
                            });
                    }
                    std::fill(step, step + Q, 0.f);
                    for (long h = g * R; h < (g + 1) * R; h++) {
                        const long at = ((b * H + h) * chunks + chunk) * Q, one = at / Q * NW * PW;
                        const Between between{d.sums + at, document};
                        // What the next head reads is called for while this one multiplies.
                        const long next = h + 1 < (g + 1) * R ? one + chunks * NW * PW : one;
                        for (long q = 0; q < tokens; q++) step[q] = dt[(b * S + start + q) * H + h];
                        for (long q = 0; q < Q; q++) weight[q] = d.leave[at + q] * step[q];
                        lay(x + b * xb + start * xt + h * P, xt, tokens, P, xr, Q, PW);
                        lay(dy + b * dyb + start * dyt + h * P, dyt, tokens, P, dyr, Q, PW);
                        turn(xr, xtp, Q, PW / W);
                        turn(dyr, dytp, Q, PW / W);
                        pack(dyr, PW, Q, PW, (float *)nullptr, dyp, Q, PW);
                        pack(d_states + one, PW, NW, PW, (float *)nullptr, dSp, NW, PW);
                        unpack(reinterpret_cast<const uint32_t *>(states) + one / W, Sr, NW, PW);
                        std::fill(d_sums, d_sums + Q, 0.f);
                        std::fill(d_enter, d_enter + Q, 0.f);
                        std::fill(d_leave, d_leave + Q, 0.f);

                        // y_i has sum_j M_ij dt_j x_j with M = L o C B^T. Row and column sums of dM o M are of the
                        // same numbers, so that what cancels in the sum over tokens does.
                        for (long first = 0; first < Q; first += 16) {
                            between.by(first + 15, first, first + 16, to);
                            between.by(first + 15, first + 16, Q, from + first + 16);
                            for (long j = 0; j < 16; j++) keep(near + j * 16, between.from(first + j, first));
                            tiles(16, first, Q, [=](long r, long i, auto &tile) {
                                multiply(tile, xr + (first + r) * PW, PW / W, dytp + i, Q, PW / W);
                                Lanes down[4] = {};
                                for (int v = 0; v < WIDE(tile); v++) {
                                    const long c = i + v * LANES;
                                    Lanes across = lanes(d_sums + c);
                                    for (int k = 0; k < 4; k++) {
                                        const long j = first + r + k, at = j * Q + c;
                                        const Lanes L = c == first ? lanes(near + (r + k) * 16) : lanes(from + c) * to[r + k];
                                        const Lanes dot = lanes(CBt + at), slope = tile[k][v] * L * step[j];
                                        keep(dCBt + at, lanes(dCBt + at) + slope);
                                        keep(Mt + at, L * dot);
                                        across += slope * dot;
                                        down[k] += slope * dot;
                                    }
                                    keep(d_sums + c, across);
                                }
                                for (int k = 0; k < 4; k++) {
                                    float *partial = along + (first + r + k) * LANES;
                                    keep(partial, i > first ? lanes(partial) + down[k] : down[k]);
                                }
                            });
                        }
                        for (long j = 0; j < Q; j += 16) keep(slopes + j, sums_of(along + j * LANES));

                        // y_i has enter_i C_i S
                        tiles(NW, 0, Q, [=](long n, long i, auto &tile) {
                            if (i == 0) call_for(states + next + n * PW, 4 * PW * sizeof(T));
                            multiply(tile, Sr + n * PW, PW / W, dytp + i, Q, PW / W);
                            add_scaled(tile, n, i, d.enter + at, Q, dCt, Ct, d_enter);
                        });

                        // The state that leaves has sum_j leave_j B_j dt_j x_j
                        tiles(NW, 0, Q, [=](long n, long j, auto &tile) {
                            if (j == 0) call_for(d_states + next + n * PW, 4 * PW * sizeof(T));
                            multiply(tile, d_states + one + n * PW, PW / W, xtp + j, Q, PW / W);
                            add_scaled(tile, n, j, weight, Q, dBt, Bt, d_leave);
                        });

                        Lanes skipped = {};
                        double by_A = 0;
                        const float skip = D ? D[h] : 0.f;
                        T *dx_ = dx + b * dx_row + start * dx_token + h * P;
                        tiles(padded(tokens), 0, PW, [=, &skipped](long j, long p, auto &tile) {
                            for (long q = j; p == 0 && next != one && q < std::min(j + 4, tokens); q++) {
                                call_for(x + b * xb + (start + q) * xt + (h + 1) * P, P * sizeof(T));
                                call_for(dy + b * dyb + (start + q) * dyt + (h + 1) * P, P * sizeof(T));
                            }
                            multiply(tile, Br + j * NW, NW / W, dSp + p, PW, NW / W);
                            for (int k = 0; k < 4; k++)
                                for (auto &v : tile[k]) v *= d.leave[at + j + k];
                            add_multiple(tile, Mt + j * Q + j, Q / W, dyp + j / W * PW + p, PW, (Q - j) / W);
                            Lanes skips = {};
                            for (int k = 0; k < 4; k++) {
                                Lanes sum = {};
                                for (int v = 0; v < WIDE(tile); v++) {
                                    const long c = (j + k) * PW + p + v * LANES;
                                    const Lanes slope = lanes(dyr + c), value = lanes(xr + c);
                                    sum += tile[k][v] * value;
                                    skips += slope * value;
                                    tile[k][v] = tile[k][v] * step[j + k] + slope * skip;
                                }
                                float *partial = along + (j + k) * LANES;
                                keep(partial, p ? lanes(partial) + sum : sum);
                            }
                            skipped += skips;
                            keep_tile(tile, dx_ + j * dx_token + p, dx_token, tokens - j, P - p);
                        });
                        for (long j = 0; j < tokens; j += 16) keep(d_step + j, sums_of(along + j * LANES));
                        dD[(b * chunks + chunk) * H + h] = sum_of(skipped);

                        double sum = d_through[at / Q];
                        for (long q = 0; q < Q; q++) sum += d_leave[q];
                        for (long q = Q - 1; q >= 0; q--) {
                            if (q < Q - 1 && document[q] != document[q + 1]) sum = 0;
                            sum += d_sums[q] - slopes[q] + d_enter[q] - d_leave[q];
                            if (q >= tokens) continue;
                            if (step[q] * A[h] >= LEAST) {  // else it was bounded
                                d_step[q] += sum * A[h];
                                by_A += sum * step[q];
                            }
                            d_dt[(b * S + start + q) * H + h] = d_step[q];
                        }
                        dA[(b * chunks + chunk) * H + h] = by_A;
                    }

                    // C B^T, by all heads: dC += dCB B, dB += dCB^T C
                    uint32_t *panel = room.take<uint32_t>(Q / W * Q), *other = room.take<uint32_t>(Q / W * Q);
                    uint32_t *out = room.take<uint32_t>(Q * NW);
                    T *narrow = room.take<T>(Q * Q);
                    for (long at = 0; at < Q * Q; at += LANES) keep(narrow + at, lanes(dCBt + at));
                    pack(narrow, Q, Q, Q, (float *)nullptr, panel, Q, Q);
                    turn(narrow, other, Q, Q / W);
                    const auto give = [=](const T *left, const uint32_t *right, float *sum, T *result, long stride) {
                        add_product(left, NW, right, Q, Q / W, sum);
                        turn(sum, out, NW, Q);
                        for (long q = 0; q < tokens; q++)
                            for (long n = 0; n < N; n += LANES)
                                keep_some(result + (start + q) * stride + g * N + n, load<Lanes>(out + q * NW + n), N - n);
                    };
                    give(Bt, panel, dCt, dC + b * dC_row, dC_token);
                    give(Ct, other, dBt, dB + b * dB_row, dB_token);
                }
    }
}

#define SSD_FORWARD(T)                                                                                               \
    (const T *x, long xb, long xt, const float *dt, const float *A, const T *B, long bb, long bt, const T *C, long cb, \
     long ct, const float *D, const int32_t *index, float *state, T *y, T *states, double *decays, T *turned_B,        \
     T *rows_C, float *dots, long rows, long S, long G, long R, long P, long N, long Q)
BOTH(ssd_forward, SSD_FORWARD,
     (x, xb, xt, dt, A, B, bb, bt, C, cb, ct, D, index, state, y, states, decays, turned_B, rows_C, dots, rows, S, G, R,
      P, N, Q))

#define SSD_BACKWARD(T)                                                                                              \
    (const T *x, long xb, long xt, const float *dt, const float *A, const T *B, long bb, long bt, const T *C, long cb, \
     long ct, const float *D, const int32_t *index, const T *dy, long dyb, long dyt, const T *states, float *d_state,  \
     T *d_states, double *decays, T *turned_C, float *d_through, T *dx, long dx_row, long dx_token, float *d_dt,       \
     T *dB, long dB_row, long dB_token, T *dC, long dC_row, long dC_token, float *dA, float *dD, long rows, long S,    \
     long G, long R, long P, long N, long Q)
BOTH(ssd_backward, SSD_BACKWARD,
     (x, xb, xt, dt, A, B, bb, bt, C, cb, ct, D, index, dy, dyb, dyt, states, d_state, d_states, decays, turned_C,
      d_through, dx, dx_row, dx_token, d_dt, dB, dB_row, dB_token, dC, dC_row, dC_token, dA, dD, rows, S, G, R, P, N, Q))
