"""Tools for testing the kernels without a GPU; not in the wheel.

``interpreter`` patches Triton's CPU interpreter, ``sm90_compile`` compiles kernels for Hopper and reads what the
compiler made of them, ``sass`` reads the instructions, ``cases`` lists what production launches.
"""
