"""Attention of one new token per sequence to its cache of keys and values.

Legend: B sequences, T capacity of the cache, H query heads, K key heads, D head dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minicpm_kernels.backend import choose_backend, interpreter_enabled


def attention_decode(
    q_BHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    lengths_B: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend each sequence's newest token to the first ``lengths_B`` entries of its cache; returns (B, H, D).

    Args:
        q_BHD, k_BTKD, v_BTKD: one type; the newest token's own key and value are already in the cache.
        lengths_B: int32, tokens in each cache, from 0 (the output is then zero) to T.
        scale: factor on the scores, positive; by default 1/sqrt(D).
        window: see only this many of the latest tokens.

    For inference: there is no gradient. Raises ``ValueError`` on shapes or types that do not fit.
    """
    if q_BHD.dim() != 3:
        raise ValueError(f"attention_decode: q has {q_BHD.dim()} dimensions; give (B, H, D)")
    batch, heads, head_dim = q_BHD.shape
    if k_BTKD.shape != v_BTKD.shape or k_BTKD.dim() != 4 or k_BTKD.shape[0] != batch:
        raise ValueError(
            f"attention_decode: q {tuple(q_BHD.shape)}, k {tuple(k_BTKD.shape)}, v {tuple(v_BTKD.shape)}; "
            "give (B, H, D), (B, T, K, D), (B, T, K, D)"
        )
    if k_BTKD.shape[3] != head_dim or heads % k_BTKD.shape[2]:
        raise ValueError(
            f"attention_decode: {heads} query heads of {head_dim} do not fit {k_BTKD.shape[2]} key heads of "
            f"{k_BTKD.shape[3]}"
        )
    if not q_BHD.dtype == k_BTKD.dtype == v_BTKD.dtype:
        raise ValueError(
            f"attention_decode: q {q_BHD.dtype}, k {k_BTKD.dtype}, v {v_BTKD.dtype} must be one type"
        )
    if lengths_B.shape != (batch,) or lengths_B.dtype != torch.int32:
        raise ValueError(
            f"attention_decode: lengths is {lengths_B.dtype} {tuple(lengths_B.shape)}; give int32 ({batch},)"
        )
    if scale is None:
        scale = head_dim**-0.5
    if window is not None and window < 1:
        raise ValueError(f"attention_decode: window={window} must be at least 1, or None")
    out_BHD: Tensor = _attention_decode_op(q_BHD, k_BTKD, v_BTKD, lengths_B, float(scale), window)
    return out_BHD


@torch.library.custom_op("minicpm_kernels::attention_decode", mutates_args=())
def _attention_decode_op(
    q_BHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, lengths_B: Tensor, scale: float, window: int | None
) -> Tensor:
    if decode_kernel_serves(q_BHD):
        from minicpm_kernels.attention.triton_decode import attention_triton_decode

        # A copy of one token costs nothing; of a cache it would cost what the kernel saves.
        for name, x_BTKD in (("k", k_BTKD), ("v", v_BTKD)):
            if x_BTKD.stride(-1) != 1:
                raise ValueError(f"attention_decode: {name} must be contiguous in its last dimension")
        q_BHD = q_BHD.contiguous()
        with torch.cuda.device_of(q_BHD):
            return attention_triton_decode(q_BHD, k_BTKD, v_BTKD, lengths_B, scale=scale, window=window)
    return attention_decode_reference(q_BHD, k_BTKD, v_BTKD, lengths_B, scale=scale, window=window)


@_attention_decode_op.register_fake
def _(
    q_BHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, lengths_B: Tensor, scale: float, window: int | None
) -> Tensor:
    return q_BHD.new_empty(q_BHD.shape)


def decode_kernel_serves(q_BHD: Tensor) -> bool:
    """Whether Triton runs and has a kernel for these queries: products need the widths and types of tensor cores.

    Where it has none, ``attention_decode`` reads the whole capacity of the cache.
    """
    if choose_backend(q_BHD, "attention_decode").name != "triton" or q_BHD.shape[2] not in (16, 32, 64, 128):
        return False
    return q_BHD.dtype in (torch.bfloat16, torch.float16) or interpreter_enabled()


def attention_decode_reference(
    q_BHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, lengths_B: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """The same in plain torch; it reads the whole capacity of the cache, so slice it where that is much
    longer."""
    positions_T = torch.arange(k_BTKD.shape[1], device=q_BHD.device)
    visible_BT = positions_T < lengths_B[:, None]
    if window is not None:
        visible_BT &= positions_T >= lengths_B[:, None] - window
    # Entries beyond the length may hold anything, NaN too, and 0 * NaN is NaN: they are zeroed, not only
    # masked.
    v_BTKD = v_BTKD.masked_fill(~visible_BT[:, :, None, None], 0)
    out_BH1D = F.scaled_dot_product_attention(
        q_BHD[:, :, None],
        k_BTKD.masked_fill(~visible_BT[:, :, None, None], 0).transpose(1, 2),
        v_BTKD.transpose(1, 2),
        attn_mask=visible_BT[:, None, None],
        scale=scale,
        enable_gqa=True,
    )
    # A softmax over nothing is NaN; an empty cache gives zero, as the kernel does.
    return out_BH1D[:, :, 0].masked_fill((lengths_B <= 0)[:, None, None], 0).contiguous()
