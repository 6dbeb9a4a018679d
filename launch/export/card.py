"""The model card of a published folder: what it is, how to load it, what it was trained on and how well it does."""

import json
from pathlib import Path
from typing import Any

from launch.export.parity import TOLERANCE, Parity
from model.config import ModelConfig
from model.hybrid import parameter_count

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

A hybrid language model of {parameters:,} parameters, pretrained with Braid on {tokens:,} tokens. Its stack:

    {stack}

{layers}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
inputs = tokenizer({prompt}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))
```

{code} Every text begins with `{begin}`, which the tokenizer adds.

## Training

{training}

The resolved recipe is in `training_recipe.json`.

## Evaluation

{evaluation}

## How this folder was checked

Loaded by transformers in a process of its own, its float32 logits differ from the training code's by at most
{difference:.1e} (largest logit {scale:.1f}, allowed {allowed:.0e} of it), and {steps} tokens decoded greedily with the
cache are the training code's own choice. The tokenizer gives the ids that the model was trained on.
"""

CUSTOM = """\
The modeling files are those of the training code, made flat; read them before you trust them. Memory in decoding stays
constant for windowed braids."""
NATIVE = "It needs no custom code: the class is transformers' own NemotronH."


def card(
    *,
    name: str,
    config: ModelConfig,
    recipe: dict[str, Any],
    extra: dict[str, Any],
    begin: str,
    native: bool,
    parity: Parity,
    steps: int,
    results: dict[str, Any] | None,
) -> str:
    """The text of README.md. recipe: resolved. extra: of the checkpoint's manifest. results: of `braid eval`."""
    kinds = sorted({layer.kind for layer in config.stacked})
    prompt = recipe.get("generation", {}).get("prompt") or "The"
    return CARD.format(
        tags=", ".join(["braid", "hybrid", "pretrained", *kinds]),
        name=name,
        parameters=parameter_count(config),
        tokens=extra["clock"]["tokens"],
        stack=config.stack,
        layers=_layers(config),
        trust="" if native else ", trust_remote_code=True",
        prompt=json.dumps(prompt, ensure_ascii=False),
        code=NATIVE if native else CUSTOM,
        begin=begin,
        training=_training(recipe, extra),
        evaluation=_evaluation(results),
        difference=parity.difference,
        scale=parity.scale,
        allowed=TOLERANCE,
        steps=steps,
    )


def _layers(config: ModelConfig) -> str:
    rows = ["| letter | layers | kind | settings |", "|---|---|---|---|"]
    stacked = "".join(config.blocks)
    for letter in dict.fromkeys(stacked):
        values = config.to_dict()["layers"][letter]
        settings = ", ".join(f"{key} {value}" for key, value in values.items() if key != "kind" and value is not None)
        if letter in config.shared:
            settings += ", one set of weights at all its places"
        if letter in config.branch_gates:
            settings += ", with a learned gate"
        rows.append(f"| `{letter}` | {stacked.count(letter)} | {values['kind']} | {settings} |")
    return "\n".join(rows)


def _training(recipe: dict[str, Any], extra: dict[str, Any]) -> str:
    training, optimizer, schedule = recipe["training"], recipe["optimizer"], recipe["schedule"]
    sources = extra["stream"]["mixture"]["sources"]
    rows = {
        "tokens": f"{extra['clock']['tokens']:,} in {extra['clock']['step']:,} steps",
        "sequence length": f"{training['sequence_length']:,}",
        "batch": f"{training['rows_per_step'] * training['sequence_length']:,} tokens",
        "optimizer": ", ".join(f"{key} {value}" for key, value in optimizer.items()),
        "schedule": ", ".join(f"{key} {value}" for key, value in schedule.items() if value is not None),
        "precision": f"{training['compute_dtype']} over float32 parameters",
        "data": f"source `{recipe['data']['source']['kind']}`, "
        + ", ".join(f"fingerprint `{source['data'][:16]}`" for source in sources),
        "order of data": f"`{extra['stream']['fingerprint'][:16]}`, seed {recipe['seed']}",
        "tokenizer": f"SHA-256 `{extra['tokenizer']['sha256'][:16]}`",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _evaluation(results: dict[str, Any] | None) -> str:
    if results is None:
        return "Not evaluated: `braid eval` had not been run on this checkpoint."
    rows = ["| what | metric | value | items |", "|---|---|---|---|"]
    for entry in results.get("perplexity") or []:
        what = f"held-out text, rows of {entry['length']:,} tokens"
        rows.append(f"| {what} | bits per byte | {entry['bits_per_byte']:.4f} | |")
    for task, metrics in sorted(results.get("tasks", {}).items()):
        items = results.get("info", {}).get(task, {}).get("items", "")
        for metric, value in sorted(metrics.items()):
            if isinstance(value, float) and not metric.endswith("_stderr"):
                spread = metrics.get(f"{metric}_stderr")
                error = f" ± {spread:.4f}" if isinstance(spread, float) else ""
                rows.append(f"| {task} | {metric} | {value:.4f}{error} | {items} |")
    return "\n".join(rows)


def results_of(run: Path, checkpoint: str) -> dict[str, Any] | None:
    """What `braid eval` wrote about a checkpoint, None when it was not run."""
    path = run / "eval" / f"{checkpoint}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
