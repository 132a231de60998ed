// Products of small matrices that stay in the cache: C (m x n, float32) = A (m x k) B (k x n), or C += A B.
//
// An engine is how a machine multiplies: `Fma` in float32 on any vector width, `Dot` in bfloat16 with AVX-512's dot
// product, `Amx` in bfloat16 on tiles. All three have one interface, so an operator is written once:
//
//   Element          what A and B hold
//   K_STEP, M_STEP   A's buffer has k rounded up to K_STEP, with zeros there, and m rounded up to M_STEP (any content)
//   Session          lives while a task multiplies
//   multiply<ADD>(m, n, k, A, lda, B, C, ldc)      ADD: C += A B; C's buffer has m rounded up to M_STEP, n to N_STEP
//   multiply_transposed<ADD>(m, n, k, A, B, C, ldc)   the same with what `pack_left_transposed` made of A's transpose
//
// B is packed: panels of PANEL columns (the last one narrower, rounded up to N_STEP), each [k / PAIR][columns][PAIR], in
// zeros where k or n was rounded up. `pack` takes B as it is, row-major (k, n); `pack_transposed` takes its transpose,
// row-major (n, k): the keys of q k^T; `pack_columns` packs N_STEP of n columns, from `column` on, whose rows in the
// transpose may lie elsewhere: `count` of them, and zeros where these are fewer. A product with the first n of B's
// columns alone says how many were packed (`packed_n`).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "amx.h"
#include "simd.h"

