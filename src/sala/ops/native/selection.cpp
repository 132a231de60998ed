// Stage 1 of InfLLM-V2: compressed keys, and which blocks a query reads (arXiv 2509.24663, section 3; sala.ops.infllm).
//
// A row is one head of one query. Rows meet the windows a panel at a time: the panel's scores stay in the cache while
// they become the rows' log-sum-exp, or the scores of blocks. Scores are kept as powers of two: exp(x) = 2^(x log2 e).
#include <limits>
#include <vector>

#include "gemm.h"
#include "parallel.h"

namespace sala {
namespace {

// far below any score, and finite: differences stay numbers
constexpr float NOTHING = -1e30f;
// how far a score may exceed the peak that its row's sum is relative to: 2^64 times as many windows as there are fit
constexpr float HEADROOM = 64.0f;
// queries of a tile; fewer where a group has many heads
constexpr int64_t TILE_QUERIES = 64, TILE_ROWS = 512;
// rows whose scores are made at a time, at least: with the panel they stay in the first-level cache
constexpr int64_t STEP_ROWS = 16;
// up to so many rows of a group, packing the windows costs more than it gains, and few calls' worth of tasks are split
constexpr int64_t FEW_ROWS = 128;
// rows that filling up may add: packing a window costs about as much as multiplying it by so many
constexpr int64_t MAX_FILL = 6;
// windows of a task when a tile's windows are shared out
constexpr int64_t SEGMENT_WINDOWS = 1024;
// windows of a task that compresses keys
constexpr int64_t COMPRESS_WINDOWS = 256;

struct Geometry {
  int64_t size, stride, coarse_size, coarse_stride, block, init, local, selected;
  bool exact;

  // windows that start in a block
  int64_t step() const { return block / stride; }
  // blocks after its first that the window with this offset in its block reaches into
  int64_t reach(int64_t offset) const { return (offset * stride + size - 1) / block; }
};

int64_t num_windows(int64_t tokens, int64_t size, int64_t stride) {
  return tokens < size ? 0 : (tokens - size) / stride + 1;
}

template <class T>
struct Call {
  const T *q, *k1, *k2;
  const int64_t* positions;  // (B, T)
  int32_t* table;            // (B, T, G, selected)
  int64_t B, T_, H, G, K;
  int64_t q_stride[3], k1_stride[3], k2_stride[3];  // b (or a page), t or n, h or g
  const int32_t* pages;  // (B, num_pages): windows are in pages, each in the one of its last token; null: in rows
  int64_t num_pages, page_size;
  Geometry geometry;
  float scale;  // to powers of two
  int64_t threads;

  int64_t group() const { return H / G; }
};

// A query whose blocks have to be scored.
struct Query {
  int64_t index;         // b * T + t
  int64_t own;           // its own block
  int64_t limit;         // blocks from here to its own are read anyway
  int64_t fine, coarse;  // windows it sees
};

// Windows of one row and group, `stride` numbers from one to the next.
template <class T>
struct Keys {
  const T* data;
  int64_t stride;
  const int32_t* pages;  // of the row; null: windows follow one another
  int64_t page_stride, page_windows, first_place;

  // The windows first..first + count where they lie, or copied to `gathered`; `ld` becomes their stride.
  const T* at(int64_t first, int64_t count, int64_t K, T* gathered, int64_t& ld) const {
    ld = stride;
    if (!pages) return data + first * stride;
    ld = K;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = first + i + first_place;
      const T* window = data + pages[place / page_windows] * page_stride + place % page_windows * stride;
      std::memcpy(gathered + i * K, window, K * sizeof(T));
    }
    return gathered;
  }
};

// Which window of a panel has its score in which column: column o * blocks + b is window b * step + o. With windows
// of the same offset in their block side by side, the best window of a block is a maximum of whole vectors.
struct Layout {
  int64_t step, blocks;
  int64_t columns() const { return step * blocks; }
};

constexpr Layout IN_ORDER{1, PANEL};

Layout by_block(const Geometry& geometry) {
  int64_t step = geometry.step();
  return {step, W * std::max<int64_t>(1, PANEL / W / step)};
}

// dst[c][r] = src[r][c]
void transpose(const float* src, int64_t lds, int64_t rows, int64_t cols, float* dst, int64_t ldd) {
#if defined(__AVX512F__)
  for (int64_t c = 0; c < cols; c += 16)
    for (int64_t r = 0; r < rows; r += 16) transpose_16x16(src + r * lds + c, lds * 4, dst + c * ldd + r, ldd * 4);
#else
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) dst[c * ldd + r] = src[r * lds + c];
#endif
}

