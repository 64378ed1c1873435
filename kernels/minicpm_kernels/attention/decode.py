"""Attention of one new token per sequence to its cache of keys and values.

Legend: B sequences, T capacity of the cache, H query heads, K key heads, C head dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minicpm_kernels.backend import choose_backend, interpreter_enabled


def attention_decode(
    q_BHC: Tensor,
    k_BTKC: Tensor,
    v_BTKC: Tensor,
    lengths_B: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend each sequence's newest token to the first ``lengths_B`` entries of its cache; returns (B, H, C).

    Args:
        q_BHC, k_BTKC, v_BTKC: (B, H, C), (B, T, K, C) twice; float32, bfloat16 or float16, all of
            one type. The newest token's own key and value are already in the cache.
        lengths_B: int32, tokens in each cache, from 0 (the output is then zero) to T.
        scale: factor on the scores, positive; by default 1/sqrt(C).
        window: see only this many of the latest tokens.

    Grouped heads read their keys once, and pieces of one cache in parallel, as in Flash-Decoding (Dao et al., 2023).
    For inference: there is no gradient. Raises ``ValueError`` on shapes or types that do not fit.
    """
    if q_BHC.dim() != 3:
        raise ValueError(f"attention_decode: q has {q_BHC.dim()} dimensions; give (B, H, C)")
    batch, heads, head_dim = q_BHC.shape
    if k_BTKC.shape != v_BTKC.shape or k_BTKC.dim() != 4 or k_BTKC.shape[0] != batch:
        raise ValueError(
            f"attention_decode: q {tuple(q_BHC.shape)}, k {tuple(k_BTKC.shape)}, v {tuple(v_BTKC.shape)}; "
            "give (B, H, C), (B, T, K, C), (B, T, K, C)"
        )
    if k_BTKC.shape[3] != head_dim or heads % k_BTKC.shape[2]:
        raise ValueError(
            f"attention_decode: {heads} query heads of {head_dim} do not fit {k_BTKC.shape[2]} key heads of "
            f"{k_BTKC.shape[3]}"
        )
    if not q_BHC.dtype == k_BTKC.dtype == v_BTKC.dtype:
        raise ValueError(
            f"attention_decode: q {q_BHC.dtype}, k {k_BTKC.dtype}, v {v_BTKC.dtype} must be one type"
        )
    if lengths_B.shape != (batch,) or lengths_B.dtype != torch.int32:
        raise ValueError(
            f"attention_decode: lengths is {lengths_B.dtype} {tuple(lengths_B.shape)}; give int32 ({batch},)"
        )
    if scale is None:
        scale = head_dim**-0.5
    if window is not None and window < 1:
        raise ValueError(f"attention_decode: window={window} must be at least 1, or None")
    out_BHC: Tensor = _attention_decode_op(q_BHC, k_BTKC, v_BTKC, lengths_B, float(scale), window)
    return out_BHC


@torch.library.custom_op("minicpm_kernels::attention_decode", mutates_args=())
def _attention_decode_op(
    q_BHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, lengths_B: Tensor, scale: float, window: int | None
) -> Tensor:
    if decode_kernel_serves(q_BHC):
        from minicpm_kernels.attention.triton_decode import attention_triton_decode

        # A copy of one token costs nothing; of a cache it would cost what the kernel saves.
        for name, x_BTKC in (("k", k_BTKC), ("v", v_BTKC)):
            if x_BTKC.stride(-1) != 1:
                raise ValueError(f"attention_decode: {name} must be contiguous in its last dimension")
        q_BHC = q_BHC.contiguous()
        with torch.cuda.device_of(q_BHC):
            return attention_triton_decode(q_BHC, k_BTKC, v_BTKC, lengths_B, scale=scale, window=window)
    return attention_decode_reference(q_BHC, k_BTKC, v_BTKC, lengths_B, scale=scale, window=window)


@_attention_decode_op.register_fake
def _(
    q_BHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, lengths_B: Tensor, scale: float, window: int | None
) -> Tensor:
    return q_BHC.new_empty(q_BHC.shape)


def decode_kernel_serves(q_BHC: Tensor) -> bool:
    """Whether Triton runs and has a kernel for these queries: matmuls need the widths and types of tensor cores.

    Where it has none, ``attention_decode`` reads the whole capacity of the cache.
    """
    if choose_backend(q_BHC, "attention_decode").name != "triton" or q_BHC.shape[2] not in (16, 32, 64, 128):
        return False
    return q_BHC.dtype in (torch.bfloat16, torch.float16) or interpreter_enabled()


def attention_decode_reference(
    q_BHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, lengths_B: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """The same in plain torch; it reads the whole capacity of the cache, so slice it where that is much
    longer."""
    positions_T = torch.arange(k_BTKC.shape[1], device=q_BHC.device)
    visible_BT = positions_T < lengths_B[:, None]
    if window is not None:
        visible_BT &= positions_T >= lengths_B[:, None] - window
    # Entries beyond the length may hold anything, NaN too, and 0 * NaN is NaN: they are zeroed, not only
    # masked.
    v_BTKC = v_BTKC.masked_fill(~visible_BT[:, :, None, None], 0)
    out_BH1C = F.scaled_dot_product_attention(
        q_BHC[:, :, None],
        k_BTKC.masked_fill(~visible_BT[:, :, None, None], 0).transpose(1, 2),
        v_BTKC.transpose(1, 2),
        attn_mask=visible_BT[:, None, None],
        scale=scale,
        enable_gqa=True,
    )
    # A softmax over nothing is NaN; an empty cache gives zero, as the kernel does.
    return out_BH1C[:, :, 0].masked_fill((lengths_B <= 0)[:, None, None], 0).contiguous()
