"""Compilations of the attention kernels: Gluon and Triton, forward, backward and decoding, at head dims 64 and 128."""

import triton
from minicpm_kernels.attention import gluon_bwd, gluon_fwd, triton_bwd, triton_decode, triton_fwd
from minicpm_kernels.attention.gluon import ROWS, TILE_LAYOUT
from minicpm_kernels.attention.schedule import attention_bounds_kernel
from triton.experimental.gluon import language as gl

from minicpm_kernels_testing.sm90_compile import Sm90Case


def cases() -> list[Sm90Case]:
    """Every configuration that is launched on a card."""
    return [
        *gluon_backward_cases(),
        *gluon_forward_cases(),
        *_triton_backward_cases(),
        *_decode_cases(),
        *_triton_forward_cases(),
    ]


def gluon_backward_cases() -> list[Sm90Case]:
    """The Gluon backward; the kernels that it shares with the Triton backward are listed there."""
    stats_layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    row, block = (f"tensordesc<fp32[{rows},64],{stats_layout!r}>" for rows in (1, 64))
    cases = [
        Sm90Case(
            name="attention_gluon_bwd_round_dq_hd64",
            kernel=gluon_bwd.attention_gluon_bwd_dq_kernel,
            types={"t_dq_sum": "tensordesc<fp32[64,64]>", "t_dq": "tensordesc<bf16[64,64]>"}
            | {"num_slots": "i32", "scale": "fp32"},
            constants={},
            options={"num_warps": 4},
        )
    ]
    for head_dim, add_dq in ((64, True), (64, False), (128, False)):
        tile = f"tensordesc<bf16[{ROWS.value},{head_dim}],{TILE_LAYOUT!r}>"
        cases.append(
            Sm90Case(
                name=f"attention_gluon_bwd_hd{head_dim}" + ("_add_dq" if add_dq else ""),
                kernel=gluon_bwd.attention_gluon_bwd_kernel,
                types=dict.fromkeys(("t_q", "t_k", "t_v", "t_d_out", "t_dk", "t_dv"), tile)
                | {"t_dq_sum": block, "t_lse_log2": row, "t_delta": row, "p_end_query": "*i32"}
                | dict.fromkeys(gluon_bwd.INTEGER_ARGUMENTS, "i32")
                | {"scale": "fp32", "scale_log2": "fp32"},
                constants={
                    "HEAD_DIM": head_dim,
                    "STAGES": gluon_bwd.STAGES,
                    "REGISTERS": gluon_bwd.REGISTERS,
                    "ADD_DQ": add_dq,
                },
                options={"num_warps": 4},
                needs_tensor_cores=True,
            )
        )
    return cases


def gluon_forward_cases() -> list[Sm90Case]:
    """The Gluon forward."""
    cases = []
    for head_dim in (64, 128):
        tiles = gluon_fwd.gluon_tiles(head_dim)
        q_tile, k_tile = (
            f"tensordesc<bf16[{rows},{head_dim}],{TILE_LAYOUT!r}>" for rows in (ROWS.value, gluon_fwd.BLOCK_K)
        )
        cases.append(
            Sm90Case(
                name=f"attention_gluon_fwd_hd{head_dim}",
                kernel=gluon_fwd.attention_gluon_fwd_kernel,
                types={"t_q": q_tile, "t_k": k_tile, "t_v": k_tile, "t_out": q_tile}
                | {"p_lse": "*fp32", "p_first_key": "*i32", "p_next_work": "*i32", "scale_log2": "fp32"}
                | dict.fromkeys(gluon_fwd.INTEGER_ARGUMENTS, "i32"),
                constants={
                    "BLOCK_K": gluon_fwd.BLOCK_K,
                    "HEAD_DIM": head_dim,
                    "CONSUMERS": tiles.consumers,
                    "STAGES": tiles.stages,
                    "REGISTERS": tiles.registers,
                    "OVERLAP": tiles.overlap,
                },
                options={"num_warps": 4},
                needs_tensor_cores=True,
            )
        )
    return cases


def _triton_backward_cases() -> list[Sm90Case]:
    cases: list[Sm90Case] = []
    for head_dim in (64, 128):
        cases += [_stats_case(head_dim), _dq_case(head_dim)]
        for group in (1, 3):
            cases.append(_dkdv_case(head_dim, group, add_dq=False))
            if triton_bwd.adds_dq(head_dim, deterministic=False):
                cases.append(_dkdv_case(head_dim, group, add_dq=True))
    return cases


def _tile_type(rows: int, columns: int, element: str = "bf16") -> str:
    return f"tensordesc<{element}[{rows},{columns}]>"


def _stats_case(head_dim: int) -> Sm90Case:
    tile = _tile_type(triton_bwd.STATS_BLOCK, head_dim)
    return Sm90Case(
        name=f"attention_bwd_stats_hd{head_dim}",
        kernel=triton_bwd.attention_bwd_stats_kernel,
        types={"t_out": tile, "t_d_out": tile, "num_tokens": "i32", "num_slots": "i32"}
        | dict.fromkeys(("p_lse", "p_lse_log2", "p_delta"), "*fp32"),
        constants={"BLOCK": triton_bwd.STATS_BLOCK, "HEAD_DIM": head_dim},
    )


