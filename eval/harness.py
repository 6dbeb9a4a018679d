"""A braid as a model of lm-eval.

    lm = BraidLM(model, tokenizer, max_length=4096, batch_rows=16)
    lm_eval.simple_evaluate(lm, tasks=["hellaswag"])

Texts become tokens as lm-eval's own `hf` model makes them with a tokenizer that begins texts with bos: a context is bos
and its tokens, a continuation is what its text adds to the tokens of the context's text, an empty context is bos alone.
There is exactly one bos. (For rolling log-likelihoods the `hf` model puts a second one in front and scores it too,
unless it is told `add_bos_token=False`.) What is longer than `max_length` tokens loses its beginning, bos included.

A context that several requests share, as the choices of an item do, is read once, and its recurrent state goes on with
each. Requests are sorted by length and cut into batches; ranks take batches in turn and share the answers, so each rank
returns all of them. lm-eval sees one process. Answers depend neither on the order of requests nor on the number of
ranks, and on the size of batches only by rounding.

Legend: B rows, T tokens, n scored tokens of all rows, D width, V vocabulary.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from data.tokenizer import Tokenizer
from model.generate import Sampling, generate, pad_left
from model.hybrid import Hidden, HybridLM
from model.ops.head import CHUNK

Item = TypeVar("Item")
Answer = TypeVar("Answer")

MAX_GEN_TOKS = 256
"""Length of a generated text, in tokens, where neither task nor user names one; that of lm-eval's `hf` model."""


RECENT = 16
"""Texts whose tokens are remembered: the choices of an item come one after the other with the same context."""


class Ranks(Protocol):
    """The processes that share the work; each holds the whole model."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in the order of ranks."""
        ...


