"""Parameter groups by the width rules, and the optimizer's state to the bit."""

import pytest
import torch
from minicpm_training.optimizer import TorchOptimizer, build_optimizer
from minicpm_training.recipe.sections import OptimizerSection

from minicpm_edge.errors import UserError
from minicpm_edge.model.config import ModelConfig
from minicpm_edge.model.mup import group_of
from minicpm_edge.model.transformer import MiniCPM

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    dim_model_base=16,  # m = 4
    tie_word_embeddings=False,
)


def make(seed=0, **settings):
    model = MiniCPM(CONFIG)
    model.init_weights(seed=seed)
    return model, build_optimizer(model, CONFIG, OptimizerSection(**settings))


def step(model, optimizer, seed):
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(seed))
    loss = model.loss(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    (loss.total / 30).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("rule", "embedding_share"), [("input", 1.0), ("matrix", 0.25)])
def test_rates_and_decay_by_role(rule, embedding_share):
    model = MiniCPM(CONFIG)
    model.init_weights(seed=0)
    optimizer = build_optimizer(model, CONFIG, OptimizerSection(weight_decay=0.3), embedding_rule=rule)
    optimizer.set_learning_rate(0.01)
    found = {
        id(p): (g["lr"], g["weight_decay"]) for g in optimizer.optimizers[0].param_groups for p in g["params"]
    }
    expected = {
        "embedding.weight": (0.01 * embedding_share, 0.3),
        "layers.0.attention.qkv.weight": (0.0025, 0.3),
        "layers.1.attention.out.weight": (0.0025, 0.3),
        "layers.0.feed_forward.gate_up.weight": (0.0025, 0.3),
        "layers.1.feed_forward.down.weight": (0.0025, 0.3),
        "head.weight": (0.0025, 0.3),
        "layers.0.attention_norm.weight": (0.01, 0.0),
        "layers.1.feed_forward_norm.weight": (0.01, 0.0),
        "norm.weight": (0.01, 0.0),
    }
    parameters = dict(model.named_parameters())
    for name, value in expected.items():
        assert found[id(parameters[name])] == pytest.approx(value), name
    assert len(found) == len(parameters)  # every parameter is in exactly one group


def test_one_step_is_adamws_formula():
    model, optimizer = make(weight_decay=0.1)
    weight = model.layers[0].attention.qkv.weight
    optimizer.set_learning_rate(0.01)
    before = weight.detach().clone()
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight.grad = gradient.clone()
    optimizer.step()
    lr = 0.01 / 4
    expected = before * (1 - lr * 0.1) - lr * gradient / (gradient.abs() + 1e-8)  # bias-corrected first step
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        model.norm.weight.detach(), torch.ones(64), rtol=0, atol=0
    )  # no decay on norms


def test_state_goes_round_to_the_bit():
    model, optimizer = make()
    optimizer.set_learning_rate(0.01)
    for seed in range(3):
        step(model, optimizer, seed)
    saved = {name: tensor.clone() for name, tensor in optimizer.named_tensors().items()}
    twin, twin_optimizer = make(seed=9)
    twin.load_state_dict(model.state_dict())
    twin_optimizer.load_named_tensors(saved)
    twin_optimizer.set_learning_rate(0.01)
    for pair in ((model, optimizer), (twin, twin_optimizer)):
        step(*pair, seed=7)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(twin.named_parameters())[name]), name


def test_state_of_another_model_is_refused():
    model, optimizer = make()
    optimizer.set_learning_rate(0.01)
    step(model, optimizer, 0)
    tensors = optimizer.named_tensors()
    del tensors["norm.weight.exp_avg"]
    with pytest.raises(UserError, match=r"norm\.weight\.exp_avg is missing"):
        optimizer.load_named_tensors(tensors)


def test_an_optimizer_of_another_kind_needs_no_line_elsewhere():
    """Two of torch's optimizers as one: Muon keeps a momentum of each matrix, AdamW two moments of the rest."""

    def build():
        model = MiniCPM(CONFIG)
        model.init_weights(seed=0)
        matrices = [p for name, p in model.named_parameters() if group_of(name) == "matrix"]
        others = [p for name, p in model.named_parameters() if group_of(name) != "matrix"]
        optimizer = TorchOptimizer(
            optimizers=[
                torch.optim.Muon([{"params": matrices, "lr_multiplier": 2.0}], lr=0.0),
                torch.optim.AdamW([{"params": others, "lr_multiplier": 1.0}], lr=0.0),
            ],
            state_keys=[("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step")],
            names={parameter: name for name, parameter in model.named_parameters()},
        )
        return model, optimizer

    model, optimizer = build()
    optimizer.set_learning_rate(0.01)
    assert [group["lr"] for inner in optimizer.optimizers for group in inner.param_groups] == [0.02, 0.01]
    for seed in range(3):
        step(model, optimizer, seed)
    saved = {name: tensor.clone() for name, tensor in optimizer.named_tensors().items()}
    assert "layers.0.attention.qkv.weight.momentum_buffer" in saved and "norm.weight.exp_avg" in saved
    twin, twin_optimizer = build()
    twin.load_state_dict(model.state_dict())
    twin_optimizer.load_named_tensors(saved)
    twin_optimizer.set_learning_rate(0.01)
    for pair in ((model, optimizer), (twin, twin_optimizer)):
        step(*pair, seed=7)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
