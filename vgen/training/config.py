"""Training presets: a YAML file per run, every key of which can be overridden from the command line."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from vgen.types import SettingError

PRESETS = Path(__file__).parent / "presets"
WITH_PARTS = ("model", "video", "loop", "sample_settings")  # settings whose parts can be overridden one by one


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides a training run. Batch size and steps count optimizer steps over all processes."""

    kind: str  # "tokenizer", "generator", "decoder" or "classifier"
    name: str
    data: str  # "fashion-mnist", "mnist", "noto-emoji", a folder of classes; videos: "moving-mnist" or a folder
    data_root: str | None = None
    family: str  # "multiscale" or "vqgan" for tokenizers; "var", "far", ... for generators; "convnet" for classifiers
    model: dict[str, Any]  # keyword arguments of the model, less what data and tokenizer decide
    tokenizer: str | None = None  # folder of the trained tokenizer, for generators; "far" may fit one
    init_from: str | None = None  # a trained model of the same settings to begin with: bundled, or a folder
    image_size: int = 0  # tokenizers: 0 takes what the model implies; classifiers: what they are trained on
    flip: bool = False  # horizontal flips: at random; for generators as a second copy of the tokens for generators
    crops: int = 1  # generators: crops of each image to tokenize, the first the centre; emoji: placed at random

    steps: int
    batch_size: int
    accumulation: int = 1
    optimizer: str = "adamw"  # or "muon": Muon for the matrices of the blocks, AdamW for the rest
    lr: float
    muon_lr: float = 0.0  # 0: 1.5 lr
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.05
    schedule: str = "cosine"  # or "linear", to zero
    warmup: int = 100
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "auto"  # "no", "fp16" or "bf16" autocast; "auto": bf16 where the device computes in it, else no
    seed: int = 0
    workers: int = 0

    label_dropout: float = 0.1  # generators
    self_correction: float = 0.0  # "var", "mvar": largest share of tokens that training misreads
    mask_law: str = "uniform"  # masked generators: of the number of masked tokens; or "cosine", "beta"
    mask_weight: str = "1/t"  # masked generators: of a masked token's loss; or "uniform"
    classifier: str | None = None  # generators: judges samples at every evaluation; a bundled one, or a folder
    score_samples: int = 500  # generators: how many; compare runs at equal numbers only
    commitment: float = 0.25  # tokenizers
    l1: float = 0.2  # tokenizers: weight of the absolute error beside the squared one
    perceptual: float = 0.0  # tokenizers: weight of LPIPS on VGG-16, whose weights are downloaded on first use; 0: off
    adversarial: float = 0.0  # tokenizers: weight of the discriminator's verdict (0.5 in NFIG); 0: off; decoders too
    adversarial_start: float = 0.1  # share of the run before it counts; a decoder's learns meanwhile
    gradient_penalty: float = 0.0  # decoders: weight of R1, which keeps the discriminator calm; 0: off
    anchor: float = 0.0  # decoders: weight of how far samples move, in 2x2 means, from what they were drawn as at first
    samples: int = 10_000  # decoders: of the model's samples, those that its decoder is trained on
    restart_every: int = 50  # tokenizers: steps between restarts of dead codes
    restart_until: float = 0.7  # tokenizers: share of the run after which codes are left alone

    log_every: int = 50
    eval_every: int = 1000
    sample_every: int = 1000
    save_every: int = 500
    keep: int = 2
    sample_guidance: float = 2.5
    sample_settings: dict[str, Any] = field(default_factory=dict)  # become the model's defaults; decoder: only draw
    video: dict[str, Any] = field(default_factory=dict)  # "far": see vgen.training.next_frame.VideoTraining
    loop: dict[str, Any] = field(default_factory=dict)  # "recurrent": see vgen.training.recurrent.LoopTraining
    license: str = "apache-2.0"
    notes: str = ""  # a paragraph for the model card

    def __post_init__(self) -> None:
        choices = {
            "kind": ("tokenizer", "generator", "decoder", "classifier"),
            "optimizer": ("adamw", "muon"),
            "schedule": ("cosine", "linear"),
            "precision": ("auto", "no", "fp16", "bf16"),
            "mask_law": ("uniform", "cosine", "beta"),
            "mask_weight": ("1/t", "uniform"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SettingError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        counts = ("steps", "batch_size", "accumulation", "keep", "crops", "restart_every", "samples")
        for name in (*counts, "log_every", "eval_every", "sample_every", "save_every"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.batch_size % self.accumulation:
            raise SettingError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise SettingError(f"betas is {self.betas}: give two numbers from 0 to below 1")
        if not self.lr > 0:
            raise SettingError(f"lr is {self.lr}: it must be above 0")
        self._check_terms()
        if not 0 <= self.self_correction < 1:
            raise SettingError(f"self_correction is {self.self_correction}: it must be from 0 to below 1")
        if self.self_correction and self.family not in ("var", "mvar"):
            raise SettingError(f"self_correction serves the families var and mvar, not {self.family!r}: leave it out")
        if self.score_samples < 2:
            raise SettingError(f"score_samples is {self.score_samples}: it must be at least 2")
        if self.kind == "classifier" and self.image_size < 8:
            raise SettingError(
                f"image_size is {self.image_size}: a classifier needs at least 8, as --set image_size=28"
            )
        if self.sample_settings and self.kind not in ("generator", "decoder"):
            raise SettingError(f"sample_settings serve generators and decoders, not a {self.kind}: leave them out")
        if self.video and self.family != "far":
            raise SettingError(f"video settings serve the family 'far', not {self.family!r}: leave them out")
        if self.loop and self.family != "recurrent":
            raise SettingError(f"loop settings serve the family 'recurrent', not {self.family!r}: leave them out")
        if self.init_from and self.kind == "classifier":
            raise SettingError(f"init_from is {self.init_from!r}, but a classifier begins anew: leave it out")
        if self.kind == "decoder" and not self.init_from:
            raise SettingError("a decoder needs the model it belongs to: --set init_from=FOLDER of a trained one")
        if self.kind == "generator" and not self.tokenizer and self.family != "far":
            raise SettingError("a generator needs a tokenizer: --set tokenizer=FOLDER of a trained one")

    def _check_terms(self) -> None:
        served = {
            "perceptual": ("tokenizer",),
            "adversarial": ("tokenizer", "decoder"),
            "gradient_penalty": ("decoder",),
            "anchor": ("decoder",),
        }
        for name, kinds in served.items():
            weight = getattr(self, name)
            if not 0 <= weight < math.inf:
                raise SettingError(f"{name} is {weight}: it must be at least 0, and finite")
            if weight and self.kind not in kinds:
                raise SettingError(f"{name} is {weight}, but serves {kinds[0]}s, not a {self.kind}: leave it out")
        if not 0 <= self.adversarial_start < 1:
            raise SettingError(f"adversarial_start is {self.adversarial_start}: it must be from 0 to below 1")


def list_presets() -> list[str]:
    """Names of the presets that come with vgen."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(preset: str, overrides: Sequence[str] = (), kind: str | None = None) -> TrainingConfig:
    """Read a preset by name or by path of a YAML file, and apply overrides: "key=value", or "model.key=value".

    Raises SettingError for an unknown preset, key or value.
    """
    path = PRESETS / f"{preset}.yaml" if preset in list_presets() else Path(preset)
    if not path.is_file():
        raise SettingError(f"no preset {preset!r}: use one of {', '.join(list_presets())}, or the path of a YAML file")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise SettingError(f"{path} holds no settings: expected lines like 'steps: 1000'")
    data = values.get("data")
    for override in overrides:
        _apply(values, override)
    if values.get("data") != data:  # what the preset's card says, and its classifier, are about its own data
        said = {override.partition("=")[0] for override in overrides}
        blanks = {"notes": "", "license": "unknown", "classifier": None}
        values |= {key: blank for key, blank in blanks.items() if key not in said}
    config = _build(values, str(path))
    if kind and config.kind != kind:
        raise SettingError(f"{preset} trains a {config.kind}: use 'vgen train {config.kind} --preset {preset}'")
    return config


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise SettingError(f"--set {override!r} has no value: write key=value")
    name, _, rest = key.partition(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingError(f"--set {override!r}: the value is not YAML") from error
    if rest:
        if name not in WITH_PARTS:
            raise SettingError(
                f"unknown setting {key!r}: only {', '.join(f'{part}.*' for part in WITH_PARTS)} have parts"
            )
        values.setdefault(name, {})[rest] = value
    else:
        values[name] = value


def _build(values: dict[str, Any], source: str) -> TrainingConfig:
    known = get_type_hints(TrainingConfig)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(known)}"
            raise SettingError(f"unknown setting {name!r} in {source}: {hint}")
        values[name] = coerce(name, value, known[name])
    required = [
        item.name
        for item in dataclasses.fields(TrainingConfig)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise SettingError(f"{source} lacks {', '.join(missing)}")
    return TrainingConfig(**values)


def read_part(values: dict[str, Any], kind: type, where: str) -> dict[str, Any]:
    """Settings of the dataclass `kind`, each of its own type. Raises SettingError, which says `where` they stand."""
    known = get_type_hints(kind)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(known)}"
            raise SettingError(f"unknown setting '{where}.{name}': {hint}")
    return {name: coerce(f"{where}.{name}", value, known[name]) for name, value in values.items()}


def coerce(name: str, value: Any, wanted: Any) -> Any:
    """Check a YAML value against a field's type; YAML reads 1e-3 as text, and no as false. Raises SettingError."""
    if wanted in (int, float) and not isinstance(value, bool):
        with suppress(TypeError, ValueError, OverflowError):
            number = float(value)
            if wanted is float or number == int(number):
                return wanted(number)
    elif wanted is str and value is False:
        return "no"
    elif wanted is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    elif (wanted == (str | None) and (value is None or isinstance(value, str))) or (
        wanted is bool and isinstance(value, bool)
    ):
        return value
    elif get_origin(wanted) is list and isinstance(value, list):
        return [coerce(name, item, get_args(wanted)[0]) for item in value]
    elif (wanted == dict[str, Any] and isinstance(value, dict)) or (wanted is NoneType and value is None):
        return value
    elif isinstance(wanted, UnionType) and wanted != (str | None):
        for option in get_args(wanted):
            with suppress(SettingError):
                return coerce(name, value, option)
    kind = getattr(wanted, "__name__", str(wanted))
    raise SettingError(f"{name} is {value!r}: expected a value of type {kind}")
