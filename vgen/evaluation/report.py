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
        """Enter a figure, and how it was obtained."""
        self.metrics[name] = value
        self.protocols[name] = protocol

    def lines(self) -> Iterator[str]:
        """One line a figure for programs: name, value and protocol, tabs between them."""
        for name, value in self.metrics.items():
            yield f"{name}\t{value:.6g}\t{self.protocol_line(name)}"

    def table(self) -> Iterator[str]:
        """The same for people: the figures in a column, then each protocol once, with the figures it belongs to."""
        width = max(map(len, self.metrics), default=0)
        for name, value in self.metrics.items():
            yield f"{name.ljust(width)}  {value:.6g}"
        sharing: dict[str, list[str]] = {}
        for name in self.metrics:
            sharing.setdefault(self.protocol_line(name), []).append(name)
        for line, names in sharing.items():
            yield f"\n{', '.join(names)}:\n  " + line.replace("  ", "\n  ")

    def protocol_line(self, name: str) -> str:
        """Everything that decides a figure, in words; two spaces between its parts."""
        images, protocol = self.images, dict(self.protocols[name])
        parts = [f"N={images['n']}{_per_class(images.get('per_class'))}"]
        parts.append(_source("images", images["name"], None, images["sha256"]))
        for role in ("reference", "train"):
            if (found := protocol.pop(role, None)) is not None:
                parts.append(_source(role, found["name"], found.get("n") or "unknown", found["sha256"]))
        if "extractor" in protocol:
            parts.append(_source("extractor", protocol.pop("extractor"), None, protocol.pop("extractor_sha256")))
        parts += [f"{key}={value}" for key, value in protocol.items()]
        parts += [f"{key}={images[key]}" for key in ("files", "size", "grey", "seeds") if key in images]
        if sampling := images.get("sampling"):
            parts.append("sampled with " + " ".join(f"{key}={value}" for key, value in sampling.items()))
        return "  ".join([*parts, f"vgen={images['vgen']}"])

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
        """Write it as JSON, whole or not at all."""
        with atomic_file(path) as partial:
            partial.write_text(self.to_json())


def _source(role: str, name: str, number: Any, digest: str) -> str:
    count = "" if number is None else f" N={number}"
    return f"{role}={' '.join(name.split())}{count} sha256:{digest[:12]}"  # a tab or newline would break the line


def _per_class(counts: dict[str, int] | None) -> str:
    if not counts:
        return ""
    numbers = set(counts.values())
    return f" ({numbers.pop()}/class)" if len(numbers) == 1 else f" ({min(numbers)}-{max(numbers)}/class)"
