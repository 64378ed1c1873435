"""Compilations of the SwiGLU kernels."""

from minicpm_kernels import swiglu_triton

from minicpm_kernels_testing.sm90_compile import Sm90Case


def cases() -> list[Sm90Case]:
    """Every configuration that training launches."""
    pointers = {"p_gate_up": "*bf16", "p_out": "*bf16", "p_d_out": "*bf16", "p_d_gate_up": "*bf16"}
    integers = ("width", "row_stride", "d_out_row_stride")
    types = pointers | dict.fromkeys(integers, "i32")
    return [
        Sm90Case(
            name=f"swiglu_{direction} bf16",
            kernel=kernel,
            types=types,
            constants={"BLOCK": swiglu_triton.BLOCK_COLUMNS},
            divisible_by_16=integers,
            options={"num_warps": swiglu_triton.NUM_WARPS},
        )
        for direction, kernel in (
            ("fwd", swiglu_triton.swiglu_fwd_kernel),
            ("bwd", swiglu_triton.swiglu_bwd_kernel),
        )
    ]
