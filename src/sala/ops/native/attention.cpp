// Softmax attention in one pass over the keys: dense and causal, or over the blocks that each query chose; prefill and
// decoding. (FlashAttention, arXiv 2205.14135, algorithm 1; the reading of blocks is InfLLM-V2's, arXiv 2509.24663.)
//
// A task is a tile of neighbouring queries of one group of heads. Its rows are pairs of a query and a head, and each is
// on its own: any number of heads in a group makes full products. For each block of keys that some query of the tile
// reads, the readers' rows are multiplied by the packed keys, exponentiated, and multiplied by the packed values. Where no
// query chose blocks every query reads all of them, so dense attention is the same text.
#include <algorithm>
#include <limits>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "simd.h"

namespace sala {
namespace {

// queries in a tile: bits of `Readers::who`
constexpr int64_t TILE_QUERIES = 64;
// a block of keys and what it is multiplied with should stay in a core's cache, of which a tile's rows take this much
constexpr int64_t TILE_BYTES = 640 << 10;
// fewer rows than this do not pay for packing the keys once more
constexpr int64_t MIN_TILE_ROWS = 128;
// keys in one product, where readers share that many: few rows wait for the next keys to arrive, and want them sooner
constexpr int64_t PANEL_KEYS = 256, FEW_ROWS_PANEL_KEYS = 64;
// rows in one product: a multiple of BLOCK_ROWS and of every M_STEP; their scores stay near
constexpr int64_t PRODUCT_ROWS = 48;
// with fewer tasks than this, and with many keys, a tile's keys are split
constexpr int64_t ENOUGH_TASKS = 32;
constexpr int64_t SEGMENT_KEYS = 1024;
// multiplications and additions that are not worth a second thread
constexpr double SMALL_WORK = 2e6;
// a row's reference may lie this far below its largest score, in powers of two
constexpr float SLACK = 8.0f;
constexpr double LOG2_E = 1.4426950408889634;
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr int64_t END = std::numeric_limits<int64_t>::max();

struct Call {
  const void *q, *k, *v;
  void* out;                    // (B, T, H, V), contiguous
  const int64_t* positions;     // (B, T), contiguous; null (never with `table`): `start` onwards in every row
  const int32_t* table;         // (B, T, G, num_selected), contiguous: blocks, ascending, -1 at the end; null: dense
  const int64_t* first_sparse;  // (B): queries at lower positions are dense; with `table`
  const int32_t* pages;         // (B, num_pages), contiguous: rows of k and v by page; null: row b is row b of the batch
  int64_t num_pages, page_size;
  int64_t B, T, H, G, K, V;
  int64_t q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head;
  int64_t start, num_selected, block_size;
  double scale;

  int64_t group() const { return H / G; }
  int64_t position(int64_t b, int64_t t) const { return positions ? positions[b * T + t] : start + t; }
};

// How the work is cut. Looks at sizes and positions only, so that results do not depend on the number of threads, and at a
// row's own, so that they do not depend on the other rows.
struct Plan {
  struct Row {
    int64_t segments, segment_blocks;
  };
  int64_t queries, tiles, segments, panel_keys;  // segments: the most that a row has
  std::vector<Row> rows;
  double work;

