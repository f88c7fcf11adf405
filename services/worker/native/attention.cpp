// Attention over keys and values in blocks. See attention.h.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace calumma {

int strip_tokens_of(int block_tokens) {
  int tokens = 16;
  while (block_tokens % tokens != 0) tokens /= 2;
  return tokens;
}

int rows_per_item(int group) { return std::max(1, kItemQueries / group); }

namespace {

int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }

}  // namespace

void AttentionScratch::allocate(int most_queries, int head_dim) {
  const size_t n = most_queries, dim = padded_dim(head_dim);
  queries.allocate(n * dim * sizeof(calumma_bf16));
  keys.allocate(kTileTokens * dim * sizeof(calumma_bf16));
  values.allocate(kTileTokens * dim * sizeof(calumma_bf16));
  scores.allocate(n * kTileTokens * sizeof(float));
  weights.allocate(n * kTileTokens * sizeof(calumma_bf16));
  output.allocate(n * dim * sizeof(float));
  sums.allocate(n * 16 * sizeof(float));
  highest.allocate(n * sizeof(float));
}

void write_token(const Cache &cache, const Place &place, const calumma_bf16 *key,
                 const calumma_bf16 *value) {
  const int dim = cache.head_dim, width = cache.strip_tokens;
  calumma_bf16 *keys = cache.keys(place.block, place.layer, place.head);
  keys += size_t(place.token / width) * width * dim + 2 * (place.token % width);
  for (int pair = 0; pair < dim / 2; ++pair) {
    std::memcpy(keys + size_t{2} * width * pair, key + 2 * pair, 2 * sizeof *keys);
  }
  calumma_bf16 *values = cache.values(place.block, place.layer, place.head);
  if (width == 1) {
    std::memcpy(values + size_t(place.token) * dim, value, dim * sizeof *values);
    return;
  }
  values += size_t(place.token / 2) * 2 * dim + place.token % 2;
  for (int i = 0; i < dim; ++i) values[2 * i] = value[i];
}

}  // namespace calumma

#if defined(__x86_64__)

#include "tile.h"

CALUMMA_VECTOR_CODE

namespace calumma {
namespace {

constexpr int kStrip = kLanes;
constexpr int kTilePairs = kTileTokens / 2;

// The tile of the context that is being gone through.
struct ContextTile {
  int first, tokens;               // its first position, and how many there are for the last row
  const bf16 *strips[kTileTokens / kStrip];  // of kStrip keys
  const bf16 *pairs[kTilePairs];   // of two values, [head_dim][2]
};

// A position of the context, and where its token lies.
class Cursor {
 public:
  Cursor(const Cache &cache, const AttentionItem &item, int position)
      : cache_(cache),
        item_(item),
        block_(item.blocks + position / cache.block_tokens),
        token_(position % cache.block_tokens) {}

  const bf16 *keys() const { return cache_.keys(*block_, item_.layer, item_.head); }
  const bf16 *values() const { return cache_.values(*block_, item_.layer, item_.head); }
  int token() const { return token_; }
  // A step never goes over the end of a block.
  void advance(int tokens) {
    token_ += tokens;
    if (token_ < cache_.block_tokens) return;
    token_ = 0;
    ++block_;
  }

