// Decode on CPU: products of few rows with weight matrices, and attention of single queries over
// paged keys. Called by XLA through its FFI; threads are those of XLA's own pool.
//
// kernels.inc holds the arithmetic, compiled here for three instruction sets of which one is chosen
// when the library is used: the file may be shared by machines that differ.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
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
constexpr int64_t kThreadBytes = 96 << 10;  // less than this is not worth waking a thread

// Outputs [begin, end) of one product.
struct LinearBlock {
  const void* x;
  const void* w;
  void* y;
  int64_t num_tokens, depth, num_outputs, begin, end;
  bool is_bfloat16, y_is_float;
};

struct Attention {
  const void* q;
  const void* pool;
  const int32_t* table;
  int64_t num_kv, num_groups, head_dim, page_size, num_pages, table_width;
  int64_t num_layers, layer, value_offset, acc_stride, chunk;
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

struct Kernels {
  void (*linear)(const LinearBlock&);
  void (*attend)(const Attention&, const AttentionItem&);
  bool reads_bfloat16_tokens;  // else bfloat16 tokens are widened before the call
};

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
#define NS avx512
#define TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"
#define LANES 16
#define BF16_DOT 0
#include "kernels.inc"
#define NS avx2
#define TARGET "avx2,fma"
#define LANES 8
#define BF16_DOT 0
#include "kernels.inc"

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

// y_i[m, o] = x[m, d] . w_i[o, d], for one or more weights.
ffi::Error linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs weights,
                  ffi::RemainingRets results) {
  if (x.dimensions().size() != 2 || !is_known(x.element_type()) ||
      weights.size() != results.size())
    return ffi::Error::InvalidArgument("linear: bad operands");
  const int64_t num_tokens = x.dimensions()[0], depth = x.dimensions()[1];
  const bool is_bfloat16 = x.element_type() == ffi::DataType::BF16;
  const int64_t row_bytes = depth * (is_bfloat16 ? 2 : 4);
  const void* tokens = x.untyped_data();
  std::vector<float> wide;
  if (is_bfloat16 && !kernels().reads_bfloat16_tokens) {
    wide = widened(tokens, num_tokens * depth);
    tokens = wide.data();
  }
  int64_t step = (kBlockBytes / (row_bytes > 0 ? row_bytes : 1) + 3) / 4 * 4;
  if (step < 4) step = 4;
  int64_t total_bytes = 0;
  std::vector<LinearBlock> blocks;
  for (size_t i = 0; i < weights.size(); i++) {
    auto w = weights.get<ffi::AnyBuffer>(i);
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!w.has_value() || !y.has_value()) return ffi::Error::InvalidArgument("linear: bad buffer");
    const int64_t num_outputs = w->dimensions()[0];
    const auto y_type = (*y)->element_type();
    if (w->element_type() != x.element_type() || w->dimensions()[1] != depth || !is_known(y_type) ||
        (!is_bfloat16 && y_type != ffi::DataType::F32))
      return ffi::Error::InvalidArgument("linear: operands do not fit");
    total_bytes += num_outputs * row_bytes;
    for (int64_t begin = 0; begin < num_outputs; begin += step)
      blocks.push_back({tokens, w->untyped_data(), (*y)->untyped_data(), num_tokens, depth,
                        num_outputs, begin, std::min(begin + step, num_outputs), is_bfloat16,
                        y_type == ffi::DataType::F32});
  }
  const auto run = kernels().linear;
  const LinearBlock* data = blocks.data();
  parallel(pool, std::min(pool.num_threads(), total_bytes / kThreadBytes + 1),
           (int64_t)blocks.size(), [run, data](int64_t i) { run(data[i]); });
  return ffi::Error::Success();
}

struct Partial {  // the splits of one row and KV head
  int64_t first_item, num_items;
};

