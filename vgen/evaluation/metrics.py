"""Distances between two sets of features, and scores of one: FID, KID, Inception Score, precision and recall.

Pure functions of tensors, in float64. Know no image, network or file. Where torch-fidelity draws subsets or shuffles,
so do these, from the same stream, so that figures agree.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vgen.types import SettingError

SEED = 2020  # torch-fidelity's
SSIM_WINDOW = 11
ENTRIES = 1 << 25  # of a distance or kernel matrix held at once: 256 MB


class Moments:
    """Mean and covariance of rows that arrive in blocks, float64, by Chan's update: no cancellation, mergeable."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)  # sum of outer products about the mean

    def add(self, rows: Tensor) -> None:
        """Take in rows (B, D)."""
        rows = rows.double()
        if len(rows):
            mean = rows.mean(0)
            centred = rows - mean
            self._merge(len(rows), mean, centred.T @ centred)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        total = self.count + count
        step = mean - self.mean
        self.scatter += scatter + torch.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Unbiased (D, D). Raises SettingError for fewer than two rows."""
        if self.count < 2:
            raise SettingError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """Squared Wasserstein-2 distance of two Gaussians (FID, 1706.08500): means (D,), covariances (D, D).

    tr sqrt(S1 S2) is the sum of the square roots of the eigenvalues of the symmetric L^T S2 L, where S1 = L L^T. Equal
    arguments give exactly 0.
    """
    if torch.equal(mean_1, mean_2) and torch.equal(covariance_1, covariance_2):
        return 0.0
    factor = _factor(covariance_1.double())
    product = factor.T @ covariance_2.double() @ factor
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    gap = (mean_1 - mean_2).double().square().sum()
    return float(gap + covariance_1.double().trace() + covariance_2.double().trace() - 2 * overlap)


def _factor(covariance: Tensor) -> Tensor:
    """L (D, r) with L L^T = covariance: Cholesky's where it exists, else from the eigenvalues that are not zero."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


@dataclass(frozen=True)
class Kernel:
    """Result of `kernel_distance`."""

    mean: float
    std: float  # over the subsets, as torch-fidelity reports it; no standard error
    error: float  # standard error of the mean: over draws of the two sets, and of the subsets
    subsets: int
    subset_size: int


def kernel_distance(fake: Tensor, real: Tensor, subsets: int = 100, subset_size: int = 1000) -> Kernel:
    """Squared MMD with the kernel (x.y / D + 1)^3 (KID, 1801.01401), unbiased, mean over random subsets.

    Subsets are those torch-fidelity draws; they are cut to the smaller set. Raises SettingError below 2 rows.
    """
    size = min(subset_size, len(fake), len(real))
    if size < 2:
        raise SettingError(f"KID needs at least 2 images on each side, got {len(fake)} and {len(real)}")
    rng = np.random.RandomState(SEED)
    found = []
    for _ in range(subsets):
        x, y = (rows[torch.from_numpy(rng.choice(len(rows), size, replace=False))].double() for rows in (fake, real))
        found.append(_mmd(x, y))
    std = float(np.std(found))
    error = (kernel_error(fake, real) ** 2 + std**2 / subsets) ** 0.5
    return Kernel(float(np.mean(found)), std, error, subsets, size)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mmd(x: Tensor, y: Tensor) -> float:
    pairs = len(x) * (len(x) - 1)
    within = sum(k.sum() - k.diagonal().sum() for k in (_kernel(x, x), _kernel(y, y)))
    return float(within / pairs - 2 * _kernel(x, y).mean())


def kernel_error(fake: Tensor, real: Tensor, most: int = 2000) -> float:
    """Standard error of the squared MMD over all rows, from the spread of each row's influence on it.

    The influence of a row x is 2 (mean k(x, fake) - mean k(x, real)); the variance of a U-statistic is, to first
    order, that of its influences over n, and the two sets' add up. Uses at most `most` random rows of each set to
    estimate the spreads.
    """
    rng = torch.Generator().manual_seed(SEED)
    x, y = (rows[torch.randperm(len(rows), generator=rng)[:most].to(rows.device)].double() for rows in (fake, real))
    variance = 0.0
    for own, other, total in ((x, y, len(fake)), (y, x, len(real))):
        influence = [
            (_kernel(part, own).sum(1) - _kernel_diagonal(part)) / (len(own) - 1) - _kernel(part, other).mean(1)
            for part in own.split(_rows(own))
        ]
        variance += 4 * float(torch.cat(influence).var()) / total
    return variance**0.5


