// Vectors of AVX-512 with bf16: the few operations that the kernels are made of.
//
// What stands between CALUMMA_VECTOR_CODE and CALUMMA_VECTOR_CODE_END is compiled for that
// instruction set, whatever the compiler's flags are. Nothing of it may run unless `calumma_isa`
// names the set.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "step.h"

// clang-format off
#if defined(__clang__)
#define CALUMMA_VECTOR_CODE \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512vl,avx512dq,avx512bf16\"))), apply_to = function)")
#define CALUMMA_VECTOR_CODE_END _Pragma("clang attribute pop")
#else
#define CALUMMA_VECTOR_CODE \
  _Pragma("GCC push_options") \
  _Pragma("GCC target(\"avx512f,avx512bw,avx512vl,avx512dq,avx512bf16\")")
#define CALUMMA_VECTOR_CODE_END _Pragma("GCC pop_options")
#endif
// clang-format on

CALUMMA_VECTOR_CODE

namespace calumma {

using bf16 = calumma_bf16;

// Floats in a vector, and bf16 values in one.
constexpr int kLanes = 16;
constexpr int kHalves = 32;

// Each lane adds the products of its two bf16 values to acc, in fp32.
static inline __m512 add_products(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

static inline __m512i load_bf16(const bf16 *from) { return _mm512_loadu_si512(from); }

// Two values that lie side by side, in all lanes.
static inline __m512i broadcast_pair(const bf16 *from) {
  int32_t pair;
  memcpy(&pair, from, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// The first `count` lanes, of those that there are.
static inline __mmask16 first_lanes(int count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}
static inline __mmask32 first_halves(int count) {
  if (count >= kHalves) return 0xffffffffu;
  return count <= 0 ? 0 : (1u << count) - 1;
}

static inline __m512 to_float(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}
static inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}
static inline __m256i to_bf16(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

static inline void store_bf16(bf16 *to, __mmask16 lanes, __m512 values) {
  _mm256_mask_storeu_epi16(to, lanes, to_bf16(values));
}

// 2^x to about 2e-7. NaN stays NaN: the second operand of min and max is what an unordered
// comparison gives.
static inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);
  x = _mm512_min_ps(_mm512_set1_ps(160.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);  // -0.5 .. 0.5; the series of 2^part
  __m512 sum = _mm512_set1_ps(1.5403530e-4f);
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.3333558e-3f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(9.6181291e-3f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(5.5504109e-2f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(2.4022651e-1f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(6.9314718e-1f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

// x / (1 + e^-x)
static inline __m512 silu(__m512 x) {
  const __m512 power = exp2(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
  return _mm512_div_ps(x, _mm512_add_ps(power, _mm512_set1_ps(1.0f)));
}

}  // namespace calumma

CALUMMA_VECTOR_CODE_END
