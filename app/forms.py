"""Between what a form or an API call says and a Request: bounds on every number, and the same run as commands to copy.

What comes in may be anything: the page's own limits are no checks.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vgen import batch
from vgen.evaluation.curves import parse_value
from vgen.pipelines.base import EDIT, GIVEN
from vgen.types import Request, SettingError

MAX_IMAGES = 64
MAX_VIDEOS = 8
MAX_STEPS = 1000  # of any one sample
MAX_FRAMES = 256
MAX_SEED = (1 << 63) - 1
MAX_TEXT = 2000  # characters of settings
NAMED = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p", "steps")  # have a control of their own
VIDEO_NAMED = ("frames", "context_frames")
ONLY_BY_HAND = "# an edit: its image and mask are not in its files; pipe.edit(image, mask, ...) repeats it with them"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a visitor wants sampled."""

    model: str
    classes: Sequence[str | int] | None = None  # None or none: every class of an API call; unconditional for []
    per_class: int = 1
    seed: int = 0
    sampler: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number within bounds; a float that is one counts. Raises SettingError."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer()
    if not number or not low <= value <= high:
        raise SettingError(f"{name} is {str(value)[:40]!r}: it must be a whole number in {low}..{high}")
    return int(value)


def named(settings: Any) -> dict[str, Any]:
    """Settings as a dictionary. Raises SettingError for what has no names."""
    if not isinstance(settings, Mapping):
        raise SettingError("settings must be an object of names and values")
    return dict(settings)


def to_request(pipeline: Any, ask: Ask, context: Any = None) -> Request:
    """The request that an Ask stands for; `context` is a clip that videos go on from.

    Raises SettingError for what the model does not know or this studio does not do.
    """
    most = MAX_VIDEOS if pipeline.makes_videos else MAX_IMAGES
    per_class = whole("images per class", ask.per_class, 1, most)
    seed = whole("seed", ask.seed, 0, MAX_SEED - most)
    labels = _labels(pipeline, ask.classes)
    number = per_class * (1 if labels is None else len(labels))
    if number > most:
        raise SettingError(
            f"{number} samples were asked for, the studio makes at most {most} at once: take fewer classes or images, "
            "or use 'vgen sample'"
        )
    settings = named(ask.settings)
    given = settings | ({} if context is None else {"context": context})
    sampler = pipeline.resolve_sampler(ask.sampler)
    check_bounds(pipeline, given, sampler)
    items = batch.plan(labels, per_class, seed)
    ids = None if labels is None else [item.class_label for item in items]
    return pipeline.request(ids, [item.seed for item in items], sampler, given)


def check_bounds(pipeline: Any, settings: Mapping[str, Any], sampler: str | None) -> None:
    """Raise SettingError for settings that the model does not know or this studio does not do."""
    plain = {name: value for name, value in settings.items() if name not in GIVEN}
    found = pipeline.resolve_settings(plain, sampler)
    for name, limit in (("steps", MAX_STEPS), ("frames", MAX_FRAMES), ("recurrences", MAX_STEPS)):
        value = found.get(name)
        if isinstance(value, int) and value > limit:
            raise SettingError(f"{name} is {value}, the studio takes at most {limit}: use 'vgen sample' for more")


def _labels(pipeline: Any, classes: Sequence[str | int] | None) -> list[int] | None:
    if classes is None or pipeline.null_class == 0:
        return list(range(pipeline.null_class)) or None
    if not isinstance(classes, (list, tuple)) or len(classes) > MAX_IMAGES:
        raise SettingError(f"classes must be a list of at most {MAX_IMAGES} names or ids")
    return pipeline.label_ids(list(classes)) if classes else None


def parse_settings(text: str) -> dict[str, Any]:
    """Lines or commas of name=value -> settings. Raises SettingError."""
    if len(text) > MAX_TEXT:
        raise SettingError(f"the settings have {len(text)} characters, the limit is {MAX_TEXT}")
    found: dict[str, Any] = {}
    for part in filter(None, (item.strip() for line in text.splitlines() for item in line.split(","))):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not value.strip():
            raise SettingError(f"setting {part[:60]!r} has no value: write name=value, one a line")
        if name in found:
            raise SettingError(f"{name} is given twice: give it once")
        found[name] = parse_value(value.strip(), f"setting {part[:60]!r}")
    return found


def setting_names(pipeline: Any, sampler: str | None) -> dict[str, Any]:
    """The settings that a sampler reads, with the model's defaults."""
    name = pipeline.resolve_sampler(sampler)
    found = pipeline.resolve_settings({}, name)
    return {key: value for key, value in found.items() if name in pipeline.readers.get(key, (name,))}


