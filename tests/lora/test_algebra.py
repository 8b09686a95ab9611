import pytest
import torch

from unziplora.lora import algebra

LINEAR = ((4, 10), (7, 4))
CONV = ((4, 5, 3, 3), (7, 4, 1, 1))


def pair(shapes=LINEAR, seed=0, rank=None):
    generator = torch.Generator().manual_seed(seed)
    down, up = (list(shape) for shape in shapes)
    if rank:
        down[0] = up[1] = rank
    return torch.randn(down, generator=generator), torch.randn(up, generator=generator)


def best(dense, rank):
    """The best approximation of a matrix of a given rank, from its dense decomposition."""
    u, s, vh = torch.linalg.svd(dense.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_delta_of_a_linear_layer():
    down, up = pair()
    torch.testing.assert_close(algebra.delta((down, up)), torch.einsum("or,ri->oi", up, down))


def test_delta_of_a_convolution_is_that_of_the_two_convolutions():
    down, up = pair(CONV)
    x = torch.randn(2, 5, 8, 8)
    expected = torch.conv2d(torch.conv2d(x, down, padding=1), up)
    actual = torch.conv2d(x, algebra.delta((down, up)), padding=1)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shapes", [LINEAR, CONV], ids=["linear", "conv"])
def test_a_fold_equals_dense_scaling(shapes):
    loose = {"atol": 1e-5, "rtol": 1e-5}
    both = pair(shapes)
    dense = algebra.delta(both)
    outputs = torch.rand(dense.shape[0])
    folded = algebra.fold_output(both, outputs)
    torch.testing.assert_close(algebra.delta(folded), torch.einsum("o,o...->o...", outputs, dense), **loose)


def test_a_mask_of_zero_leaves_an_output_untouched():
    mask = torch.tensor([1.0, 0, 0, 1, 0, 1, 0])
    dense = algebra.delta(algebra.fold_output(pair(), mask))
    assert dense[mask == 0].count_nonzero() == 0
    assert dense[mask == 1].count_nonzero() > 0


@pytest.mark.parametrize("shapes", [LINEAR, CONV], ids=["linear", "conv"])
def test_cat_equals_the_weighted_sum(shapes):
    pairs = [pair(shapes, seed, rank) for seed, rank in enumerate((1, 4, 6))]
    joined = algebra.cat([algebra.scale(p, w) for p, w in zip(pairs, [1.0, -0.5, 2.0], strict=True)])
    assert joined[0].shape[0] == joined[1].shape[1] == 11
    expected = sum(w * algebra.delta(p) for w, p in zip([1.0, -0.5, 2.0], pairs, strict=True))
    torch.testing.assert_close(algebra.delta(joined), expected, atol=1e-5, rtol=1e-5)


def test_norm_is_the_dense_one():
    assert algebra.norm(pair()) == pytest.approx(float(algebra.delta(pair()).norm()), rel=1e-5)


@pytest.mark.parametrize("shapes", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_resize_is_the_best_approximation(shapes, rank):
    both = pair(shapes)
    small = algebra.resize(both, rank=rank)
    assert small[0].shape == (rank, *both[0].shape[1:])
    assert small[1].shape == (both[1].shape[0], rank, *both[1].shape[2:])
    expected = best(algebra.delta(both).flatten(1), rank)
    torch.testing.assert_close(algebra.delta(small).flatten(1).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shapes", [LINEAR, CONV], ids=["linear", "conv"])
def test_projection_away_from_all_directions_of_another_update_ignores_its_inputs(shapes):
    both, other = pair(shapes), pair(shapes, seed=1, rank=2)
    loose = {"atol": 1e-4, "rtol": 1e-4}
    inputs = algebra.delta(other).flatten(1)  # its rows are all the input directions that it reads
    blind = algebra.project(both, other, share=1.0, energy=1.0)
    torch.testing.assert_close(algebra.delta(blind).flatten(1) @ inputs.T, torch.zeros(7, 7), **loose)
    halves = (algebra.delta(both) + algebra.delta(blind)) / 2
    torch.testing.assert_close(algebra.delta(algebra.project(both, other, 0.5, 1.0)), halves, **loose)
    torch.testing.assert_close(algebra.delta(algebra.project(both, other, 0.0, 1.0)), algebra.delta(both), **loose)


def test_projection_away_from_nothing_changes_nothing():
    down, up = pair(seed=1)
    kept = algebra.project(pair(), (down, torch.zeros_like(up)), share=1.0, energy=0.9)
    torch.testing.assert_close(algebra.delta(kept), algebra.delta(pair()))


def test_resize_to_the_own_rank_or_above_changes_nothing():
    for rank in (4, 9):
        small = algebra.resize(pair(), rank=rank)
        assert small[0].shape[0] == 4
        torch.testing.assert_close(algebra.delta(small), algebra.delta(pair()), atol=1e-5, rtol=1e-5)


def test_resize_finds_the_true_rank():
    down, up = pair(rank=3)
    doubled = algebra.cat([(down, up), (down, up)])
    assert algebra.resize(doubled, energy=1.0)[0].shape[0] == 3


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99])
def test_energy_keeps_the_lowest_sufficient_rank(energy):
    both = pair(rank=6)
    s = torch.linalg.svdvals(algebra.delta(both).double()).square()
    rank = algebra.resize(both, energy=energy)[0].shape[0]
    assert s[:rank].sum() >= energy * s.sum() * (1 - 1e-6)
    assert s[: rank - 1].sum() < energy * s.sum()


def test_an_untrained_pair_stays_zero_and_keeps_rank_one():
    down, up = pair()
    small = algebra.resize((down, torch.zeros_like(up)), energy=0.9)
    assert small[0].shape[0] == 1
    assert algebra.delta(small).count_nonzero() == 0


def test_rank_above_the_width_is_reduced():
    both = pair(rank=20)
    small = algebra.resize(both, energy=1.0)
    assert small[0].shape[0] <= 7
    torch.testing.assert_close(algebra.delta(small), algebra.delta(both), atol=1e-4, rtol=1e-4)


def test_half_precision_is_computed_in_fp32():
    down, up = pair()
    half = (down.half(), up.half())
    for result in (algebra.delta(half), *algebra.resize(half, 2), *algebra.cat([half]), *algebra.scale(half, 2)):
        assert result.dtype == torch.float32


def test_the_dense_matrix_is_never_formed(monkeypatch):
    """At 40,000 × 40,000 the dense update would need 6.4 GB; its resize must not notice."""
    big = pair(((3, 40_000), (40_000, 3)))
    assert algebra.resize(big, 2)[0].shape == (2, 40_000)
    assert algebra.norm(big) > 0


@pytest.mark.parametrize("shapes", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize(
    ("a", "b"), [(1e-7, 2.0), (2.0, 1e-7), (1e-12, 1e4), (1e-3, 1e7), (1e7, 1e-3), (1e-20, 1e12), (3e5, 3e-2)]
)
def test_a_tiny_factor_next_to_a_large_one_survives_fp16(shapes, a, b):
    down, up = pair(shapes)
    down, up = down * a, up * b
    balanced = algebra.balance((down, up))
    dense = algebra.delta((down, up)).double()
    assert torch.equal(algebra.delta(balanced).double(), dense), "powers of two change no bit"
    stored = algebra.delta((balanced[0].half(), balanced[1].half())).double()
    assert (stored - dense).norm() < 1e-3 * dense.norm()


def test_single_rows_are_balanced_without_the_others():
    down, up = pair(rank=4)
    ranks = torch.tensor([1.0, 2e-8, 1.0, 1e6])
    mixed = down * ranks[:, None], up / ranks
    balanced = algebra.balance(mixed)
    assert torch.equal(balanced[0][[0, 2]], down[[0, 2]])
    dense = algebra.delta((down, up))
    stored = algebra.delta((balanced[0].half(), balanced[1].half()))
    assert (stored - dense).norm() < 1e-3 * dense.norm()


def test_ordinary_pairs_and_those_of_fp16_files_keep_every_bit():
    for a, b in ((0.02, 0.02), (0.02, 1.0), (1.0, 2e-3), (1.0, 0.0), (0.0, 1.0)):
        down, up = pair()
        balanced = algebra.balance((down * a, up * b))
        assert torch.equal(balanced[0], down * a)
        assert torch.equal(balanced[1], up * b)
    tiny = (pair()[0] * 1e-6).half().float(), pair()[1].half().float()
    assert all(torch.equal(new, old) for new, old in zip(algebra.balance(tiny), tiny, strict=True))
