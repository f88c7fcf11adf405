// Adapters: their rows, as the caller holds them, and what they add to linears.
//
// What an adapter adds to a row is a sum over its ranks: first `s`, the row times each row of A
// (shrink), rounded to bf16 like any activation, with the scale in it; then the rows of B weighed
// with s (expand), upon the product with the base model's weights. Each row of A and B is read once
// for all rows that use the adapter. Ranks are as they are: nothing is padded but to a pair.

#pragma once

#include <atomic>
#include <vector>

#include "gemm.h"
#include "step.h"

namespace calumma {

struct Pair {
  const calumma_bf16 *a = nullptr;   // [rank, in]; NULL: the module is not adapted
  const calumma_bf16 *bt = nullptr;  // [rank, out]
  int rank = 0, in = 0, out = 0;
  float scale = 0.0f;
};

constexpr int kModules = CALUMMA_LM_HEAD + 1;
// Ranks that are one item of work in a shrink, and rows.
constexpr int kShrinkRanks = 32;
constexpr int kShrinkRows = 48;

// The rows that use one adapter, ascending, wherever they are.
struct AdaptedRows {
  const calumma_adapter *adapter;
  std::vector<int> rows;
};

// `s` of the rows of a linear: each part of a fused linear has `part_stride` ranks of each row.
struct Ranks {
  calumma_bf16 *values;
  int stride, part_stride;

  calumma_bf16 *at(int row, int part) const {
    return values + size_t(row) * stride + size_t(part) * part_stride;
  }
};

int padded_rank(int rank);

// s of some ranks from `first_rank` on, at most kShrinkRanks.
struct ShrinkItem {
  const calumma_bf16 *x;  // row 0; zero behind the values of a row up to whole vectors
  int x_stride;
  const int *rows;  // which rows of x, and of s
  int count;
  int first_rank;
  calumma_bf16 *s;  // row 0
  int s_stride;
};
void shrink(const Pair &pair, const ShrinkItem &item);

// Adds to panels of a part of a linear, from `first_column` of the part on, `panel_stride` floats
// from one to the next, each [rows, 32].
struct ExpandItem {
  const calumma_bf16 *s;  // row 0
  int s_stride;
  const int *rows;  // which rows of s, and of the panels
  int count;
  int first_column, panels;
  float *result;  // the first panel, whose first row is `first_row`
  int first_row, panel_stride;
};
void expand(const Pair &pair, const ExpandItem &item);
// Asks for what an expansion reads of B, ahead of it. Returns how many bytes that is.
int ask_for_expansion(const Pair &pair, int first_column, int panels);

// Adds to a row of the embedding, [out], what a token adds: its column of A, through B.
void add_embedding(const Pair &pair, int token, float *row);

}  // namespace calumma

struct calumma_adapter {
  explicit calumma_adapter(const calumma_model *owner, int layers)
      : model(owner), pairs(size_t(layers + 2) * calumma::kModules) {}

  // Layer -1 is the embedding, and the last one the head.
  const calumma::Pair &pair(int layer, int module) const {
    return pairs[size_t(layer + 1) * calumma::kModules + module];
  }

  const calumma_model *model;
  std::vector<calumma::Pair> pairs;
  // The highest rank, padded. It may grow while a pass uses layers that are there already.
  std::atomic<int> most_ranks{0};
};