// The rows of some queries in one group, one after another.
template <class T>
void gather_rows(const Call<T>& call, const Query* queries, int64_t count, int64_t g, T* dst) {
  const int64_t group = call.group();
  for (int64_t i = 0; i < count; ++i) {
    const T* query = call.q + queries[i].index / call.T_ * call.q_stride[0] +
                     queries[i].index % call.T_ * call.q_stride[1] + g * group * call.q_stride[2];
    for (int64_t h = 0; h < group; ++h, dst += call.K)
      std::memcpy(dst, query + h * call.q_stride[2], call.K * sizeof(T));
  }
}

// Have the panel after this one brought to the second-level cache: the processor does not foresee where its rows lie.
template <class T>
void fetch_ahead(const Keys<T>& keys, const T* windows, int64_t K, int64_t columns, int64_t available) {
  if (keys.pages) return;
  for (int64_t row = columns; row < std::min(available, 2 * columns); ++row)
    for (int64_t k = 0; k < K; k += int64_t(64 / sizeof(T))) __builtin_prefetch(windows + row * keys.stride + k, 0, 2);
}

// Both kinds of tile call body(first query, queries, scores, columns) with the products of some queries' rows and a
// panel's windows, until all queries had theirs. Columns of windows from `available` on hold anything.

// Many rows: the windows are packed, for all of them.
template <class T>
class QueriesOnTheLeft {
  using E = Engine<T>;
  using X = typename E::Element;

 public:
  static size_t bytes(int64_t rows, int64_t group, int64_t K, int64_t columns) {
    return Scratch::bytes<X>((rows + E::M_STEP) * round_up(K, E::K_STEP)) + Scratch::bytes<T>(rows * K) +
           Scratch::bytes<X>(E::packed_size(K, columns)) + Scratch::bytes<T>(columns * K) +
           Scratch::bytes<float>((step_rows(group) + E::M_STEP) * columns);
  }

  QueriesOnTheLeft(Scratch& scratch, const Call<T>& call, const Query* queries, int64_t count, int64_t g,
                   int64_t columns)
      : K(call.K), count(count), group(call.group()), lda(round_up(K, E::K_STEP)) {
    const int64_t rows = count * group;
    left = scratch.take<X>((rows + E::M_STEP) * lda);
    T* gathered = scratch.take<T>(rows * K);
    packed = scratch.take<X>(E::packed_size(K, columns));
    windows_gathered = scratch.take<T>(columns * K);
    scores = scratch.take<float>((step_rows(group) + E::M_STEP) * columns);
    gather_rows(call, queries, count, g, gathered);
    convert_rows(gathered, K, rows, K, left, lda, lda);
  }

  template <class Body>
  void multiply(const Keys<T>& keys, int64_t first, int64_t available, const Layout& layout, const Body& body) {
    const int64_t columns = layout.columns();
    int64_t ld;
    const T* windows = keys.at(first, std::min(available, columns), K, windows_gathered, ld);
    fetch_ahead(keys, windows, K, columns, available);
    for (int64_t offset = 0; offset < layout.step; ++offset)
      for (int64_t b = 0; b < layout.blocks; b += E::N_STEP) {
        int64_t window = b * layout.step + offset, there = ceil_div(available - window, layout.step);
        E::pack_columns(windows + window * ld, layout.step * ld, std::max<int64_t>(0, there),
                        offset * layout.blocks + b, columns, K, packed);
      }
    const int64_t queries = step_rows(group) / group;
    for (int64_t query = 0; query < count; query += queries) {
      int64_t here = std::min(queries, count - query);
      E::template multiply<false>(here * group, columns, K, left + query * group * lda, lda, packed, scores, columns);
      body(query, here, scores, columns);
    }
  }

 private:
  static int64_t step_rows(int64_t group) {
    // tiles are multiplied two by two
    return std::max<int64_t>(1, std::max(STEP_ROWS, 2 * E::M_STEP) / group) * group;
  }

