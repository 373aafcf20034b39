"""The fused kernels: Triton for a GPU, and C beside it for a CPU, one operation a stem."""