def _kernel_diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)) over `splits` parts of the shuffled logits (N, classes): mean and std.

    Source: 1606.03498. Raises SettingError for fewer images than splits.
    """
    if len(logits) < splits:
        raise SettingError(f"the Inception Score of {len(logits)} images needs at least {splits}, one for each split")
    order = torch.from_numpy(np.random.RandomState(SEED).permutation(len(logits)))
    log_p = logits[order.to(logits.device)].double().log_softmax(1)
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    for part in (log_p[start:stop] for start, stop in pairwise(bounds)):
        marginal = part.exp().mean(0, keepdim=True).log()
        divergence = torch.where(part.exp() > 0, part.exp() * (part - marginal), 0.0)  # 0 log 0 is 0
        scores.append(float(divergence.sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(fake: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of fake rows within the k-nearest-neighbour balls of real ones, and the reverse (1904.06991).

    Raises SettingError where a set has no k-th neighbour.
    """
    for name, rows in (("generated", fake), ("reference", real)):
        if len(rows) <= neighbours:
            raise SettingError(
                f"precision and recall with {neighbours} neighbours need at least {neighbours + 1} images, "
                f"but there are {len(rows)} {name} ones: sample more"
            )
    centre = real.double().mean(0)  # nearer to the origin, squared distances lose fewer digits
    fake, real = fake.double() - centre, real.double() - centre
    precision = _covered(fake, real, _radii(real, neighbours))
    return precision, _covered(real, fake, _radii(fake, neighbours))


def _radii(rows: Tensor, neighbours: int) -> Tensor:
    """Squared distance of every row to its k-th nearest other row, (N,)."""
    # the nearest of all is the row itself, at distance 0
    found = [part.topk(neighbours + 1, largest=False).values[:, -1] for part in squared_distances(rows, rows)]
    return torch.cat(found)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    limit = radii * (1 + 1e-12)  # a tie counts, however the distance was rounded
    return float(torch.cat([(part <= limit).any(1) for part in squared_distances(points, centres)]).double().mean())


def squared_distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Squared Euclidean distances (N, M) in blocks of rows; exactly 0 for equal rows."""
    x, y = x.double(), y.double()
    own, other = x.square().sum(1), y.square().sum(1)
    for start in range(0, len(x), _rows(y)):
        rows = slice(start, start + _rows(y))
        size = own[rows, None] + other
        distance = size - 2 * (x[rows] @ y.T)
        yield torch.where(distance <= 1e-13 * size, 0.0, distance)


def class_diversity(features: Tensor, labels: Tensor) -> float:
    """Root mean square distance between the features (N, D) of two images of one class (N,); nan without such a pair.

    Over the pairs of n rows, squared distances add up to n times the squared distances to their mean.
    """
    total, pairs = 0.0, 0
    for label in labels.unique():
        rows = features[labels == label].double()
        total += len(rows) * float((rows - rows.mean(0)).square().sum())
        pairs += len(rows) * (len(rows) - 1) // 2
    return (total / pairs) ** 0.5 if pairs else float("nan")


def _rows(other: Tensor) -> int:
    """Rows of a matrix with a column for each row of `other` to hold at once."""
    return max(1, ENTRIES // max(1, len(other)))


def nearest(rows: Tensor, targets: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Distance of each row (N, D) to its nearest row of all blocks of targets, and that row's index: (N,) each."""
    best = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    index = torch.zeros(len(rows), dtype=torch.int64)
    offset = 0
    for block in targets:
        found = [part.min(1) for part in squared_distances(rows, block.to(rows.device))]
        distance = torch.cat([part.values for part in found]).cpu()
        place = torch.cat([part.indices for part in found]).cpu() + offset
        index = torch.where(distance < best, place, index)
        best = torch.minimum(best, distance)
        offset += len(block)
    return best.sqrt(), index


def per_image_error(images: Tensor, originals: Tensor) -> dict[str, Tensor]:
    """PSNR (dB), SSIM (Gaussian window of 11, 2004) and MSE (of values in 0..1) of pairs (B, C, H, W) uint8: (B,) each.

    Equal images have a PSNR of 100 dB instead of infinity, so that means exist. SSIM is nan below 11x11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (part.double() / 255 for part in (images, originals))
    mse = (x - y).square().mean((1, 2, 3))
    psnr = -10 * mse.clamp(min=1e-10).log10()
    ssim = torch.full_like(mse, torch.nan)
    if min(images.shape[-2:]) >= SSIM_WINDOW:
        found = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
        ssim = torch.as_tensor(found).reshape(-1)
    return {"psnr": psnr, "ssim": ssim, "mse": mse}


def check_ssim(height: int, width: int) -> None:
    """Raise SettingError for images that SSIM's window does not fit in."""
    if min(height, width) < SSIM_WINDOW:
        raise SettingError(f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW}, got {width}x{height}")
