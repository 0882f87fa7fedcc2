"""The M-VAR part of `benchmark.py`: one pass over all scales at the size of M-VAR-d16, and the scan by itself.

Imported by `benchmark.py`, whose `mvar` command prints the tables.
"""

import resource
from typing import Any

SCALES = {256: [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], 512: [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]}
SIZE = {"vocab_size": 4096, "code_dim": 32, "num_classes": 1000, "width": 1024, "depth": 16, "heads": 16}
HEADS, HEAD_WIDTH, STATE = 32, 64, 64  # Mamba's at this size


def plans() -> list[tuple[str, str]]:
    """What is measured: a model and a loop each, the first one being what the others are compared with."""
    return [("M-VAR", "published"), ("M-VAR", "recomputed"), ("M-VAR", "carried"), ("VAR", "cached")]


def run_pass(job: dict[str, Any]) -> dict[str, Any]:
    """Time one transformer pass over all scales, guidance on; job: model, plan, pixels, batch, dtype, threads, device,
    repeats."""
    import torch
    from benchmark import linear_flop, random_model, seconds
    from torch.utils.flop_counter import FlopCounterMode

    from vgen import layers
    from vgen.generators.mvar import MVAR
    from vgen.generators.var import VAR

    torch.set_num_threads(job["threads"])
    kind = MVAR if job["model"] == "M-VAR" else VAR
    scales, rows = SCALES[job["pixels"]], 2 * job["batch"]
    model = random_model(lambda: kind(scales=scales, **SIZE), getattr(torch, job["dtype"]), job["device"])
    loop: Any = model
    if job["plan"] != "carried" and kind is MVAR:
        from published_loops import PrefixMVAR

        published = job["plan"] == "published"
        loop = PrefixMVAR(model, modulate_again=published)
        if published:
            layers.ONEDNN_LINEAR = None  # the published code calls torch's own linear layers
    labels = torch.arange(rows, device=job["device"])
    rng = torch.Generator().manual_seed(0)
    contexts = [torch.randn(rows, side * side, 32, generator=rng).to(job["device"]) for side in scales]

    def whole() -> Any:
        condition, cache = loop.condition(labels), loop.new_cache(rows)
        for context in contexts:
            last = loop(context, condition, cache)
        return last

    counted = {torch.ops.mkldnn._linear_pointwise: linear_flop}
    with torch.no_grad():
        with FlopCounterMode(display=False, custom_mapping=counted) as counter:
            logits = whole()  # which warms up, too
        best = min(seconds(whole, job["device"]) for _ in range(job["repeats"]))
    return {
        "seconds": best,
        "gflop": counter.get_total_flops() / 1e9,
        "logit": float(logits.float().abs().mean()),
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "state_mb": _state_bytes(model.new_cache(1)) / 1e6,
    }


def _state_bytes(cache: Any) -> int:
    """What a sample keeps from scale to scale."""
    import torch

    return sum(item.numel() * item.element_size() for item in vars(cache).values() if isinstance(item, torch.Tensor))


def run_scan(job: dict[str, Any]) -> dict[str, Any]:
    """Time one scan, or one with its gradients; job: method, tokens, backward, dtype, threads, device, repeats."""
    import torch
    from benchmark import seconds

    from vgen.scan import scan

    torch.set_num_threads(job["threads"])
    rng, dtype, tokens = torch.Generator().manual_seed(0), getattr(torch, job["dtype"]), job["tokens"]
    x = torch.randn(2, tokens, HEADS, HEAD_WIDTH, generator=rng).to(job["device"], dtype)
    B, C = (torch.randn(2, tokens, STATE, generator=rng).to(job["device"], dtype) for _ in range(2))
    dt = torch.rand(2, tokens, HEADS, generator=rng).to(job["device"]) * 0.1
    A = -torch.linspace(1, 16, HEADS, device=job["device"])
    for tensor in (x, dt, A, B, C):
        tensor.requires_grad_(job["backward"])

    def once() -> None:
        y, _ = scan(x, dt, A, B, C, method=job["method"])
        if job["backward"]:
            y.sum().backward()

    times = [seconds(once, job["device"]) for _ in range(1 + job["repeats"])]
    return {"seconds": min(times[1:])}
