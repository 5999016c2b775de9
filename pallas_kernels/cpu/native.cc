// Products with weight matrices, and attention over paged keys, on CPU. Called by XLA through its
// FFI; threads are those of XLA's own pool.
//
// kernels.inc (few rows) and blocks.inc (many) hold the arithmetic. instructions.cc compiles it for
// three instruction sets, of which one is chosen when the library is used: machines that differ may
// share the file. linear.inc, attention.inc and rotate.inc cut work into pieces for threads.

#include "common.inc"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

extern "C" {  // of instructions.cc, with LEVEL 1, 2 and 3
__attribute__((visibility("hidden"))) const void* jaxserve_kernels_1();
__attribute__((visibility("hidden"))) const void* jaxserve_kernels_2();
__attribute__((visibility("hidden"))) const void* jaxserve_kernels_3();
}

namespace {

constexpr const char* kNames[] = {"none", "avx2", "avx512", "avx512_bf16"};  // as in build.py

// What this CPU can run.
int supported_level() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}

// What runs fastest. Intel's cores multiply pairs of bfloat16 at half the rate of float32, AMD's at
// twice that rate: measured on Emerald Rapids (176 against 336 GFLOP/s) and Zen 5.
int best_level() {
  const int level = supported_level();
  return level == 3 && __builtin_cpu_is("intel") ? 2 : level;
}

std::atomic<int> g_level{-1};

const Kernels& kernels() {
  const int level = g_level.load(std::memory_order_relaxed);
  return *(const Kernels*)(level == 3   ? jaxserve_kernels_3()
                           : level == 2 ? jaxserve_kernels_2()
                                        : jaxserve_kernels_1());
}

// Runs body(i) for every i in [0, n), on this thread and on helpers from the pool. This thread does
// what no helper has begun, so a busy or empty pool delays nothing; it waits only for bodies that
// are running.
template <class Body>
void parallel(ffi::ThreadPool& pool, int64_t num_threads, int64_t n, Body body) {
  if (num_threads > n) num_threads = n;
  if (num_threads <= 1) {
    for (int64_t i = 0; i < n; i++) body(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();  // helpers may start after this function has returned
  auto work = [shared, n, body] {
    for (int64_t i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      body(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < num_threads; i++) pool.Schedule(decltype(work)(work));
  work();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < n; spins++) {
    if (spins < 4096)
      _mm_pause();
    else
      std::this_thread::yield();
  }
}

std::unique_ptr<float[]> widened(ffi::ThreadPool& pool, const uint16_t* x, int64_t num_rows,
                                 int64_t depth) {
  std::unique_ptr<float[]> out(new float[num_rows * depth]);
  float* to = out.get();
  const auto widen = kernels().widen;
  const int64_t num_pieces = (num_rows + kFewRows - 1) / kFewRows;
  parallel(pool, pool.num_threads(), num_pieces, [=](int64_t i) {
    const int64_t begin = i * kFewRows, end = std::min(begin + kFewRows, num_rows);
    widen(x + begin * depth, (end - begin) * depth, to + begin * depth);
  });
  return out;
}

bool is_known(ffi::DataType type) {
  return type == ffi::DataType::F32 || type == ffi::DataType::BF16;
}

}  // namespace

#include "linear.inc"
#include "attention.inc"
#include "rotate.inc"

// Chooses the instruction set: the fastest one, or if `most` is positive that one, or what there is
// below it. Returns its name.
extern "C" __attribute__((visibility("default"))) const char* jaxserve_select(int most) {
  const int level = most > 0 ? std::min(most, supported_level()) : best_level();
  g_level.store(level, std::memory_order_relaxed);
  return kNames[level];
}
