"""HybridLM: embedding, blocks in pattern order, norm, head and loss. The stack never asks which layer kind it holds.

Legend: B batch rows, T tokens, D width, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.block import Blocks, Norm, add_losses, block_table, build_block
from model.config import ModelConfig
from model.context import (
    Collectives,
    Context,
    Documents,
    LayerOutput,
    NoiseKey,
    SingleProcess,
    chunk_bounds,
)
from model.layers.base import Projection, VisibleKeys, norm_spec
from model.ops.head import VocabularyPart, linear_cross_entropy
from model.params import (
    Normal,
    ParamSpec,
    Place,
    Table,
    allocate,
    count_active,
    count_parameters,
    initialise,
    split_evenly,
)

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Precision:
    """compute: dtype of matmuls, convolutions and attention. residual: dtype of the residual stream."""

    compute: torch.dtype = torch.float32
    residual: torch.dtype = torch.float32


class ModelState(NamedTuple):
    """What decoding carries. layers: one state a block (None for kinds without), of parallel branches a tuple of
    theirs. position: (B,) int64, distance of the next token from the start of its document."""

    layers: tuple[Any, ...]
    position: Tensor

    def rows(self, chosen: Tensor) -> "ModelState":
        """The state of these rows, (b,) int64; a row may be chosen often."""
        return _rows(self, chosen)


class ModelOutput(NamedTuple):
    """nll: (B, T) float32, 0 where nothing is predicted; None without targets. logits: (B, T or 1, V) float32; None
    with targets. state: when asked for. losses: auxiliary losses, summed over layers. metrics: per block, named
    `layers.0.NAME`, of parallel branches `layers.0.branches.0.NAME`. counts: named by module, `blocks.0.mixer.NAME`."""

    nll: Tensor | None
    logits: Tensor | None
    state: ModelState | None
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    counts: dict[str, Tensor]


class Hidden(NamedTuple):
    """What the head reads. x: (B, T or 1, D), normalised, in the compute dtype. The rest as in `ModelOutput`."""

    x: Tensor
    state: ModelState | None
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    counts: dict[str, Tensor]


class Embedding(nn.Module):
    """Rows of the vocabulary; of a tensor rank, its own rows and zeros for the others: a part of a sum."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, place: Place) -> None:
        super().__init__()
        self.rows = _vocabulary_rows(vocab_size, place) if place.size > 1 else None

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        if self.rows is None:
            return F.embedding(tokens, self.weight).to(dtype)
        start, stop = self.rows
        mine = (tokens >= start) & (tokens < stop)
        return (F.embedding((tokens - start).clamp(0, stop - start - 1), self.weight) * mine[..., None]).to(dtype)


class Head(nn.Module):
    """Logits or loss. Called as a module, tied or not, so that ZeRO-3 can gather its weight.

    A tensor rank has the logits of its rows of the vocabulary alone; what ranks tell each other for the loss is two
    numbers a token.
    """

    weight: nn.Parameter

    def __init__(self, vocab_size: int, mesh: Collectives) -> None:
        super().__init__()
        self.mesh = mesh
        self.start, stop = _vocabulary_rows(vocab_size, mesh.place)
        self.vocab_size = stop - self.start

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            assert self.mesh.place.size == 1, "logits are given by one tensor rank; several give the loss"
            return F.linear(x, self.weight.to(x.dtype)).float()[..., : self.vocab_size]
        part = VocabularyPart(self.start, self.mesh.gather_over_tensor) if self.mesh.place.size > 1 else None
        return linear_cross_entropy(x, self.weight, targets, vocab_size=self.vocab_size, dtype=x.dtype, part=part)


def vocabulary_spec(config: ModelConfig) -> ParamSpec:
    """Of embedding and head: (V, D), stored with padding rows."""
    return ParamSpec(
        (config.vocab_size, config.d_model),
        Normal(config.embedding_std),
        split=split_evenly(0, config.vocab_size),
        update="embedding",
        pad_rows=VOCABULARY_MULTIPLE,
    )


def _vocabulary_rows(vocab_size: int, place: Place) -> tuple[int, int]:
    """The rows `[start, stop)` of embedding and head that a tensor rank holds."""
    return split_evenly(0, vocab_size).bounds(place.rank, place.size)