namespace sala {

// columns of a panel: as many vectors as leave room for six rows of sums in the registers
constexpr int64_t PANEL = (SALA_VECTOR_BYTES == 64 ? 4 : 2) * W;
// rows of a block of sums
constexpr int64_t BLOCK_ROWS = 6;

// Run body(std::integral_constant<N>) for the n in 1..N that is n: a number of rows or vectors becomes a constant.
template <int64_t N, class Body>
inline void with_constant(int64_t n, const Body& body) {
  if constexpr (N > 1) {
    if (n < N) return with_constant<N - 1>(n, body);
  }
  body(std::integral_constant<int64_t, N>{});
}

#if defined(__AVX512F__)
// dst[c][r] = src[r][c] for 16 x 16 numbers of four bytes (or pairs of two); rows are so many bytes apart.
inline void transpose_16x16(const void* src, int64_t src_bytes, void* dst, int64_t dst_bytes) {
  __m512i r[16], t[16];
  const char* s = static_cast<const char*>(src);
  char* d = static_cast<char*>(dst);
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(s + i * src_bytes);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(d + i * dst_bytes, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(d + (i + 8) * dst_bytes, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
}
#endif

// dst[r][0..cols) = src[r][0..cols) as `To`, zero from there to `padded`; rows one after another.
template <class To, class From>
inline void convert_rows(const From* src, int64_t lds, int64_t rows, int64_t cols, To* dst, int64_t ldd,
                         int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    if constexpr (std::is_same_v<To, From>) {
      std::memcpy(dst + r * ldd, src + r * lds, size_t(cols) * sizeof(To));
      c = cols;
    }
    for (; c + W <= cols; c += W) store(dst + r * ldd + c, load(src + r * lds + c));
    for (; c < cols; ++c) dst[r * ldd + c] = from_float<To>(to_float(src[r * lds + c]));
    for (; c < padded; ++c) dst[r * ldd + c] = from_float<To>(0.0f);
  }
}

struct Fma {
  using Element = float;
  static constexpr int64_t K_STEP = 1, M_STEP = 1, N_STEP = W;
  struct Session {};

  static constexpr int64_t packed_size(int64_t k, int64_t n) { return k * round_up(n, N_STEP); }

  template <class From>
  static void pack(const From* src, int64_t ld, int64_t k, int64_t n, float* dst) {
    for (int64_t first = 0; first < n; first += PANEL) {
      int64_t here = std::min(PANEL, n - first), width = round_up(here, N_STEP);
      convert_rows(src + first, ld, k, here, dst, width, width);
      dst += k * width;
    }
  }

  template <class From>
  static void pack_columns(const From* rows, int64_t ld, int64_t count, int64_t column, int64_t n, int64_t k,
                           float* dst) {
    const int64_t first = column / PANEL * PANEL, width = round_up(std::min(PANEL, n - first), N_STEP);
    dst += first * k + column - first;
    int64_t done = 0;  // of k
#if defined(__AVX512F__)
    for (; done + 16 <= k; done += 16) {
      if (std::is_same_v<From, float> && count >= 16) {
        transpose_16x16(rows + done, ld * 4, dst + done * width, width * 4);
        continue;
      }
      alignas(64) float block[16][16];
      for (int64_t i = 0; i < 16; ++i) store(block[i], i < count ? load(rows + i * ld + done) : vf{});
      transpose_16x16(block, 64, dst + done * width, width * 4);
    }
#endif
    for (; done < k; ++done)
      for (int64_t row = 0; row < N_STEP; ++row)
        dst[done * width + row] = row < count ? to_float(rows[row * ld + done]) : 0.0f;
  }

  template <class From>
  static void pack_transposed(const From* src, int64_t ld, int64_t n, int64_t k, float* dst) {
    for (int64_t column = 0; column < n; column += N_STEP)
      pack_columns(src + column * ld, ld, n - column, column, n, k, dst);
  }

  static constexpr int64_t left_transposed_size(int64_t k, int64_t m) { return k * m; }
  // A = src^T for a row-major src (k, m), its rows times their factors.
  template <class From>
  static void pack_left_transposed(const From* src, int64_t ld, int64_t k, int64_t m, const float* factors,
                                   float* dst) {
    for (int64_t p = 0; p < k; ++p, dst += m) {
      int64_t i = 0;
      for (; i + W <= m; i += W) store(dst + i, load(src + p * ld + i) * factors[p]);
      for (; i < m; ++i) dst[i] = to_float(src[p * ld + i]) * factors[p];
    }
  }

  template <bool ADD>
  static void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, float* c,
                       int64_t ldc, int64_t packed_n = 0) {
    multiply_any<ADD, false>(m, n, k, a, lda, b, c, ldc, std::max(n, packed_n));
  }
  template <bool ADD>
  static void multiply_transposed(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c,
                                  int64_t ldc) {
    multiply_any<ADD, true>(m, n, k, a, m, b, c, ldc, n);
  }

 private:
  template <bool ADD, bool TRANSPOSED>
  static void multiply_any(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, float* c,
                           int64_t ldc, int64_t packed_n) {
    const int64_t blocks = ceil_div(m, BLOCK_ROWS);
    for (int64_t first = 0; first < n; first += PANEL) {
      int64_t width = round_up(std::min(PANEL, packed_n - first), N_STEP);
      with_constant<PANEL / W>(ceil_div(std::min(PANEL, n - first), W), [&](auto vectors) {
        for (int64_t block = 0; block < blocks; ++block) {
          // blocks of nearly equal height: sixteen rows as 6, 5, 5 and not as 6, 6, 4
          int64_t top = block * m / blocks, rows = (block + 1) * m / blocks - top;
          with_constant<BLOCK_ROWS>(rows, [&](auto height) {
            multiply_block<ADD, TRANSPOSED, height, vectors>(k, a + top * (TRANSPOSED ? 1 : lda), lda, b, width,
                                                             c + top * ldc + first, ldc);
          });
        }
      });
      b += k * width;
    }
  }

  template <bool ADD, bool TRANSPOSED, int64_t ROWS, int64_t VECTORS>
  static void multiply_block(int64_t k, const float* a, int64_t lda, const float* b, int64_t width, float* c,
                             int64_t ldc) {
    vf sums[ROWS][VECTORS];
    for (int64_t i = 0; i < ROWS; ++i)
      for (int64_t j = 0; j < VECTORS; ++j) sums[i][j] = ADD ? load(c + i * ldc + j * W) : vf{};
    for (int64_t p = 0; p < k; ++p) {
      vf row[VECTORS];
      for (int64_t j = 0; j < VECTORS; ++j) row[j] = load(b + p * width + j * W);
      for (int64_t i = 0; i < ROWS; ++i) {
        vf left = broadcast(TRANSPOSED ? a[p * lda + i] : a[i * lda + p]);
        for (int64_t j = 0; j < VECTORS; ++j) sums[i][j] += left * row[j];
      }
    }
    for (int64_t i = 0; i < ROWS; ++i)
      for (int64_t j = 0; j < VECTORS; ++j) store(c + i * ldc + j * W, sums[i][j]);
  }
};

#if defined(__AVX512BF16__)

// Packing of B for both engines in bfloat16: pairs of k side by side, which is what their instructions multiply.
struct PairsOfBf16 {
  using Element = bf16;
  static constexpr int64_t N_STEP = 16;

