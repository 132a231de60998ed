// Lightning attention: linear attention with a fixed decay per head, in chunks of tokens, and its decoding step.
//
// With g = exp(log_decay), S the state before a chunk and i, j < C tokens of it (Qin et al., "Lightning Attention-2"):
//
//   o_i = scale g^(i+1) q_i S + sum_{j <= i} scale g^(i-j) (q_i . k_j) v_j
//   S  <- g^C S + sum_j g^(C-1-j) k_j v_j^T
//
// The first line is one product: [scale g^(i+1) q_i | scale g^(i-j) q_i . k_j] times the rows of S over those of v. Every
// exponent is at most zero, so no decay, however steep, leaves the range of a float.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "gemm.h"
#include "parallel.h"
#include "simd.h"

namespace sala {
namespace {

// most tokens in a chunk
constexpr int64_t CHUNK = 64;
// rows that share a causal edge: above it nothing is computed
constexpr int64_t TILE = 16;
// rows of the state that are taken from L2 to L1 once a chunk: read by the outputs, decayed, added to
constexpr int64_t STRIP = 32;
// outputs of so many bytes and states of so many are not found in a cache by whoever reads them next: measured
constexpr int64_t OUTPUT_PAST_CACHE = 8 << 20, STATE_PAST_CACHE = 2 << 20;

// A tensor (B, T, H, width) of any outer strides, counted in elements.
template <class T>
struct Heads {
  T* data;
  int64_t row, token, head;

  T* at(int64_t r, int64_t t, int64_t h) const { return data + r * row + t * token + h * head; }
};

// Powers of one head's decay. Those below the normal floats are zero: they would add nothing but slow arithmetic.
float power(float log_decay, int64_t exponent) {
  double value = std::exp(double(log_decay) * double(exponent));
  return value < double(std::numeric_limits<float>::min()) ? 0.0f : float(value);
}

struct Decay {
  float state[CHUNK + 1];  // g^n
  float query[CHUNK];      // scale g^(i+1)
  float keys[CHUNK];       // g^(CHUNK-1-x): a chunk of n tokens reads from CHUNK-n
  // scale g^(CHUNK-1-x), zero from x = CHUNK on: row i of the scores reads from CHUNK-1-i, the future is zero
  float scores[2 * CHUNK + W];

  Decay(float log_decay, float scale) {
    for (int64_t n = 0; n <= CHUNK; ++n) state[n] = power(log_decay, n);
    for (int64_t i = 0; i < CHUNK; ++i) query[i] = scale * state[i + 1];
    for (int64_t x = 0; x < CHUNK; ++x) keys[x] = state[CHUNK - 1 - x];
    for (int64_t x = 0; x < 2 * CHUNK + W; ++x) scores[x] = x < CHUNK ? scale * state[CHUNK - 1 - x] : 0.0f;
  }
};

template <class T>
struct Prefill {
  using E = Engine<T>;
  using X = typename E::Element;

  Heads<const T> q, k, v;
  Heads<T> out;
  const float* log_decay;    // (H,)
  const float* initial;      // (N, H, K, V) or null: zeros
  float* final;              // (N, H, K, V)
  const int64_t* bounds;     // (N + 1,) or null: row n is all T tokens of batch row n
  const int64_t* positions;  // the tokens that bounds cut, as positions on the time axis, or null: they are their own
  int64_t num_tokens, H, K, V;
  float scale;
  bool past_cache;

  // tokens in a chunk: the work on the state, done once a chunk, against the scores, which grow with it; measured
  int64_t chunk() const { return sizeof(X) == 4 || K * V <= 64 * 64 ? 32 : CHUNK; }
  int64_t k_padded() const { return round_up(K, E::K_STEP); }
  int64_t v_padded() const { return round_up(V, E::N_STEP); }
  // a panel of [S; v]: the rows of the state, then those of the chunk's values
  int64_t panel_rows() const { return k_padded() + round_up(CHUNK, E::K_STEP); }
  // the state stands in panels of columns too: [K][columns], so that its rows follow one another
  int64_t state_rows() const { return round_up(K, E::M_STEP); }
  int64_t state_size() const { return state_rows() * v_padded(); }
  static constexpr int64_t strip_size() { return E::left_transposed_size(CHUNK, STRIP); }

