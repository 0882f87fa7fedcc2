"""Training a recurrent-depth generator: random depths, truncated gradients, and figures of how well the loop rests."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import write_mnist
from tiny_masked import tiny_tokenizer

import vgen
from vgen.pipelines.raster import GATES
from vgen.training import recurrent
from vgen.training.config import TrainingConfig
from vgen.training.recurrent import LoopTraining, RecurrentTask, draw_depth, likeness, relative_change
from vgen.training.run import build_task, start
from vgen.types import SettingError

MODEL = {"width": 32, "heads": 2, "mlp_width": 48, "recurrences": 4, "rope_base": 100.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vqgan")
    tiny_tokenizer(image_channels=1).save_pretrained(folder)
    return folder


def config(data: Path, tokenizer: Path, **changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "kind": "generator",
        "name": "tiny-recurrent",
        "data": "fashion-mnist",
        "data_root": str(data),
        "family": "recurrent",
        "tokenizer": str(tokenizer),
        "model": MODEL,
        "steps": 4,
        "batch_size": 4,
        "lr": 3e-3,
        "warmup": 2,
        "eval_every": 4,
        "sample_every": 4,
        "save_every": 2,
        "log_every": 1,
    }
    return TrainingConfig(**(settings | changes))


@pytest.fixture
def task(data: Path, tokenizer: Path) -> RecurrentTask:
    found = build_task(config(data, tokenizer))
    assert isinstance(found, RecurrentTask)
    return found


# ---- how often the loop runs


def test_depths_have_the_published_law() -> None:
    """Mean one above the setting, a heavy right tail, and now and then a single recurrence (M6)."""
    rng = torch.Generator().manual_seed(0)
    found = torch.tensor([draw_depth(6, rng) for _ in range(100_000)]).double()
    assert float(found.mean()) == pytest.approx(7, rel=0.02)
    assert float((found == 1).double().mean()) > 0 and float(found.min()) == 1
    assert float((found > 12).double().mean()) > 0.04  # beyond twice the mean
    variance = 6 + 36 * (np.exp(0.25) - 1)  # Poisson's own, and its mean's
    assert float(found.var()) == pytest.approx(variance, rel=0.05)


def test_only_the_last_recurrences_are_differentiated(task: RecurrentTask, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    recur, task.loop = task.model.recur, LoopTraining(shallow_share=0)
    monkeypatch.setattr(task.model, "recur", lambda *given: seen.append(torch.is_grad_enabled()) or recur(*given))
    monkeypatch.setattr(recurrent, "draw_depth", lambda mean, rng: 9)
    tokens, labels = task.batch(np.arange(4), 0)
    task.model.requires_grad_(True).train()
    loss, figures = task.loss(task.model, (tokens, labels), torch.Generator().manual_seed(0))
    assert seen == [False] * 5 + [True] * 4 and float(figures["depth"]) == 9
    loss.backward()
    assert [name for name, p in task.model.named_parameters() if p.grad is None or not p.grad.any()] == []
    seen.clear()
    monkeypatch.setattr(recurrent, "draw_depth", lambda mean, rng: 2)  # short draws are differentiated whole
    task.loss(task.model, (tokens, labels), torch.Generator().manual_seed(0))
    assert seen == [True, True]


@torch.no_grad()
def test_with_a_lag_later_tokens_begin_later(task: RecurrentTask) -> None:
    """No token is behind one that follows it, the first is often ahead of the last, and all states are real ones."""
    inputs = task.model.inputs(*(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)))
    state = task.model.random_state(2, 4, torch.Generator().manual_seed(0))
    waits = []
    for seed in range(20):
        found = task._advance(state, inputs, 5, True, torch.Generator().manual_seed(seed))
        still = (found == state).all(-1)[0]
        waits.append(still)
        assert bool((still[1:] | ~still[:-1]).all())  # those that never began are the last
    assert any(bool(still.any()) for still in waits) and not all(bool(still.all()) for still in waits)
    without = task._advance(state, inputs, 5, False, torch.Generator().manual_seed(0))
    assert torch.equal(without, task.model(inputs, state, 5).state)


def test_settings_of_the_loop_change_the_loss(task: RecurrentTask, data: Path, tokenizer: Path) -> None:
    """Each of them does something, and a step depends on its random stream alone."""
    batch = task.batch(np.arange(4), 0)

    def loss(**loop: Any) -> float:
        off = {"shallow_share": 0, "lag_share": 0, "noise_share": 0}
        found = build_task(config(data, tokenizer, loop=off | loop))
        return float(found.loss(found.model, batch, torch.Generator().manual_seed(3))[0])

    plain = loss()
    assert plain == loss()
    for changes in ({"shallow_share": 1}, {"noise_share": 1}, {"rest_weight": 1.0}):
        assert loss(**changes) != plain, changes
    assert loss(lag_share=1, backprop_depth=1) != loss(backprop_depth=1)


@torch.no_grad()
def test_early_readouts_are_after_any_number_of_recurrences(
    data: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the last, differentiated ones: the first recurrence is what the gate "shallow" is about."""
    task = build_task(config(data, tokenizer, loop={"shallow_share": 1, "backprop_depth": 2}))
    assert isinstance(task, RecurrentTask)
    batch, seen, after = task.batch(np.arange(4), 0), [], task._after
    inputs = task.model.inputs(*batch[:2])

    def spy(model: Any, inputs: torch.Tensor, depth: int, rng: torch.Generator) -> torch.Tensor:
        seen.append(depth)
        return after(model, inputs, depth, rng)

    monkeypatch.setattr(task, "_after", spy)
    for seed in range(30):
        task.loss(task.model, batch, torch.Generator().manual_seed(seed))
    assert {1, 2, 3} <= set(seen)
    for depth in (1, 2, 5):
        state = task.model.random_state(*inputs.shape, torch.Generator().manual_seed(7))
        found = after(task.model, inputs, depth, torch.Generator().manual_seed(7))
        assert torch.equal(found, task.model(inputs, state, depth).logits)


