"""Muon orthogonalises its momentum, in whatever type the device is fast in."""

import pytest
import torch
from torch import Tensor, nn

from vgen.training import muon as module
from vgen.training.muon import Muon, orthogonalise
from vgen.training.precision import autocast_type, has_bfloat16

SHAPES = [(24, 8), (8, 8), (8, 24), (8, 24)]


def matrices(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    for parameter, gradient in zip(parameters, matrices(seed), strict=True):
        parameter.grad = gradient.detach().to(parameter.dtype)


@pytest.mark.parametrize("shape", [(5, 30, 10), (5, 10, 30), (5, 10, 10)])
def test_singular_vectors_stay_and_values_come_near_one(shape: tuple[int, int, int]) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    given = left @ torch.diag_embed(values.clamp_min(0.05 * values.amax())) @ right
    found = orthogonalise(given)
    assert found.shape == given.shape and found.dtype == torch.float64
    inner = left.mT @ found @ right.mT
    assert torch.allclose(inner, torch.diag_embed(inner.diagonal(dim1=1, dim2=2)), atol=1e-9)
    kept = inner.diagonal(dim1=1, dim2=2)
    assert float(kept.min()) > 0.6 and float(kept.max()) < 1.3


def test_many_matrices_at_a_time_are_each_alone() -> None:
    given = torch.randn(4, 12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = orthogonalise(given)
    for alone, row in zip(given, found, strict=True):
        assert torch.allclose(orthogonalise(alone[None])[0], row, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_are_those_of_torch_but_for_its_bfloat16(decay: float) -> None:
    ours, theirs = matrices(), matrices()
    optimizers = [
        Muon(ours, 0.02, decay, dtype=torch.bfloat16),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
    ]
    start = [parameter.detach().clone() for parameter in ours]
    for step in range(4):
        give_gradients(ours, step + 1)
        give_gradients(theirs, step + 1)
        for optimizer in optimizers:
            optimizer.step()
    for a, b, first in zip(ours, theirs, start, strict=True):
        assert float((a - b).detach().norm()) < 0.03 * float((b - first).detach().norm())


def test_an_update_is_as_large_as_one_of_adamw() -> None:
    """Root mean square 0.2 lr, for singular values of 1."""
    parameter = nn.Parameter(torch.zeros(16, 64))
    parameter.grad = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    Muon([parameter], 0.1).step()
    assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.2 * 0.1, rel=0.2)


def test_iterations_run_in_bfloat16_only_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def note(given: Tensor) -> Tensor:
        seen.append(given.dtype)
        return given

    monkeypatch.setattr(module, "orthogonalise", note)
    for native in (True, False):
        monkeypatch.setattr(module, "has_bfloat16", lambda device, native=native: native)
        parameters = matrices()
        give_gradients(parameters, 1)
        optimizer = Muon(parameters, 0.1)
        optimizer.step()
        assert set(seen) == {torch.bfloat16 if native else torch.float32}
        seen.clear()


def test_matrices_without_a_gradient_are_left_alone() -> None:
    parameters = matrices()
    give_gradients(parameters, 1)
    parameters[0].grad = None
    before = parameters[0].detach().clone()
    Muon(parameters, 0.1, 0.5).step()
    assert torch.equal(parameters[0], before)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices.*\(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], 0.1)


def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for known, wanted in (
        ({"avx2": True}, "no"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": False}, "no"),
        ({"bf16": True}, "bf16"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        has_bfloat16.cache_clear()
        assert autocast_type("auto", cpu) == wanted
        assert autocast_type("bf16", cpu) == "bf16"
        assert autocast_type("no", cpu) == "no"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    has_bfloat16.cache_clear()
    assert autocast_type("auto", cpu) == "no"  # older torch does not tell
    assert autocast_type("auto", torch.device("meta")) == "no"
    has_bfloat16.cache_clear()