  // two rows (k, k + 1) of 16 numbers each -> 16 pairs
  static void interleave(__m512i even_then_odd, bf16* dst) {
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    _mm512_storeu_si512(dst, _mm512_permutexvar_epi16(_mm512_load_si512(order), even_then_odd));
  }
  static void interleave(vf even, vf odd, bf16* dst) {
    interleave((__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even), dst);
  }
  static void interleave(const bf16* even, const bf16* odd, bf16* dst) {
    __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
    interleave(_mm512_inserti64x4(low, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)), 1), dst);
  }

  static void interleave_32(const bf16* even, const bf16* odd, bf16* dst) {
    alignas(64) static constexpr uint16_t low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd), order = _mm512_load_si512(low);
    _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(a, order, b));
    order = _mm512_add_epi16(order, _mm512_set1_epi16(16));
    _mm512_storeu_si512(dst + 32, _mm512_permutex2var_epi16(a, order, b));
  }

  // columns c..c + 15 of `cols` of the rows p and p + 1 of k, times their factors -> 16 pairs, zeros beyond the matrix
  template <class From>
  static void interleave_scaled(const From* src, int64_t ld, int64_t p, int64_t k, int64_t c, int64_t cols,
                                const float* factors, bf16* dst) {
    const From* row = src + p * ld + c;
    if (p + 1 < k && c + 16 <= cols)
      return interleave(load(row) * factors[p], load(row + ld) * factors[p + 1], dst);
    const int64_t there = std::min<int64_t>(16, cols - c);
    vf even = p < k ? load_part(row, there) * factors[p] : vf{};
    vf odd = p + 1 < k ? load_part(row + ld, there) * factors[p + 1] : vf{};
    interleave(even, odd, dst);
  }

  template <class From>
  static void pack(const From* src, int64_t ld, int64_t k, int64_t n, bf16* dst, int64_t k_step) {
    for (int64_t first = 0; first < n; first += PANEL) {
      int64_t here = std::min(PANEL, n - first), width = round_up(here, N_STEP);
      for (int64_t p = 0; p < round_up(k, k_step); p += 2)
        for (int64_t c = 0; c < width; c += 16, dst += 32) {
          const From* even = src + p * ld + first + c;
          int64_t there = here - c;
          if constexpr (std::is_same_v<From, bf16>) {
            if (p + 1 < k && there >= 32) {
              interleave_32(even, even + ld, dst);
              c += 16, dst += 32;
              continue;
            }
          }
          if (p + 1 < k && there >= 16) {
            if constexpr (std::is_same_v<From, bf16>)
              interleave(even, even + ld, dst);
            else
              interleave(load(even), load(even + ld), dst);
            continue;
          }
          const int64_t some = std::min<int64_t>(16, there);
          interleave(p < k ? load_part(even, some) : vf{}, p + 1 < k ? load_part(even + ld, some) : vf{}, dst);
        }
    }
  }

  template <class From>
  static void pack_columns(const From* rows, int64_t ld, int64_t count, int64_t column, int64_t n, int64_t k, bf16* dst,
                           int64_t k_step) {
    const int64_t first = column / PANEL * PANEL, width = round_up(std::min(PANEL, n - first), N_STEP);
    const int64_t padded = round_up(k, k_step);
    dst += first * padded + (column - first) * 2;
    for (int64_t p = 0; p < padded; p += 32, dst += 32 * width) {
      // 32 numbers of k are 16 pairs
      if (std::is_same_v<From, bf16> && count >= 16 && p + 32 <= k) {
        transpose_16x16(rows + p, ld * 2, dst, width * 4);
        continue;
      }
      alignas(64) bf16 block[16][32], turned[16][32];
      for (int64_t i = 0; i < 16; ++i)
        convert_rows(rows + i * ld + p, 0, 1, i < count ? std::min<int64_t>(32, k - p) : 0, block[i], 0, 32);
      transpose_16x16(block, 64, turned, 64);
      int64_t pairs = std::min<int64_t>(32, padded - p) / 2;
      for (int64_t i = 0; i < pairs; ++i) std::memcpy(dst + i * width * 2, turned[i], 64);
    }
  }

  template <class From>
  static void pack_transposed(const From* src, int64_t ld, int64_t n, int64_t k, bf16* dst, int64_t k_step) {
    for (int64_t column = 0; column < n; column += N_STEP)
      pack_columns(src + column * ld, ld, n - column, column, n, k, dst, k_step);
  }
};

