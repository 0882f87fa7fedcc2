"""Tokens that a call is given instead of drawing them: reading tokens and what is known of them, checked."""

from typing import Any

import torch
from torch import Tensor

from vgen.pipelines.base import as_tensor
from vgen.types import SettingError


def check_given(tokens: Any, known: Any, batch: int, shape: tuple[int, ...], device: torch.device) -> tuple[Any, Any]:
    """Tokens (B, *shape) and what is known of them (B, N) bool, N = shape[0]; one row of either serves all.

    Raises SettingError.
    """
    given, kept = as_tensor("tokens", tokens, device), as_tensor("known", known, device)
    for what, value, wanted in (("tokens", given, shape), ("known", kept, shape[:1])):
        if value.shape not in (wanted, (1, *wanted), (batch, *wanted)):
            raise SettingError(f"{what} have shape {tuple(value.shape)}: give {wanted} or {(batch, *wanted)}")
    if kept.dtype != torch.bool:
        raise SettingError(f"known has dtype {kept.dtype}: give booleans, True where a token is kept")
    return given.expand(batch, *shape), kept.expand(batch, shape[0])


def check_codes(given: Tensor, kept: Tensor, codes: int) -> Tensor:
    """Tokens (B, N) int64, of which those kept (B, N) are codes. Raises SettingError."""
    whole = not given.is_floating_point() and not given.is_complex() and given.dtype != torch.bool
    given = given.long() if whole else given
    if not whole or bool(((given < 0) | (given >= codes)).logical_and(kept).any()):
        raise SettingError(f"known tokens must be whole numbers in 0..{codes - 1}")
    return given


def check_both(tokens: Any, known: Any) -> bool:
    """Whether tokens are given at all. Raises SettingError where it is only half of them."""
    if (tokens is None) != (known is None):
        raise SettingError("tokens and known belong together: give both, or neither")
    return tokens is not None


def check_left(kept: Tensor) -> None:
    """Raise SettingError where all tokens of a row are kept, (B, L) bool."""
    if bool(kept.all(1).any()):
        raise SettingError("every token of an image is known, nothing is left to sample: unmark some")
