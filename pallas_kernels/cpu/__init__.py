"""C++ kernels for decode on CPU, compiled at first use and called through XLA's FFI."""
