"""`braid export`: what is published computes what the run computes, where only torch and transformers are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.tokenizer import load_tokenizer, train_sentencepiece
from launch.cli import main
from launch.export.folder import export
from launch.runs import load_run
from model.config import ModelConfig
from model.generate import Sampling, generate
from model.hf import nemotron_h
from tests.contracts.examples import EXAMPLES
from tests.launch.export.made import CORPUS, VOCABULARY, composed, every_kind, make_run, nemotron_like, only, run_alone

pytest.importorskip("transformers", reason="braid export needs transformers")

PUBLISHED = {"braid": composed(), "nemotron_h": nemotron_like()}


def publish(run: Path, folder: Path, **changes: object):
    options = {"format": "auto", "dtype": torch.float32, "shard_gib": 5.0}
    return export(run, folder, **(options | changes))


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(format, run, published folder)"""
    work = tmp_path_factory.mktemp(request.param)
    run = make_run(work / "run", PUBLISHED[request.param])
    (run / "eval").mkdir()
    results = {
        "tasks": {"probe": {"acc": 0.5, "acc_stderr": 0.01}},
        "perplexity": [{"length": 2048, "loss": 4.0, "bits_per_byte": 1.7}],
        "info": {"probe": {"items": 150}},
    }
    (run / "eval" / "tokens-000000008192.json").write_text(json.dumps(results))
    done = publish(run, work / "published")
    assert done.format == request.param and done.parity.difference < 1e-4
    return request.param, run, done.folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return only(tmp_path_factory.mktemp("elsewhere") / "site", "torch", "transformers", "numpy")


def test_a_stranger_can_use_it(published: tuple[str, Path, Path], elsewhere: dict[str, str]):
    """Breaks when the folder needs Braid, decodes otherwise than we do, or cannot be fine-tuned or saved again."""
    format, run, folder = published
    model, tokenizer, _ = load_run(run, device=torch.device("cpu"))
    prompt = [tokenizer.bos, *tokenizer.encode("for value in items:\n    return value\n")]
    trust = ["--trust"] if format == "braid" else []
    said = json.loads(run_alone(elsewhere, Path(__file__).with_name("stranger.py"), folder, json.dumps(prompt), *trust))
    assert said["found"] == []
    assert said["text"] == [tokenizer.bos, *tokenizer.encode("a <s> b")]
    assert said["greedy"] == [step[0] for step in generate(model, [prompt], 64, Sampling(temperature=0))]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert said["without_gradient"] == [f"model.{name}" for name in frozen]
    assert said["reloaded"]
    assert said["hidden"] == 1 + len(model.config.blocks)
    assert said["padding"] < 1e-4 and said["padded_greedy"]
    assert said["beams"][0] == said["beams"][1]
    assert {name for name, dtype in said["half"].items() if dtype == "torch.bfloat16"}
    assert 0 < said["half_difference"] < 0.1 * said["scale"]
    starts = torch.zeros(1, len(prompt), dtype=torch.bool)
    starts[:, 0] = True
    targets = torch.tensor([[*prompt[1:], -100]])
    nll = model.train()(torch.tensor([prompt]), starts, targets).nll.sum() / (len(prompt) - 1)
    assert said["loss"] == pytest.approx(nll.item(), abs=1e-4)
    if format == "braid":
        wide = {name for name, dtype in said["half"].items() if dtype == "torch.float32"}
        assert wide == {f"model.{name}" for name, spec in model.table().items() if spec.update == "vector"}


def test_nothing_is_written_by_hand_or_left_out(published: tuple[str, Path, Path]):
    """Breaks when NemotronH's folder carries code, or a paper is missing."""
    format, _, folder = published
    names = {path.name for path in folder.iterdir()}
    assert any(name.endswith(".py") for name in names) == (format == "braid")
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "training_recipe.json"} <= names
    weights = load_file(folder / "model.safetensors")
    assert all(value.shape[0] != 512 for value in weights.values()), "padding rows were published"


def test_the_card_says_what_one_must_know(published: tuple[str, Path, Path]):
    """Breaks when the card names another stack, no evaluation, or asks for trust that NemotronH does not need."""
    format, run, folder = published
    text = (folder / "README.md").read_text()
    assert f"    {PUBLISHED[format].stack}\n" in text
    assert ("trust_remote_code" in text) == (format == "braid")
    assert "| probe | acc | 0.5000 ± 0.0100 | 150 |" in text and "rows of 2,048 tokens | bits per byte | 1.7000" in text
    assert "fingerprint `1111111111111111`" in text and "8,192 tokens" in text
    recipe = json.loads((folder / "training_recipe.json").read_text())
    assert recipe == json.loads((run / "recipe.json").read_text())


