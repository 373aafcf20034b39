"""Fused kernels: Triton (.py) for GPUs, C (.c) for CPUs. The files of one operation share their stem."""