  size_t scratch_bytes(int64_t heads) const {
    return Scratch::bytes<float>(heads * state_size()) + Scratch::bytes<Decay>(heads) +
           Scratch::bytes<X>(round_up(CHUNK, E::M_STEP) * panel_rows()) + Scratch::bytes<X>(E::packed_size(K, CHUNK)) +
           Scratch::bytes<X>(ceil_div(K, STRIP) * strip_size()) + Scratch::bytes<X>(panel_rows() * v_padded()) +
           Scratch::bytes<float>(TILE * CHUNK) + Scratch::bytes<float>(TILE * PANEL) +
           2 * Scratch::bytes<T>(CHUNK * std::max(K, V));
  }

  // Heads first_head..last_head-1 of row n: chunk by chunk, so that the memory of a token is used by all of them at once.
  void attend(int64_t n, int64_t first_head, int64_t last_head) const {
    const int64_t heads = last_head - first_head;
    Scratch scratch;
    scratch.reserve(scratch_bytes(heads));
    Work work;
    float* states = scratch.take<float>(heads * state_size());
    Decay* decays = scratch.take<Decay>(heads);
    work.left = scratch.take<X>(round_up(CHUNK, E::M_STEP) * panel_rows());
    work.keys = scratch.take<X>(E::packed_size(K, CHUNK));
    work.keys_decayed = scratch.take<X>(ceil_div(K, STRIP) * strip_size());
    work.right = scratch.take<X>(panel_rows() * v_padded());
    work.scores = scratch.take<float>(TILE * CHUNK);
    work.sums = scratch.take<float>(TILE * PANEL);
    work.gathered[0] = scratch.take<T>(CHUNK * std::max(K, V));
    work.gathered[1] = scratch.take<T>(CHUNK * std::max(K, V));
    [[maybe_unused]] typename E::Session session;

    for (int64_t h = 0; h < heads; ++h) {
      new (decays + h) Decay(log_decay[first_head + h], scale);
      float* state = states + h * state_size();
      std::fill(state, state + state_size(), 0.0f);
      if (initial)
        for_each_panel([&](int64_t column, int64_t columns, int64_t width) {
          convert_rows(initial + (n * H + first_head + h) * K * V + column, V, K, columns, state + column * state_rows(),
                       width, width);
        });
    }
    const int64_t first = bounds ? bounds[n] : 0, last = bounds ? bounds[n + 1] : num_tokens;
    for (int64_t token = first; token < last; token += chunk())
      for (int64_t h = 0; h < heads; ++h) {
        const bool last_head_here = h + 1 == heads;
        const int64_t token_ahead = last_head_here ? token + chunk() : token;
        const Ahead ahead{n, last_head_here ? first_head : first_head + h + 1, token_ahead,
                          std::min(chunk(), last - token_ahead)};
        attend_chunk(n, first_head + h, token, std::min(chunk(), last - token), decays[h], states + h * state_size(),
                     work, ahead);
      }
    for (int64_t h = 0; h < heads; ++h)
      for_each_panel([&](int64_t column, int64_t columns, int64_t width) {
        convert_rows(states + h * state_size() + column * state_rows(), width, K, columns,
                     final + (n * H + first_head + h) * K * V + column, V, columns);
      });
  }

 private:
  struct Work {
    X *left, *keys, *keys_decayed, *right;
    float *scores, *sums;
    T* gathered[2];
  };

  // the chunk after this one, whose rows are fetched while this one is computed: no hardware follows heads and pages
  struct Ahead {
    int64_t n, head, token, count;
  };

