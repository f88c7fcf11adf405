// The threads that compute a step together.
//
// Owns their lives and how work is handed out. A step is one function that all threads run from
// beginning to end: a sequence of phases, each of a number of items that threads claim one by one.
// A phase is over when all its items are done, not when all threads have come: a thread that the
// operating system holds back stalls nobody, it catches up by finding each phase already finished.
//
// Whoever waits spins for some tens of microseconds, then sleeps. Between steps all threads sleep.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace calumma {

class Crew;

// One thread's way through a step.
class Worker {
 public:
  Worker(Crew &crew, int index) : crew_(crew), index_(index) {}

  int index() const { return index_; }
  // The next item of the phase that nobody has; past the last one, a number that is too high.
  int claim();
  // Ends the phase: waits until its `total` items are done by whoever claimed them.
  void finish(int total);

 private:
  Crew &crew_;
  const int index_;
  int phase_ = 0;
  int claimed_ = -1;
  int done_ = 0;
};

// Claims items that are enumerated by loops: the same loops, in the same order, in each thread.
class Walk {
 public:
  explicit Walk(Worker &worker) : worker_(worker), mine_(worker.claim()) {}

  // Whether the item that the loops have come to is this thread's. It must then be done at once.
  bool take() {
    if (seen_++ != mine_) return false;
    mine_ = worker_.claim();
    return true;
  }
  void finish() { worker_.finish(seen_); }

 private:
  Worker &worker_;
  int mine_;
  int seen_ = 0;
};

class Job {
 public:
  virtual ~Job() = default;
  // Goes through the phases of the job. What it reads besides items' results must not change.
  virtual void work(Worker &worker) = 0;
};

class Crew {
 public:
  // `threads`, the calling one included. Throws std::system_error if they can't be had.
  explicit Crew(int threads);
  ~Crew();
  Crew(const Crew &) = delete;
  Crew &operator=(const Crew &) = delete;

  int threads() const { return static_cast<int>(helpers_.size()) + 1; }
  // Runs a job of at most `phases` phases, and returns when it is done.
  void run(Job &job, int phases);

 private:
  friend class Worker;
  struct alignas(64) Phase {
    std::atomic<int> claimed{0};
    std::atomic<int> done{0};
  };

  void serve(int index);
  bool enter(uint32_t &generation);
  void leave();
  void stop();
  template <class Ready>
  void wait(Ready ready);
  void wake();

  std::unique_ptr<Phase[]> phases_;
  int num_phases_ = 0;
  Job *job_ = nullptr;
  // Upper half: how many jobs there were. Lower half: whether one may be entered, and how many
  // helpers are inside.
  std::atomic<uint64_t> gate_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::thread> helpers_;
};

}  // namespace calumma
