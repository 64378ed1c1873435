"""Compilations of the RMSNorm kernels."""

from minicpm_kernels.rms_norm_triton import (
    NUM_WARPS_BWD,
    NUM_WARPS_FWD,
    rms_norm_bwd_kernel,
    rms_norm_fwd_kernel,
    tile_shape,
)

from minicpm_kernels_testing.sm90_compile import Sm90Case


def cases() -> list[Sm90Case]:
    """The widths of the 1.2B and the 2.4B model: all in bf16, or float32 weights and residual beside bf16 blocks."""
    scalars = {"num_rows": "i32", "width": "i32", "eps": "fp32", "branch_scale": "fp32"}
    cases = []
    for width in (1536, 2304):
        rows, block = tile_shape(width)
        for label, stream, branch, has_residual in (
            ("bf16", "*bf16", "*bf16", False),
            ("fp32", "*fp32", "*fp32", False),
            ("residual bf16", "*bf16", "*bf16", True),
            ("residual fp32", "*fp32", "*bf16", True),
        ):
            types = scalars | dict.fromkeys(
                ("p_x", "p_new_residual", "p_d_new_residual", "p_d_x", "p_weight"), stream
            )
            types |= dict.fromkeys(("p_branch", "p_normalised", "p_d_normalised", "p_d_branch"), branch)
            types |= dict.fromkeys(("p_rstd", "p_d_weight"), "*fp32")
            constants: dict[str, object] = {"ROWS": rows, "BLOCK": block, "RESIDUAL": has_residual}
            for name, kernel, only_residual, num_warps in (
                (
                    "rms_norm_fwd",
                    rms_norm_fwd_kernel,
                    ("p_branch", "p_new_residual"),
                    NUM_WARPS_FWD,
                ),
                (
                    "rms_norm_bwd",
                    rms_norm_bwd_kernel,
                    ("p_d_new_residual", "p_d_branch"),
                    NUM_WARPS_BWD,
                ),
            ):
                cases.append(
                    Sm90Case(
                        name=f"{name} D{width} {label}",
                        kernel=kernel,
                        types=types,
                        constants=constants if has_residual else constants | dict.fromkeys(only_residual),
                        divisible_by_16=("num_rows", "width"),
                        options={"num_warps": num_warps},
                    )
                )
    return cases
