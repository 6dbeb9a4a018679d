"""Composition: parallel branches, their gates, and weights shared between places of the stack."""

import json
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import Context, Documents, LayerOutput, NoiseKey
from model.hybrid import HybridLM, Precision, forward_flops, initialise_model, parameter_count
from model.layers.attention import AttentionConfig
from model.layers.base import Costs, Dims, Message, VisibleKeys
from model.layers.mamba2 import Mamba2Config
from model.layers.mlp import MLPConfig
from model.ops.rope import YarnScaling
from model.params import Table
from tests.contracts.examples import shake, tokens_and_starts

LAYERS = {
    "M": Mamba2Config(head_dim=8, d_state=8, chunk=8),
    "*": AttentionConfig(n_heads=4, n_kv_heads=2, qkv_conv=3),
    "W": AttentionConfig(n_heads=4, window=5),
    "Y": AttentionConfig(n_heads=4, rope_scaling=YarnScaling(2.0, original_length=8)),
    "-": MLPConfig(d_hidden=48),
}
COMPOSED = {
    "parallel": {"pattern": "([M*]-)x2"},
    "three branches": {"pattern": "[M*-]W[M*-]", "branch_gates": {"*": 0.15, "-": 0.5}},
    "shared": {"pattern": "MS-MS-MS", "shared": "S-", "layers": LAYERS | {"S": LAYERS["W"]}},
    "both": {"pattern": "([MWY]*)x2", "shared": "*", "branch_gates": {"M": 1.0}},
}
compositions = pytest.mark.parametrize("values", COMPOSED.values(), ids=COMPOSED.keys())


def config(**values: object) -> ModelConfig:
    return ModelConfig(**({"vocab_size": 61, "d_model": 32, "layers": LAYERS} | values))


def built(seed: int = 1, precision: Precision = Precision(), **values: object) -> HybridLM:
    model = HybridLM(config(**values), precision)
    initialise_model(model, seed)
    shake(model, seed)
    return model


def within(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()))


def test_a_parallel_block_is_the_sum_of_its_branches():
    """Written out: one norm, both layers on its output, each times its gate."""
    model = built(pattern="[M*]", branch_gates={"*": 0.15})
    block = model.blocks[0]
    ctx = Context(Documents.from_starts(tokens_and_starts([9, 6])[1]))
    x = torch.randn(2, 15, 32)
    h = block.norm(x, dtype=torch.float32)
    mamba, attention = (branch.mixer(h, ctx).y for branch in block.branches)
    assert torch.allclose(block(x, ctx).y, x + mamba + 0.15 * attention, atol=1e-6)


def test_names_in_the_table():
    """Single layers keep the names of older checkpoints; a gate is a float32 vector that does not decay."""
    table = built(pattern="M[M*]", branch_gates={"*": 0.15}).table()
    assert {"blocks.0.norm.weight", "blocks.0.mixer.A_log", "blocks.1.norm.weight"} <= set(table)
    assert {"blocks.1.branches.0.mixer.A_log", "blocks.1.branches.1.mixer.qkv.weight"} <= set(table)
    assert [name for name in table if name.endswith("gate")] == ["blocks.1.branches.1.gate"]
    gate = table["blocks.1.branches.1.gate"]
    assert (gate.shape, gate.decay, gate.update, gate.dtype) == ((1,), False, "vector", torch.float32)


@compositions
def test_the_table_is_true(values: dict):
    model = built(**values)
    table = model.table()
    assert {name for name, _ in model.named_parameters()} == set(table) == set(model.state_dict()) - {"head.weight"}
    tokens, starts = tokens_and_starts([9, 12])
    model(tokens, starts, tokens.roll(-1, 1)).nll.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    padding = 67 * 32
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters()) - padding


@compositions
def test_steps_equal_the_full_forward(values: dict):
    """Every branch and every place of a shared block carries a state of its own, over a document boundary."""
    model = built(**values)
    tokens, starts = tokens_and_starts([11, 12])
    full = model(tokens, starts).logits
    pieces, state, at = [], None, 0
    for size in [7, 2] + [1] * 14:
        part = slice(at, at + size)
        out = model(tokens[:, part], starts[:, part], state=state, carry=True)
        pieces.append(out.logits)
        state, at = out.state, at + size
    assert within(torch.cat(pieces, dim=1), full, 1e-4)
    swapped = state.rows(torch.tensor([1, 0, 1]))
    assert swapped.rows(torch.tensor([1])).position.tolist() == state.position[:1].tolist()
    again = model(tokens[[1]][:, :1], starts[:, 1:2][[1]], state=swapped.rows(torch.tensor([0]))).logits
    assert within(again, model(tokens[:, :1], starts[:, 1:2], state=state).logits[[1]], 1e-5)


