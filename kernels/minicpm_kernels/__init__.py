"""Triton kernels for MiniCPM shapes, each beside its plain-torch reference."""