struct Dot : PairsOfBf16 {
  static constexpr int64_t K_STEP = 2, M_STEP = 1;
  struct Session {};

  static constexpr int64_t packed_size(int64_t k, int64_t n) { return round_up(k, K_STEP) * round_up(n, N_STEP); }
  template <class From>
  static void pack(const From* src, int64_t ld, int64_t k, int64_t n, bf16* dst) {
    PairsOfBf16::pack(src, ld, k, n, dst, K_STEP);
  }
  template <class From>
  static void pack_transposed(const From* src, int64_t ld, int64_t n, int64_t k, bf16* dst) {
    PairsOfBf16::pack_transposed(src, ld, n, k, dst, K_STEP);
  }
  template <class From>
  static void pack_columns(const From* rows, int64_t ld, int64_t count, int64_t column, int64_t n, int64_t k,
                           bf16* dst) {
    PairsOfBf16::pack_columns(rows, ld, count, column, n, k, dst, K_STEP);
  }

  // [k / 2][m rounded up to 16][2]
  static constexpr int64_t left_transposed_size(int64_t k, int64_t m) { return round_up(k, 2) * round_up(m, 16); }
  template <class From>
  static void pack_left_transposed(const From* src, int64_t ld, int64_t k, int64_t m, const float* factors,
                                   bf16* dst) {
    for (int64_t p = 0; p < k; p += 2)
      for (int64_t i = 0; i < m; i += 16, dst += 32) interleave_scaled(src, ld, p, k, i, m, factors, dst);
  }

  template <bool ADD>
  static void multiply(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b, float* c,
                       int64_t ldc, int64_t packed_n = 0) {
    multiply_any<ADD, false>(m, n, k, a, lda, b, c, ldc, std::max(n, packed_n));
  }
  template <bool ADD>
  static void multiply_transposed(int64_t m, int64_t n, int64_t k, const bf16* a, const bf16* b, float* c,
                                  int64_t ldc) {
    multiply_any<ADD, true>(m, n, k, a, 2 * round_up(m, 16), b, c, ldc, n);
  }

 private:
  template <bool ADD, bool TRANSPOSED>
  static void multiply_any(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b, float* c,
                           int64_t ldc, int64_t packed_n) {
    const int64_t blocks = ceil_div(m, BLOCK_ROWS), pairs = ceil_div(k, 2);
    for (int64_t first = 0; first < n; first += PANEL) {
      int64_t width = round_up(std::min(PANEL, packed_n - first), N_STEP);
      with_constant<PANEL / W>(ceil_div(std::min(PANEL, n - first), W), [&](auto vectors) {
        for (int64_t block = 0; block < blocks; ++block) {
          int64_t top = block * m / blocks, rows = (block + 1) * m / blocks - top;
          with_constant<BLOCK_ROWS>(rows, [&](auto height) {
            multiply_block<ADD, TRANSPOSED, height, vectors>(pairs, a + top * (TRANSPOSED ? 2 : lda), lda, b, width,
                                                             c + top * ldc + first, ldc);
          });
        }
      });
      b += pairs * 2 * width;
    }
  }

