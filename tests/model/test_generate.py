"""Decoding: constant memory, batches of unequal prompts, sampling, agreement with the full forward."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from model.generate import Sampling, generate
from tests.contracts.examples import tokens_and_starts
from tests.model.test_hybrid import built, samba

GREEDY = Sampling(temperature=0)


def state_bytes(state: object) -> int:
    tensors = [leaf for leaf in tree_leaves(state.layers) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_memory_is_constant_in_the_generated_length() -> None:
    """A windowed braid holds the same bytes after 20 and after 200 tokens: past the window nothing grows."""
    model = built(samba())
    tokens, starts = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool)
    state, sizes = None, []
    with torch.no_grad():
        for _ in range(200):
            state = model(tokens, starts, state=state, carry=True).state
            starts = torch.zeros_like(starts)
            sizes.append(state_bytes(state))
    assert sizes[20] == sizes[199] > 0


def test_greedy_decoding_takes_the_likeliest_token_of_the_full_forward() -> None:
    model = built(samba())
    prompt = [1, 17, 23, 5]
    produced = [ids[0] for ids in generate(model, [prompt], 20, GREEDY)]
    tokens = torch.tensor([prompt + produced])
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    with torch.no_grad():
        logits = model(tokens, starts).logits
    assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == produced


def test_the_whole_model_prefilled_and_stepped_equals_its_full_forward() -> None:
    """A mixed braid, across document boundaries and far past the window of 7."""
    model = built(samba())
    tokens, starts = tokens_and_starts([19, 23, 8])
    with torch.no_grad():
        full = model(tokens, starts).logits
        out = model(tokens[:, :12], starts[:, :12], carry=True)
        pieces = [out.logits]
        for at in range(12, 50):
            out = model(tokens[:, at : at + 1], starts[:, at : at + 1], state=out.state, carry=True)
            pieces.append(out.logits)
    assert (torch.cat(pieces, dim=1) - full).abs().max() <= 1e-4 * max(1.0, full.abs().max().item())


def test_a_prompt_does_not_depend_on_its_company() -> None:
    """Prompts of unequal length are padded on the left; the padding must be invisible."""
    model = built(samba())
    prompts = [[1, 17, 23, 5, 9, 9, 2], [1, 40], [1]]
    together = list(zip(*generate(model, prompts, 12, GREEDY), strict=True))
    alone = [tuple(ids[0] for ids in generate(model, [prompt], 12, GREEDY)) for prompt in prompts]
    assert together == alone


def test_sampling_is_repeatable_and_follows_the_seed() -> None:
    model = built(samba())
    runs = [list(generate(model, [[1, 2]], 15, Sampling(1.0, 1.0), seed=seed)) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_top_p_and_top_k_keep_only_the_likeliest() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(500, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(Sampling(1.0, 1.0).pick(logits, generator).tolist()) == {0, 1, 2, 3}
    assert set(Sampling(1.0, 0.7).pick(logits, generator).tolist()) == {0, 1}
    assert set(Sampling(1.0, 0.5).pick(logits, generator).tolist()) == {0}
    assert set(Sampling(1.0, 1.0, top_k=3).pick(logits, generator).tolist()) == {0, 1, 2}


def test_generation_ends_at_the_stop_token() -> None:
    model = built(samba())
    first = next(iter(generate(model, [[1, 2]], 1, GREEDY)))[0]
    assert list(generate(model, [[1, 2]], 9, GREEDY, stop=first)) == [[None]]


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}])
def test_wrong_sampling_options_are_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt"):
        next(generate(built(samba()), [[]], 1, GREEDY))
