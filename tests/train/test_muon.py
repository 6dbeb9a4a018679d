"""Muon: beside torch's own, block by block, over ranks that share the work or the matrices, and under the engine."""

import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.hybrid import HybridLM, initialise_model, model_table
from model.layers.attention import AttentionConfig
from model.layers.mamba2 import Mamba2Config
from model.layers.mlp import MLPConfig
from model.layers.moe import MoEConfig
from model.params import WHOLE, Block, Normal, ParamSpec, Place, Split, initialise, local_layout, split_evenly
from model.weights.manifest import Manifest
from model.weights.reader import Checkpoint
from model.weights.writer import write_rank_files
from tests.ranks import run_ranks
from tests.train import layouts
from tests.train.layouts import Layout, run_layouts
from tests.train.test_engine import assemble, assert_near, same_bits
from tests.train.tiny import STEPS, learning_rate, reference, run_step, snapshot, start_engine, train_steps
from train import muon
from train.checkpoint.capture import restore, saved_fragments, saved_shapes
from train.collectives import Axis
from train.muon import Muon, MuonConfig, deal, is_matrix, orthogonalise
from train.optim import AdamWConfig, build_optimizer, parameter_groups, state_names

CONFIG = MuonConfig(learning_rate=1e-2, weight_decay=0.1)
VECTOR = {"decay": False, "update": "vector"}


def leading(axis: int, units: int, leaders: int) -> Split:
    return Split(axis, units, leaders)


TABLE = {
    # Of Mamba-2: four heads in two groups, so that four tensor ranks hold copies of B and C.
    "in_proj": ParamSpec(
        (2 * 16 + 2 * 6 + 4, 10),
        Normal(1.0),
        blocks=(
            Block("z", 16, split_evenly(0, 4)),
            Block("x", 16, split_evenly(0, 4)),
            Block("B", 6, leading(0, 2, 4)),
            Block("C", 6, leading(0, 2, 4)),
            Block("dt", 4, split_evenly(0, 4)),
        ),
    ),
    "out_proj": ParamSpec((10, 16), Normal(1.0), split=split_evenly(1, 16)),
    "router": ParamSpec((5, 10), Normal(1.0)),
    "up": ParamSpec((21, 10), Normal(1.0), blocks=tuple(Block(f"up {e}", 7, split_evenly(0, 7)) for e in range(3))),
    "conv": ParamSpec((28, 4), Normal(1.0), update="convolution"),
    "embedding": ParamSpec((11, 10), Normal(1.0), update="embedding"),
    "bias": ParamSpec((10,), Normal(1.0), **VECTOR),
    "A_log": ParamSpec((4, 3), Normal(1.0), **VECTOR),
}


def gradient(name: str, step: int) -> Tensor:
    """Of the logical tensor; of very unequal size from step to step."""
    generator = torch.Generator().manual_seed(100 * step + list(TABLE).index(name))
    return torch.randn(TABLE[name].shape, generator=generator) * 3.0**step


def local(logical: Tensor, spec: ParamSpec, place: Place) -> Tensor:
    """What a tensor rank holds of a logical tensor."""
    layout = local_layout(spec, place)
    flat = torch.zeros(math.prod(layout.shape))
    for piece in layout.pieces:
        box = logical[tuple(slice(*span) for span in piece.box)]
        flat[piece.offset : piece.offset + piece.numel] = box.flatten()
    return flat.view(layout.shape)


def step_table(
    config: MuonConfig | AdamWConfig = CONFIG,
    place: Place = WHOLE,
    steps: int = 4,
    **axes: Axis,
) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """The parameters of the table as one rank holds them after some steps, and their optimizer."""
    parameters = {}
    for name, spec in TABLE.items():
        parameter = torch.empty(local_layout(spec, place).shape)
        initialise(parameter, name, spec, 0, place)
        parameters[name] = nn.Parameter(parameter)
    groups = parameter_groups(parameters.items(), TABLE, config.weight_decay)
    optimizer = build_optimizer(config, groups, place=place, **axes)
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = local(gradient(name, step), TABLE[name], place)
        optimizer.step()
    return parameters, optimizer