class Alone:
    """A single process."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


@dataclass(frozen=True)
class Scored:
    """A row to score. inputs: ids that the model reads. targets: what its last outputs should predict."""

    inputs: list[int]
    targets: list[int]

    @property
    def context(self) -> tuple[int, ...]:
        """What is read before the first target."""
        return tuple(self.inputs[: len(self.inputs) - len(self.targets) + 1])


class BraidLM(TemplateLM):
    """The requests of lm-eval answered by a HybridLM.

    max_length: tokens that the model reads at once, at most. batch_rows: rows of a batch, at most. clock: tokens that
    the model was trained on. truncated: how many requests have lost their beginning so far. codec: the tokenizer
    (lm-eval takes an attribute `tokenizer` for one of Hugging Face).
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_rows: int = 16,
        clock: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        for key, value in (("max_length", max_length), ("batch_rows", batch_rows)):
            if value < 1:
                raise ValueError(f"{key}: got {value}, wants a positive number")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"tokenizer: has {tokenizer.vocab_size} tokens, the model knows {model.config.vocab_size} of them"
            )
        self.model, self.codec, self.max_length, self.batch_rows = model.eval(), tokenizer, max_length, batch_rows
        self.clock, self.ranks = clock, ranks or Alone()
        self.truncated = 0
        self._encoded = lru_cache(RECENT)(tokenizer.encode)
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self.codec.eos

    @property
    def prefix_token_id(self) -> int:
        return self.codec.bos

    @property
    def tokenizer_name(self) -> str:
        return f"braid-{self.codec.sha256[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        dtype = str(self.model.precision.compute).removeprefix("torch.")
        return {"model_num_parameters": parameters, "model_dtype": dtype, "max_length": self.max_length}

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        raise ValueError("apply_chat_template: got a pretrained braid, which has no chat template; wants it left out")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, bos first unless `add_special_tokens` is False."""
        ids = self._encoded(string)
        return list(ids) if add_special_tokens is False else [self.codec.bos, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each (context, continuation)."""
        pairs = [self._pair(*request.args) for request in self._watched(requests, "tokens")]
        return self._score([self._cut(*pair) for pair in pairs], "log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text after bos, in nats. Texts longer than `max_length` are scored in windows, each
        token once, with as much context as fits for those of the last window."""
        windows: list[Scored] = []
        owners: list[int] = []
        for index, request in enumerate(self._watched(requests, "tokens")):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, predicted = make_disjoint_window(pair)
                windows.append(Scored([*context, *predicted[:-1]], predicted))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(windows, "texts"), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to the first of its stop strings. Greedy unless the task's arguments say
        `do_sample` or a temperature; then `temperature` (1 by default), `top_p` and `top_k` hold, and what is drawn
        depends only on the request and on how often it was made before."""
        seen: Counter[str] = Counter()
        wanted = []
        for request in requests:
            context, arguments = request.args
            key = json.dumps([context, arguments], sort_keys=True, default=str)
            wanted.append(self._generation(context, arguments, f"{key} {seen[key]}"))
            seen[key] += 1
        alike: dict[Any, list[int]] = {}
        for index, one in enumerate(wanted):
            alike.setdefault((one.sampling, one.max_tokens), []).append(index)
        groups = [self._batches(indices, lambda index: len(wanted[index].prompt)) for indices in alike.values()]
        return self._share(wanted, [batch for group in groups for batch in group], self._continue, "generations")

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Of (texts, context ids, continuation ids) triples, as lm-eval's own classes pass them."""
        return self._score(
            [self._cut(context, continuation) for _, context, continuation in requests], "log-likelihoods"
        )

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
        before, after = self._encode_pair(context, continuation)
        if not after and continuation:
            # The continuation's text has merged into the context's last tokens, so nothing would be left to score.
            after = self.tok_encode(continuation, add_special_tokens=False)
        return before, after

    def _cut(self, context: list[int], continuation: list[int]) -> Scored:
        """The end of a pair that fits."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"max_length: got {self.max_length}, wants at least the {len(continuation)} tokens of a continuation "
                "that is to be scored"
            )
        whole = [*context, *continuation]
        self.truncated += len(whole) > self.max_length + 1
        return Scored(whole[-(self.max_length + 1) :][:-1], continuation)

    def _batches(self, indices: Sequence[int], length: Callable[[int], int]) -> list[list[int]]:
        """Indices in batches of like length, the longest first."""
        order = sorted(indices, key=lambda index: (-length(index), index))
        return [order[start : start + self.batch_rows] for start in range(0, len(order), self.batch_rows)]

    def _share(
        self,
        items: Sequence[Item],
        batches: list[list[int]],
        answer: Callable[[list[Item]], list[Answer]],
        what: str,
    ) -> list[Answer]:
        """The answer to every item on every rank; this rank works on its share of the batches."""
        mine: dict[int, Answer] = {}
        size, rank = self.ranks.size, self.ranks.rank
        total = sum(map(len, batches[rank::size]))
        with self._bar(total=total, desc=what) as bar:
            for batch in batches[rank::size]:
                mine |= dict(zip(batch, answer([items[index] for index in batch]), strict=True))
                bar.update(len(batch))
        answers: dict[int, Answer] = {}
        for share in self.ranks.gather(mine):
            answers |= share
        return [answers[index] for index in range(len(items))]

    def _bar(self, *items: Any, **named: Any) -> tqdm:
        """On rank 0, and on a terminal alone."""
        return tqdm(*items, unit="", leave=False, disable=None if self.ranks.rank == 0 else True, **named)

    def _watched(self, requests: list[Instance], what: str) -> Iterator[Instance]:
        return iter(self._bar(requests, desc=what))

    def _score(self, rows: list[Scored], what: str) -> list[tuple[float, bool]]:
        """Rows with the same context, as the choices of an item have it, are scored together, so that it is read once,
        where it is longer than they are."""
        stems: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(rows):
            if row.targets:
                stems.setdefault(row.context, []).append(index)
        shared, lonely = [], []
        for context, members in stems.items():
            if len(members) > 1 and len(context) > max(len(rows[index].targets) for index in members):
                shared.append(members)
            else:
                lonely += members
        answers = [(0.0, True)] * len(rows)
        batches = self._batches(range(len(lonely)), lambda place: len(rows[lonely[place]].inputs))
        found = self._share([rows[index] for index in lonely], batches, self._score_rows, what)
        for index, answer in zip(lonely, found, strict=True):
            answers[index] = answer
        batches = self._batches(range(len(shared)), lambda place: len(rows[shared[place][0]].context))
        stem_rows = [[rows[index] for index in members] for members in shared]
        for members, of_stem in zip(shared, self._share(stem_rows, batches, self._score_stems, what), strict=True):
            for index, answer in zip(members, of_stem, strict=True):
                answers[index] = answer
        return answers

    @torch.no_grad()
    def _score_rows(self, rows: list[Scored]) -> list[tuple[float, bool]]:
        """Rows are padded on the right, where a causal model does not look; the head sees scored tokens alone."""
        tokens, _ = self._pad_right([row.inputs for row in rows])
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        starts[:, 0] = True
        hidden = self.model.hidden(tokens, starts, clock=self.clock).x
        return self._judge(
            [h[: len(row.inputs)][-len(row.targets) :] for h, row in zip(hidden, rows, strict=True)], rows
        )

    @torch.no_grad()
    def _score_stems(self, stems: list[list[Scored]]) -> list[list[tuple[float, bool]]]:
        """The rows of each stem have one context, which is read once; its state goes on with each of them."""
        tokens, starts = pad_left([rows[0].context for rows in stems])
        read = self.model.hidden(
            tokens.to(self.device), starts.to(self.device), carry=True, last_only=True, clock=self.clock
        )
        assert read.state is not None
        rows = [(owner, row) for owner, stem in enumerate(stems) for row in stem]
        answers: list[list[tuple[float, bool]]] = [[] for _ in stems]
        for start in range(0, len(rows), self.batch_rows):
            owners, part = zip(*rows[start : start + self.batch_rows], strict=True)
            hidden = self._go_on(read, torch.tensor(owners, device=self.device), [row.targets[:-1] for row in part])
            found = self._judge([h[: len(row.targets)] for h, row in zip(hidden, part, strict=True)], part)
            for owner, answer in zip(owners, found, strict=True):
                answers[owner].append(answer)
        return answers

    def _go_on(self, read: Hidden, owners: Tensor, inputs: list[list[int]]) -> Tensor:
        """What the head reads after the last token of each row's context and after each of its `inputs`."""
        first = read.x[owners]
        tokens, longest = self._pad_right(inputs)
        if not longest:
            return first
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        assert read.state is not None
        after = self.model.hidden(tokens, starts, state=read.state.rows(owners), clock=self.clock).x
        return torch.cat([first, after], dim=1)

    def _pad_right(self, rows: Sequence[list[int]]) -> tuple[Tensor, int]:
        longest = max(map(len, rows))
        tokens = torch.full((len(rows), longest), self.codec.pad)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return tokens.to(self.device), longest

    def _judge(self, hidden: list[Tensor], rows: Sequence[Scored]) -> list[tuple[float, bool]]:
        """hidden: of each row, (number of its targets, D)."""
        targets = torch.tensor([target for row in rows for target in row.targets], dtype=torch.int64)
        values, best = self._log_probabilities(torch.cat(hidden), targets.to(self.device))
        answers, at = [], 0
        for row in rows:
            part = slice(at, at + len(row.targets))
            answers.append((values[part].sum().item(), bool((best[part] == targets[part]).all())))
            at = part.stop
        return answers

    def _log_probabilities(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden: (n, D). targets: (n,) int64. Returns the targets' log-probabilities, (n,) float64, and the likeliest
        tokens, (n,) int64, both on the CPU."""
        values, best = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
        size = max(16, CHUNK // self.model.config.vocab_size)
        for x, aim in zip(hidden.split(size), targets.split(size), strict=True):
            logits = self.model.head(x[None])[0]
            aimed = logits.gather(1, aim[:, None]).squeeze(1)
            values.append((aimed - logits.logsumexp(-1)).double().cpu())
            best.append(logits.argmax(-1).cpu())
        return torch.cat(values), torch.cat(best)

    def _generation(self, context: str, arguments: dict[str, Any], key: str) -> "Generation":
        chosen = normalize_gen_kwargs(arguments, MAX_GEN_TOKS)
        room = self.max_length - chosen["max_gen_toks"]
        if room < 1:
            raise ValueError(
                f"max_length: got {self.max_length}, wants more than the {chosen['max_gen_toks']} tokens that a task "
                "generates, for its context"
            )
        prompt = self.tok_encode(context)
        self.truncated += len(prompt) > room
        temperature = float(arguments.get("temperature", 1.0)) if chosen["do_sample"] else 0.0
        sampling = Sampling(temperature, float(chosen.get("top_p", 1.0)), int(chosen.get("top_k", 0)))
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
        return Generation(prompt[-room:], tuple(filter(None, chosen["until"])), chosen["max_gen_toks"], sampling, seed)

    def _continue(self, batch: list["Generation"]) -> list[str]:
        ids: list[list[int]] = [[] for _ in batch]
        texts = [""] * len(batch)
        done = [False] * len(batch)
        prompts, seeds = [one.prompt for one in batch], [one.seed for one in batch]
        steps = generate(self.model, prompts, batch[0].max_tokens, batch[0].sampling, stop=self.codec.eos, seed=seeds)
        for step in steps:
            for row, (one, token) in enumerate(zip(batch, step, strict=True)):
                if token is not None and not done[row]:
                    ids[row].append(token)
                    texts[row] = self.codec.decode(ids[row])
                    done[row] = any(stop in texts[row] for stop in one.until)
                done[row] |= token is None
            if all(done):
                break
        return [_before(text, one.until) for text, one in zip(texts, batch, strict=True)]


@dataclass(frozen=True)
class Generation:
    """A text to generate. prompt: ids. until: strings before which it ends."""

    prompt: list[int]
    until: tuple[str, ...]
    max_tokens: int
    sampling: Sampling
    seed: int


def _before(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
