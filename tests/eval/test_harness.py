"""A braid under lm-eval: numbers against a float64 oracle and against lm-eval's own model for Hugging Face classes."""

import math
from collections.abc import Callable
from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from data.tokenizer import Tokenizer
from eval.harness import BraidLM
from model.generate import Sampling, generate
from model.hybrid import HybridLM
from tests.data.corpus import text
from tests.eval.braids import PAIRS, asked, braid, in_float64, shuffled, train_json_tokenizer

LONG = text(3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_json_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> HybridLM:
    return braid(tokenizer.vocab_size)


@pytest.fixture
def lm(model: HybridLM, tokenizer: Tokenizer) -> BraidLM:
    return BraidLM(model, tokenizer, max_length=64, batch_rows=3)


def oracle(model: HybridLM, ids: list[int], scored: int) -> tuple[float, bool]:
    """The last `scored` ids after the others: one row, no padding, all logits, float64."""
    exact = in_float64(model)
    tokens = torch.tensor([ids[:-1]])
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, 0] = True
    with torch.no_grad():
        hidden = exact.hidden(tokens, starts).x[0]
        weight = exact.head.weight[: model.config.vocab_size]
        logits = (hidden @ weight.T).log_softmax(-1)[-scored:]
    targets = torch.tensor(ids[-scored:])
    return logits.gather(1, targets[:, None]).sum().item(), bool((logits.argmax(-1) == targets).all())


def test_loglikelihoods_are_those_of_each_pair_alone(lm: BraidLM, model: HybridLM, tokenizer: Tokenizer) -> None:
    """Breaks when padding, batching, the head's selection of tokens or the beginning of texts is wrong."""
    found = lm.loglikelihood(asked("loglikelihood", *PAIRS))
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        moved = len(context) - len(context.rstrip())
        head = context[: len(context) - moved]
        before = [tokenizer.bos, *tokenizer.encode(head)]
        whole = [tokenizer.bos, *tokenizer.encode(context + continuation)]
        expected = oracle(model, whole[-65:], len(whole) - len(before))
        assert value == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    assert lm.truncated == 0


def test_greedy_continuations_are_recognised(lm: BraidLM, model: HybridLM, tokenizer: Tokenizer) -> None:
    """Breaks when `acc` of tasks like lambada would count wrong answers, or never any."""
    ids = [tokenizer.bos, *tokenizer.encode("def name")]
    produced = [step[0] for step in generate(model, [ids], 4, Sampling(temperature=0))]
    assert None not in produced
    wrong = [*produced[:-1], (produced[-1] + 1) % 300]
    answers = lm._loglikelihood_tokens([(None, ids, produced), (None, ids, wrong)])
    assert [greedy for _, greedy in answers] == [True, False]


def test_long_contexts_lose_their_beginning(model: HybridLM, tokenizer: Tokenizer) -> None:
    """Breaks when truncation cuts the wrong end, or one token more or less than lm-eval's own model does."""
    lm = BraidLM(model, tokenizer, max_length=16)
    ((value, _),) = lm.loglikelihood(asked("loglikelihood", (LONG, " value")))
    before, whole = tokenizer.encode(LONG.rstrip()), tokenizer.encode(LONG + " value")
    scored = len(whole) - len(before)
    assert value == pytest.approx(oracle(model, whole[-17:], scored)[0], abs=1e-4)
    assert lm.truncated == 1


def test_a_continuation_that_cannot_fit_is_a_mistake(model: HybridLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="max_length: got 4, wants at least"):
        BraidLM(model, tokenizer, max_length=4).loglikelihood(asked("loglikelihood", ("a", LONG)))


def test_empty_continuations_are_certain(lm: BraidLM) -> None:
    """Breaks when a row without anything to score ends a run of hours."""
    pairs = [("", ""), ("a", ""), ("a", "b")]
    first, second, third = lm.loglikelihood(asked("loglikelihood", *pairs))
    assert first == second == (0.0, True)
    assert third[0] < 0


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_batches_and_order_change_nothing(lm: BraidLM, model: HybridLM, tokenizer: Tokenizer, rows: int) -> None:
    expected = lm.loglikelihood(asked("loglikelihood", *PAIRS))
    other = BraidLM(model, tokenizer, max_length=64, batch_rows=rows)
    pairs, order = shuffled(PAIRS)
    found = other.loglikelihood(asked("loglikelihood", *pairs))
    for index, (value, greedy) in zip(order, found, strict=True):
        assert value == pytest.approx(expected[index][0], abs=1e-4)
        assert greedy == expected[index][1]