  template <bool ADD, bool TRANSPOSED, int64_t ROWS, int64_t VECTORS>
  static void multiply_block(int64_t pairs, const bf16* a, int64_t lda, const bf16* b, int64_t width, float* c,
                             int64_t ldc) {
    __m512 sums[ROWS][VECTORS];
    for (int64_t i = 0; i < ROWS; ++i)
      for (int64_t j = 0; j < VECTORS; ++j)
        sums[i][j] = ADD ? _mm512_loadu_ps(c + i * ldc + j * 16) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p) {
      __m512bh row[VECTORS];
      for (int64_t j = 0; j < VECTORS; ++j)
        row[j] = (__m512bh)_mm512_loadu_si512(b + p * width * 2 + j * 32);
      for (int64_t i = 0; i < ROWS; ++i) {
        int32_t pair;
        std::memcpy(&pair, TRANSPOSED ? a + p * lda + 2 * i : a + i * lda + 2 * p, 4);
        __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
        for (int64_t j = 0; j < VECTORS; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, row[j]);
      }
    }
    for (int64_t i = 0; i < ROWS; ++i)
      for (int64_t j = 0; j < VECTORS; ++j) _mm512_storeu_ps(c + i * ldc + j * 16, sums[i][j]);
  }
};

#if defined(__AMX_BF16__) || defined(SALA_EMULATE_AMX)

struct Amx : PairsOfBf16 {
  static constexpr int64_t K_STEP = 32, M_STEP = 16;
  using Session = amx::Session;

  static constexpr int64_t packed_size(int64_t k, int64_t n) { return round_up(k, K_STEP) * round_up(n, N_STEP); }
  template <class From>
  static void pack(const From* src, int64_t ld, int64_t k, int64_t n, bf16* dst) {
    PairsOfBf16::pack(src, ld, k, n, dst, K_STEP);
  }
  template <class From>
  static void pack_transposed(const From* src, int64_t ld, int64_t n, int64_t k, bf16* dst) {
    PairsOfBf16::pack_transposed(src, ld, n, k, dst, K_STEP);
  }
  template <class From>
  static void pack_columns(const From* rows, int64_t ld, int64_t count, int64_t column, int64_t n, int64_t k,
                           bf16* dst) {
    PairsOfBf16::pack_columns(rows, ld, count, column, n, k, dst, K_STEP);
  }

  // A itself, rows of k rounded up
  static constexpr int64_t left_transposed_size(int64_t k, int64_t m) {
    return round_up(k, K_STEP) * round_up(m, M_STEP);
  }
  template <class From>
  static void pack_left_transposed(const From* src, int64_t ld, int64_t k, int64_t m, const float* factors,
                                   bf16* dst) {
    const int64_t padded = round_up(k, K_STEP);
    for (int64_t p = 0; p < padded; p += 32)
      for (int64_t i = 0; i < m; i += 16) {
        alignas(64) bf16 pairs[16][32];
        for (int64_t pair = 0; pair < 16; ++pair)
          interleave_scaled(src, ld, p + 2 * pair, k, i, m, factors, pairs[pair]);
        transpose_16x16(pairs, 64, dst + i * padded + p, padded * 2);
      }
  }

  template <bool ADD>
  static void multiply_transposed(int64_t m, int64_t n, int64_t k, const bf16* a, const bf16* b, float* c,
                                  int64_t ldc) {
    multiply<ADD>(m, n, k, a, round_up(k, K_STEP), b, c, ldc);
  }

