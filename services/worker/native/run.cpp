// The step: passes through the layers, then the head. Reading order is the order of the phases.

#include <algorithm>
#include <cstring>

#include "epilogue.h"
#include "model.h"
#include "norms.h"
#include "plan.h"
#include "threads.h"

#if defined(__x86_64__)

#include "vector.h"

CALUMMA_VECTOR_CODE

namespace calumma {
namespace {

// Rows that are one item of work where little is done for each.
constexpr int kItemRows = 4;

constexpr int kQkvModules[] = {CALUMMA_Q_PROJ, CALUMMA_K_PROJ, CALUMMA_V_PROJ};
constexpr int kOModules[] = {CALUMMA_O_PROJ};
constexpr int kGateUpModules[] = {CALUMMA_GATE_PROJ, CALUMMA_UP_PROJ};
constexpr int kDownModules[] = {CALUMMA_DOWN_PROJ};
constexpr int kHeadModules[] = {CALUMMA_LM_HEAD};

// What is asked for of adapters before the product that it is added to: a part of the second-level
// cache.
constexpr int kAskedBytesMax = 256 << 10;

// A linear of a layer, or the head, and how adapters target its parts.
struct Adapted {
  const Linear &linear;
  int layer;
  const int *modules;  // one for each part
  const std::vector<AdaptedRows> &adapters;
  Ranks s;

  const Pair &pair(const AdaptedRows &at, int part) const {
    return at.adapter->pair(layer, modules[part]);
  }
};

// Panels of one part in a piece, and how far they are from each other.
struct PanelRun {
  int first, count, distance;
};

// Rows of an adapter that lie in a piece.
struct RowSpan {
  const int *rows;
  int count;
};

RowSpan rows_in(const AdaptedRows &rows, const Piece &piece) {
  const auto first = std::lower_bound(rows.rows.begin(), rows.rows.end(), piece.first_row);
  const auto end = std::lower_bound(first, rows.rows.end(), piece.first_row + piece.rows);
  if (first == end) return {nullptr, 0};
  return {&*first, static_cast<int>(end - first)};
}

// A phase that does `act` to each of so many rows.
template <class Act>
void for_rows(Worker &worker, int rows, Act act) {
  const int total = (rows + kItemRows - 1) / kItemRows;
  for (int item = worker.claim(); item < total; item = worker.claim()) {
    const int end = std::min(rows, (item + 1) * kItemRows);
    for (int row = item * kItemRows; row < end; ++row) act(row);
  }
  worker.finish(total);
}

class Step : public Job {
 public:
  Step(calumma_model &model, const Plan &plan, const calumma_scores *scores)
      : model_(model), config_(model.config), memory_(model.step), plan_(plan), scores_(scores) {}

  void work(Worker &worker) override;

 private:
  void embed_row(const PassPlan &plan, int row);
  void layer(Worker &worker, const PassPlan &plan, int index);
  void norm(Worker &worker, const PassPlan &plan, const std::vector<float> &weight);
  void norm_wanted(Worker &worker, const PassPlan &plan);
  void rotate_row(const PassPlan &plan, int row, int layer);
  void attend_rows(Worker &worker, const PassPlan &plan, int layer);
  void head(Worker &worker);

  Ranks ranks_of(int parts, int most_ranks) const;
  void shrink_rows(Worker &worker, const Adapted &adapted, const Activations &x);
  void shrink_group(Walk &walk, const Adapted &adapted, const AdaptedRows &rows, int part,
                    const Activations &x);
  void expand_piece(const Adapted &adapted, const Piece &piece);
  void ask_for_adapters(const Adapted &adapted, const Piece &piece);
  template <class Finish>
  void apply(Worker &worker, const Adapted &adapted, const Activations &x, int rows, Finish finish);

