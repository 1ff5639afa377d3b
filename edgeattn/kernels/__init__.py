"""Compiled kernels, for the CPU and for CUDA."""