  typename E::Session session;
  int64_t K, count, group, lda;
  X *left, *packed;
  T* windows_gathered;
  float* scores;
};

// Few rows: they are packed, and the windows are multiplied where they lie.
template <class T>
class KeysOnTheLeft {
  using E = Engine<T>;
  using X = typename E::Element;

 public:
  static size_t bytes(int64_t rows, int64_t, int64_t K, int64_t columns) {
    const int64_t wide = round_up(rows, E::N_STEP), high = round_up(columns, E::M_STEP);
    return Scratch::bytes<T>((rows + columns) * K) + 64 + Scratch::bytes<X>(E::packed_size(K, rows)) +
           Scratch::bytes<X>(high * round_up(K, E::K_STEP)) + 2 * Scratch::bytes<float>(high * wide);
  }

  KeysOnTheLeft(Scratch& scratch, const Call<T>& call, const Query* queries, int64_t count, int64_t g, int64_t columns)
      : K(call.K),
        count(count),
        rows(count * call.group()),
        wide(round_up(rows, E::N_STEP)),
        lda(round_up(K, E::K_STEP)) {
    const int64_t high = round_up(columns, E::M_STEP);
    T* gathered = scratch.take<T>(rows * K);
    windows_gathered = scratch.take<T>(columns * K);
    packed = scratch.take<X>(E::packed_size(K, rows));
    copied = scratch.take<X>(high * lda);
    products = scratch.take<float>(high * wide);
    scores = scratch.take<float>(high * wide);
    gather_rows(call, queries, count, g, gathered);
    E::pack_transposed(gathered, K, rows, K, packed);
  }

  template <class Body>
  void multiply(const Keys<T>& keys, int64_t first, int64_t available, const Layout& layout, const Body& body) {
    const int64_t columns = layout.columns();
    int64_t ld;
    const T* windows = keys.at(first, std::min(available, columns), K, windows_gathered, ld);
    fetch_ahead(keys, windows, K, columns, available);
    available = std::min(available, columns);
    bool as_they_lie = std::is_same_v<T, X> && K == lda && available % E::M_STEP == 0;
    if constexpr (std::is_same_v<T, X>)
      if (as_they_lie) E::template multiply<false>(available, rows, K, windows, ld, packed, products, wide);
    if (!as_they_lie) {
      convert_rows(windows, ld, available, K, copied, lda, lda);
      E::template multiply<false>(available, rows, K, copied, lda, packed, products, wide);
    }
    for (int64_t offset = 0; offset < layout.step; ++offset)
      transpose(products + offset * wide, layout.step * wide, layout.blocks, wide, scores + offset * layout.blocks,
                columns);
    body(0, count, scores, columns);
  }

 private:
  typename E::Session session;
  int64_t K, count, rows, wide, lda;
  X *packed, *copied;
  T* windows_gathered;
  float *products, *scores;
};

// The sum of 2^score over a row's windows, as sum * 2^peak.
struct Total {
  float peak, sum;

  float log2() const { return peak + std::log2(sum); }
};

inline Total operator+(Total a, Total b) {
  float peak = std::max(a.peak, b.peak);
  return {peak, a.sum * std::exp2(a.peak - peak) + b.sum * std::exp2(b.peak - peak)};
}

// Sum over the panels first..last of windows in order; `seen[query]` of them are visible.
template <class T, class Tile>
void sum_windows(Tile& tile, const Call<T>& call, const Keys<T>& keys, const int64_t* seen, int64_t queries,
                 int64_t first_panel, int64_t last_panel, vf* sums, Total* totals) {
  const int64_t group = call.group(), columns = IN_ORDER.columns();
  int64_t most = 0;
  for (int64_t i = 0; i < queries; ++i) most = std::max(most, seen[i]);
  for (int64_t row = 0; row < queries * group; ++row) {
    totals[row] = {NOTHING, 0.0f};
    sums[row] = vf{};
  }
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t first = panel * columns;
    tile.multiply(keys, first, most - first, IN_ORDER,
                  [&](int64_t query, int64_t count, const float* scores, int64_t ld) {
                    for (int64_t i = 0; i < count; ++i) {
                      const int64_t here = std::min(seen[query + i] - first, columns);
                      if (here <= 0) continue;
                      for (int64_t h = 0; h < group; ++h) {
                        const float* row = scores + (i * group + h) * ld;
                        vf x[PANEL / W], best = broadcast(NOTHING);
                        for (int64_t v = 0; v < PANEL / W; ++v) {
                          x[v] = load(row + v * W) * call.scale;
                          if (here < columns) x[v] = first_lanes(here - v * W, x[v], broadcast(2 * NOTHING));
                          best = max(best, x[v]);
                        }
                        Total& total = totals[(query + i) * group + h];
                        vf sum = sums[(query + i) * group + h];
                        if (any_above(best, broadcast(total.peak + HEADROOM))) {
                          float peak = max(best);
                          sum *= exp2(broadcast(total.peak - peak));
                          total.peak = peak;
                        }
                        for (int64_t v = 0; v < PANEL / W; ++v) sum += exp2(x[v] - total.peak);
                        sums[(query + i) * group + h] = sum;
                      }
                    }
                  });
  }
  for (int64_t row = 0; row < queries * group; ++row) totals[row].sum = sum(sums[row]);
}

