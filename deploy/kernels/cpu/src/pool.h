// Threads that work through a program of phases. A phase is a number of independent items; the next one begins when
// all of them are done. Which thread computes an item never changes what is computed.
//
// No phase waits for a thread, only for items: a thread that the system has taken away between two items delays
// nobody, and a pool whose threads all sleep (or were lost in a fork) is one thread slower, not stuck.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace understudy {

struct Phase {
  int32_t kind, layer, items;
};

class Program {
 public:
  virtual ~Program() = default;
  virtual void run(const Phase& phase, int32_t item, int32_t thread) = 0;
  std::vector<Phase> phases;  // every one with 1 … 65535 items
  bool is_timed = false;
  double begin = 0.0;        // seconds, where timed
  std::vector<double> ends;  // [phases]: when each was finished, where timed
};

class Pool {
 public:
  explicit Pool(int32_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int32_t threads() const { return threads_; }
  // Runs the program to its end, the calling thread included. One program at a time; others wait. What an item throws
  // comes out when all are done.
  void execute(Program& program);
  // The first item of a phase that thread `thread` is meant to start with.
  int32_t first_item(int32_t items, int32_t thread) const {
    const int32_t active = active_.load(std::memory_order_relaxed);
    return items * (thread < active ? thread : active) / active;
  }

 private:
  // Items [begin, end) of phase number `epoch` still to be claimed, in one word so that a claim can never reach a
  // phase other than the one it read. A thread takes from the front of its own share, then from the back of others'.
  struct alignas(64) Share {
    std::atomic<uint64_t> word{0};
  };

  bool claim_front(int32_t share, uint32_t& epoch, int32_t& item);
  bool claim_back(int32_t share, uint32_t& epoch, int32_t& item);
  bool claim(int32_t thread, uint32_t& epoch, int32_t& item);
  void publish(uint32_t epoch, int32_t items);
  void finish_items(uint32_t epoch, int32_t count);
  void advance(uint32_t epoch);
  void run_items(int32_t thread);
  void work(int32_t thread, uint32_t until);
  void wait_beyond(uint32_t epoch);
  void choose_active();
  void rest(int32_t thread);
  void serve(int32_t thread);
  void stop();

  const int32_t threads_;
  std::unique_ptr<Share[]> shares_;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int32_t> unfinished_{0};
  alignas(64) std::atomic<int32_t> sleepers_{0};
  std::atomic<bool> is_stopping_{false};
  // When other processes hold a core, a thread may be taken away with an item in its hands, and all wait until it runs
  // again. So after a program with much waiting fewer threads are used for a while.
  std::atomic<int32_t> active_;
  bool was_held_up_ = false;
  uint64_t waited_ = 0;
  int32_t programs_to_rest_ = 0, programs_since_rest_ = 0, rest_ = 16, delays_ = 0;
  Program* program_ = nullptr;
  std::exception_ptr failure_;  // the first of the running program, rethrown at its end
  uint32_t first_epoch_ = 1;  // of the running program
  std::mutex execute_mutex_, sleep_mutex_;
  std::condition_variable wake_, rested_;
  std::vector<std::thread> workers_;
};

}  // namespace understudy
