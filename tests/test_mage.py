"""MAGE: a plain rewrite over the published layout, and when partial evaluations equal whole ones.

`published_logits` shares no code with the package and keeps partial evaluations as ReCAP describes them: keys and
values of the context are gathered and joined to those of the evaluated tokens.
"""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_weights import State, fill
from tiny_models import randomise
from torch import Tensor

import vgen
from vgen.generators.mage import MAGE, _blocks
from vgen.hub import COMPONENTS
from vgen.pipelines.masked import MaskedPipeline
from vgen.types import SettingError

CLASSES, FAKE = 1000, 76  # of the table of words: V codes, 1000 classes (start token: number 76), the mask

Layout = dict[str, tuple[int, ...]]
Pairs = list[tuple[Tensor, Tensor]]  # keys and values (B, n, H, D) of each block


def mage_layout(
    *, num_tokens: int, vocab_size: int, width: int, decoder_width: int, depth: int, decoder_depth: int, side: int = 16
) -> Layout:
    """Names and shapes of a published checkpoint but for its VQGAN (spec 3.1)."""
    w, d, length = width, decoder_width, num_tokens + 1

    def layer(name: str, *shape: int) -> Layout:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    def block(name: str, c: int) -> Layout:
        qkv_proj = layer(f"{name}.attn.qkv", 3 * c, c) | layer(f"{name}.attn.proj", c, c)
        mlp = layer(f"{name}.mlp.fc1", 4 * c, c) | layer(f"{name}.mlp.fc2", c, 4 * c)
        return layer(f"{name}.norm1", c) | qkv_proj | layer(f"{name}.norm2", c) | mlp

    table: Layout = {
        "cls_token": (1, 1, w),
        "pos_embed": (1, length, w),
        "mask_token": (1, 1, d),
        "decoder_pos_embed": (1, length, d),
        "decoder_pos_embed_learned": (1, length, d),
        "token_emb.position_ids": (1, length),
        "token_emb.word_embeddings.weight": (vocab_size + CLASSES + 1, w),
        "token_emb.position_embeddings.weight": (length, w),
        **layer("token_emb.LayerNorm", w),
        **layer("patch_embed.proj", w, 3, side, side),
        **layer("norm", w),
        **layer("decoder_embed", d, w),
        **layer("decoder_norm", d),
        **layer("decoder_pred", 3 * side * side, d),
        "mlm_layer.bias": (1, 1, vocab_size + CLASSES + 1),
        **layer("mlm_layer.fc", w, d),
        **layer("mlm_layer.ln", w),
    }
    for stack, count, c in (("blocks", depth, w), ("decoder_blocks", decoder_depth, d)):
        for i in range(count):
            table |= block(f"{stack}.{i}", c)
    return table


def mage_state(depth: int = 2, decoder_depth: int = 2, **sizes: int) -> State:
    """Nine tokens of eight codes, an encoder of width 128 and a decoder of width 64, in the published layout."""
    usual = {"num_tokens": 9, "vocab_size": 8, "width": 128, "decoder_width": 64, "side": 2}
    table = mage_layout(depth=depth, decoder_depth=decoder_depth, **(usual | sizes))
    state = {name: fill(name, list(shape)) for name, shape in table.items()}
    state["token_emb.position_ids"] = torch.arange(len(state["token_emb.position_embeddings.weight"]))[None]
    for name in ("token_emb.LayerNorm.weight", "mlm_layer.ln.weight"):
        state[name] = state[name] + 1
    return state


# ---- the rewrite