// Raise the scores of blocks, `ld_blocks` numbers from one query to the next and zero on entry, to the best of the
// windows that overlap them, for windows that start in the panels first..last; blocks[0] is the first panel's first.
template <class T, class Tile>
void score_blocks(Tile& tile, const Call<T>& call, const Keys<T>& keys, const Query* queries, int64_t num_queries,
                  const float* normalizers, int64_t first_panel, int64_t last_panel, float* blocks, int64_t ld_blocks,
                  vf* pooled) {
  const Geometry& geometry = call.geometry;
  const Layout layout = by_block(geometry);
  const int64_t group = call.group(), furthest = geometry.reach(layout.step - 1);
  int64_t most = 0;
  for (int64_t i = 0; i < num_queries; ++i) most = std::max(most, queries[i].fine);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t first_block = panel * layout.blocks, first = first_block * layout.step;
    float* here = blocks + (panel - first_panel) * layout.blocks;
    tile.multiply(keys, first, most - first, layout, [&](int64_t query, int64_t count, float* scores, int64_t ld) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t seen = queries[query + i].fine - first;
        if (seen <= 0) continue;
        const float* rows = scores + i * group * ld;
        const float* normalizer = normalizers + (query + i) * group;
        for (int64_t b = 0; b < layout.blocks; b += W) {
          for (int64_t shift = 0; shift <= furthest; ++shift) pooled[shift] = vf{};
          for (int64_t offset = 0; offset < layout.step; ++offset) {
            const float* column = rows + offset * layout.blocks + b;
            vf share{};
            for (int64_t h = 0; h < group; ++h)
              share += exp2(load(column + h * ld) * call.scale - normalizer[h]);
            if (seen < layout.columns()) {
              share = first_lanes(ceil_div(std::max<int64_t>(0, seen - offset), layout.step) - b, share, vf{});
            }
            // what is no number counts as nothing
            for (int64_t shift = geometry.reach(offset); shift >= 0; --shift)
              pooled[shift] = max(share, pooled[shift]);
          }
          float* out = here + (query + i) * ld_blocks + b;
          for (int64_t shift = 0; shift <= furthest; ++shift)
            store(out + shift, max(load(out + shift), pooled[shift]));
        }
      }
    });
  }
}

