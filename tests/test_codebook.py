"""The codebook: nearest codes, usage, restarts, statistics."""

import math

import pytest
import torch
from torch import Tensor

from vgen.tokenizers.codebook import Codebook


def codebook(vocab_size: int = 12, code_dim: int = 4, sites: int = 1, weight: Tensor | None = None) -> Codebook:
    torch.manual_seed(0)
    book = Codebook(vocab_size, code_dim, sites)
    if weight is not None:
        book.weight.data = weight
    return book


def first_of_the_nearest(vectors: Tensor, codes: Tensor) -> list[int]:
    """Brute force, in float64 and in order: only a strictly nearer code replaces an earlier one."""
    chosen = []
    for vector in vectors.double():
        best, index = math.inf, -1
        for i, code in enumerate(codes.double()):
            distance = float((vector - code).square().sum())
            if distance < best:
                best, index = distance, i
        chosen.append(index)
    return chosen


def test_nearest_is_brute_force() -> None:
    book = codebook(50, 6)
    vectors = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    assert book.nearest(vectors).tolist() == first_of_the_nearest(vectors, book.weight)


def test_the_first_of_equally_near_codes_is_taken() -> None:
    """On small whole numbers every distance is exact, so ties are ties."""
    rng = torch.Generator().manual_seed(2)
    codes = torch.randint(-2, 3, (40, 3), generator=rng).float()
    vectors = torch.randint(-2, 3, (300, 3), generator=rng).float()
    found = codebook(weight=codes).nearest(vectors)
    distances = torch.cdist(vectors, codes).square().round()
    ties = (distances == distances.amin(1, keepdim=True)).sum(1)
    assert (ties > 1).sum() > 100
    assert found.tolist() == first_of_the_nearest(vectors, codes)


def test_nearby_codes_are_the_first_of_all_sorted_by_distance() -> None:
    book, vectors = codebook(20, 4), torch.randn(3, 5, 4)
    order = torch.cdist(vectors, book.weight).argsort(-1)
    assert torch.equal(book.nearby(vectors, 6), order[..., :6])
    assert torch.equal(book.nearby(vectors, 1)[..., 0], book.nearest(vectors))


def test_codes_are_nearest_to_themselves_in_any_shape() -> None:
    book = codebook(20, 5)
    tokens = torch.arange(20).view(2, 5, 2)
    assert torch.equal(book.nearest(book.lookup(tokens)), tokens)


def test_usage_is_the_moving_share_of_each_code() -> None:
    book = codebook(4, 2, sites=2)
    book.count(torch.tensor([[0, 0], [1, 3]]), site=1)
    assert book.usage.tolist() == [[0, 0, 0, 0], [0.5, 0.25, 0, 0.25]]
    book.count(torch.tensor([[2, 2]]), site=1, decay=0.75)
    assert book.usage[1].tolist() == pytest.approx([0.375, 0.1875, 0.25, 0.1875])
    assert book.usage[0].sum() == 0


def test_usage_of_a_counted_site_sums_to_one() -> None:
    book = codebook(sites=3)
    rng = torch.Generator().manual_seed(3)
    for step in range(20):
        book.count(torch.randint(12, (2, 1 + step), generator=rng), site=step % 2)
    assert book.usage.sum(1).tolist() == pytest.approx([1, 1, 0], abs=1e-5)


def test_restart_moves_dead_codes_and_no_others() -> None:
    book = codebook(6, 3, sites=2)
    # Mean usage over the sites: 0.3 0.2 0 0.001 0.499 0; dead below 0.03 / 6 = 0.005.
    book.usage.copy_(torch.tensor([[0.6, 0.4, 0, 0, 0, 0], [0, 0, 0, 0.002, 0.998, 0]]))
    before, candidates = book.weight.detach().clone(), torch.randn(7, 3) + 10
    assert book.restart(candidates, threshold=0.03, generator=torch.Generator().manual_seed(0)) == 3
    dead = [2, 3, 5]
    alive = [0, 1, 4]
    assert torch.equal(book.weight[alive], before[alive])
    assert torch.equal(book.usage[:, alive], torch.tensor([[0.6, 0.4, 0], [0, 0, 0.998]]))
    for code in dead:
        assert (candidates == book.weight[code]).all(1).any()
        assert book.usage[:, code].tolist() == pytest.approx([1 / 6] * 2)
    assert book.restart(candidates, threshold=0.03) == 0, "a fresh code is not dead at once"


def test_restart_repeats_with_its_generator_and_leaves_the_global_one_alone() -> None:
    candidates = torch.randn(50, 3)
    moved = []
    for _ in range(2):
        book = codebook(6, 3)
        state = torch.get_rng_state()
        book.restart(candidates, threshold=1.0, generator=torch.Generator().manual_seed(5))
        assert torch.equal(torch.get_rng_state(), state)
        moved.append(book.weight.detach().clone())
    assert torch.equal(*moved)
    assert len(moved[0].unique(dim=0)) > 1


@pytest.mark.parametrize("used", [1, 3, 12])
def test_statistics_of_codes_used_equally(used: int) -> None:
    book = codebook(12, sites=2)
    book.usage[:, :used] = 1 / used
    assert book.statistics() == pytest.approx({"codes_used": used / 12, "perplexity": used}, rel=1e-4)


def test_perplexity_is_the_exponential_of_the_entropy() -> None:
    book = codebook(3)
    book.usage.copy_(torch.tensor([[0.5, 0.25, 0.25]]))
    assert book.statistics()["perplexity"] == pytest.approx(2**1.5, rel=1e-5)


def test_statistics_before_anything_was_counted_are_finite() -> None:
    statistics = codebook().statistics()
    assert statistics["codes_used"] == 0 and math.isfinite(statistics["perplexity"])