def normal(x: Tensor, p: State, name: str, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def affine(x: Tensor, p: State, name: str) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def erf_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def stack(x: Tensor, p: State, name: str, heads: int, past: Pairs | None) -> tuple[Tensor, Pairs]:
    """Blocks over x (B, n, C), with the keys and values of a context joined to its own, which come back."""
    own: Pairs = []
    for i in range(sum(key.startswith(name) and key.endswith("norm1.bias") for key in p)):
        block = f"{name}{i}"
        q, k, v = affine(normal(x, p, f"{block}.norm1"), p, f"{block}.attn.qkv").unflatten(-1, (3, heads, -1)).unbind(2)
        own.append((k, v))
        if past is not None:
            k, v = torch.cat([past[i][0], k], 1), torch.cat([past[i][1], v], 1)
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        x = x + affine(attended, p, f"{block}.attn.proj")
        x = x + affine(erf_gelu(affine(normal(x, p, f"{block}.norm2"), p, f"{block}.mlp.fc1")), p, f"{block}.mlp.fc2")
    return x, own


def published_logits(
    p: State,
    tokens: Tensor,
    heads: tuple[int, int],
    positions: Tensor | None = None,
    context: tuple[Pairs, Pairs] | None = None,
) -> tuple[Tensor, tuple[Pairs, Pairs]]:
    """Logits (B, n, V) of tokens (B, n) at `positions`, and the keys and values of both stacks."""
    words = p["token_emb.word_embeddings.weight"]
    vocab_size, mask_id = len(words) - CLASSES - 1, len(words) - 1
    ids = torch.where(tokens == vocab_size, mask_id, tokens)
    ids = torch.cat([torch.full_like(ids[:, :1], vocab_size + FAKE), ids], 1)
    place = torch.arange(1, tokens.shape[1] + 1).expand_as(tokens) if positions is None else positions + 1
    place = torch.cat([torch.zeros_like(place[:, :1]), place], 1)
    x = normal(words[ids] + p["token_emb.position_embeddings.weight"][place], p, "token_emb.LayerNorm")
    x, encoder = stack(x, p, "blocks.", heads[0], context and context[0])
    x = affine(normal(x, p, "norm"), p, "decoder_embed")
    hidden = (ids == mask_id)[..., None]
    x = x * ~hidden + x[:, :1] * hidden + p["decoder_pos_embed_learned"][0][place]
    x, decoder = stack(x, p, "decoder_blocks.", heads[1], context and context[1])
    h = normal(erf_gelu(affine(normal(x, p, "decoder_norm"), p, "mlm_layer.fc")), p, "mlm_layer.ln", eps=1e-5)
    logits = h @ words.T + p["mlm_layer.bias"][0]
    return logits[:, 1:, :vocab_size], (encoder, decoder)


def gathered(pairs: Pairs, rest: Tensor) -> Pairs:
    """The keys and values of the tokens at `rest` (B, m)."""
    index = rest[..., None, None] + 1
    return [
        (k.gather(1, index.expand(-1, -1, *k.shape[2:])), v.gather(1, index.expand(-1, -1, *v.shape[2:])))
        for k, v in pairs
    ]


# ---- our model with the same weights


def ours(name: str) -> str:
    """Our name for a published tensor that has one."""
    renamed = {"token_emb.position_embeddings.weight": "position", "decoder_pos_embed_learned": "decoder_position"}
    if name in renamed:
        return renamed[name]
    prefixes = {"blocks.": "encoder_blocks.", "norm.": "encoder_norm.", "token_emb.LayerNorm.": "token_norm."}
    for old, new in (prefixes | {"mlm_layer.fc.": "head_fc.", "mlm_layer.ln.": "head_norm."}).items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name.replace(".attn.", ".").replace(".mlp.", ".")


@functools.cache
def pair(depth: int = 2, decoder_depth: int = 2) -> tuple[MAGE, State]:
    """Our model and the published state, in double precision; 2 heads in the encoder, 4 in the decoder."""
    state = {name: tensor.double() for name, tensor in mage_state(depth, decoder_depth).items()}
    with torch.device("meta"):
        model = MAGE(
            num_tokens=9,
            vocab_size=8,
            width=128,
            decoder_width=64,
            encoder_depth=depth,
            encoder_heads=2,
            decoder_depth=decoder_depth,
            decoder_heads=4,
        )
    found = {ours(name): tensor for name, tensor in state.items()}
    words, places = state["token_emb.word_embeddings.weight"], state["decoder_pos_embed_learned"][0]
    found |= {"token_embed.weight": torch.cat([words[:8], words[-1:]]), "start_embed": words[8 + FAKE]}
    found |= {"head_bias": state["mlm_layer.bias"][0, 0, :8], "decoder_position": places}
    model.load_state_dict({name: found[name] for name in model.state_dict()}, assign=True)
    return model.eval().requires_grad_(False), state


def example(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens (2, 9), about half of them masked, and labels that must not matter (2,)."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8, (2, 9), generator=rng)
    return tokens.masked_fill(torch.rand(2, 9, generator=rng) < 0.5, 8), torch.tensor([0, 2])


def at(values: Tensor, places: Tensor) -> Tensor:
    """Logits (B, N, V) at places (B, n)."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


PLACES, REST = torch.tensor([[1, 4, 8], [7, 0, 3]]), torch.tensor([[0, 2, 3, 5, 6, 7], [1, 2, 4, 5, 6, 8]])
SAME = {"atol": 1e-6, "rtol": 0}  # logits come in float32, and lie within -3..3 here
DEPTHS = [(1, 1), (1, 3), (3, 1), (2, 2)]


@pytest.mark.parametrize(("depth", "decoder_depth"), DEPTHS)
def test_whole_evaluations_are_those_of_the_rewrite(depth: int, decoder_depth: int) -> None:
    model, state = pair(depth, decoder_depth)
    masked = torch.full((1, 9), 8)
    for tokens in (example()[0], masked, masked * 0 + torch.arange(9) % 8):
        found = model(tokens, torch.zeros(len(tokens), dtype=torch.int64))
        wanted, _ = published_logits(state, tokens, (2, 4))
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        assert wanted.std() > 0.3 and torch.allclose(found.double(), wanted, **SAME)


@pytest.mark.parametrize(("depth", "decoder_depth"), DEPTHS)
def test_partial_evaluations_are_those_of_the_rewrite(depth: int, decoder_depth: int) -> None:
    """In-place caches against keys and values gathered and joined; two partial evaluations one after another."""
    model, state = pair(depth, decoder_depth)
    tokens, labels = example()
    cache = model.new_cache(2)
    whole = model(tokens, labels, cache=cache)
    _, (encoder, decoder) = published_logits(state, tokens, (2, 4))
    context = (gathered(encoder, REST), gathered(decoder, REST))
    given = tokens.gather(1, PLACES)
    for code, column in ((3, 1), (6, 0)):
        given = given.clone()
        given[:, column] = code
        found = model(given, labels, positions=PLACES, cache=cache)
        wanted, _ = published_logits(state, given, (2, 4), PLACES, context)
        assert torch.allclose(found.double(), wanted, **SAME)
        assert not torch.allclose(found, at(whole, PLACES), atol=1e-2)


# ---- when partial evaluations equal whole ones


@pytest.mark.parametrize(("depth", "decoder_depth"), DEPTHS)
def test_where_nothing_changed_a_partial_evaluation_equals_the_whole(depth: int, decoder_depth: int) -> None:
    (model, _), (tokens, labels) = pair(depth, decoder_depth), example()
    cache = model.new_cache(2)
    whole = model(tokens, labels, cache=cache)
    partial = model(tokens.gather(1, PLACES), labels, positions=PLACES, cache=cache)
    assert torch.allclose(partial, at(whole, PLACES), **SAME)


def test_a_partial_evaluation_of_everything_equals_a_whole_one() -> None:
    (model, _), (tokens, labels) = pair(), example()
    cache = model.new_cache(2)
    model(example(1)[0], labels, cache=cache)
    places = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    partial = model(tokens.gather(1, places), labels, positions=places, cache=cache)
    assert torch.allclose(partial, at(model(tokens, labels), places), **SAME)


def test_with_one_block_each_only_the_decoders_context_goes_stale() -> None:
    """One encoder block's keys and values depend on a token's own embedding, so its outputs at the revealed positions
    are those of a whole evaluation. The decoder's depend on its inputs, which at the context are old: a whole decoder
    over the mixture must give the same logits, and no whole evaluation of the model does."""
    (model, p), (tokens, labels) = pair(1, 1), example()
    cache = model.new_cache(2)
    model(tokens, labels, cache=cache)
    given = torch.tensor([[3, 1, 5], [0, 6, 2]])
    revealed = tokens.scatter(1, PLACES, given)
    partial = model(given, labels, positions=PLACES, cache=cache)

    old, new = decoder_inputs(p, tokens), decoder_inputs(p, revealed)
    fresh = torch.zeros(2, 10, 1, dtype=torch.bool).scatter(1, PLACES[..., None] + 1, True)
    fresh[:, 0] = True
    x, _ = stack(torch.where(fresh, new, old), p, "decoder_blocks.", 4, None)
    h = normal(erf_gelu(affine(normal(x, p, "decoder_norm"), p, "mlm_layer.fc")), p, "mlm_layer.ln", eps=1e-5)
    logits = (h @ p["token_emb.word_embeddings.weight"].T + p["mlm_layer.bias"][0])[:, 1:, :8]
    assert torch.allclose(partial.double(), at(logits, PLACES), **SAME)
    assert not torch.allclose(partial, at(model(revealed, labels), PLACES), atol=1e-3)


def decoder_inputs(p: State, tokens: Tensor) -> Tensor:
    """What the decoder reads in a whole evaluation, (B, N + 1, C)."""
    words = p["token_emb.word_embeddings.weight"]
    x = torch.cat([words[8 + FAKE].expand(len(tokens), 1, -1), torch.cat([words[:8], words[-1:]])[tokens]], 1)
    x = normal(x + p["token_emb.position_embeddings.weight"], p, "token_emb.LayerNorm")
    x = affine(normal(stack(x, p, "blocks.", 2, None)[0], p, "norm"), p, "decoder_embed")
    masked = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.bool), tokens == 8], 1)
    return torch.where(masked[..., None], x[:, :1], x) + p["decoder_pos_embed_learned"]


def test_later_partial_evaluations_see_what_earlier_ones_wrote() -> None:
    (model, _), (tokens, labels) = pair(), example()
    given = tokens.gather(1, PLACES)
    changed = (given + 1) % 8
    found = []
    for first in (given, changed):
        cache = model.new_cache(2)
        model(tokens, labels, cache=cache)
        model(first, labels, positions=PLACES, cache=cache)
        found.append(model(tokens.gather(1, REST), labels, positions=REST, cache=cache))
    assert torch.allclose(found[0], at(model(tokens, labels), REST), **SAME)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


# ---- what reaches the logits


def test_class_labels_are_not_read() -> None:
    (model, _), (tokens, labels) = pair(), example()
    assert model.null_class == 0 and model.mask_token_id == 8
    assert torch.equal(model(tokens, labels), model(tokens, labels + 5))


def test_the_decoder_reads_the_start_token_at_masked_positions() -> None:
    """With everything masked it reads the same vector everywhere: its own positions alone tell them apart."""
    model, _ = pair()
    same = MAGE.from_config(model.config).double().eval()
    same.load_state_dict(model.state_dict() | {"decoder_position": torch.zeros_like(model.decoder_position)})
    with torch.no_grad():
        logits = same(torch.full((1, 9), 8), torch.tensor([0]))
        assert torch.allclose(logits, logits[:, :1].expand_as(logits), atol=1e-6)
        assert not torch.allclose(model(torch.full((1, 9), 8), torch.tensor([0])), logits, atol=1e-3)


def test_the_head_multiplies_by_the_embeddings_of_the_codes() -> None:
    """Adding a constant vector to code 5's embedding changes its own logits alone where no token is a 5."""
    model, _ = pair()
    tokens, labels = torch.full((1, 9), 8), torch.tensor([0])
    before = model(tokens, labels)
    changed = MAGE.from_config(model.config).double().eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["token_embed.weight"][5] *= 3
    changed.load_state_dict(state)
    with torch.no_grad():
        after = changed(tokens, labels)
    others = [code for code in range(8) if code != 5]
    bias = model.head_bias[5].float()
    assert torch.equal(after[..., others], before[..., others])
    assert torch.allclose(after[..., 5] - bias, 3 * (before[..., 5] - bias), **SAME)


def test_a_row_of_a_batch_equals_its_solo_run() -> None:
    (model, _), (tokens, labels) = pair(), example()
    assert torch.allclose(model(tokens, labels)[1:], model(tokens[1:], labels[1:]), atol=1e-6)


def test_both_stacks_have_their_own_epsilon_and_biases() -> None:
    """Where the input hardly varies the epsilon decides; 1e-5, PyTorch's own, would give another answer."""
    (block,) = _blocks(1, 8, 2, 4)
    assert (block.norm1.eps, block.norm2.eps, block.qkv.bias.shape) == (1e-6, 1e-6, (24,))


# ---- saving, casting, bounds


def test_saving_and_loading_gives_the_same_logits(tmp_path: Path) -> None:
    model = MAGE.from_config(pair()[0].config)
    randomise(model)
    model.save_pretrained(tmp_path)
    tokens, labels = example()
    loaded = MAGE.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens, labels), model(tokens, labels))
    assert (loaded.mask_token_id, loaded.null_class) == (8, 0)


