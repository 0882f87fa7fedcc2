"""Training masked generators: laws of masking, the loss against its definition, and a run from tokens to images."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tiny import generator_config, write_mnist
from tiny_masked import P_BOUND, Table, dirichlet_table, goodness, tiny_tokenizer
from tiny_models import randomise
from torch import Tensor, nn

import vgen
from vgen.generators.masked import MaskedTransformer
from vgen.pipelines.masked import MaskedPipeline
from vgen.training.config import TrainingConfig, load_config
from vgen.training.masked import masked_counts, random_mask
from vgen.training.run import build_task, start
from vgen.types import SettingError

MODEL = {"width": 16, "depth": 3, "heads": 2, "train_tied_head": True}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process; each test is a process of its own to it."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random tokenizer of grey images, 16 tokens of 12 codes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(image_channels=1).save_pretrained(folder)
    return folder


Make = Callable[..., TrainingConfig]


@pytest.fixture
def make(data: Path, tokenizer: Path) -> Make:
    def config(**changes: Any) -> TrainingConfig:
        settings = {"family": "masked", "name": "tiny-masked", "model": MODEL, "optimizer": "adamw", "lr": 1e-2}
        return generator_config(data, tokenizer, **settings | changes)

    return config


# ---- how many tokens are masked, and which


def shares_up_to(law: str, number: int, draws: int = 40_000) -> list[float]:
    """P(count <= k) for k = 1..N, over numbers evenly spread in [0, 1)."""
    counts = masked_counts(law, (torch.arange(draws) + 0.5) / draws, number)
    assert counts.dtype == torch.int64 and counts.min() >= 1 and counts.max() <= number
    return (torch.bincount(counts, minlength=number + 1)[1:].cumsum(0) / draws).tolist()


@pytest.mark.parametrize("number", [1, 16, 49])
def test_counts_have_the_law_asked_for(number: int) -> None:
    edges = [min((k + 0.5) / number, 1) for k in range(1, number + 1)]  # shares that round to k or less
    assert shares_up_to("uniform", number) == pytest.approx([k / number for k in range(1, number + 1)], abs=1e-4)
    cosine = [1 - 2 / math.pi * math.acos(edge) for edge in edges]
    assert shares_up_to("cosine", number) == pytest.approx(cosine, abs=1e-4)
    beta = [sum(math.comb(14, j) * x**j * (1 - x) ** (14 - j) for j in (12, 13, 14)) for x in edges]  # Beta(12, 3)
    assert shares_up_to("beta", number) == pytest.approx(beta, abs=1e-3)


def test_the_ends_of_the_laws() -> None:
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert masked_counts("uniform", ends, 49).tolist() == [1, 49]
    assert masked_counts("cosine", ends, 49).tolist() == [49, 1]
    low, high = masked_counts("beta", ends, 49).tolist()
    assert 1 <= low < 10 and high == 49


def test_masks_have_exact_counts_at_uniform_places() -> None:
    rng = torch.Generator().manual_seed(0)
    counts = torch.arange(1, 17).repeat(3)
    masks = random_mask(counts, 16, rng)
    assert masks.dtype == torch.bool and torch.equal(masks.sum(1), counts)
    pairs = random_mask(torch.full((20_000,), 2), 5, rng)
    found = torch.bincount((pairs * 2 ** torch.arange(5)).sum(1), minlength=32)
    assert (found > 0).sum() == 10 and goodness(found[found > 0], torch.full((10,), 0.1)) > P_BOUND


# ---- the loss


class Noted(nn.Module):
    """Passes on what a generator is given, and notes it and what it gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(tokens, labels)
        self.calls.append((tokens, labels, logits))
        return logits


def batch_of(task: Any, size: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    number, codes = task.model.config["num_tokens"], task.model.config["vocab_size"]
    return torch.randint(codes, (size, number), generator=rng), torch.arange(size) % 3


@pytest.mark.parametrize("law", ["uniform", "cosine", "beta"])
def test_the_loss_is_the_mean_over_samples_of_their_masked_tokens(make: Make, law: str) -> None:
    """Or over all masked tokens alike. Counts are stratified: of a batch of N no two are equal under the uniform."""
    for weight in ("1/t", "uniform"):
        task: Any = build_task(make(mask_law=law, mask_weight=weight))
        tokens, labels = batch_of(task, 16)
        model = Noted(randomise(task.model))
        loss, _ = task.training_loss(model, tokens, labels, torch.Generator().manual_seed(1))
        ((given, classes, logits),) = model.calls
        masked = given == task.model.mask_token_id
        assert torch.equal(given[~masked], tokens[~masked]) and torch.equal(classes, labels)
        losses = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        means = [losses[row][masked[row]].mean() for row in range(16)]
        wanted = torch.stack(means).mean() if weight == "1/t" else losses[masked].mean()
        assert torch.allclose(loss, wanted, atol=1e-5)
        counts = masked.sum(1).sort().values
        assert counts.min() >= 1 and (law != "uniform" or counts.tolist() == list(range(1, 17)))
        other = losses[masked].mean() if weight == "1/t" else torch.stack(means).mean()
        assert not torch.allclose(loss, other, atol=1e-4)


def test_the_loss_depends_on_the_generator_given_alone(make: Make) -> None:
    task: Any = build_task(make())
    before, losses = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        rng = torch.Generator().manual_seed(seed)
        losses.append(task.loss(task.model, batch_of(task, 8), rng)[0].item())
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), before)


