"""Recurrent depth: a transformer whose middle runs as often as wanted (2502.05171), over an image's tokens in raster
order, or over words.

Knows nothing of tokenizers or samplers. A prelude embeds tokens; the core is a loop that refines a random state, the
embedding going in at every recurrence; a coda reads the state. Position 0 holds the class, position i token i - 1, and
what is read at a position are the logits of the next token. B batch, n tokens, D width, V codes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgen.generators.depth_cache import DepthCache, Places
from vgen.layers import Linear, attention, linear, rotate, rotations
from vgen.types import SettingError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values (B, n, heads, d) -> (B, n, heads, d)
CUT = 3.0  # standard deviations beyond which no state begins


class Norm(nn.Module):
    """Root mean square norm, computed in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), self.eps).to(x.dtype)


class Block(nn.Module):
    """Attention and a gated MLP between norms, the second of each taken after the sum: (B, n, D) -> (B, n, D)."""

    def __init__(self, width: int, heads: int, mlp_width: int, qk_bias: bool, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3, self.norm4 = (Norm(width, eps) for _ in range(4))
        self.qkv = Linear(width, 3 * width, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, heads, width // heads)) if qk_bias else None
        self.proj = Linear(width, width, bias=False)
        self.fc1 = Linear(width, 2 * mlp_width, bias=False)  # gate, then what it lets through
        self.fc2 = Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor, rotation: Sequence[Tensor], attend: Attend) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        if self.qk_bias is not None:
            qk = qk + self.qk_bias.squeeze(1)
        q, k = rotate(qk.to(rotation[0].dtype), *rotation).to(v.dtype).unbind(2)
        x = self.norm2(x + self.proj(attend(q, k, v).flatten(2)))
        gate, up = self.fc1(self.norm3(x)).chunk(2, -1)
        return self.norm4(x + self.fc2(F.silu(gate) * up))


class Readout(NamedTuple):
    """Logits (B, n, V) float32, those of a shallower readout where it was asked for, and the last two states."""

    logits: Tensor
    early: Tensor | None
    state: Tensor  # (B, n, D)
    before: Tensor


class RecurrentTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Tokens to logits of the next ones, through as many recurrences as wanted.

    Args:
        num_tokens: tokens of an image, N; the longest text for a language model.
        vocab_size: number of codes, V.
        num_classes: classes, 0 for none; the id of the null class, for guidance, is `num_classes`. None makes it a
            language model: no class at position 0, tokens from there on.
        width: D; heads: attention heads; mlp_width: of the gated MLPs.
        prelude, core, coda: blocks of each.
        recurrences: of the core, as usual when sampling; in training their mean.
        grid: side of the grid of tokens, whose rows and columns rotate half of a head each; None rotates by position.
        rope_base: of the rotations. position_embedding: a learned embedding of each position is added too.
        qk_bias: learned biases of queries and keys. norm_eps: of all norms.

    Raises SettingError for sizes that do not fit one another.
    """

    adjustable = ("recurrences",)  # settings that weights do not decide: training may go on with others
    _supports_gradient_checkpointing = True  # diffusers' enable_gradient_checkpointing: one per recurrence

    @register_to_config
    def __init__(
        self,
        *,
        num_tokens: int,
        vocab_size: int,
        num_classes: int | None,
        width: int,
        heads: int,
        mlp_width: int,
        prelude: int = 1,
        core: int = 2,
        coda: int = 1,
        recurrences: int = 6,
        grid: int | None = None,
        rope_base: float = 50_000.0,
        position_embedding: bool = False,
        qk_bias: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes = {"num_tokens": num_tokens, "vocab_size": vocab_size, "width": width, "heads": heads}
        for name, size in (sizes | {"mlp_width": mlp_width, "core": core, "recurrences": recurrences}).items():
            if size < 1:
                raise SettingError(f"{name} is {size}: it must be at least 1")
        for name, size in {"prelude": prelude, "coda": coda, "num_classes": num_classes or 0}.items():
            if size < 0:
                raise SettingError(f"{name} is {size}: it must be at least 0")
        step = 2 if grid is None else 4
        if width % heads or width // heads % step:
            raise SettingError(f"width {width} must be a multiple of heads {heads}, and a head's of {step}")
        if grid is not None and grid * grid != num_tokens:
            raise SettingError(f"grid is {grid}, of {grid * grid} tokens, but num_tokens is {num_tokens}")
        self.null_class, self.mask_token_id = num_classes or 0, vocab_size  # the latter marks what is not known yet
        self.gradient_checkpointing = False
        self.token_embed = nn.Embedding(vocab_size + (0 if num_classes is None else num_classes + 1), width)
        self.position = nn.Parameter(torch.zeros(num_tokens, width)) if position_embedding else None
        block = partial(Block, width, heads, mlp_width, qk_bias, norm_eps)
        self.prelude_blocks: Sequence[Any] = nn.ModuleList(block() for _ in range(prelude))  # type: ignore[assignment]
        self.adapter = Linear(2 * width, width, bias=False)  # of the state, then the embedding
        self.core_blocks: Sequence[Any] = nn.ModuleList(block() for _ in range(core))  # type: ignore[assignment]
        self.coda_blocks: Sequence[Any] = nn.ModuleList(block() for _ in range(coda))  # type: ignore[assignment]
        self.norm = Norm(width, norm_eps)

    @property
    def state_std(self) -> float:
        """Standard deviation of the states that the loop begins with, before they are cut at three of it."""
        return (2 / 5) ** 0.5

    def prompt(self, class_labels: Tensor) -> Tensor:
        """What stands at position 0: token ids (B, 1) of classes (B,)."""
        return (class_labels + self.config["vocab_size"])[:, None]

    def inputs(self, tokens: Tensor, class_labels: Tensor) -> Tensor:
        """What stands at all positions (B, N) where tokens (B, N) are to be predicted; a language model's are these."""
        if self.config["num_classes"] is None:
            return tokens
        return torch.cat([self.prompt(class_labels), tokens[:, :-1]], 1)

    def new_cache(self, batch: int, recurrences: int) -> DepthCache:
        """Room for the keys and values of `batch` rows (guidance needs two per sample), of `recurrences` runs of the
        loop; 1: all runs share what the last one wrote."""
        config, weight = self.config, self.token_embed.weight
        layers = (config["prelude"], config["core"], config["coda"])
        shape = (batch, config["heads"], config["num_tokens"], config["width"] // config["heads"])
        return DepthCache(layers, recurrences, shape, self._rotations(config["num_tokens"]), weight.dtype)

    def forward(
        self, tokens: Tensor, state: Tensor, recurrences: int | None = None, also: int | None = None
    ) -> Readout:
        """Whole rows of tokens (B, n), for training and for measuring.

        Args:
            state: (B, n, D) that the loop begins with, as `scaled_state` or `random_state` give it.
            recurrences: how often the loop runs, 0 included; None: the configuration's.
            also: logits are read after so many recurrences too.
        """
        embedded = self.embed(tokens)
        total = self.config["recurrences"] if recurrences is None else recurrences
        before, early = state, None
        for number in range(total):
            if number == also:
                early = self.read(state)
            before, state = state, self.recur(state, embedded)
        return Readout(self.read(state), early, state, before)

    # ---- its three parts

    def embed(self, tokens: Tensor, places: Places | None = None, cache: DepthCache | None = None) -> Tensor:
        """The prelude: what the loop is given at every recurrence, (B, n, D), of tokens (B, n).

        Without a cache the tokens are whole rows; with one they stand at `places`, and see what it holds.
        """
        x = self.token_embed(tokens) * self.config["width"] ** 0.5
        if self.position is not None:
            x = x + (self.position[: x.shape[1]] if places is None else self.position[places.positions])
        return self._run(self.prelude_blocks, x, places, cache, 0)

    def recur(
        self,
        state: Tensor,
        embedded: Tensor,
        places: Places | None = None,
        cache: DepthCache | None = None,
        depths: Tensor | int = 0,
    ) -> Tensor:
        """One recurrence: states and embeddings (B, n, D) -> states. `depths`: see DepthCache.depths."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._recur, state, embedded, places, cache, depths, use_reentrant=False)
        return self._recur(state, embedded, places, cache, depths)

    def _recur(
        self, state: Tensor, embedded: Tensor, places: Places | None, cache: DepthCache | None, depths: Tensor | int
    ) -> Tensor:
        x = self.adapter(torch.cat([state, embedded], -1))
        if cache is None or places is None:
            return self._run(self.core_blocks, x, None, None, 0)
        for layer, block in enumerate(self.core_blocks):

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                keys, values, apart = cache.update(layer, depths, places, k, v)
                return attend_apart(q, keys, values, places.mask) if apart else attend_to(q, keys, values, places.mask)

            x = block(x, places.rotation, attend)
        return x

    def read(self, state: Tensor, places: Places | None = None, cache: DepthCache | None = None) -> Tensor:
        """The coda: logits (B, n, V) float32, or wider, of the tokens that follow states (B, n, D)."""
        first = 0 if cache is None else cache.prelude + cache.recurrences * cache.core
        x = self.norm(self._run(self.coda_blocks, self.norm(state), places, cache, first))
        logits = linear(x, self.token_embed.weight[: self.config["vocab_size"]], None)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _run(
        self, blocks: Sequence[Block], x: Tensor, places: Places | None, cache: DepthCache | None, first: int
    ) -> Tensor:
        """Blocks one after another, whose keys and values are at the slots from number `first` on."""
        if cache is None or places is None:
            length = x.shape[1]
            angles = self._rotations(length)
            wide = torch.promote_types(x.dtype, torch.float32)
            rotation = [part.to(wide)[:, None, None] for part in (angles.real, angles.imag)]
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            for block in blocks:
                x = block(x, rotation, lambda q, k, v: attend_to(q, k.transpose(1, 2), v.transpose(1, 2), mask))
            return x
        for slot, block in enumerate(blocks, first):

            def attend(q: Tensor, k: Tensor, v: Tensor, slot: int = slot) -> Tensor:
                return attend_to(q, *cache.write(slot, places, k, v), places.mask)

            x = block(x, places.rotation, attend)
        return x

    def _rotations(self, count: int) -> Tensor:
        """Unit complex numbers (count, d / 2) that rotate heads by position, or by row and column of a grid, the class
        standing at its corner and the tokens from (1, 1) on."""
        config, device = self.config, self.token_embed.weight.device
        width, base = config["width"] // config["heads"], config["rope_base"]
        positions = torch.arange(count)
        if config["grid"] is None:
            return rotations(width, positions, base).to(device)
        before = (positions - 1).clamp_min(0)
        inside = (positions > 0).long()
        rows, columns = inside * (before // config["grid"] + 1), inside * (before % config["grid"] + 1)
        return torch.cat([rotations(width // 2, axis, base) for axis in (rows, columns)], -1).to(device)

    # ---- states

    def scaled_state(self, uniform: Tensor) -> Tensor:
        """States (..., D) from numbers uniform in [0, 1]: normal, cut at three standard deviations."""
        edge = 0.5 * (1 + torch.erf(torch.tensor(-CUT / 2**0.5, dtype=torch.float64)))
        cut = edge + uniform.double() * (1 - 2 * edge)
        states = self.state_std * 2**0.5 * torch.erfinv(2 * cut - 1)
        return states.to(self.token_embed.weight.device, self.token_embed.weight.dtype)

    def random_state(self, batch: int, count: int, rng: torch.Generator) -> Tensor:
        """States (B, n, D) that the loop begins with in training."""
        return self.scaled_state(torch.rand(batch, count, self.config["width"], generator=rng))

    # ---- initialisation

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise for training (2502.05171, after Takase et al., 2312.16903): normal, cut at three deviations; what
        joins the stream is scaled down by how many blocks it runs through."""
        config = self.config
        std = (2 / (5 * config["width"])) ** 0.5
        depth = config["prelude"] + config["core"] * config["recurrences"] + config["coda"]
        joining = std / (2 * depth) ** 0.5

        def fill(weight: Tensor, std: float) -> None:
            nn.init.trunc_normal_(weight, std=std, a=-CUT * std, b=CUT * std)

        fill(self.token_embed.weight, std)
        fill(self.adapter.weight, std)
        if self.position is not None:
            fill(self.position, std)
        for block in (*self.prelude_blocks, *self.core_blocks, *self.coda_blocks):
            fill(block.qkv.weight, std)
            gate, up = block.fc1.weight.chunk(2)
            fill(gate, std)
            for weight in (block.proj.weight, up, block.fc2.weight):
                fill(weight, joining)
            if block.qk_bias is not None:
                nn.init.zeros_(block.qk_bias)


def attend_to(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Queries (B, n, heads, d) on keys and values (B, heads, L, d): (B, n, heads, d)."""
    return attention(q.transpose(1, 2), keys, values, mask).transpose(1, 2)


def attend_apart(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Queries (B, n, heads, d), each on keys and values of its own (B, n, heads, L, d): (B, n, heads, d)."""
    batch, count = q.shape[:2]
    if mask is not None:
        mask = mask.expand(batch, 1, count, -1).transpose(1, 2).flatten(0, 1)[:, :, None]  # (B n, 1, 1, L)
    found = attention(q.flatten(0, 1)[:, :, None], keys.flatten(0, 1), values.flatten(0, 1), mask)
    return found.squeeze(2).unflatten(0, (batch, count))
