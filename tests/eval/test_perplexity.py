"""Held-out loss: each token once, the same on any number of ranks, honest bytes."""

import lzma
import math
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.prepare import PreparedData
from data.stream import Batch
from eval.perplexity import chosen_documents, compressed, evaluate, evaluate_length, text_bytes_of, validation_rows
from tests.data.corpus import make


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make(Path(tmp_path_factory.mktemp("prepared")))


def cost(batch: Batch) -> Tensor:
    """A loss that depends on the target, and is garbage where there is none."""
    return torch.where(batch.targets >= 0, (batch.targets % 7 + 1).float(), torch.nan)


def expected_nats(prepared: PreparedData, documents: list[int]) -> tuple[float, int]:
    ids = [prepared.validation.tokens(document)[1:].astype(int) for document in documents]
    return float(sum((x % 7 + 1).sum() for x in ids)), sum(map(len, ids))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [16, 100])
def test_every_token_counts_once(prepared: PreparedData, rows: int, length: int):
    """Breaks when held-out tokens are lost or counted twice at a border, or garbage under padding is added."""
    shards = prepared.validation
    result = evaluate(cost, shards, sequence_length=length, rows=rows)
    nats, tokens = expected_nats(prepared, list(range(shards.documents)))
    assert result.tokens == tokens == shards.total_tokens - shards.documents
    assert result.loss == pytest.approx(nats / tokens)
    tokenizer = shards.tokenizer()
    text = b"".join(shards.text(range(shards.documents), tokenizer))
    assert result.bytes == len(text) == shards.text_bytes
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(text))
    assert result.perplexity == pytest.approx(math.exp(nats / tokens))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("max_tokens", [None, 300])
def test_ranks_share_the_work(prepared: PreparedData, size: int, max_tokens: int | None):
    """Breaks when ranks would disagree about the loss, or call the model unequally often and hang."""
    parts: list[Tensor] = []
    calls = []

    def collect(total: Tensor) -> Tensor:
        parts.append(total)
        return sum(parts)  # type: ignore[return-value]

    for rank in range(size):
        count = 0

        def counted(batch: Batch) -> Tensor:
            nonlocal count
            count += 1
            return cost(batch)

        options = {"sequence_length": 32, "rows": 2, "max_tokens": max_tokens}
        result = evaluate(counted, prepared.validation, **options, rank=rank, size=size, all_reduce=collect)
        calls.append(count)
    alone = evaluate(cost, prepared.validation, **options)
    assert result.loss == pytest.approx(alone.loss, rel=1e-12)
    assert (result.tokens, result.bytes) == (alone.tokens, alone.bytes)
    assert len(set(calls)) == 1


def test_a_cap_takes_whole_documents_and_only_their_bytes(prepared: PreparedData):
    """Breaks when capped bits per byte would divide the loss of a part by the bytes of everything."""
    shards = prepared.validation
    cap = shards.total_tokens // 2
    documents = chosen_documents(shards, cap)
    assert 0 < len(documents) < shards.documents
    assert shards.lengths[documents].sum() <= cap
    result = evaluate(cost, shards, sequence_length=32, max_tokens=cap)
    nats, tokens = expected_nats(prepared, documents.tolist())
    text = b"".join(shards.text(documents, shards.tokenizer()))
    assert (result.tokens, result.bytes, result.documents) == (tokens, len(text), len(documents))
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(text))
    yardstick = compressed(shards, documents)
    assert yardstick.text_bytes == result.bytes == text_bytes_of(shards, documents)
    assert yardstick.zlib_bytes == len(zlib.compress(text, 9))
    assert yardstick.xz_bytes == len(lzma.compress(text, preset=9))


def test_the_manifest_holds_the_yardstick_of_everything(prepared: PreparedData):
    """Breaks when the report compares a model with compressors on other text."""
    shards = prepared.validation
    text = b"".join(shards.text(range(shards.documents), shards.tokenizer()))
    found = compressed(shards, chosen_documents(shards))
    assert (found.text_bytes, found.zlib_bytes) == (len(text), len(zlib.compress(text, 9)))
    assert found.zlib_bits_per_byte == pytest.approx(8 * found.zlib_bytes / len(text))


def test_a_small_cap_still_evaluates_something(prepared: PreparedData):
    """Breaks when a cap below the first document divides by zero."""
    assert len(chosen_documents(prepared.validation, 1)) == 1
    assert evaluate(cost, prepared.validation, sequence_length=32, max_tokens=1).tokens > 0


def test_rows_longer_than_all_documents_work(prepared: PreparedData):
    """Breaks when long-context evaluation on a small held-out set fails."""
    (batch,) = validation_rows(prepared.validation, prepared.validation.total_tokens + 100)
    assert batch.valid == prepared.validation.total_tokens - prepared.validation.documents


def context_lengths(prepared: PreparedData, length: int) -> list[tuple[int, int]]:
    """(tokens of its document that the row has before it and with it, target) of every prediction, one by one."""
    shards = prepared.validation
    joined = [(int(token), place) for d in range(shards.documents) for place, token in enumerate(shards.tokens(d))]
    found = []
    for at, (target, place) in enumerate(joined[1:]):
        if place:
            found.append((min(at % length + 1, place), target))
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_context_beyond_training_is_counted_apart(prepared: PreparedData, size: int):
    """Breaks when a longer row seems to help or hurt although no token had more context."""
    limit, length = 32, 96
    far = [target % 7 + 1 for context, target in context_lengths(prepared, length) if context > limit]
    parts: list[Tensor] = []

    def all_reduce(total: Tensor) -> Tensor:
        """Of the whole and then of the part, on each rank after the other."""
        parts.append(total.clone())
        return sum(parts[(len(parts) - 1) % 2 :: 2])  # type: ignore[return-value]

    options = {"length": length, "limit": limit, "rows": 2, "size": size}
    for rank in range(size):
        result = evaluate_length(cost, prepared.validation, **options, rank=rank, all_reduce=all_reduce)
    assert result.beyond_tokens == len(far) > 0
    assert result.beyond_loss == pytest.approx(sum(far) / len(far))
    assert result.whole.tokens == prepared.validation.total_tokens - prepared.validation.documents


def test_rows_of_training_have_nothing_beyond(prepared: PreparedData):
    result = evaluate_length(cost, prepared.validation, length=32, limit=32)
    assert (result.beyond_tokens, result.beyond_loss) == (0, None)
    assert result.whole == evaluate(cost, prepared.validation, sequence_length=32)
