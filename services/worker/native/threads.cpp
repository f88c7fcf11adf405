// The threads that compute a step together: see threads.h.

#include "threads.h"

namespace calumma {
namespace {

constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kInside = kOpen - 1;
// About 20 us on AMD, 40 us on Intel: longer than nearly all waits between phases, and not so long
// that another process would miss the core.
constexpr int kSpins = 1024;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

int Worker::claim() {
  if (claimed_ >= 0) ++done_;
  claimed_ = crew_.phases_[phase_].claimed.fetch_add(1, std::memory_order_relaxed);
  return claimed_;
}

void Worker::finish(int total) {
  Crew::Phase &phase = crew_.phases_[phase_];
  // The last claim was of an item that does not exist; those before it were done.
  if (done_ > 0 && phase.done.fetch_add(done_) + done_ == total) crew_.wake();
  crew_.wait([&] { return phase.done.load() >= total; });
  ++phase_;
  claimed_ = -1;
  done_ = 0;
}

Crew::Crew(int threads) {
  try {
    for (int index = 1; index < threads; ++index) {
      helpers_.emplace_back([this, index] { serve(index); });
    }
  } catch (...) {
    stop();
    throw;
  }
}

Crew::~Crew() { stop(); }

void Crew::stop() {
  stopping_.store(true);
  wake();
  for (std::thread &helper : helpers_) helper.join();
}

void Crew::run(Job &job, int phases) {
  if (phases > num_phases_) {
    phases_ = std::make_unique<Phase[]>(phases);
    num_phases_ = phases;
  }
  for (int index = 0; index < phases; ++index) {
    phases_[index].claimed.store(0, std::memory_order_relaxed);
    phases_[index].done.store(0, std::memory_order_relaxed);
  }
  job_ = &job;
  const uint64_t generation = (gate_.load() >> 32) + 1;
  gate_.store(generation << 32 | kOpen);
  wake();
  Worker worker(*this, 0);
  job.work(worker);
  gate_.fetch_and(~kOpen);
  wait([&] { return (gate_.load() & kInside) == 0; });
}

void Crew::serve(int index) {
  uint32_t generation = 0;
  const auto is_called = [&] {
    const uint64_t gate = gate_.load();
    return stopping_.load() || ((gate & kOpen) != 0 && gate >> 32 != generation);
  };
  while (true) {
    wait(is_called);
    if (stopping_.load()) return;
    if (!enter(generation)) continue;
    Worker worker(*this, index);
    job_->work(worker);
    leave();
  }
}

bool Crew::enter(uint32_t &generation) {
  uint64_t gate = gate_.load();
  while ((gate & kOpen) != 0) {
    if (gate_.compare_exchange_weak(gate, gate + 1)) {
      generation = static_cast<uint32_t>(gate >> 32);
      return true;
    }
  }
  return false;
}

void Crew::leave() {
  const uint64_t gate = gate_.fetch_sub(1) - 1;
  if ((gate & (kOpen | kInside)) == 0) wake();
}

// A sleeper counts itself before it looks again, and who makes something ready does so before it
// looks for sleepers: one of the two sees the other.
template <class Ready>
void Crew::wait(Ready ready) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (ready()) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1);
  changed_.wait(lock, ready);
  sleepers_.fetch_sub(1);
}

void Crew::wake() {
  if (sleepers_.load() == 0) return;
  { std::lock_guard<std::mutex> lock(mutex_); }
  changed_.notify_all();
}

}  // namespace calumma
