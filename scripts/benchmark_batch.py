"""The part of `benchmark.py` on many samples to files: what files, manifest and metadata cost beside sampling.

Imported by `benchmark.py`, whose `batch` command prints the table.
"""

import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any


def run_batch(job: dict[str, Any]) -> dict[str, float]:
    """Seconds for `images` images of a model as files, and of the same calls with nothing written; peak memory in MB.

    job: model, images, batch_size, formats (none: the bare loop), threads, device. One process measures one way, so
    that peak memory is its own.
    """
    import torch

    import vgen
    from vgen.batch import ImageFiles, plan, sample_to_files

    torch.set_num_threads(job["threads"])
    pipeline = vgen.load(job["model"], device=job["device"])
    classes = pipeline.null_class
    items = plan(list(range(classes)), -(-job["images"] // classes), 0)[: job["images"]]
    size = job["batch_size"]
    pipeline(class_labels=[0] * size, seeds=list(range(size)))  # to warm up
    began, cpu = time.monotonic(), time.process_time()
    if job["formats"]:
        folder = Path(tempfile.mkdtemp())
        files = ImageFiles(formats=job["formats"].split(","))
        sample_to_files(pipeline, items, folder, settings={}, batch_size=size, files=files)
        shutil.rmtree(folder)
    else:
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            pipeline(class_labels=[item.class_label for item in chunk], seeds=[item.seed for item in chunk])
    taken, spent = time.monotonic() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": taken, "cpu_seconds": spent, "images": len(items), "peak_mb": peak}