@pytest.mark.skipif(MAGE not in COMPONENTS, reason="MAGE is not registered")
def test_a_saved_pipeline_loads_and_samples_the_same(tmp_path: Path) -> None:
    settings = {"steps": 4, "guidance_scale": 1.0, "resample_singletons": False}
    pipeline = MaskedPipeline(None, randomise(MAGE.from_config(pair()[0].config)), settings=settings)
    pipeline.save_pretrained(tmp_path)
    loaded = vgen.load(tmp_path, device="cpu")
    runs = [p(seeds=[3, 4], partial_steps=1, output_type="latent").tokens for p in (pipeline, loaded)]
    assert torch.equal(*runs) and runs[0].shape == (2, 9) and int(runs[0].max()) < 8
    assert loaded.resolve_settings({})["steps"] == 4


def test_half_precision_stays_in_its_type_until_the_logits() -> None:
    model = randomise(MAGE.from_config(pair()[0].config))
    tokens, labels = example()
    wanted = model(tokens, labels)
    half = torch.nn.Module.to(model, torch.bfloat16)
    cache = half.new_cache(2)
    assert cache.encoder.keys.dtype == cache.decoder.keys.dtype == torch.bfloat16
    assert cache.encoder.keys.shape == (2, 2, 2, 10, 64) and cache.decoder.keys.shape == (2, 2, 4, 10, 16)
    found = half(tokens, labels, cache=cache)
    assert found.dtype == torch.float32 and torch.allclose(found, wanted, atol=0.05 * float(wanted.abs().max()))
    partial = half(tokens.gather(1, PLACES), labels, positions=PLACES, cache=cache)
    assert torch.allclose(partial, at(wanted, PLACES), atol=0.05 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_depth": 0}, "encoder_depth is 0"),
        ({"decoder_depth": 0}, "decoder_depth is 0"),
        ({"encoder_heads": 3}, "encoder_heads is 3: the encoder's width 16"),
        ({"decoder_heads": 0}, "decoder_heads is 0"),
        ({"decoder_heads": 5}, "decoder_heads is 5: the decoder's width 24"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    sizes = {"num_tokens": 9, "vocab_size": 8, "width": 16, "decoder_width": 24, "encoder_heads": 2, "decoder_heads": 2}
    MAGE(**sizes, encoder_depth=1, decoder_depth=1)
    with pytest.raises(SettingError, match=message):
        MAGE(**{**sizes, "encoder_depth": 1, "decoder_depth": 1, **changes})


def test_calls_that_do_not_fit_are_refused() -> None:
    (model, _), (tokens, labels) = pair(), example()
    with pytest.raises(SettingError, match="8 tokens were given, the model takes 9"):
        model(tokens[:, :8], labels)
    places = torch.tensor([[0], [1]])
    for cache in (None, model.new_cache(2)):
        with pytest.raises(SettingError, match="needs the cache of a whole one"):
            model(tokens[:, :1], labels, positions=places, cache=cache)
    cache = model.new_cache(2)
    model(tokens, labels, cache=cache)
    with pytest.raises(SettingError, match="positions have shape"):
        model(tokens[:, :2], labels, positions=places, cache=cache)
