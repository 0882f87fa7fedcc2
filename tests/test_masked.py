"""The masked transformer: published figures, and when partial evaluations equal whole ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_weights import fill, golden_figures, golden_layout
from tiny_models import randomise
from torch import Tensor

import vgen
from vgen.generators.masked import MaskedTransformer
from vgen.types import SettingError


@pytest.fixture(scope="module")
def golden() -> tuple[MaskedTransformer, dict[str, Tensor]]:
    layout = golden_layout("maskgit")
    state = {name: fill(name, shape) for name, shape in layout["transformer"].items()}
    pipeline = vgen.convert("maskgit", transformer=state, heads=layout["num_heads"])
    return pipeline.generator, golden_figures("maskgit")


def tiny(depth: int = 3) -> MaskedTransformer:
    """Nine tokens of eight codes, three classes, in double precision."""
    model = MaskedTransformer(num_tokens=9, vocab_size=8, num_classes=3, width=16, depth=depth, heads=2)
    return randomise(model).double()  # type: ignore[return-value]


def example(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens (2, 9), about half of them masked, and classes (2,)."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8, (2, 9), generator=rng)
    return tokens.masked_fill(torch.rand(2, 9, generator=rng) < 0.5, 8), torch.tensor([0, 2])


# ---- published figures


def test_logits_are_the_published_ones(golden: tuple[MaskedTransformer, dict[str, Tensor]]) -> None:
    model, figures = golden
    found = model(figures["tokens"], figures["label"])
    assert torch.allclose(found, figures["logits"], atol=1e-4)
    unconditional = model(figures["tokens"], torch.full_like(figures["label"], model.null_class))
    assert torch.allclose(unconditional, figures["unconditional"], atol=1e-4)


def test_partial_evaluations_are_the_published_ones(golden: tuple[MaskedTransformer, dict[str, Tensor]]) -> None:
    model, figures = golden
    cache = model.new_cache(2)
    model(figures["tokens"], figures["label"], cache=cache)
    found = model(figures["local_tokens"], figures["label"], positions=figures["positions"], cache=cache)
    assert torch.allclose(found, figures["partial"], atol=1e-4)


def test_the_published_size_has_the_published_number_of_tensors() -> None:
    with torch.device("meta"):
        model = MaskedTransformer(num_tokens=256, vocab_size=1024, num_classes=1000)
    state = model.state_dict()
    assert len(state) == 314 and sum(tensor.numel() for tensor in state.values()) == 193_655_297


# ---- whole and partial evaluations


def positions_of(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_where_nothing_changed_a_partial_evaluation_equals_the_whole(depth: int) -> None:
    model, (tokens, labels) = tiny(depth), example()
    cache = model.new_cache(2)
    whole = model(tokens, labels, cache=cache)
    places = positions_of([1, 4, 8], [7, 0, 3])
    partial = model(tokens.gather(1, places), labels, positions=places, cache=cache)
    assert torch.allclose(partial, whole.gather(1, places[..., None].expand(-1, -1, 8)), atol=1e-6)


def test_a_partial_evaluation_of_everything_equals_a_whole_one() -> None:
    model, (tokens, labels) = tiny(), example()
    cache = model.new_cache(2)
    model(example(1)[0], labels, cache=cache)
    places = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    partial = model(tokens.gather(1, places), labels, positions=places, cache=cache)
    wanted = model(tokens, labels).gather(1, places[..., None].expand(-1, -1, 8))
    assert torch.allclose(partial, wanted, atol=1e-6)


def test_with_one_block_the_context_cannot_go_stale() -> None:
    """Keys and values of a single block depend on a token's own embedding; with more blocks they do not."""
    for depth, equal in ((1, True), (3, False)):
        model, (tokens, labels) = tiny(depth), example()
        cache = model.new_cache(2)
        model(tokens, labels, cache=cache)
        places = positions_of([2, 5], [2, 5])
        revealed = tokens.scatter(1, places, torch.tensor([[3, 1], [0, 6]]))
        partial = model(revealed.gather(1, places), labels, positions=places, cache=cache)
        wanted = model(revealed, labels).gather(1, places[..., None].expand(-1, -1, 8))
        assert torch.allclose(partial, wanted, atol=1e-6) == equal


def test_later_partial_evaluations_see_what_earlier_ones_wrote() -> None:
    model, (tokens, labels) = tiny(1), example()
    cache = model.new_cache(2)
    model(tokens, labels, cache=cache)
    first, second = positions_of([0, 1], [0, 1]), positions_of([2], [2])
    revealed = tokens.scatter(1, first, torch.tensor([[5, 5], [4, 4]]))
    model(revealed.gather(1, first), labels, positions=first, cache=cache)
    partial = model(revealed.gather(1, second), labels, positions=second, cache=cache)
    wanted = model(revealed, labels).gather(1, second[..., None].expand(-1, -1, 8))
    assert torch.allclose(partial, wanted, atol=1e-6)


def test_the_class_token_is_evaluated_again() -> None:
    model, (tokens, labels) = tiny(), example()
    cache = model.new_cache(2)
    model(tokens, labels, cache=cache)
    places = positions_of([1, 4], [1, 4])
    given = tokens.gather(1, places)
    same = model(given, labels, positions=places, cache=cache)
    assert not torch.allclose(same, model(given, labels - labels + 1, positions=places, cache=cache))


def test_a_row_of_a_batch_equals_its_solo_run() -> None:
    model, (tokens, labels) = tiny(), example()
    assert torch.allclose(model(tokens, labels)[1:], model(tokens[1:], labels[1:]), atol=1e-6)


def test_the_head_does_not_train_the_embeddings_it_shares() -> None:
    model = tiny().requires_grad_(True)
    tokens, labels = torch.zeros(1, 9, dtype=torch.int64), torch.tensor([0])
    model(tokens, labels).sum().backward()
    grad = model.token_embed.weight.grad
    assert grad is not None and grad[0].abs().sum() > 0 and grad[1:].abs().sum() == 0


def test_saving_and_loading_gives_the_same_logits(tmp_path: Path) -> None:
    model = tiny().float()
    model.save_pretrained(tmp_path)
    tokens, labels = example()
    loaded = MaskedTransformer.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(tokens, labels), model(tokens, labels), atol=1e-5)
    assert (loaded.mask_token_id, loaded.null_class) == (8, 3)


# ---- bounds


@pytest.mark.parametrize(("changes", "message"), [({"depth": 4}, "depth is 4"), ({"heads": 3}, "not a multiple")])
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        MaskedTransformer(**{"num_tokens": 9, "vocab_size": 8, "num_classes": 3, "width": 16, "depth": 3, **changes})


def test_calls_that_do_not_fit_are_refused() -> None:
    model, (tokens, labels) = tiny(), example()
    with pytest.raises(SettingError, match="8 tokens were given, the model takes 9"):
        model(tokens[:, :8], labels)
    places = positions_of([0], [1])
    for cache in (None, model.new_cache(2)):
        with pytest.raises(SettingError, match="needs the cache of a whole one"):
            model(tokens[:, :1], labels, positions=places, cache=cache)
    cache = model.new_cache(2)
    model(tokens, labels, cache=cache)
    with pytest.raises(SettingError, match="positions have shape"):
        model(tokens[:, :2], labels, positions=places, cache=cache)
