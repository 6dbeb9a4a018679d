"""What a stranger does with a published folder: `stranger.py FOLDER`, in an environment with torch and transformers.

Prints JSON: the greedy continuation of the last line's ids, and how far gradients, saving, padding and beams go.
"""

import json
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FORBIDDEN = ("model", "data", "launch", "train", "deepspeed", "sentencepiece", "datasets", "lm_eval")


def importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def load(folder: str, **options: object):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code="--trust" in sys.argv, **options)


@torch.no_grad()
def logits(model, ids: torch.Tensor, **options: object) -> torch.Tensor:
    return model(ids, **options).logits


def main(folder: str, prompt: list[int]) -> dict:
    model, tokenizer = (
        load(folder).eval(),
        AutoTokenizer.from_pretrained(folder, trust_remote_code="--trust" in sys.argv),
    )
    ids = torch.tensor([prompt])
    said = {"found": [name for name in FORBIDDEN if importable(name)], "text": tokenizer("a <s> b")["input_ids"]}
    said["greedy"] = model.generate(ids, do_sample=False, max_new_tokens=64, eos_token_id=None)[
        0, len(prompt) :
    ].tolist()

    model.train()
    loss = model(ids.expand(2, -1), labels=ids.expand(2, -1)).loss
    loss.backward()
    said["loss"] = loss.item()
    said["without_gradient"] = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.eval()

    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        copy = load(again).eval()
    said["reloaded"] = torch.equal(logits(model, ids), logits(copy, ids))

    short = ids[:, : len(prompt) // 2]
    padding = torch.full((1, ids.shape[1] - short.shape[1]), tokenizer.pad_token_id)
    batch = torch.cat([ids, torch.cat([padding, short], 1)])
    mask = torch.ones_like(batch)
    mask[1, : padding.shape[1]] = 0
    kept = logits(model, batch, attention_mask=mask)[1, padding.shape[1] :]
    said["padding"] = (kept - logits(model, short)[0]).abs().max().item()
    together = model.generate(batch, attention_mask=mask, do_sample=False, max_new_tokens=16, eos_token_id=None)
    apart = model.generate(short, do_sample=False, max_new_tokens=16, eos_token_id=None)
    said["padded_greedy"] = together[1, ids.shape[1] :].tolist() == apart[0, short.shape[1] :].tolist()

    said["beams"] = [
        model.generate(ids, do_sample=False, num_beams=3, max_new_tokens=8, eos_token_id=None, use_cache=cache).tolist()
        for cache in (True, False)
    ]
    said["hidden"] = len(model(ids, output_hidden_states=True).hidden_states)
    half = load(folder, dtype=torch.bfloat16).eval()
    said["half"] = {name: str(p.dtype) for name, p in half.named_parameters()}
    said["half_difference"] = (logits(half, ids) - logits(model, ids)).abs().max().item()
    said["scale"] = logits(model, ids).abs().max().item()
    return said


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
