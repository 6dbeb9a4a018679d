"""Optimizers: their configs, parameter groups read from the parameter table, and their state before the first step."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from model.params import WHOLE, ParamSpec, Place, Table
from train.collectives import Axis
from train.muon import ADAMW_STATES, ALONE, MUON_STATES, ZERO_STAGES, Muon, MuonConfig, initial_state, is_matrix
from train.reading import require


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (arXiv 1711.05101). learning_rate: the peak, which the schedule multiplies. betas: decay of the moments.
    weight_decay: of the parameters that the table marks as decaying; all others have none."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    kind: Literal["adamw"] = "adamw"
    implied: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")
        ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(ok, "betas", list(self.betas), "two numbers in [0, 1)")
        require(self.eps > 0, "eps", self.eps, "a positive number")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number that is not negative")


OptimizerConfig = AdamWConfig | MuonConfig


def check_stage(config: OptimizerConfig, zero_stage: int) -> None:
    """Raises ValueError where the optimizer cannot step what the ZeRO stage leaves on a rank."""
    if isinstance(config, MuonConfig) and zero_stage not in ZERO_STAGES:
        raise ValueError(
            f"parallel.zero_stage: got {zero_stage}, wants {ZERO_STAGES[0]}: optimizer.kind muon orthogonalises whole "
            "matrices, which this stage flattens and cuts"
        )


def state_names(config: OptimizerConfig, spec: ParamSpec) -> tuple[str, ...]:
    """Names of the optimizer states that a parameter has, one value an element."""
    if spec.frozen:
        return ()
    return MUON_STATES if isinstance(config, MuonConfig) and is_matrix(spec) else ADAMW_STATES


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], table: Table, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: those that decay and those that do not, weights of experts apart
    from others (other ranks may hold them), empty groups left out.

    parameters: `module.named_parameters()`. Every parameter must be in the table and the other way round.
    """
    named = dict(parameters)
    assert named.keys() == table.keys(), f"table and module disagree about {sorted(named.keys() ^ table.keys())}"
    for name, parameter in named.items():
        frozen = table[name].frozen
        assert parameter.requires_grad != frozen, f"{name}: requires_grad disagrees with the table's frozen={frozen}"
    trainable = [name for name in named if not table[name].frozen]
    groups = [
        ([name for name in trainable if (table[name].decay, bool(table[name].experts)) == (decays, experts)], decay)
        for experts in (False, True)
        for decays, decay in ((True, weight_decay), (False, 0.0))
    ]
    members = [id(named[name]) for names, _ in groups for name in names]
    assert len(set(members)) == len(members) == len(trainable), "groups must cover every parameter exactly once"
    return [
        {
            "params": [named[name] for name in names],
            "names": names,
            "specs": [table[name] for name in names],
            "weight_decay": decay,
        }
        for names, decay in groups
        if names
    ]


def build_optimizer(
    config: OptimizerConfig,
    groups: list[dict[str, Any]],
    *,
    shard: Axis = ALONE,
    tensor: Axis = ALONE,
    place: Place = WHOLE,
) -> torch.optim.Optimizer:
    """The torch optimizer over `groups`; AdamW is fused where the device has a fused kernel. shard, tensor, place: the
    ranks that Muon works with."""
    if isinstance(config, MuonConfig):
        return Muon(groups, config, shard=shard, tensor=tensor, place=place)
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=device in ("cpu", "cuda")
    )


def initialise_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Gives `parameter` the state that it has before the first step, as `torch.optim.AdamW` would create it."""
    if isinstance(optimizer, Muon):
        return  # it has made its states itself, whole parameter by whole parameter
    assert isinstance(optimizer, torch.optim.AdamW), f"no initial state known for {type(optimizer).__name__}"
    optimizer.state[parameter] = initial_state(parameter, ADAMW_STATES)


def elementwise_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The states of `parameter` that have one value an element, by name, flattened."""
    state = optimizer.state[parameter]
    return {key: value.view(-1) for key, value in state.items() if key != "step"}
