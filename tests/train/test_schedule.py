"""Schedules are pure functions of the token clock."""

import math

import pytest

from train.schedule import WSD, Cosine

TOTAL = 1000


def test_wsd_rises_stays_and_falls():
    """A resumed run computes its learning rate from the clock alone, so each phase must begin where it says."""
    wsd = WSD(warmup_tokens=100, decay_tokens=200, final_fraction=0.1)
    assert [wsd.factor(t, TOTAL) for t in (0, 50, 100, 500, 800)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert wsd.factor(900, TOTAL) == pytest.approx(0.55)
    assert wsd.factor(TOTAL, TOTAL) == pytest.approx(0.1)
    assert wsd.factor(TOTAL + 5, TOTAL) == pytest.approx(0.1), "past the end it stays at the end"


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_decay_shapes(shape, half):
    wsd = WSD(warmup_tokens=0, decay_tokens=200, shape=shape)
    assert wsd.factor(0, TOTAL) == 1.0
    assert wsd.factor(900, TOTAL) == pytest.approx(half)
    assert wsd.factor(TOTAL, TOTAL) == pytest.approx(0.0, abs=1e-12)


def test_cosine():
    cosine = Cosine(warmup_tokens=200, final_fraction=0.2)
    assert [cosine.factor(t, TOTAL) for t in (0, 100, 200)] == [0.0, 0.5, 1.0]
    assert cosine.factor(600, TOTAL) == pytest.approx(0.6)
    assert cosine.factor(TOTAL, TOTAL) == pytest.approx(0.2)


def test_fractions_follow_the_length_of_the_run():
    """A longer run warms up and decays for longer, unless lengths are given in tokens."""
    wsd = WSD(warmup_fraction=0.1, decay_fraction=0.5)
    assert wsd.factor(50, 1000) == pytest.approx(0.5)
    assert wsd.factor(50, 2000) == pytest.approx(0.25)
    assert wsd.factor(750, 1000) == pytest.approx(0.5)
    fixed = WSD(warmup_tokens=100, warmup_fraction=0.5)
    assert fixed.factor(50, 1000) == fixed.factor(50, 2000) == 0.5


@pytest.mark.parametrize("schedule", [WSD(warmup_tokens=TOTAL, decay_tokens=0), Cosine(warmup_tokens=TOTAL)])
def test_warmup_may_fill_the_run(schedule):
    assert schedule.factor(TOTAL, TOTAL) == 1.0
    schedule.check(TOTAL)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: WSD(warmup_fraction=1.5), "warmup_fraction"),
        (lambda: WSD(warmup_tokens=-1), "warmup_tokens"),
        (lambda: WSD(decay_fraction=-0.1), "decay_fraction"),
        (lambda: WSD(final_fraction=2), "final_fraction"),
        (lambda: WSD(shape="square"), "shape"),
        (lambda: WSD(warmup_tokens=900, decay_tokens=200).check(TOTAL), "decay_tokens"),
        (lambda: Cosine(warmup_tokens=1001).check(TOTAL), "warmup_tokens"),
        (lambda: Cosine(final_fraction=-1), "final_fraction"),
    ],
)
def test_mistakes_name_the_key(make, key):
    with pytest.raises(ValueError, match=rf"^{key}: got .* wants ") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_run_without_decay_ends_at_the_peak():
    """The clock of the last step may pass the total; that must not divide by the length of a decay that is none."""
    schedule = WSD(warmup_fraction=0.0, decay_fraction=0.0)
    assert [schedule.factor(tokens, 100) for tokens in (0, 50, 100, 104)] == [1.0] * 4