class TestOneRank:
    @pytest.mark.parametrize("nesterov", [True, False])
    @pytest.mark.parametrize(("adjustment", "theirs"), [("match_rms", "match_rms_adamw"), ("original", "original")])
    @pytest.mark.parametrize("shape", [(5, 9), (9, 5), (64, 48), (1, 7)])
    def test_equals_torch(self, shape, adjustment, theirs, nesterov):
        """Bit for bit in torch's bfloat16: otherwise published settings would mean something else here."""
        spec = ParamSpec(shape, Normal(1.0))
        ours, other = (nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for _ in range(2))
        config = MuonConfig(0.02, weight_decay=0.2, adjustment=adjustment, nesterov=nesterov, ns_dtype="bfloat16")
        optimizer = Muon(parameter_groups([("w", ours)], {"w": spec}, 0.2), config)
        peer = torch.optim.Muon([other], lr=0.02, weight_decay=0.2, nesterov=nesterov, adjust_lr_fn=theirs)
        for step in range(4):
            ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            other.grad = ours.grad.clone()
            optimizer.step()
            peer.step()
            assert torch.equal(ours, other)
            assert torch.equal(optimizer.state[ours]["momentum"], peer.state[other]["momentum_buffer"])

    def test_blocks_step_as_matrices_of_their_own(self):
        """Together, z, x, B, C and dt would be made orthogonal to each other, and the largest would drown the rest."""
        parameters, _ = step_table()
        for name in ("in_proj", "up"):
            row = 0
            for block in TABLE[name].named_blocks():
                rows = slice(row, row := row + block.rows)
                alone = nn.Parameter(torch.empty(TABLE[name].shape))
                initialise(alone, name, TABLE[name], 0)
                alone = nn.Parameter(alone.detach()[rows].clone())
                spec = ParamSpec(tuple(alone.shape), Normal(1.0))
                optimizer = Muon(parameter_groups([("w", alone)], {"w": spec}, 0.1), CONFIG)
                for step in range(4):
                    alone.grad = gradient(name, step)[rows]
                    optimizer.step()
                assert_near(parameters[name][rows], alone, 1e-6, f"{name} {block.name}")

    def test_all_else_equals_adamw_bit_for_bit(self):
        """Embeddings, convolutions and vectors have no singular values worth the name."""
        parameters, optimizer = step_table()
        peers, adamw = step_table(AdamWConfig(CONFIG.learning_rate, CONFIG.betas, CONFIG.eps, CONFIG.weight_decay))
        for name in ("conv", "embedding", "bias", "A_log"):
            assert torch.equal(parameters[name], peers[name]), name
            state, expected = optimizer.state[parameters[name]], adamw.state[peers[name]]
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], value) for key, value in expected.items()), name

    def test_all_else_may_have_a_learning_rate_of_its_own(self):
        """With the original adjustment one rate cannot serve both."""
        parameters, _ = step_table(MuonConfig(0.02, adamw_learning_rate=1e-3))
        peers, _ = step_table(AdamWConfig(1e-3))
        matrices, _ = step_table(MuonConfig(0.02))
        for name, spec in TABLE.items():
            assert_near(parameters[name], (matrices if is_matrix(spec) else peers)[name], 1e-6, name)

    @pytest.mark.parametrize("shape", [(24, 64), (64, 24), (48, 48), (3, 20)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_singular_values_of_an_update_are_near_one(self, shape, dtype):
        """The iteration must neither blow up nor leave directions behind."""
        u, _, v = torch.linalg.svd(torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)), False)
        x = u * torch.logspace(1, 2.5, min(shape)) @ v
        y = orthogonalise(x.to(dtype), CONFIG.ns_steps, CONFIG.ns_coefficients).float()
        assert y.shape == x.shape
        values = torch.linalg.svdvals(y)
        assert values.min() > 0.6 and values.max() < 1.25, values
        assert (y - u @ v).norm() < 0.35 * (u @ v).norm(), "the singular vectors are those of x"

    def test_an_update_has_the_size_of_one_by_adamw(self):
        """What lets one learning rate serve both: an RMS of 0.2 to 0.4 of it, whatever the shape."""
        for shape in ((8, 64), (64, 8), (64, 64), (1, 64)):
            parameter = nn.Parameter(torch.zeros(shape))
            optimizer = Muon(parameter_groups([("w", parameter)], {"w": ParamSpec(shape, Normal(1.0))}, 0.0), CONFIG)
            parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            optimizer.step()
            rms = parameter.detach().square().mean().sqrt().item() / CONFIG.learning_rate
            assert 0.1 < rms < 0.4, (shape, rms)

    def test_without_a_gradient_nothing_moves_but_by_decay(self):
        """Unused experts have a gradient of zeros, whose norm divides."""
        parameters, optimizer = step_table(steps=0)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, spec in TABLE.items():
            kept = 1 - CONFIG.learning_rate * CONFIG.weight_decay * spec.decay
            assert torch.allclose(parameters[name], before[name] * kept, rtol=1e-6), name


