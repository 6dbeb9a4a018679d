"""Loads a published folder as anyone would and writes down what it computes: `probe.py FOLDER QUESTIONS ANSWERS`.

Runs alone, with torch, transformers and safetensors; nothing of Braid is imported. QUESTIONS (safetensors): `tokens`
(B, T) int64; `prompt` (1, P) int64; `steps` (1,) int64; in the metadata `texts`, JSON. ANSWERS: `logits` (B, T, V)
float32; `generated` (steps,) int64, greedy, with the cache; in the metadata `ids` and `spelled`, JSON. Exits non-zero
when a weight is missing or unexpected.
"""

import json
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, questions: str, answers: str) -> None:
    asked = load_file(questions)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        sys.exit(f"{folder}: {wrong}")
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(row[None]).logits for row in asked["tokens"]]).float()
    prompt = asked["prompt"]
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=int(asked["steps"]),
        eos_token_id=None,
        use_cache=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with safe_open(questions, "pt") as file:
        texts = json.loads(file.metadata()["texts"])
    tokenized = [tokenizer(text)["input_ids"] for text in texts]
    spelled = [tokenizer.decode(found[1:]) for found in tokenized]
    said = {"ids": json.dumps(tokenized), "spelled": json.dumps(spelled)}
    save_file({"logits": logits, "generated": ids[0, prompt.shape[1] :].contiguous()}, answers, said)


if __name__ == "__main__":
    main(*sys.argv[1:])
