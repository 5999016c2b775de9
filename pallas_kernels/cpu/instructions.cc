// The arithmetic for one instruction set, chosen by LEVEL: compiled once for each.

#include "common.inc"

#if LEVEL == 1
#define NS avx2
#define TARGET "avx2,fma"
#define LANES 8
#define BF16_DOT 0
#elif LEVEL == 2
#define NS avx512
#define TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"
#define LANES 16
#define BF16_DOT 0
#else
#define NS avx512bf16
#define TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"
#define LANES 16
#define BF16_DOT 1
#endif

#include "kernels.inc"
#include "blocks.inc"

#define JOIN(a, b) a##b
#define NAME(level) JOIN(jaxserve_kernels_, level)
extern "C" __attribute__((visibility("hidden"))) const void* NAME(LEVEL)() { return &NS::kKernels; }
