"""The models that a studio offers, and those of them that are in memory.

Names come from lists alone: what a visitor types never becomes a path.
"""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from vgen import hub, inspection
from vgen.types import SettingError

HELD = 3  # models in memory
LICENSES = ("license", "license_name")


class Models:
    """Loads models by name and keeps the last ones used.

    Args:
        folder: of more models beside the bundled ones, each a folder as `vgen convert` and training write them.
        device, dtype: as in vgen.load.
    """

    def __init__(self, folder: Path | None = None, device: str | None = None, dtype: str | None = None) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        hub.place(device, dtype)  # a device that is not there shows before the page does
        if folder is not None and not folder.is_dir():
            raise SettingError(f"there is no folder {str(folder)!r}: name one that holds models")
        self._lock = threading.RLock()
        self._loaded: OrderedDict[str, Any] = OrderedDict()
        self._told: dict[str, dict[str, Any]] = {}

    def folders(self) -> dict[str, Path]:
        """Where each model lies, by name: bundled ones, then those of the studio's folder."""
        found = {name: hub.ZOO / name for name in hub.list_models()}
        if self.folder is not None:
            for index in sorted(self.folder.glob("*/model_index.json")):
                found.setdefault(index.parent.name, index.parent)
        return found

    def names(self) -> list[str]:
        return list(self.folders())

    def usual(self, wanted: str = "fashion-var") -> str:
        """The model that a form begins with: the wanted one, or the first where it is not here."""
        names = self.names()
        return wanted if wanted in names else names[0]

    def loaded(self) -> list[str]:
        """Names of the models in memory, the least recently used first."""
        with self._lock:
            return list(self._loaded)

    def get(self, name: str) -> Any:
        """A pipeline, loaded where it is not in memory. Raises SettingError for a name that is not on the list."""
        folders = self.folders()
        if name not in folders:
            raise SettingError(f"there is no model {str(name)[:80]!r}: use one of {', '.join(folders)}")
        with self._lock:
            if name in self._loaded:
                self._loaded.move_to_end(name)
                return self._loaded[name]
            bundled = folders[name].parent == hub.ZOO
            pipeline = hub.load(name if bundled else folders[name], device=self.device, dtype=self.dtype)
            pipeline.source = name  # of a request: a path of this machine is nobody's business
            self._loaded[name] = pipeline
            while len(self._loaded) > HELD:
                self._loaded.popitem(last=False)
            return pipeline

    def unload(self, name: str) -> bool:
        """Forget a model in memory; a run that uses it goes on. False where it was not there."""
        with self._lock:
            return self._loaded.pop(name, None) is not None

    def describe(self, name: str) -> dict[str, Any]:
        """What a model is, read without loading it (vgen.inspection), with its card and licence."""
        folders = self.folders()
        if name not in folders:
            raise SettingError(f"there is no model {str(name)[:80]!r}: use one of {', '.join(folders)}")
        with self._lock:
            if name not in self._told:
                card = folders[name] / "README.md"
                text = card.read_text(errors="replace")[:20_000] if card.is_file() else ""
                self._told[name] = inspection.describe(str(folders[name])) | {"card": text, "license": _license(text)}
            return self._told[name]

    def forget(self, name: str) -> None:
        """Read a model anew the next time: its files have changed."""
        with self._lock:
            self._told.pop(name, None)
            self._loaded.pop(name, None)


def _license(card: str) -> str:
    """What a model card's front matter says."""
    head = card.split("---")[1] if card.startswith("---") and card.count("---") > 1 else ""
    values = dict(line.split(":", 1) for line in head.splitlines() if ":" in line)
    return next((values[name].strip() for name in LICENSES if name in values), "not stated")
