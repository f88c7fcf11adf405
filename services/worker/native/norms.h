// What is done to single rows: norms, rotation of heads, and where keys and values go.

#pragma once

#include "step.h"

namespace calumma {

// to [size] = x / rms(x) * weight, rounded.
void normalize(const float *x, const float *weight, int size, float eps, calumma_bf16 *to);

// A head of a row, normed where `weight` is not NULL and rotated where `cos` is not: in place.
struct HeadTurn {
  const float *weight;
  const float *cos, *sin;  // [head_dim / 2]
  int head_dim;
  float eps;
};
void turn_head(const HeadTurn &turn, float *head);

void round_row(const float *from, int size, calumma_bf16 *to);

}  // namespace calumma
