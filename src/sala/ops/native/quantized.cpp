// A linear map with integer weights: w = scale (code - center) + offset, scales by column and group of k.
//
// Weights stand in strips of 16 columns: words[strip][step][16] of 32 bits, a word being what one column has for 8 steps of
// k at 4 bits (nibbles, the lowest first), or for 4 at 8 bits. That is GPTQ's order with the strip moved to the front.
// Rows of x are rounded to 8 bits by blocks of k, each with its own scale, so that products are sums of integers: exact
// in any order, and a row's result has the same bits beside any others and for any number of threads.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "gemm.h"
#include "parallel.h"

namespace sala {
namespace {

constexpr int64_t STRIP = 16;
constexpr int64_t STRIP_BYTES = 64;
// columns of a task that multiplies many rows, and its rows at once
constexpr int64_t PANEL_STRIPS = 4;
constexpr int64_t PANEL_ROWS = 384;
// at most so many rows are multiplied while weights stream past
constexpr int64_t FEW_ROWS = 8;
constexpr int64_t MAX_BLOCK = 128;
// weights of a task; below four of them a second thread costs more than it saves
constexpr int64_t TASK_BYTES = 1 << 16;

// 16 sums of 32 bits, and 64 codes: for each of 16 columns four numbers of k, which `dot` multiplies by four of x.
#if defined(__AVX512VNNI__)

constexpr int64_t ROWS = 6, STRIPS = 4;
// not __m512i, eight numbers of 64 bits: GCC would move sums between registers at every product
using Sums = vi;
using Codes = __m512i;
inline Sums all(int32_t x) { return vi{} + x; }
inline Codes read(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Codes low(Codes pairs) { return _mm512_and_si512(pairs, _mm512_set1_epi8(15)); }
inline Codes high(Codes pairs) { return _mm512_and_si512(_mm512_srli_epi16(pairs, 4), _mm512_set1_epi8(15)); }
template <int BITS>
inline Sums dot(Sums sums, Codes codes, int32_t four) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sums, codes, _mm512_set1_epi32(four));
}
template <int BITS>
inline Sums start(int32_t x_sum) { return all(-(1 << (BITS - 1)) * x_sum); }
inline Sums add(Sums a, Sums b) { return a + b; }
inline void write(int32_t* p, Sums sums) { _mm512_store_si512(p, (__m512i)sums); }

#elif defined(__AVX2__)

constexpr int64_t ROWS = 2, STRIPS = 2;
struct Sums {
  __m256i half[2];
};
using Codes = Sums;
inline Sums all(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
inline Codes read(const uint8_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {{_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)}};
}
inline Codes low(Codes c) {
  for (auto& h : c.half) h = _mm256_and_si256(h, _mm256_set1_epi8(15));
  return c;
}
inline Codes high(Codes c) {
  for (auto& h : c.half) h = _mm256_and_si256(_mm256_srli_epi16(h, 4), _mm256_set1_epi8(15));
  return c;
}
template <int BITS>
inline Sums dot(Sums sums, Codes codes, int32_t four) {
  for (int i = 0; i < 2; ++i) {
    __m256i x = _mm256_set1_epi32(four), c = codes.half[i];
    if constexpr (BITS == 8) {
      // two products of 255 * 127 would not fit into 16 bits; of magnitudes up to 128 they do
      c = _mm256_xor_si256(c, _mm256_set1_epi8(-128));
      x = _mm256_sign_epi8(x, c);
      c = _mm256_abs_epi8(c);
    }
    __m256i pairs = _mm256_maddubs_epi16(c, x);
    sums.half[i] = _mm256_add_epi32(sums.half[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  return sums;
}
template <int BITS>
inline Sums start(int32_t x_sum) { return all(BITS == 8 ? 0 : -8 * x_sum); }
inline Sums add(Sums a, Sums b) {
  for (int i = 0; i < 2; ++i) a.half[i] = _mm256_add_epi32(a.half[i], b.half[i]);
  return a;
}
inline void write(int32_t* p, Sums sums) {
  for (int i = 0; i < 2; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(p) + i, sums.half[i]);
}

#else

constexpr int64_t ROWS = 2, STRIPS = 1;
struct Sums {
  vi part[4];
};
struct Codes {
  uint8_t of[STRIP_BYTES];
};
inline Sums all(int32_t x) { return {{vi{} + x, vi{} + x, vi{} + x, vi{} + x}}; }
inline Codes read(const uint8_t* p) {
  Codes c;
  std::memcpy(c.of, p, STRIP_BYTES);
  return c;
}
inline Codes low(Codes c) {
  for (auto& byte : c.of) byte &= 15;
  return c;
}
inline Codes high(Codes c) {
  for (auto& byte : c.of) byte >>= 4;
  return c;
}
template <int BITS>
inline Sums dot(Sums sums, const Codes& codes, int32_t four) {
  int8_t x[4];
  int32_t words[STRIP];
  std::memcpy(x, &four, 4);
  std::memcpy(words, codes.of, STRIP_BYTES);
  for (int i = 0; i < 4; ++i) {
    vi w;
    std::memcpy(&w, words + 4 * i, sizeof w);
    for (int j = 0; j < 4; ++j) sums.part[i] += ((w >> (8 * j)) & 255) * int32_t(x[j]);
  }
  return sums;
}
template <int BITS>
inline Sums start(int32_t x_sum) { return all(-(1 << (BITS - 1)) * x_sum); }
inline Sums add(Sums a, Sums b) {
  for (int i = 0; i < 4; ++i) a.part[i] += b.part[i];
  return a;
}
inline void write(int32_t* p, const Sums& sums) { std::memcpy(p, &sums, sizeof sums); }

#endif

// vectors of float32 in a strip
constexpr int64_t VECTORS = STRIP / W;

// float16, finite: the exponent's bias is made good by a product, exact also below the normal numbers
inline vf load_half(const uint16_t* p) {
  vu bits = __builtin_convertvector(*reinterpret_cast<const vh_any*>(p), vu);
  vu magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  return (vf)((vu)((vf)magnitude * 0x1p112f) | sign);
}

struct Weights {
  int64_t n, k, block;
  const uint8_t* words;
  // by group of k, round_up(n, 16) apart; `blocks_a_group` blocks share one
  const uint16_t* scales;
  const float* offsets;
  int64_t blocks_a_group;

  int64_t width() const { return round_up(n, STRIP); }
  int64_t blocks() const { return ceil_div(k, block); }
  // of k rounded up to whole words
  int64_t padded() const { return round_up(k, 8); }
  int64_t here(int64_t b) const { return std::min(block, padded() - b * block); }
};

// Rows of x as codes: [block][row][block size], with scale and sum of each [block][row].
struct Rounded {
  int64_t rows, block;
  int8_t* codes;
  float* scales;
  int32_t* sums;

  const int8_t* at(int64_t b, int64_t row) const { return codes + (b * rows + row) * block; }
};

// One row's numbers of a block, in the order in which `BITS` codes come out of a word.
template <int BITS, class T>
void round_block(const T* x, const int32_t* order, int64_t first, int64_t count, int64_t padded, int8_t* codes,
                 float* scale, int32_t* sum) {
  alignas(64) float values[MAX_BLOCK];
  if (order)
    for (int64_t i = 0; i < count; ++i) values[i] = to_float(x[order[first + i]]);
  else
    convert_rows(x + first, 0, 1, count, values, 0, count);
  for (int64_t i = count; i < round_up(padded, W); ++i) values[i] = 0.0f;
  vf highest{};
  for (int64_t i = 0; i < padded; i += W) {
    vf v = load(values + i);
    highest = max(highest, max(v, -v));
  }
  const float top = max(highest);
  // of NaN and infinities the scale makes NaN of the row, as a product would
  const bool finite = top <= 3.4e38f && std::all_of(values, values + count, [](float v) { return v == v; });
  *scale = finite ? top / 127.0f : NAN;
  const float inverse = finite && top > 0.0f ? 127.0f / top : 0.0f;
  const vf rounder = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  for (int64_t i = 0; i < padded; i += W) store(values + i, finite ? load(values + i) * inverse : vf{});
  // a product that is fused with the sum below would be rounded otherwise, on some machines
  asm volatile("" ::: "memory");
  alignas(64) int32_t whole[MAX_BLOCK];
  vi total{};
  for (int64_t i = 0; i < padded; i += W) {
    vi code = (vi)(load(values + i) + rounder) - (vi)rounder;
    total += code;
    std::memcpy(whole + i, &code, sizeof code);
  }
  *sum = 0;
  for (int64_t i = 0; i < W; ++i) *sum += total[i];
  if constexpr (BITS == 8)
    for (int64_t i = 0; i < padded; ++i) codes[i] = int8_t(whole[i]);
  else
    for (int64_t i = 0; i < padded; i += 8)
      for (int64_t j = 0; j < 8; ++j) codes[i + j] = int8_t(whole[i + j % 4 * 2 + j / 4]);
}

template <int BITS, class T>
void round_rows(const Weights& w, const T* x, int64_t x_row, const int32_t* order, const Rounded& out,
                int64_t threads) {
  parallel_for(ceil_div(out.rows, 16), threads, [&](int64_t task) {
    for (int64_t row = task * 16; row < std::min(out.rows, task * 16 + 16); ++row)
      for (int64_t b = 0; b < w.blocks(); ++b) {
        const int64_t first = b * w.block, at = b * out.rows + row;
        round_block<BITS>(x + row * x_row, order, first, std::min(w.block, w.k - first), w.here(b),
                          out.codes + at * w.block, out.scales + at, out.sums + at);
      }
  });
}

inline int32_t four_of(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return four;
}

// total[j] += x_scale (scale sums + offset x_sum), for a strip. The sums come through memory: were they also taken from
// registers here, compilers would keep them in memory all along.
inline void add_block(vf* total, const int32_t* sums, const vf* scale, const float* offset, float x_scale, int32_t x_sum) {
  for (int64_t j = 0; j < VECTORS; ++j) {
    vi whole;
    std::memcpy(&whole, sums + j * W, sizeof whole);
    total[j] += __builtin_convertvector(whole, vf) * (scale[j] * x_scale);
    if (offset) total[j] += load(offset + j * W) * (x_scale * float(x_sum));
  }
}

template <class T>
inline void write_strip(const vf* total, const T* bias, int64_t there, T* out) {
  for (int64_t j = 0; j < VECTORS && j * W < there; ++j) {
    const int64_t count = std::min(W, there - j * W);
    vf v = total[j];
    if (bias) v += load_part(bias + j * W, count);
    count == W ? store(out + j * W, v) : store_part(out + j * W, v, count);
  }
}

// All rows by one strip, whose words are read once and in order.
template <int BITS, int64_t M, class T>
void multiply_strip(const Weights& w, int64_t strip, const Rounded& x, const T* bias, T* out) {
  const uint8_t* p = w.words + strip * w.padded() * BITS / 8 * STRIP;
  vf total[M][VECTORS] = {};
  for (int64_t b = 0; b < w.blocks(); ++b) {
    Sums sums[M], others[M];
    for (int64_t m = 0; m < M; ++m) sums[m] = start<BITS>(x.sums[b * M + m]), others[m] = all(0);
    const int8_t* codes = x.at(b, 0);
    for (int64_t i = 0; i < w.here(b); i += 8) {
      Codes first, second;
      __builtin_prefetch(p + 2048);
      if constexpr (BITS == 4) {
        Codes pairs = read(p);
        first = low(pairs), second = high(pairs);
      } else {
        __builtin_prefetch(p + 2048 + STRIP_BYTES);
        first = read(p), second = read(p + STRIP_BYTES);
      }
      p += BITS / 4 * STRIP_BYTES;
      for (int64_t m = 0; m < M; ++m) {
        sums[m] = dot<BITS>(sums[m], first, four_of(codes + m * w.block + i));
        others[m] = dot<BITS>(others[m], second, four_of(codes + m * w.block + i + 4));
      }
    }
    const int64_t column = b / w.blocks_a_group * w.width() + strip * STRIP;
    vf scale[VECTORS];
    for (int64_t j = 0; j < VECTORS; ++j) scale[j] = load_half(w.scales + column + j * W);
    alignas(64) int32_t done[M][STRIP];
    for (int64_t m = 0; m < M; ++m) write(done[m], add(sums[m], others[m]));
    for (int64_t m = 0; m < M; ++m)
      add_block(total[m], done[m], scale, w.offsets ? w.offsets + column : nullptr,
                x.scales[b * M + m], x.sums[b * M + m]);
  }
  const int64_t there = std::min(STRIP, w.n - strip * STRIP);
  for (int64_t m = 0; m < M; ++m)
    write_strip(total[m], bias ? bias + strip * STRIP : nullptr, there, out + m * w.n + strip * STRIP);
}

// totals[R][strips][16] += R rows by some strips of a block, whose codes are a byte each: [strip][k / 4][64].
template <int BITS, int64_t R, int64_t S>
void multiply_tile(const Weights& w, int64_t b, const uint8_t* codes, int64_t strip_bytes, const float* scales,
                   const float* offsets, const Rounded& x, int64_t row, float* totals, int64_t totals_row) {
  Sums sums[R][S];
  for (int64_t r = 0; r < R; ++r)
    for (int64_t s = 0; s < S; ++s) sums[r][s] = start<BITS>(x.sums[b * x.rows + row + r]);
  const int8_t* left = x.at(b, row);
  for (int64_t i = 0; i < w.here(b); i += 4) {
    Codes right[S];
    for (int64_t s = 0; s < S; ++s) right[s] = read(codes + s * strip_bytes + i * STRIP);
    for (int64_t r = 0; r < R; ++r) {
      const int32_t four = four_of(left + r * w.block + i);
      for (int64_t s = 0; s < S; ++s) sums[r][s] = dot<BITS>(sums[r][s], right[s], four);
    }
  }
  alignas(64) int32_t done[R][S][STRIP];
  for (int64_t r = 0; r < R; ++r)
    for (int64_t s = 0; s < S; ++s) write(done[r][s], sums[r][s]);
  for (int64_t s = 0; s < S; ++s) {
    vf scale[VECTORS];
    for (int64_t j = 0; j < VECTORS; ++j) scale[j] = load(scales + s * STRIP + j * W);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t at = b * x.rows + row + r;
      float* total = totals + r * totals_row + s * STRIP;
      vf here[VECTORS];
      for (int64_t j = 0; j < VECTORS; ++j) here[j] = load(total + j * W);
      add_block(here, done[r][s], scale, offsets ? offsets + s * STRIP : nullptr, x.scales[at], x.sums[at]);
      for (int64_t j = 0; j < VECTORS; ++j) store(total + j * W, here[j]);
    }
  }
}

// A block of a strip as one byte a code, in the order of rounded rows.
inline void unpack(const uint8_t* words, int64_t k, uint8_t* out) {
  for (int64_t i = 0; i < k; i += 8, words += STRIP_BYTES, out += 2 * STRIP_BYTES) {
    Codes pairs = read(words), first = low(pairs), second = high(pairs);
    std::memcpy(out, &first, STRIP_BYTES);
    std::memcpy(out + STRIP_BYTES, &second, STRIP_BYTES);
  }
}

// Rows first..end by a panel of strips: block by block, so that its codes stay in the first cache, sums in the second.
template <int BITS, class T>
void multiply_panel(const Weights& w, int64_t panel, const Rounded& x, int64_t first, int64_t end, const T* bias,
                    T* out) {
  const int64_t strip = panel * PANEL_STRIPS, strips = std::min(PANEL_STRIPS, w.width() / STRIP - strip);
  constexpr int64_t WIDTH = PANEL_STRIPS * STRIP;
  const int64_t strip_bytes = w.padded() * BITS / 8 * STRIP;
  Scratch scratch;
  scratch.reserve(Scratch::bytes<float>((end - first) * WIDTH) + Scratch::bytes<uint8_t>(WIDTH * MAX_BLOCK));
  float* totals = scratch.take<float>((end - first) * WIDTH);
  uint8_t* unpacked = scratch.take<uint8_t>(WIDTH * MAX_BLOCK);
  std::fill(totals, totals + (end - first) * WIDTH, 0.0f);
  for (int64_t b = 0; b < w.blocks(); ++b) {
    const uint8_t* codes = w.words + strip * strip_bytes + b * w.block * BITS / 8 * STRIP;
    int64_t apart = strip_bytes;
    if constexpr (BITS == 4) {
      for (int64_t s = 0; s < strips; ++s)
        unpack(codes + s * strip_bytes, w.here(b), unpacked + s * STRIP * w.block);
      codes = unpacked, apart = STRIP * w.block;
    }
    const int64_t column = b / w.blocks_a_group * w.width() + strip * STRIP;
    alignas(64) float scales[WIDTH];
    for (int64_t i = 0; i < strips * STRIP; i += W) store(scales + i, load_half(w.scales + column + i));
    for (int64_t s = 0; s < strips; s += STRIPS)
      with_constant<STRIPS>(std::min(STRIPS, strips - s), [&](auto S) {
        for (int64_t row = first; row < end; row += ROWS)
          with_constant<ROWS>(std::min(ROWS, end - row), [&](auto R) {
            multiply_tile<BITS, R, S>(w, b, codes + s * apart, apart, scales + s * STRIP,
                                      w.offsets ? w.offsets + column + s * STRIP : nullptr, x, row,
                                      totals + (row - first) * WIDTH + s * STRIP, WIDTH);
          });
      });
  }
  for (int64_t row = first; row < end; ++row)
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t column = (strip + s) * STRIP;
      vf total[VECTORS];
      for (int64_t j = 0; j < VECTORS; ++j) total[j] = load(totals + (row - first) * WIDTH + s * STRIP + j * W);
      write_strip(total, bias ? bias + column : nullptr, std::min(STRIP, w.n - column), out + row * w.n + column);
    }
}

template <int BITS, class T>
void quantized_linear(const Weights& w, int64_t m, const T* x, int64_t x_row, const int32_t* order, const T* bias,
                      T* out, int64_t threads) {
  // not a Scratch, of which tasks on this thread have one of their own
  const int64_t places = w.blocks() * m;
  std::unique_ptr<char, decltype(&std::free)> memory(
      static_cast<char*>(std::aligned_alloc(64, round_up(places * (w.block + 8), 64))), std::free);
  if (!memory) std::abort();  // the caller's tensors are already larger than this
  Rounded rounded{m, w.block, (int8_t*)memory.get(), (float*)(memory.get() + places * w.block),
                  (int32_t*)(memory.get() + places * (w.block + 4))};
  const int64_t strips = w.width() / STRIP, strip_bytes = w.padded() * BITS / 8 * STRIP;
  if (strips * strip_bytes * m < 4 * TASK_BYTES) threads = 1;
  round_rows<BITS>(w, x, x_row, order, rounded, threads);
  if (m <= FEW_ROWS) {
    const int64_t task_strips = std::max<int64_t>(1, TASK_BYTES / strip_bytes);
    with_constant<FEW_ROWS>(m, [&](auto M) {
      parallel_for(ceil_div(strips, task_strips), threads, [&](int64_t task) {
        for (int64_t s = task * task_strips; s < std::min(strips, (task + 1) * task_strips); ++s)
          multiply_strip<BITS, M>(w, s, rounded, bias, out);
      });
    });
    return;
  }
  const int64_t panels = ceil_div(strips, PANEL_STRIPS), chunks = ceil_div(m, PANEL_ROWS);
  parallel_for(panels * chunks, threads, [&](int64_t task) {
    const int64_t chunk = task / panels;
    multiply_panel<BITS>(w, task % panels, rounded, chunk * m / chunks, (chunk + 1) * m / chunks, bias, out);
  });
}

}  // namespace
}  // namespace sala

