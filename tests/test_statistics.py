"""Files of means and covariances: ours, and those of ADM's and pytorch-fid's kind."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vgen.evaluation import statistics
from vgen.evaluation.extractors import Extractor
from vgen.evaluation.features import Features
from vgen.evaluation.metrics import frechet_distance
from vgen.evaluation.statistics import (
    Statistics,
    check_comparable,
    extractor_facts,
    measure,
    read_statistics,
    save_statistics,
)
from vgen.types import SettingError


class InceptionLike:
    """What an extractor tells of itself."""

    name = "some-network"
    digest = "ab" * 32
    layers = ("features", "spatial")
    preferred_batch = 4
    protocol: dict[str, str] = {"resize": "legacy", "dtype": "float32"}  # noqa: RUF012

    def __call__(self, images: Tensor, layers: Any) -> dict[str, Tensor]:
        raise AssertionError("its features are stored already")


class PixelsLike(InceptionLike):
    protocol: dict[str, str] = {}  # noqa: RUF012


PixelsLike.__name__ = "Pixels"

ROWS = {
    "features": torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + 3,
    "spatial": torch.randn(60, 8, generator=torch.Generator().manual_seed(1)),
}


class StoredFeatures:
    """Features in blocks, as the store gives them."""

    content = "cd" * 32
    images = SimpleNamespace(name="some/folder", facts={"size": "32x32"})

    def __len__(self) -> int:
        return 60

    def blocks(self, extractor: Extractor, layer: str) -> Iterator[Tensor]:
        return iter(ROWS[layer].split([13, 1, 46]))


FEATURES: Features = StoredFeatures()  # type: ignore[assignment]
EXTRACTOR: Extractor = InceptionLike()


def cov(layer: str) -> np.ndarray:
    return np.cov(ROWS[layer].double().numpy(), rowvar=False)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def plain(path: Path, width: int = 4, **changes: Any) -> Path:
    """`mu` and `sigma` alone, as pytorch-fid writes them."""
    return npz(path, **{"mu": np.arange(float(width)), "sigma": 2 * np.eye(width), **changes})


def matrix(statistics: Statistics | None, layer: str = "features") -> tuple[Tensor, Tensor]:
    assert statistics is not None
    return statistics.moments[layer]


# ---- ours


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "ours.npz"
    save_statistics(path, FEATURES, EXTRACTOR, ("features", "spatial"))
    return path


@pytest.mark.parametrize("layer", ["features", "spatial"])
def test_statistics_are_measured_in_blocks(layer: str) -> None:
    mean, covariance = measure(FEATURES, EXTRACTOR, layer)
    np.testing.assert_allclose(mean, ROWS[layer].double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, cov(layer), rtol=0, atol=1e-12)


def test_what_was_written_is_read(ours: Path) -> None:
    found = read_statistics(ours)
    assert found is not None and found.moments.keys() == {"features", "spatial"}
    for layer, (mean, covariance) in found.moments.items():
        wanted = measure(FEATURES, EXTRACTOR, layer)
        assert torch.equal(mean, wanted[0]) and torch.equal(covariance, wanted[1])
        assert frechet_distance(mean, covariance, *wanted) == 0
    assert found.sha256 == hashlib.sha256(ours.read_bytes()).hexdigest()
    assert found.protocol == {
        "extractor": "some-network",
        "extractor_sha256": "ab" * 32,
        "resize": "legacy",
        "dtype": "float32",
        "images": "some/folder",
        "n": 60,
        "images_sha256": "cd" * 32,
        "image_size": "32x32",
    }


def test_other_tools_read_our_files(ours: Path) -> None:
    """ADM's evaluator takes mu, sigma, mu_s and sigma_s, pytorch-fid the first two, both without pickle."""
    with np.load(ours, allow_pickle=False) as found:
        assert set(found.files) == {"mu", "sigma", "mu_s", "sigma_s", "protocol"}
        np.testing.assert_allclose(found["sigma"], cov("features"), rtol=0, atol=1e-12)
        np.testing.assert_allclose(found["sigma_s"], cov("spatial"), rtol=0, atol=1e-12)
        assert found["mu"].shape == (5,) and found["mu_s"].shape == (8,)
        assert found["mu"].dtype == found["sigma"].dtype == np.float64
        assert json.loads(str(found["protocol"]))["n"] == 60


def test_only_the_layers_asked_for_are_written(tmp_path: Path) -> None:
    save_statistics(tmp_path / "s.npz", FEATURES, EXTRACTOR, ("features",))
    found = read_statistics(tmp_path / "s.npz")
    assert found is not None and found.moments.keys() == {"features"}


