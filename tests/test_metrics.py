"""Distances and scores of features: closed forms, limits, slow formulas and torch-fidelity's own functions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from vgen.evaluation import metrics
from vgen.evaluation.metrics import (
    Moments,
    check_ssim,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_error,
    nearest,
    per_image_error,
    precision_recall,
    squared_distances,
)
from vgen.types import SettingError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(count: int, width: int = 8, seed: int = 0) -> Tensor:
    """Rows as a network gives them: float32, not negative, of different spreads and correlated."""
    mixing = normal(width, width, seed=99) + torch.diag(torch.linspace(0.5, 3, width, dtype=torch.float64))
    return (normal(count, width, seed=seed) @ mixing / width**0.5).clamp(min=-0.5).add(0.5).float()


def covariance(width: int, seed: int, rank: int | None = None) -> Tensor:
    rows = normal(rank or 2 * width, width, seed=seed)
    return rows.T @ rows / len(rows)


# ---- moments


def moments(*blocks: Tensor) -> Moments:
    found = Moments()
    for block in blocks:
        found.add(block)
    return found


SPLITS = [[500], [1] * 500, [499, 1], [1, 499], [0, 250, 0, 250, 0], [7, 93, 150, 250], [200] * 2 + [100]]


@pytest.mark.parametrize("offset", [0.0, -3.0, 1e6])
@pytest.mark.parametrize("sizes", SPLITS, ids=lambda sizes: f"{len(sizes)} blocks")
def test_moments_are_numpys_however_the_rows_arrive(sizes: list[int], offset: float) -> None:
    """With a mean of 1e6, sums of squares would lose twelve of sixteen digits."""
    rows = normal(500, 6) * torch.arange(1, 7) + offset
    found = moments(*rows.split(sizes))
    assert found.count == 500
    np.testing.assert_allclose(found.mean, rows.numpy().mean(0), rtol=1e-14, atol=1e-12)
    np.testing.assert_allclose(found.covariance(), np.cov(rows.numpy(), rowvar=False), rtol=0, atol=2e-8)
    if offset != 1e6:
        np.testing.assert_allclose(found.covariance(), np.cov(rows.numpy(), rowvar=False), rtol=0, atol=1e-12)


def test_moments_of_single_precision_rows_are_taken_in_double_precision() -> None:
    rows = (normal(300, 4) + 1000).float()
    found = moments(*rows.split(40))
    assert found.mean.dtype == found.covariance().dtype == torch.float64
    np.testing.assert_allclose(found.covariance(), np.cov(rows.double().numpy(), rowvar=False), rtol=0, atol=1e-10)


def test_moments_do_not_change_once_read_nor_change_the_rows() -> None:
    rows = normal(20, 3)
    before = rows.clone()
    found = moments(rows[:10])
    mean, first = found.mean, found.covariance()
    kept = mean.clone(), first.clone()
    found.add(rows[10:])
    assert torch.equal(mean, kept[0]) and torch.equal(first, kept[1])
    assert torch.equal(rows, before)


@pytest.mark.parametrize("count", [0, 1])
def test_one_row_has_no_covariance(count: int) -> None:
    with pytest.raises(SettingError, match=f"at least 2 images, got {count}"):
        moments(normal(count, 3)).covariance()


def test_two_rows_have_a_covariance() -> None:
    assert moments(torch.tensor([[1.0, 2.0], [3.0, 8.0]])).covariance().tolist() == [[2, 6], [6, 18]]


# ---- the Fréchet distance


def test_the_distance_of_gaussians_on_the_line_is_the_textbooks() -> None:
    """(mean_1 - mean_2)^2 + (sigma_1 - sigma_2)^2."""
    mean, variance = torch.tensor([1.5]), torch.tensor([[4.0]])
    assert frechet_distance(mean, variance, torch.tensor([-0.5]), torch.tensor([[9.0]])) == pytest.approx(5, rel=1e-14)


@pytest.mark.parametrize("width", [1, 2, 9, 40])
def test_commuting_covariances_have_a_closed_form(width: int) -> None:
    """Same eigenvectors: the sum of (sqrt a - sqrt b)^2, as on each line."""
    axes = torch.linalg.qr(normal(width, width)).Q
    a, b = normal(width, seed=1).square(), 3 * normal(width, seed=2).square()
    gap = normal(width, seed=3)
    wanted = float(gap.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    found = frechet_distance(gap, axes * a @ axes.T, torch.zeros(width), axes * b @ axes.T)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_non_commuting_covariances_of_the_plane_have_a_closed_form() -> None:
    """In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), where M = S1 S2 does not commute."""
    first, second = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double(), torch.tensor([[0.5, -0.3], [-0.3, 3.0]]).double()
    assert not torch.allclose(first @ second, second @ first)
    product = first @ second
    overlap = (product.trace() + 2 * product.det().sqrt()).sqrt()
    mean = torch.tensor([1.0, -2.0]).double()
    wanted = float(5 + first.trace() + second.trace() - 2 * overlap)
    assert frechet_distance(mean, first, 0 * mean, second) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("width", [3, 20, 64])
def test_the_distance_agrees_with_a_matrix_square_root(width: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    mean, first, second = normal(width), covariance(width, 1), 2 * covariance(width, 2)
    root = linalg.sqrtm((first @ second).numpy())
    wanted = float(mean.square().sum() + first.trace() + second.trace()) - 2 * float(np.trace(root).real)
    assert frechet_distance(mean, first, 0 * mean, second) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(("count", "other"), [(10, 10), (10, 200), (200, 10), (2, 2), (41, 40)])
def test_fewer_images_than_features_are_no_problem(count: int, other: int) -> None:
    """Of rank-deficient covariances A^T A and B^T B, tr sqrt is the sum of the singular values of A B^T."""
    width = 40
    rows = [features(count, width).double(), 2 * features(other, width, seed=1).double()]
    centred = [(part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in rows]
    overlap = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    gap = (rows[0].mean(0) - rows[1].mean(0)).square().sum()
    wanted = float(gap + sum(part.square().sum() for part in centred) - 2 * overlap)
    arguments = [part for block in rows for part in (moments(block).mean, moments(block).covariance())]
    assert frechet_distance(*arguments) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("empty", ["first", "second", "both"])
def test_equal_images_have_no_covariance_at_all(empty: str) -> None:
    mean, nothing, some = torch.ones(4), torch.zeros(4, 4), torch.eye(4)
    first, second = (nothing if empty in (place, "both") else some for place in ("first", "second"))
    wanted = 4 if empty == "both" else 8
    assert frechet_distance(mean, first, 0 * mean, second) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("rank", [None, 5])
def test_the_distance_is_symmetric(rank: int | None) -> None:
    one = normal(12), covariance(12, 1)
    other = normal(12, seed=3), covariance(12, 2, rank)
    assert frechet_distance(*one, *other) == pytest.approx(frechet_distance(*other, *one), rel=1e-7)


@pytest.mark.parametrize("rank", [None, 5])
def test_equal_sets_have_distance_zero(rank: int | None) -> None:
    mean, matrix = normal(30), covariance(30, 1, rank)
    assert frechet_distance(mean, matrix, mean.clone(), matrix.clone()) == 0.0


@pytest.mark.parametrize("rank", [None, 5])
def test_nearly_equal_sets_are_near(rank: int | None) -> None:
    mean, matrix = normal(30), covariance(30, 1, rank)
    assert abs(frechet_distance(mean, matrix, mean + 1e-9, matrix)) < 1e-5
    assert abs(frechet_distance(mean, matrix, mean, matrix * (1 + 1e-9))) < 1e-5


def test_only_the_mean_differs() -> None:
    mean, matrix = normal(30), covariance(30, 1)
    assert frechet_distance(mean, matrix, mean + 2, matrix) == pytest.approx(30 * 4, rel=1e-9)


# ---- the kernel distance


def slow_mmd(x: Tensor, y: Tensor) -> float:
    """1801.01401's unbiased estimate, one pair at a time."""

    def kernel(a: list[float], b: list[float]) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    xs, ys = x.double().tolist(), y.double().tolist()

    def within(rows: list[list[float]]) -> float:
        pairs = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    between = [kernel(a, b) for a in xs for b in ys]
    return within(xs) + within(ys) - 2 * sum(between) / len(between)