  calumma_model &model_;
  const calumma_config &config_;
  const StepMemory &memory_;
  const Plan &plan_;
  const calumma_scores *scores_;
};

void Step::work(Worker &worker) {
  for (const PassPlan &plan : plan_.passes) {
    if (plan.pass->first_layer == 0) {
      for_rows(worker, plan.pass->rows, [&](int row) { embed_row(plan, row); });
    }
    for (int index = plan.pass->first_layer; index < plan.pass->until_layer; ++index) {
      layer(worker, plan, index);
    }
    norm_wanted(worker, plan);
  }
  head(worker);
}

void Step::embed_row(const PassPlan &plan, int row) {
  const int token = plan.pass->token_ids[row];
  const bf16 *from = model_.embedding + size_t(token) * config_.hidden;
  float *to = plan.pass->hidden + size_t(row) * config_.hidden;
  for (int i = 0; i < config_.hidden; ++i) to[i] = to_float(from[i]);
  for (const AdaptedRows &rows : plan.adapted.adapters) {
    const Pair &pair = rows.adapter->pair(-1, CALUMMA_EMBED_TOKENS);
    if (pair.a == nullptr || !std::binary_search(rows.rows.begin(), rows.rows.end(), row)) continue;
    add_embedding(pair, token, to);
  }
}

void Step::layer(Worker &worker, const PassPlan &plan, int index) {
  const Layer &layer = model_.layers[index];
  const int rows = plan.pass->rows, hidden = config_.hidden;
  float *residual = plan.pass->hidden;
  const auto adapted = [&](const Linear &linear, const int *modules) {
    const Ranks s = ranks_of(linear.parts(), plan.adapted.most_ranks);
    return Adapted{linear, index, modules, plan.adapted.adapters, s};
  };
  const auto add = [&](const Linear &linear, const Piece &piece) {
    add_piece(linear, piece, residual, hidden);
  };
  norm(worker, plan, layer.input_norm);
  apply(worker, adapted(layer.qkv, kQkvModules), memory_.x, rows,
        [&](const Linear &linear, const Piece &piece) {
          store_piece(linear, piece, memory_.qkv.as<float>(), model_.qkv_width());
        });
  for_rows(worker, rows, [&](int row) { rotate_row(plan, row, index); });
  attend_rows(worker, plan, index);
  apply(worker, adapted(layer.o, kOModules), memory_.attended, rows, add);
  norm(worker, plan, layer.ffn_norm);
  apply(worker, adapted(layer.gate_up, kGateUpModules), memory_.x, rows,
        [&](const Linear &linear, const Piece &piece) {
          gate_piece(linear, piece, memory_.gated.row(0), memory_.gated.stride);
        });
  apply(worker, adapted(layer.down, kDownModules), memory_.gated, rows, add);
}

void Step::norm(Worker &worker, const PassPlan &plan, const std::vector<float> &weight) {
  for_rows(worker, plan.pass->rows, [&](int row) {
    const float *from = plan.pass->hidden + size_t(row) * config_.hidden;
    normalize(from, weight.data(), config_.hidden, config_.norm_eps, memory_.x.row(row));
  });
}

void Step::norm_wanted(Worker &worker, const PassPlan &plan) {
  const int total = plan.pass->wanted;
  for (int item = worker.claim(); item < total; item = worker.claim()) {
    const float *from = plan.pass->hidden + size_t(plan.pass->wanted_rows[item]) * config_.hidden;
    normalize(from, model_.final_norm.data(), config_.hidden, config_.norm_eps,
              memory_.head_x.row(plan.first_wanted + item));
  }
  worker.finish(total);
}

// Norms and rotates q and k of a row, and puts k and v where the context lies.
void Step::rotate_row(const PassPlan &plan, int row, int layer) {
  const Layer &at = model_.layers[layer];
  const int dim = config_.head_dim, position = plan.rows[row].position;
  float *q = memory_.qkv.as<float>() + size_t(row) * model_.qkv_width();
  float *k = q + model_.q_width(), *v = k + model_.kv_width();
  const size_t angle = size_t(position) * (dim / 2);
  HeadTurn turn{nullptr, at.rotates ? model_.cos.data() + angle : nullptr,
                model_.sin.data() + angle, dim, config_.norm_eps};
  turn.weight = at.q_norm.empty() ? nullptr : at.q_norm.data();
  for (int head = 0; head < config_.heads; ++head) turn_head(turn, q + size_t(head) * dim);
  round_row(q, model_.q_width(), memory_.queries.row(row));
  turn.weight = at.k_norm.empty() ? nullptr : at.k_norm.data();
  const int block = plan.rows[row].blocks[position / config_.block_tokens];
  bf16 key[kHeadDimMax], value[kHeadDimMax];
  for (int head = 0; head < config_.kv_heads; ++head, k += dim, v += dim) {
    turn_head(turn, k);
    round_row(k, dim, key);
    round_row(v, dim, value);
    write_token(model_.cache, {block, position % config_.block_tokens, layer, head}, key, value);
  }
}

void Step::attend_rows(Worker &worker, const PassPlan &plan, int layer) {
  const int heads = config_.kv_heads, group = config_.heads / heads;
  const int total = static_cast<int>(plan.attention.size()) * heads;
  for (int index = worker.claim(); index < total; index = worker.claim()) {
    const AttentionRows &rows = plan.attention[index / heads];
    const int head = index % heads;
    const size_t column = size_t(head) * group * config_.head_dim;
    AttentionItem item;
    item.blocks = rows.blocks;
    item.position = rows.position;
    item.rows = rows.rows;
    item.layer = layer;
    item.head = head;
    item.group = group;
    item.queries = memory_.queries.row(rows.first_row) + column;
    item.output = memory_.attended.row(rows.first_row) + column;
    item.stride = memory_.queries.stride;
    item.output_stride = memory_.attended.stride;
    attend(model_.cache, item, model_.threads[worker.index()].attention);
  }
  worker.finish(total);
}

void Step::head(Worker &worker) {
  if (plan_.wanted == 0) return;
  BestLanes *best = memory_.best.as<BestLanes>() + size_t(worker.index()) * plan_.wanted;
  const Adapted adapted{model_.head, config_.layers, kHeadModules, plan_.head_adapted.adapters,
                        ranks_of(1, plan_.head_adapted.most_ranks)};
  apply(worker, adapted, memory_.head_x, plan_.wanted,
        [&](const Linear &linear, const Piece &piece) {
          score_piece(linear, piece, scores_->logits, best);
        });
}

Ranks Step::ranks_of(int parts, int most_ranks) const {
  return {memory_.s.as<bf16>(), parts * most_ranks, most_ranks};
}

// A linear with its adapters, for `rows` rows of x; `finish` takes each piece of the result.
template <class Finish>
void Step::apply(Worker &worker, const Adapted &adapted, const Activations &x, int rows,
                 Finish finish) {
  if (!adapted.adapters.empty()) shrink_rows(worker, adapted, x);
  const Linear &linear = adapted.linear;
  const Division division(linear, rows, config_.threads);
  float *result = model_.threads[worker.index()].piece.as<float>();
  for (int item = worker.claim(); item < division.items(); item = worker.claim()) {
    Piece piece = piece_of(division, linear, rows, item);
    piece.result = result;
    ask_for_adapters(adapted, piece);
    multiply(linear, x.row(0), x.stride, piece);
    expand_piece(adapted, piece);
    finish(linear, piece);
  }
  worker.finish(division.items());
}

void Step::shrink_rows(Worker &worker, const Adapted &adapted, const Activations &x) {
  Walk walk(worker);
  for (const AdaptedRows &rows : adapted.adapters) {
    for (int part = 0; part < adapted.linear.parts(); ++part) {
      shrink_group(walk, adapted, rows, part, x);
    }
  }
  walk.finish();
}

void Step::shrink_group(Walk &walk, const Adapted &adapted, const AdaptedRows &rows, int part,
                        const Activations &x) {
  const Pair &pair = adapted.pair(rows, part);
  if (pair.a == nullptr) return;
  const int count = static_cast<int>(rows.rows.size());
  for (int row = 0; row < count; row += kShrinkRows) {
    for (int rank = 0; rank < pair.rank; rank += kShrinkRanks) {
      if (!walk.take()) continue;
      shrink(pair, {x.row(0), x.stride, rows.rows.data() + row, std::min(kShrinkRows, count - row),
                    rank, adapted.s.at(0, part), adapted.s.stride});
    }
  }
}

// Calls `act` with the panels of each part in a piece: they lie side by side, or alternate.
template <class Act>
void for_parts(const Linear &linear, const Piece &piece, Act act) {
  if (linear.alternates) {
    for (int part = 0; part < 2; ++part) act(PanelRun{part, piece.panels / 2, 2});
    return;
  }
  const auto part_of = [&](int panel) { return linear.panels[piece.first_panel + panel].part; };
  for (int first = 0, end; first < piece.panels; first = end) {
    end = first + 1;
    while (end < piece.panels && part_of(end) == part_of(first)) ++end;
    act(PanelRun{first, end - first, 1});
  }
}

void Step::ask_for_adapters(const Adapted &adapted, const Piece &piece) {
  int bytes = 0;
  for (const AdaptedRows &rows : adapted.adapters) {
    if (bytes > kAskedBytesMax) return;
    if (rows_in(rows, piece).count == 0) continue;
    for_parts(adapted.linear, piece, [&](const PanelRun &run) {
      const Panel &panel = adapted.linear.panels[piece.first_panel + run.first];
      const Pair &pair = adapted.pair(rows, panel.part);
      if (pair.a != nullptr) bytes += ask_for_expansion(pair, panel.column, run.count);
    });
  }
}

void Step::expand_piece(const Adapted &adapted, const Piece &piece) {
  for (const AdaptedRows &rows : adapted.adapters) {
    const RowSpan span = rows_in(rows, piece);
    if (span.count == 0) continue;
    for_parts(adapted.linear, piece, [&](const PanelRun &run) {
      const Panel &panel = adapted.linear.panels[piece.first_panel + run.first];
      const Pair &pair = adapted.pair(rows, panel.part);
      if (pair.a == nullptr) return;
      expand(pair, {adapted.s.at(0, panel.part), adapted.s.stride, span.rows, span.count,
                    panel.column, run.count, piece.panel(run.first), piece.first_row,
                    kPanel * piece.rows * run.distance});
    });
  }
}

}  // namespace

void run_passes(calumma_model &model, const calumma_pass *passes, int count,
                const calumma_scores *scores) {
  const Plan plan = make_plan(model, passes, count);
  model.reserve(plan.most_rows, plan.wanted, plan.ranks_size);
  BestLanes *best = model.step.best.as<BestLanes>();
  for (int index = 0; index < plan.wanted * model.config.threads; ++index) clear_best(best[index]);
  Step step(model, plan, scores);
  model.crew.run(step, plan.phases);
  for (int row = 0; row < plan.wanted; ++row) {
    const Best found = best_of(best + row, model.config.threads, plan.wanted);
    scores->best[row] = found.id;
    scores->best_score[row] = found.score;
  }
}

}  // namespace calumma

CALUMMA_VECTOR_CODE_END

#else

namespace calumma {

// No model can be opened here, so there is none to run.
void run_passes(calumma_model &, const calumma_pass *, int, const calumma_scores *) {}

}  // namespace calumma

#endif