  template <class T>
  static Plan make(const Call& c) {
    const int64_t group = c.group();
    const int64_t row_bytes = c.V * 4 + c.K * int64_t(sizeof(T)) + 64;
    int64_t queries = TILE_QUERIES;
    while (queries > 1 && queries * group * row_bytes > TILE_BYTES) queries /= 2;
    const auto num_tasks = [&] { return c.G * ceil_div(c.T, queries); };
    queries = std::min(queries, c.T);
    while (num_tasks() < ENOUGH_TASKS && queries * group > MIN_TILE_ROWS && queries > 1) queries = ceil_div(queries, 2);
    const int64_t panel_keys = queries * group < PRODUCT_ROWS ? FEW_ROWS_PANEL_KEYS : PANEL_KEYS;
    Plan plan{queries, ceil_div(c.T, queries), 1, panel_keys, {}, 0};
    for (int64_t b = 0; b < c.B; ++b) {
      // positions of the last query, and of the last that reads everything
      int64_t last = -1, last_dense = -1;
      for (int64_t t = c.positions ? 0 : c.T - 1; t < c.T; ++t) {
        const int64_t position = c.position(b, t);
        last = std::max(last, position);
        if (!c.table || position < c.first_sparse[b]) last_dense = std::max(last_dense, position);
      }
      int64_t blocks = last / c.block_size + 1;
      if (c.table) blocks = std::min(blocks, (last_dense + c.block_size) / c.block_size + queries * c.num_selected);
      const int64_t per_segment = std::max<int64_t>(1, SEGMENT_KEYS / c.block_size);
      const int64_t most = std::max<int64_t>(1, std::min(ceil_div(blocks, per_segment), ENOUGH_TASKS / num_tasks()));
      const int64_t segment_blocks = round_up(ceil_div(blocks, most), std::max<int64_t>(1, PANEL_KEYS / c.block_size));
      const int64_t segments = std::max<int64_t>(1, ceil_div(blocks, segment_blocks));
      plan.rows.push_back({segments, segment_blocks});
      plan.segments = std::max(plan.segments, segments);
      plan.work += double(c.T) * c.H * (c.K + c.V) * double(blocks) * c.block_size;
    }
    return plan;
  }
};

// The keys or values of one row and group: one after another, or in pages.
template <class T>
struct Places {
  const T* data;
  int64_t row, token;
  const int32_t* pages;
  int64_t page_size;

  Places(const Call& c, const void* x, int64_t row, int64_t token, int64_t head, int64_t b, int64_t g)
      : data(static_cast<const T*>(x) + g * head + (c.pages ? 0 : b * row)),
        row(row),
        token(token),
        pages(c.pages ? c.pages + b * c.num_pages : nullptr),
        page_size(c.page_size) {}

  const T* at(int64_t key) const {
    return pages ? data + pages[key / page_size] * row + key % page_size * token : data + key * token;
  }
  // the first key after `key` that does not follow it in memory
  int64_t end_of_page(int64_t key) const { return pages ? (key / page_size + 1) * page_size : END; }

  // inlined by force: GCC takes a function that only prefetches for one without effects, and drops the call
  __attribute__((always_inline)) void fetch(int64_t width, int64_t first, int64_t end) const {
    for (int64_t key = first, stop; key < end; key = stop) {
      stop = std::min(end, end_of_page(key));
      const T* place = at(key);
      for (int64_t i = key; i < stop; ++i, place += token)
        for (int64_t x = 0; x < width; x += int64_t(64 / sizeof(T))) __builtin_prefetch(place + x, 0, 2);
    }
  }
};

// The blocks that a tile's queries read, in ascending order, each with its readers.
class Readers {
 public:
  int64_t block;  // END: no more
  uint64_t who;   // bit i: query i of the tile

  Readers(const Call& c, int64_t b, int64_t g, int64_t first_query, int64_t num_queries, int64_t first_block)
      : count_(num_queries) {
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t t = first_query + i, position = c.position(b, t);
      own_[i] = position < 0 ? -1 : position / c.block_size;
      chosen_[i] = nullptr;
      if (c.table && position >= c.first_sparse[b]) {
        chosen_[i] = c.table + ((b * c.T + t) * c.G + g) * c.num_selected;
        end_[i] = chosen_[i] + c.num_selected;
        while (chosen_[i] != end_[i] && *chosen_[i] >= 0 && *chosen_[i] < first_block) ++chosen_[i];
        next_[i] = chosen(i);
      } else {
        next_[i] = first_block <= own_[i] ? first_block : END;
      }
    }
    find();
  }

  void advance() {
    for (uint64_t left = who; left; left &= left - 1) {
      const int i = __builtin_ctzll(left);
      if (chosen_[i]) {
        ++chosen_[i];
        next_[i] = chosen(i);
      } else {
        next_[i] = block < own_[i] ? block + 1 : END;
      }
    }
    find();
  }

