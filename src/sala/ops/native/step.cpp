// A decoding step as a tape of calls, and what stands between its operators: writing the caches at a position in memory.
#include <algorithm>

#include "parallel.h"
#include "simd.h"

SALA_EXPORT void sala_compress_f32(const int64_t* sizes, const float* keys, float* means, int64_t threads);
SALA_EXPORT void sala_compress_bf16(const int64_t* sizes, const sala::bf16* keys, sala::bf16* means, int64_t threads);

// to[row][positions[row]] = from[row], places of `bytes`; rows are so many bytes apart
SALA_EXPORT void sala_put(void* to, int64_t to_row, const void* from, int64_t from_row, const int64_t* positions,
                          int64_t rows, int64_t bytes) {
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy((char*)to + row * to_row + positions[row] * bytes, (const char*)from + row * from_row, size_t(bytes));
}
SALA_REPLAY(sala_put)

SALA_EXPORT void sala_copy(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, size_t(bytes)); }
SALA_REPLAY(sala_copy)

// The mean of a window of keys that the key at a row's position completes, written to its place among the means.
// keys: (rows, places, G, K), close; means: (rows, windows, G, K), close; rows are so many places apart.
SALA_EXPORT void sala_compress_newest(int64_t is_bf16, const void* keys, int64_t keys_row, void* means,
                                      int64_t means_row, const int64_t* positions, int64_t rows, int64_t G, int64_t K,
                                      int64_t size, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t end = positions[row] + 1;
    if (end < size || (end - size) % stride) continue;
    const int64_t sizes[] = {1, 1, G, K, size, stride, 0, G * K, K};
    const int64_t key = (row * keys_row + end - size) * G * K, mean = (row * means_row + (end - size) / stride) * G * K;
    if (is_bf16)
      sala_compress_bf16(sizes, (const sala::bf16*)keys + key, (sala::bf16*)means + mean, 1);
    else
      sala_compress_f32(sizes, (const float*)keys + key, (float*)means + mean, 1);
  }
}
SALA_REPLAY(sala_compress_newest)

// Of queries that are their rows' last: the lowest position that leaves something unread, and the query's own position, or
// -1 where it reads everything. `SparseGeometry.first_sparse_position` says what the numbers are.
SALA_EXPORT void sala_sparse_step(const int64_t* positions, int64_t rows, int64_t by_position, int64_t dense_len,
                                  int64_t all_fit, int64_t* first_sparse, int64_t* choosing) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t length = positions[row] + 1;
    if (by_position)
      first_sparse[row] = std::max(dense_len - 1, all_fit);
    else
      first_sparse[row] = length >= dense_len ? all_fit : std::max(all_fit, length);
    choosing[row] = positions[row] < first_sparse[row] ? -1 : positions[row];
  }
}
SALA_REPLAY(sala_sparse_step)

// calls: for each the address of a `_words` function, the number of its arguments, and these
SALA_EXPORT void sala_replay(const int64_t* calls, int64_t size) {
  for (const int64_t* call = calls; call < calls + size; call += 2 + call[1])
    sala::from_word<void (*)(const int64_t*)>(call[0])(call + 2);
}
