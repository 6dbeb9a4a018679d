"""`braid train` in a layout: the curve of one process, also after a kill."""

from pathlib import Path

import pytest

from tests.train.runs import braid, curve, events, kill_group, start, trained, wait_for_step, write_corpus

STEPS = 20


@pytest.mark.parametrize(
    ("recipe", "axis", "ranks"),
    [
        pytest.param("tiny-samba", "context", 2, id="context ranks, resumed"),
        pytest.param("tiny-moe-mamba", "tensor", 1, id="tensor ranks, resumed by one process"),
    ],
)
def test_a_run_is_the_run_of_one_process(recipe: str, axis: str, ranks: int, tmp_path: Path) -> None:
    """Losses, norms, the experts' loads and validation, although the ranks were killed on the way."""
    write_corpus(tmp_path / "corpus")
    braid("prepare", recipe, cwd=tmp_path)
    tokens = [f"training.tokens={STEPS * 8 * 64}", f"checkpoints.every_tokens={4 * 8 * 64}"]
    trained("name=alone", *tokens, cwd=tmp_path, recipe=recipe)
    spread = ["name=spread", *tokens, "checkpoints.aside=false"]  # saved before the next step, whatever the disk does
    process = start("train", recipe, "--nproc", "2", *spread, f"parallel.{axis}=2", cwd=tmp_path)
    run = tmp_path / "runs/spread"
    wait_for_step(process, run, 5)
    kill_group(process)
    assert any((run / "checkpoints").glob("tokens-*"))
    assert len(curve(run)) < STEPS, "the kill came too late to test anything"
    trained(*spread, f"parallel.{axis}={ranks}", cwd=tmp_path, ranks=ranks, recipe=recipe)
    alone = tmp_path / "runs/alone"
    assert len(curve(run)) == len(curve(alone)) == STEPS
    for one, two in zip(curve(alone), curve(run), strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"tokens_per_s", "mfu", "seconds"}:
            within = 1e-4 if key == "grad_norm" else 1e-5
            assert two[key] == (one[key] if isinstance(one[key], str) else pytest.approx(one[key], rel=within)), key
    losses = [events(folder, "validation")[-1]["loss"] for folder in (alone, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
