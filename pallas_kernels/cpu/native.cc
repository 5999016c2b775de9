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

int supported_level() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
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

std::vector<float> widened(const void* x, int64_t size) {
  std::vector<float> out(size);
  const uint16_t* from = (const uint16_t*)x;
  for (int64_t i = 0; i < size; i++) {
    uint32_t bits = (uint32_t)from[i] << 16;
    __builtin_memcpy(&out[i], &bits, 4);
  }
  return out;
}

bool is_known(ffi::DataType type) {
  return type == ffi::DataType::F32 || type == ffi::DataType::BF16;
}

}  // namespace

#include "linear.inc"
#include "attention.inc"
#include "rotate.inc"

// Chooses the instruction set: the best one, or at most `most` if it is positive. Returns its name.
extern "C" __attribute__((visibility("default"))) const char* jaxserve_select(int most) {
  int level = supported_level();
  if (most > 0 && most < level) level = most;
  g_level.store(level, std::memory_order_relaxed);
  return kNames[level];
}
