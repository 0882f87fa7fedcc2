"""vgen: a studio for visual autoregressive generation. The public API, loaded on first use.

pipe = vgen.load("fashion-var")
images = pipe(class_labels=["sneaker"], seeds=[0]).images
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout, vgen.tokenizers, vgen.samplers and vgen.app lie beside this package instead of in it.
if (Path(__file__).parents[1] / "pyproject.toml").is_file():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from vgen.conversion import convert as convert
    from vgen.hub import list_models as list_models
    from vgen.hub import load as load
    from vgen.types import Output as Output
    from vgen.types import Request as Request
    from vgen.types import Step as Step

# Importing torch and diffusers takes seconds: `import vgen` alone must not.
_HOME = {
    "convert": "vgen.conversion",
    "list_models": "vgen.hub",
    "load": "vgen.hub",
    "Output": "vgen.types",
    "Request": "vgen.types",
    "Step": "vgen.types",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vgen' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