  template <bool ADD>
  static void multiply(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b, float* c,
                       int64_t ldc, int64_t packed_n = 0) {
    const int64_t padded = round_up(k, K_STEP);
    for (int64_t first = 0; first < n; first += PANEL) {
      int64_t width = round_up(std::min(PANEL, std::max(n, packed_n) - first), N_STEP);
      int64_t columns_here = round_up(std::min(PANEL, n - first), N_STEP);
      int64_t top = 0;
      for (; top + 16 < m; top += 32) {
        int64_t col = 0;
        for (; col + 32 <= columns_here; col += 32)
          multiply_tiles<ADD, 2, 2>(padded, a + top * lda, lda, b + 2 * col, width, c + top * ldc + first + col, ldc);
        if (col < columns_here)
          multiply_tiles<ADD, 2, 1>(padded, a + top * lda, lda, b + 2 * col, width, c + top * ldc + first + col, ldc);
      }
      if (top < m)
        with_constant<4>(columns_here / 16, [&](auto columns) {
          multiply_tiles<ADD, 1, columns>(padded, a + top * lda, lda, b, width, c + top * ldc + first, ldc);
        });
      b += padded * width;
    }
  }

 private:
  // Tiles 0-3 are sums; 4 and 5 hold A, 6 and 7 take turns with B.
  template <bool ADD, int ROWS, int COLUMNS>
  static void multiply_tiles(int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t width, float* c,
                             int64_t ldc) {
    constexpr bool two = ROWS == 2;
    for_each_sum<ROWS, COLUMNS>([&](auto tile, int64_t row, int64_t column) {
      if (ADD)
        amx::load<tile>(c + row * 16 * ldc + column * 16, ldc * 4);
      else
        amx::zero<tile>();
    });
    for (int64_t p = 0; p < k; p += 32, b += 32 * width) {
      amx::load<4>(a + p, lda * 2);
      if constexpr (two) amx::load<5>(a + 16 * lda + p, lda * 2);
      amx::load<6>(b, width * 4);
      amx::multiply<0, 4, 6>();
      if constexpr (two) amx::multiply<2, 5, 6>();
      if constexpr (COLUMNS > 1) {
        amx::load<7>(b + 32, width * 4);
        amx::multiply<1, 4, 7>();
        if constexpr (two) amx::multiply<3, 5, 7>();
      }
      if constexpr (COLUMNS > 2) {
        amx::load<6>(b + 64, width * 4);
        amx::multiply<2, 4, 6>();
      }
      if constexpr (COLUMNS > 3) {
        amx::load<7>(b + 96, width * 4);
        amx::multiply<3, 4, 7>();
      }
    }
    for_each_sum<ROWS, COLUMNS>([&](auto tile, int64_t row, int64_t column) {
      amx::store<tile>(c + row * 16 * ldc + column * 16, ldc * 4);
    });
  }

  // body(tile, row, column): a second row of sums starts at tile 2
  template <int ROWS, int COLUMNS, class Body>
  static void for_each_sum(const Body& body) {
    static_assert(ROWS == 1 || (ROWS == 2 && COLUMNS <= 2));
    body(std::integral_constant<int, 0>{}, 0, 0);
    if constexpr (COLUMNS > 1) body(std::integral_constant<int, 1>{}, 0, 1);
    if constexpr (COLUMNS > 2) body(std::integral_constant<int, 2>{}, 0, 2);
    if constexpr (COLUMNS > 3) body(std::integral_constant<int, 3>{}, 0, 3);
    if constexpr (ROWS > 1) body(std::integral_constant<int, 2>{}, 1, 0);
    if constexpr (ROWS > 1 && COLUMNS > 1) body(std::integral_constant<int, 3>{}, 1, 1);
  }
};

#endif
#endif

// The engine for tensors of T: bfloat16 is multiplied as such where the machine can.
template <class T>
struct EngineFor {
  using type = Fma;
};
#if defined(__AMX_BF16__) || defined(SALA_EMULATE_AMX)
template <>
struct EngineFor<bf16> {
  using type = Amx;
};
#elif defined(__AVX512BF16__)
template <>
struct EngineFor<bf16> {
  using type = Dot;
};
#endif
template <class T>
using Engine = typename EngineFor<T>::type;

}  // namespace sala
