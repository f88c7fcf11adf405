// What becomes of the products of a linear. See epilogue.h.

#include "epilogue.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace calumma {

void clear_best(BestLanes &best) {
  std::fill_n(best.score, 16, -INFINITY);
  std::fill_n(best.id, 16, 0);
  best.has_nan = 0;
}

Best best_of(const BestLanes *lanes, int threads, size_t distance) {
  Best best{0, -INFINITY};
  bool has_nan = false;
  for (int thread = 0; thread < threads; ++thread, lanes += distance) {
    has_nan = has_nan || lanes->has_nan != 0;
    for (int lane = 0; lane < 16; ++lane) {
      const float score = lanes->score[lane];
      const int32_t id = lanes->id[lane];
      if (score > best.score || (score == best.score && id < best.id)) best = {id, score};
    }
  }
  if (has_nan) best.score = std::numeric_limits<float>::quiet_NaN();
  return best;
}

}  // namespace calumma

#if defined(__x86_64__)

#include "vector.h"

CALUMMA_VECTOR_CODE

namespace calumma {
namespace {

// Half a panel of a row, with its bias.
struct Half {
  const float *bias;

  Half(const Linear &linear, int panel, int half)
      : bias(linear.bias.empty() ? nullptr
                                 : linear.bias.data() + size_t{kPanel} * panel + kLanes * half) {}
  __m512 operator()(const float *result) const {
    const __m512 value = _mm512_loadu_ps(result);
    return bias == nullptr ? value : _mm512_add_ps(value, _mm512_loadu_ps(bias));
  }
};

int column_of(const Linear &linear, int panel) {
  return linear.part_begin[linear.panels[panel].part] + linear.panels[panel].column;
}

template <class Put>
void put_piece(const Linear &linear, const Piece &piece, float *to, int stride, Put put) {
  for (int p = 0; p < piece.panels; ++p) {
    const int panel = piece.first_panel + p;
    for (int half = 0; half < 2; ++half) {
      const __mmask16 lanes = first_lanes(linear.panels[panel].columns - kLanes * half);
      const Half value(linear, panel, half);
      const float *from = piece.panel(p) + kLanes * half;
      float *at = to + size_t(piece.first_row) * stride + column_of(linear, panel) + kLanes * half;
      for (int row = 0; row < piece.rows; ++row, from += kPanel, at += stride) {
        put(at, lanes, value(from));
      }
    }
  }
}

struct Store {
  void operator()(float *at, __mmask16 lanes, __m512 value) const {
    _mm512_mask_storeu_ps(at, lanes, value);
  }
};

struct Add {
  void operator()(float *at, __mmask16 lanes, __m512 value) const {
    const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, at), value);
    _mm512_mask_storeu_ps(at, lanes, sum);
  }
};

void gate_half(const Linear &linear, const Piece &piece, int p, int half, bf16 *to, int stride) {
  const Panel &panel = linear.panels[piece.first_panel + p];
  const Half gate(linear, piece.first_panel + p, half), up(linear, piece.first_panel + p + 1, half);
  const __mmask16 lanes = first_lanes(panel.columns - kLanes * half);
  bf16 *at = to + size_t(piece.first_row) * stride + panel.column + kLanes * half;
  for (int row = 0; row < piece.rows; ++row, at += stride) {
    const size_t from = size_t{kPanel} * row + kLanes * half;
    const __m512 value = silu(gate(piece.panel(p) + from));
    store_bf16(at, lanes, _mm512_mul_ps(value, up(piece.panel(p + 1) + from)));
  }
}

void take_best(BestLanes &best, __mmask16 lanes, __m512 value, int column) {
  const __m512i ids = _mm512_add_epi32(
      _mm512_set1_epi32(column),
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512 before = _mm512_load_ps(best.score);
  const __mmask16 is_more = _mm512_mask_cmp_ps_mask(lanes, value, before, _CMP_GT_OQ);
  _mm512_mask_storeu_ps(best.score, is_more, value);
  _mm512_mask_storeu_epi32(best.id, is_more, ids);
  best.has_nan |= _mm512_mask_cmp_ps_mask(lanes, value, value, _CMP_UNORD_Q);
}

}  // namespace

void store_piece(const Linear &linear, const Piece &piece, float *to, int stride) {
  put_piece(linear, piece, to, stride, Store());
}

void add_piece(const Linear &linear, const Piece &piece, float *to, int stride) {
  put_piece(linear, piece, to, stride, Add());
}

void gate_piece(const Linear &linear, const Piece &piece, bf16 *to, int stride) {
  for (int p = 0; p < piece.panels; p += 2) {
    for (int half = 0; half < 2; ++half) gate_half(linear, piece, p, half, to, stride);
  }
}

void score_piece(const Linear &linear, const Piece &piece, float *const *logits, BestLanes *best) {
  for (int p = 0; p < piece.panels; ++p) {
    const int panel = piece.first_panel + p;
    for (int half = 0; half < 2; ++half) {
      const __mmask16 lanes = first_lanes(linear.panels[panel].columns - kLanes * half);
      const int column = linear.panels[panel].column + kLanes * half;
      const Half value_of(linear, panel, half);
      for (int row = 0; row < piece.rows; ++row) {
        const __m512 value = value_of(piece.panel(p) + size_t{kPanel} * row + kLanes * half);
        take_best(best[piece.first_row + row], lanes, value, column);
        if (logits != nullptr && logits[piece.first_row + row] != nullptr) {
          _mm512_mask_storeu_ps(logits[piece.first_row + row] + column, lanes, value);
        }
      }
    }
  }
}

}  // namespace calumma

CALUMMA_VECTOR_CODE_END

#endif
