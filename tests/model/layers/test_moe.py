"""Mixture of experts: against all experts computed densely, a count of choices by hand, and published sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.context import Context, Documents, LayerOutput
from model.hybrid import HybridLM, Precision, active_parameter_count, initialise_model, model_table, parameter_count
from model.layers.attention import AttentionConfig
from model.layers.base import Dims
from model.layers.mamba import MambaConfig
from model.layers.mlp import MLPConfig, activate
from model.layers.moe import MoE, MoEConfig

D = 8


def built(config: MoEConfig, seed: int = 0) -> MoE:
    layer = config.build(Dims(D, 1)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer


def rows(lengths: list[int], batch: int = 2, seed: int = 0) -> tuple[Tensor, Context]:
    starts = torch.zeros(batch, sum(lengths), dtype=torch.bool)
    starts[:, [sum(lengths[:i]) for i in range(len(lengths))]] = True
    x = torch.randn(*starts.shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, Context(Documents.from_starts(starts), dtype=torch.float64)


def dense(layer: MoE, x: Tensor, kept: Tensor | None = None) -> Tensor:
    """Every expert on every token, weighted by what the router says; kept: (n, k) bool."""
    cfg, flat = layer.config, x.flatten(0, 1)
    logits = flat @ layer.router.weight.t()
    scores = logits.softmax(-1) if cfg.score == "softmax" else logits.sigmoid()
    ranked = scores if layer.bias is None else scores + layer.bias
    chosen = ranked.argsort(-1, descending=True)[:, : cfg.top_k]
    weights = scores.gather(1, chosen)
    if cfg.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * cfg.route_scale
    if kept is not None:
        weights = weights * kept
    ups, downs = (w.unflatten(0, (cfg.n_experts, -1)) for w in (layer.up.weight, layer.down.weight))
    outputs = []
    for up, down in zip(ups, downs, strict=True):
        h = flat @ up.t()
        if cfg.gated:
            gate, up_half = h.chunk(2, -1)
            h = activate(cfg.activation, gate) * up_half
        else:
            h = activate(cfg.activation, h)
        outputs.append(h @ down.t())
    y = torch.stack(outputs, 1).gather(1, chosen[..., None].expand(-1, -1, D))
    y = (y * weights[..., None]).sum(1).view(x.shape)
    if layer.shared is None:
        return y
    return y + layer.shared(x, Context(Documents.from_starts(torch.zeros(x.shape[:2], dtype=torch.bool)))).y


CASES = {
    "switch": MoEConfig(4, 6, activation="relu", gated=False),
    "top 2": MoEConfig(5, 6, top_k=2, renormalise=True),
    "all": MoEConfig(3, 6, top_k=3, activation="gelu"),
    "sigmoid with bias": MoEConfig(6, 6, top_k=3, score="sigmoid", bias_rate=0.1, route_scale=2.5, renormalise=True),
    "shared": MoEConfig(4, 6, top_k=2, shared_hidden=10),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_the_equation_and_its_gradients(config: MoEConfig):
    """In float64, against every expert computed densely; an expert that nobody chooses has a gradient of zeros."""
    layer, (x, ctx) = built(config), rows([7, 5])
    x.requires_grad_()
    weights = [p for p in layer.parameters() if p.requires_grad]
    functional = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours, theirs = layer(x, ctx).y, dense(layer, x)
    assert torch.allclose(ours, theirs, atol=1e-12)
    got = torch.autograd.grad(ours, [x, *weights], functional)
    want = torch.autograd.grad(theirs, [x, *weights], functional)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_expert_is_an_mlp_scaled_by_its_gate(score: str):
    layer, (x, ctx) = built(MoEConfig(1, 6, score=score)), rows([9])
    mlp = MLPConfig(6).build(Dims(D, 1)).double()
    with torch.no_grad():
        mlp.up.weight.copy_(layer.up.weight)
        mlp.down.weight.copy_(layer.down.weight)
    gate = torch.ones(1) if score == "softmax" else torch.sigmoid(x @ layer.router.weight.t())
    assert torch.allclose(layer(x, ctx).y, gate * mlp(x, ctx).y, atol=1e-12)


def kept_by_hand(chosen: list[list[list[int]]], index: Tensor, config: MoEConfig) -> list[list[bool]]:
    """Which choices an expert takes, counted one by one."""
    batch, length, k = len(chosen), len(chosen[0]), config.top_k
    assert config.capacity_factor is not None
    share = config.capacity_factor * k * length / config.n_experts
    limit = math.ceil(share * batch if config.scope == "batch" else share)
    taken: dict[tuple, int] = {}
    kept = []
    for row in range(batch):
        for t in range(length):
            decisions = []
            for expert in chosen[row][t]:
                counter = (expert,) if config.scope == "batch" else (expert, row, int(index[row, t]))
                taken[counter] = taken.get(counter, 0) + 1
                decisions.append(taken[counter] <= limit)
            kept.append(decisions)
    return kept


@pytest.mark.parametrize("scope", ["row", "batch"])
@pytest.mark.parametrize(("factor", "top_k"), [(0.5, 1), (0.4, 2), (0.3, 3), (100.0, 2)])
def test_capacity_drops_the_last_and_counts_them(scope: str, factor: float, top_k: int):
    config = MoEConfig(4, 6, top_k=top_k, capacity_factor=factor, scope=scope)
    layer, (x, ctx) = built(config), rows([6, 11, 4], batch=3)
    chosen = (x @ layer.router.weight.t()).argsort(-1, descending=True)[..., :top_k].tolist()
    kept = torch.tensor(kept_by_hand(chosen, ctx.documents.index, config))
    out = layer(x, ctx)
    assert out.counts["dropped"] == (~kept).sum()
    assert (factor < 100) == bool((~kept).any()), "the case must drop something, or nothing"
    assert torch.allclose(out.y, dense(layer, x, kept), atol=1e-12)
    assert "dropped" not in layer.eval()(x, ctx).counts, "evaluation drops nothing"


def test_capacity_by_row_knows_no_neighbours():
    """A document that crowds an expert takes nothing from the next one; over the batch it does, and the log says so."""
    for scope, independent in (("row", True), ("batch", False)):
        config = MoEConfig(2, 6, capacity_factor=0.5, scope=scope)
        assert (config.shares is None) == independent
        layer, (x, ctx) = built(config), rows([8, 8])
        changed = x.clone()
        changed[:, :8] = layer.router.weight[0].detach() * 10
        after, before = (layer(v, ctx).y[:, 8:] for v in (changed, x))
        assert torch.allclose(after, before, atol=1e-12) == independent


@pytest.mark.parametrize("scope", ["row", "batch"])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_balance_loss_is_its_weight_at_uniform_routing(scope: str, top_k: int, score: str):
    layer, (x, ctx) = built(MoEConfig(6, 4, top_k=top_k, balance_weight=0.03, scope=scope, score=score)), rows([20])
    with torch.no_grad():
        layer.router.weight.zero_()
    assert layer(x, ctx).losses["balance"].item() / 40 == pytest.approx(0.03, rel=1e-6)


def test_the_losses_are_the_published_ones():
    """The balance loss of each row alone, summed over tokens; the z-loss; and they pull the right way."""
    config = MoEConfig(4, 6, top_k=2, balance_weight=0.1, z_weight=0.01)
    layer, (x, ctx) = built(config), rows([6, 5], batch=3)
    logits = x @ layer.router.weight.t()
    expected = 0.0
    for row in logits:
        chosen = F.one_hot(row.argsort(-1, descending=True)[:, :2], 4).sum(1).double()
        expected += 0.1 * 4 * (chosen.mean(0) / 2 * row.softmax(-1).mean(0)).sum() * 11
    losses = layer(x, ctx).losses
    assert losses["balance"].item() == pytest.approx(expected.item(), rel=1e-9)
    assert losses["router_z"].item() == pytest.approx(0.01 * logits.logsumexp(-1).square().sum().item(), rel=1e-9)
    losses["balance"].backward()
    with torch.no_grad():
        layer.router.weight -= 0.5 * layer.router.weight.grad
    assert layer(x, ctx).losses["balance"] < losses["balance"]


def test_the_bias_balances_and_changes_no_weight():
    """An expert that gets too much is chosen less; the outputs' weights never see the bias."""
    layer, (x, ctx) = built(MoEConfig(6, 4, top_k=2, score="sigmoid", bias_rate=0.02)), rows([200])
    x = x + 0.5  # some experts are liked better

    def spread(out: LayerOutput) -> float:
        return layer.summarise(out.counts)["load_max"]

    with torch.no_grad():
        layer.bias.zero_()
        first = layer(x, ctx)
        for _ in range(100):
            layer.bias += layer.adjust(layer(x, ctx).counts)["bias"]
    assert spread(layer(x, ctx)) < 1.15 < spread(first)
    assert torch.allclose(layer(x, ctx).y, dense(layer, x), atol=1e-12)
    assert layer.bias.requires_grad is False


