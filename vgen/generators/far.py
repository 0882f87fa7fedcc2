"""FAR: a video's next frame by flow matching, given the clean frames before it (2503.19325); FAR-Long keeps old frames
at a coarser resolution.

Reads latents with a noise level for each frame and predicts every frame's velocity; a frame sees itself and earlier
ones. Knows nothing of autoencoders or samplers. A latent z = (1 - sigma) x0 + sigma n has the timestep 1000 sigma,
clean context has -1. B batch, F frames, C channels, H W latent sides, N tokens of a frame, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vgen.generators.frame_attention import (
    FrameCache,
    FrameRuns,
    Span,
    causal_spans,
    spanned_attention,
    two_copies_mask,
)
from vgen.generators.frame_blocks import (
    TIME_FEATURES,
    Block,
    Projections,
    drop_frames,
    modulate,
    patches,
    time_features,
    token_rotations,
    whole,
)
from vgen.layers import Linear
from vgen.types import SettingError

CLEAN = -1.0  # the timestep of clean context; FAR-Long doubles it for coarse frames
PREDICTIONS = ("velocity", "sample")


class FAR(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Noisy latents of some frames, clean ones of earlier frames -> the velocity n - x0 of every frame.

    Args:
        in_channels: latent channels, C; side: rows and columns of a latent, H = W.
        patch_size: rows and columns of a token.
        width: D; depth: blocks; heads: attention heads.
        rope_axes: channels of a head that are rotated by time, row and column.
        num_classes: classes of videos, or num_actions: actions, one for each frame; at most one of the two. One more
            embedding, `null_class`, serves rows without.
        context_patch_size: makes it FAR-Long: rows and columns of a coarse token.
        window: of FAR-Long: the last frames, the noisy one included, that are seen at full resolution.
        slope: FlexRoPE: how much attention scores fall per frame of distance.
        prediction: what the network gives: "velocity", or "sample", the clean latent.
        spatial_embedding: a learned embedding of each place is added to tokens.
        shared_adaln: one modulation layer for all blocks and a table per block; ours, for small models.

    Raises SettingError for sizes that do not fit one another.
    """

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int,
        side: int,
        patch_size: int = 1,
        width: int,
        depth: int,
        heads: int,
        rope_axes: Sequence[int] = (16, 24, 24),
        num_classes: int = 0,
        num_actions: int = 0,
        context_patch_size: int | None = None,
        window: int = 16,
        slope: float = 0.0,
        prediction: str = "velocity",
        spatial_embedding: bool = False,
        shared_adaln: bool = False,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, side=side, patch_size=patch_size, width=width, depth=depth, heads=heads)
        check_sizes(width, heads, rope_axes, side, patch_size, context_patch_size)
        check_choices(num_classes, num_actions, window, slope, prediction)
        self.null_class = num_classes or num_actions
        self.is_long = context_patch_size is not None
        self.frame_tokens = (side // patch_size) ** 2  # N
        features = in_channels * patch_size**2
        self.token_embed = Linear(features, width)
        self.time_fc1 = Linear(TIME_FEATURES, width)
        self.time_fc2 = Linear(width, width)
        self.class_embed = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.action_embed = nn.Embedding(num_actions + 1, width) if num_actions else None
        self.position = nn.Parameter(torch.zeros(self.frame_tokens, width)) if spatial_embedding else None
        self.adaln = Linear(width, 6 * width) if shared_adaln else None
        blocks = [Block(width, heads, self.is_long, i == depth - 1, shared_adaln) for i in range(depth)]
        self.blocks: Sequence[Any] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.head_adaln = Linear(width, 2 * width)  # scale first, then shift
        self.head = Linear(width, features)
        self.coarse_tokens = 0
        if context_patch_size is not None:
            self.coarse_tokens = (side // context_patch_size) ** 2
            features = in_channels * context_patch_size**2
            self.context_embed = Linear(features, width)
            self.context_position = nn.Parameter(torch.zeros(self.coarse_tokens, width)) if spatial_embedding else None
            self.context_head = Linear(width, features)

    @property
    def stream(self) -> torch.dtype:
        """dtype of the residual stream and of predictions: at least float32."""
        return torch.promote_types(self.head.weight.dtype, torch.float32)

    def new_cache(self, batch: int, frames: int, attend_last: int | None = None) -> FrameCache:
        """Room for the keys and values of a video of `frames` frames, `batch` rows (guidance needs two per sample).

        With `attend_last` that many frames are kept, the oldest giving way. Raises SettingError like `forward`.
        """
        self._check_reach(attend_last)
        config, weight = self.config, self.head.weight
        window = config["window"] if self.is_long else frames
        fine = min(frames, window) if attend_last is None else min(frames, attend_last + 1)
        tokens = fine * self.frame_tokens + max(0, frames - window) * self.coarse_tokens
        shape = (config["depth"], batch, config["heads"], tokens, config["width"] // config["heads"])
        return FrameCache(shape, weight.device, weight.dtype, config["window"] if self.is_long else None, attend_last)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        class_labels: Tensor | None = None,
        actions: Tensor | None = None,
        cache: FrameCache | None = None,
        start: int = 0,
        keep: int = 0,
        attend_last: int | None = None,
        slope: float | None = None,
        clean: Tensor | None = None,
    ) -> Tensor:
        """Velocities (B, F, C, H, W), float32 or wider, of latents (B, F, C, H, W) at timesteps (B, F) or (B,).

        Args:
            class_labels: (B,) ids, actions: (B, F) ids of these frames; `null_class` or None: none.
            cache: holds all frames before number `start`; those given are number `start` and on. FAR-Long takes
                frames `cache.first_needed(k)` to k for frame k at first, afterwards frame k alone.
            start: number of the first frame given.
            keep: so many of the first frames given, clean ones, are stored in the cache; their velocity is not
                computed, it is 0. FAR-Long keeps all but the last.
            attend_last: frames see so many before them, and no more; None: all.
            slope: FlexRoPE; None: the configuration's.
            clean: in training, what frames see of those before them, in place of `latents`: see `two_copies`.

        Raises SettingError where shapes or counts do not fit.
        """
        if clean is not None:
            raw = self.two_copies(clean, latents, timesteps, class_labels, actions)
            return self.velocity(raw, latents, per_frame(timesteps, latents))
        raw = self.predict(latents, timesteps, class_labels, actions, cache, start, keep, attend_last, slope)
        kept = keep if cache is not None else 0
        velocity = self.velocity(raw[:, kept:], latents[:, kept:], per_frame(timesteps, latents)[:, kept:])
        return torch.cat([raw[:, :kept], velocity], 1) if kept else velocity

    def velocity(self, raw: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict` gave for latents at timesteps (B, F), as a velocity; that of clean samples is 0."""
        if self.config["prediction"] == "velocity":
            return raw
        sigma = timesteps.to(raw.device, raw.dtype)[..., None, None, None] / 1000
        return torch.where(sigma > 0, (latents.to(raw.dtype) - raw) / sigma.clamp_min(1e-6), 0)

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        class_labels: Tensor | None = None,
        actions: Tensor | None = None,
        cache: FrameCache | None = None,
        start: int = 0,
        keep: int = 0,
        attend_last: int | None = None,
        slope: float | None = None,
    ) -> Tensor:
        """What the network gives, velocities or samples by `prediction`: what training compares. As `forward`."""
        self._check(latents, timesteps, actions)
        self._check_reach(attend_last)
        count = latents.shape[1]
        keep = 0 if cache is None else cache.check(len(latents), start, count, keep)
        coarse = max(0, count - self.config["window"]) if self.is_long else 0
        sizes = [self.coarse_tokens] * coarse + [self.frame_tokens] * (count - coarse)
        given = FrameRuns(list(range(start, start + count)), sizes)
        stored = FrameRuns([], []) if cache is None else cache.before(start)
        reach = attend_last if cache is None else cache.reach(attend_last)
        fall = self.config["slope"] if slope is None else slope
        spans = [causal_spans(given, stored + given, reach, fall, latents.device)]
        spans += [causal_spans(given.after(keep), stored + given, reach, fall, latents.device)] if keep else spans
        if cache is not None:
            cache.reserve(stored.tokens + given.tokens)
        times = per_frame(timesteps, latents)
        times = torch.cat([times[:, :coarse] * 2, times[:, coarse:]], 1) if coarse else times
        condition = self._condition(times, class_labels, actions)
        raw = self._network(latents, condition, coarse, given.numbers, spans, keep, cache, stored.tokens)
        if cache is not None:
            cache.commit(stored + given.until(keep), start + keep)
        return torch.cat([raw.new_zeros(*latents.shape[:1], keep, *latents.shape[2:]), raw], 1) if keep else raw

    def two_copies(
        self,
        clean: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        class_labels: Tensor | None = None,
        actions: Tensor | None = None,
        clean_timesteps: Tensor | None = None,
    ) -> Tensor:
        """What `predict` gives for each noisy frame (B, F, C, H, W) given the clean ones before it, for training.

        In one pass: clean frame k sees clean frames to k, noisy frame k sees clean frames before k and itself, as when
        sampling. `clean_timesteps` (B, F) or (B,) are those of clean frames, by default -1. Raises SettingError.
        """
        if self.is_long:
            raise SettingError("two copies need one resolution: context_patch_size must be None")
        if clean.shape != noisy.shape:
            raise SettingError(f"clean latents are {tuple(clean.shape)}, noisy ones {tuple(noisy.shape)}")
        self._check(noisy, timesteps, actions)
        count = noisy.shape[1]
        given = FrameRuns(list(range(count)), [self.frame_tokens] * count)
        mask = two_copies_mask(given.token_numbers(noisy.device), self.config["slope"])
        everything = slice(None)
        spans: list[list[Span]] = [[(everything, everything, rows)] for rows in (mask, mask[given.tokens :])]
        latents = torch.cat([clean, noisy], 1)
        first = torch.full_like(timesteps, CLEAN) if clean_timesteps is None else clean_timesteps
        times = torch.cat([per_frame(first, clean), per_frame(timesteps, noisy)], 1)
        condition = self._condition(times, class_labels, None if actions is None else torch.cat([actions, actions], 1))
        return self._network(latents, condition, 0, given.numbers * 2, spans, count, None, 0)

    # ---- the network

    def _network(
        self,
        latents: Tensor,
        condition: Tensor,
        coarse: int,
        numbers: Sequence[int],
        spans: Sequence[Sequence[Span]],
        silent: int,
        cache: FrameCache | None,
        stored: int,
    ) -> Tensor:
        """Predictions of all but the first `silent` frames, whose keys and values alone matter.

        The first `coarse` frames are coarse. `spans` are what all blocks, and what the last one's queries see; the
        cache holds `stored` tokens that are seen, behind which new keys and values are written.
        """
        activated = F.silu(condition)
        conditions = [activated[:, :coarse], activated[:, coarse:]] if coarse else [activated]
        modulating = conditions if self.adaln is None else [self.adaln(part) for part in conditions]
        streams = self._embed(latents.to(self.head.weight.dtype), coarse)
        rotation = self._rotation(numbers, coarse)
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer, last: bool = last) -> Tensor:
                if cache is not None:
                    k, v = cache.extend(layer, stored, k, v)
                return spanned_attention(q, k, v, spans[int(last)])

            streams = block(streams, modulating, rotation, attend, silent if last else 0)
        return (
            self._predictions(streams, drop_frames(conditions, silent)) if streams else latents[:, :0].to(self.stream)
        )

    def _condition(self, timesteps: Tensor, class_labels: Tensor | None, actions: Tensor | None) -> Tensor:
        """The sum of the embeddings of timesteps (B, F) and of the class or actions: (B, F, D)."""
        weight = self.time_fc1.weight
        features = time_features(timesteps.to(weight.device, self.stream)).to(weight.dtype)
        condition = self.time_fc2(F.silu(self.time_fc1(features)))
        if self.class_embed is not None:
            shape = timesteps.shape[:1]
            ids = class_labels if class_labels is not None else torch.full(shape, self.null_class)
            condition = condition + self.class_embed(ids.to(weight.device))[:, None]
        if self.action_embed is not None:
            ids = actions if actions is not None else torch.full(timesteps.shape, self.null_class)
            condition = condition + self.action_embed(ids.to(weight.device))
        return condition

    def _embed(self, latents: Tensor, coarse: int) -> list[Tensor]:
        """The stream at its beginning: coarse frames' part, where there are any, and fine ones'."""
        fine = self.token_embed(patches(latents[:, coarse:], self.config["patch_size"])).to(self.stream)
        fine = fine if self.position is None else fine + self.position.to(self.stream)
        if not coarse:
            return [fine]
        old = self.context_embed(patches(latents[:, :coarse], self.config["context_patch_size"])).to(self.stream)
        return [old if self.context_position is None else old + self.context_position.to(self.stream), fine]

    def _rotation(self, numbers: Sequence[int], coarse: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (L, 1, 1, d / 2) of all tokens' angles, from the frames' numbers and places in them."""
        config, size = self.config, self.config["patch_size"]
        tokens = config["side"] // size
        parts = [token_rotations(config["rope_axes"], numbers[coarse:], tokens)]
        if coarse:
            step = config["context_patch_size"] // size
            parts.insert(0, token_rotations(config["rope_axes"], numbers[:coarse], tokens, step))
        angles = torch.cat(parts)[:, None, None]
        return angles.real.to(self.head.weight.device, self.stream), angles.imag.to(
            self.head.weight.device, self.stream
        )

    def _predictions(self, streams: Sequence[Tensor], conditions: Sequence[Tensor]) -> Tensor:
        """The parts of the stream through the head: (B, F, C, H, W)."""
        heads = [(self.head, self.config["patch_size"])]
        if len(streams) > 1:
            heads.insert(0, (self.context_head, self.config["context_patch_size"]))
        results = []
        for (head, size), x, condition in zip(heads, streams, conditions, strict=True):
            scale, shift = self.head_adaln(condition).to(self.stream)[:, :, None].chunk(2, -1)
            tokens = head(modulate(x, shift, scale).to(head.weight.dtype)).to(self.stream)
            results.append(whole(tokens, size, self.config["side"]))
        return torch.cat(results, 1) if len(results) > 1 else results[0]

    # ---- initialisation

    @torch.no_grad()
    def init_weights(self, gate: float = 0.0) -> None:
        """Initialise for training as published: the output is 0, and with `gate` 0 so are all branches.

        A `gate` above 0 is what the branches' gates begin at, which small models learn faster from.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Projections):
                module.reset()
        for layer in (self.time_fc1, self.time_fc2):
            nn.init.normal_(layer.weight, std=0.02)
        heads = [self.head_adaln, self.head, *([self.context_head] if self.is_long else [])]
        modulations = [self.adaln] if self.adaln is not None else [block.adaln for block in self.blocks]
        for layer in [*heads, *modulations]:
            nn.init.zeros_(layer.weight)
        for block in self.blocks:
            rows = block.adaln.bias.view(6, -1) if self.adaln is None else block.adaln_table
            rows.zero_()[[2, 5]] = gate
        for name, parameter in self.named_parameters():
            if name.endswith("position"):
                nn.init.zeros_(parameter)

    # ---- checks

    def _check(self, latents: Tensor, timesteps: Tensor, actions: Tensor | None) -> None:
        config = self.config
        wanted = (config["in_channels"], config["side"], config["side"])
        if latents.ndim != 5 or not latents.shape[1] or latents.shape[2:] != wanted:
            raise SettingError(f"latents have shape {tuple(latents.shape)}, the model takes (B, F, {wanted})")
        if timesteps.shape not in (latents.shape[:1], latents.shape[:2]):
            raise SettingError(f"timesteps have shape {tuple(timesteps.shape)}, latents {tuple(latents.shape)}")
        if actions is not None and self.action_embed is None:
            raise SettingError("this model knows no actions: leave them out")
        if actions is not None and actions.shape != latents.shape[:2]:
            raise SettingError(f"actions have shape {tuple(actions.shape)}, latents {tuple(latents.shape)}")

    def _check_reach(self, attend_last: int | None) -> None:
        if attend_last is not None and self.is_long:
            raise SettingError("FAR-Long sees old frames coarsely instead of dropping them: attend_last must be None")
        if attend_last is not None and attend_last < 0:
            raise SettingError(f"attend_last is {attend_last}: it must be at least 0")


def per_frame(timesteps: Tensor, latents: Tensor) -> Tensor:
    """Timesteps (B,) or (B, F) of latents (B, F, ...), as (B, F)."""
    return timesteps if timesteps.ndim == 2 else timesteps[:, None].expand(latents.shape[:2])


def check_positive(**sizes: int) -> None:
    """Raise SettingError naming the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise SettingError(f"{name} is {size}: it must be at least 1")


def check_sizes(
    width: int, heads: int, rope_axes: Sequence[int], side: int, patch_size: int, context_patch_size: int | None
) -> None:
    """Raise SettingError for sizes that do not divide one another."""
    if width % heads:
        raise SettingError(f"width {width} is not a multiple of heads {heads}")
    if len(rope_axes) != 3 or sum(rope_axes) != width // heads or any(axis % 2 or axis < 2 for axis in rope_axes):
        raise SettingError(f"rope_axes {tuple(rope_axes)} must be three even numbers whose sum is {width // heads}")
    if side % patch_size:
        raise SettingError(f"side {side} is not a multiple of patch_size {patch_size}")
    if context_patch_size is None:
        return
    if context_patch_size <= patch_size or side % context_patch_size or context_patch_size % patch_size:
        raise SettingError(
            f"context_patch_size {context_patch_size} must divide side {side} and be a multiple of patch_size "
            f"{patch_size}, at least twice it"
        )


def check_choices(num_classes: int, num_actions: int, window: int, slope: float, prediction: str) -> None:
    """Raise SettingError for settings that are out of bounds or contradict one another."""
    if num_classes and num_actions:
        raise SettingError(f"num_classes {num_classes} and num_actions {num_actions} were both given: give one")
    if window < 1:
        raise SettingError(f"window is {window}: it must be at least 1, for the frame that is generated")
    if slope < 0:
        raise SettingError(f"slope is {slope}: it must be at least 0, attention falls with distance")
    if prediction not in PREDICTIONS:
        raise SettingError(f"unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}")
