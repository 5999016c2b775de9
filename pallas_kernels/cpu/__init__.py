"""C++ kernels for CPU, compiled at first use and called through XLA's FFI."""
