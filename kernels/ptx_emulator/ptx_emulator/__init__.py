"""An sm_90 PTX emulator for tests: it runs the PTX that Triton compiles, on a CPU.

The interpreter of Triton runs a kernel's Python; this runs its compiled program, so layouts, swizzles, barriers,
alignment, bounds, races and deadlocks are tested too, and kernels in Gluon can run at all. See README.md for what it
models and what it does not.
"""
