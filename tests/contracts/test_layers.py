"""What every layer kind must satisfy: causality, isolation of documents, decoding, determinism, a true table."""

import pytest
import torch

from model.context import Context, Documents
from model.hybrid import HybridLM, Precision, initialise_model
from model.params import Place, draw_box, initialise, local_layout
from model.registry import LayerConfig
from tests.contracts.examples import D_MODEL, EXAMPLES, braid, tokens_and_starts

kinds = pytest.mark.parametrize("layer", EXAMPLES.values(), ids=EXAMPLES.keys())


def within(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()))


def same(layer: LayerConfig, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit; for kinds that route tokens, whose matmuls take other tokens' rows too, up to rounding."""
    return within(a, b, 1e-6) if getattr(layer, "routed", False) else torch.equal(a, b)


def run(model: HybridLM, x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The first block alone on inputs x."""
    return model.blocks[0](x, Context(Documents.from_starts(starts))).y


def inputs(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    _, starts = tokens_and_starts(lengths)
    x = torch.randn(*starts.shape, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return x, starts


@kinds
def test_no_output_reads_a_later_token(layer: LayerConfig) -> None:
    model = braid(layer)
    x, starts = inputs([23])
    for at in (1, 7, 22):
        changed = x.clone()
        changed[:, at:] += 1.0
        assert same(layer, run(model, x, starts)[:, :at], run(model, changed, starts)[:, :at])
        assert not torch.equal(run(model, x, starts)[:, at:], run(model, changed, starts)[:, at:])


@kinds
def test_no_gradient_flows_to_a_later_token(layer: LayerConfig) -> None:
    model = braid(layer)
    x, starts = inputs([23])
    x.requires_grad_()
    run(model, x, starts)[:, :9].square().sum().backward()
    assert x.grad[:, 9:].abs().max() == 0
    assert x.grad[:, :9].abs().min(dim=-1).values.max() > 0


@kinds
def test_a_document_never_sees_its_neighbours(layer: LayerConfig) -> None:
    """Changing documents A and C leaves B's outputs and the gradients of B's inputs as they are."""
    model = braid(layer)
    x, starts = inputs([9, 13, 7])
    changed = x.clone()
    changed[:, :9] = 3.0 * changed[:, :9] + 1.0
    changed[:, 22:] -= 2.0
    results = []
    for case in (x, changed):
        case = case.clone().requires_grad_()
        y = run(model, case, starts)
        y[:, 9:22].square().sum().backward()
        results.append((y[:, 9:22].detach(), case.grad))
    assert same(layer, results[0][0], results[1][0])
    assert same(layer, results[0][1][:, 9:22], results[1][1][:, 9:22])
    assert results[0][1][:, :9].abs().max() == 0 and results[0][1][:, 22:].abs().max() == 0


@kinds
def test_a_packed_document_equals_the_document_alone(layer: LayerConfig) -> None:
    model = braid(layer).eval()
    x, starts = inputs([9, 13, 7])
    alone = run(model, x[:, 9:22], starts[:, 9:22])
    assert within(run(model, x, starts)[:, 9:22], alone, 1e-5)


@kinds
def test_prefill_and_steps_equal_the_full_forward(layer: LayerConfig) -> None:
    """Across a document boundary, past the window, with the state handed on after 1, 4 and then single tokens."""
    model = braid(layer).eval()
    tokens, starts = tokens_and_starts([11, 16])
    full = model(tokens, starts).logits
    pieces, state, at = [], None, 0
    for size in [1, 4] + [1] * 22:
        part = slice(at, at + size)
        out = model(tokens[:, part], starts[:, part], state=state, carry=True)
        pieces.append(out.logits)
        state, at = out.state, at + size
    assert at == 27
    assert within(torch.cat(pieces, dim=1), full, 1e-4)


@kinds
def test_one_layer_steps_equal_its_full_forward(layer: LayerConfig) -> None:
    model = braid(layer).eval()
    x, starts = inputs([11, 8])
    full = run(model, x, starts)
    pieces, state, position = [], None, None
    for at in range(x.shape[1]):
        documents = Documents.from_starts(starts[:, at : at + 1], position)
        out = model.blocks[0](x[:, at : at + 1], Context(documents, carry=True), state)
        pieces.append(out.y)
        state, position = out.state, documents.positions[:, -1] + 1
    assert within(torch.cat(pieces, dim=1), full, 1e-4)


@kinds
def test_gradients_flow_through_a_carried_state(layer: LayerConfig) -> None:
    """Two halves with the state carried give the gradients of the whole: what carried-state training needs."""
    model = braid(layer).eval()
    x, starts = inputs([20])
    whole = x.clone().requires_grad_()
    run(model, whole, starts)[:, 10:].square().sum().backward()
    halves = x.clone().requires_grad_()
    first = model.blocks[0](halves[:, :10], Context(Documents.from_starts(starts[:, :10]), carry=True))
    position = torch.full((2,), 10)
    documents = Documents.from_starts(starts[:, 10:], position)
    model.blocks[0](halves[:, 10:], Context(documents), first.state).y.square().sum().backward()
    assert within(halves.grad, whole.grad, 1e-4)


@kinds
def test_recomputation_changes_nothing(layer: LayerConfig) -> None:
    model = braid(layer)
    tokens, starts = tokens_and_starts([9, 12])
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        model(tokens, starts, tokens.roll(-1, 1)).nll.sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@kinds
def test_the_table_is_true(layer: LayerConfig) -> None:
    """Names and shapes of the module's parameters are those of the table; every one that is trained receives a
    gradient."""
    model = braid(layer)
    table = model.table()
    assert {name for name, _ in model.named_parameters()} == set(table)
    for name, parameter in model.named_parameters():
        assert parameter.shape == local_layout(table[name]).shape
    tokens, starts = tokens_and_starts([9, 12])
    model(tokens, starts, tokens.roll(-1, 1)).nll.sum().backward()
    trained = [p for name, p in model.named_parameters() if not table[name].frozen]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


@kinds
def test_initial_values_do_not_depend_on_the_split(layer: LayerConfig) -> None:
    """Every tensor rank of 1, 2 and 4 starts from the same numbers as one process."""
    model = braid(layer, depth=1)
    for name, spec in model.table().items():
        whole = draw_box(name, spec, tuple((0, n) for n in spec.shape), seed=3)
        for size in (1, 2, 4):
            seen = torch.zeros(spec.shape)
            for rank in range(size):
                layout = local_layout(spec, Place(rank, size))
                local = torch.full(layout.shape, float("nan"))
                initialise(local, name, spec, 3, Place(rank, size))
                for piece in layout.pieces:
                    part = local.flatten()[piece.offset : piece.offset + piece.numel]
                    where = tuple(slice(*span) for span in piece.box)
                    assert torch.equal(part.view(whole[where].shape), whole[where])
                    seen[where] += piece.owner
            assert (seen == 1).all(), f"{name}: every element has exactly one owner"


@kinds
def test_same_seed_same_model(layer: LayerConfig) -> None:
    a, b = braid(layer), braid(layer)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    initialise_model(b, seed=2)
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@kinds
def test_bfloat16_compute_stays_close(layer: LayerConfig) -> None:
    model = braid(layer)
    tokens, starts = tokens_and_starts([9, 12])
    exact = model(tokens, starts, tokens.roll(-1, 1)).nll
    model.precision = Precision(torch.bfloat16, torch.float32)
    rounded = model(tokens, starts, tokens.roll(-1, 1)).nll
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.1 * exact.abs().mean()


@kinds
@pytest.mark.parametrize("tied", [True, False])
def test_weights_stored_as_computed_give_the_same_numbers(layer: LayerConfig, tied: bool) -> None:
    """What generation and evaluation load: the cast is taken once instead of at every use, and nothing else is cast."""
    model = braid(layer, tie_embeddings=tied).eval()
    model.precision = Precision(torch.bfloat16, torch.float32)
    tokens, starts = tokens_and_starts([9, 12])
    with torch.no_grad():
        before = model(tokens, starts).logits
        dtypes = {p.dtype for p in model.store_as_computed().parameters()}
        assert torch.equal(model(tokens, starts).logits, before)
    assert torch.float32 in dtypes and torch.bfloat16 in dtypes
