"""Rotary position embedding, out of place, with tables made once for all layers.

RoFormer (Su et al., arXiv 2104.09864) in the half-rotation of Llama and Hugging Face: element i turns with element
i + C/2.

Legend: N tokens, H heads, C head dim, C2 half of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minicpm_kernels.backend import choose_backend


def rope_tables(
    positions_N: Tensor, inv_freq_C2: Tensor, attention_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (N, C2) float32, of positions · inv_freq, times `attention_factor`.

    Args:
        positions_N: of each token in its document, any number type.
        inv_freq_C2: radians a position for each pair of elements, base^(-2i/C) in RoFormer.
        attention_factor: factor on both tables, and so squared on the scores.

    Stretched contexts come in through the arguments: NTK and Llama 3 through `inv_freq_C2`, longrope (arXiv 2402.13753)
    and YaRN (arXiv 2309.00071) through both. The angle is formed in float32, where positions below 2^24 are exact.
    """
    angles_NC2 = positions_N.float()[:, None] * inv_freq_C2.float()
    cos_NC2, sin_NC2 = angles_NC2.cos(), angles_NC2.sin()
    if attention_factor != 1.0:
        cos_NC2, sin_NC2 = cos_NC2 * attention_factor, sin_NC2 * attention_factor
    return cos_NC2, sin_NC2


def rope(x_NHC: Tensor, cos_NC2: Tensor, sin_NC2: Tensor) -> Tensor:
    """Turn each head's vector by its token's angles; returns a new contiguous tensor like `x_NHC`.

    Args:
        x_NHC: queries or keys, (N, H, C), of any floating-point type; a slice of a merged projection is read in place.
        cos_NC2, sin_NC2: of `rope_tables`, (N, C/2). They have no gradient.

    Raises: ValueError for shapes that do not fit, an odd C among them.
    """
    num_tokens, _, head_dim = x_NHC.shape
    expected = (num_tokens, head_dim // 2)
    if head_dim % 2 or cos_NC2.shape != expected or sin_NC2.shape != expected:
        raise ValueError(
            f"x {tuple(x_NHC.shape)} needs cos and sin of shape {expected}, "
            f"not {tuple(cos_NC2.shape)} and {tuple(sin_NC2.shape)}"
        )
    out_NHC: Tensor = _Rope.apply(x_NHC, cos_NC2, sin_NC2)  # type: ignore[no-untyped-call]
    return out_NHC


def rope_reference(x_NHC: Tensor, cos_NC2: Tensor, sin_NC2: Tensor) -> Tensor:
    """The definition, computed in float32."""
    cos_N1C2, sin_N1C2 = cos_NC2[:, None].float(), sin_NC2[:, None].float()
    first_NHC2, second_NHC2 = x_NHC.float().chunk(2, -1)
    turned = (first_NHC2 * cos_N1C2 - second_NHC2 * sin_N1C2, second_NHC2 * cos_N1C2 + first_NHC2 * sin_N1C2)
    return torch.cat(turned, -1).to(x_NHC.dtype)


class _Rope(torch.autograd.Function):
    """The backward is the turn by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x_NHC: Tensor, cos_NC2: Tensor, sin_NC2: Tensor) -> Tensor:
        ctx.save_for_backward(cos_NC2, sin_NC2)
        return _turn(x_NHC, cos_NC2, sin_NC2, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_NHC: Tensor) -> tuple[Tensor, None, None]:
        cos_NC2, sin_NC2 = ctx.saved_tensors
        return _turn(d_out_NHC, cos_NC2, sin_NC2, backward=True), None, None


def _turn(x_NHC: Tensor, cos_NC2: Tensor, sin_NC2: Tensor, *, backward: bool) -> Tensor:
    if choose_backend(x_NHC, "rope").name == "triton":
        from minicpm_kernels.rope_triton import rope_turn

        turned_NHC: Tensor = rope_turn(x_NHC, cos_NC2, sin_NC2, backward)
        return turned_NHC
    sign = -1.0 if backward else 1.0
    # Three passes over memory; a cosine row as long as the head turns both halves in one.
    cos_N1C = torch.cat([cos_NC2, cos_NC2], -1)[:, None].to(x_NHC.dtype)
    sin_N1C2 = sin_NC2[:, None].to(x_NHC.dtype)
    first_NHC2, second_NHC2 = x_NHC.chunk(2, -1)
    out_NHC = x_NHC.contiguous() * cos_N1C
    out_first_NHC2, out_second_NHC2 = out_NHC.chunk(2, -1)
    out_first_NHC2.addcmul_(second_NHC2, sin_N1C2, value=-sign)
    out_second_NHC2.addcmul_(first_NHC2, sin_N1C2, value=sign)
    return out_NHC
