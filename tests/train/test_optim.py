"""Parameter groups come from the table; the state before the first step is torch's own."""

import pytest
import torch
from torch import nn

from model.params import Constant, ParamSpec
from train.optim import AdamWConfig, build_optimizer, initialise_state, parameter_groups


def spec(*shape: int, **more) -> ParamSpec:
    return ParamSpec(shape, Constant(1.0), **more)


TABLE = {"weight": spec(3, 2), "bias": spec(3, decay=False), "fixed": spec(2, frozen=True)}


def parameters() -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.ones(s.shape), requires_grad=not s.frozen)) for name, s in TABLE.items()]


def test_only_what_the_table_marks_decays():
    """A_log, D, dt_bias, norms and biases would be pulled to zero."""
    groups = parameter_groups(parameters(), TABLE, 0.1)
    assert [(group["names"], group["weight_decay"]) for group in groups] == [(["weight"], 0.1), (["bias"], 0.0)]


def test_empty_groups_are_left_out():
    """DeepSpeed cannot flatten a group without parameters."""
    only = {"weight": TABLE["weight"]}
    groups = parameter_groups([p for p in parameters() if p[0] == "weight"], only, 0.1)
    assert [group["names"] for group in groups] == [["weight"]]


def test_every_parameter_is_in_one_group():
    """A parameter outside every group would never be trained; one in two groups would be stepped twice."""
    with pytest.raises(AssertionError, match="extra"):
        parameter_groups([*parameters(), ("extra", nn.Parameter(torch.ones(1)))], TABLE, 0.1)
    with pytest.raises(AssertionError, match="bias"):
        parameter_groups([p for p in parameters() if p[0] != "bias"], TABLE, 0.1)
    shared = nn.Parameter(torch.ones(3, 2))
    twice = {"weight": TABLE["weight"], "again": TABLE["weight"]}
    with pytest.raises(AssertionError, match="exactly once"):
        parameter_groups([("weight", shared), ("again", shared)], twice, 0.1)


def test_frozen_must_agree_with_requires_grad():
    with pytest.raises(AssertionError, match="fixed"):
        parameter_groups([(name, nn.Parameter(p.detach())) for name, p in parameters()], TABLE, 0.1)


def test_initial_state_is_what_torch_would_create():
    """A run resumed before its first step would differ from one that was not."""
    trained = []
    for early in (True, False):
        groups = parameter_groups(parameters(), TABLE, 0.1)
        optimizer = build_optimizer(AdamWConfig(learning_rate=0.1), groups)
        members = [p for group in groups for p in group["params"]]
        for parameter in members:
            if early:
                initialise_state(optimizer, parameter)
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
        trained.append((members, [optimizer.state[p] for p in members]))
    (ours, states), (theirs, expected) = trained
    for a, b, state, wanted in zip(ours, theirs, states, expected, strict=True):
        assert torch.equal(a, b)
        assert state.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(state[key], value)
            assert state[key].dtype == value.dtype


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"learning_rate": 0}, "learning_rate"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0}, "eps"),
        ({"weight_decay": -1}, "weight_decay"),
    ],
)
def test_mistakes_name_the_key(fields, key):
    with pytest.raises(ValueError, match=rf"^{key}: got .* wants "):
        AdamWConfig(**{"learning_rate": 1e-3} | fields)
