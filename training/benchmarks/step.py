"""Our training step beside a plain PyTorch loop over the same-size Llama of ``transformers``.

Both train on the same batches, from the same weights, with fused AdamW and gradient clipping, in the same precision,
one step of each in turn. Nothing is reported unless both give the same loss and gradient norm on the first step.
``whole`` rows are one document each, so that both attend to the same; ``packed`` rows hold several, as prepared text
does: our step attends within documents, the plain loop over the row.

    python training/benchmarks/step.py [--models tiny ...] [--precisions bf16 fp32] [--steps N] [--threads N]
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from minicpm_training.data.packed_batch import PackedBatch
from minicpm_training.hardware import dtype_of, environment, flops_per_token, peak_flops
from minicpm_training.objectives.next_token import next_token
from minicpm_training.optimizer import build_optimizer
from minicpm_training.recipe.sections import OptimizerSection
from minicpm_training.schedule import warmup_stable_decay
from minicpm_training.trainer import Trainer

from minicpm_edge.formats.checkpoint import hf_state_dict
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.transformer import MiniCPM, count_parameters

RESULTS = Path(__file__).parent / "results" / "step.json"
LR, CLIP = 1e-4, 1.0
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}  # of the first step's loss and gradient norm
# name: (width, d_ff, layers, heads, kv heads, vocabulary, rows, row length)
MODELS = {
    "tiny": (256, 768, 4, 4, 2, 4096, 8, 512),
    "10m": (320, 896, 6, 5, 5, 8192, 8, 512),
    "30m": (512, 1280, 8, 8, 8, 8192, 4, 1024),
}


def llama_config(name: str) -> ModelConfig:
    """A model of that size with neutral scales: the function that ``transformers``' Llama computes."""
    width, feed_forward, layers, heads, kv_heads, vocabulary, _, length = MODELS[name]
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        max_position_embeddings=length,
        scale_emb=1.0,
        scale_depth=layers**0.5,
        dim_model_base=float(width),
        initializer_range=0.02,
    )


def make_batch(name: str, seed: int, *, packed: bool) -> PackedBatch:
    """Rows of random tokens: one document each, or ``packed`` with documents of a quarter of the row on average."""
    *_, vocabulary, rows, length = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, length + 1), generator=generator)
    bounds = set(range(0, rows * length + 1, length))
    if packed:
        bounds |= set(torch.randint(1, rows * length, (3 * rows,), generator=generator).tolist())
    cu_seqlens = torch.tensor(sorted(bounds), dtype=torch.int32)
    return PackedBatch(
        input_ids_BT=ids[:, :-1].contiguous(),
        targets_BT=ids[:, 1:].contiguous(),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()),
        num_targets=rows * length,
        origins=tuple(f"random:{row}" for row in range(rows)),
    )


class Ours:
    """The step of ``minicpm-edge train``, as it is."""

    def __init__(self, model: MiniCPM, batches: list[PackedBatch], precision: str, compiled: bool) -> None:
        self.trainer = Trainer(
            model=model,
            optimizer=build_optimizer(model, model.config, OptimizerSection()),
            objective=next_token(model, compile_model=compiled),
            dataloader=lambda step: [batches[step % len(batches)]],
            schedule=warmup_stable_decay(warmup_steps=0, stable_steps=1 << 30),
            peak_lr=LR,
            clip_norm=CLIP,
            precision=precision,
            step=0,
            tokens=0,
        )

    def step(self) -> tuple[float, float]:
        metrics = self.trainer.train_step()
        return metrics.loss, metrics.grad_norm


class Theirs:
    """``LlamaForCausalLM`` in the loop that its documentation suggests."""

    def __init__(self, ours: MiniCPM, batches: list[PackedBatch], precision: str, compiled: bool) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = ours.config
        self.model = LlamaForCausalLM(
            LlamaConfig(
                **{
                    key: value
                    for key, value in config.to_dict().items()
                    if key not in ("architectures", "model_type", "torch_dtype", "rope_scaling")
                },
                attn_implementation="sdpa",
            )
        )
        missing, unexpected = self.model.load_state_dict(hf_state_dict(ours), strict=False)
        assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
        self.model.train()
        self.forward = torch.compile(self.model) if compiled else self.model
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
        self.batches, self.precision, self.count = batches, precision, 0

    def step(self) -> tuple[float, float]:
        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype_of("bf16"), enabled=self.precision == "bf16"):
            # `shift_labels` are the targets as they are; `labels` would be shifted by one again.
            output = self.forward(
                input_ids=batch.input_ids_BT,
                labels=batch.targets_BT,
                shift_labels=batch.targets_BT,
                use_cache=False,
            )
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return output.loss.item(), norm.item()


def compare(name: str, precision: str, rows_are: str, num_steps: int, compiled: bool) -> dict[str, object]:
    """Check that both compute the same, then time them in turn."""
    config = llama_config(name)
    model = MiniCPM(config)
    model.init_weights(seed=0)
    batches = [make_batch(name, seed, packed=False) for seed in range(4)]
    theirs, ours = (side(model, batches, precision, compiled) for side in (Theirs, Ours))
    first = {"ours": ours.step(), "transformers": theirs.step()}
    for mine, other in zip(*first.values(), strict=True):
        if abs(mine - other) > TOLERANCE[precision] * abs(other):
            raise SystemExit(
                f"{name} {precision}: the two do not compute the same: {first}; nothing is reported"
            )
    if rows_are == "packed":  # the plain loop then attends over whole rows, as it must
        batches[:] = [make_batch(name, seed, packed=True) for seed in range(4)]
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for index in range(num_steps + 2):
        for label, side in (("ours", ours), ("transformers", theirs)):
            start = time.perf_counter()
            side.step()
            if index >= 2:  # the first steps warm up
                seconds[label].append(time.perf_counter() - start)
    *_, rows, length = MODELS[name]
    per_token = flops_per_token(config, count_parameters(config), length)
    peak = max(peak_flops(torch.device("cpu"), precision)[0] for _ in range(5))
    sides = {
        label: {
            "tokens_per_second": round(rows * length / statistics.median(values), 1),
            "mfu": round(rows * length / statistics.median(values) * per_token / peak, 4),
        }
        for label, values in seconds.items()
    }
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["transformers"], strict=True)]
    return {
        "model": name,
        "parameters": count_parameters(config, embeddings=True),
        "batch": f"{rows} x {length}",
        "rows": rows_are,
        "precision": precision,
        "compiled": compiled,
        "steps": num_steps,
        **sides,
        "peak_flops": peak,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(value, 3) for value in statistics.quantiles(ratios, n=4)[::2]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tiny", "10m"])
    parser.add_argument("--precisions", nargs="+", choices=TOLERANCE, default=["bf16", "fp32"])
    parser.add_argument("--rows", nargs="+", choices=("whole", "packed"), default=["whole", "packed"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="both sides under torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for name, precision, rows in itertools.product(arguments.models, arguments.precisions, arguments.rows):
        results.append(compare(name, precision, rows, arguments.steps, arguments.compile))
        print(json.dumps(results[-1]), flush=True)
    from importlib.metadata import version

    record = {
        "date": datetime.date.today().isoformat(),
        "hardware": environment(),
        "transformers": version("transformers"),
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