@compositions
def test_documents_are_isolated_to_the_bit(values: dict):
    model = built(**values)
    _, starts = tokens_and_starts([9, 13, 7])
    x = torch.randn(2, 29, 32)
    changed = x.clone()
    changed[:, :9] = 3.0 * changed[:, :9] + 1.0
    changed[:, 22:] -= 2.0
    results = []
    for case in (x, changed):
        leaf = case.clone().requires_grad_()
        y, ctx = leaf, Context(Documents.from_starts(starts))
        for block in model.blocks:
            y = block(y, ctx).y
        y[:, 9:22].square().sum().backward()
        results.append((y[:, 9:22].detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][:, 9:22], results[1][1][:, 9:22])
    assert results[0][1][:, :9].abs().max() == 0 and results[0][1][:, 22:].abs().max() == 0


@compositions
def test_recomputation_changes_nothing(values: dict):
    model = built(**values)
    tokens, starts = tokens_and_starts([9, 12])
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        model(tokens, starts, tokens.roll(-1, 1)).nll.sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@compositions
@pytest.mark.parametrize("letters", ["M", "*-", "M*-WYS"])
def test_recomputation_by_letters(values: dict, letters: str):
    """Only blocks that hold a layer of these letters run twice, and no bit of a gradient changes; a block that ran once
    more would cost its time, one that ran once less its memory."""
    model = built(**values)
    tokens, starts = tokens_and_starts([9, 12])
    runs: dict[nn.Module, int] = {}
    for block in {*model.blocks}:
        block.register_forward_pre_hook(lambda block, _: runs.update({block: runs.get(block, 0) + 1}))
    counted, gradients = [], []
    for model.recompute in (False, letters):
        runs.clear()
        model.zero_grad()
        model(tokens, starts, tokens.roll(-1, 1)).nll.sum().backward()
        counted.append(dict(runs))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    for block, held in zip(model.blocks, model.config.blocks, strict=True):
        assert counted[1][block] == counted[0][block] * (2 if {*letters} & {*held} else 1)


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_a_gate_keeps_the_dtypes(residual: torch.dtype):
    """A float32 gate on a bfloat16 branch leaves the residual stream in its dtype and gets a float32 gradient."""
    model = built(precision=Precision(torch.bfloat16, residual), pattern="[M*]-", branch_gates={"*": 0.15})
    tokens, starts = tokens_and_starts([9, 12])
    ctx = Context(Documents.from_starts(starts), dtype=torch.bfloat16)
    assert model.blocks[0](torch.randn(2, 21, 32).to(residual), ctx).y.dtype == residual
    model(tokens, starts, tokens.roll(-1, 1)).nll.sum().backward()
    assert model.blocks[0].branches[1].gate.grad.dtype == torch.float32


def test_shared_weights_are_copies_that_learn_together():
    """One block at three places computes what three equal blocks compute, and its gradient is the sum of theirs."""
    shared = built(pattern="(MW)x3", shared="W")
    apart = HybridLM(config(pattern="(MW)x3"))
    values = dict(shared.named_parameters())
    with torch.no_grad():
        for name, parameter in apart.named_parameters():
            parameter.copy_(values[name.replace("blocks.3.", "blocks.1.").replace("blocks.5.", "blocks.1.")])
    tokens, starts = tokens_and_starts([9, 12])
    for model in (shared, apart):
        model(tokens, starts, tokens.roll(-1, 1)).nll.sum().backward()
    assert torch.equal(shared(tokens, starts).logits, apart(tokens, starts).logits)
    theirs = {name: parameter.grad for name, parameter in apart.named_parameters()}
    for name, parameter in shared.named_parameters():
        others = [theirs[name.replace("blocks.1.", f"blocks.{place}.")] for place in (3, 5)] if ".1." in name else []
        assert within(parameter.grad, sum(others, theirs[name]), 1e-5), name


