"""The stack: published parameter counts, padded vocabulary, loss, precision, noise."""

import pytest
import torch
import torch.nn.functional as F

from model import context
from model.config import ModelConfig
from model.context import Documents, NoiseKey
from model.hybrid import HybridLM, Precision, forward_flops, initialise_model, parameter_count
from model.layers.attention import AttentionConfig
from model.layers.mamba2 import Mamba2Config
from model.layers.mlp import MLPConfig
from tests.contracts.examples import shake, tokens_and_starts

# (layers, d_model, millions): state-spaces/mamba README sizes; counts of the Mamba-2 spec, vocabulary 50,288, tied.
MAMBA2_SIZES = [(24, 768, 129.0), (48, 1024, 368.3), (48, 1536, 780.2), (64, 2560, 2702.6), (48, 2048, 1343.8)]


def samba(**kwargs: object) -> ModelConfig:
    layers = {
        "M": Mamba2Config(head_dim=8, d_state=16, chunk=8),
        "W": AttentionConfig(n_heads=4, window=7),
        "-": MLPConfig(d_hidden=48),
    }
    return ModelConfig(**{"vocab_size": 61, "d_model": 32, "pattern": "(M-W-)x2", "layers": layers} | kwargs)


def built(config: ModelConfig, precision: Precision = Precision()) -> HybridLM:
    model = HybridLM(config, precision)
    initialise_model(model, seed=1)
    shake(model, seed=1)
    return model


@pytest.mark.parametrize(("n_layers", "d_model", "millions"), MAMBA2_SIZES)
def test_published_mamba2_counts(n_layers: int, d_model: int, millions: float) -> None:
    config = ModelConfig(50_288, d_model, f"(M)x{n_layers}", {"M": Mamba2Config()})
    assert round(parameter_count(config) / 1e6, 1) == millions
    inner, width, heads = 2 * d_model, 2 * d_model + 256, 2 * d_model // 64
    per_layer = d_model * (inner + width + heads) + 5 * width + 3 * heads + inner + inner * d_model + d_model
    assert parameter_count(config) == n_layers * per_layer + 50_288 * d_model + d_model
    model = HybridLM(config, device="meta")
    padding = -50_288 % 128 * d_model
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config) + padding


def test_published_hybrid_count() -> None:
    """Mamba-2-Hybrid 8B (arXiv 2406.07887): 8.655B with an untied vocabulary of 256,000."""
    layers = {
        "M": Mamba2Config(n_groups=8),
        "*": AttentionConfig(n_heads=32, n_kv_heads=8, head_dim=128, rope_theta=None),
        "-": MLPConfig(d_hidden=4 * 4096, activation="gelu", gated=False),
    }
    config = ModelConfig(256_000, 4096, "ratio(56, M, *=0.07, -=0.5)", layers, tie_embeddings=False)
    assert round(parameter_count(config) / 1e9, 3) == 8.655


@pytest.mark.parametrize("tied", [True, False])
def test_padded_rows_take_no_part(tied: bool) -> None:
    """Vocabulary 61 is stored as 128 rows: no probability, no gradient, no logit for the other 67."""
    model = built(samba(tie_embeddings=tied))
    tokens, starts = tokens_and_starts([10, 13])
    targets = tokens.roll(-1, 1)
    out = model(tokens, starts, targets)
    assert model.head.weight.shape == (128, 32)
    logits = model(tokens, starts).logits
    assert logits.shape == (2, 23, 61)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 23)
    assert torch.allclose(out.nll, expected, atol=1e-5)
    with torch.no_grad():
        model.head.weight[61:] = 7.0
    again = model(tokens, starts, targets)
    assert torch.equal(again.nll, out.nll)
    again.nll.sum().backward()
    assert model.head.weight.grad[61:].abs().max() == 0