 private:
  int64_t chosen(int i) const {
    return chosen_[i] == end_[i] || *chosen_[i] < 0 || *chosen_[i] > own_[i] ? END : *chosen_[i];
  }
  void find() {
    block = END;
    for (int64_t i = 0; i < count_; ++i) block = std::min(block, next_[i]);
    who = 0;
    for (int64_t i = 0; i < count_; ++i) who |= uint64_t(next_[i] == block) << i;
  }

  int64_t count_;
  int64_t next_[TILE_QUERIES], own_[TILE_QUERIES];
  const int32_t *chosen_[TILE_QUERIES], *end_[TILE_QUERIES];
};

// A tile's rows, and what they have read so far.
template <class T>
class Tile {
  using E = Engine<T>;
  using Element = typename E::Element;

 public:
  Tile(const Call& c, int64_t b, int64_t g, int64_t first_query, int64_t num_queries)
      : c_(c),
        group_(c.group()),
        num_rows_(num_queries * group_),
        k_width_(round_up(c.K, E::K_STEP)),
        v_width_(round_up(c.V, E::N_STEP)),
        factor_(float(std::abs(c.scale) * LOG2_E)),
        slack_(std::min(SLACK / factor_, std::numeric_limits<float>::max())),
        k_(c, c.k, c.k_row, c.k_token, c.k_head, b, g),
        v_(c, c.v, c.v_row, c.v_token, c.v_head, b, g) {
    const int64_t rows = round_up(num_rows_, E::M_STEP);
    const int64_t keys = std::max(k_width_, round_up(PANEL_KEYS, E::K_STEP));
    scratch_.reserve(Scratch::bytes<Element>(rows * k_width_) + Scratch::bytes<float>(rows * (v_width_ + W + 1)) +
                     Scratch::bytes<int64_t>(num_rows_) * 2 + Scratch::bytes<Element>(PRODUCT_ROWS * keys) * 2 +
                     Scratch::bytes<float>(PRODUCT_ROWS * PANEL_KEYS) + Scratch::bytes<float>(PRODUCT_ROWS * v_width_) +
                     Scratch::bytes<Element>(E::packed_size(c.K, PANEL_KEYS)) +
                     Scratch::bytes<Element>(E::packed_size(PANEL_KEYS, c.V)) + 1024);
    q_ = scratch_.take<Element>(rows * k_width_);
    out_ = scratch_.take<float>(rows * v_width_);
    sums_ = scratch_.take<float>(rows * W);
    tops_ = scratch_.take<float>(rows);
    positions_ = scratch_.take<int64_t>(num_rows_);
    readers_ = scratch_.take<int64_t>(num_rows_);
    some_q_ = scratch_.take<Element>(PRODUCT_ROWS * keys);
    probs_ = scratch_.take<Element>(PRODUCT_ROWS * keys);
    scores_ = scratch_.take<float>(PRODUCT_ROWS * PANEL_KEYS);
    some_out_ = scratch_.take<float>(PRODUCT_ROWS * v_width_);
    packed_k_ = scratch_.take<Element>(E::packed_size(c.K, PANEL_KEYS));
    packed_v_ = scratch_.take<Element>(E::packed_size(PANEL_KEYS, c.V));

    std::fill_n(out_, rows * v_width_, 0.0f);
    std::fill_n(sums_, rows * W, 0.0f);
    std::fill_n(tops_, rows, NONE);
    last_ = -1;
    for (int64_t i = 0; i < num_queries; ++i) {
      const int64_t t = first_query + i, position = c.position(b, t);
      last_ = std::max(last_, position);
      const T* heads = static_cast<const T*>(c.q) + b * c.q_row + t * c.q_token + g * group_ * c.q_head;
      convert_rows(heads, c.q_head, position < 0 ? 0 : group_, c.K, q_ + i * group_ * k_width_, k_width_, k_width_);
      std::fill_n(positions_ + i * group_, group_, position);
    }
    // so that the largest product is the largest score
    if (c.scale < 0)
      for (int64_t i = 0; i < num_rows_ * k_width_; ++i) q_[i] = from_float<Element>(-to_float(q_[i]));
  }