def test_a_file_is_written_whole_or_not_at_all(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ours.read_bytes()

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(statistics.np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        save_statistics(ours, FEATURES, EXTRACTOR, ("features",))
    assert ours.read_bytes() == before and len(list(ours.parent.iterdir())) == 1


# ---- others'


@pytest.mark.parametrize("dtype", ["float64", "float32", ">f8"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_statistics_of_pytorch_fid_are_read(tmp_path: Path, save: Callable[..., None], dtype: str) -> None:
    mean, covariance = ROWS["features"].numpy().mean(0).astype(dtype), cov("features").astype(dtype)
    save(tmp_path / "fid.npz", mu=mean, sigma=covariance)
    found = read_statistics(tmp_path / "fid.npz")
    assert found is not None and found.protocol == {} and found.moments.keys() == {"features"}
    assert all(tensor.dtype == torch.float64 for tensor in matrix(found))
    np.testing.assert_array_equal(matrix(found)[0], mean.astype(np.float64))
    np.testing.assert_array_equal(matrix(found)[1], covariance.astype(np.float64))


def test_statistics_of_adm_are_read_beside_its_images(tmp_path: Path) -> None:
    """Those of sFID are `mu_s` and `sigma_s`; the images are another module's."""
    path = plain(
        tmp_path / "adm.npz",
        arr_0=np.zeros((10, 8, 8, 3), np.uint8),
        mu_s=np.ones(3),
        sigma_s=np.diag([1.0, 2.0, 3.0]),
    )
    found = read_statistics(path)
    assert found is not None and found.moments.keys() == {"features", "spatial"}
    assert matrix(found)[0].tolist() == [0, 1, 2, 3] and matrix(found)[1].tolist() == (2 * np.eye(4)).tolist()
    assert matrix(found, "spatial")[0].tolist() == [1, 1, 1]
    assert matrix(found, "spatial")[1].diagonal().tolist() == [1, 2, 3]


@pytest.mark.parametrize("names", [(), ("mu",), ("sigma",), ("mu", "sigma_s")])
def test_a_file_without_statistics_is_none(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Images alone, say: then they are measured."""
    arrays = {name: np.ones(3) if name == "mu" else np.eye(3) for name in names}
    assert read_statistics(npz(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **arrays)) is None


def test_half_of_a_pair_does_not_hide_the_other_pair(tmp_path: Path) -> None:
    found = read_statistics(plain(tmp_path / "s.npz", mu_s=np.ones(3)))
    assert found is not None and found.moments.keys() == {"features"}


def test_tensors_read_are_our_own(tmp_path: Path) -> None:
    mean, _ = matrix(read_statistics(plain(tmp_path / "s.npz")))
    mean += 1  # no read-only memory
    assert mean.tolist() == [1, 2, 3, 4]


# ---- damage


@pytest.mark.parametrize(
    "changes",
    [
        {"mu": np.ones(3)},
        {"mu": np.ones((1, 4))},
        {"sigma": np.ones(4)},
        {"sigma": np.ones((4, 5))},
        {"mu": np.ones((4, 4))},
    ],
    ids=str,
)
def test_shapes_that_do_not_belong_together_are_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"mu and sigma of .*s\.npz have shapes .*: expected \(D,\) and \(D, D\)"):
        read_statistics(plain(tmp_path / "s.npz", **changes))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["mu", "sigma", "mu_s", "sigma_s"])
def test_figures_that_are_not_finite_are_named(tmp_path: Path, name: str, value: float) -> None:
    arrays = {"mu_s": np.ones(3), "sigma_s": np.eye(3), "mu": np.ones(3), "sigma": np.eye(3)}
    arrays[name].flat[-1] = value
    with pytest.raises(SettingError, match=rf"{name}.* is not finite"):
        read_statistics(plain(tmp_path / "s.npz", **arrays))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(4),
        np.ones(4, complex),
        np.array(["a"] * 4),
        np.float64(3),
        np.ones((2, 2, 2)),
        np.ones(20_000),
        np.array([1.0, None], dtype=object),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_arrays_of_another_kind_are_named(tmp_path: Path, array: Any) -> None:
    with pytest.raises(SettingError, match=r"mu of .*s\.npz"):
        read_statistics(plain(tmp_path / "s.npz", mu=array))


def test_a_size_that_is_a_lie_takes_no_memory(tmp_path: Path) -> None:
    """A header may claim any shape: beyond the widest network it is not believed."""
    header = io.BytesIO()
    shape = (1 << 20, 1 << 20)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    path = npz(tmp_path / "s.npz", mu=np.ones(3))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("sigma.npy", header.getvalue())
    with pytest.raises(SettingError, match="up to 16384 wide"):
        read_statistics(path)


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 no zip"])
def test_any_other_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(SettingError, match=r"s\.npz"):
        read_statistics(tmp_path / "s.npz")


def changed(path: Path, member: str, at: int, change: Callable[[int], int]) -> Path:
    """Change one byte of a member's stored content."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    content = bytearray(path.read_bytes())
    name, extra = (int.from_bytes(content[info.header_offset + place :][:2], "little") for place in (26, 28))
    start = info.header_offset + 30 + name + extra
    place = range(start, start + info.compress_size)[at]
    content[place] = change(content[place])
    path.write_bytes(content)
    return path


def flipped(path: Path, member: str) -> Path:
    return changed(path, member, -1, lambda byte: byte ^ 0x10)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(ours: Path, keep: float) -> None:
    content = ours.read_bytes()
    ours.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(SettingError, match=r"ours\.npz"):
        read_statistics(ours)


@pytest.mark.parametrize("member", ["mu.npy", "sigma.npy", "mu_s.npy", "sigma_s.npy"])
def test_a_flipped_bit_is_noticed(ours: Path, member: str) -> None:
    """By the archive's checksums: the figures themselves would still look well."""
    with pytest.raises(SettingError, match=r"ours\.npz"):
        read_statistics(flipped(ours, member))


def test_a_flipped_bit_in_the_protocol_is_noticed(ours: Path) -> None:
    with pytest.raises(SettingError, match=r"ours\.npz"):
        read_statistics(flipped(ours, "protocol.npy"))


def test_a_flipped_bit_in_a_long_protocol_is_noticed(tmp_path: Path) -> None:
    """One of more than the 4096 bytes that are read together with the header."""
    path = plain(tmp_path / "s.npz", protocol=np.array(json.dumps({"images": "x" * 3000})))
    with pytest.raises(SettingError, match=r"s\.npz"):
        read_statistics(flipped(path, "protocol.npy"))


def test_a_damaged_compressed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez_compressed(path, mu=np.ones(4), sigma=np.eye(4))
    with pytest.raises(SettingError, match=r"s\.npz"):
        read_statistics(changed(path, "sigma.npy", 0, lambda byte: byte | 6))  # a kind of block that there is not


# ---- the protocol


@pytest.mark.parametrize(
    "content",
    [
        np.array("not json"),
        np.array('["a", "list"]'),
        np.array("[" * 10_000),
        np.array(3.0),
        np.array(b'{"n": 3}'),
        np.array(json.dumps({"images": "x" * 20_000})),  # longer than any that was ever written
    ],
    ids=lambda content: f"{content.dtype}",
)
def test_a_protocol_that_says_nothing_counts_as_none(tmp_path: Path, content: np.ndarray) -> None:
    found = read_statistics(plain(tmp_path / "s.npz", protocol=content))
    assert found is not None and found.protocol == {}


def test_an_empty_protocol_counts_as_none(tmp_path: Path) -> None:
    found = read_statistics(plain(tmp_path / "s.npz", protocol=np.array([], dtype="U8")))
    assert found is not None and found.protocol == {}


def test_what_must_agree_is_the_network_and_how_images_get_into_it() -> None:
    assert extractor_facts(EXTRACTOR) == {
        "extractor": "some-network",
        "extractor_sha256": "ab" * 32,
        "resize": "legacy",
        "dtype": "float32",
    }


def test_statistics_of_the_same_protocol_are_comparable(ours: Path) -> None:
    found = read_statistics(ours)
    assert found is not None and check_comparable(found, EXTRACTOR, "ours.npz") == []


@pytest.mark.parametrize(
    ("fact", "value"),
    [("extractor", "other"), ("extractor_sha256", "00" * 32), ("resize", "clean"), ("dtype", "bfloat16")],
)
def test_statistics_of_another_protocol_are_refused(ours: Path, fact: str, value: str) -> None:
    found = read_statistics(ours)
    assert found is not None
    other = Statistics(found.moments, {**found.protocol, fact: value})
    with pytest.raises(SettingError, match=rf"^ours\.npz was made with {fact} {value[:40]}, but this run uses"):
        check_comparable(other, EXTRACTOR, "ours.npz")
    missing = Statistics(found.moments, {key: value for key, value in found.protocol.items() if key != fact})
    with pytest.raises(SettingError, match=f"was made with {fact} None"):
        check_comparable(missing, EXTRACTOR, "ours.npz")


def test_statistics_without_a_protocol_are_taken_for_inceptions_with_a_warning(tmp_path: Path) -> None:
    found = read_statistics(plain(tmp_path / "s.npz"))
    assert found is not None
    (warning,) = check_comparable(found, EXTRACTOR, "s.npz")
    assert warning.startswith("s.npz does not record its protocol") and "some-network" in warning
    assert "legacy resize" in warning


def test_statistics_without_a_protocol_are_of_the_legacy_resize(tmp_path: Path) -> None:
    class Clean(InceptionLike):
        protocol: dict[str, str] = {"resize": "clean", "dtype": "float32"}  # noqa: RUF012

    Clean.__name__ = "Inception"
    found = read_statistics(plain(tmp_path / "s.npz"))
    assert found is not None
    with pytest.raises(SettingError, match=r"^s\.npz does not record its protocol.*legacy resize.*--resize clean$"):
        check_comparable(found, Clean(), "s.npz")


def test_statistics_without_a_protocol_are_no_other_networks(tmp_path: Path) -> None:
    found = read_statistics(plain(tmp_path / "s.npz"))
    assert found is not None
    with pytest.raises(SettingError, match=r"s\.npz does not say which network it is of.*Inception's only"):
        check_comparable(found, PixelsLike(), "s.npz")