def _dkdv_case(head_dim: int, group: int, *, add_dq: bool) -> Sm90Case:
    tiles = triton_bwd.dkdv_tiles(head_dim)
    q_tile, k_tile = _tile_type(tiles.block_q, head_dim), _tile_type(tiles.block_k, head_dim)
    stats_row = _tile_type(1, tiles.block_q, "fp32")
    return Sm90Case(
        name=f"attention_bwd_dkdv_hd{head_dim}_group{group}" + ("_add_dq" if add_dq else ""),
        kernel=triton_bwd.attention_bwd_dkdv_kernel,
        types=dict.fromkeys(("t_q", "t_d_out"), q_tile)
        | dict.fromkeys(("t_k", "t_v", "t_dk", "t_dv"), k_tile)
        | {"t_dq_sum": _tile_type(tiles.block_q, head_dim, "fp32") if add_dq else q_tile}
        | {"t_lse_log2": stats_row, "t_delta": stats_row, "p_end_query": "*i32"}
        | dict.fromkeys(("num_tokens", "num_kv_heads", "num_tiles", "heads_per_section"), "i32")
        | {"scale": "fp32", "scale_log2": "fp32"},
        constants={"GROUP": group, "BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k}
        | {"HEAD_DIM": head_dim, "ADD_DQ": add_dq},
        options=tiles.options,
        needs_tensor_cores=True,
    )


def _dq_case(head_dim: int) -> Sm90Case:
    tiles = triton_bwd.dq_tiles(head_dim)
    q_tile, k_tile = _tile_type(tiles.block_q, head_dim), _tile_type(tiles.block_k, head_dim)
    return Sm90Case(
        name=f"attention_bwd_dq_hd{head_dim}",
        kernel=triton_bwd.attention_bwd_dq_kernel,
        types=dict.fromkeys(("t_q", "t_d_out", "t_dq"), q_tile)
        | {"t_k": k_tile, "t_v": k_tile, "p_lse_log2": "*fp32", "p_delta": "*fp32", "p_first_key": "*i32"}
        | dict.fromkeys(
            ("num_tokens", "num_slots", "num_heads", "num_tiles", "heads_per_section", "group"), "i32"
        )
        | {"scale": "fp32", "scale_log2": "fp32"},
        constants={"BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k, "HEAD_DIM": head_dim},
        options=tiles.options,
        needs_tensor_cores=True,
    )


def _decode_cases() -> list[Sm90Case]:
    strides = [f"{x}_stride_{axis}" for x, axes in (("q", "bh"), ("k", "bth"), ("v", "bth")) for axis in axes]
    combine = [
        Sm90Case(
            name=f"attention_decode_combine_hd{head_dim}_splits{splits}",
            kernel=triton_decode.attention_decode_combine_kernel,
            types={"p_part": "*fp32", "p_lse_log2": "*fp32", "p_out": "*bf16", "num_splits": "i32"},
            constants={"BLOCK_S": splits, "HEAD_DIM": head_dim},
        )
        for head_dim in (64, 128)
        for splits in (16, triton_decode.MAX_SPLITS)
    ]
    attend = [
        Sm90Case(
            name=f"attention_decode_hd{head_dim}_group{group}",
            kernel=triton_decode.attention_decode_kernel,
            types=dict.fromkeys(("p_q", "p_k", "p_v"), "*bf16")
            | {"p_lengths": "*i32", "p_part": "*fp32", "p_lse_log2": "*fp32", "scale_log2": "fp32"}
            | dict.fromkeys(("num_kv_heads", "num_splits", "capacity", "window", *strides), "i32"),
            constants={"GROUP": group, "BLOCK_G": max(16, triton.next_power_of_2(group))}
            | {"HEAD_DIM": head_dim, "BLOCK_T": triton_decode.block_t(head_dim)},
            divisible_by_16=tuple(strides),
            options=triton_decode.OPTIONS,
        )
        for head_dim in (64, 128)
        for group in (1, 36)
    ]
    return [*combine, *attend]


def _triton_forward_cases() -> list[Sm90Case]:
    cases = [
        Sm90Case(
            name="attention_bounds",
            kernel=attention_bounds_kernel,
            types={"p_cu_seqlens": "*i32", "p_first_key": "*i32", "p_end_query": "*i32"}
            | dict.fromkeys(("num_documents", "num_tokens", "window", "num_steps"), "i32"),
            constants={"BLOCK": 256},
        )
    ]
    for head_dim in (64, 128):
        tiles = triton_fwd.forward_tiles(head_dim)
        q_tile, k_tile = (f"tensordesc<bf16[{rows},{head_dim}]>" for rows in (tiles.block_q, tiles.block_k))
        cases.append(
            Sm90Case(
                name=f"attention_fwd_hd{head_dim}",
                kernel=triton_fwd.attention_fwd_kernel,
                types={"t_q": q_tile, "t_k": k_tile, "t_v": k_tile, "t_out": q_tile}
                | {"p_lse": "*fp32", "p_first_key": "*i32", "scale_log2": "fp32"}
                | dict.fromkeys(
                    ("num_tokens", "num_heads", "num_tiles", "heads_per_section", "group"), "i32"
                ),
                constants={"BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k, "HEAD_DIM": head_dim},
                options=tiles.options,
                needs_tensor_cores=True,
            )
        )
    return cases
