// What becomes of the products of a linear, piece by piece, while they are still in the cache.

#pragma once

#include "gemm.h"
#include "step.h"

namespace calumma {

// One thread's best logits of a row: lane by lane, over the columns that it has come by.
struct alignas(64) BestLanes {
  float score[16];
  int32_t id[16];
  int32_t has_nan;
};

void clear_best(BestLanes &best);
// Takes another thread's in; of equal scores the lowest id wins.
struct Best {
  int32_t id;
  float score;
};
Best best_of(const BestLanes *lanes, int threads, size_t distance);

// to [rows, stride] = result + bias, for all parts side by side.
void store_piece(const Linear &linear, const Piece &piece, float *to, int stride);
// to += result + bias
void add_piece(const Linear &linear, const Piece &piece, float *to, int stride);
// to = silu(gate) * up, rounded; the panels of gate and up alternate.
void gate_piece(const Linear &linear, const Piece &piece, calumma_bf16 *to, int stride);
// Logits: written where `logits` of a row is not NULL; the best of each row goes to `best[row]`.
void score_piece(const Linear &linear, const Piece &piece, float *const *logits, BestLanes *best);

}  // namespace calumma
