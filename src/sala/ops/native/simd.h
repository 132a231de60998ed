// One text for every vector width: GCC's and Clang's vector types, at the width that the build's flags allow.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define SALA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SALA_VECTOR_BYTES 32
#else
#define SALA_VECTOR_BYTES 16
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sala {

// floats in a vector
constexpr int64_t W = SALA_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(SALA_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(SALA_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(SALA_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(SALA_VECTOR_BYTES / 2)));
// the same at any address
typedef float vf_any __attribute__((vector_size(SALA_VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(SALA_VECTOR_BYTES / 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
constexpr int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }

inline vf broadcast(float x) { return x - vf{}; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// round to nearest even, as torch does; NaN stays NaN
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) { return to_bf16(x); }

inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }

inline vf load(const bf16* p) {
  vh half = *reinterpret_cast<const vh_any*>(p);
  vu bits = __builtin_convertvector(half, vu) << 16;
  return (vf)bits;
}

inline void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  *reinterpret_cast<vh_any*>(p) = (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vu kept = (x == x) ? rounded : (vu{} + 0x7fc0);
  *reinterpret_cast<vh_any*>(p) = __builtin_convertvector(kept, vh);
#endif
}

// x as a T holds it.
template <class T>
vf rounded(vf x);
template <>
inline vf rounded<float>(vf x) { return x; }
template <>
inline vf rounded<bf16>(vf x) {
#if defined(__AVX512BF16__)
  __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)x);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
  vu bits = (vu)x;
  vu kept = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  return x == x ? (vf)kept : x;
#endif
}

// The first n < W numbers; the others are zero and their memory is not touched.
template <class T>
inline vf load_part(const T* p, int64_t n) {
  vf out{};
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(p[i]);
  return out;
}
template <class T>
inline void store_part(T* p, vf x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(x[i]);
}

// Stores past the caches, for an output too large to be found in one by its next reader: no line is read to be written.
// `can_stream` says whether there are such stores for rows of `width` numbers that follow one another from p;
// `stream_end` makes them visible to other threads.
template <class T>
inline bool can_stream([[maybe_unused]] const T* p, [[maybe_unused]] int64_t width) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<uintptr_t>(p) % 64 == 0 && width * int64_t(sizeof(T)) % 64 == 0;
#elif defined(__AVX512F__)
  return sizeof(T) == 4 && reinterpret_cast<uintptr_t>(p) % 64 == 0 && width % 16 == 0;
#else
  return false;
#endif
}
inline void stream(float* p, vf x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#else
  store(p, x);
#endif
}
// dst[0..n) = src, whole lines
inline void stream_row(const float* src, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; i += W) stream(dst + i, load(src + i));
}
inline void stream_row([[maybe_unused]] const float* src, [[maybe_unused]] int64_t n, [[maybe_unused]] bf16* dst) {
#if defined(__AVX512BF16__)
  for (int64_t i = 0; i < n; i += 32) {
    __m512bh both = _mm512_cvtne2ps_pbh((__m512)load(src + i + 16), (__m512)load(src + i));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i), (__m512i)both);
  }
#endif
}
inline void stream_end() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

inline vf max(vf a, vf b) { return a > b ? a : b; }

inline float sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float parts[W];
  store(parts, x);
  for (int64_t width = W / 2; width; width /= 2)
    for (int64_t i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
#endif
}
inline float max(vf x) {
  float best = x[0];
  for (int64_t i = 1; i < W; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// Whether any lane of a lies above that of b.
inline bool any_above(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ));
#else
  vi above = a > b;
  int32_t any = 0;
  for (int64_t i = 0; i < W; ++i) any |= above[i];
  return any;
#endif
}

// Lanes 0..n-1 of a, the others of b.
inline vf first_lanes(int64_t n, vf a, vf b) {
  vi lane;
  for (int64_t i = 0; i < W; ++i) lane[i] = int32_t(i);
  return lane < vi{} + int32_t(n) ? a : b;
}

// 2^x of a finite x with a relative error below 2e-7, or below 1e-4 where it is ROUGH, for results that are rounded to
// bfloat16. Zero where float32 leaves its normal numbers or soon after; at least 2^127.9, or infinity, from 128 on.
template <bool ROUGH = false>
inline vf exp2(vf x) {
#if defined(__AVX512F__)
  vf whole = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf rounder = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x > broadcast(127.99f) ? broadcast(127.99f) : x;
  vf shifted = x + rounder;
  vf whole = shifted - rounder;
#endif
  vf f = x - whole;
  vf p;
  if constexpr (ROUGH) {
    p = broadcast(5.5171670e-2f);
    p = p * f + 2.4261112e-1f;
    p = p * f + 6.9326099e-1f;
    p = p * f + 9.9992807e-1f;
  } else {
    p = broadcast(1.3276472e-3f);
    p = p * f + 9.6755413e-3f;
    p = p * f + 5.5507133e-2f;
    p = p * f + 2.4022120e-1f;
    p = p * f + 6.9314697e-1f;
    p = p * f + 1.0f;
  }
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  vf out = (vf)((vu)p + ((vu)shifted << 23));
  return x < broadcast(-126.0f) ? vf{} : out;
#endif
}

// exp with a relative error below 2e-7; zero below -87, where float32 leaves its normal numbers. x must be at most 88.
inline vf exp(vf x) {
  const vf rounder = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  vf y = x * 1.44269504088896341f;
  vf shifted = y + rounder;
  vf whole = shifted - rounder;
  // the fraction in two steps, so that a large x does not cost its last bits (Cody and Waite)
  vf f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  vf p = broadcast(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  vf out = (vf)((vu)p + ((vu)shifted << 23));
  return x < broadcast(-87.0f) ? vf{} : out;
}

}  // namespace sala
