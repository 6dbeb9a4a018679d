"""`braid train` on context ranks: the curve of one process, also after a kill."""

from pathlib import Path

import pytest

from tests.train.runs import braid, curve, events, kill_group, start, wait_for_step, write_corpus

STEPS = 12


def test_a_run_on_context_ranks_is_the_run_of_one_process(tmp_path: Path) -> None:
    """Losses and validation within 1e-5, although the ranks were killed on the way and resumed."""
    write_corpus(tmp_path / "corpus")
    braid("prepare", "tiny-samba", cwd=tmp_path)
    tokens = [f"training.tokens={STEPS * 8 * 64}", f"checkpoints.every_tokens={4 * 8 * 64}"]
    spread = ["train", "tiny-samba", "name=spread", "--nproc", "2", "parallel.context=2", *tokens]
    braid("train", "tiny-samba", "name=alone", *tokens, cwd=tmp_path)
    alone, run = tmp_path / "runs/alone", tmp_path / "runs/spread"
    process = start(*spread, cwd=tmp_path)
    wait_for_step(process, run, 6)
    kill_group(process)
    assert any((run / "checkpoints").glob("tokens-*"))
    assert len(curve(run)) < STEPS, "the kill came too late to test anything"
    braid(*spread, cwd=tmp_path)
    assert len(curve(run)) == len(curve(alone)) == STEPS
    for one, two in zip(curve(alone), curve(run), strict=True):
        assert one["batch_hash"] == two["batch_hash"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    losses = [events(folder, "validation")[-1]["loss"] for folder in (alone, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
