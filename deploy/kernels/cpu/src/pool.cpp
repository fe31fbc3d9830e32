#include "pool.h"

#include <algorithm>
#include <ctime>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "rounding.h"

namespace understudy {

namespace {

constexpr int32_t kSpins = 3000;  // pauses before a thread sleeps
constexpr double kHeldUpPart = 0.25;  // of a program's time that the caller waited or did not run
constexpr int32_t kDelaysToRest = 6, kShortestRest = 16, kLongestRest = 128;  // programs

uint64_t make_word(uint32_t epoch, uint32_t begin, uint32_t end) {
  return static_cast<uint64_t>(epoch) << 32 | begin << 16 | end;
}
uint32_t epoch_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
uint32_t begin_of(uint64_t word) { return static_cast<uint32_t>(word >> 16) & 0xffff; }
uint32_t end_of(uint64_t word) { return static_cast<uint32_t>(word) & 0xffff; }

void pause() {
#ifdef __x86_64__
  _mm_pause();
#endif
}

double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// A cheap clock of any constant rate.
uint64_t ticks() {
#ifdef __x86_64__
  return __rdtsc();
#else
  return static_cast<uint64_t>(1e9 * seconds(CLOCK_MONOTONIC));
#endif
}

}  // namespace

Pool::Pool(int32_t threads)
    : threads_(threads), shares_(new Share[static_cast<size_t>(threads)]), active_(threads) {
  try {
    for (int32_t i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  } catch (const std::system_error&) {
    const std::string started = std::to_string(workers_.size() + 1);
    stop();
    throw std::runtime_error("the system starts no more than " + started + " threads here; use fewer");
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    is_stopping_ = true;
    epoch_.fetch_add(1);
  }
  wake_.notify_all();
  rested_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool Pool::claim_front(int32_t share, uint32_t& epoch, int32_t& item) {
  std::atomic<uint64_t>& word = shares_[static_cast<size_t>(share)].word;
  uint64_t seen = word.load(std::memory_order_acquire);
  while (begin_of(seen) < end_of(seen)) {
    const uint64_t rest = make_word(epoch_of(seen), begin_of(seen) + 1, end_of(seen));
    if (word.compare_exchange_weak(seen, rest, std::memory_order_acq_rel)) {
      epoch = epoch_of(seen);
      item = static_cast<int32_t>(begin_of(seen));
      return true;
    }
  }
  return false;
}

bool Pool::claim_back(int32_t share, uint32_t& epoch, int32_t& item) {
  std::atomic<uint64_t>& word = shares_[static_cast<size_t>(share)].word;
  uint64_t seen = word.load(std::memory_order_acquire);
  while (begin_of(seen) < end_of(seen)) {
    const uint64_t rest = make_word(epoch_of(seen), begin_of(seen), end_of(seen) - 1);
    if (word.compare_exchange_weak(seen, rest, std::memory_order_acq_rel)) {
      epoch = epoch_of(seen);
      item = static_cast<int32_t>(end_of(seen)) - 1;
      return true;
    }
  }
  return false;
}

bool Pool::claim(int32_t thread, uint32_t& epoch, int32_t& item) {
  if (claim_front(thread, epoch, item)) return true;
  for (int32_t i = 1; i < threads_; ++i)
    if (claim_back((thread + i) % threads_, epoch, item)) return true;
  return false;
}

void Pool::publish(uint32_t epoch, int32_t items) {
  unfinished_.store(items, std::memory_order_relaxed);
  for (int32_t i = 0; i < threads_; ++i) {
    const auto begin = static_cast<uint32_t>(first_item(items, i));
    const auto end = static_cast<uint32_t>(first_item(items, i + 1));
    shares_[static_cast<size_t>(i)].word.store(make_word(epoch, begin, end), std::memory_order_release);
  }
}

// The thread that finishes a phase's last item opens the next phase.
void Pool::finish_items(uint32_t epoch, int32_t count) {
  if (unfinished_.fetch_sub(count, std::memory_order_acq_rel) != count) return;
  const uint32_t next = epoch + 1 - first_epoch_;
  if (program_->is_timed) program_->ends[next - 1] = seconds(CLOCK_MONOTONIC);
  if (next < program_->phases.size()) publish(epoch + 1, program_->phases[next].items);
  advance(epoch + 1);
}

// Others may already have finished what was just published, so the number only ever goes up (modulo 2^32).
void Pool::advance(uint32_t epoch) {
  uint32_t seen = epoch_.load(std::memory_order_relaxed);
  while (static_cast<int32_t>(epoch - seen) > 0 && !epoch_.compare_exchange_weak(seen, epoch)) {
  }
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    wake_.notify_all();
  }
}

void Pool::wait_beyond(uint32_t epoch) {
  for (int32_t i = 0; i < kSpins; ++i) {
    if (epoch_.load(std::memory_order_acquire) != epoch) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(sleep_mutex_);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  wake_.wait(lock, [&] { return epoch_.load(std::memory_order_seq_cst) != epoch; });
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

// Reports its items together: the counter is shared, and a phase cannot end before they are reported.
void Pool::run_items(int32_t thread) {
  uint32_t epoch = 0;
  int32_t item, finished = 0;
  while (claim(thread, epoch, item)) {
    try {
      program_->run(program_->phases[epoch - first_epoch_], item, thread);
    } catch (...) {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
    ++finished;
  }
  if (finished) finish_items(epoch, finished);
}

// Claims items until `epoch_` is `until`.
void Pool::work(int32_t thread, uint32_t until) {
  for (;;) {
    const uint32_t seen = epoch_.load(std::memory_order_acquire);
    run_items(thread);
    if (seen == until) return;
    const uint64_t begin = ticks();
    wait_beyond(seen);
    waited_ += ticks() - begin;
  }
}

// How many threads the next program uses. One delay may be chance, and the system needs a while to spread threads that
// have slept; so it takes several to rest one, and a rest that is followed by more of them is doubled.
void Pool::choose_active() {
  if (active_ < threads_ && --programs_to_rest_ <= 0) {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    active_ = threads_;
    delays_ = programs_since_rest_ = 0;
    rested_.notify_all();
    return;
  }
  ++programs_since_rest_;
  delays_ = was_held_up_ ? delays_ + 2 : std::max(0, delays_ - 1);
  if (delays_ < kDelaysToRest || active_ == 1) return;
  rest_ = programs_since_rest_ < kLongestRest ? std::min(2 * rest_, kLongestRest) : kShortestRest;
  programs_to_rest_ = rest_;
  delays_ = programs_since_rest_ = 0;
  active_ = active_ - 1;
}

void Pool::execute(Program& program) {
  if (program.phases.empty()) return;
  std::lock_guard<std::mutex> lock(execute_mutex_);
  const DefaultRounding rounding;
  choose_active();
  program_ = &program;
  if (program.is_timed) {
    program.ends.assign(program.phases.size(), 0.0);
    program.begin = seconds(CLOCK_MONOTONIC);
  }
  first_epoch_ = epoch_.load(std::memory_order_relaxed) + 1;
  publish(first_epoch_, program.phases[0].items);
  advance(first_epoch_);
  waited_ = 0;
  const double begin = seconds(CLOCK_MONOTONIC), busy_begin = seconds(CLOCK_THREAD_CPUTIME_ID);
  const uint64_t ticks_begin = ticks();
  work(0, first_epoch_ + static_cast<uint32_t>(program.phases.size()));
  const double passed = seconds(CLOCK_MONOTONIC) - begin, busy = seconds(CLOCK_THREAD_CPUTIME_ID) - busy_begin;
  const double waited = static_cast<double>(waited_) / static_cast<double>(ticks() - ticks_begin);
  was_held_up_ = waited > kHeldUpPart || passed - busy > kHeldUpPart * passed;
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

// Sleeps, without being woken at every phase, until the thread is to be used again.
void Pool::rest(int32_t thread) {
  std::unique_lock<std::mutex> lock(sleep_mutex_);
  rested_.wait(lock, [&] { return is_stopping_ || thread < active_; });
}

void Pool::serve(int32_t thread) {
  const DefaultRounding rounding;
  while (!is_stopping_.load(std::memory_order_acquire)) {
    const uint32_t seen = epoch_.load(std::memory_order_acquire);
    if (thread >= active_.load(std::memory_order_relaxed)) {
      rest(thread);
      continue;
    }
    run_items(thread);
    wait_beyond(seen);
  }
}

}  // namespace understudy
