// The tile instructions of AMX-bf16, or the same in plain C++ (SALA_EMULATE_AMX) so that the code on top of them can be
// tested on any machine.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

#if defined(SALA_EMULATE_AMX)

namespace sala::amx {

struct Tile {
  alignas(64) unsigned char bytes[16][64];
};
inline thread_local Tile tiles[8];

struct Session {};

template <int T>
inline void zero() { std::memset(&tiles[T], 0, sizeof(Tile)); }
template <int T>
inline void load(const void* p, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(tiles[T].bytes[row], static_cast<const char*>(p) + row * stride, 64);
}
template <int T>
inline void store(void* p, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(p) + row * stride, tiles[T].bytes[row], 64);
}
template <int C, int A, int B>
inline void multiply() {
  float c[16][16];
  bf16 a[16][32], b[16][32];
  std::memcpy(c, &tiles[C], 1024);
  std::memcpy(a, &tiles[A], 1024);
  std::memcpy(b, &tiles[B], 1024);
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n)
        c[m][n] += to_float(a[m][2 * k]) * to_float(b[k][2 * n]) + to_float(a[m][2 * k + 1]) * to_float(b[k][2 * n + 1]);
  std::memcpy(&tiles[C], c, 1024);
}

}  // namespace sala::amx

#elif defined(__AMX_BF16__)

#include <immintrin.h>

namespace sala::amx {

// Tiles of 16 rows of 64 bytes while it lives; one in every task that multiplies.
struct Session {
  Session() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Session() { _tile_release(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

template <int T>
inline void zero() { _tile_zero(T); }
template <int T>
inline void load(const void* p, int64_t stride) { _tile_loadd(T, p, stride); }
template <int T>
inline void store(void* p, int64_t stride) { _tile_stored(T, p, stride); }
template <int C, int A, int B>
inline void multiply() { _tile_dpbf16ps(C, A, B); }

}  // namespace sala::amx

#endif
