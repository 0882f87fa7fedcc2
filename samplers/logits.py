"""From logits to tokens: guidance, truncation and the exponential race. Pure functions of tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vgen.types import SettingError

Schedule = str | Sequence[float]  # of guidance: "linear", "constant", or a curve
TEMPERATURE_SCHEDULES = ("constant", "linear", "sqrt")
MOST_POINTS = 64  # of a curve


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, 2207.12598): uncond + scale * (cond - uncond); 1 is off.

    Written as scale * cond + (1 - scale) * uncond, whose rounding is that of VAR's published (1 + t) cond - t uncond.
    """
    return scale * cond + (1 - scale) * uncond


def read_schedule(schedule: Schedule) -> str | list[float]:
    """A guidance schedule in its one form: "linear", "constant", or a curve as a list of numbers.

    A curve says which share of `scale - 1` is added to 1 at evenly spaced moments of a run, the first at its start and
    the last at its end: [0, 1] is "linear", [1, 1] "constant", [0, 1, 0] guides the middle alone. As text the numbers
    stand between colons, as in "0:1:0.5". Raises SettingError.
    """
    if isinstance(schedule, str) and schedule in ("linear", "constant"):
        return schedule
    try:
        points = [float(point) for point in (schedule.split(":") if isinstance(schedule, str) else schedule)]
    except (TypeError, ValueError):
        points = []
    if not 2 <= len(points) <= MOST_POINTS or not all(0 <= point <= 1 for point in points):
        raise SettingError(
            f"guidance_schedule is {str(schedule)[:80]!r}: use 'linear', 'constant', or 2 to {MOST_POINTS} shares in "
            "0..1 of the guidance scale over the run, such as 0:1:0.5"
        )
    return points


def guidance_at(scale: float, schedule: Schedule, index: int, total: int) -> float:
    """Guidance at step `index` of `total`: "constant", "linear" from 1 at the first step to `scale` at the last, or
    a curve (`read_schedule`)."""
    schedule, share = read_schedule(schedule), index / max(total - 1, 1)
    if schedule == "constant":
        return scale
    if isinstance(schedule, list):
        share = float(_height(schedule, torch.tensor(share, dtype=torch.float64)))
    return 1 + (scale - 1) * share


def share_guidance(
    scale: float, schedule: Schedule, device: torch.device | str = "cpu"
) -> Callable[[Tensor], float | Tensor]:
    """Guidance of masked families by the share (B,) of tokens known: "constant", "linear" from 1 up to `scale`, or a
    curve (`read_schedule`).

    The share is that after the step, as in MAR (2406.11838); gives (B, 1, 1), or a number where it is the same.
    """
    schedule = read_schedule(schedule)
    if schedule == "constant" or scale == 1:
        return lambda share: scale

    def scale_at(share: Tensor) -> Tensor:
        height = _height(schedule, share.float()) if isinstance(schedule, list) else share.float()
        return (1 + (scale - 1) * height).to(device)[:, None, None]

    return scale_at


def _height(curve: list[float], share: Tensor) -> Tensor:
    """A curve at shares in 0..1 of the run, straight between its points."""
    points, place = share.new_tensor(curve), share * (len(curve) - 1)
    low = place.floor().clamp(0, len(curve) - 2).long()
    return torch.lerp(points[low], points[low + 1], place - low)


def temper(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits at a temperature, (..., V) -> (..., V): 1 is off, 0 leaves the largest alone.

    A tensor gives each row a temperature of its own and must broadcast against the logits.
    """
    if not isinstance(temperature, Tensor) and temperature == 1:
        return logits
    below = logits - logits.amax(-1, keepdim=True)  # the largest is made 0 first, lest a tiny temperature overflow
    if isinstance(temperature, Tensor):
        return below / temperature.clamp_min(torch.finfo(below.dtype).tiny)
    return below / temperature if temperature else below.masked_fill(below < 0, -torch.inf)


def temperature_at(temperature: float, schedule: str, share: Any) -> Any:
    """The temperature when a `share` in 0..1 of a run has passed, a number or a tensor as the share is.

    "constant", or from 1 at the start to `temperature` at the end: "linear", or "sqrt" as ReCAP's release (2505.19089).
    """
    if schedule == "constant" or temperature == 1:
        return temperature
    return 1 + (temperature - 1) * (share**0.5 if schedule == "sqrt" else share)


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set unlikely logits to -inf, (..., V) -> (..., V): all below the k-th largest (0 is off; ties with it stay),
    then the smallest set whose probability is at most 1 - top_p (1 is off). The largest always stays."""
    vocab = logits.shape[-1]
    keep_k = 0 < top_k < vocab
    if not keep_k and top_p >= 1:
        return logits
    # What top-k leaves is all that top-p has to sort.
    ranked = logits.topk(top_k, dim=-1).values if keep_k else logits.sort(dim=-1, descending=True).values
    cut = ranked[..., -1:]
    if top_p < 1:
        kept = logits if not keep_k else logits.masked_fill(logits < cut, -torch.inf)
        probabilities = (ranked - kept.logsumexp(-1, keepdim=True)).exp()
        tail = probabilities.flip(-1).cumsum(-1).flip(-1)  # probability of this rank and all behind it
        if keep_k:  # entries that tie with the k-th largest were kept too, behind the last rank
            ties = (kept == cut).sum(-1, keepdim=True) - (ranked == cut).sum(-1, keepdim=True)
            tail = tail + ties * probabilities[..., -1:]
        inside = tail > 1 - top_p
        inside[..., 0] = True
        cut = ranked.gather(-1, inside.sum(-1, keepdim=True) - 1)
    return logits.masked_fill(logits < cut, -torch.inf)


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """Sample tokens by an exponential race, argmax(p / e) with e ~ Exp(1): (..., V) x 2 -> (...) int64.

    The same law as `torch.multinomial`, and the same tokens when `noise` comes from its generator.
    """
    return logits.softmax(-1).div_(noise).argmax(-1)
