"""Video generators with known answers, and small random FARs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_models import randomise
from torch import Tensor

from vgen.generators.far import FAR
from vgen.pipelines.next_frame import NextFramePipeline
from vgen.tokenizers.frames import PixelPatches

SHAPE = (2, 3, 3)  # of a frame's latents


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class ToyCache:
    """What frames were computed to, (rows, n, C, H, W), and their numbers."""

    rows: int
    frames: int
    attend_last: int | None
    seen: list[Tensor] = field(default_factory=list)

    def first_needed(self, frame: int) -> int:
        assert len(self.seen) <= frame < self.frames
        return len(self.seen)


class Toy:
    """A causal generator, nonlinear in everything it is told; with a cache it insists on the protocol.

    Velocity of frame i: tanh(z_i + embeddings of its timestep, label and action + what earlier frames in its reach
    were computed to, more the nearer they are).
    """

    def __init__(self, null_class: int = 0, context_patch_size: int | None = None) -> None:
        self.config: dict[str, Any] = {"context_patch_size": context_patch_size}
        self.null_class = null_class
        self.calls: list[dict[str, Any]] = []
        self.ids = normal(null_class + 1, *SHAPE, seed=7)
        self.mix = normal(SHAPE[0], SHAPE[0], seed=8)
        self.caches: list[Any] = []

    def new_cache(self, batch: int, frames: int, attend_last: int | None = None) -> ToyCache:
        self.caches.append(ToyCache(batch, frames, attend_last))
        return self.caches[-1]

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        class_labels: Tensor | None = None,
        actions: Tensor | None = None,
        cache: ToyCache | None = None,
        start: int = 0,
        keep: int = 0,
        attend_last: int | None = None,
        slope: float | None = None,
    ) -> Tensor:
        rows, count = latents.shape[:2]
        assert timesteps.shape == (rows, count) and (actions is None or actions.shape == (rows, count))
        self.calls.append({"start": start, "count": count, "keep": keep, "rows": rows, "times": timesteps.clone()})
        self.calls[-1] |= {"labels": class_labels, "actions": actions, "latents": latents}
        if cache is None:
            assert start == keep == 0
        else:
            assert (cache.rows, cache.attend_last) == (rows, attend_last) and start == len(cache.seen)
            assert start + count <= cache.frames
        own = latents + torch.sin(timesteps / 300)[..., None, None, None]
        if class_labels is not None:
            own = own + self.ids[class_labels][:, None]
        if actions is not None:
            own = own + self.ids[actions]
        computed = torch.einsum("cd,bfdhw->bfchw", self.mix, torch.sin(own))
        before = [] if cache is None else list(cache.seen)
        every = [*before, *computed.unbind(1)]
        velocity = []
        for i in range(start, start + count):
            first = 0 if attend_last is None else max(0, i - attend_last)
            seen = sum(every[j] * 0.7 ** (i - j) * (1 - (slope or 0) * (i - j)) for j in range(first, i))
            velocity.append(torch.tanh(own[:, i - start] + seen))
        if cache is not None:
            cache.seen += computed[:, :keep].unbind(1)
        return torch.stack(velocity, 1)


class Straight:
    """Knows the truth (B, F, C, H, W): every frame's velocity is the one that leads there straight."""

    def __init__(self, truth: Tensor) -> None:
        self.config: dict[str, Any] = {"context_patch_size": None}
        self.truth = truth

    def new_cache(self, batch: int, frames: int, attend_last: int | None = None) -> ToyCache:
        return ToyCache(batch, frames, attend_last)

    def __call__(self, latents: Tensor, timesteps: Tensor, *args: Any, **named: Any) -> Tensor:
        start, cache = named["start"], named["cache"]
        sigma = (timesteps.clamp_min(1e-9) / 1000).to(latents)[..., None, None, None]
        if cache is not None:
            cache.seen += latents[:, : named["keep"]].unbind(1)
        return (latents - self.truth[:, start : start + latents.shape[1]]) / sigma


class Autoregression:
    """The exact velocities of videos whose every pixel is a Gaussian AR(1): x_i = a x_(i-1) + sqrt(1 - a^2) e_i.

    Given frames at noise levels of their own, up to the one asked for: E[n - x | z] is linear in z.
    """

    def __init__(self, a: float) -> None:
        self.config: dict[str, Any] = {"context_patch_size": None}
        self.a = a

    def new_cache(self, batch: int, frames: int, attend_last: int | None = None) -> Any:
        raise AssertionError("asked for a cache, with cached=False")

    def __call__(self, latents: Tensor, timesteps: Tensor, *args: Any, **named: Any) -> Tensor:
        assert (timesteps == timesteps[0]).all()
        sigma = (timesteps[0].clamp_min(0) / 1000).double()
        count = len(sigma)
        steps = torch.arange(count, dtype=torch.float64)
        covariance = self.a ** (steps[:, None] - steps).abs()
        keep = 1 - sigma
        seen = keep[:, None] * covariance * keep + torch.diag(sigma**2)  # of z
        target = torch.diag(sigma) - covariance * keep  # of n - x with z: rows are frames of n - x
        reach = named["attend_last"] or count
        weights = torch.zeros(count, count, dtype=torch.float64)
        for i in range(count):
            if sigma[i] > 0:
                part = slice(max(0, i - reach), i + 1)
                weights[i, part] = torch.linalg.solve(seen[part, part], target[i, part])
        return torch.einsum("ij,bjchw->bichw", weights, latents)


def tiny_far(**changes: Any) -> FAR:
    """4 x 4 latents of four channels, two blocks of width 32; random weights."""
    config: dict[str, Any] = {"in_channels": 4, "side": 4, "width": 32, "depth": 2, "heads": 2, "rope_axes": (4, 6, 6)}
    model = FAR(**(config | changes))
    randomise(model)
    for name, parameter in model.named_parameters():
        if "norm_" in name:
            parameter.add_(2)  # attention that tells frames apart
    return model  # type: ignore[no-any-return]


def tiny_pipeline(generator: FAR | None = None, tokenizer: bool = True, **named: Any) -> NextFramePipeline:
    """Grey videos of 8 x 8 pixels, four of them a token."""
    codec = PixelPatches(image_size=8, patch_size=2, image_channels=1) if tokenizer else None
    pipeline = NextFramePipeline(codec, generator or tiny_far(), **named)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clips(number: int, frames: int, seed: int = 0) -> Tensor:
    """Grey clips (number, frames, 3, 8, 8) uint8."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (number, frames, 1, 8, 8), generator=rng, dtype=torch.uint8).expand(-1, -1, 3, -1, -1)
