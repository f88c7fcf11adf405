// What a call is to compute, found out before its threads begin: faults, and for each pass where
// its rows lie, which of them attend together and which use the same adapter.

#pragma once

#include <unordered_map>
#include <vector>

#include "lora.h"
#include "model.h"
#include "step.h"

namespace calumma {

struct Row {
  const int32_t *blocks;
  int position;
};

// Consecutive rows of one sequence that attend together.
struct AttentionRows {
  const int32_t *blocks;
  int first_row, position, rows;
};

// The rows of a pass, or of the head, by their adapters.
struct AdaptedPlan {
  std::vector<AdaptedRows> adapters;
  std::unordered_map<const calumma_adapter *, size_t> place;
  int most_ranks = 0;  // padded
};

struct PassPlan {
  const calumma_pass *pass;
  std::vector<Row> rows;
  std::vector<AttentionRows> attention;
  AdaptedPlan adapted;
  int first_wanted = 0;  // its first wanted row, among those of all passes
};

struct Plan {
  std::vector<PassPlan> passes;
  int wanted = 0, most_rows = 0;
  AdaptedPlan head_adapted;
  size_t ranks_size = 0;  // values of `s` for any of the linears
  int phases = 0;
};

Plan make_plan(const calumma_model &model, const calumma_pass *passes, int count);

}  // namespace calumma