  // Read the keys [first, end) for the rows of the queries in `who`; [next_first, next_end) will be read after them.
  void read(int64_t first, int64_t end, uint64_t who, int64_t panel_keys, int64_t next_first, int64_t next_end) {
    int64_t count = 0;
    for (uint64_t left = who; left; left &= left - 1) {
      const int64_t row = __builtin_ctzll(left) * group_;
      for (int64_t h = 0; h < group_; ++h) readers_[count++] = row + h;
    }
    // what lies behind the last key need not be a number
    end = std::min(end, last_ + 1);
    next_end = std::min(next_end, last_ + 1);
    for (int64_t here; first < end; first = here) {
      here = std::min({first + panel_keys, end, k_.end_of_page(first)});
      if (here < end)
        read_panel(first, here - first, count, here, std::min(here + panel_keys, end));
      else
        read_panel(first, here - first, count, next_first, next_end);
    }
  }

  // The result of row i, not yet divided, its sum, and the product q k that both are relative to.
  const float* out(int64_t row) const { return out_ + row * v_width_; }
  float sum(int64_t row) const { return sala::sum(load(sums_ + row * W)); }
  float top(int64_t row) const { return tops_[row]; }
  int64_t num_rows() const { return num_rows_; }

 private:
  void read_panel(int64_t first, int64_t keys, int64_t count, int64_t next, int64_t next_end) {
    E::pack_transposed(k_.at(first), c_.k_token, keys, c_.K, packed_k_);
    E::pack(v_.at(first), c_.v_token, keys, c_.V, packed_v_);
    const int64_t width = round_up(keys, std::max(E::K_STEP, W));
    // few rows wait for memory: they go a block of sums at a time, so that fetching is spread over their products
    const int64_t step = E::M_STEP == 1 && count < PRODUCT_ROWS ? BLOCK_ROWS : PRODUCT_ROWS;
    const int64_t products = ceil_div(count, step), ahead = std::max<int64_t>(0, next_end - next);
    for (int64_t done = 0, product = 0; done < count; done += step, ++product) {
      const int64_t* rows = readers_ + done;
      const int64_t m = std::min(step, count - done);
      const int64_t fetched = next + product * ahead / products, wanted = next + (product + 1) * ahead / products;
      k_.fetch(c_.K, fetched, wanted);
      // rows that stand together are used where they are
      const bool together = rows[m - 1] - rows[0] == m - 1 && m % E::M_STEP == 0;
      const Element* q = q_ + rows[0] * k_width_;
      if (!together) {
        for (int64_t i = 0; i < m; ++i) std::copy_n(q_ + rows[i] * k_width_, k_width_, some_q_ + i * k_width_);
        q = some_q_;
      }
      E::template multiply<false>(m, keys, c_.K, q, k_width_, packed_k_, scores_, PANEL_KEYS);
      for (int64_t i = 0; i < m; ++i)
        exponentiate(rows[i], scores_ + i * PANEL_KEYS, std::min(keys, positions_[rows[i]] - first + 1), width,
               probs_ + i * width);
      v_.fetch(c_.V, fetched, wanted);
      if (together) {
        E::template multiply<true>(m, c_.V, keys, probs_, width, packed_v_, out_ + rows[0] * v_width_, v_width_);
        continue;
      }
      E::template multiply<false>(m, c_.V, keys, probs_, width, packed_v_, some_out_, v_width_);
      for (int64_t i = 0; i < m; ++i) {
        float* out = out_ + rows[i] * v_width_;
        for (int64_t x = 0; x < v_width_; x += W) store(out + x, load(out + x) + load(some_out_ + i * v_width_ + x));
      }
    }
  }

