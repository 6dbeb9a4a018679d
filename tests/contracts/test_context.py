"""A layer on context ranks gives what it gives on whole rows: every kind that says it can, in float64, its ranks being
threads of one process. And it asks for nothing that its kind does not declare."""

from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.context import Context, Documents, chunk_bounds
from model.layers.attention import AttentionConfig
from model.layers.base import Message
from model.layers.moe import MoEConfig
from model.registry import LayerConfig
from tests.contracts.examples import D_MODEL, EXAMPLES, braid
from tests.model.context_threads import ThreadRank, run_chunks

LENGTH = 25
WIDE = AttentionConfig(n_heads=4, n_kv_heads=2, window=20, qkv_conv=9)
"""Its window and convolution reach over several of the shorter chunks."""
SHARED = MoEConfig(n_experts=4, d_hidden=24, capacity_factor=0.5, scope="batch", balance_weight=0.1)
PER_ROW = replace(SHARED, scope="row", top_k=2, z_weight=0.1)
ALL = EXAMPLES | {"over several ranks": WIDE, "shared capacity": SHARED, "capacity per row": PER_ROW}
CASES = {name: layer for name, layer in ALL.items() if "context" in layer.parallel}


def starts() -> Tensor:
    """Rows of: one document; documents that begin just at borders; short ones; one that began before the row."""
    found = torch.zeros(4, LENGTH, dtype=torch.bool)
    found[:3, 0] = True
    found[1, [6, 8, 12, 16, 18]] = True
    found[2, [3, 4, 11, 13, 14, 20, 24]] = True
    found[3, 19] = True
    return found


def gradients(y: Tensor, loss: Tensor, x: Tensor, module: torch.nn.Module) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [y, loss, *torch.autograd.grad((y * weights).sum() + loss, [x, *parameters], allow_unused=True)]


@pytest.mark.parametrize("size", [2, 3, 4, LENGTH])
@pytest.mark.parametrize("layer", CASES.values(), ids=CASES.keys())
def test_chunks_give_what_whole_rows_give(layer: LayerConfig, size: int) -> None:
    """Outputs, losses, gradients of inputs and of weights."""
    mixer = braid(layer).double().blocks[0].mixer
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, LENGTH, D_MODEL, generator=generator, dtype=torch.float64, requires_grad=True)
    whole = mixer(x, Context(Documents.from_starts(starts()), dtype=torch.float64, row=LENGTH))
    losses = sum((whole.losses or {}).values(), x.new_zeros(()))
    wanted = gradients(whole.y, losses, x, mixer)
    for got, want in zip(gradients(*run_chunks(mixer, x, starts(), size), x, mixer), wanted, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layer", CASES.values(), ids=CASES.keys())
def test_chunks_are_as_exact_in_bfloat16(layer: LayerConfig, device: str) -> None:
    """In the compute dtype, with the backends that this device has, chunks are as near to float32 as whole rows are."""
    mixer, where = braid(layer).blocks[0].mixer.to(device), starts().to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, LENGTH, D_MODEL, generator=generator).bfloat16().to(device).requires_grad_()
    wide = x.detach().float().requires_grad_()

    def whole(x: Tensor) -> list[Tensor]:
        out = mixer(x, Context(Documents.from_starts(where), dtype=x.dtype, row=LENGTH))
        return gradients(out.y, sum((out.losses or {}).values(), wide.new_zeros(())), x, mixer)

    y, loss = run_chunks(mixer, x, where, 3)
    chunks = gradients(y, loss.float(), x, mixer)
    for want, one, several in zip(whole(wide), whole(x), chunks, strict=True):
        if want is not None:
            rounding = (one.float() - want).norm()
            assert (several.float() - want).norm() <= 2 * rounding + 0.01 * want.norm()


@pytest.mark.parametrize("layer", ALL.values(), ids=ALL.keys())
def test_a_layer_asks_for_what_its_kind_declares(layer: LayerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls and bytes: the formulas of traffic read the declaration. Breaks when a kind forgets one."""
    size = 3 if "context" in layer.parallel else 1
    dims, rows, mine = ModelConfig(61, D_MODEL, "L", {"L": layer}).dims, 4, LENGTH // size
    last = chunk_bounds(LENGTH, size - 1, size)[0]  # no rank has more to its left
    asked: list[tuple[str, int | None, float]] = []

    def watch(ask: str) -> None:
        call = getattr(ThreadRank, ask)

        def watched(rank: ThreadRank, x: Tensor, *rest: Any) -> Tensor:
            if rank.context_rank == 0:
                bytes_ = x.nbytes + (rest[0].nbytes if ask == "prefix" else 0)
                asked.append((ask, rest[0] if ask == "halo" else None, bytes_))
            return call(rank, x, *rest)

        monkeypatch.setattr(ThreadRank, ask, watched)

    for ask in get_args(get_type_hints(Message)["ask"]):
        watch(ask)
    x = torch.randn(rows, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(0)).bfloat16()
    run_chunks(braid(layer).blocks[0].mixer, x, starts(), size)
    times, size_of = {"token": rows * mine, "row": rows, "batch": 1}, {"compute": 2, "float32": 4, "int64": 8}
    declared = [
        (m.ask, min(last, m.reach or LENGTH) if m.ask == "halo" else None, m.elements * times[m.per] * size_of[m.dtype])
        for m in layer.messages(dims)
    ]
    assert sorted(asked, key=str) == sorted(declared, key=str)
