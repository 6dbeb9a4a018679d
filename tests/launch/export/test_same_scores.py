"""`lm_eval --model hf` on a published folder and `braid eval` on its run: the same log-likelihood for every item."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.export.folder import export
from launch.runs import load_run
from tests.launch.export.made import every_kind, make_run, nemotron_like

pytest.importorskip("lm_eval", reason="evaluation needs lm-eval")
pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")

LIMIT = 6
TASKS = ("braid_copy_8", "braid_brackets")


def answers(lm: Any, tasks: tuple[str, ...]) -> dict[tuple[str, int], list[Any]]:
    """(task, item) -> what the model answered to each of its requests."""
    import lm_eval

    from eval.benchmarks import Probes

    manager = Probes(include_defaults=False)
    found = lm_eval.simple_evaluate(
        lm, tasks=list(tasks), task_manager=manager, limit=LIMIT, bootstrap_iters=0, verbosity="ERROR"
    )
    return {(name, item["doc_id"]): item["resps"] for name in tasks for item in found["samples"][name]}


@pytest.mark.parametrize("config", [every_kind(), nemotron_like()], ids=["braid", "nemotron_h"])
def test_every_item_scores_alike(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Breaks when publishing changes a score: another bos, another cut of words, another model."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = make_run(tmp_path / "run", config)
    export(run, tmp_path / "out", format="auto", dtype=torch.float32, shard_gib=5.0)
    from lm_eval.models.huggingface import HFLM

    from eval.harness import BraidLM

    model, tokenizer, _ = load_run(run, device=torch.device("cpu"))
    ours = BraidLM(model, tokenizer, max_length=2048, batch_rows=5)
    options = {"pretrained": str(tmp_path / "out"), "trust_remote_code": True, "dtype": "float32", "device": "cpu"}
    theirs = HFLM(**options, max_length=2048, batch_size=3)
    mine, published = answers(ours, TASKS), answers(theirs, TASKS)
    assert mine.keys() == published.keys() and len(mine) == LIMIT * len(TASKS)
    for key, responses in mine.items():
        for a, b in zip(responses, published[key], strict=True):
            assert float(a[0][0]) == pytest.approx(float(b[0][0]), abs=1e-3), key
            assert str(a[0][1]) == str(b[0][1]), key
    # For whole texts the hf model adds a second bos unless it is told not to (see eval/README.md).
    rolling = answers(HFLM(**options, max_length=2048, batch_size=3, add_bos_token=False), ("braid_passages",))
    for key, [[value]] in answers(ours, ("braid_passages",)).items():
        assert float(value) == pytest.approx(float(rolling[key][0][0]), rel=1e-5), key
