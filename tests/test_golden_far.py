"""Parity with the published FAR code: its outputs with synthetic weights (float32, CPU), through the converter."""

import math
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from vgen.converters.far import convert_far
from vgen.generators.far import FAR

State = dict[str, Tensor]


def residues(name: str, count: int) -> Tensor:
    """Numbers in [-0.5, 0.5) that follow from a name, (count,) float64: the rule of the golden figures."""
    i = torch.arange(count, dtype=torch.int64)
    return ((31 * i * i + 7919 * i + zlib.crc32(name.encode())) % 10007).double() / 10007 - 0.5


def golden_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    r = residues(name, math.prod(shape)).view(shape)
    if name.endswith("embedding_table.weight"):
        return (2 * r).float()
    if len(shape) >= 2:
        return (r * 2 * math.sqrt(3 / math.prod(shape[1:]))).float()
    return (1 + 0.2 * r if name.endswith(".weight") else 0.2 * r).float()


def golden_input(name: str, *shape: int) -> Tensor:
    """A tensor of unit variance, float32."""
    return (residues(name, math.prod(shape)) * math.sqrt(12)).float().view(shape)


def far_layout(
    width: int,
    depth: int,
    *,
    channels: int = 32,
    patch: int = 1,
    head: int = 64,
    classes: int | None = None,
    actions: int | None = None,
    context_patch: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published transformer's tensors."""
    table: dict[str, tuple[int, ...]] = {}

    def put(name: str, rows: int, columns: int) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = (rows, columns), (rows,)

    put("x_embedder", width, channels * patch**2)
    put("timestep_embedder.linear_1", width, 256)
    put("timestep_embedder.linear_2", width, width)
    for kind, count in (("label", classes), ("action", actions)):
        if count is not None:
            table[f"{kind}_embedder.embedding_table.weight"] = (count + 1, width)
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        put(f"{block}.norm1.linear", 3 * width, width)
        names = ["norm_q", "norm_k"] + (["norm_added_q", "norm_added_k"] if context_patch else [])
        table.update({f"{block}.attn.{name}.weight": (head,) for name in names})
        names = ["to_q", "to_k", "to_v", "to_out.0"]
        if context_patch:
            names += ["add_q_proj", "add_k_proj", "add_v_proj"] + (["to_add_out"] if i < depth - 1 else [])
        for name in names:
            put(f"{block}.attn.{name}", width, width)
        put(f"{block}.norm2.linear", 3 * width, width)
        put(f"{block}.mlp.net.0.proj", 4 * width, width)
        put(f"{block}.mlp.net.2", width, 4 * width)
    put("norm_out.linear", 2 * width, width)
    put("proj_out", channels * patch**2, width)
    if context_patch:
        put("context_embedder", width, channels * context_patch**2)
        put("context_proj_out", channels * context_patch**2, width)
    return table


def golden_state(**changes: Any) -> State:
    """The published state of the tiny model: width 32, two blocks, two heads, four channels."""
    layout = far_layout(32, 2, **{"channels": 4, "head": 16} | changes)
    return {name: golden_weight(name, shape) for name, shape in layout.items()}


def golden_model(published: dict[str, Any] | None = None, **overrides: Any) -> FAR:
    return convert_far(golden_state(**published or {}), side=4, **overrides).generator


def assert_figures(found: Tensor, summary: list[float], first: list[float], last: list[float]) -> None:
    """Mean, mean of absolute values and norm; the first and the last values in raster order."""
    values = found.flatten().double()
    figures = [values.mean(), values.abs().mean(), values.norm()]
    assert torch.stack(figures).tolist() == pytest.approx(summary, abs=1e-4, rel=1e-5)
    assert values[: len(first)].tolist() == pytest.approx(first, abs=1e-4)
    assert values[-len(last) :].tolist() == pytest.approx(last, abs=1e-4)


X = golden_input("x", 2, 3, 4, 4, 4)
T = torch.tensor([[-1, -1, 700.5], [1000, 333.25, 1]])
XL = golden_input("xl", 2, 5, 4, 4, 4)
TL = torch.tensor([[-1, -1, -1, -1, 700.5], [-1, -1, -1, 333.25, 1]])
ACTIONS = torch.tensor([[0, 1, 2, 1, 0], [2, 2, 1, 3, 0]])
LONG: dict[str, Any] = {"context_patch": 2, "actions": 3}

G1 = [1.03242, -1.76232, 0.05034, 1.71938, 2.5429, 2.8755, -0.94823, -0.00415]
G2 = [1.12207, 1.40745, 0.74452, 0.1887, -0.49846, -0.72152, -0.94853, 0.92966]
G3 = [1.32069, -3.50965, -1.64383, 0.002, 2.68645, 2.15571, -0.058, 2.95678]
G5 = [-0.42158, 0.59208, 0.02783, -0.35736, 1.42542, 1.04404, 2.03644, 0.43422]
G5L = [1.57171, -0.27452, -1.42841, 1.82599, -1.48472, 3.41836, 0.14701, -2.50067]
G6 = [0.9606, 2.265, 3.12246, 0.67605, -1.13137, 0.18039, 0.04527, 1.63615]


def test_the_rule_gives_the_probes() -> None:
    assert X.flatten()[[0, 2, 3]].tolist() == pytest.approx([-1.449232, 0.612198, -0.056945], abs=1e-6)
    state = golden_state()
    for name, first, last in (("weight", 0.425181, -0.499953), ("bias", -0.048576, 0.053173)):
        values = state[f"x_embedder.{name}"].flatten()
        assert (float(values[0]), float(values[-1])) == pytest.approx((first, last), abs=1e-6)


@torch.no_grad()
def test_all_frames() -> None:
    found = golden_model()(X, T)
    assert_figures(found, [0.240778, 0.994017, 24.27173], G1, [0.27379, -0.40183, 0.86483, 0.73907])


@torch.no_grad()
def test_patches_of_two() -> None:
    found = golden_model({"patch": 2}, patch_size=2)(X, T)
    assert_figures(found, [0.073199, 0.726770, 17.98948], G2, [0.21713, 1.08575, -0.34497, 0.46275])


@torch.no_grad()
def test_classes_the_null_one_included() -> None:
    found = golden_model({"classes": 5})(X, T, class_labels=torch.tensor([2, 5]))[:, -1:]
    assert_figures(found, [0.227636, 1.038342, 14.82113], G3, [-0.81629, -1.04236, 0.19487, 0.82917])


@torch.no_grad()
@pytest.mark.parametrize("configured", [True, False])
def test_scores_that_fall_with_distance(configured: bool) -> None:
    model = golden_model(None, **{"slope": 0.3} if configured else {})
    found = model(X, T) if configured else model(X, T, slope=0.3)
    assert_figures(found, [0.237535, 0.992517, 24.24426], G1, [0.29188, -0.38798, 0.84202, 0.69663])


@torch.no_grad()
def test_far_long_across_its_window() -> None:
    model = golden_model(LONG, window=2)
    found = model(XL, TL, actions=ACTIONS)
    last = [-0.87004, -0.32695, -0.05014, -0.29077]
    assert_figures(found, [0.083293, 1.001686, 32.34597], G5, last)
    assert_figures(found[:, -1:], [0.383386, 1.063295, 15.47037], G5L, last)


@torch.no_grad()
def test_far_long_across_its_window_with_its_cache() -> None:
    """Only the last frame is computed: row 1's fourth frame is noisy, and stored with the time it has."""
    model = golden_model(LONG, window=2)
    found = model(XL, TL, actions=ACTIONS, cache=model.new_cache(2, 5), keep=4)[:, -1:]
    assert_figures(found, [0.383386, 1.063295, 15.47037], G5L, [-0.87004, -0.32695, -0.05014, -0.29077])


@torch.no_grad()
def test_far_long_within_its_window() -> None:
    found = golden_model(LONG, window=2)(XL[:, :2], TL[:, -2:], actions=ACTIONS[:, :2])
    assert_figures(found, [0.174609, 0.975650, 19.14638], G6, [-0.70857, 1.34686, -0.85739, 0.84971])