// The blocks 0..own of a query in ascending order: all that fit, or those that must be read and the best of the others.
// `scores` has room for W numbers behind `limit`.
void choose_blocks(const Geometry& geometry, int64_t own, int64_t limit, float* scores, int32_t* table) {
  int32_t* end = table + geometry.selected;
  if (own < geometry.selected) {
    for (int64_t block = 0; block <= own; ++block) *table++ = int32_t(block);
    while (table < end) *table++ = -1;
    return;
  }
  const int64_t wanted = geometry.selected - geometry.init - (own + 1 - limit);
  for (int64_t block = 0; block < geometry.init; ++block) *table++ = int32_t(block);
  // a float32 that is not negative sorts as its bits do
  const float* first = scores + geometry.init;
  const int64_t count = limit - geometry.init;
  for (int64_t i = 0; i < W; ++i) scores[limit + i] = -1.0f;
  auto bits = [&](int64_t i) { return (vi)load(first + i); };
  auto at_least = [&](int32_t bound) {
    vi found{};
    for (int64_t i = 0; i < count; i += W) found -= bits(i) >= bound;
    int64_t total = 0;
    for (int64_t i = 0; i < W; ++i) total += found[i];
    return total;
  };
  vi highest{};
  for (int64_t i = 0; i < count; i += W) highest = bits(i) > highest ? bits(i) : highest;
  int32_t low = 0, high = 0;  // at least `wanted` scores reach low, fewer reach high
  for (int64_t i = 0; i < W; ++i) high = std::max(high, highest[i] + 1);
  int64_t reached = count, above = 0;
  while (reached > wanted && high - low > 1) {
    int32_t middle = low + (high - low) / 2;
    int64_t found = at_least(middle);
    (found >= wanted ? low : high) = middle;
    (found >= wanted ? reached : above) = found;
  }
  // of those that equal the bound the lower ones
  int64_t equals = reached > wanted ? wanted - above : reached;
  for (int64_t i = 0; i < count; ++i) {
    int32_t score;
    std::memcpy(&score, first + i, 4);
    bool take = score >= high || (score >= low && equals > 0);
    equals -= score >= low && score < high;
    *table = int32_t(geometry.init + i);
    table += take;
  }
  for (int64_t block = limit; block <= own; ++block) *table++ = int32_t(block);
}

// The queries t0..t0 + count of a row that need scores; the tables of the others are filled.
template <class T>
std::vector<Query> read_positions(const Call<T>& call, int64_t b, int64_t t0, int64_t count, int64_t first_group,
                                  int64_t last_group) {
  const Geometry& geometry = call.geometry;
  std::vector<Query> queries;
  for (int64_t index = b * call.T_ + t0; index < b * call.T_ + t0 + count; ++index) {
    const int64_t position = call.positions[index], own = position < 0 ? -1 : position / geometry.block;
    if (own >= geometry.selected) {
      int64_t fine = num_windows(position + 1, geometry.size, geometry.stride);
      int64_t coarse = geometry.exact ? 0 : num_windows(position + 1, geometry.coarse_size, geometry.coarse_stride);
      queries.push_back({index, own, own - geometry.local, fine, coarse});
      continue;
    }
    for (int64_t g = first_group; g < last_group; ++g)
      choose_blocks(geometry, own, 0, nullptr, call.table + (index * call.G + g) * geometry.selected);
  }
  return queries;
}

template <class T>
Keys<T> keys_of(const Call<T>& call, const T* data, const int64_t* strides, int64_t size, int64_t stride, int64_t b,
                int64_t g) {
  data += g * strides[2];
  if (!call.pages) return {data + b * strides[0], strides[1], nullptr, 0, 0, 0};
  // windows are counted by their last tokens: the first ones' would be before the row
  return {data, strides[1], call.pages + b * call.num_pages, strides[0], call.page_size / stride, (size - 1) / stride};
}
template <class T>
Keys<T> fine_keys(const Call<T>& call, int64_t b, int64_t g) {
  return keys_of(call, call.k1, call.k1_stride, call.geometry.size, call.geometry.stride, b, g);
}
template <class T>
Keys<T> coarse_keys(const Call<T>& call, int64_t b, int64_t g) {
  return keys_of(call, call.k2, call.k2_stride, call.geometry.coarse_size, call.geometry.coarse_stride, b, g);
}

// How many windows of a tier each query is normalised by: coarse ones, or fine ones where it sees no coarse one.
std::vector<int64_t> normalizing(const std::vector<Query>& queries, bool coarse) {
  std::vector<int64_t> seen;
  for (const Query& query : queries) seen.push_back(coarse ? query.coarse : query.coarse ? 0 : query.fine);
  return seen;
}

int64_t num_panels(const std::vector<int64_t>& seen) {
  return ceil_div(*std::max_element(seen.begin(), seen.end()), IN_ORDER.columns());
}

// The panels whose windows decide: those of blocks that are read anyway do not.
int64_t num_panels(const std::vector<Query>& queries, const Layout& layout) {
  int64_t blocks = 0;
  for (const Query& query : queries)
    blocks = std::max(blocks, std::min(query.limit, ceil_div(query.fine, layout.step)));
  return ceil_div(blocks, layout.blocks);
}

