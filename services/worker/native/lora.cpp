// Adapters: what they add to linears. See lora.h.

#include "lora.h"

#include <algorithm>

namespace calumma {

int padded_rank(int rank) { return (rank + 3) / 4 * 4; }

}  // namespace calumma

#if defined(__x86_64__)

#include "tile.h"

CALUMMA_VECTOR_CODE

namespace calumma {
namespace {

// The sums over the lanes of four vectors.
__m128 lane_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 low = _mm512_shuffle_ps(ab, cd, 0x44);
  const __m512 high = _mm512_shuffle_ps(ab, cd, 0xee);
  const __m512 all = _mm512_add_ps(low, high);
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// G groups of four ranks and R rows at a time. Ranks that the adapter lacks are computed as its
// last one, then set to 0. The ranks that come next are asked for ahead of their use.
template <int G, int R>
void shrink_tile(const Pair &pair, const ShrinkItem &item, int rank, int row) {
  constexpr int ranks = 4 * G;
  __m512 acc[R][ranks];
  const bf16 *a[ranks];
  const bf16 *x[R];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) x[r] = item.x + size_t(item.rows[row + r]) * item.x_stride;
#pragma GCC unroll 8
  for (int i = 0; i < ranks; ++i) {
    a[i] = pair.a + size_t(std::min(rank + i, pair.rank - 1)) * pair.in;
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) acc[r][i] = _mm512_setzero_ps();
  }
  for (int k = 0; k < pair.in; k += kHalves) {
    const __mmask32 lanes = first_halves(pair.in - k);
    __m512i value[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) value[r] = load_bf16(x[r] + k);
#pragma GCC unroll 8
    for (int i = 0; i < ranks; ++i) {
      const __m512i factor = _mm512_maskz_loadu_epi16(lanes, a[i] + k);
      const bf16 *ahead = a[i] + k + size_t{ranks} * pair.in;
      _mm_prefetch(reinterpret_cast<const char *>(ahead), _MM_HINT_T1);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) acc[r][i] = add_products(acc[r][i], value[r], factor);
    }
  }
  const __m128 scale = _mm_set1_ps(pair.scale);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    bf16 *to = item.s + size_t(item.rows[row + r]) * item.s_stride + rank;
#pragma GCC unroll 2
    for (int i = 0; i < ranks; i += 4) {
      const __m128 sums = lane_sums(acc[r][i], acc[r][i + 1], acc[r][i + 2], acc[r][i + 3]);
      const __mmask8 there = static_cast<__mmask8>(first_lanes(pair.rank - rank - i));
      const __m128 s = _mm_maskz_mul_ps(there, scale, sums);
      _mm_storel_epi64(reinterpret_cast<__m128i *>(to + i), (__m128i)_mm_cvtneps_pbh(s));
    }
  }
}

using ShrinkKernel = void (*)(const Pair &, const ShrinkItem &, int, int);

constexpr int kShrinkTileRows = 6;

ShrinkKernel shrink_kernel(int groups, int rows) {
  static constexpr ShrinkKernel one[] = {shrink_tile<1, 1>, shrink_tile<1, 2>, shrink_tile<1, 3>,
                                         shrink_tile<1, 4>, shrink_tile<1, 5>, shrink_tile<1, 6>};
  static constexpr ShrinkKernel two[] = {shrink_tile<2, 1>, shrink_tile<2, 2>, shrink_tile<2, 3>};
  return groups == 2 ? two[rows - 1] : one[rows - 1];
}

// Columns of two rows of B side by side: pairs of 16 columns each.
struct Woven {
  __m512i low, high;
};

Woven weave(__m512i a, __m512i b) {
  alignas(64) static constexpr int16_t order[2 * kHalves] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  return {_mm512_permutex2var_epi16(a, _mm512_load_si512(order), b),
          _mm512_permutex2var_epi16(a, _mm512_load_si512(order + kHalves), b)};
}

