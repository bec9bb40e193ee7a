// Vectors of float32 of the machine's own width, through the vector extensions of GCC and Clang: no intrinsics.
// Lengths are multiples of 16 throughout (scan.py sees to it), so that no loop has a tail.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace hope {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileRows = 6;
#else
constexpr int kLanes = 4, kTileRows = 8;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

static inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

static inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// exp to 2 ulp (the polynomial of Cephes' expf). A NaN stays one: comparisons with it are false.
static inline Vec exp(Vec x) {
  x = x > 88.0f ? Vec{} + 88.0f : x;
  x = x < -87.0f ? Vec{} - 87.0f : x;
  const Vec magic = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * 1.44269504089f + magic) - magic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return p * scale;
}

static inline Vec sigmoid(Vec z) { return 1.0f / (1.0f + exp(-z)); }
static inline Vec silu(Vec z) { return z * sigmoid(z); }

// First derivative of SiLU.
static inline Vec silu_slope(Vec z) {
  const Vec s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

// Both derivatives of SiLU.
static inline void silu_slopes(Vec z, Vec* first, Vec* second) {
  const Vec s = sigmoid(z);
  *first = s * (1.0f + z * (1.0f - s));
  *second = s * (1.0f - s) * (2.0f + z * (1.0f - 2.0f * s));
}

static inline float dot(const float* a, const float* b, int n) {
  Vec total = {};
  for (int i = 0; i < n; i += kLanes) total += load(a + i) * load(b + i);
  return sum(total);
}

// y += scale x
static inline void add_scaled(float* y, const float* x, float scale, int n) {
  for (int i = 0; i < n; i += kLanes) store(y + i, load(y + i) + scale * load(x + i));
}

// y = scale x
static inline void set_scaled(float* y, const float* x, float scale, int n) {
  for (int i = 0; i < n; i += kLanes) store(y + i, scale * load(x + i));
}

}  // namespace hope