// Many queries: a task is a tile of them, from scores to blocks.
template <class T>
void select_tile(const Call<T>& call, int64_t b, int64_t g, int64_t t0, int64_t count) {
  using Tile = QueriesOnTheLeft<T>;
  const Geometry& geometry = call.geometry;
  const std::vector<Query> queries = read_positions(call, b, t0, count, g, g + 1);
  if (queries.empty()) return;
  const Layout layout = by_block(geometry);
  const int64_t group = call.group(), num = int64_t(queries.size()), rows = num * group;
  const int64_t columns = std::max(layout.columns(), IN_ORDER.columns());
  const int64_t panels = num_panels(queries, layout), furthest = geometry.reach(layout.step - 1);
  int64_t length = panels * layout.blocks;
  for (const Query& query : queries) length = std::max(length, query.limit);
  length += std::max(furthest, W);

  Scratch scratch;
  scratch.reserve(Tile::bytes(rows, group, call.K, columns) + Scratch::bytes<vf>(rows) +
                  2 * Scratch::bytes<Total>(rows) + Scratch::bytes<float>(rows) + Scratch::bytes<vf>(furthest + 1) +
                  Scratch::bytes<float>(num * length));
  Tile tile(scratch, call, queries.data(), num, g, columns);
  vf* sums = scratch.take<vf>(rows);
  Total* totals[2] = {scratch.take<Total>(rows), scratch.take<Total>(rows)};
  float* normalizers = scratch.take<float>(rows);
  vf* pooled = scratch.take<vf>(furthest + 1);
  float* blocks = scratch.take<float>(num * length);
  std::fill_n(blocks, num * length, 0.0f);

  for (bool coarse : {false, true}) {
    const std::vector<int64_t> seen = normalizing(queries, coarse);
    const Keys<T> keys = coarse ? coarse_keys(call, b, g) : fine_keys(call, b, g);
    sum_windows(tile, call, keys, seen.data(), num, 0, num_panels(seen), sums, totals[coarse]);
  }
  for (int64_t row = 0; row < rows; ++row) normalizers[row] = (totals[0][row] + totals[1][row]).log2();
  score_blocks(tile, call, fine_keys(call, b, g), queries.data(), num, normalizers, 0, panels, blocks, length, pooled);
  for (int64_t i = 0; i < num; ++i)
    choose_blocks(geometry, queries[i].own, queries[i].limit, blocks + i * length,
                  call.table + (queries[i].index * call.G + g) * geometry.selected);
}