# ---- figures


def test_change_and_likeness() -> None:
    state = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    assert torch.allclose(relative_change(state, torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])), torch.tensor([[1.0, 0.5]]))
    assert float(likeness(state)) == pytest.approx(0.8)  # of (3, 4) and (0, 2)
    assert float(likeness(torch.ones(1, 5, 3))) == pytest.approx(1)
    assert float(likeness(torch.eye(4)[None])) == pytest.approx(0)


@torch.no_grad()
def test_held_out_figures_are_of_the_depths_they_name(task: RecurrentTask) -> None:
    model = task.model
    tokens, labels = torch.from_numpy(task.test_tokens[:6].astype(np.int64)), task.test_labels[:6]
    found = task.test_losses(tokens, labels, 0)
    inputs, rng = model.inputs(tokens, labels), torch.Generator().manual_seed(0)
    first, second = (model.random_state(*inputs.shape, rng) for _ in range(2))
    for name, depth in (("test_loss", 4), ("test_loss_shallow", 1), ("test_loss_deeper", 8)):
        logits = model(inputs, first, depth).logits.log_softmax(-1)
        wanted = -logits.gather(-1, tokens[..., None])[..., 0].mean(1)
        assert torch.allclose(found[name], wanted, atol=1e-5)
    tops = [model(inputs, state, 4).logits.argmax(-1) for state in (first, second)]
    assert torch.allclose(found["test_agreement"], (tops[0] == tops[1]).float().mean(1))
    assert all(values.shape == (6,) for values in found.values())


# ---- a run


@pytest.fixture(scope="module")
def run(data: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    start(config(data, tokenizer, sample_settings={"inner_recurrences": 4}), folder)
    return folder


def test_a_finished_run_is_a_model_with_its_gates(run: Path) -> None:
    pipe = vgen.load(run / "model")
    assert set(pipe.config["gates"]) == set(GATES)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for line in lines for key, value in line.items()}
    assert pipe.config["gates"]["residual"] == last["test_residual"]
    assert pipe.config["gates"]["deeper"] == pytest.approx(last["test_loss_deeper"] - last["test_loss"])
    assert pipe.resolve_settings({})["inner_recurrences"] == 4
    with pytest.warns(vgen.types.ModelWarning):
        images = pipe(class_labels=[0, 1], seeds=[0, 1]).images
    assert len(images) == 2
    text = (run / "model" / "README.md").read_text()
    assert "test_residual" in text


def test_a_resumed_run_equals_an_unbroken_one(run: Path, data: Path, tokenizer: Path, tmp_path: Path) -> None:
    start(config(data, tokenizer, sample_settings={"inner_recurrences": 4}, save_every=1, keep=4), tmp_path / "out")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / f"step-{step:08}")
    shutil.rmtree(tmp_path / "out" / "model")
    start(config(data, tokenizer, sample_settings={"inner_recurrences": 4}), tmp_path / "out", resume=True)
    ours, theirs = (
        load_file(folder / "model" / "generator" / "diffusion_pytorch_model.safetensors")
        for folder in (run, tmp_path / "out")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loop": {"backprop_depth": 0}}, "loop.backprop_depth is 0"),
        ({"loop": {"noise": 2}}, "loop.noise is 2"),
        ({"loop": {"rest_weight": -1}}, "loop.rest_weight is -1"),
        ({"loop": {"shallow": 1}}, "unknown setting 'loop.shallow': did you mean 'shallow_"),
        ({"model": MODEL | {"recurrencs": 1}}, "model settings of tiny-recurrent"),
        ({"sample_settings": {"inner_recurrences": 3}}, "which does not divide recurrences 4"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_step(
    data: Path, tokenizer: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingError, match=says):
        build_task(config(data, tokenizer, **changes))


def test_loop_settings_are_for_recurrent_models_alone(data: Path, tokenizer: Path) -> None:
    with pytest.raises(SettingError, match="loop settings serve the family 'recurrent', not 'masked'"):
        config(data, tokenizer, family="masked", loop={"noise": 0.1})


def test_training_goes_on_with_more_recurrences_but_no_other_shape(
    run: Path, data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    model = MODEL | {"recurrences": MODEL["recurrences"] + 2}
    further = config(data, tokenizer, init_from=str(run / "model"), model=model)
    task = build_task(further)
    ours = load_file(run / "model" / "generator" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(task.model.state_dict()[name], value.float()) for name, value in ours.items())
    assert task.model.config["recurrences"] == model["recurrences"]
    with pytest.raises(SettingError, match="whose heads is"):
        build_task(config(data, tokenizer, init_from=str(run / "model"), model=MODEL | {"heads": 1}))
