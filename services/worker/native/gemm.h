// Linears: their packed weights and their products with rows.
//
// Weights are packed in panels of 32 outputs, [pairs of inputs][32][2], so that one load feeds
// two vectors of results. A panel belongs to one module: q, k and v each begin a new one, and the
// panels of gate and up alternate, so that who computes one has the other at hand.

#pragma once

#include <memory>
#include <vector>

#include "step.h"

namespace calumma {

class Crew;

constexpr int kPanel = 32;
// Panels that are computed in one go, and rows.
constexpr int kGroupPanels = 4;
constexpr int kChunkRows = 120;

// Zeroed memory for whole vectors.
struct Buffer {
  Buffer() = default;
  ~Buffer();
  Buffer(Buffer &&other) noexcept;
  Buffer &operator=(Buffer &&other) noexcept;
  // Drops what it held. Throws std::bad_alloc.
  void allocate(size_t bytes);
  template <class T>
  T *as() const {
    return static_cast<T *>(memory_);
  }

 private:
  void *memory_ = nullptr;
};

struct Panel {
  int part;    // of the fused linear
  int column;  // its first one within the part
  int columns;
};

struct Linear {
  int in = 0, out = 0;
  bool alternates = false;
  std::vector<int> part_begin;  // outputs: where parts begin, and the end
  std::vector<Panel> panels;
  std::vector<float> bias;  // [panels][32]; empty if there is none
  Buffer packed;

  int pairs() const { return in / 2; }
  int parts() const { return static_cast<int>(part_begin.size()) - 1; }
  const calumma_bf16 *panel_weights(int panel) const {
    return packed.as<calumma_bf16>() + size_t{2} * kPanel * pairs() * panel;
  }
};

// A linear of `parts` outputs each. Throws std::bad_alloc.
Linear make_linear(int in, const std::vector<int> &parts, bool alternates);
void pack_linear(Linear &linear, const calumma_bf16 *weight, const float *bias, Crew &crew);

// How the result of a linear is divided into items of work.
struct Division {
  Division(const Linear &linear, int rows, int threads);
  int items() const { return row_parts * panel_parts; }

  int rows_each, row_parts, panels_each, panel_parts;
};

// A part of a result: panels one behind the other, each [rows, 32].
struct Piece {
  int first_row, rows, first_panel, panels;
  float *result;

  float *panel(int index) const { return result + size_t{kPanel} * rows * index; }
};

Piece piece_of(const Division &division, const Linear &linear, int rows, int item);
// The product of the piece's rows of x [rows, stride] and its columns of the weights.
void multiply(const Linear &linear, const calumma_bf16 *x, int x_stride, const Piece &piece);

}  // namespace calumma
