// The C interface: objects behind handles, exceptions turned into messages.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "forward.h"
#include "matrix.h"
#include "model.h"
#include "rounding.h"
#include "runtime.h"
#include "sampling.h"
#include "understudy_cpu.h"

using namespace understudy;

struct us_runtime {
  std::shared_ptr<Runtime> shared;
};

struct us_matrix {
  std::shared_ptr<Runtime> runtime;
  Arena arena;
  Matrix matrix;
};

struct us_model {
  Model model;
};

namespace {

thread_local std::string last_error;

template <class F>
auto guarded(F f, decltype(f()) failed) -> decltype(f()) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return failed;
}

template <class F>
int status(F f) {
  return guarded(
      [&] {
        f();
        return 0;
      },
      1);
}

Number checked_number(int32_t type) {
  if (type < 0 || type > 2) throw std::invalid_argument("unknown number type");
  return static_cast<Number>(type);
}

// One matrix times quantized rows, as a program.
class Multiplication : public Program {
 public:
  Multiplication(const Matrix& matrix, Runtime& runtime, const float* x, int32_t rows, float* y)
      : matrix_(matrix.view),
        bias_(matrix.bias),
        grid_(matrix.grid()),
        width_(static_cast<size_t>(matrix.width())),
        runtime_(runtime),
        x_(x),
        y_(y),
        rows_(rows) {
    buffer_.reserve(rows, matrix_.inputs);
    inputs_ = grid_.qmax ? buffer_.by_row(rows, matrix_.inputs, runtime.kernels.wants_tiles(matrix_, rows)) : buffer_.in_groups(rows, matrix_.inputs);
    const auto threads = static_cast<size_t>(runtime.pool.threads());
    sums_.resize(threads, Buffer<float>(product(rows + kRowsBehind, kTile)));
    scratch_.resize(threads, Buffer<float>(std::max<size_t>(kDecodeScratch, static_cast<size_t>(matrix_.inputs))));
    begun_.resize(threads, 0);
    phases = {{0, 0, rows}};
  }

  void repeat(int64_t times) {
    while (times-- > 0 && phases.size() < 4096) phases.push_back({1, 0, matrix_.tiles()});
  }

  void run(const Phase& phase, int32_t item, int32_t thread) override {
    const Kernels& kernels = runtime_.kernels;
    float* scratch = scratch_[static_cast<size_t>(thread)].data();
    float* sums = sums_[static_cast<size_t>(thread)].data();
    if (phase.kind == 0) return quantize(item, scratch);
    const bool is_last = item + 1 == phase.items || item + 1 == runtime_.pool.first_item(phase.items, thread + 1);
    const int32_t next = is_last ? runtime_.pool.first_item(phase.items, thread) : item + 1;
    if (inputs_.is_by_row) {
      if (inputs_.by_row.is_for_tiles && !begun_[static_cast<size_t>(thread)]) kernels.begin_rows(rows_);
      begun_[static_cast<size_t>(thread)] = 1;
      kernels.matmul_tile_rows(matrix_, item, inputs_.by_row, sums, scratch, matrix_.tile(next));
    } else {
      kernels.matmul_tile(matrix_, item, inputs_.in_groups, sums, scratch, matrix_.tile(next));
    }
    const int32_t first = item * kTile, count = std::min(kTile, matrix_.outputs - first);
    kernels.finish_store(sums, rows_, count, bias_.empty() ? nullptr : bias_.data() + first, y_ + first,
                         static_cast<size_t>(matrix_.outputs));
  }

 private:
  void quantize(int32_t row, float* scratch) {
    const float* x = x_ + width_ * static_cast<size_t>(row);
    if (!inputs_.is_by_row) return runtime_.kernels.quantize(x, nullptr, 0.0f, inputs_.in_groups, row, scratch);
    runtime_.kernels.quantize_row(x, nullptr, 0.0f, grid_, inputs_.by_row, row, scratch);
  }

  const MatrixView& matrix_;
  const Buffer<float>& bias_;
  const InputGrid grid_;
  const size_t width_;
  Runtime& runtime_;
  const float* x_;
  float* y_;
  int32_t rows_;
  InputsBuffer buffer_;
  QuantizedInputs inputs_ = {};
  std::vector<Buffer<float>> sums_, scratch_;
  std::vector<char> begun_;  // of each thread
};