// R rows and P panels at a time. Past the last rank and the last column there are zeros.
template <int R, int P>
void expand_tile(const Pair &pair, const ExpandItem &item, int row, int panel) {
  __m512 acc[R][2 * P];
  float *result[R];
  const bf16 *s[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const size_t at = item.rows[row + r];
    result[r] = item.result + size_t(panel) * item.panel_stride + (at - item.first_row) * kPanel;
    s[r] = item.s + at * item.s_stride;
  }
  const int column = item.first_column + panel * kPanel;
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < 2 * P; ++v) {
      const float *from = result[r] + size_t(v / 2) * item.panel_stride;
      acc[r][v] = _mm512_loadu_ps(from + kLanes * (v % 2));
    }
  }
  for (int rank = 0; rank < pair.rank; rank += 2) {
    const bf16 *bt = pair.bt + size_t(rank) * pair.out + column;
    const bool is_last = rank + 1 == pair.rank;
    Woven factor[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const __mmask32 lanes = first_halves(pair.out - column - p * kPanel);
      const __m512i a = _mm512_maskz_loadu_epi16(lanes, bt + p * kPanel);
      const __m512i b = _mm512_maskz_loadu_epi16(is_last ? 0 : lanes, bt + pair.out + p * kPanel);
      factor[p] = weave(a, b);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512i value = broadcast_pair(s[r] + rank);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        acc[r][2 * p] = add_products(acc[r][2 * p], value, factor[p].low);
        acc[r][2 * p + 1] = add_products(acc[r][2 * p + 1], value, factor[p].high);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < 2 * P; ++v) {
      float *to = result[r] + size_t(v / 2) * item.panel_stride;
      _mm512_storeu_ps(to + kLanes * (v % 2), acc[r][v]);
    }
  }
}

using ExpandKernel = void (*)(const Pair &, const ExpandItem &, int, int);

ExpandKernel expand_kernel(int rows, int panels) {
  static constexpr ExpandKernel one[] = {
      expand_tile<1, 1>, expand_tile<2, 1>, expand_tile<3, 1>,  expand_tile<4, 1>,
      expand_tile<5, 1>, expand_tile<6, 1>, expand_tile<7, 1>,  expand_tile<8, 1>,
      expand_tile<9, 1>, expand_tile<10, 1>, expand_tile<11, 1>, expand_tile<12, 1>};
  static constexpr ExpandKernel two[] = {expand_tile<1, 2>, expand_tile<2, 2>, expand_tile<3, 2>,
                                         expand_tile<4, 2>, expand_tile<5, 2>, expand_tile<6, 2>};
  static constexpr ExpandKernel four[] = {expand_tile<1, 4>, expand_tile<2, 4>, expand_tile<3, 4>};
  if (panels == 4) return four[rows - 1];
  return panels == 2 ? two[rows - 1] : one[rows - 1];
}

int expand_panels(int rows, int left) {
  if (rows <= 3 && left >= 4) return 4;
  return rows <= 6 && left >= 2 ? 2 : 1;
}

}  // namespace

void shrink(const Pair &pair, const ShrinkItem &item) {
  const int rows_each = even_part(item.count, kShrinkTileRows);
  const int end = std::min(padded_rank(pair.rank), item.first_rank + kShrinkRanks);
  for (int rank = item.first_rank; rank < end;) {
    const int groups = rows_each <= kShrinkTileRows / 2 && end - rank >= 8 ? 2 : 1;
    for (int row = 0; row < item.count; row += rows_each) {
      shrink_kernel(groups, std::min(rows_each, item.count - row))(pair, item, rank, row);
    }
    rank += 4 * groups;
  }
}

void expand(const Pair &pair, const ExpandItem &item) {
  const int rows_each = even_part(item.count, kTileRows);
  for (int panel = 0; panel < item.panels;) {
    const int panels = expand_panels(rows_each, item.panels - panel);
    for (int row = 0; row < item.count; row += rows_each) {
      expand_kernel(std::min(rows_each, item.count - row), panels)(pair, item, row, panel);
    }
    panel += panels;
  }
}

int ask_for_expansion(const Pair &pair, int first_column, int panels) {
  const int columns = std::min(panels * kPanel, pair.out - first_column);
  for (int rank = 0; rank < pair.rank; ++rank) {
    const bf16 *bt = pair.bt + size_t(rank) * pair.out + first_column;
    for (int column = 0; column < columns; column += kHalves) {
      _mm_prefetch(reinterpret_cast<const char *>(bt + column), _MM_HINT_T1);
    }
  }
  return pair.rank * columns * static_cast<int>(sizeof(bf16));
}

void add_embedding(const Pair &pair, int token, float *row) {
  for (int rank = 0; rank < pair.rank; ++rank) {
    const float factor = pair.scale * to_float(pair.a[size_t(rank) * pair.in + token]);
    const bf16 *bt = pair.bt + size_t(rank) * pair.out;
    for (int i = 0; i < pair.out; i += kLanes) {
      const __mmask16 lanes = first_lanes(pair.out - i);
      const __m512 value = to_float(_mm256_maskz_loadu_epi16(lanes, bt + i));
      const __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(factor), value,
                                         _mm512_maskz_loadu_ps(lanes, row + i));
      _mm512_mask_storeu_ps(row + i, lanes, sum);
    }
  }
}

}  // namespace calumma

CALUMMA_VECTOR_CODE_END

#endif