class TestTable:
    def test_what_of_a_braid_is_a_matrix(self):
        """Breaks when a layer kind puts a convolution or a vector on Muon, or takes a projection off it."""
        layers = {
            "M": Mamba2Config(head_dim=16, d_state=8),
            "*": AttentionConfig(n_heads=2),
            "-": MLPConfig(d_hidden=40),
            "E": MoEConfig(n_experts=3, d_hidden=24, bias_rate=0.1),
        }
        table = model_table(ModelConfig(61, 32, "M*-E", layers))
        found = {
            f"{name}:{len(spec.named_blocks())}"
            for name, spec in table.items()
            if state_names(CONFIG, spec) == ("momentum",)
        }
        assert found == {
            "blocks.0.mixer.in_proj.weight:5",
            "blocks.0.mixer.out_proj.weight:1",
            "blocks.1.mixer.qkv.weight:3",
            "blocks.1.mixer.out.weight:1",
            "blocks.2.mixer.up.weight:2",
            "blocks.2.mixer.down.weight:1",
            "blocks.3.mixer.router.weight:1",
            "blocks.3.mixer.up.weight:6",
            "blocks.3.mixer.down.weight:3",
        }
        assert state_names(CONFIG, table["blocks.3.mixer.bias"]) == (), "it is frozen"
        assert state_names(CONFIG, table["embedding.weight"]) == ("exp_avg", "exp_avg_sq")
        adamw = AdamWConfig(1e-3)
        assert all(state_names(adamw, spec) == ("exp_avg", "exp_avg_sq") for spec in table.values() if not spec.frozen)

    @pytest.mark.parametrize("size", [1, 2, 3, 7])
    def test_work_is_dealt_evenly(self, size):
        """A rank with twice the work is what all others wait for."""
        costs = [(37 * i) % 11 + 1 for i in range(40)]
        dealt = deal(costs, size)
        loads = [sum(c for c, rank in zip(costs, dealt, strict=True) if rank == r) for r in range(size)]
        assert max(loads) - min(loads) <= max(costs)
        assert deal([], size) == []

    @pytest.mark.parametrize(
        ("fields", "key"),
        [
            ({"learning_rate": 0}, "learning_rate"),
            ({"momentum": 1.0}, "momentum"),
            ({"weight_decay": -1}, "weight_decay"),
            ({"ns_steps": 0}, "ns_steps"),
            ({"ns_coefficients": (1.0, math.inf, 1.0)}, "ns_coefficients"),
            ({"adamw_learning_rate": 0}, "adamw_learning_rate"),
            ({"betas": (0.9, 1.0)}, "betas"),
            ({"eps": 0}, "eps"),
        ],
    )
    def test_mistakes_name_the_key(self, fields, key):
        with pytest.raises(ValueError, match=rf"^{key}: got .* wants "):
            MuonConfig(**{"learning_rate": 1e-3} | fields)