// Every thread reads its share of a buffer, or runs dot products on registers.
class Measurement : public Program {
 public:
  Measurement(const Kernels& kernels, const uint8_t* data, size_t bytes, int32_t items, int64_t repeats)
      : kernels_(kernels), data_(data), bytes_(bytes) {
    for (int64_t i = 0; i < repeats && i < 4096; ++i) phases.push_back({0, 0, items});
  }
  void run(const Phase& phase, int32_t item, int32_t) override {
    if (data_) {
      const size_t share = bytes_ / static_cast<size_t>(phase.items) / 64 * 64;
      kernels_.measure_read(data_ + share * static_cast<size_t>(item), share);
    } else {
      kernels_.measure_dot(kDotRounds);
    }
  }
  static constexpr int64_t kDotRounds = 20000;

 private:
  const Kernels& kernels_;
  const uint8_t* data_;
  size_t bytes_;
};

double seconds_of(Pool& pool, Program& program) {
  const auto begin = std::chrono::steady_clock::now();
  pool.execute(program);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

extern "C" {

int us_abi_version(void) { return US_ABI_VERSION; }

const char* us_error(void) { return last_error.c_str(); }

int us_isa_is_supported(const char* isa) { return find_kernels(isa) != nullptr; }

us_runtime* us_runtime_create(const char* isa, int32_t threads) {
  return guarded(
      [&]() -> us_runtime* {
        const Kernels* kernels = find_kernels(isa);
        if (!kernels) throw std::invalid_argument(std::string("instruction set ") + isa + " is not supported here");
        if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be 1 … 1024");
        return new us_runtime{std::make_shared<Runtime>(*kernels, threads)};
      },
      nullptr);
}

void us_runtime_destroy(us_runtime* runtime) { delete runtime; }

us_matrix* us_matrix_create(us_runtime* runtime, const us_weights* weights) {
  return guarded(
      [&]() -> us_matrix* {
        auto matrix = std::make_unique<us_matrix>();
        matrix->runtime = runtime->shared;
        matrix->matrix = pack(*weights, runtime->shared->kernels, runtime->shared->pool, matrix->arena);
        return matrix.release();
      },
      nullptr);
}

void us_matrix_destroy(us_matrix* matrix) { delete matrix; }

int64_t us_matrix_bytes(const us_matrix* matrix) { return static_cast<int64_t>(matrix->arena.allocated()); }

int us_matrix_multiply(us_matrix* matrix, const float* x, int64_t rows, float* y, int64_t repeats) {
  return status([&] {
    if (rows < 1 || rows > 65535) throw std::invalid_argument("rows must be 1 … 65535");
    Multiplication program(matrix->matrix, *matrix->runtime, x, static_cast<int32_t>(rows), y);
    program.repeat(repeats);
    matrix->runtime->pool.execute(program);
  });
}

int us_exp(us_runtime* runtime, const float* x, int64_t n, float* y) {
  const DefaultRounding rounding;
  runtime->shared->kernels.exp_difference(x, 0.0f, static_cast<int32_t>(n), y);
  return 0;
}

int us_to_half(us_runtime* runtime, const float* x, int64_t n, uint16_t* y) {
  if (n % 16) return 1;
  runtime->shared->kernels.to_half(x, y, static_cast<int32_t>(n));
  return 0;
}

int64_t us_sample(us_runtime* runtime, const float* logits, int64_t n, const us_sampling* how, const int32_t* path,
                  int64_t path_length, int64_t position, const int64_t* ids) {
  return guarded(
      [&]() -> int64_t {
        if (n < 1 || n > INT32_MAX - 16) throw std::invalid_argument("there are no logits");
        const DefaultRounding rounding;
        Sampler sampler(runtime->shared->kernels);
        const std::vector<int32_t> tokens(path, path + (path ? path_length : 0));
        return sampler.choose(logits, static_cast<int32_t>(n), *how, tokens, position, ids);
      },
      -2);
}

int64_t us_candidates(us_runtime* runtime, const float* logits, int64_t n, const us_sampling* how, const int32_t* path,
                      int64_t path_length, int64_t position, const int64_t* ids, int32_t count, int64_t* tokens,
                      float* scores) {
  return guarded(
      [&]() -> int64_t {
        if (n < 1 || n > INT32_MAX - 16) throw std::invalid_argument("there are no logits");
        if (count < 1) throw std::invalid_argument("there is no place for a candidate");
        const DefaultRounding rounding;
        Sampler sampler(runtime->shared->kernels);
        const std::vector<int32_t> seen(path, path + (path ? path_length : 0));
        const int32_t found = sampler.candidates(logits, static_cast<int32_t>(n), *how, seen, position, ids, count,
                                                 tokens, scores);
        return found > 0 ? found : -1;
      },
      -2);
}

double us_measure_read(us_runtime* runtime, int64_t bytes, int64_t repeats) {
  return guarded(
      [&] {
        Arena arena;
        uint8_t* data = arena.allocate(static_cast<size_t>(bytes));
        std::memset(data, 1, static_cast<size_t>(bytes));
        Measurement program(runtime->shared->kernels, data, static_cast<size_t>(bytes), 64, repeats);
        const double seconds = seconds_of(runtime->shared->pool, program);
        return static_cast<double>(bytes) * static_cast<double>(program.phases.size()) / seconds;
      },
      -1.0);
}

double us_measure_dot(us_runtime* runtime, int64_t repeats) {
  return guarded(
      [&] {
        const int32_t threads = runtime->shared->pool.threads();
        Measurement program(runtime->shared->kernels, nullptr, 0, threads, repeats);
        const double seconds = seconds_of(runtime->shared->pool, program);
        const double rounds = static_cast<double>(program.phases.size()) * threads * Measurement::kDotRounds;
        return rounds * runtime->shared->kernels.products_per_round / seconds;
      },
      -1.0);
}

us_model* us_model_create(us_runtime* runtime, const us_shape* shape) {
  return guarded([&] { return new us_model{Model(runtime->shared, *shape)}; }, nullptr);
}

void us_model_destroy(us_model* model) { delete model; }

int us_model_set_linear(us_model* model, int32_t layer, int32_t which, const us_weights* weights) {
  return status([&] { model->model.set_linear(layer, which, *weights); });
}

int us_model_set_norm(us_model* model, int32_t layer, int32_t which, const float* values, int64_t count) {
  return status([&] { model->model.set_norm(layer, which, values, count); });
}

int us_model_set_head(us_model* model, const us_weights* weights, const int64_t* ids) {
  return status([&] { model->model.set_head(*weights, ids); });
}

int us_model_set_embedding_int8(us_model* model, const us_weights* weights) {
  return status([&] { model->model.set_embedding_int8(*weights); });
}

int us_model_set_embedding(us_model* model, const void* values, int32_t number_type) {
  return status([&] { model->model.set_embedding(values, checked_number(number_type)); });
}

int us_model_share_embedding(us_model* model, const us_model* other) {
  return status([&] { model->model.share_embedding(other->model); });
}

int us_model_finish(us_model* model) {
  return status([&] { model->model.finish(); });
}

int us_model_add_rope(us_model* model, const float* cosine, const float* sine, int64_t count) {
  return status([&] { model->model.add_rope(cosine, sine, count); });
}

int64_t us_model_weight_bytes(const us_model* model) { return model->model.weight_bytes(); }

int64_t us_model_cache_bytes(const us_model* model) { return model->model.cache_bytes(); }

int us_model_forward(us_model* model, const us_call* call) {
  return status([&] { model->model.forward(*call); });
}

int64_t us_model_draft(us_model* model, const us_draft* draft) {
  return guarded([&] { return model->model.draft(*draft); }, -2);
}

int us_model_keep(us_model* model, int64_t sequence, const int32_t* rows, int64_t count) {
  return status([&] { model->model.keep(sequence, rows, count); });
}

int us_model_truncate(us_model* model, int64_t sequence, int64_t length) {
  return status([&] { model->model.truncate(sequence, length); });
}

int64_t us_model_length(const us_model* model, int64_t sequence) { return model->model.length(sequence); }

void us_model_reset(us_model* model, int64_t sequence) { model->model.reset(sequence); }

int us_model_time_phases(us_model* model, int32_t is_wanted) {
  return status([&] { model->model.time_phases(is_wanted != 0); });
}

void us_model_phase_times(const us_model* model, double* seconds) { model->model.phase_times(seconds); }

}  // extern "C"
