"""MAR's diffusion head: a small MLP that draws one continuous token given its condition (2406.11838, section 3).

A network predicts the noise of a token and the range of its variance; an ancestral sampler with respaced steps
(2102.09672) turns injected noise into tokens. Knows nothing of transformers, tokenizers or the order of tokens.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.layers import Linear
from vgen.types import SettingError

DIFFUSION_TIMES = 1000  # of the training process; the network reads times 0..999
TIME_FEATURES = 256
MAX_BETA = 0.999


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Coefficients of the retained times, from the noisiest to time 0, one number per sampling step.

    With x the state and e the predicted noise, x_0 = from_state x - from_noise e, and the next state has the mean
    to_start x_0 + to_state x and a log-variance between `low` and `high`.
    """

    times: tuple[int, ...]
    from_state: tuple[float, ...]
    from_noise: tuple[float, ...]
    to_start: tuple[float, ...]
    to_state: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def retained_times(steps: int) -> list[int]:
    """Which of the 1000 times `steps` sampling steps visit, ascending: evenly spaced, 0 and 999 among them.

    The spacing is accumulated and rounded to even as published, which decides ties. Raises SettingError.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 2 <= steps <= DIFFUSION_TIMES:
        raise SettingError(f"diffusion steps are {steps!r}: give a whole number in 2..{DIFFUSION_TIMES}")
    times, time = [], 0.0
    for _ in range(steps):
        times.append(round(time))
        time += (DIFFUSION_TIMES - 1) / (steps - 1)
    return times


@cache
def schedule(steps: int) -> Schedule:
    """The cosine schedule of `steps` retained times, in float64."""
    grid = torch.arange(DIFFUSION_TIMES + 1, dtype=torch.float64) / DIFFUSION_TIMES
    signal = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
    all_alpha_bar = (1 - (1 - signal[1:] / signal[:-1]).clamp_max(MAX_BETA)).cumprod(0)
    times = retained_times(steps)
    alpha_bar = all_alpha_bar[times]
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    variance[0] = variance[1]  # it is 0 at time 0, and its logarithm is needed

    def falling(values: Tensor) -> tuple[float, ...]:
        return tuple(values.flip(0).tolist())

    return Schedule(
        times=tuple(reversed(times)),
        from_state=falling(alpha_bar**-0.5),
        from_noise=falling((1 / alpha_bar - 1).sqrt()),
        to_start=falling(beta * before.sqrt() / (1 - alpha_bar)),
        to_state=falling((1 - before) * (1 - beta).sqrt() / (1 - alpha_bar)),
        low=falling(variance.log()),
        high=falling(beta.log()),
    )


def time_features(times: Tensor) -> Tensor:
    """Cosines, then sines, of times (M,) at 128 frequencies from 1 down to nearly 1e-4: (M, 256) float32."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device, dtype=torch.float32) / half)
    angles = times.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normed features (M, W) scaled by 1 + scale and shifted, both (M, W): adaptive layer norm (DiT, 2212.09748)."""
    return x * (1 + scale) + shift


class HeadBlock(nn.Module):
    """A residual MLP whose norm and gate follow from the control vector: (M, W) x 2 -> (M, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.adaln = Linear(width, 3 * width)
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)

    def forward(self, x: Tensor, control: Tensor) -> Tensor:
        shift, scale, gate = self.adaln(control).chunk(3, -1)
        return x + gate * self.fc2(F.silu(self.fc1(modulate(self.norm(x), shift, scale))))


class DiffusionHead(nn.Module):
    """Draws tokens (M, C) given conditions (M, condition_dim).

    Args:
        token_dim: width of a token, C.
        condition_dim: width of a condition.
        width: width of the residual MLPs.
        depth: number of residual MLPs.
    """

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.time_fc1 = Linear(TIME_FEATURES, width)
        self.time_fc2 = Linear(width, width)
        self.condition_embed = Linear(condition_dim, width)
        self.token_embed = Linear(token_dim, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.out_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.out_adaln = Linear(width, 2 * width)
        self.out = Linear(width, 2 * token_dim)

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """Noisy tokens (M, C) at times (M,) in 0..999 -> (M, 2 C): the noise, then where the log-variance lies
        between its bounds, -1 at the lower and 1 at the upper."""
        return self._network(noisy, self._embed_times(times) + self.condition_embed(condition))

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        noise: Tensor,
        steps: int = 100,
        temperature: float = 1.0,
        uncond: Tensor | None = None,
        scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Draw tokens (M, C) in at least float32, by ancestral sampling.

        Args:
            condition: (M, condition_dim).
            noise: standard normal, (M, steps + 1, C): the state to start from, then what each step adds; the last
                step adds nothing, its noise is there because the published code draws it.
            steps: sampling steps, 2..1000.
            temperature: factor on the noise that steps add; 0 makes all but the start deterministic.
            uncond: conditions of guidance's other branch, (M, condition_dim). Both branches predict the noise of the
                same state; the predictions are guided, the variance is that of the conditional one.
            scale: uncond + scale * (cond - uncond), for all or for each token, (M,); 1 is off.

        Raises SettingError where steps or shapes do not fit.
        """
        plan = schedule(steps)
        self._check_noise(condition, noise, steps)
        guided = uncond is not None and (isinstance(scale, Tensor) or scale != 1)
        scale = scale.to(noise)[:, None] if isinstance(scale, Tensor) else scale
        weight = self.token_embed.weight
        noise = noise.to(device=weight.device, dtype=torch.promote_types(torch.float32, weight.dtype))
        # The condition enters once, not at every step, and so do the features of all times.
        branches = torch.cat([condition, uncond]) if guided and uncond is not None else condition
        context = self.condition_embed(branches.to(weight.dtype))
        times = self._embed_times(torch.tensor(plan.times, device=weight.device))
        x = noise[:, 0]
        for i in range(steps):
            both = torch.cat([x, x]) if guided else x
            eps, share = self._network(both, context + times[i]).to(x.dtype).chunk(2, -1)
            if guided:
                (cond, other), share = eps.chunk(2), share[: len(x)]
                eps = other + scale * (cond - other)
            start = plan.from_state[i] * x - plan.from_noise[i] * eps
            x = plan.to_start[i] * start + plan.to_state[i] * x
            if i < steps - 1 and temperature:
                share = (share + 1) / 2
                log_variance = share * plan.high[i] + (1 - share) * plan.low[i]
                x = x + (0.5 * log_variance).exp() * noise[:, 1 + i] * temperature
        return x

    def _network(self, noisy: Tensor, context: Tensor) -> Tensor:
        control = F.silu(context)
        x = self.token_embed(noisy.to(context.dtype))
        for block in self.blocks:
            x = block(x, control)
        shift, scale = self.out_adaln(control).chunk(2, -1)
        return self.out(modulate(self.out_norm(x), shift, scale))

    def _embed_times(self, times: Tensor) -> Tensor:
        return self.time_fc2(F.silu(self.time_fc1(time_features(times).to(self.time_fc1.weight.dtype))))

    def _check_noise(self, condition: Tensor, noise: Tensor, steps: int) -> None:
        wanted = (len(condition), steps + 1, self.token_dim)
        if tuple(noise.shape) != wanted:
            raise SettingError(f"noise has shape {tuple(noise.shape)}: {steps} steps for these tokens take {wanted}")