// x: (m, k), rows x_row apart, whose numbers are taken in `order` (k) or as they come (null); words: (n / 16, k / 8 or
// k / 4, 16), rounded up; scales: (groups, n rounded up to 16) of float16; offsets: the same of float32, or null; bias: (n)
// or null; out: (m, n). block: how many numbers of a row share a scale, 8 to 128; `blocks_a_group` of them share a
// group's.
SALA_EXPORT void sala_quantized_linear(int64_t is_bf16, int64_t bits, int64_t m, int64_t n, int64_t k, int64_t block,
                                       int64_t blocks_a_group, const void* x, int64_t x_row, const void* order,
                                       const void* words, const void* scales, const void* offsets, const void* bias,
                                       void* out, int64_t threads) {
  if (m == 0 || n == 0) return;
  const sala::Weights w{n, k, block, (const uint8_t*)words, (const uint16_t*)scales, (const float*)offsets,
                        blocks_a_group};
  auto run = [&](auto width, auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    sala::quantized_linear<width>(w, m, (const T*)x, x_row, (const int32_t*)order, (const T*)bias, (T*)out, threads);
  };
  auto typed = [&](auto width) { is_bf16 ? run(width, (sala::bf16*)nullptr) : run(width, (float*)nullptr); };
  bits == 4 ? typed(std::integral_constant<int, 4>{}) : typed(std::integral_constant<int, 8>{});
}

SALA_REPLAY(sala_quantized_linear)
