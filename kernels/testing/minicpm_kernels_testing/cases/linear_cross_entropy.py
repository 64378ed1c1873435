"""Compilations of the linear cross-entropy kernel."""

from minicpm_kernels import linear_cross_entropy_triton

from minicpm_kernels_testing.sm90_compile import Sm90Case


def cases() -> list[Sm90Case]:
    """The vocabularies of MiniCPM (one configuration) and of a small model, in the dtypes of training."""
    return [
        Sm90Case(
            name=f"linear_cross_entropy block {block} {dtype} {'loss and gradient' if needs_grad else 'loss'}",
            kernel=linear_cross_entropy_triton.linear_cross_entropy_kernel,
            types={
                "p_logits": f"*{dtype}",
                "p_targets": "*i64",
                "p_losses": "*fp32",
                "p_z_losses": "*fp32",
                "vocabulary": "i32",
                "row_stride": "i32",
                "logit_scale": "fp32",
                "z_loss": "fp32",
                "ignore_index": "i32",
            },
            constants={"BLOCK": block, "VECTOR": 8 if dtype == "bf16" else 4, "NEEDS_GRAD": needs_grad},
            divisible_by_16=("row_stride",),
            options={"num_warps": linear_cross_entropy_triton.num_warps_for(block)},
        )
        for block, dtype, needs_grad in (
            (linear_cross_entropy_triton.MAX_BLOCK, "bf16", True),
            (linear_cross_entropy_triton.MAX_BLOCK, "bf16", False),
            (linear_cross_entropy_triton.MAX_BLOCK, "fp32", True),
            (4096, "bf16", True),
        )
    ]
