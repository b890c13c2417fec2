"""Conjugate gradients against dense solves; systems that stop, break or start warm beside others that go on."""

import pytest
import torch
from conftest import waits_are_errors
from hypothesis import given
from hypothesis import strategies as st

from benchmarl_trust.functional import conjugate_gradient

DOUBLE = torch.float64


def systems(n=4, size=6, condition=20.0, seed=0):
    """Random symmetric positive definite matrices [n, size, size] and right sides [n, size]."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, size, size, dtype=DOUBLE, generator=generator)).Q
    spectrum = condition ** torch.linspace(0, 1, size, dtype=DOUBLE)
    return (basis * spectrum) @ basis.mT, torch.randn(n, size, dtype=DOUBLE, generator=generator)


class Product:
    """The matvec of dense matrices, which counts its calls; ``spoil(call)`` may return what replaces some rows."""

    def __init__(self, matrices, spoil=None):
        self.matrices, self.spoil, self.calls = matrices, spoil, 0

    def __call__(self, vectors):
        self.calls += 1
        product = torch.einsum("nij,nj->ni", self.matrices, vectors)
        return product if self.spoil is None else self.spoil(self.calls, product)


def near(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [1, 2, 6, 30])
@pytest.mark.parametrize("n", [1, 5])
def test_solves(n, size):
    matrix, b = systems(n, size)
    solution = conjugate_gradient(Product(matrix), b, iterations=4 * size, tolerance=1e-26)
    near(solution.x, torch.linalg.solve(matrix, b))
    assert solution.finite.all()
    assert (solution.residual.norm(dim=-1) < 1e-12 * b.norm(dim=-1)).all()
    near(solution.residual, b - Product(matrix)(solution.x))


@given(st.integers(0, 10_000), st.integers(1, 8), st.floats(1.0, 100.0), st.floats(1e-12, 1e12))
def test_random_systems_of_any_scale(seed, size, condition, scale):
    matrix, b = systems(3, size, condition, seed)
    solution = conjugate_gradient(Product(matrix), scale * b, iterations=5 * size, tolerance=1e-24)
    near(solution.x / scale, torch.linalg.solve(matrix, b), 1e-9)


def test_as_many_iterations_as_distinct_eigenvalues():
    matrix, b = systems(3, 12)
    basis = torch.linalg.eigh(matrix).eigenvectors
    matrix = (basis * (1 + torch.arange(12) % 3)) @ basis.mT
    solution = conjugate_gradient(Product(matrix), b, iterations=10, tolerance=1e-20)
    assert solution.iterations.tolist() == [3, 3, 3]
    near(solution.x, torch.linalg.solve(matrix, b))


def test_a_converged_or_zero_system_waits_for_the_others():
    matrix, b = systems(4, 8)
    matrix[1] = 3 * torch.eye(8)  # one iteration
    b[2] = 0
    together = conjugate_gradient(Product(matrix), b, iterations=40, tolerance=1e-20)
    assert together.iterations[1:3].tolist() == [1, 0]
    assert (together.iterations[[0, 3]] >= 7).all()
    assert together.x[2].tolist() == [0] * 8
    assert together.residual[2].tolist() == [0] * 8
    assert together.finite.all()
    for i in range(4):
        alone = conjugate_gradient(Product(matrix[i : i + 1]), b[i : i + 1], iterations=40, tolerance=1e-20)
        near(together.x[i], alone.x[0], 1e-12)
        assert together.iterations[i] == alone.iterations[0]


def test_tolerance_is_relative():
    matrix, b = systems(2, 8)
    b[1] = b[0]
    matrix[1] = matrix[0]
    scale = torch.tensor([[1.0], [1e-9]], dtype=DOUBLE)
    solution = conjugate_gradient(Product(matrix), scale * b, iterations=30, tolerance=1e-8)
    assert solution.iterations[0] == solution.iterations[1]
    near(solution.x[1] * 1e9, solution.x[0])


@pytest.mark.parametrize("iterations", [0, 1, 3, 10])
def test_no_product_is_wasted(iterations):
    matrix, b = systems()
    product = Product(matrix)
    solution = conjugate_gradient(product, b, iterations, tolerance=0.0)
    assert product.calls == iterations
    assert (solution.iterations <= iterations).all()
    near(solution.residual, b - Product(matrix)(solution.x))


def test_half_the_quadratic_form_needs_no_further_product():
    matrix, b = systems(5, 20)
    x, residual, *_ = conjugate_gradient(Product(matrix), b, iterations=6)
    near(0.5 * (x * (b - residual)).sum(-1), 0.5 * torch.einsum("ni,nij,nj->n", x, matrix, x))


def test_every_iteration_raises_the_quadratic_objective():
    matrix, b = systems(3, 20, condition=1e3)

    def objective(x):
        return (b * x).sum(-1) - 0.5 * torch.einsum("ni,nij,nj->n", x, matrix, x)

    values = torch.stack([objective(conjugate_gradient(Product(matrix), b, k, refresh=4).x) for k in range(20)])
    assert (values.diff(dim=0) > 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e200])
@pytest.mark.parametrize("refresh", [3, 100])
def test_a_bad_right_side_harms_nobody_else(bad, refresh):
    """1e200 is finite, its square is not."""
    matrix, b = systems(3, 8)
    clean = conjugate_gradient(Product(matrix), b, 20, refresh=refresh)
    b[1, 3] = bad
    solution = conjugate_gradient(Product(matrix), b, 20, refresh=refresh)
    assert solution.finite.tolist() == [True, False, True]
    assert solution.x[1].tolist() == [0] * 8
    assert solution.iterations[1] == 0
    assert torch.equal(solution.x[[0, 2]], clean.x[[0, 2]])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("refresh", [3, 100])
@pytest.mark.parametrize("after", [0, 1, 3, 4])
def test_a_broken_product_keeps_the_last_good_solution(bad, refresh, after):
    """With refresh=3 the fourth product is that of the refreshed residual."""
    matrix, b = systems(3, 12, condition=1e3)

    def spoil(call, product):
        return torch.where((torch.arange(3) == 1).unsqueeze(-1) & (call > after), bad, product)

    solution = conjugate_gradient(Product(matrix, spoil), b, 10, refresh=refresh)
    good = after if after <= 3 or refresh > 3 else after - 1  # one of the good products was no step's
    before = conjugate_gradient(Product(matrix), b, good, refresh=refresh)
    assert solution.finite.tolist() == [True, False, True]
    assert solution.iterations.tolist() == [10, good, 10]
    assert torch.equal(solution.x[1], before.x[1])
    near(solution.residual[1], before.residual[1])
    assert solution.residual.isfinite().all()
    whole = conjugate_gradient(Product(matrix), b, 10, refresh=refresh)
    assert torch.equal(solution.x[[0, 2]], whole.x[[0, 2]])


def test_what_breaks_once_does_not_come_back():
    matrix, b = systems(2, 12, condition=1e3)
    row = torch.tensor([[True], [False]])
    solution = conjugate_gradient(Product(matrix, lambda call, p: torch.where(row & (call == 3), torch.nan, p)), b, 10)
    assert solution.finite.tolist() == [False, True]
    assert solution.iterations.tolist() == [2, 10]


@pytest.mark.parametrize("curvature", [-1.0, 0.0])
def test_no_positive_curvature(curvature):
    matrix, b = systems(3, 8)
    matrix[1] = curvature * torch.eye(8)
    solution = conjugate_gradient(Product(matrix), b, 30, tolerance=1e-20)
    assert solution.finite.tolist() == [True, False, True]
    assert solution.x[1].tolist() == [0] * 8
    near(solution.x[::2], torch.linalg.solve(matrix[::2], b[::2]))


def test_an_indefinite_matrix_is_flagged_when_a_direction_shows_it():
    matrix = torch.diag(torch.tensor([4.0, 3.0, 2.0, -1.0], dtype=DOUBLE)).unsqueeze(0)
    b = torch.tensor([[1.0, 1.0, 1.0, 0.5]], dtype=DOUBLE)
    solution = conjugate_gradient(Product(matrix), b, 10)
    assert not solution.finite
    assert 0 < solution.iterations < 4
    assert solution.x.isfinite().all()
    near(solution.residual, b - Product(matrix)(solution.x))


def test_a_warm_start_goes_on_at_no_cost():
    matrix, b = systems(3, 20, condition=100)
    first = conjugate_gradient(Product(matrix), b, 8)
    product = Product(matrix)
    second = conjugate_gradient(product, b, 8, start=(first.x, b - first.residual))
    assert product.calls == 8
    assert (second.residual.norm(dim=-1) < 0.5 * first.residual.norm(dim=-1)).all()
    near(second.residual, b - Product(matrix)(second.x))
    finished = conjugate_gradient(Product(matrix), b, 100, tolerance=1e-24, start=(first.x, b - first.residual))
    near(finished.x, torch.linalg.solve(matrix, b))


def test_a_warm_start_for_another_right_side():
    matrix, b = systems(2, 20, condition=100)
    first = conjugate_gradient(Product(matrix), b, 60, tolerance=1e-24)
    other = b + 0.01 * torch.randn(b.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    warm = conjugate_gradient(Product(matrix), other, 5, start=(first.x, b - first.residual))
    cold = conjugate_gradient(Product(matrix), other, 5)
    assert (warm.residual.norm(dim=-1) < 0.1 * cold.residual.norm(dim=-1)).all()


def test_a_start_at_the_solution_stays_there_bit_for_bit():
    matrix, b = systems(3, 6)
    x = torch.linalg.solve(matrix, b)
    solution = conjugate_gradient(Product(matrix), b, 10, start=(x, Product(matrix)(x)))
    assert torch.equal(solution.x, x)
    assert solution.iterations.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("refresh", "products"), [(10, 32), (7, 34), (30, 30), (29, 31), (1, 59)])
def test_products_of_the_refreshed_residual(refresh, products):
    matrix, b = systems(2, 80, condition=100)
    product = Product(matrix)
    solution = conjugate_gradient(product, b, 30, tolerance=0.0, refresh=refresh)
    assert solution.iterations.tolist() == [30, 30]
    assert product.calls == products
    near(solution.x, conjugate_gradient(Product(matrix), b, 30, tolerance=0.0, refresh=1000).x, 1e-7)


def drift(solution, matrix, b):
    """How far the residual that is reported is from the true one, as a share of b."""
    true = b - Product(matrix)(solution.x.double())
    return ((solution.residual.double() - true).norm(dim=-1) / b.norm(dim=-1)).amax()


def test_refreshing_mends_a_drifted_residual():
    """In float32 the recursion's residual vanishes while the true one does not."""
    matrix, b = systems(5, 60, condition=1e3)
    matrix, b = matrix.float(), b.float()
    kwargs = {"iterations": 301, "tolerance": 1e-16}
    drifted = conjugate_gradient(Product(matrix), b, refresh=1000, **kwargs)
    mended = conjugate_gradient(Product(matrix), b, refresh=10, **kwargs)
    assert mended.x.dtype == mended.residual.dtype == torch.float32
    exact = matrix.double(), b.double()
    assert drift(mended, *exact) < 0.5 * drift(drifted, *exact)
    assert (drifted.residual.norm(dim=-1) < 1e-7 * b.norm(dim=-1)).all()


