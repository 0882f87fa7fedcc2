"""The command line: thin wrappers that build a request or a configuration and drain the work.

Heavy imports stay inside the commands, so that help is instant.
"""

import os
import shlex
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="vgen",
    help="A studio for visual autoregressive generation. Errors are one line; --debug shows the traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
train_app = typer.Typer(
    name="train",
    help="Train a tokenizer, a generator or a classifier from a preset.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(train_app)

# Typer's base of usage errors: click's class in older releases, a vendored copy in newer ones.
ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

DONE, FAILED, WRONG_USAGE, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 130

Preset = Annotated[str, typer.Option(help="A preset's name, or the path of a YAML file like one.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
OutFolder = Annotated[Path | None, typer.Option("--out", help="Folder of the run; default runs/NAME.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its newest checkpoint.")]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", help="Where data sets lie; default $VGEN_DATA or ~/.cache/vgen/data."),
]


def _train_command(kind: str, purpose: str, example: str) -> None:
    """Add `vgen train KIND`: the kinds differ in what they say of themselves alone."""

    def command(
        preset: Preset,
        settings: Settings = [],  # noqa: B006
        out: OutFolder = None,
        resume: Resume = False,
        data_root: DataRoot = None,
    ) -> None:
        _train(kind, preset, settings, out, resume, data_root)

    train_app.command(kind, help=f"{purpose}\n\nExample: vgen train {kind} --preset {example}")(command)


_train_command("tokenizer", "Train a tokenizer.", "fashion-vq --set steps=2000")
_train_command(
    "generator", "Train a generator on a trained tokenizer.", "fashion-var --set tokenizer=runs/fashion-vq/model"
)
_train_command(
    "decoder", "Train the decoder of a finished model further, for what its generator samples.", "fashion-var-decoder"
)
_train_command("classifier", "Train a classifier for 'vgen evaluate' to judge samples by.", "fashion-classifier")


def _train(kind: str, preset: str, settings: list[str], out: Path | None, resume: bool, data_root: Path | None) -> None:
    from vgen.training.config import load_config

    overrides = [*settings, *([f"data_root={data_root}"] if data_root else [])]
    config = load_config(preset, overrides, kind)

    from vgen.training.run import start

    words = ["vgen", "train", kind, "--preset", preset]
    shown = shlex.join(words + [word for item in settings for word in ("--set", item)])
    folder = start(config, out or Path("runs") / config.name, resume, command=shown)
    print(folder)


# What decides a run of samples: `vgen sample` and `vgen evaluate MODEL` share it.
Classes = Annotated[
    str | None, typer.Option(help="Names, ids and ranges: sneaker,bag or 0-4,7; 'none' for unconditional.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the first image; image i has seed + i. Default 0.")]
SamplerName = Annotated[str | None, typer.Option("--sampler", help="halton, wave-df, ...; default: the model's own.")]
GuidanceScale = Annotated[float | None, typer.Option(help="1 is off; default 2.")]
GuidanceSchedule = Annotated[
    str | None, typer.Option(help="linear (default), constant, or shares of it over the run: 0:1:0.5.")
]
TopK = Annotated[int | None, typer.Option(help="Keep the k most likely codes; 0 is off (default).")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest codes of this mass; 1 is off (default).")]
Temperature = Annotated[float | None, typer.Option(help="Default 1; 0 takes the likeliest code.")]
Steps = Annotated[int | None, typer.Option(help="Masked families: evaluations per image; default: the model's own.")]
SamplerSettings = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any other setting of the sampler, as partial_steps=1; repeatable."
    ),
]
MoreSmooth = Annotated[bool | None, typer.Option("--more-smooth", help="VAR's smoothing; nicer, but worse FID.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where present.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default by device.")]


def _given(others: list[str], **settings: Any) -> dict[str, Any]:
    """The settings whose flags were used, and those of --set."""
    given = {name: value for name, value in settings.items() if value is not None}
    for text in others:
        from vgen.evaluation.curves import parse_value

        name, equals, value = text.partition("=")
        if not equals or not value:
            raise typer.BadParameter(f"--set {text!r} has no value: write a setting and its value, as partial_steps=1")
        name = name.strip().replace("-", "_")
        if name in given:
            raise typer.BadParameter(f"{name} is given twice: give it once")
        given[name] = parse_value(value.strip(), f"--set {text!r}")
    return given


@app.command()
def sample(
    model: Annotated[
        str | None, typer.Argument(help="A bundled name (see 'vgen models'), a folder or a Hub id.")
    ] = None,
    classes: Classes = None,
    per_class: Annotated[int, typer.Option(help="Images per class.")] = 1,
    seed: Seed = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the images; default: samples, or again with --from.")
    ] = None,
    sampler: SamplerName = None,
    guidance_scale: GuidanceScale = None,
    guidance_schedule: GuidanceSchedule = None,
    top_k: TopK = None,
    top_p: TopP = None,
    temperature: Temperature = None,
    steps: Steps = None,
    more_smooth: MoreSmooth = None,
    other_settings: SamplerSettings = [],  # noqa: B006
    batch_size: Annotated[
        str, typer.Option(help="Images sampled at once, or auto: as many as pay; changes speed, not images.")
    ] = "16",
    decode_batch_size: Annotated[int | None, typer.Option(help="Images decoded at once; default: a batch.")] = None,
    sheet: Annotated[
        bool, typer.Option("--sheet", help="Also write sheet.png with all images, a row per class.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(help="k/n: only items k, k + n, ...; machines share a run, 'vgen merge' joins it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time one item, print what the run would take as JSON, write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON instead of all file names.")] = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="Repeat the request inside a file made by vgen: PNG, MP4, GIF or npz.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Videos: frames in all; default: the model's own.")] = None,
    context: Annotated[
        Path | None, typer.Option(help="Videos: a clip to continue (mp4, gif, npz, ..., or a folder of frames).")
    ] = None,
    context_frames: Annotated[
        int | None, typer.Option(help="Videos: how many frames of the clip; default: all, or the model's own.")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option("--format", help="Images: png,npz,webdataset (default png). Videos: mp4,gif,png,npz (all)."),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Videos: frames per second of the files; default 10.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Sample images or videos into files that carry the request which repeats them.

    Example: vgen sample fashion-var --classes sneaker,bag --per-class 8 --seed 0 --out samples/

    Example: vgen sample models/far-b --frames 16 --context clip.mp4 --context-frames 4 --out clips/
    """
    settings = _given(
        other_settings,
        guidance_scale=guidance_scale,
        guidance_schedule=guidance_schedule,
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        steps=steps,
        more_smooth=more_smooth,
        frames=frames,
        context_frames=context_frames,
    )
    job = _SampleJob(out, batch_size, decode_batch_size, sheet, shard, overwrite, dry_run, as_json, formats, fps)
    if source is not None:
        if classes is not None or per_class != 1 or sheet:
            raise typer.BadParameter("--from repeats what is in its file: leave out --classes, --per-class and --sheet")
        _repeat(source, model, seed, sampler, settings, context, device, dtype, job)
        return
    if model is None:
        raise typer.BadParameter("name a model ('vgen models' lists them), or repeat an image with --from FILE")
    from vgen import batch, hub

    pipeline = hub.load(model, device=device or _own_device(), dtype=dtype)
    settings |= _context(context, context_frames, pipeline)
    pipeline.resolve_settings(settings, sampler)
    labels = _parse_classes(classes, pipeline)
    columns = per_class if sheet and per_class > 1 else 10 if sheet else 0
    _carry_out(pipeline, batch.plan(labels, per_class, seed or 0), settings, sampler, job, columns)


@dataclass(frozen=True)
class _SampleJob:
    """The flags of `vgen sample` that say where and how, not what."""

    out: Path | None
    batch_size: str
    decode_batch_size: int | None
    sheet: bool
    shard: str | None
    overwrite: bool
    dry_run: bool
    as_json: bool
    formats: str | None
    fps: float | None


def _carry_out(
    pipeline: Any, items: list[Any], settings: dict[str, Any], sampler: str | None, job: _SampleJob, columns: int = 0
) -> None:
    """Sample a plan's items, or say what that would take; several processes started by torchrun share it."""
    import json

    from vgen import batch

    files, part, processes = _files(job, pipeline), _shard(job.shard), _processes()
    if processes is not None:
        if part.count > 1:
            raise typer.BadParameter("torchrun divides the run by itself: leave out --shard")
        part = batch.Shard(processes.process_index, processes.num_processes)
        batch.check_sheet(columns, files, batch.Shard())
    if job.decode_batch_size is not None and job.decode_batch_size < 1:
        raise typer.BadParameter(f"--decode-batch-size is {job.decode_batch_size}: it must be at least 1")
    pipeline.decode_batch = job.decode_batch_size
    given: dict[str, Any] = {"settings": settings, "sampler": sampler, "files": files, "shard": part}
    if job.dry_run:
        print(json.dumps(batch.estimate(pipeline, items, **given), indent=1, sort_keys=True))
        return
    out, size = job.out or Path("samples"), _batch_size(job.batch_size)
    given |= {"batch_size": size, "sheet_columns": 0 if processes else columns, "overwrite": job.overwrite}
    try:
        done = batch.sample_to_files(pipeline, items, out, **given)
    except KeyboardInterrupt:
        print(f"vgen: interrupted; what is done is in {out}, and the same command goes on from there", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        print(f"vgen: what is done is in {out}, and the same command goes on from there", file=sys.stderr)
        raise error
    paths = done.paths
    if processes is not None:
        processes.wait_for_everyone()
        if not processes.is_main_process:
            return
        from vgen.shards import merge

        merge([out], verify=False)
        paths = batch.written_files(out, items, files)
        if columns:
            batch.write_sheet(out, items, files, columns)
    if job.as_json:
        print(json.dumps({"out": str(out), "files": len(paths), "made": done.made, "there": done.there}))
        return
    for path in paths:
        print(path)


def _batch_size(text: str) -> int | None:
    """A number, or None for "auto"."""
    if text.strip().lower() == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"--batch-size {text!r}: write a whole number, or auto") from error


def _shard(text: str | None) -> Any:
    from vgen.batch import Shard

    return Shard() if text is None else Shard.parse(text)


def _processes() -> Any:
    """The processes that torchrun or accelerate started together with this one; None where it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from vgen.evaluation.features import processes

    return processes()


def _own_device() -> str | None:
    """The GPU of this process among those that torchrun started; None where it is alone, or there are no GPUs."""
    processes = _processes()
    return str(processes.device) if processes is not None and processes.device.type == "cuda" else None


def _files(job: _SampleJob, pipeline: Any) -> Any:
    """What --format and --fps ask for."""
    from vgen.batch import ImageFiles, VideoFiles

    given: dict[str, Any] = {}
    if job.formats is not None:
        given["formats"] = tuple(dict.fromkeys(filter(None, (n.strip().lower() for n in job.formats.split(",")))))
    if pipeline.makes_videos:
        return VideoFiles(**given | ({} if job.fps is None else {"fps": job.fps}))
    if job.fps is not None:
        raise typer.BadParameter(f"{pipeline.source} makes images, which have no frames per second: leave out --fps")
    return ImageFiles(**given)


def _context(path: Path | None, count: Any, pipeline: Any) -> dict[str, Any]:
    """The clip that videos go on from, as a setting of the pipeline, which checks `count`; 0 frames need no clip."""
    if path is None:
        return {}
    if not pipeline.makes_videos:
        raise typer.BadParameter(f"{pipeline.source} makes images, which continue no clip: leave out --context")
    from vgen.videos import read_video

    pipeline.check_tokenizer()
    most = count if isinstance(count, int) and count > 0 else None
    return {"context": None if count == 0 else read_video(path, most, pipeline.tokenizer.image_size)[0]}


def _repeat(
    source: Path,
    model: str | None,
    seed: int | None,
    sampler: str | None,
    settings: dict[str, Any],
    context: Path | None,
    device: str | None,
    dtype: str | None,
    job: _SampleJob,
) -> None:
    """Carry out the request inside a file; flags override it."""
    from vgen import __version__, batch, hub
    from vgen.media import read_request
    from vgen.types import SettingError

    request = read_request(source)
    if model is None and hub.find_local(request.model) is None:  # a stranger's picture must not start a download
        raise SettingError(f"{source} was made with {request.model!r}, which is not here: name it before --from")
    pipeline = hub.load(model or request.model, device=device or request.device, dtype=dtype or request.dtype)
    for what, then, now in (
        ("weights", request.checkpoint, pipeline.checkpoint()),
        ("vgen", request.vgen, __version__),
    ):
        if then != now:
            print(f"vgen: made with {what} {then[:12]}, now {now[:12]}: pixels may differ", file=sys.stderr)
    count = settings.get("context_frames", request.settings.get("context_frames"))
    settings = request.settings | settings | _context(context, count, pipeline)
    pipeline.resolve_settings(settings, sampler or request.sampler)
    job = replace(job, out=job.out or Path("again"), overwrite=True)  # pictures of several requests may lie together
    _carry_out(pipeline, batch.from_request(request, seed), settings, sampler or request.sampler, job)


def _parse_classes(text: str | None, pipeline: Any) -> list[int] | None:
    """ "sneaker,bag", "0-4,7", "none" for unconditional; nothing means every class."""
    if text is None:
        return list(range(pipeline.null_class)) or None  # a model without classes is unconditional
    if text.strip().lower() == "none":
        return None
    labels: list[int | str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        if dash and first.isdigit() and last.isdigit():
            pipeline.label_ids([int(first), int(last)])  # before a range of billions is written out
            labels += range(int(first), int(last) + 1)
        else:
            labels.append(part)
    if not labels:
        raise typer.BadParameter(f"--classes {text!r} names no class: write names, ids or ranges like sneaker,0-4")
    return pipeline.label_ids(labels)


@app.command()
def evaluate(
    images: Annotated[
        str | None,
        typer.Argument(help="Images (a folder, .npz, .tar or fashion-mnist:test), or a model here to sample from."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="What to compare with: images as above, or an .npz of statistics.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="fid,sfid,kid,is,prc,frechet,mmd,accuracy,spectrum,memorization; prc@pixels: another network."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Judge this model's reconstructions of the reference: rfid,psnr,ssim,mse.")
    ] = None,
    train: Annotated[str | None, typer.Option(help="Training images, for memorization.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write figures and protocol to this file.")] = None,
    save_statistics: Annotated[
        Path | None, typer.Option(help="Write the images' statistics to this .npz, to be a --reference later.")
    ] = None,
    nearest_sheet: Annotated[
        Path | None, typer.Option(help="With memorization: PNG of the closest images and their training neighbours.")
    ] = None,
    grid: Annotated[
        list[str], typer.Option("--grid", metavar="SETTING=A,B,C", help="Evaluate a model at each value; repeatable.")
    ] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="With --grid: folder for curve.csv, curve.json and curve.png.")] = Path(
        "curve"
    ),
    weights: Annotated[Path | None, typer.Option(help="The FID Inception's weights.")] = None,
    fvd_weights: Annotated[Path | None, typer.Option(help="i3d_torchscript.pt, for fvd.")] = None,
    resize: Annotated[
        str, typer.Option(help="legacy (TensorFlow 1's, as published) or clean (clean-fid's).")
    ] = "legacy",
    extractor_dtype: Annotated[str, typer.Option(help="Inception's: float32, or bfloat16 for speed.")] = "float32",
    neighbours: Annotated[int, typer.Option(help="k of precision and recall.")] = 3,
    kid_subsets: Annotated[int, typer.Option(help="Random subsets of KID.")] = 100,
    kid_subset_size: Annotated[int, typer.Option(help="Images in each.")] = 1000,
    splits: Annotated[int, typer.Option(help="Parts of the Inception Score.")] = 10,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out files that cannot be read; exit code 3.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of extracted features; default $VGEN_CACHE/features.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images sampled, and kept in the cache, together.")] = 64,
    classes: Classes = None,
    per_class: Annotated[int | None, typer.Option(help="Samples per class of a model; default 50.")] = None,
    seed: Seed = None,
    sampler: SamplerName = None,
    guidance_scale: GuidanceScale = None,
    guidance_schedule: GuidanceSchedule = None,
    top_k: TopK = None,
    top_p: TopP = None,
    temperature: Temperature = None,
    steps: Steps = None,
    more_smooth: MoreSmooth = None,
    other_settings: SamplerSettings = [],  # noqa: B006
    device: Device = None,
    dtype: Dtype = None,
    data_root: DataRoot = None,
) -> None:
    """Judge images, a model's samples or a tokenizer's reconstructions; every figure comes with its protocol.

    Example: vgen evaluate samples/ --reference fashion-mnist:test --metrics fid,kid,prc
    """
    from vgen.evaluation.run import Task, run

    settings = _given(
        other_settings,
        guidance_scale=guidance_scale,
        guidance_schedule=guidance_schedule,
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        steps=steps,
        more_smooth=more_smooth,
    )
    task = Task(
        images=images,
        reference=reference,
        metrics=metrics,
        tokenizer=tokenizer,
        train=train,
        json_file=json_file,
        save_statistics=save_statistics,
        nearest_sheet=nearest_sheet,
        grid=grid,
        out=out,
        weights=weights,
        fvd_weights=fvd_weights,
        resize=resize,
        extractor_dtype=extractor_dtype,
        neighbours=neighbours,
        kid_subsets=kid_subsets,
        kid_subset_size=kid_subset_size,
        splits=splits,
        skip_broken=skip_broken,
        cache=cache,
        batch_size=batch_size,
        classes=classes,
        per_class=per_class,
        seed=seed,
        sampler=sampler,
        settings=settings,
        device=device,
        dtype=dtype,
        data_root=data_root,
    )
    broken = run(task, lambda pipeline: _parse_classes(classes, pipeline))
    if broken:
        raise typer.Exit(SOME_FAILED)


@app.command()
def convert(
    family: Annotated[str, typer.Argument(help="var, mvar, maskgit, mage, mar, far or recurrent.")],
    transformer: Annotated[Path, typer.Option(help="The published transformer, .pth or .safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder for the converted model.")],
    tokenizer: Annotated[Path | None, typer.Option(help="The published tokenizer; images need it.")] = None,
    scales: Annotated[
        str | None, typer.Option(help="Sides of the scales, 1,2,3,...; default: as the file says.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads where the file cannot tell.")] = None,
    decoder_heads: Annotated[int | None, typer.Option(help="mage: those of its decoder.")] = None,
    side: Annotated[int | None, typer.Option(help="far: rows and columns of a latent, 8 if not told.")] = None,
    patch_size: Annotated[int | None, typer.Option(help="far: rows and columns of a token, 1 if not told.")] = None,
    rope_axes: Annotated[
        str | None, typer.Option(help="far: head channels for time, row and column: 16,24,24.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="far, of FAR-Long: frames at full resolution, 16.")] = None,
    slope: Annotated[float | None, typer.Option(help="far: temporal decay of attention, 0.")] = None,
    recurrences: Annotated[int | None, typer.Option(help="recurrent: runs of its loop per token, 32.")] = None,
    class_names: Annotated[Path | None, typer.Option(help="Text file with one class name a line.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 (default), bfloat16 or float16.")] = "float32",
) -> None:
    """Convert published checkpoints to a vgen model folder.

    Example: vgen convert var --transformer var_d16.pth --tokenizer vae_ch160v4096z32.pth --out models/var-d16
    """
    from vgen import conversion, hub

    kind = hub.parse_dtype(dtype)
    given: dict[str, Any] = {"heads": heads, "decoder_heads": decoder_heads, "side": side, "patch_size": patch_size}
    given |= {"window": window, "slope": slope, "recurrences": recurrences}
    given |= {"scales": _whole_numbers("--scales", scales), "rope_axes": _whole_numbers("--rope-axes", rope_axes)}
    overrides = {name: value for name, value in given.items() if value is not None}
    if class_names:
        overrides["class_names"] = class_names.read_text().splitlines()
    pipeline = conversion.convert(family, transformer=transformer, tokenizer=tokenizer, **overrides)
    print(f"vgen: writing {out}", file=sys.stderr)
    conversion.save(pipeline, out, kind)
    print(out)


def _whole_numbers(option: str, text: str | None) -> list[int] | None:
    """A list such as 1,2,3. Raises typer's error for anything else."""
    try:
        return [int(number) for number in text.split(",")] if text else None
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text!r}: write whole numbers like 1,2,3") from error


@app.command()
def merge(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders that 'vgen sample' wrote, with the shards of one run.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for all files, or an .npz of all images; default: into the one folder."),
    ] = None,
) -> None:
    """Put the shards of a run together, after checking that nothing is missing, twice there or damaged.

    Example: vgen merge machine-a/ machine-b/ --out samples.npz
    """
    from vgen import shards

    for path in shards.merge(folders, out):
        print(path)


@app.command()
def info(
    path: Annotated[
        str | None,
        typer.Argument(help="A PNG made by vgen, a model (name or folder) or a .safetensors file; none: this machine."),
    ] = None,
) -> None:
    """Print what a file holds, as JSON: the request in a picture, or a model's configuration and size.

    Without a file, what this machine brings: versions, device, threads, and how Mamba's scans are computed.

    Example: vgen info samples/000000_c0007_s0.png
    """
    import json

    from vgen.inspection import describe, describe_machine

    print(json.dumps(describe_machine() if path is None else describe(path), indent=2, sort_keys=True))


@app.command()
def models() -> None:
    """List the bundled models, one a line: name, parameters, classes.

    Example: vgen models
    """
    from vgen.hub import list_models
    from vgen.inspection import describe

    for name in list_models():
        found = describe(name)
        print(f"{name}\t{found['parameters'] / 1e6:.1f}M parameters\t{len(found['classes'])} classes")


@app.command()
def studio(
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860 on.")] = None,
    out: Annotated[Path, typer.Option(help="Where everything that is made goes.")] = Path("studio"),
    models: Annotated[
        Path | None, typer.Option(help="A folder of more models, each as 'vgen convert' and training write them.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    listen: Annotated[
        bool, typer.Option("--listen", help="Serve to other machines too, not to this one alone; think of --auth.")
    ] = False,
    auth: Annotated[
        str | None,
        typer.Option(help="Ask for a login: NAME:PASSWORD, several by commas.", envvar="VGEN_STUDIO_AUTH"),
    ] = None,
    allow_upload: Annotated[
        bool, typer.Option("--allow-upload", help="Let visitors bring checkpoints, safetensors alone.")
    ] = False,
    mcp: Annotated[bool, typer.Option("--mcp", help="Serve the named endpoints as MCP tools as well.")] = False,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Open the studio: a web page to generate, compare, edit, inspect and evaluate in.

    Example: vgen studio --port 7860
    """
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise typer.BadParameter("the studio needs Gradio: pip install 'vgen[studio]'")
    if port is not None and not 1 <= port <= 65535:
        raise typer.BadParameter(f"--port is {port}: it must lie in 1..65535")
    from vgen.app.studio import Options, serve

    logins = _logins(auth)
    if listen and not logins:
        _fail("warning: everybody who can reach this machine can use the studio: give --auth NAME:PASSWORD", DONE)
    serve(
        Options(
            folder=out,
            models=models,
            device=device,
            dtype=dtype,
            allow_upload=allow_upload,
            port=port,
            listen=listen,
            auth=logins,
            mcp=mcp,
            browser=browser,
        )
    )


def _logins(text: str | None) -> list[tuple[str, str]] | None:
    """NAME:PASSWORD, several by commas."""
    found = []
    for part in (text or "").split(",") if text else []:
        name, colon, password = part.partition(":")
        if not name.strip() or not colon or not password:
            raise typer.BadParameter("--auth is no NAME:PASSWORD: write both, several by commas")  # says no secret
        found.append((name.strip(), password))
    return found or None


def main(arguments: list[str] | None = None) -> int:
    """Run a command and turn every expected failure into one line and an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    warnings.showwarning = _show_warning
    try:
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:
            return _fail("interrupted", INTERRUPTED)
        return code if isinstance(code, int) else DONE
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            return main([*arguments, "--help"])
        return _fail(f"{error.format_message()} (see --help)", WRONG_USAGE)
    except SystemExit as stop:  # typer's answer to a closed pipe
        return int(stop.code or DONE)
    except Exception as error:
        if debug:
            raise
        return _explain(error)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """One line, as for errors, where it concerns the user; otherwise as Python does."""
    if category.__name__ == "ModelWarning":
        _fail(f"warning: {message}", DONE)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))


def _explain(error: Exception) -> int:
    """One line for an error; errors nobody foresaw say how to see more."""
    name = type(error).__name__
    full = ("No space left on device", "Disk quota exceeded", "File too large", "file write failed")
    if any(words in str(error) for words in full):
        return _fail(
            "the disk is full: what was being written is gone, the rest is whole; free space and repeat", FAILED
        )
    if name == "Interrupted":
        return _fail(str(error), INTERRUPTED)
    if isinstance(error, ValueError):
        return _fail(str(error), WRONG_USAGE)
    if isinstance(error, OSError):
        return _fail(f"{error.strerror}: {error.filename}" if error.strerror else str(error), FAILED)
    if name in ("CheckpointError", "Diverged"):
        return _fail(str(error), FAILED)
    return _fail(f"{name}: {error} (run again with --debug for the traceback)", FAILED)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    print(f"vgen: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
