"""Figures with their protocols, as lines for people and as JSON for programs."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vgen import __version__
from vgen.files import atomic_file


@dataclass
class Report:
    """What an evaluation found, and what one must know to compare it."""

    images: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)  # by metric
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: float, protocol: dict[str, Any]) -> None:
        self.metrics[name] = value
        self.protocols[name] = protocol

    def lines(self) -> Iterator[str]:
        """One line a figure: name, value and protocol, tabs between them."""
        for name, value in self.metrics.items():
            yield f"{name}\t{value:.6g}\t{self.protocol_line(name)}"

    def protocol_line(self, name: str) -> str:
        """Everything that decides a figure, in words."""
        images, protocol = self.images, dict(self.protocols[name])
        words = [f"N={images['n']}{_per_class(images.get('per_class'))}", f"images={images['name']}"]
        words.append(f"sha256:{images['sha256'][:12]}")
        for role in ("reference", "train"):
            if (found := protocol.pop(role, None)) is not None:
                number = found.get("n")
                words.append(f"{role}={found['name']} N={'unknown' if number is None else number}")
                words.append(f"sha256:{found['sha256'][:12]}")
        if "extractor" in protocol:
            words.append(f"extractor={protocol.pop('extractor')} sha256:{protocol.pop('extractor_sha256')[:12]}")
        words += [f"{key}={value}" for key, value in protocol.items()]
        words += [f"{key}={images[key]}" for key in ("files", "size", "grey", "seeds") if key in images]
        sampling = images.get("sampling", {})
        words += [f"{key}={value}" for key, value in sampling.items() if key not in ("vgen", "dtype", "device")]
        if "dtype" in sampling:
            words.append(f"sampled_in={sampling['dtype']} on {sampling.get('device')}")
        return "  ".join([*words, f"vgen={images['vgen']}"])

    def to_json(self) -> str:
        """Everything; figures without a value are null."""
        content = {
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.metrics.items()},
            "images": self.images,
            "protocol": self.protocols,
            "lines": {name: self.protocol_line(name) for name in self.metrics},
            "details": self.details,
            "warnings": self.warnings,
            "vgen": __version__,
        }
        return json.dumps(content, indent=2) + "\n"

    def save(self, path: Path) -> None:
        with atomic_file(path) as partial:
            partial.write_text(self.to_json())


def _per_class(counts: dict[str, int] | None) -> str:
    if not counts:
        return ""
    numbers = set(counts.values())
    return f" ({numbers.pop()}/class)" if len(numbers) == 1 else f" ({min(numbers)}-{max(numbers)}/class)"
