"""Faster and parallel computation of the same results: devices, CPU kernels, caches, processes.

Nothing here defines what is trained; tests compare each part with PyTorch's own result.
"""
