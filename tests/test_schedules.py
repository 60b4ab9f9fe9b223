# SPDX-License-Identifier: Apache-2.0
"""Schedules against their formulas, the published figures, and bad input."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semisam import schedules as s


def test_loss_weights_at_the_start_the_middle_and_the_end():
    # Published figures: 0.1 exp(-5) at one end, 0.1 exp(-5/4) where they cross, 0.1 at the other end.
    for total in (6000, 30000):
        assert s.consistency_weight(0, total) == pytest.approx(6.7379e-4, rel=1e-5)
        assert s.consistency_weight(total / 2, total) == pytest.approx(0.028650, rel=1e-4)
        assert s.consistency_weight(total, total) == 0.1
        assert s.sam_weight(0, total) == 0.1
        assert s.sam_weight(total / 2, total) == pytest.approx(0.028650, rel=1e-4)
        assert s.sam_weight(total, total) == pytest.approx(6.7379e-4, rel=1e-5)


def test_loss_weights_are_constant_over_blocks_of_150_steps():
    assert s.consistency_weight(149, 6000) == s.consistency_weight(0, 6000)
    assert s.consistency_weight(150, 6000) > s.consistency_weight(149, 6000)
    # Two values by hand: rho(1, 40) = exp(-5 (39/40)^2), and block 39 of 40 is what is left after one step.
    assert s.consistency_weight(150, 6000) == pytest.approx(0.1 * math.exp(-5 * 0.975**2))
    assert s.sam_weight(1, 6000) == pytest.approx(0.1 * math.exp(-5 * 0.025**2))


def test_a_length_of_our_own_counts_blocks():
    assert s.consistency_weight(1500, 6000, length=10) == 0.1
    assert s.consistency_weight(7, 100, weight=2.0, block=1, length=14) == pytest.approx(2 * math.exp(-1.25))
    assert s.sam_weight(0, 100, weight=1.0, block=1, length=0) == 1.0


@given(t=st.integers(0, 6000))
def test_sam_weight_mirrors_the_consistency_weight(t):
    assert s.sam_weight(t, 6000) == s.consistency_weight(6000 - t, 6000)


@pytest.mark.parametrize("t", [0, 1, 75, 3000, 5999, 6000])
def test_the_ramps_of_the_generalist(t):
    """Falling is the published one; rising is that of the consistency; flat is the weight itself."""
    assert s.sam_weight(t, 6000, ramp="falling") == s.sam_weight(t, 6000)
    assert s.sam_weight(t, 6000, ramp="rising") == s.consistency_weight(t, 6000)
    short = {"length": 20, "weight": 0.3}
    assert s.sam_weight(t, 6000, ramp="rising", **short) == s.consistency_weight(t, 6000, **short)
    assert s.sam_weight(t, 6000, ramp="flat", **short) == 0.3


@given(t=st.floats(-1e6, 1e6), length=st.floats(0, 1e6))
def test_the_ramp_stays_between_its_ends_and_rises(t, length):
    value = s.sigmoid_rampup(t, length)
    assert math.exp(-5) <= value <= 1
    assert s.sigmoid_rampup(t + 1, length) >= value


def test_the_ramp_outside_its_range():
    assert s.sigmoid_rampup(-3, 10) == math.exp(-5)
    assert s.sigmoid_rampup(11, 10) == 1.0
    assert s.sigmoid_rampup(0, 0) == 1.0


def test_ema_decay_is_a_running_mean_until_its_limit():
    assert s.ema_decay(0) == 0.0
    average, seen = 0.0, [3.0, 5.0, 10.0, -2.0]
    for t, value in enumerate(seen):
        average = s.ema_decay(t) * average + (1 - s.ema_decay(t)) * value
    assert average == pytest.approx(sum(seen) / 4)
    assert s.ema_decay(98) < 0.99 == s.ema_decay(99) == s.ema_decay(10**6)
    assert s.ema_decay(10**6, limit=0.999) == 0.999


def test_learning_rates():
    assert s.polynomial_lr(15000, 30000) == pytest.approx(0.5**0.9)
    assert s.polynomial_lr(10, 40, power=1) == 0.75
    assert s.polynomial_lr(50, 40) == 0.0
    assert [s.step_lr(t) for t in (0, 2499, 2500, 4999, 5000)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert s.step_lr(10, milestones=()) == 1.0


def test_uamt_threshold():
    assert s.uamt_threshold(0, 6000) == pytest.approx((0.75 + 0.25 * math.exp(-5)) * math.log(2))
    assert s.uamt_threshold(6000, 6000) == pytest.approx(math.log(2))
    assert s.uamt_threshold(6000, 6000, classes=14) == pytest.approx(math.log(14))


def test_warmup():
    assert [s.warmup(t, 6000) for t in (0, 150, 300, 6000)] == [0.0, 0.5, 1.0, 1.0]
    assert s.warmup(0, 6000, fraction=0) == 1.0


NEGATIVE = r"\(\): t: expected a step of at least 0, got -1"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: s.sigmoid_rampup(0, -1), r"sigmoid_rampup\(\): length: expected a finite .* got -1"),
        (lambda: s.sigmoid_rampup(0, math.inf), r"sigmoid_rampup\(\): length: .* got inf"),
        (lambda: s.sigmoid_rampup(math.nan, 1), r"sigmoid_rampup\(\): t: expected a step, got nan"),
        (lambda: s.consistency_weight(-1, 10), "consistency_weight" + NEGATIVE),
        (lambda: s.consistency_weight(0, 0), r"consistency_weight\(\): total_steps: .* above 0, got 0"),
        (lambda: s.consistency_weight(0, 10, block=0), r"consistency_weight\(\): block: .* got 0"),
        (lambda: s.consistency_weight(0, 10, length=-2), r"length: .* got -2"),
        (lambda: s.sam_weight(-1, 10), "sam_weight" + NEGATIVE),
        (lambda: s.sam_weight(0, 10, ramp="up"), r"sam_weight\(\): ramp: .* falling, .* got 'up'"),
        (lambda: s.sam_weight(0, math.nan), r"sam_weight\(\): total_steps: .* got nan"),
        (lambda: s.warmup(-1, 10), "warmup" + NEGATIVE),
        (lambda: s.warmup(1, 10, fraction=1.5), r"warmup\(\): fraction: expected 0 to 1 .* got 1.5"),
        (lambda: s.ema_decay(-1), "ema_decay" + NEGATIVE),
        (lambda: s.ema_decay(1, limit=1.1), r"ema_decay\(\): limit: expected 0 to 1, got 1.1"),
        (lambda: s.polynomial_lr(math.nan, 5), r"polynomial_lr\(\): t: .* got nan"),
        (lambda: s.polynomial_lr(1, 5, power=-1), r"polynomial_lr\(\): power: .* got -1"),
        (lambda: s.step_lr(1, milestones=(5, 2)), r"step_lr\(\): milestones: .* got \(5, 2\)"),
        (lambda: s.step_lr(1, factor=0), r"step_lr\(\): factor: .* got 0"),
        (lambda: s.uamt_threshold(1, 5, classes=1), r"uamt_threshold\(\): classes: .* got 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_needs_no_torch():
    code = "import semisam.schedules, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_examples():
    result = doctest.testmod(s)
    assert result.attempted >= 8
    assert result.failed == 0