def step_on_ranks(tensor_size: int, shard_size: int, few: bool) -> dict[str, Any]:
    """One of tensor x shard ranks: what it holds after some steps, and how many matrices it orthogonalised."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    shard, tensor = divmod(rank, tensor_size)
    tensors = [dist.new_group([s * tensor_size + t for t in range(tensor_size)]) for s in range(shard_size)]
    shards = [dist.new_group([s * tensor_size + t for s in range(shard_size)]) for t in range(tensor_size)]
    if few:
        muon.BATCH_ELEMENTS = 40
    solved = 0
    whole: Callable[..., Tensor] = muon.orthogonalise

    def counting(x: Tensor, *arguments: Any) -> Tensor:
        nonlocal solved
        solved += len(x)
        return whole(x, *arguments)

    muon.orthogonalise = counting
    place = Place(tensor, tensor_size)
    parameters, optimizer = step_table(
        place=place,
        tensor=Axis("tensor", tensor, tensor_size, (), tensors[shard]),
        shard=Axis("shard", shard, shard_size, (), shards[tensor]),
    )
    states = {name: optimizer.state[parameters[name]]["momentum"] for name, spec in TABLE.items() if is_matrix(spec)}
    dist.destroy_process_group()
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    return {"place": place, "values": values, "momentum": states, "solved": solved}


@pytest.mark.parametrize(
    ("tensor_size", "shard_size", "few"), [(1, 2, False), (1, 3, True), (2, 1, False), (4, 1, True), (2, 2, True)]
)
def test_ranks_share_the_work_and_agree(tensor_size, shard_size, few):
    """Breaks when a slice is orthogonalised as if it were the matrix, when copies of B and C count twice, when ranks
    drift apart, or when each of them does all of the work. few: so little at a time that everything takes turns."""
    ranks = run_ranks(step_on_ranks, tensor_size * shard_size, tensor_size, shard_size, few)
    parameters, optimizer = step_table()
    for rank in ranks:
        for name, spec in TABLE.items():
            wanted = local(parameters[name].detach(), spec, rank["place"])
            assert_near(rank["values"][name], wanted, 1e-5, name)
            if is_matrix(spec):
                momentum = optimizer.state[parameters[name]]["momentum"]
                assert_near(rank["momentum"][name], local(momentum, spec, rank["place"]), 1e-6, name)
            twin = ranks[rank["place"][0]]
            assert torch.equal(rank["values"][name], twin["values"][name]), "data-parallel ranks hold the same bits"
    blocks = sum(len(spec.named_blocks()) for spec in TABLE.values() if is_matrix(spec))
    assert sum(rank["solved"] for rank in ranks) == 4 * blocks
    assert max(rank["solved"] for rank in ranks) < 4 * blocks


def train_tiny(folder: Path) -> dict[str, Any]:
    """The tiny model under the engine: five steps, five with a NaN, three and a checkpoint, and other stages."""
    from train.parallel import open_mesh

    results: dict[str, Any] = {}
    with open_mesh("cpu", timeout_s=60) as mesh:
        for name, accumulation, poison in (("plain", 1, None), ("poison", 2, 2)):
            engine = start_engine(mesh, 0, optimizer=CONFIG)
            results[name] = list(train_steps(engine, accumulation, poison))
            results[f"{name}/owned"] = snapshot(engine)
            engine.close()
        engine = start_engine(mesh, 0, optimizer=CONFIG)
        for step in range(3):
            run_step(engine, step, 1)
            engine.apply(learning_rate(step))
        target = folder / str(mesh.size)
        if mesh.main:
            target.mkdir()
        mesh.barrier()
        gathered = mesh.gather(write_rank_files(target, mesh.rank, saved_fragments(engine)))
        if mesh.main:
            Manifest.from_records(chain(*gathered), saved_shapes(engine), {}).save(target)
        engine.close()
        for stage in (1, 2, 3):
            with pytest.raises(ValueError) as refused:
                start_engine(mesh, stage, optimizer=CONFIG)
            results[f"stage {stage}"] = str(refused.value)
    return results


def resume_tiny(folder: Path) -> dict[int, Any]:
    """The two steps after the checkpoints of one and of two ranks, by an engine that has stepped elsewhere before."""
    from train.parallel import open_mesh

    results = {}
    with open_mesh("cpu", timeout_s=60) as mesh:
        for source in (1, 2):
            engine = start_engine(mesh, 0, optimizer=CONFIG)
            run_step(engine, 4, 1)
            engine.apply(1.0)
            restore(engine, Checkpoint(folder / str(source)))
            for step in range(3, STEPS):
                run_step(engine, step, 1)
                engine.apply(learning_rate(step))
            results[source] = snapshot(engine)
            engine.close()
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("muon")
    return folder, {size: run_ranks(train_tiny, size, folder) for size in (1, 2)}


class TestEngine:
    @pytest.mark.parametrize("size", [1, 2])
    def test_equals_plain_torch(self, trained, size):
        """Weights of five steps depend neither on the number of ranks nor on the engine."""
        for rank in trained[1][size]:
            for step, expected in zip(rank["plain"], reference(1, config=CONFIG), strict=True):
                for name, weight in step["weights"].items():
                    assert_near(weight, expected["weights"][name], 1e-5, name)

    @pytest.mark.parametrize("size", [1, 2])
    def test_a_nan_on_one_rank_changes_nothing(self, trained, size):
        """Momentum that has seen a NaN never recovers."""
        expected = reference(2, skip=2, config=CONFIG)[-1]["weights"]
        for rank in trained[1][size]:
            steps = rank["poison"]
            assert [record["admitted"] for record in steps] == [True, True, False, True, True]
            assert [record["steps"] for record in steps] == [1, 2, 2, 3, 4]
            assert same_bits(steps[2]["before"], steps[2]["after"])
            for name, weight in expected.items():
                assert_near(steps[-1]["weights"][name], weight, 1e-5, name)

    @pytest.mark.parametrize("size", [1, 2])
    def test_each_parameter_saves_its_own_states(self, trained, size):
        """A matrix with moments of AdamW, or a vector with momentum, could not be restored."""
        state = assemble([rank["plain/owned"] for rank in trained[1][size]])
        adamw = {"weight", "optimizer/exp_avg", "optimizer/exp_avg_sq"}
        for name, kinds in state.items():
            matrix = name.endswith("weight") and name != "embedding.weight"
            wanted = {"weight", "optimizer/momentum"} if matrix else {"weight"} if name == "fixed" else adamw
            assert set(kinds) == wanted, name
        checkpoint = Checkpoint(trained[0] / str(size))
        assert set(checkpoint.names("optimizer/momentum")) == {n for n, k in state.items() if "optimizer/momentum" in k}
        assert checkpoint.names("optimizer/exp_avg") == checkpoint.names("optimizer/exp_avg_sq")

    @pytest.mark.parametrize("size", [1, 2])
    def test_goes_on_from_a_checkpoint(self, trained, size):
        """Bit for bit on the same number of ranks, or a resumed run is another run; within rounding on others, or a
        state was cut wrong."""
        folder, runs = trained
        resumed = run_ranks(resume_tiny, size, folder)
        for rank, never_stopped in zip(resumed, runs[size], strict=True):
            assert same_bits(rank[size], never_stopped["plain/owned"])
        whole = assemble([rank["plain/owned"] for rank in runs[size]])
        for name, kinds in assemble([rank[3 - size] for rank in resumed]).items():
            for kind, value in kinds.items():
                assert_near(value, whole[name][kind], 1e-5, f"{kind} of {name}")

    def test_stages_that_cut_matrices_are_refused(self, trained):
        """A slice would be orthogonalised as if it were the matrix."""
        for stage in (1, 2, 3):
            for rank in chain(*trained[1].values()):
                assert rank[f"stage {stage}"].startswith(f"parallel.zero_stage: got {stage}, wants 0: optimizer.kind")


def braid_on_ranks() -> dict[str, Tensor]:
    """The weights of a small braid after a few steps."""
    from tests.train.test_composition import losses
    from train.engine import Engine
    from train.parallel import open_mesh

    layers = {
        "M": Mamba2Config(head_dim=8, d_state=8, d_ssm=32, chunk=8),
        "*": AttentionConfig(n_heads=4, n_kv_heads=2),
        "E": MoEConfig(n_experts=3, d_hidden=20, balance_weight=0.01),
    }
    with open_mesh("cpu", timeout_s=60) as mesh:
        model = HybridLM(ModelConfig(61, 32, "M*E", layers))
        initialise_model(model, seed=0)
        engine = Engine(model, model.table(), CONFIG, zero_stage=0, mesh=mesh)
        for step in range(3):
            for number, loss in enumerate(losses(step, mesh.rank, mesh.size, engine)):
                engine.backward(loss, last=number == 1)
            engine.apply(CONFIG.learning_rate)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        engine.close()
    return weights


def test_a_braid_steps_alike_on_any_number_of_ranks():
    """Blocks and experts dealt to ranks come back to where they belong."""
    (one,), (first, second) = run_ranks(braid_on_ranks, 1), run_ranks(braid_on_ranks, 2)
    for name, weight in one.items():
        assert torch.equal(first[name], second[name]), name
        assert_near(first[name], weight, 1e-5, name)


SMALL = MuonConfig(learning_rate=1e-3, weight_decay=0.1)
LAYOUTS = {
    2: [
        (layouts.braid("M*-E", groups=1, kv_heads=1), Layout(tensor=2, micro=4, optimizer=SMALL)),
    ],
    4: [(layouts.braid("M*-E"), Layout(tensor=2, micro=4, optimizer=SMALL))],
}


@pytest.mark.parametrize("size", LAYOUTS)
def test_layouts_change_nothing(size):
    """Heads, groups and channels that lie on other ranks belong to the same matrices."""
    results = run_ranks(run_layouts, size, [(*case, 4) for case in LAYOUTS[size]], timeout_s=300)
    for index, (config, layout) in enumerate(LAYOUTS[size]):
        expected = layouts.reference(config, 4, chosen=layout.optimizer)
        found = layouts.differences(expected, [rank[index] for rank in results])
        wrong = {key: value for key, value in found.items() if not value <= 1e-4}
        assert not wrong, f"{config.pattern} in {layout}: {wrong}"
