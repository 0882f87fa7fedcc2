"""The Mamba-2 scan: three ways to one recurrence, its state in the caller's hands, kernels that may not be there."""

import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ROOT, python
from torch import Tensor

import vgen.scan
from vgen.scan import CHUNK, METHODS, VARIABLE, choose, chunked, kernels, report, scan, sequential
from vgen.types import SettingError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OURS = ["sequential", "chunked"]
LENGTHS = [1, 2, 3, 15, 16, 17, 64, 65, 130]
Inputs = dict[str, Tensor]


def inputs(
    length: int,
    batch: int = 2,
    heads: int = 3,
    width: int = 4,
    size: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """What `scan` takes, with states that last for about ten tokens; in bfloat16 what must be wide is float32."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": torch.randn(batch, length, heads, width, generator=rng, dtype=torch.float64).to(dtype),
        "dt": torch.rand(batch, length, heads, generator=rng, dtype=torch.float64).mul(0.3).to(wide),
        "A": -torch.rand(heads, generator=rng, dtype=torch.float64).add(0.2).to(wide),
        "B": torch.randn(batch, length, size, generator=rng, dtype=torch.float64).to(dtype),
        "C": torch.randn(batch, length, size, generator=rng, dtype=torch.float64).to(dtype),
        "D": torch.randn(heads, generator=rng, dtype=torch.float64).to(wide),
        "state": torch.randn(batch, heads, width, size, generator=rng, dtype=torch.float64).to(wide),
    }


def as_float64(given: Inputs) -> Inputs:
    return {name: tensor.double() for name, tensor in given.items()}


def tokens(given: Inputs, part: slice) -> Inputs:
    """Some of the tokens, without the state."""
    rest = {name: given[name] for name in ("A", "D")}
    return {name: given[name][:, part] for name in ("x", "dt", "B", "C")} | rest


def by_sums(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every pair of tokens by itself: what s wrote, decayed by every step after s up to t, read at t."""
    batch, length, heads, width = x.shape
    first = x.new_zeros(batch, heads, width, B.shape[-1]) if state is None else state
    y, last = torch.zeros_like(x), first.clone()
    for t in range(length):
        last = torch.zeros_like(first)
        for s in range(-1, t + 1):
            decay = math.e ** (dt[:, s + 1 : t + 1].sum(1) * A)  # (b, H)
            written = first if s < 0 else torch.einsum("bh,bhp,bn->bhpn", dt[:, s], x[:, s], B[:, s])
            last = last + decay[:, :, None, None] * written
        y[:, t] = torch.einsum("bhpn,bn->bhp", last, C[:, t]) + (0 if D is None else D[:, None] * x[:, t])
    return y, last


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], atol: float) -> None:
    """Output and state."""
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=atol)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max())


# ---- one recurrence


@pytest.mark.parametrize("leave_out", [(), ("D",), ("state",), ("D", "state")], ids=str)
@pytest.mark.parametrize("method", OURS)
def test_each_method_is_the_sum_over_pairs_of_tokens(method: str, leave_out: tuple[str, ...]) -> None:
    for shape in ({}, {"batch": 1, "heads": 1, "width": 1, "size": 1}, {"batch": 3, "heads": 2, "width": 7, "size": 3}):
        for length in (1, 2, 9, CHUNK + 3):
            given = inputs(length, **shape)
            for name in leave_out:
                del given[name]
            assert_same(scan(**given, method=method), by_sums(**given), 1e-10)


@pytest.mark.parametrize("size", [1, 3, 16, 64])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_of_any_size_are_the_recurrence(length: int, size: int) -> None:
    for shape in ({}, {"heads": 1}, {"batch": 1, "width": 16, "size": 2}):
        given = inputs(length, **shape)
        del given["D"]
        assert_same(chunked(**given, size=size), sequential(**given), 1e-10)


@pytest.mark.parametrize("method", OURS)
def test_no_tokens_leave_the_state_as_it_is(method: str) -> None:
    given = inputs(0)
    y, state = scan(**given, method=method)
    assert y.shape == (2, 0, 3, 4) and torch.equal(state, given["state"])
    y, state = scan(**(given | {"state": None}), method=method)
    assert y.shape == (2, 0, 3, 4) and torch.equal(state, torch.zeros(2, 3, 4, 5, dtype=torch.float64))


SPLITS = {
    "one token at a time": list(range(71)),
    "in two": [0, 33, 70],
    "with an empty piece": [0, 0, 20, 20, 70, 70],
    "as scales grow": [0, 1, 5, 14, 30, 55, 70],
    "at the bounds of chunks": [0, CHUNK, 70],
}


