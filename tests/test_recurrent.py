"""The recurrent-depth transformer: a loop that sees the past alone, whole and with caches (spec's invariants M1-M8)."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_recurrent
from torch import Tensor

from vgen.generators.depth_cache import DepthCache
from vgen.generators.recurrent import RecurrentTransformer
from vgen.types import SettingError

TOKENS = torch.tensor([[12, 3, 5, 1, 9, 0, 2, 2, 7, 10], [11, 4, 4, 8, 1, 6, 0, 3, 5, 2]])


def state_of(model: RecurrentTransformer, tokens: Tensor = TOKENS, seed: int = 0) -> Tensor:
    return model.random_state(*tokens.shape, torch.Generator().manual_seed(seed))


def near(a: Tensor, b: Tensor, atol: float = 1e-10) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= atol


@pytest.fixture(params=["grid", "text"])
def model(request: pytest.FixtureRequest) -> RecurrentTransformer:
    if request.param == "grid":
        return tiny_recurrent().double()
    return tiny_recurrent(num_classes=None, grid=None, vocab_size=13, num_tokens=16).double()


# ---- the whole


@torch.no_grad()
@pytest.mark.parametrize("recurrences", [1, 2, 5])
def test_a_token_changes_nothing_before_it(model: RecurrentTransformer, recurrences: int) -> None:
    changed = TOKENS.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 11
    state = state_of(model)
    a, b = (model(tokens, state, recurrences).logits for tokens in (TOKENS, changed))
    assert torch.equal(a[:, :6], b[:, :6])
    assert all(not near(a[:, k], b[:, k], 1e-6) for k in range(6, 10))


@torch.no_grad()
def test_without_recurrences_logits_know_no_token(model: RecurrentTransformer) -> None:
    state, changed = state_of(model), (TOKENS + 1) % 11
    assert torch.equal(model(TOKENS, state, 0).logits, model(changed, state, 0).logits)
    assert not near(model(TOKENS, state, 1).logits, model(changed, state, 1).logits, 1e-6)


@torch.no_grad()
def test_states_are_bounded_by_the_last_norm(model: RecurrentTransformer) -> None:
    bound = float(model.core_blocks[-1].norm4.weight.abs().max())
    state = 100 * state_of(model)
    for recurrences in (1, 7):
        found = model(TOKENS, state, recurrences).state
        assert float(found.square().mean(-1).sqrt().max()) <= bound * (1 + 1e-6)


def test_only_differentiated_recurrences_have_gradients_and_their_sum_is_that_of_the_whole() -> None:
    """The value does not depend on where differentiation begins; with all of it, gradients are full ones."""
    model = tiny_recurrent().double().requires_grad_(True)
    state = state_of(model)
    gradients = []
    for before in (0, 2):
        model.zero_grad()
        with torch.no_grad():
            reached = model(TOKENS, state, before).state if before else state
        found = model(TOKENS, reached, 4 - before)
        found.logits.square().sum().backward()
        gradients.append((found.logits.detach(), model.adapter.weight.grad.clone()))
    assert near(gradients[0][0], gradients[1][0])
    assert not near(gradients[0][1], gradients[1][1], 1e-6)
    model.zero_grad()
    found = model(TOKENS, state, 0)
    found.logits.sum().backward()
    assert all(p.grad is None for block in model.core_blocks for p in block.parameters())


def test_checkpointing_changes_no_gradient() -> None:
    model = tiny_recurrent().double().requires_grad_(True).train()
    gradients = []
    for saving in (False, True):
        if saving:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(TOKENS, state_of(model), 3).logits.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert model.gradient_checkpointing
    assert all(near(gradients[0][name], gradients[1][name]) for name in gradients[0])


@torch.no_grad()
def test_a_shallower_readout_is_that_of_fewer_recurrences(model: RecurrentTransformer) -> None:
    state = state_of(model)
    for also in (0, 1, 3):
        found = model(TOKENS, state, 4, also)
        assert near(found.early, model(TOKENS, state, also).logits)
    assert model(TOKENS, state, 4).early is None
    assert near(found.before, model(TOKENS, state, 3).state) and near(found.state, model(TOKENS, state, 4).state)


@torch.no_grad()
def test_the_embedding_goes_in_at_every_recurrence() -> None:
    """The state alone does not carry the token: with the part of the adapter that reads it at 0, it is forgotten."""
    model = tiny_recurrent().double()
    model.adapter.weight[:, model.config["width"] :] = 0
    state = state_of(model)
    assert torch.equal(model(TOKENS, state, 3).logits, model((TOKENS + 1) % 11, state, 3).logits)


@torch.no_grad()
def test_places_of_a_grid_are_its_rows_and_columns() -> None:
    """A class at (0, 0), token i at (1 + i // 4, 1 + i % 4); half of a head turns by either."""
    angles = tiny_recurrent()._rotations(10).angle()
    rows, columns = angles[:, :4], angles[:, 4:]
    assert torch.equal(rows[0], torch.zeros(4)) and torch.equal(columns[0], torch.zeros(4))
    assert torch.equal(rows[1], rows[4]) and torch.equal(columns[1], columns[5]) and torch.equal(columns[2], columns[6])
    assert float(rows[1][0]) == pytest.approx(1) and float(rows[5][0]) == pytest.approx(2)
    assert float(columns[8][0]) == pytest.approx(4 - 2 * torch.pi)


@torch.no_grad()
def test_a_learned_embedding_of_positions_is_added_to_tokens() -> None:
    plain, placed = tiny_recurrent().double(), tiny_recurrent(position_embedding=True).double()
    kept = placed.position.clone()
    placed.load_state_dict(plain.state_dict() | {"position": torch.zeros_like(kept)})
    state = state_of(plain)
    assert near(placed(TOKENS, state).logits, plain(TOKENS, state).logits)
    placed.position.copy_(kept)
    assert not near(placed(TOKENS, state).logits, plain(TOKENS, state).logits, 1e-6)
    assert near(run_cached(placed, TOKENS, state, 3, 3), placed(TOKENS, state, 3).logits)


# ---- the caches


def run_cached(
    model: RecurrentTransformer, tokens: Tensor, state: Tensor, recurrences: int, slots: int, chunk: int = 1
) -> Tensor:
    """Logits of tokens given `chunk` at a time."""
    cache, found = model.new_cache(len(tokens), slots), []
    for start in range(0, tokens.shape[1], chunk):
        positions = torch.arange(start, min(start + chunk, tokens.shape[1])).expand(len(tokens), -1)
        places = cache.places(positions)
        part, embedded = state[:, positions[0]], model.embed(tokens[:, positions[0]], places, cache)
        for number in range(recurrences):
            part = model.recur(part, embedded, places, cache, cache.depths(number))
        found.append(model.read(part, places, cache))
    return torch.cat(found, 1)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_with_a_cache_of_all_recurrences_logits_are_those_of_the_whole(model: RecurrentTransformer, chunk: int) -> None:
    state = state_of(model)
    for recurrences in (1, 4):
        found = run_cached(model, TOKENS, state, recurrences, recurrences, chunk)
        assert near(found, model(TOKENS, state, recurrences).logits)


@torch.no_grad()
def test_a_shared_cache_is_a_full_one_for_one_recurrence_alone(model: RecurrentTransformer) -> None:
    state = state_of(model)
    assert near(run_cached(model, TOKENS, state, 1, 1), model(TOKENS, state, 1).logits)
    assert not near(run_cached(model, TOKENS, state, 4, 1), model(TOKENS, state, 4).logits, 1e-6)
    assert not near(run_cached(model, TOKENS, state, 4, 2), model(TOKENS, state, 4).logits, 1e-6)


@torch.no_grad()
def test_rows_may_stand_anywhere_and_at_any_depth(model: RecurrentTransformer) -> None:
    """A staircase: token k begins once token k - 1 has had one recurrence; the second row two tokens behind. Padding
    is read by nobody."""
    state, recurrences, count = state_of(model), 3, TOKENS.shape[1]
    want = model(TOKENS, state, recurrences).logits
    cache = model.new_cache(2, recurrences)
    embedded, states, found = torch.zeros_like(state), state.clone(), torch.zeros_like(want)
    depths = torch.zeros(2, count, dtype=torch.int64)
    for step in range(count + 2 + recurrences):
        ends = [min(count, step + 1), min(count, max(1, step - 1))]
        active = [[k for k in range(end) if depths[row, k] < recurrences] for row, end in enumerate(ends)]
        width = max(map(len, active))
        if not width:
            continue
        positions = torch.tensor([[*row, *[0] * (width - len(row))] for row in active])
        real = torch.tensor([[k < len(row) for k in range(width)] for row in active])
        places, rows = cache.places(positions, real), torch.arange(2)[:, None]
        new = model.embed(TOKENS.gather(1, positions), places, cache)
        part = model.recur(states[rows, positions], new, places, cache, cache.depths(depths.gather(1, positions)))
        logits = model.read(part, places, cache)
        for row in range(2):
            for k, position in enumerate(active[row]):
                states[row, position], embedded[row, position] = part[row, k], new[row, k]
                found[row, position] = logits[row, k]
                depths[row, position] += 1
    assert bool((depths == recurrences).all()) and near(found, want)


@torch.no_grad()
def test_positions_that_are_not_present_are_not_seen(model: RecurrentTransformer) -> None:
    """Token 5 without tokens 2 and 3: what it is when they were never written."""
    state, found = state_of(model), []
    for written in ([0, 1, 4, 5], [0, 1, 2, 3, 4, 5]):
        cache = model.new_cache(2, 2)
        present = torch.zeros(2, 16, dtype=torch.bool)
        for position in written:
            present[:, position] = True
            seen = present.clone()
            seen[:, 2:4] &= position < 4
            places = cache.places(torch.full((2, 1), position), present=seen)
            part = state[:, position : position + 1]
            embedded = model.embed(TOKENS[:, position : position + 1], places, cache)
            for number in range(2):
                part = model.recur(part, embedded, places, cache, cache.depths(number))
        found.append(model.read(part, places, cache))
    assert near(found[0], found[1])
    assert not near(found[0], model(TOKENS, state, 2).logits[:, 5:6], 1e-6)


@torch.no_grad()
def test_a_filled_cache_holds_the_last_recurrence_for_all_later_ones() -> None:
    model = tiny_recurrent().double()
    cache, state = model.new_cache(2, 5), state_of(model)
    places = cache.places(torch.tensor([[0, 1], [0, 1]]))
    embedded, part = model.embed(TOKENS[:, :2], places, cache), state[:, :2]
    for number in range(2):
        part = model.recur(part, embedded, places, cache, cache.depths(number))
    before = cache.keys.clone()
    cache.fill(places, 1)
    first, core = cache.prelude, cache.core
    for depth in range(5):
        wanted = before[first + min(depth, 1) * core : first + (min(depth, 1) + 1) * core]
        assert torch.equal(cache.keys[first + depth * core : first + (depth + 1) * core], wanted)
    coda = first + 5 * core
    assert torch.equal(cache.keys[coda:], before[coda:]) and torch.equal(cache.keys[:first], before[:first])


def test_positions_beyond_the_cache_are_refused() -> None:
    cache = tiny_recurrent().new_cache(1, 2)
    with pytest.raises(SettingError, match="position 16 is beyond the 16"):
        cache.places(torch.tensor([[16]]))


def test_a_cache_holds_layers_times_recurrences() -> None:
    model = tiny_recurrent(prelude=2, core=3, coda=1)
    sizes = [model.new_cache(4, recurrences).keys.shape for recurrences in (1, 6)]
    assert sizes[0] == (2 + 3 + 1, 4, 2, 17, 16) and sizes[1] == (2 + 6 * 3 + 1, 4, 2, 17, 16)
    assert isinstance(model.new_cache(1, 1), DepthCache)


# ---- states, initialisation, sizes


def test_states_are_normal_and_cut_at_three_deviations() -> None:
    model = tiny_recurrent(width=128)
    state = model.random_state(40, 40, torch.Generator().manual_seed(0))
    assert float(state.std()) == pytest.approx(model.state_std * 0.9866, rel=0.01)  # the cut takes 1.3%
    assert float(state.abs().max()) <= 3.0001 * model.state_std
    assert float(state.abs().max()) > 2.9 * model.state_std
    assert torch.equal(model.scaled_state(torch.tensor([0.5])), torch.zeros(1))


def test_weights_begin_as_published() -> None:
    model = tiny_recurrent(width=256, mlp_width=512, recurrences=8)
    model.init_weights()
    std = (2 / (5 * 256)) ** 0.5
    joining = std / (2 * (1 + 2 * 8 + 1)) ** 0.5
    block, cut = model.core_blocks[0], 0.9866
    gate, up = block.fc1.weight.chunk(2)
    for weight, wanted in (
        (model.adapter.weight, std),
        (block.qkv.weight, std),
        (gate, std),
        (up, joining),
        (block.proj.weight, joining),
        (block.fc2.weight, joining),
    ):
        assert float(weight.std()) == pytest.approx(wanted * cut, rel=0.03)
        assert float(weight.abs().max()) <= 3.0001 * wanted
    assert float(block.qk_bias.abs().max()) == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 30, "heads": 4}, "width 30 must be a multiple of heads 4"),
        ({"width": 36, "heads": 6}, "and a head's of 4"),
        ({"grid": 3}, "grid is 3, of 9 tokens, but num_tokens is 16"),
        ({"core": 0}, "core is 0"),
        ({"prelude": -1}, "prelude is -1"),
        ({"recurrences": 0}, "recurrences is 0"),
        ({"num_classes": -2}, "num_classes is -2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        tiny_recurrent(**changes)


@torch.no_grad()
def test_bfloat16_keeps_norms_and_logits_wide() -> None:
    model = tiny_recurrent().to(torch.bfloat16)
    state = state_of(model)
    found = model(TOKENS, state, 3)
    assert found.logits.dtype == torch.float32 and found.state.dtype == torch.bfloat16
    wide = model.float()(TOKENS, state.float(), 3).logits
    assert float((found.logits - wide).abs().max()) < 0.2 * float(wide.abs().max())
