"""The M-VAR transformer: the published formulas, state against full pass, what reaches whom, and sampling with it."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_editing import (  # noqa: F401
    mask,
    test_pixels_deep_inside_the_mask_are_the_generated_ones,
    test_pixels_outside_the_mask_come_back_exactly,
)
from test_next_scale import (  # noqa: F401
    rows,
    same,
    sample,
    settings,
    test_a_run_that_ends_frees_its_cache,
    test_every_step_tells_what_is_known_and_can_be_decoded,
    test_gradients_are_off_inside_and_as_they_were_outside,
    test_guidance_costs_a_second_branch_only_where_it_is_on,
    test_guidance_near_one_approaches_no_guidance,
    test_modulation_and_cache_are_made_once_per_call,
    test_no_guidance_at_all_is_unconditional,
    test_one_generator_draws_for_the_whole_batch,
    test_seeds_and_labels_make_a_difference,
    test_the_global_generator_is_neither_read_nor_touched,
    test_the_order_of_a_batch_does_not_matter,
    test_three_ways_to_be_greedy,
    test_tokens_are_the_race_over_teacher_forced_logits,
    test_two_streams_side_by_side_do_not_meet,
)
from test_var import LABELS, by_scale, cached_logits, random_context
from tiny_models import TRANSFORMER, tiny_mvar, tiny_tokenizer
from tiny_models import tiny_pipeline as pipeline_of
from torch import Tensor

import vgen.generators.mvar
import vgen.scan
from vgen.generators.mvar import MVAR
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.types import SettingError

VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "shared adaLN": {"shared_adaln": True},
    "plain attention": {"qk_norm": False},
    "both": {"qk_norm": False, "shared_adaln": True},
    "one head of each kind, one block": {"heads": 1, "mamba_head_width": 64, "depth": 1},
    "narrow heads, a large state": {"mamba_head_width": 8, "state_size": 24},
    "inner width of the stream": {"expand": 1},
    "a convolution longer than the second scale": {"conv_width": 7},
    "a convolution of two": {"conv_width": 2},
    "a convolution of the token itself": {"conv_width": 1},
    "first scale of four": {"scales": (2, 3, 5)},
    "one scale": {"scales": (3,)},
    "more tokens than a chunk": {"scales": (1, 5, 7)},
    "token by token": {"scan_method": "sequential"},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request: pytest.FixtureRequest) -> MVAR:
    return tiny_mvar(**request.param)


@pytest.fixture(params=["training", "inference"])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """With and without gradients: linear layers then go different ways."""
    with torch.set_grad_enabled(request.param == "training"):
        yield


@torch.no_grad()
def close_gate(model: MVAR, branch: int) -> None:
    """Take a branch out of every block: 0 attention, 1 Mamba, 2 feed-forward (gates come first, in this order)."""
    width = model.config["width"]
    for block in model.blocks:
        for tensor in (block.adaln.weight, block.adaln.bias):
            tensor[branch * width : (branch + 1) * width] = 0


# ---- the published formulas


def reference_logits(model: MVAR, context: Tensor, labels: Tensor) -> Tensor:
    """Spec 2.2 to 2.4, 6.1 and 7.1, formula by formula in float64, from the model's parameters."""
    p = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config = model.config
    number = torch.cat([torch.full((length,), k) for k, length in enumerate(model.lengths)])

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", torch.zeros(()).double())

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def attend(name: str, x: Tensor) -> Tensor:
        bias = torch.cat([p[f"{name}.q_bias"], torch.zeros(config["width"]), p[f"{name}.v_bias"]])
        q, k, v = (linear(f"{name}.qkv", x) + bias).unflatten(-1, (3, config["heads"], -1)).unbind(2)
        scale = torch.full((config["heads"], 1), 0.25 / math.sqrt(config["width"] / config["heads"]))
        if config["qk_norm"]:
            q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
            scale = p[f"{name}.log_scale"].view(-1, 1).clamp(max=math.log(100)).exp()
        scores = torch.einsum("bihc,bjhc->bhij", q * scale, k)
        weights = scores.masked_fill(number[:, None] != number, -torch.inf).softmax(-1)
        return linear(f"{name}.proj", torch.einsum("bhij,bjhc->bihc", weights, v).flatten(2))

    def mamba(name: str, u: Tensor) -> Tensor:
        inner, size, taps = config["expand"] * config["width"], config["state_size"], config["conv_width"]
        width = config["mamba_head_width"]
        z, mixed, dt = linear(f"{name}.in_proj", u).split([inner, inner + 2 * size, inner // width], dim=-1)
        before = torch.cat([torch.zeros(len(u), taps - 1, mixed.shape[-1]).double(), mixed], dim=1)
        kernel = p[f"{name}.conv.weight"][:, 0]
        convolved = p[f"{name}.conv.bias"] + sum(before[:, j : j + u.shape[1]] * kernel[:, j] for j in range(taps))
        x, B, C = (convolved * convolved.sigmoid()).split([inner, size, size], dim=-1)
        x, dt = x.unflatten(-1, (-1, width)), (1 + (dt + p[f"{name}.dt_bias"]).exp()).log()
        state, read = torch.zeros(len(u), inner // width, width, size).double(), []
        for t in range(u.shape[1]):
            forget = (-p[f"{name}.A_log"].exp() * dt[:, t]).exp()
            state = forget[..., None, None] * state + torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t])
            read.append(torch.einsum("bhpn,bn->bhp", state, C[:, t]) + p[f"{name}.D"][:, None] * x[:, t])
        gated = torch.stack(read, dim=1).flatten(2) * z * z.sigmoid()
        root = (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return linear(f"{name}.out_proj", gated / root * p[f"{name}.norm.weight"])

    start = p["class_embed.weight"][labels]
    first = start[:, None] + p["start_position"]
    x = torch.cat([first, linear("code_embed", context.double())], 1) + p["position"] + p["scale_embed.weight"][number]
    for i in range(config["depth"]):
        m = linear("adaln", F.silu(start)) + p[f"blocks.{i}.adaln_table"].flatten() if model.adaln else None
        m = linear(f"blocks.{i}.adaln", F.silu(start)) if m is None else m
        gate1, gate2, gate3, scale1, scale2, scale3, shift1, shift2, shift3 = m[:, None].chunk(9, dim=-1)
        x = x + gate1 * attend(f"blocks.{i}.attn", norm(x, scale1, shift1))
        x = x + gate2 * mamba(f"blocks.{i}.mamba", norm(x, scale2, shift2))
        hidden = F.gelu(linear(f"blocks.{i}.ffn.fc1", norm(x, scale3, shift3)), approximate="tanh")
        x = x + gate3 * linear(f"blocks.{i}.ffn.fc2", hidden)
    return linear("head", norm(x, *linear("head_adaln", F.silu(start))[:, None].chunk(2, dim=-1)))


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_logits_follow_the_published_formulas(model: MVAR, dtype: torch.dtype, bound: float) -> None:
    context = random_context(model)
    wanted = reference_logits(model, context, LABELS).to(dtype)
    torch.testing.assert_close(model.to(dtype)(context, LABELS), wanted, rtol=0, atol=bound)


@pytest.mark.usefixtures("mode")
def test_bfloat16_is_near_float32(model: MVAR) -> None:
    """The residual stream and the state stay float32, so errors do not pile up over blocks and tokens."""
    context = random_context(model)
    exact = model(context, LABELS)
    model = model.to(torch.bfloat16)
    for rough in (model(context, LABELS), cached_logits(model, context, LABELS)):
        assert rough.dtype == torch.float32
        assert (rough - exact).square().mean().sqrt() < 0.015 * exact.std()


def test_states_rates_and_step_sizes_are_float32_in_a_bfloat16_model(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[torch.dtype, ...]] = []

    def watched(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        y, state = vgen.scan.scan(x, dt, A, *rest)
        given.append((x.dtype, dt.dtype, A.dtype, state.dtype))
        return y, state

    monkeypatch.setattr(vgen.generators.mvar, "scan", watched)
    model = tiny_mvar().to(torch.bfloat16)
    cached_logits(model, random_context(model), LABELS)
    assert set(given) == {(torch.bfloat16, torch.float32, torch.float32, torch.float32)}
    cache = model.new_cache(1)
    assert (cache.states.dtype, cache.columns.dtype) == (torch.float32, torch.bfloat16)


# ---- the state, carried from scale to scale


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_carrying_the_state_equals_the_full_pass(model: MVAR, dtype: torch.dtype, bound: float) -> None:
    model, context = model.to(dtype), random_context(model)
    full = model(context, LABELS)
    assert full.dtype == dtype
    torch.testing.assert_close(cached_logits(model, context, LABELS), full, rtol=0, atol=bound)


@pytest.mark.usefixtures("mode")
def test_carrying_the_state_equals_computing_the_prefix_anew(model: MVAR) -> None:
    """Which is what the published code does at every scale."""
    model, context = model.double(), random_context(model)
    carried = cached_logits(model, context, LABELS)
    for k, length in enumerate(model.lengths):
        end = sum(model.lengths[: k + 1])
        anew = model(context[:, : end - model.lengths[0]], LABELS)
        assert anew.shape[1] == end
        torch.testing.assert_close(carried[:, end - length : end], anew[:, -length:], rtol=0, atol=1e-12)


def test_the_columns_are_the_last_inputs_of_the_convolution(model: MVAR) -> None:
    """Zeros at first; where a scale has fewer tokens than columns, those of the scales before it stay."""
    kept, seen = model.config["conv_width"] - 1, []
    mamba = model.blocks[0].mamba
    mixed = mamba.conv.bias.numel()
    inner = mamba.norm.weight.numel()
    mamba.in_proj.register_forward_hook(lambda module, given, out: seen.append(out[..., inner : inner + mixed]))
    cache, condition = model.new_cache(2), model.condition(LABELS)
    for part in by_scale(model, random_context(model)):
        model(part, condition, cache)
        history = torch.cat([torch.zeros(2, kept, mixed), *seen], dim=1)
        assert torch.equal(cache.columns[0], history[:, history.shape[1] - kept :])


def test_the_cache_is_as_large_as_one_tokens_state() -> None:
    """However many scales and tokens there are, and it is allocated once."""
    for scales in ((1,), (1, 2, 3, 4), (1, 2, 3, 4, 6, 9, 13)):
        model = tiny_mvar(scales=scales)
        cache, condition = model.new_cache(2), model.condition(LABELS)
        assert cache.states.shape == (2, 2, 4, 16, 8) and cache.columns.shape == (2, 2, 3, 64 + 2 * 8)
        places = cache.states.data_ptr(), cache.columns.data_ptr()
        for part in by_scale(model, random_context(model)):
            model(part, condition, cache)
        assert (cache.states.data_ptr(), cache.columns.data_ptr()) == places
        assert cache.states.shape == (2, 2, 4, 16, 8) and cache.columns.shape == (2, 2, 3, 64 + 2 * 8)
        assert [name for name in vars(cache) if torch.is_tensor(getattr(cache, name))] == ["states", "columns"]


def test_two_calls_share_nothing() -> None:
    model = tiny_mvar()
    context, condition = random_context(model), model.condition(LABELS)
    wanted = cached_logits(model, context, LABELS)
    caches, mine = [model.new_cache(2) for _ in range(2)], []
    for part in by_scale(model, context):
        mine.append(model(part, condition, caches[0]))
        model(part + 1, condition, caches[1])
    assert torch.equal(torch.cat(mine, 1), wanted)


@pytest.mark.usefixtures("mode")
def test_a_row_of_a_batch_is_its_solo_run_in_logits(model: MVAR) -> None:
    context = random_context(model)
    for run in (cached_logits, lambda *given: model(*given[1:])):
        together = run(model, context, LABELS)
        for row in range(2):
            alone = run(model, context[row : row + 1], LABELS[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


# ---- what reaches whom


def reached(model: MVAR, position: int, cached: bool = False) -> list[bool]:
    """For each token whether its logits change, in any bit, with what stands at `position` of the context."""
    context, changed = random_context(model), random_context(model)
    changed[:, position - model.lengths[0]] += 1
    run = cached_logits if cached else lambda model, *given: model(*given)
    before, after = (run(model, given, LABELS) for given in (context, changed))
    return (before != after).any(-1).any(0).tolist()


STARTS = (0, 1, 5, 14, 30)  # of the scales 1, 2, 3, 4


@pytest.mark.usefixtures("mode")
def test_a_scale_reaches_itself_and_all_later_ones_but_none_before(model: MVAR) -> None:
    begins = [sum(model.lengths[:k]) for k in range(len(model.scales))]
    for begin in begins[1:]:
        assert reached(model, begin) == [j >= begin for j in range(model.num_tokens)]


@pytest.mark.parametrize("cached", [False, True])
def test_attention_alone_reaches_the_whole_scale_and_nothing_else(cached: bool) -> None:
    """With Mamba's gate shut the scales are independent: nothing else connects them."""
    model = tiny_mvar()
    close_gate(model, 1)
    for begin, end in pairwise(STARTS[1:]):
        for position in (begin, (begin + end) // 2, end - 1):
            assert reached(model, position, cached) == [begin <= j < end for j in range(30)]


@pytest.mark.parametrize("cached", [False, True])
def test_mamba_alone_reaches_every_later_token_in_raster_order(cached: bool) -> None:
    """Inside a scale, too, and across as many scales as there are."""
    model = tiny_mvar()
    close_gate(model, 0)
    for position in (1, 3, 4, 5, 9, 20, 29):
        assert reached(model, position, cached) == [j >= position for j in range(30)]


def test_where_all_is_forgotten_only_the_convolution_looks_back() -> None:
    """With rates that leave nothing of a state, one block sees the three tokens before, and its own scale."""
    model = tiny_mvar(depth=1)
    model.blocks[0].mamba.A_log.fill_(50.0)
    close_gate(model, 0)
    for position in (1, 4, 13, 20):
        assert reached(model, position) == [position <= j <= position + 3 for j in range(30)]


def test_what_mamba_carries_across_scales_matters() -> None:
    """Not in the last bits only: without it the logits are others altogether."""
    model, context = tiny_mvar(), random_context(tiny_mvar())
    logits = model(context, LABELS)
    model.blocks[0].mamba.A_log.fill_(50.0)
    assert ((model(context, LABELS) - logits)[:, 5:].std(dim=(0, 2)) > 0.01).all()


# ---- modulation


@pytest.mark.parametrize("shared", [False, True])
def test_the_nine_modulations_are_told_apart(shared: bool) -> None:
    """Gates, scales, shifts, each for attention, Mamba and feed-forward: exchanging any two changes the logits."""
    model = tiny_mvar(shared_adaln=shared)
    context = random_context(model)
    logits, block = model(context, LABELS), model.blocks[1]
    tables = [block.adaln_table.data] if shared else [block.adaln.weight.data, block.adaln.bias.data]
    for i in range(9):
        for j in range(i):
            order = list(range(9))
            order[i], order[j] = j, i
            for tensor in tables:
                tensor.copy_(tensor.unflatten(0, (9, -1))[order].flatten(0, 1))
            assert (model(context, LABELS) - logits).abs().max() > 1e-3, (i, j)
            for tensor in tables:
                tensor.copy_(tensor.unflatten(0, (9, -1))[order].flatten(0, 1))
    assert torch.equal(model(context, LABELS), logits)


# ---- the scan's method


@pytest.mark.parametrize("method", ["sequential", "chunked"])
def test_the_scan_goes_by_the_method_asked_for(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    model = tiny_mvar(scan_method=method)
    taken: list[str] = []
    for name in ("sequential", "chunked"):
        way = getattr(vgen.scan, name)
        monkeypatch.setattr(vgen.scan, name, lambda *given, name=name, way=way: taken.append(name) or way(*given))
    model(random_context(model), LABELS)
    cached_logits(model, random_context(model), LABELS)
    assert taken == [method] * 2 * (1 + 4), "once per block and pass"


def test_both_methods_give_the_same_logits() -> None:
    sequential, chunked = (tiny_mvar(scales=(1, 5, 7), scan_method=name).double() for name in ("sequential", "chunked"))
    context = random_context(chunked)
    torch.testing.assert_close(chunked(context, LABELS), sequential(context, LABELS), rtol=0, atol=1e-12)


# ---- training


def test_gradients_reach_every_parameter(model: MVAR) -> None:
    model.requires_grad_(True).train()
    target = torch.zeros(2 * model.num_tokens).long()
    F.cross_entropy(model(random_context(model), LABELS).flatten(0, 1), target).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # With one scale there is no context to embed.
    assert [name for name in idle if len(model.scales) > 1 or "code_embed" not in name] == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_stochastic_depth_rises_from_the_first_block_to_the_last() -> None:
    model = tiny_mvar(depth=5, drop_path=0.2)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("shared", [False, True])
def test_initial_weights_are_the_published_ones(shared: bool) -> None:
    torch.manual_seed(0)
    width, depth = 128, 3
    sizes = {"width": width, "depth": depth, "shared_adaln": shared, "mamba_head_width": 2}
    model = MVAR(**(TRANSFORMER | sizes))
    model.init_weights(gate=1e-3)
    std = (1 / width / 3) ** 0.5

    def spread(tensor: Tensor) -> float:
        return float(tensor.detach().std())

    assert all(module.bias.abs().max() == 0 for module in model.modules() if getattr(module, "bias", None) is not None)
    for block in model.blocks:
        mamba = block.mamba
        assert spread(mamba.in_proj.weight) == pytest.approx(std, rel=0.1)
        assert spread(mamba.out_proj.weight) == pytest.approx(std, rel=0.1), "not divided by the depth"
        assert spread(block.attn.proj.weight) == pytest.approx(std / math.sqrt(2 * depth), rel=0.1)
        assert spread(block.ffn.fc2.weight) == pytest.approx(std / math.sqrt(2 * depth), rel=0.1)
        assert spread(mamba.conv.weight) == pytest.approx(0.02, rel=0.15)
        assert (mamba.D == 1).all() and (mamba.norm.weight == 1).all()
        check_uniform(mamba.A_log.detach().exp(), 1, 16)
        check_uniform(F.softplus(mamba.dt_bias.detach()).log(), math.log(0.001), math.log(0.1))
        full = width**-0.5 if shared else std
        table = (block.adaln_table if shared else block.adaln.weight).view(9, width, -1)
        for row, modulation in enumerate(table):
            factor = 1e-3 if row < 2 else 0.5  # the feed-forward's gate starts open
            assert spread(modulation) == pytest.approx(factor * full, rel=0.3 if shared else 0.1)


def check_uniform(found: Tensor, low: float, high: float) -> None:
    """128 draws: within the bounds, and with the mean and spread of a uniform law, to four standard errors."""
    sigma = (high - low) / math.sqrt(12)
    assert found.numel() == 128
    assert (found > low - 1e-3).all() and (found < high + 1e-3).all()
    assert abs(found.mean() - (low + high) / 2) < 4 * sigma / math.sqrt(128)
    assert float(found.std()) == pytest.approx(sigma, rel=0.2)


# ---- saving, and mistakes


def test_a_saved_model_comes_back_with_its_settings_and_logits(model: MVAR, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = MVAR.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in model.config if name[0] != "_"} == {
        name: list(value) if name == "scales" else value for name, value in model.config.items() if name[0] != "_"
    }
    assert all(torch.equal(kept, loaded.state_dict()[name]) for name, kept in model.state_dict().items())
    context = random_context(model)
    torch.testing.assert_close(loaded(context, LABELS), model(context, LABELS), rtol=0, atol=1e-5)
    assert loaded.scan_method == model.scan_method


def test_wrong_settings_are_named() -> None:
    with pytest.raises(SettingError, match="inner width 64 is not a multiple of mamba_head_width 24"):
        tiny_mvar(mamba_head_width=24)
    with pytest.raises(SettingError, match="width 32 is not a multiple of heads 3"):
        tiny_mvar(heads=3)
    with pytest.raises(SettingError, match="unknown scan_method 'parallel': use one of auto"):
        tiny_mvar(scan_method="parallel")


# ---- sampling: the imported tests too run with these pipelines


@pytest.fixture
def tiny_pipeline() -> NextScalePipeline:
    return pipeline_of(generator=tiny_mvar())


@pytest.fixture
def pipe() -> NextScalePipeline:
    """Images of 16 x 16 with tokens of 4 x 4 pixels, to edit."""
    return pipeline_of(tokenizer=tiny_tokenizer(channel_multipliers=(1, 2, 2)), generator=tiny_mvar())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_of_a_batch_is_its_solo_run(settings: dict[str, Any], dtype: torch.dtype) -> None:  # noqa: F811
    pipe = pipeline_of(generator=tiny_mvar().to(dtype))
    labels, seeds = [2, 0, 1, 0], [3, 4, 5, 2**40]
    together = sample(pipe, labels, seeds, **settings)
    for row in range(4):
        alone = sample(pipe, labels[row], seeds[row], **settings)
        assert same(rows(together.tokens, [row]), alone.tokens)


def test_sampling_by_either_method_draws_the_same_tokens(settings: dict[str, Any]) -> None:  # noqa: F811
    drawn = [
        sample(pipeline_of(generator=tiny_mvar(scan_method=method)), [0, 1, 2], [0, 1, 2], **settings).tokens
        for method in ("sequential", "chunked")
    ]
    assert same(*drawn)
