"""The command line: thin wrappers that build a request or a configuration and drain the work.

Heavy imports stay inside the commands, so that help is instant.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="vgen",
    help="A studio for visual autoregressive generation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
train_app = typer.Typer(
    name="train", help="Train a tokenizer or a generator from a preset.", no_args_is_help=True, rich_markup_mode=None
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
    Path | None, typer.Option("--data-root", help="Where data sets lie; default $VGEN_DATA or ~/.cache/vgen/data.")
]


@train_app.command("tokenizer")
def train_tokenizer(
    preset: Preset,
    settings: Settings = [],  # noqa: B006
    out: OutFolder = None,
    resume: Resume = False,
    data_root: DataRoot = None,
) -> None:
    """Train a tokenizer.

    Example: vgen train tokenizer --preset fashion-vq --set steps=2000
    """
    _train("tokenizer", preset, settings, out, resume, data_root)


@train_app.command("generator")
def train_generator(
    preset: Preset,
    settings: Settings = [],  # noqa: B006
    out: OutFolder = None,
    resume: Resume = False,
    data_root: DataRoot = None,
) -> None:
    """Train a generator on a trained tokenizer.

    Example: vgen train generator --preset fashion-var --set tokenizer=runs/fashion-vq/model
    """
    _train("generator", preset, settings, out, resume, data_root)


def _train(kind: str, preset: str, settings: list[str], out: Path | None, resume: bool, data_root: Path | None) -> None:
    from vgen.training.config import load_config

    overrides = [*settings, *([f"data_root={data_root}"] if data_root else [])]
    config = load_config(preset, overrides, kind)

    from vgen.training.run import start

    shown = " ".join(["vgen", "train", kind, "--preset", preset, *(f"--set {item}" for item in settings)])
    folder = start(config, out or Path("runs") / config.name, resume, command=shown)
    print(folder)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and turn every expected failure into one line and an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
        return code if isinstance(code, int) else DONE
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except ClickException as error:
        return _fail(f"{error.format_message()} (see --help)", WRONG_USAGE)
    except Exception as error:
        if debug:
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    """One line for an error; errors nobody foresaw say how to see more."""
    name = type(error).__name__
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
