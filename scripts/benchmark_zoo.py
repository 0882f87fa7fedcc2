"""The part of `benchmark.py` on bundled models of one kind: sampling and training, turn by turn in one process.

Imported by `benchmark.py`, whose `zoo` command prints the table.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

BATCHES = (1, 16)  # of sampling; training takes the preset's


def run_zoo(job: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By model: seconds per image of each batch size, images per second of a training step, and parameters; medians
    over turns. job: models, threads, repeats."""
    import torch
    from benchmark import by_turns

    torch.set_num_threads(job["threads"])
    works = {name: _works(name) for name in job["models"]}
    rows: dict[str, dict[str, float]] = {name: {} for name in works}
    for kind in next(iter(works.values())):
        found = by_turns({name: works[name][kind][0] for name in works}, job["repeats"], "cpu")
        for name, taken in found.items():
            rows[name][kind] = median(taken) / works[name][kind][1]
    return rows


def _works(name: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed, and how many images it is for."""
    import vgen
    from vgen.training.config import load_config

    pipeline, config = vgen.load(name, device="cpu"), load_config(name)
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    for batch in BATCHES:
        labels = [i % 10 for i in range(batch)]
        found[f"batch {batch}"] = (_sampling(pipeline, labels), batch)
    found["training"] = (_training(vgen.load(name, device="cpu"), config), config.batch_size)
    return found


def _sampling(pipeline: Any, labels: list[int]) -> Callable[[], Any]:
    return lambda: pipeline(class_labels=labels, seeds=list(range(len(labels))))


def _training(pipeline: Any, config: Any) -> Callable[[], None]:
    """A training step as the preset does it: autocast where the device has bfloat16, its optimizers, tokens that are
    there already or, with self-correction, images that are encoded."""
    import torch

    from vgen.training.next_scale import next_scale_loss
    from vgen.training.optimizers import build_optimizers
    from vgen.training.precision import has_bfloat16

    model, tokenizer = pipeline.generator.train(), pipeline.tokenizer
    optimizers = build_optimizers(model, config)
    rng = torch.Generator().manual_seed(0)
    if config.self_correction:
        size, channels = tokenizer.image_size, tokenizer.config["image_channels"]
        examples = torch.rand(config.batch_size, channels, size, size, generator=rng) * 2 - 1
    else:
        examples = torch.randint(model.config["vocab_size"], (config.batch_size, model.num_tokens), generator=rng)
    labels = torch.randint(10, (config.batch_size,), generator=rng)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bfloat16(torch.device("cpu"))):
            loss = next_scale_loss(model, tokenizer, examples, labels, config.self_correction, rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step
