"""C++ kernels for CPUs with AVX2 or AVX-512, compiled on first use by the C++ compiler of the machine."""
