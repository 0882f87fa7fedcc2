"""Run mypy on the package as it is installed: vgen/tokenizers and vgen/samplers in their places.

In the checkout those folders lie beside vgen/, where a type checker cannot find them under their real names.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

with tempfile.TemporaryDirectory() as folder:
    tree = Path(folder)
    shutil.copytree(ROOT / "vgen", tree / "vgen", ignore=shutil.ignore_patterns("zoo", "__pycache__"))
    for name in ("tokenizers", "samplers", "app"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / "vgen" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "scripts", tree / "scripts")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "-p", "vgen", "-p", "scripts"]
    sys.exit(subprocess.run(command, cwd=tree, check=False).returncode)
