"""The VAR transformer: the published formulas, cache against full pass, causality, modulation."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_generator
from torch import Tensor, nn

from vgen import layers
from vgen.generators.var import VAR, Block
from vgen.types import SettingError

VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "shared adaLN": {"shared_adaln": True},
    "plain attention": {"qk_norm": False},
    "both": {"qk_norm": False, "shared_adaln": True},
    "one head, one block": {"heads": 1, "depth": 1},
    "four heads of width 12, three blocks": {"width": 48, "heads": 4, "depth": 3},
    "first scale of four": {"scales": (2, 3, 5)},
    "one scale": {"scales": (3,)},
    "wide codes, many of them": {"code_dim": 7, "vocab_size": 50, "num_classes": 1},
}
LABELS = torch.tensor([0, 1])  # with one class the second row is unconditional


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request: pytest.FixtureRequest) -> VAR:
    return tiny_generator(**request.param)


@pytest.fixture(params=["training", "inference"])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """With and without gradients: linear layers then go different ways."""
    with torch.set_grad_enabled(request.param == "training"):
        yield


def random_context(model: VAR, batch: int = 2) -> Tensor:
    """Context of all scales after the first, (batch, L - n_0, C)."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(batch, model.num_tokens - model.lengths[0], model.config["code_dim"], generator=rng)


def by_scale(model: VAR, context: Tensor) -> list[Tensor]:
    """The context of each scale; the first has none."""
    return list(context.split([0, *model.lengths[1:]], dim=1))


def cached_logits(model: VAR, context: Tensor, labels: Tensor) -> Tensor:
    """Logits of all scales, one call per scale."""
    cache, condition = model.new_cache(len(labels)), model.condition(labels)
    logits = [model(rows, condition, cache) for rows in by_scale(model, context)]
    assert cache.length == model.num_tokens
    return torch.cat(logits, dim=1)


# ---- the published formulas


def reference_logits(model: VAR, context: Tensor, labels: Tensor) -> Tensor:
    """Spec 2.2 to 2.5, formula by formula in float64, from the model's parameters."""
    p = {name: tensor.double() for name, tensor in model.state_dict().items()}
    width, heads = model.config["width"], model.config["heads"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def attend(prefix: str, x: Tensor, allowed: Tensor) -> Tensor:
        bias = torch.cat([p[f"{prefix}.q_bias"], torch.zeros(width), p[f"{prefix}.v_bias"]])
        q, k, v = (x @ p[f"{prefix}.qkv.weight"].T + bias).unflatten(-1, (3, heads, -1)).unbind(2)
        scale = torch.full((heads, 1), 0.25 / math.sqrt(width / heads))
        if model.config["qk_norm"]:
            q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
            scale = p[f"{prefix}.log_scale"].view(heads, 1).clamp(max=math.log(100)).exp()
        scores = torch.einsum("bihc,bjhc->bhij", q * scale, k).masked_fill(~allowed, -torch.inf)
        return linear(f"{prefix}.proj", torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v).flatten(2))

    number = torch.cat([torch.full((length,), k) for k, length in enumerate(model.lengths)])
    start = p["class_embed.weight"][labels]
    first = start[:, None] + p["start_position"]
    x = torch.cat([first, linear("code_embed", context.double())], 1) + p["position"] + p["scale_embed.weight"][number]
    for i in range(model.config["depth"]):
        m = linear("adaln", F.silu(start)) + p[f"blocks.{i}.adaln_table"].flatten() if model.adaln else None
        m = linear(f"blocks.{i}.adaln", F.silu(start)) if m is None else m
        gate1, gate2, scale1, scale2, shift1, shift2 = m[:, None].chunk(6, dim=-1)
        allowed = number[:, None] >= number
        x = x + gate1 * attend(f"blocks.{i}.attn", norm(x, scale1, shift1), allowed)
        hidden = F.gelu(linear(f"blocks.{i}.ffn.fc1", norm(x, scale2, shift2)), approximate="tanh")
        x = x + gate2 * linear(f"blocks.{i}.ffn.fc2", hidden)
    return linear("head", norm(x, *linear("head_adaln", F.silu(start))[:, None].chunk(2, dim=-1)))


