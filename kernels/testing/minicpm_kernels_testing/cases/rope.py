"""Compilations of the rotary embedding kernels."""

from minicpm_kernels import rope_triton

from minicpm_kernels_testing.sm90_compile import Sm90Case


def cases() -> list[Sm90Case]:
    """Every configuration that training launches."""
    pointers = {"p_x": "*bf16", "p_cos": "*fp32", "p_sin": "*fp32", "p_out": "*bf16"}
    integers = {"num_heads": "i32", "token_stride": "i32", "head_stride": "i32"}
    return [
        Sm90Case(
            name=f"rope hd{head_dim} {'bwd' if backward else 'fwd'} bf16",
            kernel=rope_triton.rope_kernel,
            types=pointers | integers,
            constants={
                "HALF": head_dim // 2,
                "BLOCK_HALF": head_dim // 2,
                "HEADS": rope_triton.HEADS_OF_PROGRAM,
                "BACKWARD": backward,
            },
            divisible_by_16=("token_stride", "head_stride"),
            options={"num_warps": rope_triton.NUM_WARPS},
        )
        for head_dim in (64, 128)
        for backward in (False, True)
    ]
