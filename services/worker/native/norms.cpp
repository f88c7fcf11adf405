// What is done to single rows. See norms.h.

#include "norms.h"

#include <cmath>

#if defined(__x86_64__)

#include "vector.h"

CALUMMA_VECTOR_CODE

namespace calumma {
namespace {

// One over the root of the mean square.
float inverse_rms(const float *x, int size, float eps) {
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < size; i += kLanes) {
    const __m512 value = _mm512_maskz_loadu_ps(first_lanes(size - i), x + i);
    sum = _mm512_fmadd_ps(value, value, sum);
  }
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(size) + eps);
}

void norm_head(const HeadTurn &turn, float *head) {
  const __m512 factor = _mm512_set1_ps(inverse_rms(head, turn.head_dim, turn.eps));
  for (int i = 0; i < turn.head_dim; i += kLanes) {
    const __mmask16 lanes = first_lanes(turn.head_dim - i);
    const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, head + i), factor);
    const __m512 weight = _mm512_maskz_loadu_ps(lanes, turn.weight + i);
    _mm512_mask_storeu_ps(head + i, lanes, _mm512_mul_ps(value, weight));
  }
}

void rotate_head(const HeadTurn &turn, float *head) {
  const int half = turn.head_dim / 2;
  for (int i = 0; i < half; i += kLanes) {
    const __mmask16 lanes = first_lanes(half - i);
    const __m512 a = _mm512_maskz_loadu_ps(lanes, head + i);
    const __m512 b = _mm512_maskz_loadu_ps(lanes, head + half + i);
    const __m512 cos = _mm512_maskz_loadu_ps(lanes, turn.cos + i);
    const __m512 sin = _mm512_maskz_loadu_ps(lanes, turn.sin + i);
    const __m512 turned_a = _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin));
    const __m512 turned_b = _mm512_fmadd_ps(b, cos, _mm512_mul_ps(a, sin));
    _mm512_mask_storeu_ps(head + i, lanes, turned_a);
    _mm512_mask_storeu_ps(head + half + i, lanes, turned_b);
  }
}

}  // namespace

void normalize(const float *x, const float *weight, int size, float eps, bf16 *to) {
  const __m512 factor = _mm512_set1_ps(inverse_rms(x, size, eps));
  for (int i = 0; i < size; i += kLanes) {
    const __mmask16 lanes = first_lanes(size - i);
    const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), factor);
    store_bf16(to + i, lanes, _mm512_mul_ps(value, _mm512_maskz_loadu_ps(lanes, weight + i)));
  }
}

void turn_head(const HeadTurn &turn, float *head) {
  if (turn.weight != nullptr) norm_head(turn, head);
  if (turn.cos != nullptr) rotate_head(turn, head);
}

void round_row(const float *from, int size, bf16 *to) {
  for (int i = 0; i < size; i += kLanes) {
    const __mmask16 lanes = first_lanes(size - i);
    store_bf16(to + i, lanes, _mm512_maskz_loadu_ps(lanes, from + i));
  }
}

}  // namespace calumma

CALUMMA_VECTOR_CODE_END

#endif
