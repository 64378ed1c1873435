"""Compilations of the mixture-of-experts kernels: grouped matmuls, permutation, router."""

import torch
from minicpm_kernels.moe import triton_gemm, triton_gemm_bwd, triton_permute, triton_router

from minicpm_kernels_testing.sm90_compile import Sm90Case


def cases() -> list[Sm90Case]:
    """Every configuration that is launched on a card for top-2 (the router: top-8 too), in bf16 and float32."""
    return [*_gemm_cases(), *_gemm_backward_cases(), *_permute_cases(), *_router_cases()]


def _gemm_cases() -> list[Sm90Case]:
    """Widths that are a multiple of 64, and one that is not."""
    cases = []
    for dtype, tiles in (("bf16", triton_gemm.UP_TILES), ("fp32", triton_gemm.FLOAT32_TILES)):
        for save_hidden, even in ((True, True), (False, True), (True, False)):
            cases.append(
                Sm90Case(
                    name=f"moe_up_fwd_{dtype}{'' if save_hidden else '_inference'}{'' if even else '_ragged'}",
                    kernel=triton_gemm.moe_up_fwd_kernel,
                    types={"t_gate_up": f"tensordesc<{dtype}[1,1,{tiles.columns},{tiles.depth}]>"}
                    | dict.fromkeys(("p_x", "p_hidden", "p_activation"), f"*{dtype}")
                    | dict.fromkeys(("p_pair", "p_tile", "p_num_tiles"), "*i32")
                    | dict.fromkeys(("width", "hidden"), "i32"),
                    constants={"TOP_K": 2, "SAVE_HIDDEN": save_hidden, "EVEN": even, "PIECE": tiles.piece}
                    | triton_gemm.tile_constants(tiles),
                    divisible_by_16=("width", "hidden"),
                    options=tiles.options,
                    needs_tensor_cores=dtype == "bf16",
                )
            )
    for dtype, tiles in (("bf16", triton_gemm.ROWS_TILES), ("fp32", triton_gemm.FLOAT32_TILES)):
        for transposed in (False, True):
            weight = (tiles.depth, tiles.columns) if transposed else (tiles.columns, tiles.depth)
            cases.append(
                Sm90Case(
                    name=f"moe_rows_{dtype}{'_transposed' if transposed else ''}",
                    kernel=triton_gemm.moe_rows_kernel,
                    types={
                        "t_row": f"tensordesc<{dtype}[{tiles.rows},{tiles.depth}]>",
                        "t_weight": f"tensordesc<{dtype}[1,{weight[0]},{weight[1]}]>",
                        "p_out": f"*{dtype}",
                    }
                    | dict.fromkeys(("p_tile", "p_num_tiles"), "*i32")
                    | dict.fromkeys(("sum_width", "out_width"), "i32"),
                    constants={"TRANSPOSED": transposed} | triton_gemm.tile_constants(tiles),
                    divisible_by_16=("sum_width", "out_width"),
                    options=tiles.options,
                    needs_tensor_cores=dtype == "bf16",
                )
            )
    return cases


def _gemm_backward_cases() -> list[Sm90Case]:
    """Widths that are a multiple of 64."""
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        tag = "bf16" if dtype == torch.bfloat16 else "fp32"
        tiles = triton_gemm.tiles_for(dtype, triton_gemm_bwd.DOWN_BACKWARD_TILES)
        cases.append(
            Sm90Case(
                name=f"moe_down_bwd_{tag}",
                kernel=triton_gemm_bwd.moe_down_bwd_kernel,
                types={
                    "t_down": f"tensordesc<{tag}[1,{tiles.depth},{tiles.columns}]>",
                    "t_hidden": f"tensordesc<{tag}[{tiles.rows},2,{tiles.piece}]>",
                }
                | dict.fromkeys(("p_dout", "p_dhidden", "p_weighted"), f"*{tag}")
                | dict.fromkeys(("p_weight", "p_partial"), "*fp32")
                | dict.fromkeys(("p_pair", "p_tile", "p_num_tiles"), "*i32")
                | dict.fromkeys(("width", "hidden"), "i32"),
                constants={"TOP_K": 2, "EVEN": True, "PIECE": tiles.piece}
                | triton_gemm.tile_constants(tiles),
                divisible_by_16=("width", "hidden"),
                options=tiles.options,
                needs_tensor_cores=dtype == torch.bfloat16,
            )
        )
        tiles = triton_gemm.tiles_for(dtype, triton_gemm_bwd.GRADIENT_TILES)
        for name, sorted_rows in (("gate_up", True), ("down", False)):
            cases.append(
                Sm90Case(
                    name=f"moe_weight_bwd_{name}_{tag}",
                    kernel=triton_gemm_bwd.moe_weight_bwd_kernel,
                    types={
                        "t_sorted": f"tensordesc<{tag}[{tiles.depth},{tiles.rows if sorted_rows else tiles.columns}]>",
                        "p_token_row": f"*{tag}",
                        "p_out": f"*{tag}",
                    }
                    | dict.fromkeys(("p_pair", "p_start"), "*i32")
                    | dict.fromkeys(("num_experts", "out_rows", "out_columns"), "i32"),
                    constants={"TOP_K": 2, "SORTED_ROWS": sorted_rows} | triton_gemm.tile_constants(tiles),
                    divisible_by_16=("out_rows", "out_columns"),
                    options=tiles.options,
                    needs_tensor_cores=dtype == torch.bfloat16,
                )
            )
    return cases


