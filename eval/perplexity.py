"""Loss on held-out documents, per token and per byte of text, each token once.

Legend: b rows of a batch, T sequence length.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.compress import compressed_sizes
from data.mixture import IGNORE, Rows, Sample
from data.permutation import key_of, permutation
from data.shards import Compression, ShardSet
from data.stream import Batch, collate
from model.context import Documents


@dataclass(frozen=True)
class Perplexity:
    """loss: nats per predicted token. bits_per_byte: all nats over ln 2, per byte of the documents' text; the tokens
    that end documents are paid for too. tokens: predicted ones. bytes: of text, in UTF-8. documents: how many."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def evaluate(
    nll: Callable[[Batch], Tensor],
    shards: ShardSet,
    *,
    sequence_length: int,
    rows: int = 1,
    max_tokens: int | None = None,
    rank: int = 0,
    size: int = 1,
    all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> Perplexity:
    """The loss of a model on the documents of `shards`, the same on every number of ranks up to rounding.

    nll: negative log-likelihoods (b, T) in nats of a batch's targets; called equally often on every rank. rows: rows
    of a batch, at most. max_tokens: only whole documents with about that many tokens (see `chosen_documents`).
    all_reduce: the sum of a float64 tensor over ranks.
    """
    documents = chosen_documents(shards, max_tokens)
    total = torch.zeros(2, dtype=torch.float64)
    for batch in validation_rows(shards, sequence_length, documents, rows=rows, rank=rank, size=size):
        losses = nll(batch).detach().double().cpu()
        predicted = batch.targets != IGNORE
        total += torch.stack([losses[predicted].sum(), predicted.sum().double()])
    total = all_reduce(total)
    nats, tokens = total.tolist()
    text_bytes = text_bytes_of(shards, documents)
    return Perplexity(nats / tokens, nats / math.log(2) / text_bytes, int(tokens), text_bytes, len(documents))


@dataclass(frozen=True)
class LengthPerplexity:
    """Rows of `length` tokens. beyond_tokens: predicted ones with more context than `limit`, the rows of training, can
    hold. beyond_loss: nats per such token; None when there is none."""

    length: int
    limit: int
    whole: Perplexity
    beyond_tokens: int
    beyond_loss: float | None


def evaluate_length(
    nll: Callable[[Batch], Tensor],
    shards: ShardSet,
    *,
    length: int,
    limit: int,
    rows: int = 1,
    max_tokens: int | None = None,
    rank: int = 0,
    size: int = 1,
    all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> LengthPerplexity:
    """`evaluate` on rows of another length than that of training.

    Every length predicts the same tokens, documents packed as in training: longer rows cut fewer documents. What they
    add is context beyond `limit`, which only documents longer than that have; the loss there is given apart.
    """
    beyond = torch.zeros(2, dtype=torch.float64)

    def watched(batch: Batch) -> Tensor:
        losses = nll(batch)
        far = (Documents.from_starts(batch.starts).positions >= limit) & (batch.targets != IGNORE)
        beyond.add_(torch.stack([losses.detach().double().cpu()[far].sum(), far.sum().double()]))
        return losses

    whole = evaluate(
        watched,
        shards,
        sequence_length=length,
        rows=rows,
        max_tokens=max_tokens,
        rank=rank,
        size=size,
        all_reduce=all_reduce,
    )
    nats, tokens = all_reduce(beyond).tolist()
    return LengthPerplexity(length, limit, whole, int(tokens), nats / tokens if tokens else None)


def chosen_documents(shards: ShardSet, max_tokens: int | None = None) -> np.ndarray:
    """Numbers of the documents to evaluate on, rising: all, or whole ones drawn by a fixed order until the next would
    exceed `max_tokens` tokens (at least one)."""
    if max_tokens is None or max_tokens >= shards.total_tokens:
        return np.arange(shards.documents)
    order = permutation(shards.documents, key_of("validation", shards.manifest.corpus_sha256))
    count = int(np.searchsorted(np.cumsum(shards.lengths[order]), max_tokens, side="right"))
    return np.sort(order[: max(count, 1)])


def text_bytes_of(shards: ShardSet, documents: Sequence[int] | np.ndarray) -> int:
    """Bytes of text in documents: as counted when they were prepared, or spelled by their tokens for a part."""
    if len(documents) == shards.documents:
        return shards.text_bytes
    return sum(map(len, shards.text(documents, shards.tokenizer())))


def compressed(shards: ShardSet, documents: Sequence[int] | np.ndarray) -> Compression:
    """What zlib and xz make of the text of the same documents: the yardstick for bits per byte."""
    if len(documents) == shards.documents:
        return shards.manifest.compression
    return compressed_sizes(iter(shards.text(documents, shards.tokenizer())))


def validation_rows(
    shards: ShardSet,
    sequence_length: int,
    documents: Sequence[int] | np.ndarray | None = None,
    *,
    rows: int = 1,
    rank: int = 0,
    size: int = 1,
) -> Iterator[Batch]:
    """Batches that predict every token of the documents (default all) once, in order, dealt to ranks in turn.

    Every rank yields equally many batches of `rows` rows; rows without anything to predict fill up what is missing.
    """
    order = np.arange(shards.documents) if documents is None else np.asarray(documents)
    source = Rows(shards, order, sequence_length)
    for step in range(0, source.count, rows * size):
        indices = range(step + rank * rows, step + (rank + 1) * rows)
        empty = _nothing(shards.pad, sequence_length)
        yield collate([source.row(index) if index < source.count else empty for index in indices], list(indices))


def _nothing(pad: int, sequence_length: int) -> Sample:
    starts = np.zeros(sequence_length, dtype=bool)
    starts[0] = True
    return Sample(
        np.full(sequence_length, pad, dtype=np.int64), np.full(sequence_length, IGNORE, dtype=np.int64), starts
    )