def model_table(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of the model by its logical name, in the order of the forward pass."""
    dims = config.dims
    table = {"embedding.weight": vocabulary_spec(config)}
    for place in dict.fromkeys(config.places):
        block = block_table(*config.block(place), dims)
        table |= {f"blocks.{place}.{name}": spec for name, spec in block.items()}
    table["norm.weight"] = norm_spec(config.d_model)
    if not config.tie_embeddings:
        table["head.weight"] = vocabulary_spec(config)
    return table


def parameter_count(config: ModelConfig) -> int:
    return count_parameters(model_table(config))


def active_parameter_count(config: ModelConfig) -> int:
    """Parameters that serve one token: of routed experts, the chosen ones alone."""
    return count_active(model_table(config))


def forward_flops(config: ModelConfig, length: int, keys: VisibleKeys) -> float:
    """Model FLOPs of one forward pass per token; a training step is three times that.

    length: tokens per row. keys: mean number of visible keys under a window (see `VisibleKeys`).
    """
    layers = sum(layer.costs(config.dims, length, keys).flops for layer in config.stacked)
    return layers + 2 * config.d_model * config.vocab_size


class HybridLM(nn.Module):
    """A braid of layers as a language model.

    config: the architecture. precision: explicit dtypes. recompute: run blocks again in the backward pass instead of
    keeping their activations: all of them, or those that hold a layer of these letters. Parameters are allocated, not
    drawn: see `initialise_model`.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision = Precision(),
        *,
        recompute: bool | str = False,
        mesh: Collectives | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.precision, self.recompute = config, precision, recompute
        self.mesh = mesh or SingleProcess()
        place, dims = self.mesh.place, replace(config.dims, place=self.mesh.place)
        self.embedding = Embedding(config.vocab_size, place)
        blocks = {i: build_block(*config.block(i), dims, device) for i in dict.fromkeys(config.places)}
        self.blocks = Blocks(blocks, config.places)
        self.first_layer = [0, *accumulate(map(len, config.blocks))]
        self.norm = Norm(dims, device)
        self.head = Head(config.vocab_size, self.mesh)
        vocabulary = vocabulary_spec(config)
        self.embedding.weight = allocate(vocabulary, device, place)
        self.head.weight = self.embedding.weight if config.tie_embeddings else allocate(vocabulary, device, place)

    def table(self) -> Table:
        """Logical name -> ParamSpec, for every parameter of this model."""
        return model_table(self.config)

    def forward(
        self,
        tokens: Tensor,
        starts: Tensor,
        targets: Tensor | None = None,
        *,
        state: ModelState | None = None,
        carry: bool = False,
        last_only: bool = False,
        clock: int = 0,
        noise: NoiseKey | None = None,
    ) -> ModelOutput:
        """tokens: (B, T) int64. starts: (B, T) bool, True where a document begins. targets: (B, T) int64, -100 where
        nothing is predicted. state: what came before. carry: return the state after the last token. last_only: logits
        of the last token alone. clock: tokens trained so far. noise: key of this step's randomness.

        Every rank is given whole rows; a context rank returns what belongs to its chunk of them (`chunk_bounds`).
        """
        hidden = self.hidden(tokens, starts, state=state, carry=carry, last_only=last_only, clock=clock, noise=noise)
        result = self.head(hidden.x, None if targets is None else self._chunk(targets))
        nll, logits = (None, result) if targets is None else (result, None)
        return ModelOutput(nll, logits, hidden.state, hidden.losses, hidden.metrics, hidden.counts)

    def hidden(
        self,
        tokens: Tensor,
        starts: Tensor,
        *,
        state: ModelState | None = None,
        carry: bool = False,
        last_only: bool = False,
        clock: int = 0,
        noise: NoiseKey | None = None,
    ) -> Hidden:
        """All of `forward` but the head, for those who need logits of a few tokens only: `model.head(x)` of these."""
        mesh = self.mesh
        alone = mesh.place.size == mesh.context_size == 1
        assert alone or not (carry or last_only or state), "several ranks train a model together, one decodes"
        documents = Documents.from_starts(starts, None if state is None else state.position)
        documents = documents.chunk(mesh.context_rank, mesh.context_size)
        x = mesh.leave(self.embedding(self._chunk(tokens), dtype=self.precision.residual))
        ctx = Context(
            documents=documents,
            dtype=self.precision.compute,
            tokens=clock,
            noise=noise,
            embedding=x,
            mesh=mesh,
            row=tokens.shape[1],
            carry=carry,
        )
        states: list[Any] = []
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        again = self.config.recomputed(self.recompute) if torch.is_grad_enabled() else frozenset()
        for index, block in enumerate(self.blocks):
            before = None if state is None else state.layers[index]
            out = _run(block, x, ctx.at(self.first_layer[index]), before, index in again)
            x = out.y
            states.append(out.state)
            losses = add_losses(losses, out.losses)
            metrics |= {f"layers.{index}.{name}": value for name, value in (out.metrics or {}).items()}
            place = self.blocks.places[index]
            counts = add_losses(counts, {f"blocks.{place}.{n}": value for n, value in (out.counts or {}).items()})
        x = ctx.enter(self.norm(x[:, -1:] if last_only else x, dtype=self.precision.compute))
        after = ModelState(tuple(states), documents.positions[:, -1] + 1) if carry else None
        return Hidden(x, after, losses, metrics, counts)

    @torch.no_grad()
    def store_as_computed(self) -> "HybridLM":
        """Keeps the weights of projections, and of an untied head, in the compute dtype to which every use casts them:
        the same numbers without the cast, which takes most of a decoding step. For models that train no more."""
        for module in self.modules():
            if isinstance(module, Projection) and not module.wide:
                module.weight.data = module.weight.data.to(self.precision.compute)
        if not self.config.tie_embeddings:
            self.head.weight.data = self.head.weight.data.to(self.precision.compute)
        return self

    def adjustments(self, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What layers add to parameters of theirs after an optimizer step, given its counts over all ranks."""
        return {
            f"{path}.{name}": delta
            for path, own in _by_module(counts).items()
            for name, delta in cast(Counting, self.get_submodule(path)).adjust(own).items()
        }

    def summaries(self, counts: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the counts of a step say about each layer, as plain values: `layers.0.NAME`, as metrics are named."""
        return {
            f"{path.replace('blocks.', 'layers.', 1).removesuffix('.mixer')}.{name}": value
            for path, own in _by_module(counts).items()
            for name, value in cast(Counting, self.get_submodule(path)).summarise(own).items()
        }

    def _chunk(self, rows: Tensor) -> Tensor:
        """This context rank's tokens of whole rows (B, T)."""
        low, high = chunk_bounds(rows.shape[1], self.mesh.context_rank, self.mesh.context_size)
        return rows[:, low:high]


def _run(block: nn.Module, x: Tensor, ctx: Context, state: Any, again: bool) -> LayerOutput:
    if again:
        return checkpoint(block, x, ctx=ctx, state=state, use_reentrant=False, preserve_rng_state=False)
    return block(x, ctx=ctx, state=state)


class Counting(Protocol):
    """A layer that returns counts."""

    def adjust(self, counts: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def summarise(self, counts: dict[str, Tensor]) -> dict[str, Any]: ...


def _by_module(counts: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in counts.items():
        path, _, name = key.rpartition(".")
        modules.setdefault(path, {})[name] = value
    return modules


def _rows(state: Any, chosen: Tensor) -> Any:
    """States are named tuples of tensors that have a row for each row of the batch, of None and of such tuples."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state[chosen]
    parts = [_rows(part, chosen) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def initialise_model(model: HybridLM, seed: int, names: Iterable[str] | None = None) -> None:
    """Draws the initial values of every parameter (or of `names`), the same in every layout and on every device, by as
    many threads as torch has."""
    table = model.table()
    chosen = set(table if names is None else names)
    wanted = [(name, parameter) for name, parameter in model.named_parameters() if name in chosen]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        drawn = [threads.submit(initialise, p, name, table[name], seed, model.mesh.place) for name, p in wanted]
        for parameter in drawn:
            parameter.result()