def test_the_kernel_distance_is_the_published_estimate() -> None:
    fake, real = features(14), features(14, seed=1) * 1.3
    found = kernel_distance(fake, real, subsets=3, subset_size=14)
    assert found.mean == pytest.approx(slow_mmd(fake, real), rel=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9)  # every subset is the whole
    assert (found.subsets, found.subset_size) == (3, 14)


def test_the_kernel_distance_is_unbiased() -> None:
    """The mean over many pairs of samples of one distribution is zero; a biased estimate would be far above."""
    found = [kernel_distance(features(20, seed=2 * i), features(20, seed=2 * i + 1), 1).mean for i in range(300)]
    assert abs(np.mean(found)) < 4 * np.std(found) / len(found) ** 0.5


def test_samples_of_one_distribution_have_no_distance_but_noise() -> None:
    found = kernel_distance(features(400), features(400, seed=1))
    assert abs(found.mean) < 4 * found.error
    other = kernel_distance(features(400), features(400, seed=1) * 1.5)
    assert other.mean > 4 * other.error


@pytest.mark.parametrize(("fakes", "reals", "size"), [(50, 60, 20), (60, 50, 20), (40, 40, 40), (30, 70, 2)])
def test_subsets_are_those_of_torch_fidelity(fakes: int, reals: int, size: int) -> None:
    """Given the features in double precision, which it would otherwise multiply in single."""
    theirs = pytest.importorskip("torch_fidelity.metric_kid").kid_features_to_metric
    fake, real = features(fakes).double(), features(reals, seed=1).double() * 1.1
    wanted = theirs(fake, real, kid_subsets=15, kid_subset_size=size, rng_seed=2020, verbose=False)
    found = kernel_distance(fake, real, 15, size)
    assert found.mean == pytest.approx(wanted["kernel_inception_distance_mean"], rel=1e-10)
    assert found.std == pytest.approx(wanted["kernel_inception_distance_std"], rel=1e-10)