def other_settings(pipeline: Any, request: Request) -> str:
    """Settings of a request that differ from the model's own and have no control of their own, as lines."""
    found = changed(pipeline, request)
    return "\n".join(f"{name}={flag_text(value)}" for name, value in found.items() if _listed(name))


def changed(pipeline: Any, request: Request) -> dict[str, Any]:
    """Settings of a request that differ from the model's own, and tokens that it was given."""
    own: dict[str, Any] = setting_names(pipeline, request.sampler) | dict.fromkeys(GIVEN)
    return {name: value for name, value in request.settings.items() if name in own and value != own[name]}


def _listed(name: str) -> bool:
    return name not in (*NAMED, *VIDEO_NAMED, *GIVEN, "context", "actions")


def flag_text(value: Any) -> str:
    """A setting's value as the command line reads it."""
    if isinstance(value, list):  # a curve of guidance
        return ":".join(f"{point:g}" for point in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- the same run elsewhere


def copy_as(pipeline: Any, request: Request, url: str = "http://127.0.0.1:7860") -> dict[str, str]:
    """A request as a command line, as Python and as an HTTP call to this studio's API."""
    if EDIT in request.settings:
        return dict.fromkeys(("Command line", "Python", "curl"), ONLY_BY_HAND)
    differing = changed(pipeline, request)
    return {
        "Command line": _command(pipeline, request, differing),
        "Python": _python(pipeline, request, differing),
        "curl": _curl(pipeline, request, differing, url),
    }


def _per_class(request: Request) -> tuple[list[int] | None, int] | None:
    """Classes and images of each, where a request has the seeds and the order of `batch.plan`."""
    labels = None if request.class_labels is None else list(dict.fromkeys(request.class_labels))
    number = len(request.seeds) // (1 if labels is None else len(labels))
    items = batch.plan(labels, max(1, number), request.seeds[0])
    planned = [(item.seed, item.class_label) for item in items]
    asked = list(zip(request.seeds, request.class_labels or [None] * len(request.seeds), strict=True))  # type: ignore
    return (labels, number) if planned == asked else None


def _command(pipeline: Any, request: Request, differing: dict[str, Any]) -> str:
    found = _per_class(request)
    if found is None or set(GIVEN) & set(differing):
        return "vgen sample --from FILE  # one of the files made"
    labels, number = found
    words = ["vgen", "sample", request.model]
    if pipeline.null_class:
        words += ["--classes", "none" if labels is None else ",".join(str(label) for label in labels)]
    words += ["--per-class", str(number), "--seed", str(request.seeds[0])]
    if request.sampler != pipeline.samplers[0]:
        words += ["--sampler", str(request.sampler)]
    for name, value in differing.items():
        if name == "context":
            words += ["--context", "CLIP"]
        elif name in (*NAMED, *VIDEO_NAMED):
            words += [f"--{name.replace('_', '-')}", flag_text(value)]
        elif name != "actions":
            words += ["--set", f"{name}={flag_text(value)}"]
    return shlex.join([*words, "--out", "samples/"])


def _python(pipeline: Any, request: Request, differing: dict[str, Any]) -> str:
    names = pipeline.class_names
    labels = None if request.class_labels is None else [names[label] for label in request.class_labels]
    arguments = [f"class_labels={labels!r}", f"seeds={request.seeds!r}"]
    if request.sampler != pipeline.samplers[0]:
        arguments.append(f"sampler={request.sampler!r}")
    arguments += [f"{name}={value!r}" for name, value in differing.items() if name not in ("context", "actions")]
    if "context" in differing:
        arguments.append("context=clip")
    made = "frames" if pipeline.makes_videos else "images"
    lines = ["import vgen", f"pipe = vgen.load({request.model!r})", f"out = pipe({', '.join(arguments)})"]
    return "\n".join([*lines, f"out.{made}"])


def _curl(pipeline: Any, request: Request, differing: dict[str, Any], url: str) -> str:
    labels, number = _per_class(request) or (request.class_labels, 1)
    settings = {name: value for name, value in differing.items() if name not in ("context", "actions")}
    data = [request.model, labels, number, request.seeds[0], request.sampler, settings]
    body = shlex.quote(json.dumps({"data": data}))
    call = f"{url.rstrip('/')}/gradio_api/call/generate"
    begin = f"curl -s -X POST {call} -H 'Content-Type: application/json' -d {body}"
    return f"EVENT=$({begin} | cut -d'\"' -f4)\ncurl -sN {call}/$EVENT"
