// A model as the library holds it: packed weights, tables, its cache, its threads and the memory
// that a step works in.

#pragma once

#include <memory>
#include <vector>

#include "attention.h"
#include "epilogue.h"
#include "gemm.h"
#include "lora.h"
#include "step.h"
#include "threads.h"

namespace calumma {

constexpr int kHeadDimMax = 256;

struct Layer {
  Linear qkv, o, gate_up, down;
  std::vector<float> input_norm, ffn_norm;
  std::vector<float> q_norm, k_norm;  // empty: there is none
  bool rotates = true;
};

// What one thread needs for itself.
struct ThreadMemory {
  Buffer piece;  // floats of a Piece
  AttentionScratch attention;
};

// Rows of activations. What lies behind the values of a row stays 0.
struct Activations {
  Buffer memory;
  int stride = 0;

  calumma_bf16 *row(int index) const { return memory.as<calumma_bf16>() + size_t(index) * stride; }
};

// What a step writes between its phases, for as many rows as there ever were in a pass.
struct StepMemory {
  int rows = 0, wanted = 0;
  size_t ranks = 0;
  Activations x, queries, attended, gated, head_x;
  Buffer qkv;    // [rows, q + k + v] floats
  Buffer s;      // of adapters
  Buffer best;   // [threads, wanted] BestLanes
};

}  // namespace calumma

struct calumma_model {
  explicit calumma_model(const calumma_config &shape);

  int q_width() const { return config.heads * config.head_dim; }
  int kv_width() const { return config.kv_heads * config.head_dim; }
  int qkv_width() const { return q_width() + 2 * kv_width(); }
  // Makes room for passes of so many rows, so many wanted rows and so many ranks of all rows.
  void reserve(int rows, int wanted, size_t ranks);

  const calumma_config config;
  calumma::Crew crew;
  std::vector<calumma::Layer> layers;
  std::vector<float> final_norm;
  calumma::Linear head;
  const calumma_bf16 *embedding = nullptr;
  std::vector<float> cos, sin;
  calumma::Cache cache;
  std::vector<calumma::ThreadMemory> threads;
  calumma::StepMemory step;
};

namespace calumma {

// NULL if the model and the passes fit each other, else what is wrong.
const char *find_fault(const calumma_model &model, const calumma_pass *passes, int count,
                       const calumma_scores *scores);
// Runs passes without a fault. Throws std::bad_alloc.
void run_passes(calumma_model &model, const calumma_pass *passes, int count,
                const calumma_scores *scores);

}  // namespace calumma