// Few queries, as in decoding: a task is a piece of the windows, and what the tasks found is put together.
template <class T, class Tile>
void select_few(const Call<T>& call) {
  struct Piece {
    int64_t b, g;
    bool coarse;
    int64_t first_panel, last_panel;
  };
  const Geometry& geometry = call.geometry;
  const Layout layout = by_block(geometry);
  const int64_t group = call.group(), furthest = geometry.reach(layout.step - 1);
  const int64_t columns = std::max(layout.columns(), IN_ORDER.columns());
  const int64_t max_rows = call.T_ * group;

  std::vector<std::vector<Query>> queries;
  std::vector<Piece> sums, scores;
  std::vector<int64_t> panels, first_scores;  // of a row of the batch; of a row and group
  auto split = [&](std::vector<Piece>& pieces, int64_t b, int64_t g, bool coarse, int64_t panels, int64_t width) {
    const int64_t step = std::max<int64_t>(1, SEGMENT_WINDOWS / width);
    for (int64_t first = 0; first < panels; first += step)
      pieces.push_back({b, g, coarse, first, std::min(first + step, panels)});
  };
  for (int64_t b = 0; b < call.B; ++b) {
    queries.push_back(read_positions(call, b, 0, call.T_, 0, call.G));
    panels.push_back(num_panels(queries[b], layout));
    for (int64_t g = 0; g < call.G; ++g) {
      first_scores.push_back(int64_t(scores.size()));
      if (queries[b].empty()) continue;
      for (bool coarse : {false, true})
        split(sums, b, g, coarse, num_panels(normalizing(queries[b], coarse)), IN_ORDER.columns());
      split(scores, b, g, false, panels[b], layout.columns());
    }
  }
  first_scores.push_back(int64_t(scores.size()));

  std::vector<Total> totals(sums.size() * max_rows);
  parallel_for(int64_t(sums.size()), call.threads, [&](int64_t task) {
    const auto [b, g, coarse, first_panel, last_panel] = sums[task];
    const int64_t num = int64_t(queries[b].size()), rows = num * group;
    Scratch scratch;
    scratch.reserve(Tile::bytes(rows, group, call.K, columns) + Scratch::bytes<vf>(rows));
    Tile tile(scratch, call, queries[b].data(), num, g, columns);
    vf* lanes = scratch.take<vf>(rows);
    sum_windows(tile, call, coarse ? coarse_keys(call, b, g) : fine_keys(call, b, g),
                normalizing(queries[b], coarse).data(), num, first_panel, last_panel, lanes,
                totals.data() + task * max_rows);
  });
  std::vector<Total> all(call.B * call.G * max_rows, Total{NOTHING, 0.0f});
  for (size_t i = 0; i < sums.size(); ++i)
    for (int64_t row = 0; row < int64_t(queries[sums[i].b].size()) * group; ++row) {
      Total& total = all[(sums[i].b * call.G + sums[i].g) * max_rows + row];
      total = total + totals[i * max_rows + row];
    }
  std::vector<float> normalizers;
  for (const Total& total : all) normalizers.push_back(total.log2());

  const int64_t widest = std::max<int64_t>(1, SEGMENT_WINDOWS / layout.columns()) * layout.blocks + furthest;
  std::vector<float> found(scores.size() * call.T_ * widest);
  parallel_for(int64_t(scores.size()), call.threads, [&](int64_t task) {
    const auto [b, g, coarse, first_panel, last_panel] = scores[task];
    const int64_t num = int64_t(queries[b].size()), rows = num * group;
    Scratch scratch;
    scratch.reserve(Tile::bytes(rows, group, call.K, columns) + Scratch::bytes<vf>(furthest + 1));
    Tile tile(scratch, call, queries[b].data(), num, g, columns);
    score_blocks(tile, call, fine_keys(call, b, g), queries[b].data(), num,
                 normalizers.data() + (b * call.G + g) * max_rows, first_panel, last_panel,
                 found.data() + task * call.T_ * widest, widest, scratch.take<vf>(furthest + 1));
  });

  parallel_for(call.B * call.G * call.T_, call.threads, [&](int64_t task) {
    const int64_t i = task % call.T_, g = task / call.T_ % call.G, b = task / call.T_ / call.G;
    if (i >= int64_t(queries[b].size())) return;
    const Query& query = queries[b][i];
    const int64_t length = std::max(panels[b] * layout.blocks, query.limit) + std::max(furthest, W);
    Scratch scratch;
    scratch.reserve(Scratch::bytes<float>(length));
    float* blocks = scratch.take<float>(length);
    std::fill_n(blocks, length, 0.0f);
    for (int64_t piece = first_scores[b * call.G + g]; piece < first_scores[b * call.G + g + 1]; ++piece) {
      const float* part = found.data() + (piece * call.T_ + i) * widest;
      float* here = blocks + scores[piece].first_panel * layout.blocks;
      const int64_t num = (scores[piece].last_panel - scores[piece].first_panel) * layout.blocks + furthest;
      for (int64_t block = 0; block < num; ++block) here[block] = std::max(here[block], part[block]);
    }
    choose_blocks(geometry, query.own, query.limit, blocks,
                  call.table + (query.index * call.G + g) * geometry.selected);
  });
}

template <class T>
void select(const Call<T>& call) {
  const int64_t rows = call.T_ * call.group();
  if (rows <= FEW_ROWS) {
    // on the right rows are filled up to whole vectors, which can cost more than packing does
    const bool fills = round_up(rows, Engine<T>::N_STEP) - rows <= MAX_FILL || Engine<T>::M_STEP > 1;
    return fills ? select_few<T, KeysOnTheLeft<T>>(call) : select_few<T, QueriesOnTheLeft<T>>(call);
  }
  const int64_t height = std::min(TILE_QUERIES, std::max<int64_t>(1, TILE_ROWS / call.group()));
  const int64_t tiles = ceil_div(call.T_, height);
  parallel_for(call.B * call.G * tiles, call.threads, [&](int64_t task) {
    // the last queries see the most: first, so that no thread is left alone with them
    const int64_t g = task % call.G, b = task / call.G % call.B, t0 = (tiles - 1 - task / call.G / call.B) * height;
    select_tile(call, b, g, t0, std::min(height, call.T_ - t0));
  });
}

