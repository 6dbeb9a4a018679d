// Numbers that the loops read, write and multiply: see native.py.
//
// Tensors are float32 or bfloat16, read and written once; arithmetic is float32. Threads share out work whose results
// do not depend on who does it, so that nothing depends on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

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

template <class V>
static inline V exp2_of_fraction(V r) {  // of numbers up to 1/2 in size
    V p = 1.525273380405984e-5f - V{};
    p = p * r + 1.540353039338161e-4f;
    p = p * r + 1.333355814642844e-3f;
    p = p * r + 9.618129107628477e-3f;
    p = p * r + 5.550410866482158e-2f;
    p = p * r + 2.402265069591007e-1f;
    p = p * r + 6.931471805599453e-1f;
    return p * r + 1.f;
}

static inline float exp2_(float x) {  // bounded to normal numbers; relative error 2e-7
    x = x < -126.f ? -126.f : (x > 126.f ? 126.f : x);
    float whole = std::rint(x);
    uint32_t bits = uint32_t(int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return exp2_of_fraction(x - whole) * scale;
}

#define EXPORT(name, T, suffix, parameters, arguments) \
    extern "C" void name##_##suffix parameters { name<T> arguments; }
#define BOTH(name, parameters_of, arguments)                     \
    EXPORT(name, float, f32, parameters_of(float), arguments)    \
    EXPORT(name, bf16, bf16, parameters_of(bf16), arguments)