@pytest.mark.parametrize("condition", [10.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("refresh", [1, 10, 30])
def test_refreshing_in_float32_never_diverges(condition, refresh):
    """matrix step by rᵀr along a direction that belongs to another residual would."""
    matrix, b = systems(5, 60, condition)
    solution = conjugate_gradient(Product(matrix.float()), b.float(), 600, tolerance=1e-16, refresh=refresh)
    true = b - Product(matrix.float().double())(solution.x.double())
    assert solution.finite.all()
    bound = 1e-6 * condition if refresh > 1 else 1.0  # refreshed at every step it is steepest descent in the end
    assert (true.norm(dim=-1) < bound * b.norm(dim=-1)).all()


MANY = 10**6


@pytest.mark.parametrize("refresh", [1, 10, 30])
def test_what_has_converged_stops_the_loop(refresh):
    matrix, b = systems(3, 20)
    product = Product(matrix)
    solution = conjugate_gradient(product, b, MANY, refresh=refresh)
    near(solution.x, torch.linalg.solve(matrix, b), 1e-4)
    assert product.calls <= 100
    assert torch.equal(solution.iterations, conjugate_gradient(Product(matrix), b, 200, refresh=refresh).iterations)


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_stagnated_stops_the_loop(dtype, condition):
    """No tolerance can be met, and nothing is lost by not trying a thousand times more."""
    matrix, b = systems(4, 30, condition)
    product = Product(matrix.to(dtype))
    solution = conjugate_gradient(product, b.to(dtype), MANY, tolerance=0.0)
    assert product.calls <= 3000
    assert solution.finite.all()
    assert (solution.residual.norm(dim=-1) < 20 * torch.finfo(dtype).eps * condition * b.norm(dim=-1)).all()


def test_a_system_that_has_stagnated_stays_while_others_go_on():
    matrix, b = systems(2, 30, 1e4)
    matrix[0] = torch.eye(30)
    b[1] = b[1] * 1e-3
    exact = conjugate_gradient(Product(matrix), b, 300, tolerance=0.0)
    assert exact.iterations[0] <= 2 < exact.iterations[1]
    near(exact.x[0], b[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stops_the_loop(bad):
    matrix, b = systems(3, 8)
    b[:] = bad
    product = Product(matrix)
    assert not conjugate_gradient(product, b, MANY).finite.any()
    assert product.calls <= 20


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for_and_gives_the_same():
    matrix, b = systems(4, 30, 1e4)
    on_cpu = conjugate_gradient(Product(matrix), b, 500, tolerance=1e-12)
    product, right = Product(matrix.cuda()), b.cuda()
    conjugate_gradient(product, right, 20)  # what is loaded at first use
    with waits_are_errors():
        on_gpu = conjugate_gradient(product, right, 500, tolerance=1e-12)
    torch.testing.assert_close(on_gpu.x.cpu(), on_cpu.x, rtol=1e-6, atol=1e-8)
    assert (on_gpu.iterations.cpu() < 500).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_type(dtype):
    matrix, b = systems()
    solution = conjugate_gradient(Product(matrix.to(dtype)), b.to(dtype), 12)
    assert solution.x.dtype == solution.residual.dtype == dtype
    torch.testing.assert_close(solution.x.double(), torch.linalg.solve(matrix, b), rtol=1e-3, atol=1e-4)


def test_changes_none_of_its_arguments():
    matrix, b = systems()
    x, product = torch.zeros_like(b), torch.zeros_like(b)
    kept = b.clone()
    conjugate_gradient(Product(matrix), b, 5, start=(x, product))
    assert torch.equal(b, kept)
    assert not x.any()
    assert not product.any()


@pytest.mark.parametrize("shape", [(4,), (), (2, 3, 4)])
def test_right_sides_are_a_matrix(shape):
    with pytest.raises(ValueError, match="unsqueeze"):
        conjugate_gradient(lambda v: v, torch.ones(shape))