@pytest.mark.usefixtures("mode")
def test_logits_follow_the_published_formulas(model: VAR) -> None:
    context = random_context(model)
    wanted = reference_logits(model, context, LABELS).float()
    torch.testing.assert_close(model(context, LABELS), wanted, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("mode")
def test_bfloat16_is_near_float32(model: VAR) -> None:
    """The residual stream stays float32, so errors do not pile up over blocks."""
    context = random_context(model)
    exact = model(context, LABELS)
    model = model.to(torch.bfloat16)
    for rough in (model(context, LABELS), cached_logits(model, context, LABELS)):
        assert rough.dtype == torch.float32
        assert (rough - exact).square().mean().sqrt() < 0.01 * exact.std()


def test_learned_temperature_stops_at_one_hundred() -> None:
    model = tiny_generator()
    for block in model.blocks:
        block.attn.log_scale.fill_(9.0)
    high = model(random_context(model), LABELS)
    for block in model.blocks:
        block.attn.log_scale.fill_(math.log(100))
    torch.testing.assert_close(high, model(random_context(model), LABELS), rtol=0, atol=1e-5)


# ---- the fast path equals the slow path


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_cached_logits_equal_the_full_pass(model: VAR, dtype: torch.dtype, bound: float) -> None:
    model, context = model.to(dtype), random_context(model)
    full = model(context, LABELS)
    assert full.dtype == dtype
    torch.testing.assert_close(cached_logits(model, context, LABELS), full, rtol=0, atol=bound)


@pytest.mark.usefixtures("mode")
def test_a_prefix_of_the_context_gives_a_prefix_of_the_logits(model: VAR) -> None:
    context = random_context(model)
    full = model(context, LABELS)
    for k in range(len(model.scales)):
        end = sum(model.lengths[: k + 1])
        part = model(context[:, : end - model.lengths[0]], LABELS)
        torch.testing.assert_close(part, full[:, :end], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("mode")
def test_a_row_of_a_batch_is_its_solo_run(model: VAR) -> None:
    context = random_context(model)
    for run in (cached_logits, lambda *given: model(*given[1:])):
        together = run(model, context, LABELS)
        for row in range(2):
            alone = run(model, context[row : row + 1], LABELS[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_both_ways_of_attention_agree(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=rng, dtype=torch.float64) for n in (5, 7, 7))
    mask = torch.ones(5, 7).tril(2).bool() if masked else None
    for scale in (None, 0.3, 1.0):
        weights = q @ k.transpose(-1, -2) * (8**-0.5 if scale is None else scale)
        wanted = (weights if mask is None else weights.masked_fill(~mask, -torch.inf)).softmax(-1) @ v
        for limit in (0, 1 << 30):
            monkeypatch.setattr(layers, "SMALL_SCORES", limit)
            torch.testing.assert_close(layers.attention(q, k, v, mask, scale), wanted, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
def test_linear_layers_are_the_usual_ones(dtype: torch.dtype, bound: float, gelu: bool, bias: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight, shift = (torch.randn(shape, generator=rng).to(dtype) for shape in ((2, 5, 8), (12, 8), (12,)))
    for given in (x, x[:1], x[:, ::2], x.transpose(0, 1), x[0]):
        wanted = given.double() @ weight.double().T + (shift.double() if bias else 0)
        wanted = F.gelu(wanted, approximate="tanh") if gelu else wanted
        found = layers.linear(given, weight, shift if bias else None, gelu)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound)


# ---- causality


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["sdpa", "plain"])
def test_a_scale_never_influences_the_ones_before_it(model: VAR, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Bit for bit, and it does influence its own and later logits."""
    monkeypatch.setattr(layers, "SMALL_SCORES", limit)
    context = random_context(model)
    logits = model(context, LABELS)
    for k in range(1, len(model.scales)):
        begin = sum(model.lengths[:k])
        changed = context.clone()
        changed[:, begin - model.lengths[0] :][:, : model.lengths[k]] += 1
        other = model(changed, LABELS)
        assert torch.equal(other[:, :begin], logits[:, :begin])
        assert (other[:, begin:] != logits[:, begin:]).any(-1).all(), "attention within a scale is full"


def test_the_mask_is_the_published_one() -> None:
    model = tiny_generator(scales=(1, 2))
    assert model.mask(5, torch.device("cpu")).int().tolist() == [[1, 0, 0, 0, 0]] + [[1, 1, 1, 1, 1]] * 4


# ---- what is computed once per call


def test_modulation_does_not_depend_on_the_scale(model: VAR) -> None:
    """All uses of the class vector happen in `condition`, none in the forward pass."""
    condition = model.condition(LABELS)
    touched: list[nn.Module] = []
    users = [model.class_embed, model.head_adaln, model.adaln, *(getattr(b, "adaln", None) for b in model.blocks)]
    for user in users:
        if user is not None:
            user.register_forward_pre_hook(lambda module, given: touched.append(module))
    model(random_context(model), condition)
    assert not touched
    model(random_context(model), LABELS)
    assert touched


def test_the_cache_is_allocated_once() -> None:
    model = tiny_generator()
    cache, condition = model.new_cache(2), model.condition(LABELS)
    assert cache.keys.shape == (2, 2, 2, 30, 16)
    places = (cache.keys.data_ptr(), cache.values.data_ptr())
    for rows in by_scale(model, random_context(model)):
        model(rows, condition, cache)
        assert (cache.keys.data_ptr(), cache.values.data_ptr()) == places


def test_two_calls_share_nothing() -> None:
    model = tiny_generator()
    context = random_context(model)
    rows = by_scale(model, context)
    condition = model.condition(LABELS)
    wanted = cached_logits(model, context, LABELS)
    caches = [model.new_cache(2) for _ in range(2)]
    # Interleaved, the second call on other inputs.
    mine = []
    for part in rows:
        mine.append(model(part, condition, caches[0]))
        model(part + 1, condition, caches[1])
    assert torch.equal(torch.cat(mine, 1), wanted)


# ---- training


def test_dropped_branches_are_made_up_for() -> None:
    """Stochastic depth: a sample keeps its branch, scaled up, or loses it whole; evaluation keeps all."""
    block = Block(8, 2, True, False, drop_path=0.25)
    x, branch, gate = torch.zeros(4000, 3, 8), torch.ones(4000, 3, 8), torch.ones(4000, 1, 8)
    torch.manual_seed(0)
    added = block.train().add(x, gate, branch).flatten(1)
    kept = added[:, 0] != 0
    assert torch.equal(added, torch.where(kept[:, None], 1 / 0.75, 0.0).expand_as(added))
    assert abs(kept.float().mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)
    assert torch.equal(block.eval().add(x, gate, branch), branch)


def test_stochastic_depth_rises_from_the_first_block_to_the_last() -> None:
    model = tiny_generator(depth=5, drop_path=0.2)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("shared", [False, True])
def test_initial_weights_are_the_published_ones(shared: bool) -> None:
    torch.manual_seed(0)
    width, depth = 128, 3
    model = VAR(
        scales=(1, 2, 3),
        vocab_size=64,
        code_dim=16,
        num_classes=50,
        width=width,
        depth=depth,
        heads=2,
        shared_adaln=shared,
    )
    model.init_weights(gate=1e-3)
    std = (1 / width / 3) ** 0.5

    def spread(tensor: Tensor) -> float:
        return float(tensor.detach().std())

    assert spread(model.code_embed.weight) == pytest.approx(std, rel=0.1)
    assert spread(model.class_embed.weight) == pytest.approx(std, rel=0.1)
    assert spread(model.position) == pytest.approx(std, rel=0.1)
    assert spread(model.head.weight) == pytest.approx(0.02 * std, rel=0.1)
    assert spread(model.head_adaln.weight) == pytest.approx(0.5 * std, rel=0.1)
    assert all(module.bias.abs().max() == 0 for module in model.modules() if getattr(module, "bias", None) is not None)
    for block in model.blocks:
        assert spread(block.attn.qkv.weight) == pytest.approx(std, rel=0.1)
        assert spread(block.attn.proj.weight) == pytest.approx(std / math.sqrt(2 * depth), rel=0.1)
        assert spread(block.ffn.fc2.weight) == pytest.approx(std / math.sqrt(2 * depth), rel=0.1)
        assert block.attn.log_scale.flatten().tolist() == pytest.approx([math.log(4)] * 2)
        table = block.adaln_table if shared else block.adaln.weight
        gates, rest = table.flatten().split([2 * table.numel() // 6, 4 * table.numel() // 6])
        full = width**-0.5 if shared else std
        assert spread(gates) == pytest.approx(1e-3 * full, rel=0.2)
        assert spread(rest) == pytest.approx(0.5 * full, rel=0.2)


def test_gradients_reach_every_parameter(model: VAR) -> None:
    model.requires_grad_(True).train()
    F.cross_entropy(
        model(random_context(model), LABELS).flatten(0, 1), torch.zeros(2 * model.num_tokens).long()
    ).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # With one scale there is no context to embed.
    assert [name for name in idle if len(model.scales) > 1 or "code_embed" not in name] == []


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(SettingError, match="width 32 is not a multiple of heads 3"):
        tiny_generator(heads=3)