  // probs[0..seen) = 2^((scores - top) * factor), zero from there to `width`, and the row's sum.
  void exponentiate(int64_t row, float* scores, int64_t seen, int64_t width, Element* probs) {
    const vf factor = broadcast(factor_);
    const int64_t full = std::max<int64_t>(0, seen) / W * W;
    vf highest = broadcast(NONE);
    for (int64_t x = 0; x < full; x += W) highest = max(highest, load(scores + x));
    vf last{};
    if (full < seen) {
      last = first_lanes(seen - full, load(scores + full), broadcast(NONE));
      highest = max(highest, last);
    }
    if (any_above(highest, broadcast(tops_[row] + slack_))) rescale(row, max(highest));
    const vf top = broadcast(tops_[row]);
    vf total = load(sums_ + row * W);
    int64_t x = 0;
    for (; x < full; x += W) {
      vf p = exp2<sizeof(Element) == 2>((load(scores + x) - top) * factor);
      total += p;
      store(probs + x, p);
    }
    if (full < seen) {
      vf p = first_lanes(seen - full, exp2<sizeof(Element) == 2>((last - top) * factor), vf{});
      total += p;
      store(probs + x, p);
      x += W;
    }
    store(sums_ + row * W, total);
    for (; x < width; x += W) store(probs + x, vf{});
  }

  // A larger reference: what was read before shrinks.
  __attribute__((noinline)) void rescale(int64_t row, float top) {
    const float shrink = tops_[row] == NONE ? 0.0f : std::exp2((tops_[row] - top) * factor_);
    tops_[row] = top;
    store(sums_ + row * W, load(sums_ + row * W) * shrink);
    float* out = out_ + row * v_width_;
    for (int64_t x = 0; x < v_width_; x += W) store(out + x, load(out + x) * shrink);
  }