@pytest.mark.parametrize("ends", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("method", OURS)
def test_a_sequence_in_pieces_is_the_sequence(method: str, ends: list[int]) -> None:
    given = inputs(70)
    outputs, state = [], given["state"]
    for start, stop in pairwise(ends):
        y, state = scan(**tokens(given, slice(start, stop)), state=state, method=method)
        outputs.append(y)
    assert_same((torch.cat(outputs, dim=1), state), scan(**given, method=method), 1e-12)


@pytest.mark.parametrize("method", OURS)
def test_what_was_given_is_not_written_to(method: str) -> None:
    given = inputs(70)
    before = {name: tensor.clone() for name, tensor in given.items()}
    scan(**given, method=method)
    assert all(torch.equal(given[name], before[name]) for name in given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changed", ["x", "dt", "B", "C"])
@pytest.mark.parametrize("method", OURS)
def test_later_tokens_leave_earlier_outputs_bit_for_bit(method: str, changed: str, dtype: torch.dtype) -> None:
    given = inputs(70, dtype=dtype)
    y = scan(**given, method=method)[0]
    for position in (1, 40, CHUNK, 69):
        other = given[changed].clone()
        other[:, position:] += 1
        after = scan(**(given | {changed: other}), method=method)[0]
        assert torch.equal(after[:, :position], y[:, :position])
        assert (after[:, position] != y[:, position]).any()


@pytest.mark.parametrize("method", OURS)
def test_a_row_of_a_batch_is_its_solo_run(method: str) -> None:
    given = inputs(70, batch=4)
    together = scan(**given, method=method)
    for row in range(4):
        solo = {name: tensor if name in "AD" else tensor[row : row + 1] for name, tensor in given.items()}
        assert_same(scan(**solo, method=method), tuple(part[row : row + 1] for part in together), 1e-14)


# ---- gradients


def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three tokens, so that few tokens are many chunks."""
    monkeypatch.setattr(vgen.scan, "chunked", partial(chunked, size=3))


@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("method", OURS)
def test_gradients_are_those_of_small_differences(monkeypatch: pytest.MonkeyPatch, method: str, length: int) -> None:
    several_chunks(monkeypatch)
    given = inputs(length, heads=2, width=2, size=3)
    leaves = tuple(tensor.requires_grad_() for tensor in given.values())
    assert torch.autograd.gradcheck(lambda *leaves: scan(*leaves, method=method), leaves)


def gradients(given: Inputs, method: str) -> Inputs:
    """Of a random mixture of outputs and final state."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    rng = torch.Generator().manual_seed(1)
    mixed = sum(
        (part * torch.randn(part.shape, generator=rng, dtype=torch.float64)).sum()
        for part in scan(**leaves, method=method)
    )
    assert isinstance(mixed, Tensor)
    return dict(zip(leaves, torch.autograd.grad(mixed, list(leaves.values())), strict=True))


@pytest.mark.parametrize("length", [5, 130])
def test_gradients_of_both_methods_agree(length: int) -> None:
    given = inputs(length)
    ours, wanted = gradients(given, "chunked"), gradients(given, "sequential")
    for name in given:
        torch.testing.assert_close(ours[name], wanted[name], rtol=0, atol=1e-10)
        assert wanted[name].abs().max() > 0


# ---- limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", OURS)
def test_where_all_is_forgotten_each_token_reads_itself_alone(method: str, dtype: torch.dtype) -> None:
    """exp(dt A) is 0; its inverse, which future tokens would be weighted with, is beyond any number."""
    given = inputs(70, dtype=dtype)
    given["A"] = torch.full_like(given["A"], -1e4)
    given["dt"] = given["dt"] + 1
    y, state = scan(**given, method=method)
    scaled = given["dt"][..., None] * given["x"]
    wanted = scaled * (given["B"] * given["C"]).sum(-1)[..., None, None] + given["D"][:, None] * given["x"]
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(state, scaled[:, -1, :, :, None] * given["B"][:, -1, None, None], rtol=0, atol=1e-5)
    found = gradients(given, method)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert not found["state"].any() and found["x"].abs().amin(-1).all()


@pytest.mark.parametrize("method", OURS)
def test_steps_of_size_zero_write_and_forget_nothing(method: str) -> None:
    given = inputs(70)
    given["dt"] = torch.zeros_like(given["dt"])
    y, state = scan(**given, method=method)
    assert torch.equal(state, given["state"])
    read = torch.einsum("bhpn,btn->bthp", given["state"], given["C"])
    torch.testing.assert_close(y, read + given["D"][:, None] * given["x"], rtol=0, atol=1e-12)
    found = gradients(given, method)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["dt"].abs().max() > 0, "a first step away from zero does something"


# ---- precision

BOUNDS = {"sequential float32": 1e-6, "chunked float32": 1e-6, "sequential bfloat16": 1e-6, "chunked bfloat16": 5e-3}


@pytest.mark.parametrize(("run", "bound"), BOUNDS.items(), ids=BOUNDS.keys())
def test_rounding_stays_small(run: str, bound: float) -> None:
    """Against float64 on the same numbers, relative to the largest; states and step sizes are never below float32."""
    method, dtype = run.split()
    given = inputs(200, heads=4, width=16, size=16, dtype=getattr(torch, dtype))
    y, state = scan(**given, method=method)
    assert y.dtype == state.dtype == torch.float32
    exact = scan(**as_float64(given), method="sequential")
    assert relative_error(y, exact[0]) < bound and relative_error(state, exact[1]) < bound


@pytest.mark.parametrize("method", OURS)
def test_outputs_and_states_are_at_least_float32(method: str) -> None:
    for dtype, wanted in [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2]:
        for length in (0, 3):
            for left_out in ({}, {"state": None}, {"D": None}):
                y, state = scan(**(inputs(length, dtype=dtype) | left_out), method=method)
                assert y.dtype == state.dtype == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", OURS)
def test_autocast_changes_nothing(method: str, dtype: torch.dtype) -> None:
    given = inputs(70, dtype=dtype)
    wanted = scan(**given, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scan(**given, method=method)
    assert all(torch.equal(ours, other) for ours, other in zip(found, wanted, strict=True))


# ---- which method


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """mamba-ssm is not installed, whatever this machine has."""
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels.cache_clear()
    yield
    kernels.cache_clear()


def took(monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """The method that a scan went by."""
    seen: list[str] = []
    for name in OURS:
        way = getattr(vgen.scan, name)
        monkeypatch.setattr(vgen.scan, name, lambda *given, name=name, way=way: seen.append(name) or way(*given))
    scan(**inputs(3), **options)
    (name,) = seen
    return name


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize("method", OURS)
def test_the_method_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setenv(VARIABLE, "sequential" if method == "chunked" else "chunked")
    assert choose(method, CPU) == method
    assert took(monkeypatch, method=method) == method


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize(
    ("variable", "wanted"), [("", "chunked"), ("auto", "chunked"), *((name, name) for name in OURS)]
)
def test_the_environment_says_what_auto_means(monkeypatch: pytest.MonkeyPatch, variable: str, wanted: str) -> None:
    assert choose("auto", CPU) == choose("auto", CUDA) == "chunked"
    monkeypatch.setenv(VARIABLE, variable)
    assert choose("auto", CPU) == wanted
    assert took(monkeypatch) == wanted
    assert report()["method"] == wanted


@pytest.mark.usefixtures("absent")
def test_an_unknown_method_is_named_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = f"use one of {', '.join(METHODS)}"
    with pytest.raises(SettingError, match=f"unknown scan method 'blelloch': {choices}"):
        scan(**inputs(3), method="blelloch")
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(SettingError, match=f"unknown {VARIABLE}=triton: {choices}"):
        scan(**inputs(3))


@pytest.mark.usefixtures("absent")
def test_without_the_package_it_is_refused_by_name_and_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", CPU) == choose("auto", CUDA) == "chunked"
        with pytest.raises(SettingError, match=r"scan method 'mamba-ssm' .*mamba-ssm is not installed: use chunked"):
            scan(**inputs(3), method="mamba-ssm")
        monkeypatch.setenv(VARIABLE, "mamba-ssm")
        with pytest.raises(SettingError, match=f"{VARIABLE}=mamba-ssm .*mamba-ssm is not installed: use chunked"):
            scan(**inputs(3))


@pytest.mark.usefixtures("absent")
def test_the_report_says_what_serves_and_who_chose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"method": "chunked", "chosen_by": "what works here", "mamba_ssm": "mamba-ssm is not installed"}
    assert report() == told
    monkeypatch.setenv(VARIABLE, "sequential")
    assert report() == told | {"method": "sequential", "chosen_by": f"{VARIABLE}=sequential"}


# ---- a package that is there but does not work

Install = Callable[..., Path]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, absent: None) -> Iterator[Install]:
    """Write a package `mamba_ssm`, found before any real one: what its import does, and what its kernels' does."""

    def write(top: str = "", kernels: str = "") -> Path:
        folder = tmp_path / "site" / "mamba_ssm" / "ops" / "triton"
        folder.mkdir(parents=True)
        for package, code in zip((folder.parents[1], folder.parent, folder), (top, "", ""), strict=True):
            (package / "__init__.py").write_text(code)
        (folder / "ssd_combined.py").write_text(kernels)
        monkeypatch.delitem(sys.modules, "mamba_ssm")
        monkeypatch.syspath_prepend(tmp_path / "site")
        return tmp_path / "site"

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


BROKEN = {
    "an extension that is not there": "raise ImportError('libcudart.so.12: no such file')",
    "a missing symbol": "raise OSError('selective_scan_cuda.so: undefined symbol: _ZN3c104impl3cowE')",
    "a message of many lines": "raise RuntimeError('0 active drivers\\n  ([]).\\nThere should be only one.')",
}
SAYS = ["libcudart.so.12: no such file", "undefined symbol: _ZN3c104impl3cowE", "0 active drivers ([]). There should"]


@pytest.mark.parametrize("where", ["top", "kernels"])
@pytest.mark.parametrize(("code", "says"), zip(BROKEN.values(), SAYS, strict=True), ids=BROKEN.keys())
def test_a_package_that_cannot_be_imported_is_warned_of_once(
    install: Install, where: str, code: str, says: str
) -> None:
    install(**{where: code})
    with pytest.warns(UserWarning) as caught:
        assert [choose("auto", CUDA) for _ in range(3)] == ["chunked"] * 3
        with pytest.raises(SettingError) as refused:
            choose("mamba-ssm", CUDA)
    (warning,) = [str(item.message) for item in caught]
    for message in (warning, str(refused.value)):
        assert says in message and "\n" not in message
    assert "scanning in chunks instead" in warning


def test_kernels_need_cuda_and_are_not_even_imported_without(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(top="raise SystemExit('imported')")
    wanted = scan(**inputs(3), method="chunked")
    with pytest.warns(UserWarning) as caught:
        assert took(monkeypatch) == "chunked"
        assert_same(scan(**inputs(3)), wanted, 0)
        with pytest.raises(SettingError, match=r"scan method 'mamba-ssm'.*need CUDA.* on cpu.*: use chunked"):
            scan(**inputs(3), method="mamba-ssm")
    assert len(caught) == 1 and "need CUDA, these tensors are on cpu" in str(caught[0].message)


def test_the_report_tells_of_a_broken_package_without_a_warning(install: Install) -> None:
    install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = report()
    assert found["method"] == "chunked"
    assert "mamba-ssm is installed but cannot be used" in found["mamba_ssm"] and "CUDA" in found["mamba_ssm"]


def test_importing_the_scan_imports_no_kernels(install: Install, tmp_path: Path) -> None:
    site = install(top="raise SystemExit('imported')")
    code = "import sys, vgen.scan, vgen.generators.mvar; assert 'mamba_ssm' not in sys.modules; print('clean')"
    done = python("-c", code, cwd=tmp_path, path=[site, ROOT])
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr


# ---- kernels that are called as mamba-ssm's are


@torch.autocast("cpu", enabled=False)  # which kernels never notice
def grouped_kernels(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """mamba-ssm's signature and conventions: groups of heads share B and C, (b, T, G, N); y has x's dtype."""
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    assert dt.shape == (batch, length, heads) and A.shape == (heads,)
    assert B.shape == C.shape == (batch, length, groups, size)
    assert all(tensor.is_contiguous() for tensor in (x, dt, A, B, C))
    assert chunk_size & (chunk_size - 1) == 0, "a power of two"
    assert D is z is dt_bias is seq_idx is cu_seqlens is None
    assert not dt_softplus and not return_varlen_states and dt_limit == (0.0, math.inf)
    state = torch.zeros(batch, heads, width, size)
    if initial_states is not None:
        assert initial_states.shape == state.shape and initial_states.is_contiguous()
        state = initial_states.float()
    B, C = (tensor.repeat_interleave(heads // groups, dim=2).float() for tensor in (B, C))
    outputs = []
    for t in range(length):
        written = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t].float(), B[:, t])
        state = torch.einsum("bh,bhpn->bhpn", torch.exp(dt[:, t] * A), state) + written
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]).to(x.dtype))
    y = torch.stack(outputs, dim=1)
    return (y, state) if return_final_states else y


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that work on this machine."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(vgen.scan, "kernels", lambda device: (grouped_kernels, ""))


@pytest.mark.usefixtures("working")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("leave_out", [(), ("D",), ("state",)], ids=str)
def test_kernels_are_called_by_their_conventions(leave_out: tuple[str], dtype: torch.dtype, bound: float) -> None:
    """From strided inputs, as a split of the projection gives them, and with the state in and out."""
    given = inputs(70, dtype=dtype)
    given |= {name: given[name].mT.contiguous().mT for name in ("x", "dt", "B", "C", "state")}
    for name in leave_out:
        del given[name]
    found = scan(**given, method="mamba-ssm")
    assert found[0].dtype == found[1].dtype == torch.float32
    for ours, exact in zip(found, scan(**as_float64(given), method="sequential"), strict=True):
        assert relative_error(ours, exact) < bound
    assert_same(scan(**given), found, 0)
    assert report() == {"method": "mamba-ssm", "chosen_by": "what works here", "mamba_ssm": "works"}


def spoiled(output: float = 1, state: float = 1, **changes: Any) -> Callable[..., Any]:
    """Kernels that change what they are given, or what they give, by a factor."""

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, **options}
        y, last = grouped_kernels(**given | {name: change(given) for name, change in changes.items()})
        return y * output, last * state

    return run


