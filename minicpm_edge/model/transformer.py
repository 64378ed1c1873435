"""The decoder: MiniCPM's architecture and, with neutral scales, the Llama family's.

Legend: B batch, T time, N = B·T tokens, D model width, C2 half the head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from minicpm_kernels import linear_cross_entropy, rms_norm, rms_norm_residual, rope_tables
from torch import Tensor, nn
from torch.nn import functional as F

from minicpm_edge.model.attention import Attention, Context, KVCache
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.mlp import FeedForward
from minicpm_edge.model.moe import MixtureOfExperts
from minicpm_edge.model.mup import EmbeddingRule, group_of, param_groups
from minicpm_edge.model.rope import inverse_frequencies

# Paper, section 6.4.
LOAD_BALANCE_WEIGHT = 0.01


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Summed losses of one batch: sums, so that micro-batches of unequal size add up.

    Divide by the number of targets of the whole batch: ``total`` (differentiable; nats, with z-loss and the
    router's losses) and ``cross_entropy`` (detached; nats).
    """

    total: Tensor
    cross_entropy: Tensor
    num_targets: Tensor


class Norm(nn.Module):
    """RMSNorm that also takes in the block before it: residual + scale · branch, then normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps, self.branch_scale = config.rms_norm_eps, config.residual_scale

    def forward(self, residual_ND: Tensor, branch_ND: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns (normalised, new residual)."""
        if branch_ND is None:
            return rms_norm(residual_ND, self.weight, eps=self.eps), residual_ND
        normalised_ND, new_residual_ND = rms_norm_residual(
            residual_ND, branch_ND, self.weight, eps=self.eps, branch_scale=self.branch_scale
        )
        return normalised_ND, new_residual_ND


class Layer(nn.Module):
    """One pre-norm block. A residual add is left to the next norm, which does both in one pass over memory."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config)
        self.attention = Attention(config, index)
        self.feed_forward_norm = Norm(config)
        self.feed_forward = MixtureOfExperts(config) if config.num_experts else FeedForward(config)

    def forward(
        self, residual_ND: Tensor, branch_ND: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(residual, branch not yet added) → the same after this layer, and a router's load-balance loss."""
        x_ND, residual_ND = self.attention_norm(residual_ND, branch_ND)
        branch_ND = self.attention(x_ND, context)
        x_ND, residual_ND = self.feed_forward_norm(residual_ND, branch_ND)
        if isinstance(self.feed_forward, MixtureOfExperts):
            branch_ND, load_balance_loss = self.feed_forward(x_ND)
            return residual_ND, branch_ND, load_balance_loss
        return residual_ND, self.feed_forward(x_ND), None


