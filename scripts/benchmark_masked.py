"""The masked part of `benchmark.py`: ReCAP at the published size, and what masked diffusion spends on drawing.

Imported by `benchmark.py`, whose `masked` command prints the tables.
"""

import time
from typing import Any

SIZE = {"num_tokens": 256, "vocab_size": 1024, "num_classes": 1000, "width": 768, "depth": 25, "heads": 8}
RELEASED = {"mask_schedule": "recap", "temperature": 0.65, "temperature_schedule": "sqrt", "choice_temperature": 5.5}
# Steps, whole steps at the start, and partial ones after each later whole one, as released; and the longest base run.
RUNS = ((16, 0, 1), (16, 8, 1))
BASE_STEPS = 32


def plans() -> list[dict[str, Any]]:
    """What is measured, by name: each ReCAP run, its schedule without ReCAP, and fewer whole steps of equal cost."""
    found = [{"plan": f"base T={BASE_STEPS}", "steps": BASE_STEPS, "full_steps": 0, "partial_steps": 0}]
    found.append({"plan": "base T=16", "steps": 16, "full_steps": 0, "partial_steps": 0})
    for steps, full, partial in RUNS:
        whole, cost = recap_cost(steps, full, partial)
        name = f"ReCAP T={steps}: {whole} whole + {steps - whole} partial"
        found.append({"plan": name, "steps": steps, "full_steps": full, "partial_steps": partial})
        found.append({"plan": f"base T={round(cost)}, equal FLOPs", "steps": round(cost), "same_as": name})
    return [{"full_steps": 0, "partial_steps": 0} | plan for plan in found]


def recap_cost(steps: int, full: int, partial: int) -> tuple[int, float]:
    """Whole evaluations, and the cost of all in whole evaluations by the number of tokens evaluated."""
    from vgen.samplers.schedules import group_steps, recap_counts

    groups = group_steps(recap_counts(SIZE["num_tokens"], steps), full, partial)
    tokens = SIZE["num_tokens"] + 1
    return len(groups), sum(1 + (len(group) - 1) * (sum(group) + 1) / tokens for group in groups)


def run_sampling(job: dict[str, Any]) -> dict[str, Any]:
    """Time one run, guidance off as released; job: batch, dtype, threads, device, repeats and a plan."""
    import torch
    from benchmark import linear_flop, random_model, seconds
    from torch.utils.flop_counter import FlopCounterMode

    from vgen.generators.masked import MaskedTransformer
    from vgen.pipelines.masked import MaskedPipeline

    torch.set_num_threads(job["threads"])
    generator = random_model(lambda: MaskedTransformer(**SIZE), getattr(torch, job["dtype"]), job["device"])
    pipeline = MaskedPipeline(None, generator)
    labels, seeds = list(range(job["batch"])), list(range(job["batch"]))
    settings = {name: job[name] for name in ("steps", "full_steps", "partial_steps")} | RELEASED

    def sample() -> None:
        for _ in pipeline.stream(class_labels=labels, seeds=seeds, guidance_scale=1.0, **settings):
            pass

    def evaluate() -> None:
        generator(torch.zeros(job["batch"], SIZE["num_tokens"], dtype=torch.int64), torch.tensor(labels))

    counted = {torch.ops.mkldnn._linear_pointwise: linear_flop}
    with torch.no_grad():
        one = min(seconds(evaluate, job["device"]) for _ in range(2))  # the first of which warms up
        with FlopCounterMode(display=False, custom_mapping=counted) as counter:
            best = seconds(sample, job["device"])
        times = [best, *(seconds(sample, job["device"]) for _ in range(job["repeats"] - 1))]
    return {"seconds": min(times), "gflop": counter.get_total_flops() / 1e9, "evaluation_s": one}


def run_categorical(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of sampling work alone: the generator returns logits that are there already.

    Batch 1, one `torch.Generator`, so that noise costs what torch's own costs.
    """
    import torch

    from vgen.pipelines.masked import MaskedPipeline

    torch.set_num_threads(job["threads"])
    number, vocab = job["tokens"], SIZE["vocab_size"]
    logits = torch.randn(1, number, vocab, generator=torch.Generator().manual_seed(0))
    pipeline = MaskedPipeline(None, stub(logits))
    settings: dict[str, Any] = {"sampler": job["sampler"], "guidance_scale": 1.0}
    if job["sampler"] != "first-hitting":
        settings["steps"] = job["steps"]
    times, evaluations = [], 0
    for seed in range(1 if job["sampler"] == "ancestral-categorical" else 3):
        began = time.perf_counter()
        for step in pipeline.stream(generator=torch.Generator().manual_seed(seed), **settings):
            evaluations = step.evaluations
        times.append(time.perf_counter() - began)
    return {"seconds": min(times), "evaluations": evaluations}


def stub(logits: Any) -> Any:
    """A generator of fixed logits that costs nothing."""
    import torch
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    class Stub(ModelMixin, ConfigMixin):  # type: ignore[misc]
        @register_to_config
        def __init__(self, num_tokens: int, vocab_size: int) -> None:
            super().__init__()
            self.null_class, self.mask_token_id = 0, vocab_size
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens: Any, class_labels: Any, positions: Any = None, cache: Any = None) -> Any:
            return logits

    return Stub(num_tokens=logits.shape[1], vocab_size=logits.shape[2])
