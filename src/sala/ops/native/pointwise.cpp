// The elementwise work between matrix products and attention, one pass over each row, rounded where plain torch rounds.
#include <type_traits>

#include "parallel.h"
#include "simd.h"

namespace sala {
namespace {

// below this a second thread costs more than it saves
constexpr int64_t SHARED_BYTES = 1 << 18;
constexpr int64_t TASK_BYTES = 1 << 15;

// The vectors of a row: all whole, but for the last.
struct Whole {};
struct Part {
  int64_t n;
};
template <class T>
inline vf load(const T* p, Whole) { return sala::load(p); }
template <class T>
inline vf load(const T* p, Part part) { return load_part(p, part.n); }
template <class T>
inline void store(T* p, vf x, Whole) { sala::store(p, x); }
template <class T>
inline void store(T* p, vf x, Part part) { store_part(p, x, part.n); }

template <class Body>
inline void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}

inline vf sigmoid(vf x) {
  // exp takes at most 88; a NaN goes through
  vf negative = -x > broadcast(88.0f) ? broadcast(88.0f) : -x;
  return 1.0f / (1.0f + exp(negative));
}

inline float inverse_rms(vf squares, int64_t n, double eps) { return 1.0f / std::sqrt(sum(squares) / float(n) + float(eps)); }

// Run body(row) for every row; a row's result does not depend on the task that it is in.
template <class Body>
void for_rows(int64_t rows, int64_t row_bytes, int64_t threads, const Body& body) {
  const int64_t block = 1 + TASK_BYTES / (row_bytes + 1);
  if (rows * row_bytes < SHARED_BYTES) threads = 1;
  parallel_for(ceil_div(rows, block), threads, [&](int64_t task) {
    const int64_t end = (task + 1) * block < rows ? (task + 1) * block : rows;
    for (int64_t row = task * block; row < end; ++row) body(row);
  });
}

// sum = x + scale * branch, out = norm(sum); without a branch out = norm(x), without a weight only the sum
template <class T>
void norm(int64_t rows, int64_t n, const T* x, int64_t x_row, const T* branch, int64_t branch_row, double scale,
          const T* weight, double eps, T* total, T* out, int64_t threads) {
  const vf factor = broadcast(float(scale));
  for_rows(rows, n * int64_t(sizeof(T)) * 4, threads, [&](int64_t row) {
    const T* from = x + row * x_row;
    vf squares{};
    if (branch) {
      const T* other = branch + row * branch_row;
      T* to = total + row * n;
      for_vectors(n, [&](int64_t i, auto part) {
        vf s = rounded<T>(load(from + i, part) + rounded<T>(load(other + i, part) * factor));
        squares += s * s;
        store(to + i, s, part);
      });
      from = to;
    } else {
      for_vectors(n, [&](int64_t i, auto part) {
        vf s = load(from + i, part);
        squares += s * s;
      });
    }
    if (!weight) return;
    const vf inverse = broadcast(inverse_rms(squares, n, eps));
    for_vectors(n, [&](int64_t i, auto part) {
      store(out + row * n + i, rounded<T>(load(from + i, part) * inverse) * load(weight + i, part), part);
    });
  });
}

// One head of one token: norm, then the last 2 `half` numbers turned by pairs, then `scale`; each step may be left out.
template <class T>
void turn_head(const T* x, int64_t n, const T* weight, double eps, const float* cosine, const float* sine, int64_t half,
               const float* scale, float* held, T* out) {
  vf squares{};
  for_vectors(n, [&](int64_t i, auto part) {
    vf s = load(x + i, part);
    squares += s * s;
    store(held + i, s, part);
  });
  if (weight) {
    const vf inverse = broadcast(inverse_rms(squares, n, eps));
    for_vectors(n, [&](int64_t i, auto part) {
      store(held + i, rounded<T>(rounded<T>(load(held + i, part) * inverse) * load(weight + i, part)), part);
    });
  }
  const vf factor = scale ? rounded<T>(broadcast(*scale)) : vf{};
  auto finish = [&](int64_t i, vf value, auto part) {
    store(out + i, scale ? rounded<T>(value) * factor : value, part);
  };
  const int64_t still = n - 2 * half;
  for_vectors(still, [&](int64_t i, auto part) { finish(i, load(held + i, part), part); });
  for_vectors(half, [&](int64_t i, auto part) {
    const vf first = load(held + still + i, part), second = load(held + still + half + i, part);
    const vf c = load(cosine + i, part), s = load(sine + i, part);
    finish(still + i, first * c - second * s, part);
    finish(still + half + i, second * c + first * s, part);
  });
}

template <class T>
void turn(int64_t B, int64_t T_, int64_t H, int64_t K, const T* x, const int64_t* strides, const T* weight, double eps,
          const float* cosine, const float* sine, int64_t table_row, int64_t half, const float* scale, int64_t scale_row,
          T* out, int64_t threads) {
  for_rows(B * T_, H * K * int64_t(sizeof(T)) * 2, threads, [&](int64_t row) {
    const int64_t b = row / T_, t = row % T_;
    Scratch scratch;
    scratch.reserve(Scratch::bytes<float>(K));
    float* held = scratch.take<float>(K);
    for (int64_t h = 0; h < H; ++h)
      turn_head(x + b * strides[0] + t * strides[1] + h * strides[2], K, weight, eps, cosine + b * table_row + t * half,
                sine + b * table_row + t * half, half, scale ? scale + b * scale_row + t : nullptr, held,
                out + ((b * H + h) * T_ + t) * K);
  });
}

// All heads of a token end to end: norm over all of them, times sigmoid(gate); both may be left out.
template <class T>
void merge(int64_t B, int64_t T_, int64_t H, int64_t V, const T* x, const int64_t* strides, const T* weight, double eps,
           const T* gate, int64_t gate_row, T* out, int64_t threads) {
  const int64_t n = H * V;
  for_rows(B * T_, n * int64_t(sizeof(T)) * 3, threads, [&](int64_t row) {
    const int64_t b = row / T_, t = row % T_;
    T* to = out + row * n;
    vf squares{};
    // gathered into the output first: heads of one token may lie far apart
    for (int64_t h = 0; h < H; ++h) {
      const T* from = x + b * strides[0] + t * strides[1] + h * strides[2];
      for_vectors(V, [&](int64_t i, auto part) {
        vf s = load(from + i, part);
        squares += s * s;
        store(to + h * V + i, s, part);
      });
    }
    if (!weight && !gate) return;
    const vf inverse = broadcast(weight ? inverse_rms(squares, n, eps) : 1.0f);
    for_vectors(n, [&](int64_t i, auto part) {
      vf y = load(to + i, part);
      if (weight) y = rounded<T>(rounded<T>(y * inverse) * load(weight + i, part));
      if (gate) y = y * rounded<T>(sigmoid(load(gate + row * gate_row + i, part)));
      store(to + i, y, part);
    });
  });
}

template <class T>
void silu_mul(int64_t rows, int64_t n, const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* out,
              int64_t threads) {
  for_rows(rows, n * int64_t(sizeof(T)) * 3, threads, [&](int64_t row) {
    for_vectors(n, [&](int64_t i, auto part) {
      const vf x = load(gate + row * gate_row + i, part);
      store(out + row * n + i, rounded<T>(x * sigmoid(x)) * load(up + row * up_row + i, part), part);
    });
  });
}

}  // namespace
}  // namespace sala

