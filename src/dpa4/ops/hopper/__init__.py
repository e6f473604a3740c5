"""CUDA C++ kernels for Hopper GPUs (H100, H200), compiled on first use by NVRTC, which comes with PyTorch."""
