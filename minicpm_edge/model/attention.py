"""Causal self-attention with grouped keys, over packed documents or over a cache.

Legend: B batch, T time, S cache positions, N = B·T tokens, D model width, H query heads, K key/value heads,
C head dim, C2 half of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from minicpm_kernels import attention, attention_decode, decode_kernel_serves, rope
from torch import Tensor, nn
from torch.nn import functional as F

from minicpm_edge.model.config import ModelConfig


class KVCache:
    """Keys and values of every layer, (B, max_length, K, C) each, filled from the left.

    All sequences of the batch have the same length.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch_size, max_length, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys_BSKC = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.values_BSKC = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.max_length = max_length
        self.length = 0

    def append(self, layer: int, k_BTKC: Tensor, v_BTKC: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values (B, T, K, C); returns all of that layer's so far, (B, S, K, C).

        Raises:
            ValueError: past ``max_length``.
        """
        end = self.length + k_BTKC.shape[1]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens; {end} were asked for")
        self.keys_BSKC[layer][:, self.length : end] = k_BTKC
        self.values_BSKC[layer][:, self.length : end] = v_BTKC
        return self.keys_BSKC[layer][:, :end], self.values_BSKC[layer][:, :end]

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = min(self.length, length)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every layer of one forward pass shares: rotary tables, document bounds, the cache."""

    cos_NC2: Tensor
    sin_NC2: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    batch_size: int
    cache: KVCache | None = None


class Attention(nn.Module):
    """Attention block: (N, D) → (N, D). Query, key and value weights are one matrix, (H + 2K)·C × D."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        num_rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, num_rows, bias=False)
        self.out = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x_ND: Tensor, context: Context) -> Tensor:
        """Attend within documents (``context.cu_seqlens``), or to the cache and the new tokens where one is given."""
        num_tokens = x_ND.shape[0]
        heads, kv_heads, size = self.num_heads, self.num_kv_heads, self.head_dim
        qkv_NHC = self.qkv(x_ND).view(num_tokens, heads + 2 * kv_heads, size)
        # Split, not sliced: the gradients of slices would be padded with zeros and added up.
        qk_NHC, v_NKC = qkv_NHC.split((heads + kv_heads, kv_heads), 1)
        q_NHC, k_NKC = rope(qk_NHC, context.cos_NC2, context.sin_NC2).split((heads, kv_heads), 1)
        if context.cache is None:
            mixed_NHC = attention(q_NHC, k_NKC, v_NKC, context.cu_seqlens, max_seqlen=context.max_seqlen)
        else:
            mixed_NHC = self._attend_to_cache(q_NHC, k_NKC, v_NKC, context.batch_size, context.cache)
        out_ND: Tensor = self.out(mixed_NHC.reshape(num_tokens, heads * size))
        return out_ND

    def _attend_to_cache(
        self, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, batch: int, cache: KVCache
    ) -> Tensor:
        q_BTHC, k_BTKC, v_BTKC = (x.unflatten(0, (batch, -1)) for x in (q_NHC, k_NKC, v_NKC))
        start, num_new = cache.length, q_BTHC.shape[1]
        k_BSKC, v_BSKC = cache.append(self.layer, k_BTKC, v_BTKC)
        keys_BSKC, values_BSKC = cache.keys_BSKC[self.layer], cache.values_BSKC[self.layer]
        if num_new == 1 and keys_BSKC.dtype == q_NHC.dtype and decode_kernel_serves(q_BTHC[:, 0]):
            lengths_B = torch.full((batch,), start + 1, dtype=torch.int32, device=q_NHC.device)
            return attention_decode(q_BTHC[:, 0], keys_BSKC, values_BSKC, lengths_B)
        # A new token sees the whole cache and the new tokens up to itself.
        visible_TS = torch.ones(num_new, start + num_new, dtype=torch.bool, device=q_NHC.device).tril(start)
        mixed_BHTC = F.scaled_dot_product_attention(
            q_BTHC.transpose(1, 2),
            k_BSKC.transpose(1, 2).to(q_NHC.dtype),
            v_BSKC.transpose(1, 2).to(q_NHC.dtype),
            attn_mask=None if num_new == 1 else visible_TS,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return mixed_BHTC.transpose(1, 2).flatten(0, 1)