def test_loads_are_told():
    layer, (x, ctx) = built(MoEConfig(4, 6, top_k=2, capacity_factor=0.25)), rows([16])
    told = layer.summarise(layer(x, ctx).counts)
    assert sum(told["expert_load"]) == pytest.approx(4, abs=1e-3) and max(told["expert_load"]) >= 1
    assert 0 < told["dropped"] < 1
    assert layer.adjust({}) == {}


def test_the_router_stays_float32():
    """Rounded to bfloat16, router weights that differ by less than one part in 256 send tokens elsewhere."""
    config = ModelConfig(61, D, "E", {"E": MoEConfig(4, 6, top_k=2)})
    model = HybridLM(config, Precision(torch.bfloat16, torch.bfloat16))
    initialise_model(model, 0)
    seen = []
    model.blocks[0].mixer.router.register_forward_hook(lambda m, inputs, out: seen.extend([inputs[0].dtype, out.dtype]))
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bool))
    assert seen == [torch.float32] * 2
    assert model.table()["blocks.0.mixer.router.weight"].comm_dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"top_k": 5}, "top_k: got 5, wants 1 to n_experts=4"),
        ({"top_k": 0}, "top_k: got 0, wants 1 to n_experts=4"),
        ({"n_experts": 0}, "n_experts: got 0, wants a positive number"),
        ({"d_hidden": 0}, "d_hidden: got 0"),
        ({"capacity_factor": 0.0}, "capacity_factor: got 0.0, wants a positive number, or none"),
        ({"bias_rate": -1.0}, "bias_rate: got -1.0, wants 0 or more"),
        ({"scope": "rank"}, "scope: got 'rank', wants one of row, batch"),
        ({"score": "argmax"}, "score: got 'argmax', wants one of softmax, sigmoid"),
        ({"activation": "swish"}, "activation: got 'swish'"),
    ],
)
def test_wrong_options_are_refused_with_the_key(options: dict, line: str):
    with pytest.raises(ValueError, match=line):
        MoEConfig(**({"n_experts": 4, "d_hidden": 6} | options)).check(D)


@pytest.mark.parametrize(
    ("d_model", "blocks", "mixer", "expert", "experts", "total", "active"),
    [
        (512, 8, MambaConfig(), 1536, 42, 542, 26),
        (768, 16, MambaConfig(), 2304, 42, 2439, 117),
        (512, 8, AttentionConfig(8), 2048, 32, 545, 25),
        (768, 16, AttentionConfig(12), 3072, 32, 2454, 114),
    ],
)
def test_published_sizes(d_model: int, blocks: int, mixer, expert: int, experts: int, total: int, active: int):
    """MoE-Mamba and Transformer-MoE, tables 5 and 6 of arXiv 2401.04081: millions without embeddings."""
    layers = {"M": mixer, "E": MoEConfig(experts, expert, activation="relu", gated=False)}
    config = ModelConfig(256, d_model, f"(ME)x{blocks}", layers)
    embedding = model_table(config)["embedding.weight"].numel
    assert round((parameter_count(config) - embedding) / 1e6) == total
    assert round((active_parameter_count(config) - embedding) / 1e6) == active
