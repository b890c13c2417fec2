"""Where the backtracking stops, and that a failed search leaves no trace."""

import math

import pytest
import torch

from benchmarl_trust.functional import line_search, normal_kl
from benchmarl_trust.functional.line_search import KL_SLACK

DOUBLE = torch.float64
ONE = torch.ones((), dtype=DOUBLE)


class Line:
    """A parameter at 1 and a step of 1: the fraction is what the parameter has moved.

    Gain and KL are functions of the fraction; both count 1 · f and 0 if not given. The fractions tried are remembered.
    """

    def __init__(self, gain=lambda f: f, kl=lambda f: 0.0):
        self.parameter, self.step = ONE.clone().reshape(1), ONE.reshape(1)
        self.gain, self.kl, self.tried = gain, kl, []

    def evaluate(self):
        fraction = self.parameter.item() - 1
        self.tried.append(fraction)
        return ONE * self.gain(fraction), ONE * self.kl(fraction)

    def search(self, expected=1.0, kl_bound=0.5, **kwargs):
        return line_search([self.parameter], [self.step], self.evaluate, ONE * expected, kl_bound, **kwargs)

    def assert_untouched(self, search, trials):
        assert torch.equal(self.parameter, torch.ones(1, dtype=DOUBLE))
        assert [value.item() for value in search] == [0, 0, 0, trials]


def test_the_full_step_if_it_will_do():
    line = Line(gain=lambda f: 0.9 * f, kl=lambda f: 0.4 * f)
    search = line.search()
    assert [value.item() for value in search] == pytest.approx([1, 0.4, 0.9, 1], abs=1e-12)
    assert line.parameter.item() == 2
    assert len(line.tried) == 1


@pytest.mark.parametrize("coefficient", [0.8, 0.5, 0.1])
@pytest.mark.parametrize("k", [0, 1, 4, 9])
def test_the_first_fraction_within_the_bound(k, coefficient):
    bound = coefficient ** (2 * k)  # KL grows with the square
    line = Line(kl=lambda f: f**2)
    search = line.search(kl_bound=bound, backtrack_coeff=coefficient)
    assert search.fraction.item() == pytest.approx(coefficient**k, abs=1e-12)
    assert search.kl.item() == pytest.approx(bound, abs=1e-12)
    assert search.gain.item() == pytest.approx(coefficient**k, abs=1e-12)
    assert search.trials == k + 1
    assert line.parameter.item() == pytest.approx(1 + coefficient**k, abs=1e-12)
    assert line.tried == pytest.approx([coefficient**i for i in range(k + 1)], abs=1e-12)


def test_all_conditions_must_hold_at_once():
    """KL is good from the second trial on, the share of the gain from the third, the gain's sign up to the fourth."""
    line = Line(gain=lambda f: 0.4 * f if f > 0.7 else f, kl=lambda f: f)
    assert line.search(kl_bound=0.8).fraction.item() == pytest.approx(0.64)
    line = Line(gain=lambda f: -f if f > 0.55 else f)
    assert line.search().fraction.item() == pytest.approx(0.512)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["gain", "kl"])
def test_what_is_not_finite_fails_its_trial_only(what, bad):
    line = Line(**{what: lambda f: bad if f > 0.6 else f / 2 + 0.1})
    search = line.search()
    assert search.fraction.item() == pytest.approx(0.512)
    assert search.trials == 4
    line = Line(**{what: lambda f: bad})
    line.assert_untouched(line.search(), trials=10)


def test_an_infinite_bound_takes_no_infinite_kl():
    line = Line(kl=lambda f: math.inf)
    line.assert_untouched(line.search(kl_bound=math.inf), trials=10)


@pytest.mark.parametrize("gain", [lambda f: 0.0, lambda f: -f, lambda f: 0.49 * f, lambda f: 0.3 * f])
def test_too_little_gain(gain):
    """None at all, a loss, and less than half of the promise."""
    line = Line(gain=gain)
    line.assert_untouched(line.search(), trials=10)
    assert len(line.tried) == 10


def test_just_the_accepted_ratio_is_too_little():
    line = Line(gain=lambda f: 0.5)
    line.assert_untouched(line.search(trials=1), trials=1)


def test_zero_gain_is_refused_whatever_the_ratio():
    line = Line(gain=lambda f: 0.0)
    line.assert_untouched(line.search(accept_ratio=-1.0), trials=10)


@pytest.mark.parametrize(("ratio", "taken"), [(0.0, True), (0.29, True), (0.31, False), (0.9, False)])
def test_accept_ratio(ratio, taken):
    line = Line(gain=lambda f: 0.3 * f)
    search = line.search(accept_ratio=ratio)
    if taken:
        assert search.fraction == 1
    else:
        line.assert_untouched(search, trials=10)


@pytest.mark.parametrize("expected", [0.0, -1.0, -1e-300, math.nan, math.inf, -math.inf])
def test_a_step_that_does_not_ascend_is_not_tried(expected):
    line = Line()
    line.assert_untouched(line.search(expected=expected), trials=0)
    assert line.tried == []


@pytest.mark.parametrize("trials", [0, 1, 3])
def test_trials(trials):
    line = Line(kl=lambda f: 1.0)
    line.assert_untouched(line.search(trials=trials), trials=trials)
    assert len(line.tried) == trials


