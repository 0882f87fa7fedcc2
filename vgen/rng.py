"""Random streams, one per sample: the same seed draws the same noise alone, in any batch, shard or resumed run.

Knows nothing of models or samplers.
"""

from collections.abc import Callable, Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from vgen.types import SettingError

MAX_SEED = 2**63 - 1


class SampleStreams:
    """One counter-based stream per sample: noise depends on (seed, key) and on nothing else.

    Drawn by Philox on the CPU and then moved, so every device sees the same numbers. Keys make draws independent
    of their order: a run that starts at step k, or skips one, draws what the full run drew there.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed <= MAX_SEED:
                raise SettingError(f"seed {seed!r} is not a whole number in 0..{MAX_SEED}")
        self.seeds = [int(seed) for seed in seeds]
        self.device = device

    def exponential(self, shape: Sequence[int], key: int) -> Tensor:
        """Standard exponential noise (B, *shape), float32, row i from stream (seed_i, key)."""
        uniform = self._rows(shape, key, np.random.Generator.random)
        # By inversion in float64: in float32 a zero would turn up once in 2^24 draws and win every race.
        return torch.from_numpy(uniform).neg_().log1p_().neg_().float().to(self.device)

    def normal(self, shape: Sequence[int], key: int) -> Tensor:
        """Standard normal noise (B, *shape), float32, row i from stream (seed_i, key)."""
        return torch.from_numpy(self._rows(shape, key, np.random.Generator.standard_normal)).float().to(self.device)

    def _rows(self, shape: Sequence[int], key: int, fill: Callable[..., object]) -> np.ndarray:
        noise = np.empty((len(self.seeds), *shape))
        for row, seed in zip(noise, self.seeds, strict=True):
            fill(np.random.Generator(np.random.Philox(key=[seed, key])), out=row)
        return noise


class BatchStream:
    """One `torch.Generator` for the whole batch, drawn in sequence as the published code does.

    Row i then depends on the batch it is in; use it to reproduce published seeds.
    """

    def __init__(self, generator: torch.Generator, batch: int, device: torch.device | str = "cpu") -> None:
        self.generator, self.batch, self.device = generator, batch, device

    def exponential(self, shape: Sequence[int], key: int) -> Tensor:
        """Standard exponential noise (B, *shape), float32; `key` is ignored: order decides."""
        noise = torch.empty(self.batch, *shape, device=self.generator.device)
        return noise.exponential_(generator=self.generator).to(self.device)

    def normal(self, shape: Sequence[int], key: int) -> Tensor:
        """Standard normal noise (B, *shape), float32; `key` is ignored."""
        source = self.generator.device
        return torch.randn(self.batch, *shape, generator=self.generator, device=source).to(self.device)