@pytest.mark.parametrize(("fakes", "reals"), [(9, 30), (30, 9), (9, 9)])
def test_subsets_are_cut_to_the_smaller_set(fakes: int, reals: int) -> None:
    found = kernel_distance(features(fakes), features(reals, seed=1), 2, 1000)
    assert (found.subsets, found.subset_size) == (2, 9)


@pytest.mark.parametrize(("fakes", "reals"), [(1, 30), (30, 1), (0, 30), (1, 1)])
def test_the_kernel_distance_needs_two_images_on_each_side(fakes: int, reals: int) -> None:
    with pytest.raises(SettingError, match=f"at least 2 images on each side, got {fakes} and {reals}"):
        kernel_distance(features(fakes), features(reals))


def test_the_kernel_distance_takes_no_notice_of_the_global_random_state() -> None:
    found = []
    for seed in (0, 1):
        np.random.seed(seed)
        torch.manual_seed(seed)
        found.append(kernel_distance(features(40), features(40, seed=1), 5, 10))
    assert found[0] == found[1]


def test_the_standard_error_is_the_spread_of_influences() -> None:
    """How much one more image like this one would move the distance, one image at a time."""
    fake, real = features(12), features(9, seed=1) * 1.3

    def mean_kernel(row: Tensor, others: Tensor) -> float:
        return float(np.mean([(float(row @ other) / len(row) + 1) ** 3 for other in others]))

    def variance(own: Tensor, other: Tensor) -> float:
        rest = [torch.cat([own[:i], own[i + 1 :]]) for i in range(len(own))]
        influence = [2 * (mean_kernel(r, o) - mean_kernel(r, other)) for r, o in zip(own, rest, strict=True)]
        return float(np.var(influence, ddof=1)) / len(own)

    x, y = fake.double(), real.double()
    wanted = (variance(x, y) + variance(y, x)) ** 0.5
    assert kernel_error(fake, real) == pytest.approx(wanted, rel=1e-10)
    found = kernel_distance(fake, real, subsets=7)  # the mean over few subsets has an error of its own
    assert found.error == pytest.approx((wanted**2 + found.std**2 / 7) ** 0.5, rel=1e-10)


