// What a call is to compute. See plan.h.

#include "plan.h"

#include <algorithm>
#include <initializer_list>

namespace calumma {
namespace {

// Phases of a layer: four linears with a shrink each, two norms, rotation and attention.
constexpr int kLayerPhases = 12;
// Parts of the linear that has most.
constexpr int kPartsMax = 3;

const char *weights_fault(const calumma_model &model) {
  for (const Layer &layer : model.layers) {
    for (const Linear *linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
      if (linear->packed.as<void>() == nullptr) return "a linear was not set";
    }
    if (layer.input_norm.empty() || layer.ffn_norm.empty()) return "a norm was not set";
    if (layer.q_norm.empty() != layer.k_norm.empty()) return "only one norm of q and k was set";
  }
  if (model.head.packed.as<void>() == nullptr) return "the head was not set";
  if (model.final_norm.empty()) return "the final norm was not set";
  if (model.embedding == nullptr) return "the embedding was not set";
  if (model.cos.empty()) return "the rotation was not set";
  if (model.cache.memory == nullptr) return "the cache was not set";
  return nullptr;
}

const char *segment_fault(const calumma_model &model, const calumma_segment &segment) {
  const calumma_config &c = model.config;
  if (segment.rows < 1 || segment.start < 0) return "a segment without rows";
  if (int64_t{segment.start} + segment.rows > c.max_positions) return "a position is too high";
  if (segment.blocks == nullptr) return "a segment without blocks";
  const int blocks = (segment.start + segment.rows + c.block_tokens - 1) / c.block_tokens;
  for (int index = 0; index < blocks; ++index) {
    if (segment.blocks[index] < 0 || segment.blocks[index] >= model.cache.blocks) {
      return "a block is out of range";
    }
  }
  if (segment.adapter != nullptr && segment.adapter->model != &model) {
    return "an adapter of another model";
  }
  return nullptr;
}

const char *rows_fault(const calumma_model &model, const calumma_pass &pass) {
  int64_t rows = 0;
  for (int index = 0; index < pass.segments; ++index) {
    if (const char *fault = segment_fault(model, pass.segment[index])) return fault;
    rows += pass.segment[index].rows;
  }
  if (rows != pass.rows) return "the segments are not the rows of their pass";
  if (rows > 0 && pass.hidden == nullptr) return "a pass without memory";
  if (pass.first_layer > 0) return nullptr;
  if (rows > 0 && pass.token_ids == nullptr) return "a pass without tokens";
  for (int row = 0; row < pass.rows; ++row) {
    if (pass.token_ids[row] < 0 || pass.token_ids[row] >= model.config.vocab) {
      return "a token is out of range";
    }
  }
  return nullptr;
}

const char *pass_fault(const calumma_model &model, const calumma_pass &pass) {
  const int layers = model.config.layers;
  if (pass.rows < 0 || pass.segments < 0 || pass.wanted < 0) return "a count is out of range";
  if (pass.first_layer < 0 || pass.until_layer < pass.first_layer || pass.until_layer > layers) {
    return "a layer is out of range";
  }
  if (pass.wanted > 0 && pass.until_layer != layers) return "logits wanted of an unfinished pass";
  if (pass.wanted > 0 && pass.wanted_rows == nullptr) return "no wanted rows";
  if (pass.segments > 0 && pass.segment == nullptr) return "no segments";
  int before = -1;
  for (int index = 0; index < pass.wanted; ++index) {
    const int row = pass.wanted_rows[index];
    if (row <= before || row >= pass.rows) return "a wanted row is out of range or order";
    before = row;
  }
  return rows_fault(model, pass);
}

// Adds rows to those of their adapter.
void add_adapted(AdaptedPlan &plan, const calumma_adapter *adapter, int first, int rows) {
  if (adapter == nullptr) return;
  const auto [place, is_new] = plan.place.try_emplace(adapter, plan.adapters.size());
  if (is_new) plan.adapters.push_back({adapter, {}});
  plan.most_ranks = std::max(plan.most_ranks, adapter->most_ranks.load());
  std::vector<int> &all = plan.adapters[place->second].rows;
  for (int row = first; row < first + rows; ++row) all.push_back(row);
}

void add_segment(PassPlan &plan, const calumma_segment &segment, int rows_each) {
  const int first = static_cast<int>(plan.rows.size());
  for (int row = 0; row < segment.rows; ++row) {
    plan.rows.push_back({segment.blocks, segment.start + row});
  }
  for (int row = 0; row < segment.rows; row += rows_each) {
    plan.attention.push_back({segment.blocks, first + row, segment.start + row,
                              std::min(rows_each, segment.rows - row)});
  }
  add_adapted(plan.adapted, segment.adapter, first, segment.rows);
}

// The adapters of wanted rows, as the rows of the head.
void add_wanted(Plan &plan, const calumma_pass &pass) {
  int segment = 0, end = 0;
  for (int index = 0; index < pass.wanted; ++index) {
    while (pass.wanted_rows[index] >= end) end += pass.segment[segment++].rows;
    add_adapted(plan.head_adapted, pass.segment[segment - 1].adapter, plan.wanted + index, 1);
  }
  plan.wanted += pass.wanted;
}

}  // namespace

const char *find_fault(const calumma_model &model, const calumma_pass *passes, int count,
                       const calumma_scores *scores) {
  if (count < 0 || (count > 0 && passes == nullptr)) return "a count is out of range";
  if (const char *fault = weights_fault(model)) return fault;
  bool is_wanted = false;
  for (int index = 0; index < count; ++index) {
    if (const char *fault = pass_fault(model, passes[index])) return fault;
    is_wanted = is_wanted || passes[index].wanted > 0;
  }
  if (!is_wanted) return nullptr;
  if (scores == nullptr || scores->best == nullptr || scores->best_score == nullptr) {
    return "no memory for what is wanted";
  }
  return nullptr;
}

Plan make_plan(const calumma_model &model, const calumma_pass *passes, int count) {
  Plan plan;
  const int rows_each = rows_per_item(model.config.heads / model.config.kv_heads);
  for (int index = 0; index < count; ++index) {
    const calumma_pass &pass = passes[index];
    PassPlan added;
    added.pass = &pass;
    added.first_wanted = plan.wanted;
    added.rows.reserve(pass.rows);
    for (int at = 0; at < pass.segments; ++at) add_segment(added, pass.segment[at], rows_each);
    add_wanted(plan, pass);
    plan.most_rows = std::max(plan.most_rows, pass.rows);
    const size_t ranks = size_t(pass.rows) * added.adapted.most_ranks * kPartsMax;
    plan.ranks_size = std::max(plan.ranks_size, ranks);
    plan.phases += 2 + kLayerPhases * (pass.until_layer - pass.first_layer);
    plan.passes.push_back(std::move(added));
  }
  plan.ranks_size = std::max(plan.ranks_size, size_t(plan.wanted) * plan.head_adapted.most_ranks);
  plan.phases += 2;
  return plan;
}

}  // namespace calumma
