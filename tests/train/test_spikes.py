"""Loss spikes are found, noise is not, and a resumed detector decides as the first one did."""

import random

import pytest

from train.spikes import Spike, Spikes, SpikesConfig

CONFIG = SpikesConfig(window=32, warmup=16, patience=3)


def losses(count: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [4 - 0.005 * step + draw.gauss(0, 0.05) for step in range(count)]


def feed(spikes: Spikes, values: list[float], first: int = 1) -> list[Spike | None]:
    return [spikes.observe(step, loss, 8 * step, 8 * step + 8) for step, loss in enumerate(values, first)]


def test_a_spike_is_found_with_its_samples():
    """Breaks when the wrong data would be left out."""
    values = losses(60)
    values[40:43] = [6.0, 7.0, 8.0]
    found = [spike for spike in feed(Spikes(CONFIG), values) if spike is not None]
    assert [(s.first, s.last, s.start, s.stop, s.loss) for s in found] == [(41, 43, 8 * 41, 8 * 43 + 8, 8.0)]
    assert 3.7 < found[0].usual < 4


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_noise_and_single_outliers_are_no_spike(seed: int):
    """Breaks when a run is rolled back for nothing."""
    values = losses(300, seed)
    for step in range(50, 300, 40):
        values[step : step + 2] = [9.0, 9.0]
    assert not any(feed(Spikes(CONFIG), values))


def test_early_steps_and_non_finite_losses_do_not_count():
    """Breaks when the steep start of a run looks like a spike, or a NaN poisons the median."""
    spikes = Spikes(CONFIG)
    assert not any(feed(spikes, [10.0, 3.0, 9.0, 9.0, 9.0, 9.0]))
    assert not any(feed(spikes, [float("nan"), float("inf")] * 40, 7))
    assert len(spikes.state_dict()["usual"]) == 6


def test_a_resumed_detector_decides_alike():
    """Breaks when killing a run in the middle of a spike changes its course."""
    values = losses(60)
    values[40:46] = [6.0] * 6
    whole = feed(Spikes(CONFIG), values)
    for cut in (5, 41, 42, 44):
        first, second = Spikes(CONFIG), Spikes(CONFIG)
        before = feed(first, values[:cut])
        second.load_state_dict(first.state_dict())
        assert before + feed(second, values[cut:], cut + 1) == whole


def test_ignored_spikes_are_not_looked_for():
    """Breaks when `ignore` costs anything."""
    spikes = Spikes(SpikesConfig(action="ignore"))
    assert not any(feed(spikes, [1.0] * 200 + [9.0] * 50))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="warmup"):
        SpikesConfig(warmup=10, window=5)
    with pytest.raises(ValueError, match="patience"):
        SpikesConfig(patience=0)
