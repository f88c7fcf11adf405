// Linears: their packed weights and their products with rows. See gemm.h.

#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "threads.h"

namespace calumma {

constexpr size_t kHugePageBytes = size_t{2} << 20;

Buffer::~Buffer() { std::free(memory_); }
Buffer::Buffer(Buffer &&other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}
Buffer &Buffer::operator=(Buffer &&other) noexcept {
  std::swap(memory_, other.memory_);
  return *this;
}

void Buffer::allocate(size_t bytes) {
  std::free(std::exchange(memory_, nullptr));
  const size_t unit = bytes >= kHugePageBytes ? kHugePageBytes : 64;
  bytes = std::max(unit, (bytes + unit - 1) / unit * unit);
  memory_ = std::aligned_alloc(unit, bytes);
  if (memory_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  // Fewer misses of the address cache; where the system has none to give, nothing is lost.
  if (unit == kHugePageBytes) madvise(memory_, bytes, MADV_HUGEPAGE);
#endif
  std::memset(memory_, 0, bytes);
}

Linear make_linear(int in, const std::vector<int> &parts, bool alternates) {
  Linear linear;
  linear.in = in;
  linear.alternates = alternates;
  linear.part_begin.push_back(0);
  for (int part = 0; part < static_cast<int>(parts.size()); ++part) {
    linear.part_begin.push_back(linear.part_begin.back() + parts[part]);
    for (int column = 0; column < parts[part]; column += kPanel) {
      linear.panels.push_back({part, column, std::min(kPanel, parts[part] - column)});
    }
  }
  linear.out = linear.part_begin.back();
  if (alternates) {
    std::stable_sort(linear.panels.begin(), linear.panels.end(),
                     [](const Panel &a, const Panel &b) { return a.column < b.column; });
  }
  return linear;
}

namespace {

class Packing : public Job {
 public:
  Packing(const Linear &linear, const calumma_bf16 *weight) : linear_(linear), weight_(weight) {}

  void work(Worker &worker) override {
    const int total = static_cast<int>(linear_.panels.size());
    for (int panel = worker.claim(); panel < total; panel = worker.claim()) pack(panel);
    worker.finish(total);
  }

 private:
  void pack(int index) const {
    const Panel &panel = linear_.panels[index];
    calumma_bf16 *to = const_cast<calumma_bf16 *>(linear_.panel_weights(index));
    for (int column = 0; column < panel.columns; ++column) {
      const size_t row = linear_.part_begin[panel.part] + panel.column + column;
      const calumma_bf16 *from = weight_ + row * linear_.in;
      for (int pair = 0; pair < linear_.pairs(); ++pair) {
        std::memcpy(to + (size_t{kPanel} * pair + column) * 2, from + size_t{2} * pair,
                    2 * sizeof *to);
      }
    }
  }

  const Linear &linear_;
  const calumma_bf16 *weight_;
};

void pack_bias(Linear &linear, const float *bias) {
  linear.bias.assign(linear.panels.size() * kPanel, 0.0f);
  for (size_t index = 0; index < linear.panels.size(); ++index) {
    const Panel &panel = linear.panels[index];
    const float *from = bias + linear.part_begin[panel.part] + panel.column;
    std::copy(from, from + panel.columns, linear.bias.begin() + index * kPanel);
  }
}

}  // namespace

void pack_linear(Linear &linear, const calumma_bf16 *weight, const float *bias, Crew &crew) {
  linear.packed.allocate(sizeof(calumma_bf16) * 2 * kPanel * linear.pairs() *
                         linear.panels.size());
  Packing packing(linear, weight);
  crew.run(packing, 1);
  linear.bias.clear();
  if (bias != nullptr) pack_bias(linear, bias);
}

Division::Division(const Linear &linear, int rows, int threads) {
  const int panels = static_cast<int>(linear.panels.size());
  row_parts = (rows + kChunkRows - 1) / kChunkRows;
  rows_each = row_parts == 0 ? 0 : (rows + row_parts - 1) / row_parts;
  // Smaller items where there would be too few to keep the threads equally busy.
  panels_each = kGroupPanels;
  const int least = linear.alternates ? 2 : 1;
  while (panels_each > least && panels * row_parts < panels_each * 4 * threads) panels_each /= 2;
  panel_parts = (panels + panels_each - 1) / panels_each;
}

Piece piece_of(const Division &division, const Linear &linear, int rows, int item) {
  Piece piece{};
  piece.first_row = item / division.panel_parts * division.rows_each;
  piece.rows = std::max(0, std::min(division.rows_each, rows - piece.first_row));
  piece.first_panel = item % division.panel_parts * division.panels_each;
  piece.panels = std::min(division.panels_each,
                          static_cast<int>(linear.panels.size()) - piece.first_panel);
  return piece;
}

}  // namespace calumma

#if defined(__x86_64__)

#include "tile.h"

CALUMMA_VECTOR_CODE

namespace calumma {
namespace {

// Pairs of inputs of a panel that are gone through for all rows before the next: 128 bytes each,
// so that they stay in the second-level cache meanwhile.
constexpr int kBlockPairs = 1024;

struct Span {
  int first_pair, pairs;
};

void multiply_rows(const Linear &linear, const bf16 *x, int x_stride, const Piece &piece,
                   const Span &span, int first_row, int rows, int panel, int vectors) {
  Tile tile{};
  tile.x = x + size_t(piece.first_row + first_row) * x_stride + size_t{2} * span.first_pair;
  tile.x_stride = x_stride;
  tile.w_stride = 2 * kPanel;
  tile.c_stride = kPanel;
  tile.pairs = span.pairs;
  tile.is_first = span.first_pair == 0;
  for (int v = 0; v < vectors; ++v) {
    const int at = panel + v / 2;
    tile.w[v] = linear.panel_weights(piece.first_panel + at) +
                size_t{2} * kPanel * span.first_pair + kHalves * (v % 2);
    tile.c[v] = piece.panel(at) + size_t{kPanel} * first_row + kLanes * (v % 2);
  }
  multiply_tile(tile, rows, vectors);
}

}  // namespace

void multiply(const Linear &linear, const bf16 *x, int x_stride, const Piece &piece) {
  const int rows_each = even_part(piece.rows, kTileRows);
  for (int pair = 0; pair < linear.pairs(); pair += kBlockPairs) {
    const Span span{pair, std::min(kBlockPairs, linear.pairs() - pair)};
    for (int panel = 0; panel < piece.panels;) {
      const int vectors = tile_vectors(rows_each, 2 * (piece.panels - panel));
      for (int row = 0; row < piece.rows; row += rows_each) {
        const int rows = std::min(rows_each, piece.rows - row);
        multiply_rows(linear, x, x_stride, piece, span, row, rows, panel, vectors);
      }
      panel += vectors / 2;
    }
  }
}

}  // namespace calumma

CALUMMA_VECTOR_CODE_END

#endif