class Copying(nn.Module):
    """Knows every token it is shown, and nothing of those it is not."""

    mask_token_id, null_class = 12, 3

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return 50 * nn.functional.one_hot(tokens, 13)[..., :12].float()


def test_only_masked_tokens_count(make: Make) -> None:
    task: Any = build_task(make())
    tokens, labels = batch_of(task, 8)
    task.model = Copying()
    loss, _ = task.training_loss(task.model, tokens, labels, torch.Generator().manual_seed(1))
    assert float(loss) == pytest.approx(math.log(12))
    assert task.test_losses(tokens, labels, 0)["test_loss"].tolist() == pytest.approx([math.log(12)] * 8)


def test_the_test_loss_is_the_evidence_bound_per_token(make: Make) -> None:
    """Of a table: the sum over n of 1 / n times the loss with n masked, N times that of the mean; which is the negative
    log-likelihood averaged over all orders."""
    table, outcome = dirichlet_table(3, 3), (2, 0, 1)

    def loss_of(masked: tuple[int, ...]) -> list[float]:
        state = sum((3 if i in masked else outcome[i]) * 4**i for i in range(3))
        return [-math.log(float(table[state, i, outcome[i]])) for i in masked]

    subsets = [list(itertools.combinations(range(3), n)) for n in (1, 2, 3)]
    bound = sum(sum(sum(loss_of(s)) for s in group) / len(group) / n for n, group in enumerate(subsets, 1))
    orders = list(itertools.permutations(range(3)))
    later = [[tuple(sorted(order[i:])) for i in range(3)] for order in orders]
    by_order = [
        sum(loss_of(masked)[masked.index(i)] for masked, i in zip(rest, order, strict=True))
        for rest, order in zip(later, orders, strict=True)
    ]
    assert sum(by_order) / len(orders) == pytest.approx(bound)
    task: Any = build_task(make(mask_law="uniform", mask_weight="1/t"))
    task.model = Table(table)
    tokens, labels = torch.tensor([outcome]).expand(30_000, -1), torch.zeros(30_000, dtype=torch.int64)
    assert 3 * float(task.test_losses(tokens, labels, 0)["test_loss"].mean()) == pytest.approx(bound, rel=0.01)
    loss, _ = task.training_loss(task.model, tokens, labels, torch.Generator().manual_seed(0))
    assert 3 * loss.item() == pytest.approx(bound, rel=0.01)
    task.config = make(mask_law="cosine")  # other laws of training are not what evaluation reports
    assert 3 * float(task.test_losses(tokens, labels, 0)["test_loss"].mean()) == pytest.approx(bound, rel=0.01)
    biased, _ = task.training_loss(task.model, tokens, labels, torch.Generator().manual_seed(0))
    assert 3 * biased.item() != pytest.approx(bound, rel=0.03)


def test_the_test_loss_is_the_same_at_every_call(make: Make) -> None:
    task: Any = build_task(make())
    task.model.eval()
    tokens, labels = batch_of(task, 8)
    first, again, other = (task.test_losses(tokens, labels, start)["test_loss"] for start in (0, 0, 250))
    assert first.shape == (8,) and torch.equal(first, again) and not torch.equal(first, other)
    with torch.no_grad():
        assert task.evaluate() == task.evaluate()


# ---- a run


def test_a_run_trains_exports_and_samples(make: Make, tmp_path: Path) -> None:
    """Settings of the configuration become the model's defaults."""
    chosen = {"steps": 5, "temperature": 0.8, "partial_steps": 1, "mask_schedule": "linear"}
    config = make(steps=120, batch_size=16, ema=0.9, sample_settings=chosen, sample_every=120, eval_every=60)
    folder = start(config, tmp_path / "run", command="vgen train generator")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["test_loss"] for line in lines if "test_loss" in line]
    assert losses[0] == pytest.approx(math.log(12), abs=0.3)  # it knows nothing yet
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0] and held_out[-1] < 0.5 * losses[0]
    assert len(list((tmp_path / "run").rglob("*.png"))) >= 1
    pipe = vgen.load(folder, device="cpu", dtype="float32")
    assert isinstance(pipe, MaskedPipeline) and len(pipe.class_names) == 10
    resolved = pipe.resolve_settings({})
    assert chosen.items() <= resolved.items()
    output = pipe([3, 7], seeds=[0, 1], output_type="pt")
    assert output.evaluations == 5 and output.images.shape == (2, 3, 8, 8)
    assert (folder / "README.md").is_file()
    assert pipe.generator.config["num_tokens"] == 16 and pipe.generator.null_class == 10


def test_the_preset_is_a_possible_model() -> None:
    """On the 7 x 7 tokens of its tokenizer."""
    preset, tokens = load_config("fashion-maskgit"), load_config("fashion-vqgan").model
    with torch.device("meta"):
        sizes = {"num_tokens": tokens["side"] ** 2, "vocab_size": tokens["vocab_size"], "num_classes": 10}
        model = MaskedTransformer(**sizes, **preset.model)
    pipe = MaskedPipeline(None, model, settings=preset.sample_settings)
    assert preset.sample_settings.items() <= pipe.resolve_settings({}).items()
    assert model.config["num_tokens"] == 49


def test_wrong_sample_settings_are_refused_before_training(make: Make) -> None:
    with pytest.raises(SettingError, match="unknown setting 'heat'"):
        build_task(make(sample_settings={"heat": 2}))
    says = "sample_settings serve generators and decoders, not a classifier: leave them out"
    with pytest.raises(SettingError, match=says):
        make(kind="classifier", image_size=8, sample_settings={"steps": 2})
