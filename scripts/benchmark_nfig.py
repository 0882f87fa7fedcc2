"""The NFIG part of `benchmark.py`: sampling and tokenising with frequency bands against VAR at the same sizes.

Imported by `benchmark.py`, whose `nfig` command prints the table.
"""

from collections.abc import Callable
from statistics import median
from typing import Any


def run_pairs(job: dict[str, Any]) -> dict[str, Any]:
    """Time NFIG and VAR turn by turn in one process; job: depth, batch, dtype, threads, device, repeats.

    Gives seconds of each kind of work by model, medians over the turns, and the median of each turn's ratio.
    """
    import torch
    from benchmark import GUIDANCE, TOKENIZER, by_turns, random_model

    from vgen.generators.var import VAR
    from vgen.pipelines.next_scale import NextScalePipeline
    from vgen.tokenizers.frequency import FrequencyVQ
    from vgen.tokenizers.multiscale import MultiScaleVQ

    torch.set_num_threads(job["threads"])
    dtype, device, batch = getattr(torch, job["dtype"]), job["device"], job["batch"]
    size = {name: TOKENIZER[name] for name in ("scales", "vocab_size", "code_dim")}
    width = 64 * job["depth"]
    transformer = {"num_classes": 1000, "width": width, "depth": job["depth"], "heads": job["depth"]}
    generator = random_model(lambda: VAR(**size, **transformer), dtype, device)
    pipelines = {
        name: NextScalePipeline(random_model(lambda kind=kind: kind(**TOKENIZER), dtype, device), generator)
        for name, kind in (("VAR", MultiScaleVQ), ("NFIG", FrequencyVQ))
    }
    images = torch.rand(batch, 3, 256, 256, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    given = {"class_labels": list(range(batch)), "seeds": list(range(batch)), **GUIDANCE}

    def work_of(pipeline: NextScalePipeline) -> dict[str, Callable[[], Any]]:
        return {
            "sampling": lambda: pipeline(output_type="latent", **given),
            "sampling and decoding": lambda: pipeline(output_type="pt", **given),
            "encoding": lambda: pipeline.tokenizer.encode(images),
        }

    works = {name: work_of(pipeline) for name, pipeline in pipelines.items()}
    with torch.no_grad():
        times = {
            kind: by_turns({name: works[name][kind] for name in works}, job["repeats"], device) for kind in works["VAR"]
        }
    ratios = {
        kind: median(ours / theirs for ours, theirs in zip(found["NFIG"], found["VAR"], strict=True))
        for kind, found in times.items()
    }
    return {"seconds": {name: {kind: median(found[name]) for kind, found in times.items()} for name in works}} | {
        "ratios": ratios,
        "parameters": sum(parameter.numel() for parameter in generator.parameters()),
    }
