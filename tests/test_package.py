"""The package as a whole: its floors, its lazy imports, its neighbours' names, and the wheel."""

import ast
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import ROOT, python, tiny_pipeline

import vgen

# DESIGN.md section 1: each floor stands only on those below it. A package may import from its own floor itself.
FLOORS = [
    {"vgen", "vgen.types"},
    {"vgen.emoji"},
    {
        "vgen.files",
        "vgen.memory",
        "vgen.ffmpeg",
        "vgen.data",
        "vgen.scan",
        "vgen.spectrum",
        "vgen.rng",
        "vgen.progress",
    },
    {"vgen.layers", "vgen.tokenizers", "vgen.samplers", "vgen.media", "vgen.ledger"},
    {"vgen.generators", "vgen.videos"},
    {"vgen.pipelines", "vgen.moving", "vgen.outputs"},
    {"vgen.converters"},
    {"vgen.hub", "vgen.conversion"},
    {"vgen.batch", "vgen.shards", "vgen.inspection"},
    {"vgen.evaluation"},
    {"vgen.training"},  # which logs the evaluator's quick figures
    {"vgen.app"},
    {"vgen.cli"},
    {"scripts"},
]
LEVEL = {unit: level for level, floor in enumerate(FLOORS) for unit in floor}
FOLDERS = {"vgen": "vgen", "tokenizers": "vgen.tokenizers", "samplers": "vgen.samplers", "app": "vgen.app"}
MODULES = [
    (path, ".".join([prefix, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__"))
    for folder, prefix in (FOLDERS | {"scripts": "scripts"}).items()
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def unit(module: str) -> str:
    """The member of a floor that a module belongs to."""
    parts = module.split(".")
    if module.startswith("scripts"):
        return "scripts"
    return "vgen" if module == "vgen" or parts[1] in vgen.__all__ or parts[1][:2] == "__" else ".".join(parts[:2])


def imports(path: Path, module: str) -> set[str]:
    """Full names of everything a file imports, at its top, inside functions, or for type checkers."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *base.split(".")])
            found |= {f"{base.strip('.')}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {item.value for item in node.args if isinstance(item, ast.Constant)}
    return found


def breach(module: str, imported: str) -> bool:
    """Whether the floors forbid this import."""
    if imported.split(".")[0] != "vgen":
        return False
    above, below = unit(module), unit(imported)
    if "vgen.samplers" == above != below:
        return below not in ("vgen", "vgen.types", "vgen.rng")
    return above != below and LEVEL[below] >= LEVEL[above]


# ---- floors


@pytest.mark.parametrize(("path", "module"), MODULES, ids=[module for _, module in MODULES])
def test_a_module_stands_on_the_floors_below_it(path: Path, module: str) -> None:
    assert unit(module) in LEVEL, f"{module} has no floor yet: give it one here and in DESIGN.md"
    if module != "vgen":  # the package itself names the public API, which is loaded on first use
        assert sorted(name for name in imports(path, module) if breach(module, name)) == []


@pytest.mark.parametrize(
    ("module", "imported", "forbidden"),
    [
        ("vgen.samplers.logits", "vgen.layers.attention", True),
        ("vgen.samplers.logits", "vgen.data.to_uint8", True),
        ("vgen.samplers.next_scale", "vgen.samplers.logits.draw", False),
        ("vgen.samplers.next_scale", "vgen.types.Step", False),
        ("vgen.tokenizers.multiscale", "vgen.samplers.logits.draw", True),
        ("vgen.tokenizers.multiscale", "vgen.generators.var.VAR", True),
        ("vgen.generators.var", "vgen.tokenizers.codebook.Codebook", False),  # forbidden by the next test
        ("vgen.generators.var", "vgen.layers.attention", False),
        ("vgen.pipelines.base", "vgen.hub.load", True),
        ("vgen.pipelines.base", "vgen.__version__", False),
        ("vgen.hub", "vgen.conversion.save", True),
        ("vgen.types", "vgen.files.sha256", True),
        ("vgen.batch", "vgen.training.run", True),
        ("vgen.evaluation.metrics", "vgen.training.run", True),
        ("vgen.cli", "vgen.hub.load", False),
        ("vgen.generators.var", "tokenizers.Tokenizer", False),
    ],
)
def test_the_rule_itself(module: str, imported: str, forbidden: bool) -> None:
    assert breach(module, imported) == forbidden


def test_tokenizers_generators_and_samplers_never_import_one_another() -> None:
    families = {"vgen.tokenizers", "vgen.generators", "vgen.samplers"}
    met = {
        (module, name)
        for path, module in MODULES
        if unit(module) in families
        for name in imports(path, module)
        if name.split(".")[0] == "vgen" and unit(name) in families - {unit(module)}
    }
    assert met == set()


def test_our_folders_are_never_imported_by_their_bare_names() -> None:
    bare = {"tokenizers", "samplers", "app", "scripts"}
    for path, module in MODULES:
        if not module.startswith("scripts"):
            assert not {name.split(".")[0] for name in imports(path, module)} & bare, module


# ---- names of others


def test_the_folders_are_no_regular_packages() -> None:
    """A regular package would hide Hugging Face's `tokenizers` from every program run in this folder."""
    assert [folder for folder in ("tokenizers", "samplers", "app") if (ROOT / folder / "__init__.py").exists()] == []


def test_a_bare_tokenizers_is_somebody_elses(tmp_path: Path) -> None:
    """Even from the repository's root, where the current folder comes first."""
    for name in ("tokenizers", "samplers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'somebody else'")
    program = """
import tokenizers, samplers
assert tokenizers.OWNER == samplers.OWNER == "somebody else"
import vgen.tokenizers.codebook, vgen.samplers.logits
from vgen.hub import load
assert tokenizers.OWNER == samplers.OWNER == "somebody else"
assert vgen.tokenizers is not tokenizers
"""
    done = python("-c", program, cwd=ROOT, path=[tmp_path])
    assert done.returncode == 0, done.stderr


def test_pytest_works_beside_a_regular_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "__init__.py").write_text("OWNER = 'somebody else'")
    (tmp_path / "beside.py").write_text("import tokenizers\ntokenizers.OWNER\n")
    arguments = ["-m", "pytest", "-p", "beside", "-p", "no:cacheprovider", "tests/test_files.py", "-k", "hash"]
    done = python(*arguments, cwd=ROOT, path=[tmp_path])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


# ---- imports


@pytest.mark.parametrize(
    "program",
    [
        "import vgen; dir(vgen); vgen.__version__",
        "import vgen.cli",
        "import vgen.cli; vgen.cli.main(['--help'])",
        "import vgen.cli; vgen.cli.main(['sample', '--help'])",
        "import vgen.cli; vgen.cli.main(['train', 'generator', '--help'])",
    ],
)
def test_heavy_libraries_wait_until_they_are_needed(program: str) -> None:
    heavy = ["torch", "torchvision", "diffusers", "accelerate", "numpy", "safetensors", "matplotlib", "huggingface_hub"]
    check = f"{program}\nimport sys, json; print(json.dumps([n for n in {heavy} if n in sys.modules]))"
    done = python("-c", check, cwd=ROOT)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == [], done.stderr


def test_the_public_api_is_what_all_says() -> None:
    assert vgen.__all__ == ["Output", "Request", "Step", "convert", "list_models", "load"]
    for name in vgen.__all__:
        assert getattr(vgen, name).__module__ == vgen._HOME[name]
    names: dict[str, object] = {}
    exec("from vgen import *", names)
    assert set(vgen.__all__) <= names.keys()
    assert set(vgen.__all__) <= set(dir(vgen))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        vgen.laod  # noqa: B018


# ---- the wheel


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of a wheel, built from a copy so that nothing is left in the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns(
        ".*", "runs", "models", "samples", "build", "dist", "*.egg-info", "__pycache__", "tests"
    )
    source = shutil.copytree(ROOT, work / "source", ignore=leave)
    done = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "unpacked")
    return work / "unpacked"


@pytest.mark.slow
def test_the_wheel_holds_all_of_the_package(unpacked: Path) -> None:
    for folder, prefix in FOLDERS.items():
        home = unpacked / prefix.replace(".", os.sep)
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (home / path.relative_to(ROOT / folder)).is_file(), f"{path} is not in the wheel"
    assert list((unpacked / "vgen" / "training" / "presets").glob("*.yaml"))
    top = {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"vgen"}  # above all no bare tokenizers


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    """PYTHONPATH is searched before site-packages and before an editable install's own finder, which only sees what
    the path has not given; so the unpacked wheel is what is imported, and the program checks that it is."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    program = f"""
import sys, vgen, vgen.tokenizers.multiscale, vgen.samplers.next_scale, vgen.cli
from pathlib import Path
for module in (vgen, vgen.tokenizers.multiscale, vgen.samplers.next_scale):
    assert Path(module.__file__).is_relative_to({str(unpacked)!r}), module.__file__
assert len(vgen.__path__) == 1
assert not any(str(getattr(m, "__file__", "")).startswith({str(ROOT)!r} + "/vgen") for m in sys.modules.values())
sys.exit(vgen.cli.main(["sample", "model", "--classes", "bee", "--out", "out"]))
"""
    done = python("-c", program, cwd=tmp_path, path=[unpacked])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(Path("out") / "000000_c0001_s0.png")]
    done = python(
        "-m", "vgen.cli", "sample", "model", "--classes", "0-1", "--out", "more", cwd=tmp_path, path=[unpacked]
    )
    assert done.returncode == 0 and len(list((tmp_path / "more").glob("*.png"))) == 2, done.stderr


def test_the_command_and_the_module_are_one(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("vgen")
    module = python("-m", "vgen.cli", "--help", cwd=tmp_path)
    assert module.returncode == 0 and "sample" in module.stdout
    if command.exists():  # not where the tests run from an uninstalled checkout
        program = "import subprocess, sys; sys.exit(subprocess.run([sys.argv[1], '--help']).returncode)"
        lines = python("-c", program, str(command), cwd=tmp_path).stdout.splitlines()
        assert lines[0].startswith("Usage: vgen ") and lines[1:] == module.stdout.splitlines()[1:]
