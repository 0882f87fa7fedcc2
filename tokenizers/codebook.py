"""A codebook: nearest-code lookup, usage statistics and restarts of dead codes.

Knows nothing of images, scales or networks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeepFloat32(nn.Module):
    """A module whose float32 tensors stay so when the model around it is cast.

    Codes are compared and summed over scales, where bfloat16's eight bits would show.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepFloat32":
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor.dtype == torch.float32 != moved.dtype else moved

        return super()._apply(move, recurse)


class Codebook(KeepFloat32):
    """V code vectors of width C, with running usage per use site (one per scale, say).

    `usage` holds an exponential moving average of the share of vectors that chose each code: (sites, V), rows sum
    to 1 once a site has been counted.
    """

    def __init__(self, vocab_size: int, code_dim: int, sites: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, code_dim) / code_dim**0.5)
        self.register_buffer("usage", torch.zeros(sites, vocab_size))
        self.usage: Tensor

    def lookup(self, tokens: Tensor) -> Tensor:
        """Code vectors (..., C) of tokens (...)."""
        return F.embedding(tokens, self.weight)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the code at the smallest Euclidean distance, the first where two tie: (..., C) -> (...) int64."""
        return self._distances(vectors).argmin(-1)

    @torch.no_grad()
    def nearby(self, vectors: Tensor, number: int) -> Tensor:
        """Indices of the `number` nearest codes, nearest first: (..., C) -> (..., number) int64."""
        return self._distances(vectors).topk(number, largest=False).indices

    def _distances(self, vectors: Tensor) -> Tensor:
        """Squared Euclidean distances to all codes, (..., V)."""
        flat = vectors.reshape(-1, vectors.shape[-1])
        # |z|^2 is the same for all codes, but it takes part in the rounding of the published code, so it stays.
        distance = flat.square().sum(1, keepdim=True) + self.weight.square().sum(1)
        distance = torch.addmm(distance, flat, self.weight.T, alpha=-2)
        return distance.view(*vectors.shape[:-1], -1)

    @torch.no_grad()
    def count(self, tokens: Tensor, site: int, decay: float = 0.99) -> None:
        """Update the usage of `site` with the tokens just chosen."""
        share = torch.bincount(tokens.flatten(), minlength=len(self.weight)).to(self.usage) / tokens.numel()
        first = bool(self.usage[site].sum() == 0)
        self.usage[site] = share if first else torch.lerp(share, self.usage[site], decay)

    @torch.no_grad()
    def restart(self, candidates: Tensor, threshold: float, generator: torch.Generator | None = None) -> int:
        """Move dead codes onto random candidate vectors (N, C), and return how many were moved.

        A code is dead when its mean usage over all sites is below `threshold` / V.
        """
        usage = self.usage.mean(0)
        dead = (usage < threshold / len(self.weight)).nonzero().flatten()
        if len(dead):
            chosen = torch.randint(len(candidates), (len(dead),), generator=generator)
            self.weight[dead] = candidates[chosen.to(candidates.device)].to(self.weight)
            self.usage[:, dead] = 1 / len(self.weight)  # a fresh code gets time to win vectors
        return len(dead)

    def statistics(self) -> dict[str, float]:
        """Share of codes in use, and the perplexity of their usage (V when all are used equally)."""
        usage = self.usage.mean(0)
        usage = usage / usage.sum().clamp_min(1e-12)
        entropy = -(usage * usage.clamp_min(1e-12).log()).sum()
        return {
            "codes_used": float((usage >= 0.03 / len(usage)).float().mean()),
            "perplexity": float(entropy.exp()),
        }
