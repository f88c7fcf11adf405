// Attention over keys and values in blocks, and how a block is laid out.
//
// Keys lie in strips of tokens, [head_dim / 2][tokens][2], so that one load holds two dimensions of
// 16 tokens and scores come out side by side. Values lie in pairs of tokens, [head_dim][2], so that
// a pair is weighed and added at once. Where blocks are too small for whole strips, they are put
// together on the way.
//
// A row goes through the tiles of kTileTokens positions of its context from position 0, whoever it
// is computed with: its maximum, its sums and their rescaling are the same in every batch.

#pragma once

#include "gemm.h"
#include "step.h"

namespace calumma {

constexpr int kTileTokens = 64;
// Queries that share what is read of keys and values, where rows are that many.
constexpr int kItemQueries = 48;

struct Cache {
  calumma_bf16 *memory = nullptr;
  int blocks = 0;
  int layers = 0, kv_heads = 0, head_dim = 0, block_tokens = 0;
  int strip_tokens = 0;  // the largest power of two up to 16 that divides block_tokens

  size_t block_values() const {
    return size_t{2} * layers * kv_heads * block_tokens * head_dim;
  }
  calumma_bf16 *keys(int block, int layer, int head) const { return side(block, layer, 0, head); }
  calumma_bf16 *values(int block, int layer, int head) const { return side(block, layer, 1, head); }

 private:
  calumma_bf16 *side(int block, int layer, int which, int head) const {
    const size_t at = ((size_t(block) * layers + layer) * 2 + which) * kv_heads + head;
    return memory + at * block_tokens * head_dim;
  }
};

int strip_tokens_of(int block_tokens);
// Writes key and value [head_dim] of a token of a block.
struct Place {
  int block, token, layer, head;
};
void write_token(const Cache &cache, const Place &place, const calumma_bf16 *key,
                 const calumma_bf16 *value);

// What a thread needs besides: for up to `queries` queries at a time.
class AttentionScratch {
 public:
  void allocate(int queries, int head_dim);

  Buffer queries, keys, values, scores, weights, output, sums, highest;
};

// Consecutive rows of a sequence and the query heads of one KV head.
struct AttentionItem {
  const int32_t *blocks;
  int position, rows;  // of the first row
  int layer, head, group;  // KV head, and how many query heads it has
  const calumma_bf16 *queries;  // [rows, stride], the first head's values
  calumma_bf16 *output;         // likewise
  int stride, output_stride;
};
void attend(const Cache &cache, const AttentionItem &item, const AttentionScratch &scratch);

// Rows of an item, so that its queries are about kItemQueries.
int rows_per_item(int group);

}  // namespace calumma