def test_counts_and_costs():
    """Shared weights are counted once and computed at every place; every branch counts as a residual addition."""
    apart, shared = config(pattern="(MW)x3"), config(pattern="(MW)x3", shared="W")
    window = parameter_count(config(pattern="MW")) - parameter_count(config(pattern="M"))
    assert parameter_count(apart) - parameter_count(shared) == 2 * window

    def keys(window: int | None) -> float:
        return 4.0

    assert forward_flops(apart, 16, keys) == forward_flops(shared, 16, keys)
    parallel = config(pattern="([MW])x3")
    assert forward_flops(parallel, 16, keys) == forward_flops(apart, 16, keys)
    assert parallel.dims.n_residuals == 6 and len(parallel.stacked) == 6 and parallel.stack == "[MW]" * 3
    assert parameter_count(apart) - parameter_count(parallel) == 3 * 32  # norms


@dataclass(frozen=True)
class ProbeConfig:
    """Returns zeros, and tells which layer it is and which noise it gets."""

    residual: ClassVar[str] = "add"
    parallel: ClassVar[tuple[str, ...]] = ()
    kind: Literal["probe"] = "probe"

    def check(self, d_model: int) -> None: ...

    def table(self, dims: Dims) -> Table:
        return {}

    def costs(self, dims: Dims, length: int, keys: VisibleKeys) -> Costs:
        return Costs(0, 0, 0, 0)

    def messages(self, dims: Dims) -> list[Message]:
        return []

    def build(self, dims: Dims, device: torch.device | str | None = None) -> nn.Module:
        return Probe()


class Probe(nn.Module):
    def forward(self, x: Tensor, ctx: Context, state: None = None) -> LayerOutput:
        noise = ctx.noise.uniform(ctx.layer, "probe", (1,))
        return LayerOutput(x * 0, None, {"one": x.new_ones(()) * x.shape[0]}, {"noise": noise.sum()})


def test_branches_report_apart():
    """Losses of all branches are added, metrics and noise are each branch's own, also behind parallel blocks."""
    model = HybridLM(config(pattern="P[PP]P", layers={"P": ProbeConfig()}))
    initialise_model(model, 0)
    tokens, starts = tokens_and_starts([5])
    out = model(tokens, starts, noise=NoiseKey(1, 2, torch.arange(2)))
    names = ["layers.0.noise", "layers.1.branches.0.noise", "layers.1.branches.1.noise", "layers.2.noise"]
    assert list(out.metrics) == names and len({value.item() for value in out.metrics.values()}) == 4
    assert out.losses["one"] == 4 * 2


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"pattern": "M-", "shared": "Q"}, "shared: got 'Q', wants letters of the pattern"),
        ({"pattern": "M-", "shared": "*"}, "shared: got '*', wants letters of the pattern"),
        ({"pattern": "[M*]*", "shared": "*"}, "shared: got '*', wants letters of the pattern that never stand in"),
        ({"pattern": "M*", "branch_gates": {"*": 0.1}}, "branch_gates.*: got 0.1, wants a letter that stands in brack"),
        ({"pattern": "[M*]", "branch_gates": {"*": float("inf")}}, "branch_gates.*: got inf, wants a finite number"),
        ({"pattern": "[M*]-["}, ">>[<<"),
    ],
)
def test_wrong_compositions_are_refused(values: dict, line: str):
    with pytest.raises(ValueError) as error:
        config(**values)
    assert line in str(error.value)


def test_a_kind_with_its_own_residual_is_no_branch():
    class Own(ProbeConfig):
        residual: ClassVar[str] = "own"

    with pytest.raises(ValueError, match="brings its own residual"):
        config(pattern="[M>]", layers=LAYERS | {">": Own()})


def test_configs_from_before_composition_are_read():
    """Breaks when a checkpoint saved without these options can no longer be resumed."""
    plain = config(pattern="M*-")
    values = json.loads(json.dumps(plain.to_dict()))
    for older in ("shared", "branch_gates"):
        del values[older]
    for older in ("qk_norm", "logit_cap", "scale", "qkv_conv", "rope_fraction", "rope_scaling"):
        del values["layers"]["W"][older]
    for older in ("d_ssm", "norm", "norm_before_gate"):
        del values["layers"]["M"][older]
    assert ModelConfig.from_dict(values) == plain


@compositions
def test_config_survives_json(values: dict):
    assert ModelConfig.from_dict(json.loads(json.dumps(config(**values).to_dict()))) == config(**values)