WRONG: dict[str, Callable[..., Any]] = {
    "output off by a fiftieth": spoiled(output=1.02),
    "state off by a fiftieth": spoiled(state=0.98),
    "output not a number": spoiled(output=math.nan),
    "state not a number": spoiled(state=math.nan),
    "the given state ignored": spoiled(initial_states=lambda given: torch.zeros_like(given["initial_states"])),
    "the given state transposed": spoiled(initial_states=lambda given: given["initial_states"].mT.contiguous()),
    "rates ignored": spoiled(A=lambda given: torch.zeros_like(given["A"])),
    "step sizes softened again": spoiled(dt=lambda given: torch.nn.functional.softplus(given["dt"])),
    "B read and C written": spoiled(B=lambda given: given["C"], C=lambda given: given["B"]),
    "the last token not seen": spoiled(x=lambda given: given["x"] * (torch.arange(20) < 19)[:, None, None]),
}


@pytest.mark.parametrize("found", WRONG.values(), ids=WRONG.keys())
def test_kernels_that_disagree_are_refused(found: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="is off by"):
        vgen.scan._try(found, CPU)


@pytest.mark.parametrize("error", [0, 1e-3])
def test_kernels_that_agree_within_their_rounding_are_taken(error: float) -> None:
    vgen.scan._try(spoiled(output=1 + error, state=1 - error), CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_trial_is_not_disturbed_by_autocast(dtype: torch.dtype) -> None:
    """The first scan of a training run in mixed precision is where it takes place."""
    with torch.autocast("cpu", dtype=dtype), pytest.MonkeyPatch.context() as strict:
        strict.setattr(vgen.scan, "TOLERANCE", 1e-5)
        vgen.scan._try(grouped_kernels, CPU)


# ---- the published reference, where mamba-ssm is installed


def published(module: str, name: str) -> Callable[..., Any]:
    """A pure PyTorch function of mamba-ssm, whose modules do not import everywhere."""
    try:
        return getattr(importlib.import_module(f"mamba_ssm.{module}"), name)
    except Exception as error:
        pytest.skip(f"mamba-ssm cannot be imported: {type(error).__name__}: {error}"[:200])


def test_mamba_ssms_selective_scan_agrees() -> None:
    """Mamba-1's reference with one rate per head; it computes in float32 and begins at zero."""
    reference = published("ops.selective_scan_interface", "selective_scan_ref")
    given = inputs(130, width=8, size=16, dtype=torch.float32)
    del given["state"]
    channels = {name: given[name].repeat_interleave(8, -1) for name in ("dt", "A", "D")}  # (..., H P)
    y, state = reference(
        given["x"].flatten(2).mT,
        channels["dt"].mT,
        channels["A"][:, None].expand(-1, 16),
        given["B"].mT,
        given["C"].mT,
        channels["D"],
        return_last_state=True,
    )
    wanted = y.mT.unflatten(-1, (3, 8)), state.unflatten(1, (3, 8))
    for method in OURS:
        assert_same(scan(**given, method=method), wanted, 1e-5)


def test_mamba_ssms_minimal_duality_agrees() -> None:
    reference = published("modules.ssd_minimal", "ssd_minimal_discrete")
    given = inputs(128)
    heads = {name: given[name][:, :, None].expand(-1, -1, 3, -1) for name in ("B", "C")}
    scaled, steps = given["x"] * given["dt"][..., None], given["dt"] * given["A"]
    y, state = reference(scaled, steps, heads["B"], heads["C"], 32, initial_states=given["state"][:, None])
    for method in OURS:
        assert_same(scan(**given, method=method), (y + given["D"][:, None] * given["x"], state), 1e-10)