// q [R, Q, H]; pool [N*L*2, K, P, H]; table [R, M]; lens [R]; num_decodes [] -> out [R, Q, H].
ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer kv,
                     ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> lens,
                     ffi::Buffer<ffi::S32> num_decodes, ffi::Result<ffi::AnyBuffer> out,
                     int64_t num_layers, int64_t layer, int64_t window, float scale,
                     float soft_cap) {
  const auto q_dims = q.dimensions(), kv_dims = kv.dimensions();
  if (q_dims.size() != 3 || kv_dims.size() != 4 || !is_known(q.element_type()) ||
      out->element_type() != q.element_type() || q_dims[1] % kv_dims[1] != 0)
    return ffi::Error::InvalidArgument("attention: bad operands");
  const int64_t num_rows = q_dims[0], num_q = q_dims[1], head_dim = q_dims[2];
  Attention a = {};
  a.is_bfloat16 = q.element_type() == ffi::DataType::BF16;
  const auto stored = kv.element_type();
  const bool fits = a.is_bfloat16
                        ? stored == ffi::DataType::U16 || stored == ffi::DataType::BF16
                        : stored == ffi::DataType::F32;
  if (!fits) return ffi::Error::InvalidArgument("attention: the pool's dtype does not fit");
  a.pool = kv.untyped_data();
  a.table = table.typed_data();
  a.num_kv = kv_dims[1];
  a.num_groups = num_q / a.num_kv;
  a.head_dim = head_dim;
  a.page_size = kv_dims[2];
  a.num_layers = num_layers;
  a.layer = layer;
  a.num_pages = kv_dims[0] / (2 * num_layers);
  a.table_width = table.dimensions()[1];
  a.value_offset = a.num_kv * a.page_size * head_dim;
  a.acc_stride = (head_dim + 15) / 16 * 16;
  a.chunk = a.is_bfloat16 ? kChunk : kChunk / 2;  // so that its keys and values stay in L1
  a.scale = scale;
  a.soft_cap = soft_cap;
  std::vector<float> wide;
  a.q = q.untyped_data();
  if (a.is_bfloat16 && !kernels().reads_bfloat16_tokens) {
    wide = widened(a.q, num_rows * num_q * head_dim);
    a.q = wide.data();
  }

  const int64_t decodes =
      std::max<int64_t>(0, std::min<int64_t>(*num_decodes.typed_data(), num_rows));
  const int64_t item_floats = a.num_groups * (2 + a.acc_stride);
  std::vector<AttentionItem> items;
  std::vector<Partial> partials;
  int64_t num_keys = 0;
  for (int64_t row = 0; row < decodes; row++) {
    const int64_t end = std::min<int64_t>(lens.typed_data()[row], a.table_width * a.page_size);
    const int64_t begin = window > 0 ? std::max<int64_t>(0, end - window) : 0;
    num_keys += std::max<int64_t>(0, end - begin);
    for (int64_t head = 0; head < a.num_kv; head++) {
      const int64_t first = (int64_t)items.size();
      for (int64_t at = begin; at < end;) {
        const int64_t stop = std::min(end, (at / kSplit + 1) * kSplit);
        items.push_back({row, head, at, stop, nullptr, nullptr, nullptr, nullptr});
        at = stop;
      }
      partials.push_back({first, (int64_t)items.size() - first});
    }
  }
  const int64_t num_items = (int64_t)items.size();
  std::unique_ptr<float[]> partial_floats(new float[num_items * item_floats]);
  std::unique_ptr<std::atomic<int64_t>[]> finished(new std::atomic<int64_t>[partials.size()]());
  for (int64_t i = 0; i < num_items; i++) {
    float* at = partial_floats.get() + i * item_floats;
    items[i].maximum = at;
    items[i].sum = at + a.num_groups;
    items[i].acc = at + 2 * a.num_groups;
  }
  const int64_t element = a.is_bfloat16 ? 2 : 4;
  char* y = (char*)out->untyped_data();
  const int64_t row_bytes = num_q * head_dim * element;
  std::memset(y + decodes * row_bytes, 0, (num_rows - decodes) * row_bytes);

  // Whoever finishes the last split of a row and head joins them, in the order of the keys.
  auto join = [&](const Partial& part) {
    const AttentionItem& one = items[part.first_item];
    const int64_t head_row = one.row * a.num_kv + one.head;
    for (int64_t g = 0; g < a.num_groups; g++) {
      float most = -__builtin_inff(), sum = 0;
      for (int64_t i = 0; i < part.num_items; i++)
        most = std::max(most, items[part.first_item + i].maximum[g]);
      std::vector<float> total(head_dim, 0.0f);
      for (int64_t i = 0; i < part.num_items; i++) {
        const AttentionItem& item = items[part.first_item + i];
        const float fade = std::exp(item.maximum[g] - most);
        sum += item.sum[g] * fade;
        for (int64_t h = 0; h < head_dim; h++) total[h] += item.acc[g * a.acc_stride + h] * fade;
      }
      const int64_t at = (head_row * a.num_groups + g) * head_dim;
      for (int64_t h = 0; h < head_dim; h++) {
        const float value = total[h] / sum;
        if (a.is_bfloat16)
          store((uint16_t*)y + at + h, value);
        else
          ((float*)y)[at + h] = value;
      }
    }
  };
  const auto attend = kernels().attend;
  auto body = [&](int64_t i) {
    AttentionItem item = items[i];
    std::unique_ptr<float[]> scratch(new float[a.num_groups * kChunk]);
    item.scratch = scratch.get();
    attend(a, item);
    const int64_t p = item.row * a.num_kv + item.head;
    if (finished[p].fetch_add(1, std::memory_order_acq_rel) + 1 == partials[p].num_items)
      join(partials[p]);
  };
  for (int64_t row = 0; row < decodes; row++)
    if (partials[row * a.num_kv].num_items == 0)
      std::memset(y + row * row_bytes, 0, row_bytes);
  const int64_t bytes = num_keys * 2 * a.num_kv * head_dim * element;
  parallel(pool, std::min(pool.num_threads(), bytes / kThreadBytes + 1), num_items,
           [&body](int64_t i) { body(i); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_linear, linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("num_layers")
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap"));

// Chooses the instruction set: the best one, or at most `most` if it is positive. Returns its name.
extern "C" __attribute__((visibility("default"))) const char* jaxserve_select(int most) {
  int level = supported_level();
  if (most > 0 && most < level) level = most;
  g_level.store(level, std::memory_order_relaxed);
  return kNames[level];
}
