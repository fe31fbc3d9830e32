"""Triton kernels over torch tensors: one operation a file, with a plain torch reference of the same signature.

Everything here imports torch and triton; the CPU path imports nothing from here.
"""