  // inlined by force: GCC takes a function that only prefetches for one without effects, and drops the call
  __attribute__((always_inline)) void fetch(const Heads<const T>& x, const Ahead& ahead, int64_t i,
                                            int64_t width) const {
    if (i >= ahead.count) return;
    const char* row = reinterpret_cast<const char*>(x.at(ahead.n, position(ahead.token + i), ahead.head));
    for (int64_t byte = 0; byte < width * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }

  struct Rows {
    const T* data;
    int64_t ld;
  };

  // body(first column, columns, columns rounded up) for the panels of V
  template <class Body>
  void for_each_panel(const Body& body) const {
    for (int64_t column = 0; column < V; column += PANEL) {
      const int64_t columns = std::min(PANEL, V - column);
      body(column, columns, round_up(columns, E::N_STEP));
    }
  }

  int64_t position(int64_t token) const { return positions ? positions[token] : token; }

  // A chunk's rows where they stand, or gathered.
  Rows rows(const Heads<const T>& x, int64_t n, int64_t head, int64_t token, int64_t count, int64_t width,
            T* gathered) const {
    if (!positions) return {x.at(n, token, head), x.token};
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(gathered + i * width, x.at(n, positions[token + i], head), size_t(width) * sizeof(T));
    return {gathered, width};
  }

  void attend_chunk(int64_t n, int64_t head, int64_t token, int64_t count, const Decay& decay, float* state,
                    const Work& work, const Ahead& ahead) const {
    const int64_t lda = panel_rows();
    const Rows keys = rows(k, n, head, token, count, K, work.gathered[0]);
    const Rows values = rows(v, n, head, token, count, V, work.gathered[1]);
    E::pack_transposed(keys.data, keys.ld, count, K, work.keys);
    for (int64_t row = 0; row < K; row += STRIP)
      E::pack_left_transposed(keys.data + row, keys.ld, count, std::min(STRIP, K - row), decay.keys + CHUNK - count,
                              work.keys_decayed + row / STRIP * strip_size());
    for (int64_t i = 0; i < count; ++i)
      convert_rows(q.at(n, position(token + i), head), 0, 1, K, work.left + i * lda, 0, k_padded());
    for_each_panel([&](int64_t column, int64_t columns, int64_t width) {
      X* panel = work.right + panel_rows() * column;
      X* panel_values = panel + k_padded() * width;
      E::pack(values.data + column, values.ld, count, columns, panel_values);
      for (int64_t row = 0; row < K; row += STRIP) {
        const int64_t height = std::min(STRIP, K - row);
        float* strip = state + column * state_rows() + row * width;
        E::pack(strip, width, height, columns, panel + row * width);
        for (int64_t i = 0; i < height * width; i += W) store(strip + i, load(strip + i) * decay.state[count]);
        E::template multiply_transposed<true>(height, columns, count, work.keys_decayed + row / STRIP * strip_size(),
                                              panel_values, strip, width);
      }
    });
    for (int64_t top = 0; top < count; top += TILE) {
      const int64_t height = std::min(TILE, count - top), seen = std::min(top + TILE, count);
      X* left = work.left + top * lda;
      E::template multiply<false>(height, seen, K, left, lda, work.keys, work.scores, CHUNK, count);
      for (int64_t i = 0; i < height; ++i) {
        fetch(q, ahead, top + i, K);
        scale_row(left + i * lda, decay.query[top + i]);
        decay_scores(work.scores + i * CHUNK, decay.scores + CHUNK - 1 - top - i, seen, left + i * lda + k_padded());
      }
    }
    for_each_panel([&](int64_t column, int64_t columns, int64_t) {
      const X* panel = work.right + panel_rows() * column;
      for (int64_t top = 0; top < count; top += TILE) {
        const int64_t height = std::min(TILE, count - top), seen = std::min(top + TILE, count);
        E::template multiply<false>(height, columns, k_padded() + seen, work.left + top * lda, lda, panel, work.sums,
                                    PANEL);
        for (int64_t i = 0; i < height; ++i) {
          if (column == 0) fetch(k, ahead, top + i, K);
          if (column + PANEL >= V) fetch(v, ahead, top + i, V);
          T* to = out.at(n, position(token + top + i), head) + column;
          if (past_cache)
            stream_row(work.sums + i * PANEL, columns, to);
          else
            convert_rows(work.sums + i * PANEL, 0, 1, columns, to, 0, columns);
        }
      }
    });
  }

  void scale_row(X* row, float factor) const {
    for (int64_t c = 0; c < k_padded(); c += W) {
      if (c + W <= k_padded())
        store(row + c, load(row + c) * factor);
      else
        store_part(row + c, load_part(row + c, k_padded() - c) * factor, k_padded() - c);
    }
  }

  void decay_scores(const float* scores, const float* decay, int64_t seen, X* dst) const {
    // zeros up to where the product reads; selected, because the future's scores may be infinite, or never written
    for (int64_t j = 0; j < round_up(seen, std::max(W, E::K_STEP)); j += W) {
      vf factor = load(decay + j);
      store(dst + j, factor == vf{} ? vf{} : load(scores + j) * factor);
    }
  }
};

// The recurrence once, for one head: reads the state, writes the next one.
template <class T>
void step(const T* q, const T* k, const T* v, float decay, float scale, const float* state, float* next, T* out,
          int64_t K, int64_t V, bool past_cache) {
  constexpr int64_t VECTORS = W == 16 ? 8 : 4;
  Scratch scratch;
  scratch.reserve(2 * Scratch::bytes<float>(K));
  float* queries = scratch.take<float>(K);
  float* keys = scratch.take<float>(K);
  convert_rows(q, 0, 1, K, queries, 0, K);
  convert_rows(k, 0, 1, K, keys, 0, K);
  const int64_t whole = V / W * W;
  for (int64_t column = 0; column < whole; column += VECTORS * W)
    with_constant<VECTORS>(std::min(VECTORS, (whole - column) / W), [&](auto vectors) {
      vf values[vectors], sums[vectors];
      for (int64_t j = 0; j < vectors; ++j) {
        values[j] = load(v + column + j * W);
        sums[j] = vf{};
      }
      for (int64_t i = 0; i < K; ++i)
        for (int64_t j = 0; j < vectors; ++j) {
          const int64_t at = i * V + column + j * W;
          vf x = values[j] * keys[i];
          if (state) x += load(state + at) * decay;
          past_cache ? stream(next + at, x) : store(next + at, x);
          sums[j] += x * queries[i];
        }
      for (int64_t j = 0; j < vectors; ++j) store(out + column + j * W, sums[j] * scale);
    });
  for (int64_t column = whole; column < V; ++column) {
    float sum = 0.0f;
    for (int64_t i = 0; i < K; ++i) {
      float x = to_float(v[column]) * keys[i];
      if (state) x += state[i * V + column] * decay;
      next[i * V + column] = x;
      sum += x * queries[i];
    }
    out[column] = from_float<T>(sum * scale);
  }
}

// heads that one task takes together: a token's heads share pages of memory, their states share the cache
int64_t heads_together(int64_t rows, int64_t heads, int64_t head_stride, int64_t token_stride, int64_t state_bytes,
                       int64_t threads) {
  constexpr int64_t MOST = 8, STATES_BYTES = 512 * 1024;
  if (head_stride > token_stride) return 1;  // each head's tokens follow one another
  int64_t cached = std::max<int64_t>(1, STATES_BYTES / state_bytes);
  int64_t even = std::max<int64_t>(1, rows * heads / (threads == 1 ? 1 : 2 * threads));
  return std::min({MOST, cached, even});
}

template <class T>
void prefill(Prefill<T> op, int64_t rows, int64_t threads) {
  // a row's tokens are those of a batch row, or all rows share one
  const int64_t out_bytes = (op.out.row ? rows : 1) * op.num_tokens * op.H * op.V * int64_t(sizeof(T));
  expect_writes(op.out.data, size_t(out_bytes));
  op.past_cache = out_bytes >= OUTPUT_PAST_CACHE && can_stream(op.out.data, op.V);
  // under 20 us of work
  if (op.num_tokens * op.H * (op.K + CHUNK / 2) * op.V * rows < 500000) threads = 1;
  const int64_t together =
      heads_together(rows, op.H, op.q.head, op.q.token, op.state_size() * int64_t(sizeof(float)), threads);
  const int64_t groups = ceil_div(op.H, together);
  parallel_for(rows * groups, threads, [&](int64_t task) {
    const int64_t first = task % groups * together;
    op.attend(task / groups, first, std::min(first + together, op.H));
    stream_end();
  });
}

}  // namespace
}  // namespace sala

// q, k, v: bfloat16 or float32, strides of a row, a token and a head in elements. out (.., tokens, H, V): contiguous but for
// its rows. initial (may be null) and final (rows, H, K, V): contiguous. bounds, positions: see Prefill; may be null.
SALA_EXPORT void sala_lightning(int64_t is_bf16, const void* q, int64_t q_row, int64_t q_token, int64_t q_head,
                                const void* k, int64_t k_row, int64_t k_token, int64_t k_head, const void* v,
                                int64_t v_row, int64_t v_token, int64_t v_head, void* out, int64_t out_row,
                                const float* log_decay, const float* initial, float* final, const int64_t* bounds,
                                const int64_t* positions, int64_t rows, int64_t num_tokens, int64_t H, int64_t K,
                                int64_t V, double scale, int64_t threads) {
  auto run = [&](auto number) {
    using T = decltype(number);
    sala::prefill<T>({{static_cast<const T*>(q), q_row, q_token, q_head},
                      {static_cast<const T*>(k), k_row, k_token, k_head},
                      {static_cast<const T*>(v), v_row, v_token, v_head},
                      {static_cast<T*>(out), out_row, H * V, V},
                      log_decay,
                      initial,
                      final,
                      bounds,
                      positions,
                      num_tokens,
                      H,
                      K,
                      V,
                      float(scale),
                      false},
                     rows, threads);
  };
  is_bf16 ? run(sala::bf16{}) : run(float{});
}

// One token a row, out (rows, H, V) contiguous, state and next (.., H, K, V) contiguous. Row n reads the state slots[n], none if
// that is negative, and writes slots[rows + n]; slots may be null: n both times. A row whose `mask` (bool, may be null) is false
// keeps its state and gets zeros.
SALA_EXPORT void sala_lightning_step(int64_t is_bf16, const void* q, int64_t q_row, int64_t q_head, const void* k,
                                     int64_t k_row, int64_t k_head, const void* v, int64_t v_row, int64_t v_head,
                                     void* out, const float* log_decay, const float* state, float* next,
                                     const uint8_t* mask, const int64_t* slots, int64_t rows, int64_t H, int64_t K,
                                     int64_t V, double scale, int64_t threads) {
  const bool past_cache =
      rows * H * K * V * int64_t(sizeof(float)) >= sala::STATE_PAST_CACHE && sala::can_stream(next, V);
  // under 20 us of reading and writing
  if (rows * H * K * V < 100000) threads = 1;
  auto run = [&](auto number) {
    using T = decltype(number);
    sala::parallel_for(rows * H, threads, [&](int64_t task) {
      const int64_t row = task / H, head = task % H;
      const int64_t from = slots ? slots[row] : row, into = slots ? slots[rows + row] : row;
      const float* before = state && from >= 0 ? state + (from * H + head) * K * V : nullptr;
      float* after = next + (into * H + head) * K * V;
      T* to = static_cast<T*>(out) + task * V;
      if (mask && !mask[row]) {
        std::fill(to, to + V, T{});
        before ? void(std::copy(before, before + K * V, after)) : std::fill(after, after + K * V, 0.0f);
        return;
      }
      sala::step(static_cast<const T*>(q) + row * q_row + head * q_head,
                 static_cast<const T*>(k) + row * k_row + head * k_head,
                 static_cast<const T*>(v) + row * v_row + head * v_head, std::exp(log_decay[head]), float(scale),
                 before, after, to, K, V, past_cache);
      sala::stream_end();
    });
  };
  is_bf16 ? run(sala::bf16{}) : run(float{});
}

SALA_REPLAY(sala_lightning_step)
