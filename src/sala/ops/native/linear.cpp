// A linear map of few rows: every weight is read once, in order, and multiplied by all rows while it is in a register.
#include <algorithm>

#include "gemm.h"
#include "parallel.h"

namespace sala {
namespace {

constexpr int64_t MAX_ROWS = 8;
// rows of the weight that are read side by side, and sums that are kept in registers at once
constexpr int64_t MAX_BLOCK = 8;
constexpr int64_t SUMS = 16;
// weights of a task; below two of them a second thread costs more than it saves
constexpr int64_t TASK_BYTES = 1 << 16;
constexpr int64_t SHARED_BYTES = 1 << 18;

// Into the second cache: rows that lie a multiple of 4 KB apart would push each other out of the first.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// out[i] = the sum of the lanes of v[i], added in the same order for every i and n.
inline void sums_of(const vf* v, int64_t n, float* out) {
#if defined(__AVX512F__)
  for (int64_t first = 0; first < n; first += 8) {
    __m512 r[8], pairs[4];
    for (int64_t i = 0; i < 8; ++i) r[i] = first + i < n ? (__m512)v[first + i] : _mm512_setzero_ps();
    for (int64_t i = 0; i < 4; ++i)
      pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
    auto quads = [&](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    };
    // of four vectors each, one sum a lane of four
    __m512 low = quads(pairs[0], pairs[1]), high = quads(pairs[2], pairs[3]);
    __m512 halves = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x44), _mm512_shuffle_f32x4(low, high, 0xee));
    __m512 all = _mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1));
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, all);
    for (int64_t i = 0; i < std::min<int64_t>(8, n - first); ++i) out[first + i] = lanes[i % 4 + i / 4 * 8];
  }
#else
  for (int64_t i = 0; i < n; ++i) out[i] = sum(v[i]);
#endif
}

// What is multiplied in one step of k: 16 lanes of float32 sums, each of one product, or of two in bfloat16.
template <class T>
struct Step {
  static constexpr int64_t WIDTH = W;
  using Values = vf;
  static Values read(const T* p) { return load(p); }
  static Values read_part(const T* p, int64_t n) { return load_part(p, n); }
  static vf add(vf total, Values a, Values b) { return total + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
  static constexpr int64_t WIDTH = 32;
  using Values = __m512i;
  static Values read(const bf16* p) { return _mm512_loadu_si512(p); }
  static Values read_part(const bf16* p, int64_t n) { return _mm512_maskz_loadu_epi16((__mmask32(1) << n) - 1, p); }
  static vf add(vf total, Values a, Values b) {
    return (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// out[m][n] for N rows of the weight and M rows of x, of which each step's numbers stand side by side: rows that lie a
// multiple of 4 KB apart would push each other out of the cache.
template <class T, int64_t N, int64_t M>
void multiply_block(int64_t k, const T* x, const T* weight, int64_t weight_row, const T* bias, T* out, int64_t out_row) {
  vf sums[N][M];
  for (int64_t n = 0; n < N; ++n)
    for (int64_t m = 0; m < M; ++m) sums[n][m] = vf{};
  auto step = [&](int64_t i, auto read) {
    typename Step<T>::Values left[M];
    for (int64_t m = 0; m < M; ++m) left[m] = Step<T>::read(x + i * M + m * Step<T>::WIDTH);
    for (int64_t n = 0; n < N; ++n) {
      // what the next block reads at the same moment
      prefetch(weight + (N + n) * weight_row + i);
      auto right = read(weight + n * weight_row + i);
      for (int64_t m = 0; m < M; ++m) sums[n][m] = Step<T>::add(sums[n][m], left[m], right);
    }
  };
  int64_t i = 0;
  for (; i + Step<T>::WIDTH <= k; i += Step<T>::WIDTH) step(i, [](const T* p) { return Step<T>::read(p); });
  if (i < k) step(i, [&](const T* p) { return Step<T>::read_part(p, k - i); });
  float totals[N * M];
  sums_of(&sums[0][0], N * M, totals);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n)
      out[m * out_row + n] = from_float<T>(totals[n * M + m] + (bias ? to_float(bias[n]) : 0.0f));
}

template <class T>
void linear(int64_t m, int64_t n, int64_t k, const T* x, int64_t x_row, const T* weight, int64_t weight_row,
            const T* bias, T* out, int64_t threads) {
  constexpr int64_t WIDTH = Step<T>::WIDTH;
  const int64_t steps = ceil_div(k, WIDTH);
  Scratch scratch;
  scratch.reserve(Scratch::bytes<T>(steps * WIDTH * m));
  T* packed = scratch.take<T>(steps * WIDTH * m);
  for (int64_t step = 0; step < steps; ++step)
    convert_rows(x + step * WIDTH, x_row, m, std::min(WIDTH, k - step * WIDTH), packed + step * WIDTH * m, WIDTH, WIDTH);
  const int64_t row_bytes = k * int64_t(sizeof(T)) + 1, task_rows = std::max<int64_t>(MAX_BLOCK, TASK_BYTES / row_bytes / MAX_BLOCK * MAX_BLOCK);
  if (n * row_bytes < SHARED_BYTES) threads = 1;
  with_constant<MAX_ROWS>(m, [&](auto M) {
    constexpr int64_t BLOCK = std::min<int64_t>(MAX_BLOCK, SUMS / M);
    parallel_for(ceil_div(n, task_rows), threads, [&](int64_t task) {
      const int64_t end = std::min(n, (task + 1) * task_rows);
      for (int64_t first = task * task_rows; first < end; first += BLOCK) {
        with_constant<BLOCK>(std::min(BLOCK, end - first), [&](auto N) {
          multiply_block<T, N, M>(k, packed, weight + first * weight_row, weight_row, bias ? bias + first : nullptr,
                                  out + first, n);
        });
      }
    });
  });
}

}  // namespace
}  // namespace sala

// x: (m, k) with rows x_row apart, m at most 8; weight: (n, k); bias: (n) or null; out: (m, n).
SALA_EXPORT void sala_linear(int64_t is_bf16, int64_t m, int64_t n, int64_t k, const void* x, int64_t x_row,
                             const void* weight, int64_t weight_row, const void* bias, void* out, int64_t threads) {
  if (m == 0 || n == 0) return;
  auto run = [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    sala::linear<T>(m, n, k, (const T*)x, x_row, (const T*)weight, weight_row, (const T*)bias, (T*)out, threads);
  };
  is_bf16 ? run((sala::bf16*)nullptr) : run((float*)nullptr);
}

SALA_REPLAY(sala_linear)