  const Call& c_;
  int64_t group_, num_rows_, k_width_, v_width_, last_;
  float factor_, slack_;
  const Places<T> k_, v_;
  Scratch scratch_;
  typename E::Session session_;
  Element *q_, *some_q_, *probs_, *packed_k_, *packed_v_;
  float *out_, *sums_, *tops_, *scores_, *some_out_;
  int64_t *positions_, *readers_;
};

template <class T>
void store_divided(const float* sums, float total, int64_t n, T* out) {
  // nothing read (padding): zero
  const float inverse = total == 0 ? 0.0f : 1.0f / total;
  int64_t x = 0;
  for (; x + W <= n; x += W) store(out + x, load(sums + x) * inverse);
  for (; x < n; ++x) out[x] = from_float<T>(sums[x] * inverse);
}

template <class T>
void attend(const Call& c, int64_t threads) {
  if (c.B * c.T * c.H * c.V == 0) return;
  const Plan plan = Plan::make<T>(c);
  const int64_t group = c.group(), part = 2 + c.V, tile_rows = plan.queries * group;
  if (plan.work < SMALL_WORK) threads = 1;
  // one (sum, top, result) for each row and segment
  std::vector<float> parts(plan.segments == 1 ? 0 : c.B * c.G * plan.tiles * plan.segments * tile_rows * part);
  const auto out_row = [&](int64_t b, int64_t g, int64_t tile, int64_t row) {
    const int64_t t = tile * plan.queries + row / group;
    return static_cast<T*>(c.out) + ((b * c.T + t) * c.H + g * group + row % group) * c.V;
  };
  parallel_for(c.B * c.G * plan.tiles * plan.segments, threads, [&](int64_t task) {
    const int64_t segment = task % plan.segments, whole = task / plan.segments;
    // the tiles that read most first
    const int64_t tile = plan.tiles - 1 - whole / (c.B * c.G), b = whole / c.G % c.B, g = whole % c.G;
    const int64_t first = tile * plan.queries, queries = std::min(plan.queries, c.T - first);
    if (segment >= plan.rows[b].segments) return;
    Tile<T> rows(c, b, g, first, queries);
    // a segment of dense attention is a range of blocks; of chosen ones, a range of the tile's
    int64_t skip = segment * plan.rows[b].segment_blocks, left = plan.rows[b].segment_blocks;
    Readers readers(c, b, g, first, queries, c.table ? 0 : skip);
    for (; c.table && skip && readers.block != END; --skip) readers.advance();
    while (left && readers.block != END) {
      const int64_t begin = readers.block;
      const uint64_t who = readers.who;
      int64_t count = 0;
      // neighbouring blocks of the same readers are one product, but none reaches over a multiple of PANEL_KEYS: so rows
      // in pages of such multiples are read as rows in one piece are
      do {
        readers.advance();
        ++count, --left;
      } while (left && readers.block == begin + count && readers.who == who &&
               (count + 1) * c.block_size <= plan.panel_keys && (begin + count) * c.block_size % PANEL_KEYS != 0);
      const int64_t next = left && readers.block != END ? readers.block * c.block_size : 0;
      const int64_t next_keys = next == 0 ? 0 : c.table ? c.block_size : plan.panel_keys;
      rows.read(begin * c.block_size, (begin + count) * c.block_size, who, plan.panel_keys, next, next + next_keys);
    }
    for (int64_t row = 0; row < rows.num_rows(); ++row) {
      if (plan.segments == 1) {
        store_divided(rows.out(row), rows.sum(row), c.V, out_row(b, g, tile, row));
        continue;
      }
      float* to = parts.data() + (task * tile_rows + row) * part;
      to[0] = rows.sum(row);
      to[1] = rows.top(row);
      std::copy_n(rows.out(row), c.V, to + 2);
    }
  });
  if (plan.segments == 1) return;
  const float factor = float(std::abs(c.scale) * LOG2_E);
  parallel_for(c.B * c.G * plan.tiles, threads, [&](int64_t whole) {
    const int64_t tile = plan.tiles - 1 - whole / (c.B * c.G), b = whole / c.G % c.B, g = whole % c.G;
    const int64_t queries = std::min(plan.queries, c.T - tile * plan.queries);
    std::vector<float> sums(c.V);
    for (int64_t row = 0; row < queries * group; ++row) {
      const float* from = parts.data() + (whole * plan.segments * tile_rows + row) * part;
      const int64_t step = tile_rows * part;
      float top = NONE, total = 0;
      for (int64_t s = 0; s < plan.rows[b].segments; ++s) top = std::max(top, from[s * step + 1]);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t s = 0; s < plan.rows[b].segments; ++s) {
        const float* one = from + s * step;
        if (one[0] == 0) continue;
        const float weight = std::exp2((one[1] - top) * factor);
        total += one[0] * weight;
        for (int64_t x = 0; x < c.V; ++x) sums[x] += one[2 + x] * weight;
      }
      store_divided(sums.data(), total, c.V, out_row(b, g, tile, row));
    }
  });
}

}  // namespace
}  // namespace sala

// bf16: whether q, k, v and out hold bfloat16, else float32. Strides are in elements; the last dimension's is 1.
SALA_EXPORT void sala_attention(int64_t bf16, const void* q, const void* k, const void* v, void* out,
                                const int64_t* positions, const int32_t* table, const int64_t* first_sparse,
                                const int32_t* pages, int64_t num_pages, int64_t page_size, int64_t B, int64_t T,
                                int64_t H, int64_t G, int64_t K, int64_t V, int64_t q_row, int64_t q_token,
                                int64_t q_head, int64_t k_row, int64_t k_token, int64_t k_head, int64_t v_row,
                                int64_t v_token, int64_t v_head, int64_t start, int64_t num_selected,
                                int64_t block_size, double scale, int64_t threads) {
  const sala::Call call{q,     k,         v,     out,     positions, table, first_sparse, pages,   num_pages,
                        page_size, B,     T,     H,       G,         K,     V,            q_row,   q_token,
                        q_head, k_row,    k_token, k_head, v_row,    v_token, v_head,     start,   num_selected,
                        block_size, scale};
  if (bf16)
    sala::attend<sala::bf16>(call, threads);
  else
    sala::attend<float>(call, threads);
}

SALA_REPLAY(sala_attention)