@pytest.mark.parametrize("rows", [2, 16])
def test_choices_share_the_reading_of_their_context(
    model: HybridLM, tokenizer: Tokenizer, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two items of four choices each and contexts of unequal length: each context is read once, numbers stay."""
    lm = BraidLM(model, tokenizer, max_length=64, batch_rows=rows)
    read: list[int] = []
    hidden = model.hidden

    def counted(tokens: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        read.append(tokens.numel())
        return hidden(tokens, *arguments, **named)

    monkeypatch.setattr(model, "hidden", counted)
    contexts = [LONG[:60].rstrip(), "for value in self.index(name):\n    return"]
    pairs = [(context, end) for end in (" value", " item name", "\n", " if x:\n  y") for context in contexts]
    found = lm.loglikelihood(asked("loglikelihood", *pairs))
    monkeypatch.undo()
    lengths = [1 + len(tokenizer.encode(context)) for context in contexts]
    assert lengths[0] != lengths[1]
    longest = max(len(tokenizer.encode(end)) for _, end in pairs)
    assert sum(read) <= 2 * max(lengths) + len(pairs) * longest < len(pairs) * min(lengths)
    for (context, end), (value, greedy) in zip(pairs, found, strict=True):
        before, whole = tokenizer.encode(context), tokenizer.encode(context + end)
        expected = oracle(model, [tokenizer.bos, *whole], len(whole) - len(before))
        assert value == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]


def test_rolling_is_the_sum_over_all_tokens(model: HybridLM, tokenizer: Tokenizer) -> None:
    """A text that fits is one row after bos; one that does not is cut into windows that score each token once."""
    ids = tokenizer.encode(LONG)
    wide = BraidLM(model, tokenizer, max_length=len(ids))
    (whole,) = wide.loglikelihood_rolling(asked("loglikelihood_rolling", (LONG,)))
    assert whole == pytest.approx(oracle(model, [tokenizer.bos, *ids], len(ids))[0], rel=1e-6)
    narrow = BraidLM(model, tokenizer, max_length=24, batch_rows=4)
    cut, nothing = narrow.loglikelihood_rolling(asked("loglikelihood_rolling", (LONG,), ("",)))
    expected, at = 0.0, 0
    joined = [tokenizer.bos, *ids]
    while at < len(ids):
        count = min(24, len(ids) - at)
        window = joined[max(0, at + count - 24) : at + count + 1]
        expected += oracle(model, window, count)[0]
        at += count
    assert cut == pytest.approx(expected, rel=1e-6)
    assert nothing == 0.0


def test_ranks_share_the_work_and_all_know_the_answers(lm: BraidLM, model: HybridLM, tokenizer: Tokenizer) -> None:
    """Three ranks as threads. Breaks when a rank misses answers, or a number depends on how many there are."""
    expected = answers_of(lm)
    board: dict[int, Any] = {}
    meet = Barrier(3, timeout=60)

    class Rank:
        size = 3

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def gather(self, value: Any) -> list[Any]:
            board[self.rank] = value
            meet.wait()
            values = [board[rank] for rank in range(3)]
            meet.wait()
            return values

    found: dict[int, Any] = {}

    def work(rank: int) -> None:
        found[rank] = answers_of(BraidLM(model, tokenizer, max_length=64, batch_rows=3, ranks=Rank(rank)))

    threads = [Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: expected, 1: expected, 2: expected}


def answers_of(lm: BraidLM) -> list[Any]:
    texts = [(LONG[:90],), (LONG,)]
    prompts = [(context, {"until": ["\n"], "max_gen_toks": 6}) for context, _ in PAIRS]
    return [
        lm.loglikelihood(asked("loglikelihood", *PAIRS)),
        lm.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)),
        lm.generate_until(asked("generate_until", *prompts)),
    ]


@pytest.fixture(scope="module")
def produced(model: HybridLM, tokenizer: Tokenizer) -> list[int]:
    """Twenty greedy tokens after a prompt."""
    prompt = [tokenizer.bos, *tokenizer.encode("def name")]
    ids = [step[0] for step in generate(model, [prompt], 20, Sampling(temperature=0), stop=tokenizer.eos)]
    assert None not in ids
    return ids  # type: ignore[return-value]


def continued(lm: BraidLM, **arguments: Any) -> str:
    (answer,) = lm.generate_until(asked("generate_until", ("def name", arguments)))
    return answer


def test_generation_is_greedy_and_of_the_length_asked_for(
    lm: BraidLM, tokenizer: Tokenizer, produced: list[int]
) -> None:
    assert continued(lm, until=[], max_gen_toks=20) == tokenizer.decode(produced)
    assert continued(lm, max_gen_toks=5) == tokenizer.decode(produced[:5])
    assert continued(lm, max_gen_toks=5, do_sample=False, temperature=0.7) == tokenizer.decode(produced[:5])


def test_generation_ends_before_a_stop_string_that_spans_tokens(
    lm: BraidLM, tokenizer: Tokenizer, produced: list[int]
) -> None:
    """Breaks when stops are only found where they are whole tokens, or the earliest of several is not taken."""
    whole = tokenizer.decode(produced)
    border = len(tokenizer.decode(produced[:6]))
    stop = whole[border - 1 : border + 1]
    assert len(stop) == 2
    assert continued(lm, until=[stop], max_gen_toks=20) == whole[: whole.index(stop)]
    late = whole[border + 2 : border + 5]
    assert continued(lm, until=[late, stop, ""], max_gen_toks=20) == whole[: min(whole.index(stop), whole.index(late))]
    assert continued(lm, until=stop, max_gen_toks=20) == whole[: whole.index(stop)]


def test_generation_ends_with_the_document(model: HybridLM, tokenizer: Tokenizer, produced: list[int]) -> None:
    lm = BraidLM(model, tokenizer, max_length=64)
    lm.codec = type("Ends", (), {**vars(tokenizer), "eos": produced[3]})()
    lm.codec.encode, lm.codec.decode = tokenizer.encode, tokenizer.decode
    first = produced.index(produced[3])
    assert continued(lm, until=[], max_gen_toks=20) == tokenizer.decode(produced[:first])


def test_generation_does_not_depend_on_company(model: HybridLM, tokenizer: Tokenizer) -> None:
    """Greedy or sampled, a text is the same in any batch; a request that is made twice is drawn twice."""
    sampled = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    prompts = [(context, sampled) for context, _ in PAIRS[:4]] + [(PAIRS[0][0], sampled)]
    prompts += [(context, {"until": [], "max_gen_toks": 8}) for context, _ in PAIRS[:4]]
    texts = [
        BraidLM(model, tokenizer, max_length=64, batch_rows=rows).generate_until(asked("generate_until", *prompts))
        for rows in (1, 4)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][4]
    assert texts[0][0] != texts[0][5]


def test_a_generation_needs_room_for_its_context(lm: BraidLM) -> None:
    with pytest.raises(ValueError, match="max_length: got 64, wants more than the 64 tokens"):
        continued(lm, max_gen_toks=64)


def test_one_bos(lm: BraidLM, tokenizer: Tokenizer) -> None:
    assert lm.tok_encode("a b").count(tokenizer.bos) == 1
    assert lm.tok_encode("<s>a").count(tokenizer.bos) == 1, "the name of a special token is plain text"
    assert lm.tok_encode("a", add_special_tokens=False).count(tokenizer.bos) == 0
    assert lm.prefix_token_id == tokenizer.bos


def test_what_cannot_work_is_said(model: HybridLM, tokenizer: Tokenizer, lm: BraidLM) -> None:
    with pytest.raises(ValueError, match="batch_rows: got 0"):
        BraidLM(model, tokenizer, max_length=8, batch_rows=0)
    with pytest.raises(ValueError, match="tokenizer: has"):
        BraidLM(braid(61), tokenizer, max_length=8)
    with pytest.raises(ValueError, match="chat template"):
        lm.apply_chat_template([])


def hugging_face(model: HybridLM, tokenizer: Tokenizer, **options: Any) -> Any:
    """lm-eval's `hf` model around the same weights and the same tokenizer."""
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")
    import transformers
    from lm_eval.models.huggingface import HFLM
    from transformers.modeling_outputs import CausalLMOutput

    class Wrapped(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self) -> None:
            super().__init__(transformers.PretrainedConfig(vocab_size=model.config.vocab_size))
            self.braid = model

        def forward(self, input_ids: torch.Tensor, **more: Any) -> CausalLMOutput:
            starts = torch.zeros_like(input_ids, dtype=torch.bool)
            starts[:, 0] = True
            return CausalLMOutput(logits=self.braid(input_ids, starts).logits)

    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer.path), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    return HFLM(pretrained=Wrapped(), tokenizer=fast, max_length=32, batch_size=3, **options)


@pytest.mark.parametrize(
    ("kind", "requests", "options"),
    [
        ("loglikelihood", PAIRS, {}),
        ("loglikelihood_rolling", [(LONG,), (LONG[:40],)], {"add_bos_token": False}),
    ],
)
def test_numbers_are_those_of_lm_evals_own_model(
    model: HybridLM, tokenizer: Tokenizer, kind: str, requests: list[tuple], options: dict[str, Any]
) -> None:
    """Breaks when an exported model would score otherwise under `lm_eval --model hf`."""
    ours: Callable = getattr(BraidLM(model, tokenizer, max_length=32, batch_rows=3), kind)
    theirs: Callable = getattr(hugging_face(model, tokenizer, **options), kind)
    for mine, other in zip(ours(asked(kind, *requests)), theirs(asked(kind, *requests)), strict=True):
        mine, other = (value if isinstance(value, tuple) else (value,) for value in (mine, other))
        assert mine[0] == pytest.approx(other[0], abs=1e-3)
        assert mine[1:] == other[1:]
        assert math.isfinite(mine[0])