def test_ignored_targets_cost_nothing() -> None:
    model = built(samba())
    tokens, starts = tokens_and_starts([10, 13])
    targets = tokens.roll(-1, 1)
    targets[:, 5:] = -100
    nll = model(tokens, starts, targets).nll
    assert (nll[:, 5:] == 0).all() and (nll[:, :5] > 0).all()


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_precision_is_explicit(residual: torch.dtype) -> None:
    """Parameters and their gradients stay float32; the loss is float32 whatever the compute dtype."""
    model = built(samba(), Precision(torch.bfloat16, residual))
    tokens, starts = tokens_and_starts([10, 13])
    nll = model(tokens, starts, tokens.roll(-1, 1)).nll
    nll.sum().backward()
    assert nll.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_batch_row_does_not_depend_on_its_company() -> None:
    model = built(samba())
    tokens, starts = tokens_and_starts([10, 13], rows=4)
    together = model(tokens, starts).logits
    assert torch.allclose(model(tokens[2:3], starts[2:3]).logits, together[2:3], atol=1e-5)


def test_documents_from_starts() -> None:
    starts = torch.tensor([[0, 0, 1, 0, 1, 1]], dtype=torch.bool)
    documents = Documents.from_starts(starts, torch.tensor([5]))
    assert documents.index.tolist() == [[0, 0, 1, 1, 2, 3]]
    assert documents.positions.tolist() == [[5, 6, 0, 1, 0, 0]]
    assert not documents.single and Documents.from_starts(starts[:, 2:4]).single


def test_noise_follows_the_sample_not_the_row() -> None:
    key = NoiseKey(seed=1, step=2, samples=torch.tensor([7, 9]))
    other = NoiseKey(seed=1, step=2, samples=torch.tensor([9]))
    assert torch.equal(key.uniform(0, "router", (5,))[1], other.uniform(0, "router", (5,))[0])
    assert not torch.equal(key.uniform(0, "router", (5,)), key.uniform(1, "router", (5,)))


def test_flops_by_hand() -> None:
    """Against the formulas written out: Mamba-2, window of 7 within length 23, SwiGLU, head."""
    config = samba()

    def keys(window: int | None) -> float:
        return sum(min(t + 1, window or 23) for t in range(23)) / 23

    mamba = 2 * 32 * (64 + 96 + 8) + 2 * 4 * 96 + 2 * 64 * 32 + 5 * 64 * 16
    attention = 4 * 2 * 32 * 32 + 4 * keys(7) * 32
    mlp = 2 * 3 * 32 * 48
    assert forward_flops(config, 23, keys) == pytest.approx(2 * (mamba + attention + 2 * mlp) + 2 * 32 * 61)


def test_config_survives_json() -> None:
    import json

    config = samba()
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "(M-Q-)x2"}, "unknown letter"),
        ({"layers": {"M": Mamba2Config(head_dim=7)}}, "layers.M.head_dim: got 7"),
        ({"layers": {"W": AttentionConfig(n_heads=4, n_kv_heads=3)}}, "layers.W.n_kv_heads: got 3"),
        ({"layers": {"W": AttentionConfig(n_heads=4, window=0)}}, "layers.W.window: got 0"),
        ({"layers": {"W": AttentionConfig(n_heads=4, head_dim=3)}}, "layers.W.head_dim: got 3"),
        ({"layers": {"-": MLPConfig(d_hidden=0)}}, "layers.-.d_hidden: got 0"),
        ({"layers": {"MM": MLPConfig(d_hidden=8)}}, "layer letter 'MM'"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
    ],
)
def test_wrong_options_are_refused_with_the_key(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        samba(**change)


def test_document_bounds_are_found_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """All attention layers share them, recomputed blocks too: finding them makes the host wait for the device. Rows of
    one document and decoding need none."""
    calls = []
    find = context.document_bounds
    monkeypatch.setattr(context, "document_bounds", lambda index: calls.append(1) or find(index))
    model = HybridLM(samba(), recompute=True)
    initialise_model(model, seed=1)
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    starts = torch.tensor([[True, False, False, True, False, False, False, True, False]])
    model(tokens, starts, targets=tokens).nll.sum().backward()
    assert len(calls) == 1
    state = model(tokens, torch.zeros_like(starts), carry=True).state
    model(tokens, starts, state=state, carry=True)
    assert len(calls) == 1