// Means of windows of `size` tokens, `stride` apart, of one group and row.
template <class T>
void compress(const T* keys, int64_t ld, int64_t first, int64_t last, int64_t size, int64_t stride, int64_t K, T* means,
              int64_t ld_means) {
  for (int64_t window = first; window < last; ++window) {
    const T* rows = keys + window * stride * ld;
    T* mean = means + window * ld_means;
    // several vectors side by side: one sum alone would wait for itself at every row
    const int64_t whole = K / W * W;
    for (int64_t k = 0; k < whole; k += 4 * W)
      with_constant<4>((std::min(whole, k + 4 * W) - k) / W, [&](auto vectors) {
        vf sums[vectors] = {};
        for (int64_t i = 0; i < size; ++i)
          for (int64_t v = 0; v < vectors; ++v) sums[v] += load(rows + i * ld + k + v * W);
        for (int64_t v = 0; v < vectors; ++v) store(mean + k + v * W, sums[v] / float(size));
      });
    for (int64_t k = whole; k < K; ++k) {
      float sum = 0.0f;
      for (int64_t i = 0; i < size; ++i) sum += to_float(rows[i * ld + k]);
      mean[k] = from_float<T>(sum / float(size));
    }
  }
}

template <class T>
void compress(const int64_t* sizes, const T* keys, T* means, int64_t threads) {
  const int64_t B = sizes[0], N = sizes[1], G = sizes[2], K = sizes[3], size = sizes[4], stride = sizes[5];
  const int64_t* strides = sizes + 6;  // b, s, g
  const int64_t segments = ceil_div(N, COMPRESS_WINDOWS);
  parallel_for(B * segments, threads, [&](int64_t task) {
    const int64_t b = task / segments, first = task % segments * COMPRESS_WINDOWS;
    for (int64_t g = 0; g < G; ++g)
      compress(keys + b * strides[0] + g * strides[2], strides[1], first, std::min(N, first + COMPRESS_WINDOWS), size,
               stride, K, means + (b * N * G + g) * K, G * K);
  });
}

template <class T>
void select(const int64_t* sizes, const T* q, const T* k1, const T* k2, const int64_t* positions, const int32_t* pages,
            int32_t* table, double scale, int64_t threads) {
  Call<T> call{};
  call.q = q, call.k1 = k1, call.k2 = k2, call.positions = positions, call.pages = pages, call.table = table;
  call.B = *sizes++, call.T_ = *sizes++, call.H = *sizes++, call.G = *sizes++, call.K = *sizes++;
  for (int64_t* strides : {call.q_stride, call.k1_stride, call.k2_stride})
    for (int64_t i = 0; i < 3; ++i) strides[i] = *sizes++;
  call.num_pages = *sizes++, call.page_size = *sizes++;
  call.geometry = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8] != 0};
  call.scale = float(scale * 1.4426950408889634);
  call.threads = threads;
  select(call);
}

}  // namespace
}  // namespace sala

// sizes: B, T, H, G, K; the strides of q, k1 and k2 in their first three dimensions; pages a row, tokens a page; Geometry.
SALA_EXPORT void sala_select_f32(const int64_t* sizes, const float* q, const float* k1, const float* k2,
                                 const int64_t* positions, const int32_t* pages, int32_t* table, double scale,
                                 int64_t threads) {
  sala::select(sizes, q, k1, k2, positions, pages, table, scale, threads);
}
SALA_EXPORT void sala_select_bf16(const int64_t* sizes, const sala::bf16* q, const sala::bf16* k1, const sala::bf16* k2,
                                  const int64_t* positions, const int32_t* pages, int32_t* table, double scale,
                                  int64_t threads) {
  sala::select(sizes, q, k1, k2, positions, pages, table, scale, threads);
}

// sizes: B, N, G, K, a window's size and stride, and the strides of the keys in their first three dimensions.
SALA_EXPORT void sala_compress_f32(const int64_t* sizes, const float* keys, float* means, int64_t threads) {
  sala::compress(sizes, keys, means, threads);
}
SALA_EXPORT void sala_compress_bf16(const int64_t* sizes, const sala::bf16* keys, sala::bf16* means, int64_t threads) {
  sala::compress(sizes, keys, means, threads);
}

SALA_REPLAY(sala_select_f32)
SALA_REPLAY(sala_select_bf16)