 private:
  const Cache &cache_;
  const AttentionItem &item_;
  const int32_t *block_;
  int token_;
};

// Asks for keys or values of the positions of a tile ahead of their use: those of 16 tokens lie
// together, but the next ones may lie anywhere.
enum class Side { kKeys, kValues };
void ask_for(const Cache &cache, const AttentionItem &item, int first, Side side) {
  const int end = std::min(first + kTileTokens, item.position + item.rows);
  if (cache.strip_tokens != kStrip || first >= end) return;
  Cursor cursor(cache, item, first);
  const int values = kStrip * cache.head_dim;
  for (int position = first; position < end; position += kStrip, cursor.advance(kStrip)) {
    const bf16 *strip = side == Side::kKeys ? cursor.keys() : cursor.values();
    strip += size_t(cursor.token()) * cache.head_dim;
    for (int at = 0; at < values; at += kHalves) {
      _mm_prefetch(reinterpret_cast<const char *>(strip + at), _MM_HINT_T1);
    }
  }
}

// Keys of small blocks, put together to strips.
void gather_keys(const Cache &cache, const AttentionItem &item, ContextTile &tile, bf16 *to) {
  const int dim = cache.head_dim, width = cache.strip_tokens;
  Cursor cursor(cache, item, tile.first);
  for (int token = 0; token < tile.tokens; token += width, cursor.advance(width)) {
    const bf16 *from = cursor.keys() + size_t(cursor.token()) * dim;
    bf16 *strip = to + size_t(token / kStrip) * kStrip * dim + 2 * (token % kStrip);
    for (int pair = 0; pair < dim / 2; ++pair) {
      memcpy(strip + size_t{2} * kStrip * pair, from + size_t{2} * width * pair,
             2 * width * sizeof *to);
    }
  }
  for (int strip = 0; strip * kStrip < tile.tokens; ++strip) {
    tile.strips[strip] = to + size_t(strip) * kStrip * dim;
  }
}

void find_keys(const Cache &cache, const AttentionItem &item, ContextTile &tile, bf16 *scratch) {
  if (cache.strip_tokens != kStrip) return gather_keys(cache, item, tile, scratch);
  Cursor cursor(cache, item, tile.first);
  for (int token = 0; token < tile.tokens; token += kStrip, cursor.advance(kStrip)) {
    tile.strips[token / kStrip] = cursor.keys() + size_t(cursor.token()) * cache.head_dim;
  }
}

// Values of heads that are no whole vectors, or of blocks with an odd number of tokens.
void gather_values(const Cache &cache, const AttentionItem &item, ContextTile &tile, bf16 *to) {
  const int dim = cache.head_dim, padded = padded_dim(dim);
  const bool is_paired = cache.strip_tokens > 1;
  memset(to, 0, sizeof *to * kTileTokens * padded);
  Cursor cursor(cache, item, tile.first);
  for (int token = 0; token < tile.tokens; ++token, cursor.advance(1)) {
    const int at = cursor.token();
    const bf16 *from = cursor.values() + (is_paired ? at / 2 * 2 * dim + at % 2 : at * dim);
    bf16 *value = to + size_t(token / 2) * 2 * padded + token % 2;
    for (int i = 0; i < dim; ++i) value[2 * i] = from[is_paired ? 2 * i : i];
  }
  for (int pair = 0; pair < kTilePairs; ++pair) tile.pairs[pair] = to + size_t(pair) * 2 * padded;
}

void find_values(const Cache &cache, const AttentionItem &item, ContextTile &tile, bf16 *scratch) {
  if (cache.strip_tokens == 1 || cache.head_dim % kLanes != 0) {
    return gather_values(cache, item, tile, scratch);
  }
  Cursor cursor(cache, item, tile.first);
  for (int token = 0; token < tile.tokens; token += 2, cursor.advance(2)) {
    tile.pairs[token / 2] = cursor.values() + size_t(cursor.token()) * cache.head_dim;
  }
}

void score(const Cache &cache, const ContextTile &context, const AttentionScratch &scratch,
           int queries) {
  const int strips = (context.tokens + kStrip - 1) / kStrip;
  const int rows_each = even_part(queries, kTileRows);
  Tile tile{};
  tile.x_stride = padded_dim(cache.head_dim);
  tile.w_stride = 2 * kStrip;
  tile.c_stride = kTileTokens;
  tile.pairs = cache.head_dim / 2;
  tile.is_first = true;
  for (int row = 0; row < queries; row += rows_each) {
    const int rows = std::min(rows_each, queries - row);
    tile.x = scratch.queries.as<bf16>() + size_t(row) * tile.x_stride;
    for (int strip = 0; strip < strips;) {
      const int vectors = tile_vectors(rows, strips - strip);
      for (int v = 0; v < vectors; ++v) {
        tile.w[v] = context.strips[strip + v];
        tile.c[v] = scratch.scores.as<float>() + size_t(row) * kTileTokens + kLanes * (strip + v);
      }
      multiply_tile(tile, rows, vectors);
      strip += vectors;
    }
  }
}

// Scores of one query to weights; what was summed so far is brought to the new maximum.
void soften(const AttentionScratch &scratch, int query, int visible, int padded, float scale) {
  const float *scores = scratch.scores.as<float>() + size_t(query) * kTileTokens;
  bf16 *weights = scratch.weights.as<bf16>() + size_t(query) * kTileTokens;
  float &highest = scratch.highest.as<float>()[query];
  const __m512 low = _mm512_set1_ps(-INFINITY);
  __m512 powers[kTileTokens / kLanes];
  __m512 most = low;
  for (int v = 0; v < kTileTokens / kLanes; ++v) {
    const __mmask16 lanes = first_lanes(visible - kLanes * v);
    const __m512 value = _mm512_maskz_loadu_ps(lanes, scores + kLanes * v);
    powers[v] = _mm512_mask_mul_ps(low, lanes, value, _mm512_set1_ps(scale));
    most = _mm512_max_ps(most, powers[v]);
  }
  const float before = highest;
  highest = std::max(before, _mm512_reduce_max_ps(most));
  const __m512 top = _mm512_set1_ps(highest);
  const __m512 shrinking = exp2(_mm512_sub_ps(_mm512_set1_ps(before), top));
  float *sums = scratch.sums.as<float>() + size_t(query) * kLanes;
  __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(sums), shrinking);
  for (int v = 0; v < kTileTokens / kLanes; ++v) {
    const __mmask16 lanes = first_lanes(visible - kLanes * v);
    const __m512 power = _mm512_maskz_mov_ps(lanes, exp2(_mm512_sub_ps(powers[v], top)));
    sum = _mm512_add_ps(sum, power);
    store_bf16(weights + kLanes * v, 0xffff, power);
  }
  _mm512_storeu_ps(sums, sum);
  if (before == highest) return;
  float *output = scratch.output.as<float>() + size_t(query) * padded;
  for (int i = 0; i < padded; i += kLanes) {
    _mm512_storeu_ps(output + i, _mm512_mul_ps(_mm512_loadu_ps(output + i), shrinking));
  }
}

// Adds the weighed values of the tile to the queries' output.
void weigh(const ContextTile &context, const AttentionScratch &scratch, int queries, int padded) {
  const int rows_each = even_part(queries, kTileRows);
  Tile tile{};
  tile.x_stride = kTileTokens;
  tile.listed = context.pairs;
  tile.c_stride = padded;
  tile.pairs = (context.tokens + 1) / 2;
  for (int row = 0; row < queries; row += rows_each) {
    const int rows = std::min(rows_each, queries - row);
    tile.x = scratch.weights.as<bf16>() + size_t(row) * kTileTokens;
    for (int first = 0; first < padded;) {
      const int vectors = tile_vectors(rows, (padded - first) / kLanes);
      tile.listed_at = 2 * first;
      for (int v = 0; v < vectors; ++v) {
        tile.c[v] = scratch.output.as<float>() + size_t(row) * padded + first + kLanes * v;
      }
      multiply_listed_tile(tile, rows, vectors);
      first += kLanes * vectors;
    }
  }
}

// Queries as rows of equal distance, behind each other.
void gather_queries(const Cache &cache, const AttentionItem &item,
                    const AttentionScratch &scratch) {
  const int dim = cache.head_dim, padded = padded_dim(dim);
  bf16 *to = scratch.queries.as<bf16>();
  for (int row = 0; row < item.rows; ++row) {
    for (int head = 0; head < item.group; ++head, to += padded) {
      memcpy(to, item.queries + size_t(row) * item.stride + size_t(head) * dim, dim * sizeof *to);
    }
  }
}

void write_output(const Cache &cache, const AttentionItem &item, const AttentionScratch &scratch) {
  const int dim = cache.head_dim, padded = padded_dim(dim);
  for (int query = 0; query < item.rows * item.group; ++query) {
    const float *sums = scratch.sums.as<float>() + size_t(query) * kLanes;
    const float *from = scratch.output.as<float>() + size_t(query) * padded;
    const __m512 factor = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_loadu_ps(sums)));
    bf16 *to = item.output + size_t(query / item.group) * item.output_stride +
               size_t(query % item.group) * dim;
    for (int i = 0; i < dim; i += kLanes) {
      const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(from + i), factor);
      store_bf16(to + i, first_lanes(dim - i), value);
    }
  }
}

}  // namespace

