// The innermost loop of all products: a few rows times a few vectors of columns, in registers.
//
// An element of the result is one chain of `add_products` over pairs of the inner dimension, from
// the first to the last, whatever the tile it is computed in: so its bits do not depend on how many
// rows there are. Partial sums may be stored and taken up again, which changes nothing.

#pragma once

#include "vector.h"

namespace calumma {

constexpr int kTileRows = 12;
constexpr int kTileVectors = 4;
// Registers of 32 that hold results; the others hold the factors.
constexpr int kTileResults = 24;

// Column vector v of the result is `c[v]`, 16 floats per row. Its factor is 16 pairs for each pair
// of the inner dimension: at `w[v]` and each `w_stride` values from there, or, where the factors
// lie scattered, at `listed[pair] + listed_at` and behind it.
struct Tile {
  const bf16 *x;  // [rows, 2 * pairs]
  int x_stride;
  const bf16 *w[kTileVectors];
  int w_stride;
  const bf16 *const *listed;
  int listed_at;
  float *c[kTileVectors];
  int c_stride;
  int pairs;
  bool is_first;  // c holds nothing yet
};

// Up to kTileRows rows; as many vectors as `tile_vectors` says.
void multiply_tile(const Tile &tile, int rows, int vectors);
// With scattered factors.
void multiply_listed_tile(const Tile &tile, int rows, int vectors);

// How many vectors may go with so many rows: 4, 2 or 1 of those that are left.
static inline int tile_vectors(int rows, int left) {
  if (left >= 4 && rows * 4 <= kTileResults) return 4;
  return left >= 2 ? 2 : 1;
}

// Rows in equal parts of at most `limit`: how many each has, but for the last.
static inline int even_part(int rows, int limit) {
  const int parts = (rows + limit - 1) / limit;
  return (rows + parts - 1) / parts;
}

}  // namespace calumma