using sala::bf16;

SALA_EXPORT void sala_norm(int64_t is_bf16, int64_t rows, int64_t n, const void* x, int64_t x_row, const void* branch,
                           int64_t branch_row, double scale, const void* weight, double eps, void* total, void* out,
                           int64_t threads) {
  auto run = [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    sala::norm<T>(rows, n, (const T*)x, x_row, (const T*)branch, branch_row, scale, (const T*)weight, eps, (T*)total,
                  (T*)out, threads);
  };
  is_bf16 ? run((bf16*)nullptr) : run((float*)nullptr);
}

// x: (B, T, H, K) with the strides given, K close; out: (B, H, T, K). Tables: (B or 1, T, half), the same for both halves.
SALA_EXPORT void sala_turn(int64_t is_bf16, int64_t B, int64_t T_, int64_t H, int64_t K, const void* x, int64_t x_b,
                           int64_t x_t, int64_t x_h, const void* weight, double eps, const float* cosine,
                           const float* sine, int64_t table_b, int64_t half, const float* scale, int64_t scale_b,
                           void* out, int64_t threads) {
  const int64_t strides[] = {x_b, x_t, x_h};
  auto run = [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    sala::turn<T>(B, T_, H, K, (const T*)x, strides, (const T*)weight, eps, cosine, sine, table_b, half, scale, scale_b,
                  (T*)out, threads);
  };
  is_bf16 ? run((bf16*)nullptr) : run((float*)nullptr);
}

SALA_EXPORT void sala_merge(int64_t is_bf16, int64_t B, int64_t T_, int64_t H, int64_t V, const void* x, int64_t x_b,
                            int64_t x_t, int64_t x_h, const void* weight, double eps, const void* gate,
                            int64_t gate_row, void* out, int64_t threads) {
  const int64_t strides[] = {x_b, x_t, x_h};
  auto run = [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    sala::merge<T>(B, T_, H, V, (const T*)x, strides, (const T*)weight, eps, (const T*)gate, gate_row, (T*)out, threads);
  };
  is_bf16 ? run((bf16*)nullptr) : run((float*)nullptr);
}

SALA_EXPORT void sala_silu_mul(int64_t is_bf16, int64_t rows, int64_t n, const void* gate, int64_t gate_row,
                               const void* up, int64_t up_row, void* out, int64_t threads) {
  auto run = [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    sala::silu_mul<T>(rows, n, (const T*)gate, gate_row, (const T*)up, up_row, (T*)out, threads);
  };
  is_bf16 ? run((bf16*)nullptr) : run((float*)nullptr);
}

SALA_REPLAY(sala_norm)
SALA_REPLAY(sala_turn)
SALA_REPLAY(sala_merge)
SALA_REPLAY(sala_silu_mul)