def spread_and_error(fakes: int, reals: int, scale: float, draws: int = 250, most: int = 2000) -> tuple[float, float]:
    """Spread of the distance over repeated draws of both sets, and the mean of the standard errors."""
    distances, errors = [], []
    for i in range(draws):
        fake, real = features(fakes, seed=2 * i), features(reals, seed=2 * i + 1) * scale
        if fakes == reals:
            distances.append(kernel_distance(fake, real, 1, fakes).mean)
        else:
            distances.append(_mmd_of_all(fake.double(), real.double()))
        errors.append(kernel_error(fake, real, most))
    return float(np.std(distances, ddof=1)), float(np.mean(errors))


def _mmd_of_all(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate over sets of different sizes."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(rows: Tensor) -> Tensor:
        return (kernel(rows, rows).sum() - kernel(rows, rows).diagonal().sum()) / (len(rows) * (len(rows) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


@pytest.mark.parametrize(("fakes", "reals"), [(150, 150), (60, 240), (240, 60)])
def test_the_standard_error_is_the_spread_over_repeated_draws(fakes: int, reals: int) -> None:
    spread, error = spread_and_error(fakes, reals, 1.3)
    assert error == pytest.approx(spread, rel=0.25)


def test_the_standard_error_is_estimated_from_a_part_of_large_sets() -> None:
    """Random rows: those of an ordered set are not alike."""
    spread, error = spread_and_error(300, 300, 1.3, most=100)
    assert error == pytest.approx(spread, rel=0.25)
    ordered = features(400).sort(0).values
    full, part = kernel_error(ordered, ordered * 1.3), kernel_error(ordered, ordered * 1.3, 200)
    assert part != full and part == pytest.approx(full, rel=0.25)


def test_the_standard_error_of_equal_distributions_is_on_the_safe_side() -> None:
    """Influences vanish there, and what is left of their spread is noise of the size of the distance's own: the first
    order overstates it, by sqrt(2) for sets of equal size."""
    spread, error = spread_and_error(150, 150, 1.0)
    assert 0.9 * spread < error < 1.75 * spread


def test_the_standard_error_does_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, real = features(50), features(33, seed=1)
    whole = kernel_error(fake, real)
    monkeypatch.setattr(metrics, "ENTRIES", 120)
    assert kernel_error(fake, real) == pytest.approx(whole, rel=1e-12)


# ---- the Inception Score


@pytest.mark.parametrize("splits", [1, 10])
def test_images_that_tell_nothing_score_one(splits: int) -> None:
    for logits in (torch.zeros(50, 7), torch.full((50, 7), 3.0), normal(1, 7).expand(50, 7)):
        assert inception_score(logits, splits) == (pytest.approx(1, abs=1e-12), pytest.approx(0, abs=1e-12))


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_certain_and_balanced_images_score_the_number_of_classes(classes: int) -> None:
    logits = 200 * torch.eye(classes).repeat(40, 1)
    assert inception_score(logits, 1) == (pytest.approx(classes, rel=1e-9), 0)
    mean, std = inception_score(logits, 10)
    assert 1 < mean < classes and std > 0  # parts of shuffled images are not quite balanced


def test_certain_images_of_unequal_classes_score_by_their_entropy() -> None:
    logits = 200 * torch.eye(3)[torch.tensor([0] * 10 + [1] * 20 + [2] * 70)]
    shares = np.array([0.1, 0.2, 0.7])
    assert inception_score(logits, 1)[0] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-9)


@pytest.mark.parametrize("splits", [1, 5])
def test_a_class_that_no_image_can_be_changes_nothing(splits: int) -> None:
    """exp(-1000) is zero in double precision."""
    logits = torch.cat([normal(50, 3), torch.full((50, 1), -1000.0)], 1)
    wanted = inception_score(logits[:, :3], splits)
    assert inception_score(logits, splits) == (pytest.approx(wanted[0]), pytest.approx(wanted[1]))


@pytest.mark.parametrize(("count", "splits"), [(200, 10), (203, 10), (10, 10), (100, 1), (57, 7)])
def test_the_inception_score_is_torch_fidelitys(count: int, splits: int) -> None:
    """Splits of unequal sizes and the order of the shuffled images included."""
    theirs = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric
    logits = (normal(count, 30) * 2).float()
    wanted = theirs(logits, splits)
    mean, std = inception_score(logits, splits)
    assert mean == pytest.approx(wanted["inception_score_mean"], rel=1e-12)
    assert std == pytest.approx(wanted["inception_score_std"], rel=1e-9, abs=1e-12)


def test_ten_splits_are_the_default() -> None:
    logits = normal(45, 6)
    assert inception_score(logits) == inception_score(logits, 10)


def test_every_split_needs_an_image() -> None:
    with pytest.raises(SettingError, match="of 4 images needs at least 5"):
        inception_score(normal(4, 3), 5)
    assert inception_score(normal(5, 3), 5) == (pytest.approx(1), pytest.approx(0, abs=1e-12))


# ---- precision and recall


def slow_precision_recall(fake: np.ndarray, real: np.ndarray, neighbours: int) -> tuple[float, float]:
    """1904.06991, one pair at a time; exact for integers."""

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        count = 0
        radii = [sorted(((c - other) ** 2).sum() for other in centres)[neighbours] for c in centres]
        for point in points:
            count += any(((point - c) ** 2).sum() <= r for c, r in zip(centres, radii, strict=True))
        return count / len(points)

    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_equal_sets_are_precise_and_complete(neighbours: int) -> None:
    rows = features(30)
    assert precision_recall(rows, rows, neighbours) == (1, 1)
    assert precision_recall(rows, rows.flip(0), neighbours) == (1, 1)


def test_sets_far_apart_are_neither() -> None:
    assert precision_recall(features(30), features(40) + 100) == (0, 0)


def test_samples_of_one_mode_are_precise_but_miss_the_others() -> None:
    """All samples on one real image: their balls have no size and hold it alone."""
    real = features(40)
    assert precision_recall(real[7].expand(25, -1), real) == (1, 1 / 40)


def test_scattered_samples_are_complete_but_not_precise() -> None:
    """The other way round: one real image many times."""
    fake = features(40)
    assert precision_recall(fake, fake[7].expand(25, -1)) == (1 / 40, 1)


@pytest.mark.parametrize("neighbours", [1, 2, 3])
def test_duplicates_have_balls_of_no_size(neighbours: int) -> None:
    """Every image four times: the third neighbour is a copy, the fourth would be another image."""
    base = features(12)
    real = base.repeat(4, 1)
    near = base + 1e-3
    assert precision_recall(base, real, neighbours) == (1, 1)
    assert precision_recall(near, real, neighbours)[0] == 0
    assert precision_recall(near, real, 4)[0] == 1


@pytest.mark.parametrize("neighbours", [1, 3, 4])
@pytest.mark.parametrize(("fakes", "reals"), [(50, 50), (30, 70), (70, 30)])
def test_precision_and_recall_are_the_published_rule(fakes: int, reals: int, neighbours: int) -> None:
    fake, real = features(fakes, 3), features(reals, 3, seed=1) * 1.5 + 0.45
    wanted = slow_precision_recall(fake.double().numpy(), real.double().numpy(), neighbours)
    assert min(wanted) > 0 and max(wanted) < 1 and wanted[0] != wanted[1]
    assert precision_recall(fake, real, neighbours) == pytest.approx(wanted)


@pytest.mark.parametrize("neighbours", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_points_on_the_edge_of_a_ball_are_inside(neighbours: int, seed: int) -> None:
    """On a grid most distances tie, and rounding must not decide."""
    rng = np.random.default_rng(seed)
    fake, real = rng.integers(0, 9, (25, 2)), rng.integers(3, 14, (31, 2))
    wanted = slow_precision_recall(fake, real, neighbours)
    found = precision_recall(torch.from_numpy(fake).float(), torch.from_numpy(real).float(), neighbours)
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("offset", [1e3, 1e7])
def test_precision_and_recall_do_not_depend_on_where_the_origin_is(offset: float) -> None:
    fake, real = features(50, 3).double(), features(50, 3, seed=1).double() * 1.5
    assert precision_recall(fake + offset, real + offset) == precision_recall(fake, real)


def test_precision_and_recall_are_torch_fidelitys() -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_prc").prc_features_to_metric
    fake, real = features(60, 4), features(80, 4, seed=1) * 1.5
    settings = {"prc_neighborhood": 3, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
    wanted = theirs(fake, real, **settings)
    assert precision_recall(fake, real) == pytest.approx((wanted["precision"], wanted["recall"]))


def test_precision_and_recall_need_a_neighbour_for_every_image() -> None:
    rows = features(10)
    with pytest.raises(SettingError, match=r"with 5 neighbours need at least 6 images, but there are 5 generated"):
        precision_recall(rows[:5], rows, 5)
    with pytest.raises(SettingError, match=r"with 3 neighbours need at least 4 images, but there are 3 reference"):
        precision_recall(rows, rows[:3])
    assert precision_recall(rows[:4], rows[:4]) == (1, 1)


def test_precision_and_recall_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, real = features(50, 3), features(41, 3, seed=1) * 1.5
    whole = precision_recall(fake, real)
    monkeypatch.setattr(metrics, "ENTRIES", 100)
    assert precision_recall(fake, real) == whole


# ---- distances and neighbours


@pytest.mark.parametrize("entries", [1, 60, 1 << 25])
def test_squared_distances_are_those_of_all_pairs(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ENTRIES", entries)
    x, y = features(23), features(17, seed=1)
    blocks = list(squared_distances(x, y))
    assert max(len(block) for block in blocks) == {1: 1, 60: 3}.get(entries, 23)  # no more is held than was asked
    found = torch.cat(blocks)
    wanted = (x.double()[:, None] - y.double()[None]).square().sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("entries", [100, 1 << 25])
@pytest.mark.parametrize("width", [1, 5, 2048])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_equal_rows_have_a_distance_of_exactly_zero(
    scale: float, width: int, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no distance is negative, which a square root would turn into nan."""
    monkeypatch.setattr(metrics, "ENTRIES", entries)
    rows = (normal(40, width) + 2) * scale
    found = torch.cat(list(squared_distances(rows, rows.flip(0).clone()))).flip(1)
    assert (found.diagonal() == 0).all() and (found >= 0).all()
    assert (found.fill_diagonal_(1) > 0).all()


@pytest.mark.parametrize("entries", [30, 1 << 25])
def test_the_nearest_is_the_nearest_of_all_blocks(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ENTRIES", entries)
    rows, targets = features(20), features(50, seed=1)
    distance, index = nearest(rows, iter(targets.split([13, 1, 30, 6])))
    every = (rows.double()[:, None] - targets.double()[None]).square().sum(-1).sqrt()
    assert torch.equal(index, every.argmin(1)) and len(set(index.tolist())) > 5
    torch.testing.assert_close(distance, every.min(1).values, rtol=1e-12, atol=1e-13)


def test_the_first_of_equal_neighbours_is_named() -> None:
    rows = features(3)
    distance, index = nearest(rows, [features(5, seed=1) + 50, rows.flip(0), rows])
    assert index.tolist() == [7, 6, 5] and distance.tolist() == [0, 0, 0]


# ---- pairs of images


def pictures(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def pairs(*shape: int) -> tuple[Tensor, Tensor]:
    """Smooth pictures and noisy copies, each with more noise than the one before."""
    smooth = torch.nn.functional.interpolate(pictures(0, *shape[:2], 4, 4).float(), shape[2:], mode="bilinear")
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    noisy = smooth + noise * torch.linspace(2, 40, shape[0])[:, None, None, None]
    return noisy.round().clamp(0, 255).byte(), smooth.round().byte()


def slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 over one channel: windows of 11 x 11, Gaussian of sigma 1.5, the image mirrored at its edges.

    The paper says nothing of edges; its authors' code takes only windows inside the image.
    """
    x, y = (np.pad(image, 5, mode="reflect") for image in (x, y))
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
            both = (window * a * b).sum() - mean_a * mean_b
            upper = (2 * mean_a * mean_b + 0.01**2) * (2 * both + 0.03**2)
            found.append(upper / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)))
    return float(np.mean(found))


@pytest.mark.parametrize("shape", [(3, 3, 20, 20), (2, 1, 16, 24), (1, 3, 11, 11)])
def test_errors_are_the_published_formulas(shape: tuple[int, ...]) -> None:
    images, originals = pairs(*shape)
    found = per_image_error(images, originals)
    assert {name: tuple(values.shape) for name, values in found.items()} == dict.fromkeys(found, (shape[0],))
    for i in range(shape[0]):
        x, y = images[i].double().numpy() / 255, originals[i].double().numpy() / 255
        mse = float(((x - y) ** 2).mean())
        assert float(found["mse"][i]) == pytest.approx(mse, rel=1e-12)
        assert float(found["psnr"][i]) == pytest.approx(10 * math.log10(1 / mse), rel=1e-12)
        ssim = np.mean([slow_ssim(a, b) for a, b in zip(x, y, strict=True)])
        assert float(found["ssim"][i]) == pytest.approx(ssim, rel=1e-6)


def test_errors_are_torchmetrics_of_each_pair() -> None:
    images, originals = pairs(4, 3, 32, 32)
    found = per_image_error(images, originals)
    for i in range(4):
        x, y = images[i : i + 1].double() / 255, originals[i : i + 1].double() / 255
        assert float(found["psnr"][i]) == pytest.approx(float(peak_signal_noise_ratio(x, y, data_range=1.0)), rel=1e-5)
        ssim = structural_similarity_index_measure(x, y, data_range=1.0)
        assert float(found["ssim"][i]) == pytest.approx(float(ssim), rel=1e-6)  # type: ignore[arg-type]
    assert (found["psnr"].diff() < 0).all() and (found["ssim"].diff() < 0).all()


def test_equal_images_have_no_error() -> None:
    images = pictures(0, 3, 3, 16, 16)
    found = per_image_error(images, images.clone())
    assert found["mse"].tolist() == [0, 0, 0] and found["psnr"].tolist() == [100, 100, 100]
    assert found["ssim"].tolist() == pytest.approx([1, 1, 1])


def test_black_and_white_are_as_far_apart_as_can_be() -> None:
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    found = per_image_error(black, black + 255)
    assert found["mse"].item() == 1 and found["psnr"].item() == 0 and found["ssim"].item() < 1e-3


@pytest.mark.parametrize(("height", "width"), [(10, 40), (40, 10), (1, 1)])
def test_images_smaller_than_the_window_have_no_ssim(height: int, width: int) -> None:
    images = pictures(0, 2, 3, height, width)
    found = per_image_error(images, images)
    assert found["ssim"].isnan().all() and found["psnr"].tolist() == [100, 100]
    with pytest.raises(SettingError, match=f"at least 11x11, got {width}x{height}"):
        check_ssim(height, width)
    check_ssim(11, 11)