def test_weights_in_shards_and_bfloat16(tmp_path: Path):
    """Breaks when big models or bfloat16 weights come out wrong. NemotronH cannot tie: the head is written too."""
    run = make_run(tmp_path / "run", nemotron_like(tie_embeddings=True))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training_recipe.json").write_text("{}")
    (tmp_path / "out" / "old.safetensors").write_text("")
    done = publish(run, tmp_path / "out", dtype=torch.bfloat16, shard_gib=20 / 2**20, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"} and not (
        done.folder / "old.safetensors"
    ).exists()
    files = sorted(done.folder.glob("model-*.safetensors"))
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 1 and set(index.values()) == {path.name for path in files}
    values = {name: value for path in files for name, value in load_file(path).items()}
    assert torch.equal(values["lm_head.weight"], values["backbone.embeddings.weight"])
    assert values["lm_head.weight"].dtype == torch.bfloat16
    assert values["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_a_difference_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Breaks when a wrong mapping reaches the world, or leaves rubbish behind."""
    run = make_run(tmp_path / "run", nemotron_like(pattern="M*"))
    original = nemotron_h.tensors

    def wrong(name, value, config):
        for theirs, tensor in original(name, value, config):
            yield theirs, tensor + 1e-2 if theirs.endswith("A_log") else tensor

    monkeypatch.setattr(nemotron_h, "tensors", wrong)
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "differs from the run" in said and "nothing was published" in said and said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_lost_weight_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Breaks when transformers would draw a missing weight at random."""
    run = make_run(tmp_path / "run", nemotron_like(pattern="M*"))
    original = nemotron_h.tensors
    monkeypatch.setattr(
        nemotron_h, "tensors", lambda *of: ((n, t) for n, t in original(*of) if n != "backbone.layers.0.mixer.D")
    )
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "model.layers.0.mixer.D" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line(tmp_path: Path, capsys):
    """Breaks when a user's mistake is a traceback, or overwrites something."""
    run = make_run(tmp_path / "run", every_kind(pattern="af"))

    def refused(*arguments: object) -> str:
        assert main(["export", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        return said

    (tmp_path / "full").mkdir()
    assert "exists already" in refused(run, tmp_path / "full")
    assert "training_recipe.json" in refused(run, tmp_path / "full", "--overwrite")
    said = refused(run, tmp_path / "new", "--format", "nemotron_h")
    assert "layer 'f' (attention) has a window of 6 tokens" in said and "--format braid" in said
    assert "--shard-gib" in refused(run, tmp_path / "new", "--shard-gib", "0")
    assert "wants a run folder or its name" in refused(tmp_path / "none", tmp_path / "new")

    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    data = next((damaged / "checkpoints").rglob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-4] + b"\xff\xff\xff\xff")
    assert data.name in refused(damaged, tmp_path / "new")

    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "tokenizer.model").write_bytes(train_sentencepiece(CORPUS, VOCABULARY - 1))
    assert "tokenizer:" in refused(other, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pattern": "Mf"}, "layer 'f' (attention) has a window of 6 tokens"),
        ({"pattern": "Md"}, "layer 'd' (attention) has rotary positions"),
        ({"pattern": "M*h"}, "layer 'h' (mlp) is gated"),
        ({"pattern": "M*j"}, "layer 'j' (mlp) uses gelu"),
        ({"pattern": "*-c"}, "layer 'c' (mamba2) limits its step"),
        ({"pattern": "M-"}, "no attention layer"),
        ({"pattern": "M*a"}, "layers 'M' and 'a' are both mamba2 and differ"),
        ({"pattern": "*S"}, "layer 'S' (mamba2) has a state space of 32 channels"),
        ({"pattern": "*G"}, "layer 'G' (mamba2) gates otherwise"),
        ({"pattern": "MQ"}, "layer 'Q' (attention) has qk_norm = True"),
        ({"pattern": "-[M*]"}, "layers 'M', '*' are parallel branches of one block"),
        ({"pattern": "M*M*", "shared": "*"}, "the layers '*' share their weights"),
    ],
)
def test_what_nemotron_h_cannot_express_is_named(change: dict, why: str):
    """Breaks when a braid would be published as something that it is not."""
    layers = {
        **every_kind().layers,
        **nemotron_like().layers,
        "S": EXAMPLES["mamba2 beside an mlp"],
        "G": EXAMPLES["mamba2 without norm"],
        "Q": EXAMPLES["qk norm"],
    }
    config = ModelConfig(vocab_size=400, d_model=32, layers=layers, **change)
    assert why in str(nemotron_h.obstacle(config))
    assert nemotron_h.obstacle(nemotron_like()) is None


def test_the_tokenizer_of_the_run_is_found(published: tuple[str, Path, Path]):
    """Breaks when the folder's tokenizer differs on a text that no probe holds."""
    from transformers import PreTrainedTokenizerFast

    _, run, folder = published
    ours, theirs = load_tokenizer(run / "tokenizer.model"), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("", " ", "x" * 3000, "𝔘𝔫𝔦 </s><pad>\n\r\n\t ", "\u2581\u2581 a"):
        assert theirs(text)["input_ids"] == [ours.bos, *ours.encode(text)]
        assert theirs.decode(ours.encode(text)) == text