@pytest.mark.parametrize("bound", [1e-8, 0.01, 10.0])
def test_the_bound_itself_is_allowed(bound):
    for factor, taken in ((1.0, True), (1 + 0.9 * KL_SLACK, True), (1 + 2 * KL_SLACK, False)):
        line = Line(kl=lambda f, kl=factor * bound: kl)
        search = line.search(kl_bound=ONE * bound)
        assert (search.fraction == 1) == taken
        if not taken:
            line.assert_untouched(search, trials=10)


@pytest.mark.parametrize(("bound", "share"), [(1e-8, 0.01), (0.01, 1e-4), (10.0, 1.1e-6)])
def test_a_kl_in_float32_has_the_room_of_its_rounding_and_no_more(bound, share):
    for kl, taken in ((bound * (1 + 0.9 * share), True), (bound * (1 + 2 * share), False)):
        theta = torch.zeros(1)
        found = torch.ones(()), torch.tensor(kl, dtype=torch.float32)
        search = line_search([theta], [torch.ones(1)], lambda found=found: found, torch.ones(()), bound)
        assert (search.fraction == 1) == taken


def test_full_steps_that_land_on_the_bound_are_taken_in_float32():
    """Linear policies with fixed deviations: their KL is quadratic, so that √(2δ/q) d costs δ but for rounding."""
    torch.manual_seed(0)
    for _ in range(200):
        observation, theta = torch.randn(400, 6), torch.randn(2, 6)
        scale = (0.2 + torch.rand(2)).expand(400, 2)
        bound = 10 ** (-1 - 3 * torch.rand((), dtype=DOUBLE))
        direction = torch.randn(2, 6, dtype=DOUBLE)
        curvature = ((observation.double() @ direction.T) / scale).square().sum(-1).mean()
        step = ((2 * bound / curvature).sqrt() * direction).float()
        old = observation @ theta.T

        def evaluate(observation=observation, theta=theta, scale=scale, old=old):
            return torch.ones(()), normal_kl(old, scale, observation @ theta.T, scale).mean()

        search = line_search([theta], [step], evaluate, torch.ones(()), bound)
        assert search.fraction == 1
        assert search.kl.item() == pytest.approx(bound.item(), rel=1e-3)


def test_a_bound_of_zero():
    line = Line(kl=lambda f: f**2)
    line.assert_untouched(line.search(kl_bound=0.0), trials=10)
    assert Line().search(kl_bound=0.0).fraction == 1


def awkward_tensors():
    """Parameters of several shapes and types, with values that a restoring subtraction would not bring back."""
    return [
        torch.tensor([[0.1, 1e-30], [-0.0, 1e30]], dtype=torch.float32).requires_grad_(),
        torch.tensor(1 / 3, dtype=DOUBLE),
        torch.randn(2, 3, 4, dtype=DOUBLE).mT,
        torch.randn(3, 5, dtype=torch.bfloat16)[1],
        torch.empty(0),
        torch.nn.Parameter(torch.randn(7)),
    ]


@pytest.mark.parametrize("step", [0.3, 1e20, math.inf, math.nan])
@pytest.mark.parametrize("failure", ["kl", "gain", "raise"])
def test_a_failed_search_restores_every_bit(step, failure):
    parameters = awkward_tensors()
    before = [p.detach().clone() for p in parameters]
    memory = [p.data_ptr() for p in parameters]

    def evaluate():
        if failure == "raise":
            raise RuntimeError("out of memory")
        return ONE * (failure != "gain"), ONE * (failure == "kl")

    def run():
        return line_search(parameters, [torch.full_like(p, step) for p in parameters], evaluate, ONE, 0.5)

    if failure == "raise":
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
    else:
        assert [value.item() for value in run()] == [0, 0, 0, 10]
    for p, old, address in zip(parameters, before, memory, strict=True):
        assert torch.equal(p, old)
        assert torch.equal(p.signbit(), old.signbit())
        assert p.data_ptr() == address


def test_raising_at_a_later_trial():
    line = Line()

    def kl(fraction):
        if fraction < 0.7:
            raise KeyboardInterrupt
        return 1.0

    line.kl = kl
    with pytest.raises(KeyboardInterrupt):
        line.search()
    assert torch.equal(line.parameter, torch.ones(1, dtype=DOUBLE))
    assert len(line.tried) == 3


def test_moves_every_tensor_by_the_same_fraction_in_place():
    parameters = awkward_tensors()
    before = [p.detach().clone() for p in parameters]
    memory = [p.data_ptr() for p in parameters]
    step = [torch.randn(p.shape, dtype=DOUBLE) for p in parameters]
    trials = iter([1.0, 1.0, 0.0])
    search = line_search(parameters, step, lambda: (ONE, ONE * next(trials)), ONE, 0.5)
    assert search.fraction.item() == pytest.approx(0.64)
    for p, old, change, address in zip(parameters, before, step, memory, strict=True):
        assert torch.equal(p, (old + 0.8**2 * change).to(p.dtype))
        assert p.data_ptr() == address
        assert p.grad is None


def test_parameters_and_step_must_correspond():
    parameters = [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(ValueError, match="zip"):
        line_search(parameters, [torch.ones(2)], lambda: (ONE, ONE), ONE, 0.5)
    assert not parameters[0].any()


def test_builds_no_graph():
    theta = torch.zeros(1, requires_grad=True)
    search = line_search([theta], [torch.ones(1)], lambda: (theta.sum(), theta.square().sum()), torch.tensor(1.0), 0.7)
    assert search.fraction.item() == pytest.approx(0.8)
    assert not any(value.requires_grad for value in search)