def _permute_cases() -> list[Sm90Case]:
    """8, 32 and 64 experts."""
    cases = []
    for experts in (8, 32, 64):
        sizes = {"EXPERTS": experts, "BLOCK": triton_permute.pairs_of_block(experts)}
        cases += [
            Sm90Case(
                name=f"moe_count_{experts}_experts",
                kernel=triton_permute.moe_count_kernel,
                types={"p_expert": "*i32", "p_count": "*i32", "num_pairs": "i32", "num_experts": "i32"},
                constants=sizes,
                options={"num_warps": 8},
            ),
            Sm90Case(
                name=f"moe_plan_{experts}_experts",
                kernel=triton_permute.moe_plan_kernel,
                types=dict.fromkeys(("p_count", "p_first", "p_start", "p_tile", "p_num_tiles"), "*i32")
                | dict.fromkeys(("num_blocks", "num_experts", "max_tiles"), "i32"),
                constants={"TILE_ROWS": 128, "EXPERTS": experts, **triton_permute.plan_blocks(experts)},
                options={"num_warps": 8},
            ),
            Sm90Case(
                name=f"moe_place_{experts}_experts",
                kernel=triton_permute.moe_place_kernel,
                types=dict.fromkeys(("p_expert", "p_first", "p_pair", "p_slot"), "*i32")
                | {"num_pairs": "i32", "num_experts": "i32"},
                constants=sizes,
                options={"num_warps": 8},
            ),
        ]
    for weighted in (True, False):
        cases.append(
            Sm90Case(
                name="moe_combine_weighted" if weighted else "moe_combine",
                kernel=triton_permute.moe_combine_kernel,
                types={
                    "p_row": "*bf16",
                    "p_slot": "*i32",
                    "p_out": "*bf16",
                    "num_tokens": "i32",
                    "width": "i32",
                }
                | ({"p_weight": "*fp32"} if weighted else {}),
                constants={
                    "TOP_K": 2,
                    "WEIGHTED": weighted,
                    "TOKENS": triton_permute.COMBINE_TOKENS,
                    "COLUMNS": triton_permute.COMBINE_COLUMNS,
                }
                | ({} if weighted else {"p_weight": None}),
                divisible_by_16=("width",),
            )
        )
    cases.append(
        Sm90Case(
            name="moe_weight_gradient",
            kernel=triton_permute.moe_weight_gradient_kernel,
            types={
                "p_partial": "*fp32",
                "p_slot": "*i32",
                "p_out": "*fp32",
                "num_pairs": "i32",
                "num_columns": "i32",
            },
            constants={"PAIRS": 32, "COLUMNS": 32},
        )
    )
    return cases


def _router_cases() -> list[Sm90Case]:
    """8 experts, top-2, and 64 experts, top-8."""
    cases = []
    for num_experts, top_k in ((8, 2), (64, 8)):
        sizes = triton_router.block_sizes(num_experts, top_k)
        name = f"{num_experts}_experts_top_{top_k}"
        integers = dict.fromkeys(("num_blocks", "num_tokens", "num_experts"), "i32")
        cases += [
            Sm90Case(
                name=f"moe_router_fwd_{name}",
                kernel=triton_router.moe_router_fwd_kernel,
                types=dict.fromkeys(("p_logit", "p_weight", "p_probability", "p_square"), "*fp32")
                | {"p_expert": "*i32", "p_count": "*i32"}
                | integers,
                constants=sizes,
            ),
            Sm90Case(
                name=f"moe_router_losses_{name}",
                kernel=triton_router.moe_router_losses_kernel,
                types=dict.fromkeys(
                    ("p_probability", "p_square", "p_fraction", "p_load_balance", "p_z"), "*fp32"
                )
                | {"p_count": "*i32"}
                | integers,
                constants=triton_router.loss_block_sizes(num_experts, top_k),
            ),
            Sm90Case(
                name=f"moe_router_bwd_{name}",
                kernel=triton_router.moe_router_bwd_kernel,
                types=dict.fromkeys(
                    ("p_logit", "p_weight", "p_fraction", "p_dweight", "p_dload_balance", "p_dz", "p_dlogit"),
                    "*fp32",
                )
                | {"p_expert": "*i32"}
                | integers,
                constants=sizes,
            ),
        ]
    return cases
