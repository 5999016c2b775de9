// Products with weight matrices, and attention over paged keys, on CPU. Called by XLA through its
// FFI; threads are those of XLA's own pool.
//
// kernels.inc (few rows) and blocks.inc (many) hold the arithmetic, compiled here for three
// instruction sets of which one is chosen when the library is used: the file may be shared by
// machines that differ. linear.inc and attention.inc cut the work into pieces for threads.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kChunk = 128;         // most keys between two updates of the softmax
constexpr int64_t kSplit = 4 * kChunk;  // keys of one work item
constexpr int64_t kBlockBytes = 64 << 10;
constexpr int64_t kTileRows = 96;       // query heads that share a packed chunk of keys
constexpr int64_t kFewRows = 64;        // from here on weights are packed
constexpr int64_t kBlockDepth = 2048;   // lanes of 32 bits contracted between packing weights
constexpr int64_t kPanelOutputs = 64;   // outputs of a piece of work; whole panels of any kernel
constexpr int64_t kThreadBytes = 96 << 10;  // less than this is not worth waking a thread

// Outputs [begin, end) of one product.
struct LinearBlock {
  const void* x;
  const void* w;
  void* y;
  int64_t num_tokens, depth, num_outputs, begin, end;
  bool is_bfloat16, y_is_float;
};

// A product of many rows, contracted over `depth` lanes of 32 bits. With a gate, silu(x . gate)
// times x . w; with a residual, that and x . w.
struct BlockLinear {
  const void *x, *w, *gate, *residual;
  void* y;
  int64_t num_outputs, depth;
  bool is_bfloat16, y_is_float;
};

// Rows [row, last_row) and outputs [begin, end) of it.
struct BlockTask {
  int64_t row, last_row, begin, end;
};

struct Attention {
  const void* q;  // of the decode rows, as the kernels read it
  const void* queries;
  const void* pool;
  void* out;
  const int32_t* table;
  int64_t num_kv, num_groups, head_dim, page_size, num_pages, table_width;
  int64_t num_layers, layer, value_offset, acc_stride, chunk, window, most_keys;
  float scale, soft_cap;
  bool is_bfloat16;

  // Where in the pool the key of a position lies.
  int64_t place(int64_t row, int64_t head, int64_t position) const {
    int64_t page = table[row * table_width + position / page_size];
    page = page < 0 ? 0 : page >= num_pages ? num_pages - 1 : page;
    int64_t pool_row = (page * num_layers + layer) * 2;
    return ((pool_row * num_kv + head) * page_size + position % page_size) * head_dim;
  }
};

// Keys [begin, end) of one row and KV head, and where its partial result goes.
struct AttentionItem {
  int64_t row, head, begin, end;
  float *maximum, *sum, *acc, *scratch;
};

// Consecutive queries of one row and KV head; the first is `token` of the step, at `position`.
struct PrefillItem {
  int64_t row, head, token, position, num_tokens;
};

// At most six query heads over one packed chunk of keys; each sees keys [first, last) of it.
struct QueryRows {
  const uint32_t *q, *keys, *values;
  float *scores, *acc, *maximum, *sum;
  int64_t depth, q_stride, value_width, most_seen;
  float scale, soft_cap;
  int64_t first[6], last[6];
};

struct Kernels {
  void (*linear)(const LinearBlock&);
  void (*attend)(const Attention&, const AttentionItem&);
  void (*block_linear)(const BlockLinear&, const BlockTask&);
  void (*prefill)(const Attention&, const PrefillItem&);
  bool reads_bfloat16_tokens;  // else bfloat16 tokens are widened before the call
};

// Memory of this thread, aligned to vectors, until it asks again.
inline void* scratch(int64_t num_bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (num_bytes > size) {
    size = (num_bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, size));
  }
  return memory.get();
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);  // stays a NaN
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(float* p, float x) { *p = x; }
inline void store(uint16_t* p, float x) { *p = to_bfloat16(x); }

}  // namespace

#define NS avx512bf16
#define TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"
#define LANES 16
#define BF16_DOT 1
#include "kernels.inc"
#include "blocks.inc"
#define NS avx512
#define TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"
#define LANES 16
#define BF16_DOT 0
#include "kernels.inc"
#include "blocks.inc"
#define NS avx2
#define TARGET "avx2,fma"
#define LANES 8
#define BF16_DOT 0
#include "kernels.inc"
#include "blocks.inc"

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
  int level = g_level.load(std::memory_order_relaxed);
  return level == 3 ? avx512bf16::kKernels : level == 2 ? avx512::kKernels : avx2::kKernels;
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

// Chooses the instruction set: the best one, or at most `most` if it is positive. Returns its name.
extern "C" __attribute__((visibility("default"))) const char* jaxserve_select(int most) {
  int level = supported_level();
  if (most > 0 && most < level) level = most;
  g_level.store(level, std::memory_order_relaxed);
  return kNames[level];
}
