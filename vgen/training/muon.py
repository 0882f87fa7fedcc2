"""Muon: momentum whose matrices are orthogonalised by Newton-Schulz iterations before they are applied (Jordan et al.
2024; scaled as AdamW's updates, 2502.16982). torch.optim.Muon iterates in bfloat16, which processors that emulate it do
more slowly than all else of a step; here it is a choice, and matrices of one shape are iterated together.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vgen.training.precision import has_bfloat16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at 0: singular values end between 0.7 and 1.2, none stays small
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices (n, r, c) with the same singular vectors and singular values near 1, in their own dtype."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if wide is not matrices else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled decay, for matrices alone.

    Args:
        params: matrices (r, c).
        lr: of an update whose entries have the root mean square 0.2, as AdamW's have.
        momentum: share of the old momentum that is kept.
        weight_decay: as AdamW's.
        dtype: that the iterations run in; None: bfloat16 where the device has it, otherwise float32.

    Raises ValueError for parameters that are no matrices.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"]]
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"Muon is for matrices, and there are parameters of shapes {shapes}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[Any, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for parameters in shapes.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        wanted, dtype = [], self.dtype
        if dtype is None:
            dtype = torch.bfloat16 if has_bfloat16(parameters[0].device) else torch.float32
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None
            held = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
            held.lerp_(gradient, 1 - group["momentum"])
            wanted.append(gradient.lerp(held, group["momentum"]).to(dtype))
        size = 0.2 * math.sqrt(max(parameters[0].shape))
        for parameter, update in zip(parameters, orthogonalise(torch.stack(wanted)), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * size)