void attend(const Cache &cache, const AttentionItem &item, const AttentionScratch &scratch) {
  const int queries = item.rows * item.group, padded = padded_dim(cache.head_dim);
  const float scale = 1.44269504f / std::sqrt(static_cast<float>(cache.head_dim));
  ask_for(cache, item, 0, Side::kKeys);
  gather_queries(cache, item, scratch);
  memset(scratch.output.as<float>(), 0, sizeof(float) * queries * padded);
  memset(scratch.sums.as<float>(), 0, sizeof(float) * queries * kLanes);
  std::fill_n(scratch.highest.as<float>(), queries, -INFINITY);
  const int end = item.position + item.rows;
  ContextTile tile{};
  for (tile.first = 0; tile.first < end; tile.first += kTileTokens) {
    tile.tokens = std::min(kTileTokens, end - tile.first);
    ask_for(cache, item, tile.first, Side::kValues);
    ask_for(cache, item, tile.first + kTileTokens, Side::kKeys);
    find_keys(cache, item, tile, scratch.keys.as<bf16>());
    find_values(cache, item, tile, scratch.values.as<bf16>());
    score(cache, tile, scratch, queries);
    for (int query = 0; query < queries; ++query) {
      const int visible = item.position + query / item.group + 1 - tile.first;
      soften(scratch, query, visible, padded, scale);
    }
    weigh(tile, scratch, queries, padded);
  }
  write_output(cache, item, scratch);
}

}  // namespace calumma

CALUMMA_VECTOR_CODE_END

#endif
