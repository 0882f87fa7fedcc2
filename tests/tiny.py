"""What the outer floors' tests share: a tiny pipeline, its published form, tiny data sets and subprocesses."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vgen.generators.var import VAR
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.tokenizers.multiscale import MultiScaleVQ
from vgen.training.config import TrainingConfig

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = {0: "ant", 1: "bee", 2: "cat"}
TOKENIZER: dict[str, Any] = {  # 8 x 8 grey images, 1 + 4 + 16 tokens
    "scales": [1, 2, 4],
    "vocab_size": 16,
    "code_dim": 4,
    "image_channels": 1,
    "base_channels": 4,
    "channel_multipliers": [1, 2],
    "blocks": 1,
    "attention_levels": [],
    "norm_groups": 2,
}
GENERATOR: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}


def randomize(module: nn.Module, seed: int) -> None:
    """Every parameter from a normal distribution, so that nothing is zero or cancels by its initialisation."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)


def tiny_pipeline(seed: int = 0, **changes: Any) -> NextScalePipeline:
    """A random pipeline of three classes; `changes` go to the tokenizer's configuration."""
    tokenizer = MultiScaleVQ(**TOKENIZER | changes)
    shared = {name: tokenizer.config[name] for name in ("scales", "vocab_size", "code_dim")}
    generator = VAR(num_classes=len(NAMES), **shared, **GENERATOR)
    randomize(tokenizer, seed)
    randomize(generator, seed + 1)
    pipeline = NextScalePipeline(tokenizer.eval(), generator.eval(), id2label=NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def published(pipeline: NextScalePipeline) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The transformer's and the tokenizer's tensors under VAR's published names and shapes."""
    config = pipeline.generator.config
    lengths = [side * side for side in config.scales]
    top = {"code_embed": "word_embed", "class_embed": "class_emb", "scale_embed": "lvl_embed"}
    top |= {"head": "head", "head_adaln": "head_nm.ada_lin.1"}
    transformer = {"lvl_1L": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]}
    for name, tensor in pipeline.generator.state_dict().items():
        first, _, rest = name.partition(".")
        if first in ("start_position", "position"):
            transformer[{"start_position": "pos_start", "position": "pos_1LC"}[first]] = tensor[None]
        elif first in top:
            transformer[f"{top[first]}.{rest}"] = tensor
        elif name.endswith("log_scale"):
            transformer[name.replace("log_scale", "scale_mul_1H11")] = tensor[None]
        else:
            transformer[name.replace(".adaln.", ".ada_lin.1.").replace(".qkv.", ".mat_qkv.")] = tensor
    new = {"codebook.weight": "quantize.embedding.weight", "codebook.usage": "quantize.ema_vocab_hit_SV"}
    tokenizer = {
        new.get(name, name.replace("phi.", "quantize.quant_resi.qresi_ls.", 1) if name[:4] == "phi." else name): tensor
        for name, tensor in pipeline.tokenizer.state_dict().items()
    }
    return transformer, tokenizer


def published_files(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Published checkpoints as .pth files; the converter takes group norms of 32 groups for granted."""
    wide = {"base_channels": 32, "channel_multipliers": [1, 1], "norm_groups": 32, "image_channels": 3}
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "var.pth", folder / "vae.pth"
    for path, state in zip(paths, published(tiny_pipeline(seed, **wide)), strict=True):
        torch.save(state, path)
    return paths


# ---- data


def pattern(label: int, jitter: int, side: int) -> np.ndarray:
    """A grey picture that shows its class: a bright bar at a height of its own, slightly shifted by `jitter`."""
    picture = np.full((side, side), 20, dtype=np.uint8)
    bar = max(1, side // 4)
    top = (label * bar) % (side - bar + 1)
    picture[top : top + bar, jitter % 2 :] = 220
    return picture


class Result(NamedTuple):
    """What a command of the command line gave (conftest's `run`)."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


def write_mnist(root: Path, name: str = "FashionMNIST", train: int = 64, test: int = 16, classes: int = 10) -> Path:
    """Raw idx files as torchvision lays them out; image i shows class i % classes. Returns `root`."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for prefix, number in (("train", train), ("t10k", test)):
        labels = np.arange(number) % classes
        pixels = np.stack([pattern(int(label), i // classes, 28) for i, label in enumerate(labels)])
        sizes = np.array([0x803, number, 28, 28], dtype=">i4")
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(sizes.tobytes() + pixels.tobytes())
        sizes = np.array([0x801, number], dtype=">i4")
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(sizes.tobytes() + labels.astype(np.uint8).tobytes())
    return root


def write_folder(root: Path, names: Sequence[str] = ("ant", "bee", "cat"), each: int = 4, side: int = 10) -> Path:
    """A folder of class folders with PNG files. Returns `root`."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(pattern(label, i, side)).save(root / name / f"{i}.png")
    return root


# ---- training


def tokenizer_config(root: Path, **changes: Any) -> TrainingConfig:
    """A run of a few seconds on Fashion-MNIST files under `root`."""
    values: dict[str, Any] = {
        "kind": "tokenizer",
        "name": "tiny-vq",
        "data": "fashion-mnist",
        "data_root": str(root),
        "family": "multiscale",
        "model": TOKENIZER,
        "flip": True,
        "steps": 6,
        "batch_size": 8,
        "lr": 2e-3,
        "warmup": 2,
        "precision": "no",
        "restart_every": 2,
        "log_every": 1,
        "eval_every": 3,
        "sample_every": 1000,
        "save_every": 1000,
    }
    return TrainingConfig(**values | changes)


def generator_config(root: Path, tokenizer: Path, **changes: Any) -> TrainingConfig:
    """A run of a few seconds on the same files."""
    values: dict[str, Any] = {
        "kind": "generator",
        "name": "tiny-var",
        "family": "var",
        "tokenizer": str(tokenizer),
        "model": GENERATOR | {"init_gate": 0.1},
        "flip": False,
        "optimizer": "muon",
    }
    return tokenizer_config(root, **values | changes)


# ---- subprocesses


def python(*arguments: str, cwd: Path, path: Sequence[Path] = (), **environment: str) -> subprocess.CompletedProcess:
    """Run this interpreter in `cwd`, with `path` as PYTHONPATH, one thread and no network."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    if path:
        variables["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in path)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