class MiniCPM(nn.Module):
    """Decoder-only transformer: RMSNorm, rotary attention with grouped keys, SwiGLU, MiniCPM's scales.

    Parameters are left uninitialised; call :meth:`init_weights` or load a checkpoint.
    """

    inv_freq_C2: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Norm(config)
        self.head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.register_buffer("inv_freq_C2", inverse_frequencies(config), persistent=False)

    def reset_buffers(self) -> None:
        """Recompute the rotary frequencies, in float32, after the model was made on the meta device or cast."""
        self.inv_freq_C2 = inverse_frequencies(self.config).to(self.embedding.weight.device)

    @property
    def head_weight_VD(self) -> Tensor:
        """The output matrix: the embedding's own where tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def init_weights(self, *, seed: int, embedding_rule: EmbeddingRule = "input") -> None:
        """Fill every parameter by the one table of :mod:`minicpm_edge.model.mup`; the same seed, the same bits."""
        table = param_groups(self.config, embedding_rule=embedding_rule)
        generator = torch.Generator(device=self.embedding.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            group = table[group_of(name)]
            if group.ones:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=group.init_std, generator=generator)

    def hidden(
        self,
        input_ids_BT: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final normalised states (B, T, D).

        Args:
            input_ids_BT: token ids.
            cu_seqlens: int32, bounds of the packed documents over the B·T tokens, starting with 0 and ending with
                B·T; positions restart and attention stops at each. Default: every sequence is one document.
            max_seqlen: length of the longest document (default: T); only a bound for scheduling.
            cache: past keys and values; the new tokens are appended. Excludes ``cu_seqlens``.

        Raises:
            ValueError: for a cache together with ``cu_seqlens``, or one with too little room.
        """
        hidden_BTD, _ = self._decode(input_ids_BT, cu_seqlens, max_seqlen, cache)
        return hidden_BTD

    def _decode(
        self, input_ids_BT: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, cache: KVCache | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Final states (B, T, D) and the load-balance loss of every mixture of experts."""
        if cache is not None and cu_seqlens is not None:
            raise ValueError("a cache holds one document a sequence: cu_seqlens and cache exclude each other")
        context = self._context(input_ids_BT, cu_seqlens, max_seqlen, cache)
        # A pass over (N, D) of its own, where every layer makes dozens: a fused kernel would not pay.
        residual_ND = self.embedding(input_ids_BT.flatten()) * self.config.scale_emb
        branch_ND: Tensor | None = None
        balance: list[Tensor] = []
        for layer in self.layers:
            residual_ND, branch_ND, load_balance_loss = layer(residual_ND, branch_ND, context)
            if load_balance_loss is not None:
                balance.append(load_balance_loss)
        x_ND, _ = self.norm(residual_ND, branch_ND)
        if cache is not None:
            cache.length += input_ids_BT.shape[1]
        hidden_BTD: Tensor = x_ND.view(*input_ids_BT.shape, -1)
        return hidden_BTD, balance

    def forward(
        self, input_ids_BT: Tensor, *, cu_seqlens: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits (B, T, V) in float32; arguments and errors as for :meth:`hidden`."""
        return self.logits(self.hidden(input_ids_BT, cu_seqlens=cu_seqlens, cache=cache))

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Scaled logits (…, V) in float32 of final states (…, D)."""
        return F.linear(hidden_BTD, self.head_weight_VD).float() * self.config.logit_scale

    def loss(
        self,
        input_ids_BT: Tensor,
        targets_BT: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        z_loss: float = 0.0,
    ) -> Loss:
        """Summed cross-entropy of a batch, in nats; the logits of all tokens are never held at once.

        Args:
            input_ids_BT: token ids, (B, T).
            targets_BT: the id to predict at each position, (B, T); -100 where there is none.
            cu_seqlens: as for :meth:`hidden`.
            max_seqlen: as for :meth:`hidden`.
            z_loss: weight of log(Z)² (PaLM, arXiv 2204.02311, section 5).

        Returns:
            Sums over the targets. Mixtures of experts add 0.01 × their load-balance loss to ``total``.
        """
        hidden_BTD, balance = self._decode(input_ids_BT, cu_seqlens, max_seqlen, None)
        result = linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.head_weight_VD,
            targets_BT.flatten(),
            logit_scale=self.config.logit_scale,
            z_loss=z_loss,
        )
        total = result.loss_sum + result.z_loss_sum
        if balance:
            total = total + LOAD_BALANCE_WEIGHT * torch.stack(balance).mean() * result.num_targets
        return Loss(total=total, cross_entropy=result.loss_sum.detach(), num_targets=result.num_targets)

    def _context(
        self, input_ids_BT: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, cache: KVCache | None
    ) -> Context:
        batch, time = input_ids_BT.shape
        device = input_ids_BT.device
        positions_N = torch.arange(batch * time, device=device)
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, batch * time + 1, time, dtype=torch.int32, device=device)
            positions_N = positions_N % time + (cache.length if cache is not None else 0)
        else:
            document_N = torch.bucketize(positions_N, cu_seqlens[1:], right=True)
            positions_N = positions_N - cu_seqlens[document_N]
        inv_freq_C2 = self.inv_freq_C2
        if self.config.rope_scaling is not None and self.config.rope_scaling.depends_on_length:
            # All that shares a cache must turn alike, so its room decides, not what it holds by now.
            length = cache.max_length if cache is not None else max_seqlen or time
            inv_freq_C2 = inverse_frequencies(self.config, length).to(device)
        cos_NC2, sin_NC2 = rope_tables(positions_N, inv_freq_C2, self.config.attention_factor)
        return Context(
            cos_NC2=cos_NC2,
            sin_NC2=sin_NC2,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen or time,
            batch_size=batch,
            cache=cache,
        )


def count_parameters(config: ModelConfig, *, embeddings: bool = False, active: bool = False) -> int:
    """Number of parameters, computed without allocating any (meta device).

    Args:
        embeddings: count the embedding and an untied head too (the paper's figures leave them out).
        active: of a mixture of experts, only what one token uses.
    """
    with torch.device("meta"):
        model = MiniCPM(config)
    share = config.num_experts_per_tok / config.num_experts if active and config.num_experts else 1.0
    total = 0
    for name, parameter in model.named_parameters():
        if not embeddings and name.split(".")[0] in ("embedding", "head"):
            continue
        is_expert = parameter.dim() == 3
        total += round(parameter.numel() * share) if is_expert else parameter.numel()
    return total
