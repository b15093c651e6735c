"""A folder of images: what counts, what its folders stand for, and files that are damaged or hostile."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from repfuse.data import Wishes, prepare, read_data
from repfuse.errors import RepfuseError


def picture(path: Path, kind: str | None = None, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(content).convert(mode).save(path, kind)
    return path


def checkpoint(module: nn.Module, *shape: int) -> Any:
    """A network of which nothing is known but its input."""
    example = torch.zeros(1, *shape)
    return SimpleNamespace(module=module, path=Path("in.pt"), source=None, program=None, example_inputs=(example,))


def pixels(path: Path, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """The only image in the folder of ``path``, in bytes, prepared where nothing is known of the network."""
    samples, _ = prepare(read_data(path.parent), checkpoint(nn.Identity(), channels, *size), Wishes())
    (found,) = torch.cat(list(samples))
    return (found * 255).round().to(torch.uint8)


def names(folder: Path) -> list[str]:
    return [image.relative_to(folder).as_posix() for image in read_data(folder).images]


def labelled(folder: Path, classes: int | None) -> tuple[list[int] | None, str]:
    """The class of each image for a network of so many classes, and what is said of that."""
    example = (1, 1, classes or 1)
    samples, labels = prepare(
        read_data(folder), checkpoint(nn.Flatten() if classes else nn.Identity(), *example), Wishes()
    )
    (said,) = (note for note in samples.notes if "labels: " in note)
    return None if labels is None else labels.tolist(), said


def test_images_are_found_at_any_depth_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpg", "a/deep/er/x.webp", "c.bmp", "a.tif", ".hidden.png", ".cache/x.png"):
        picture(tmp_path / name)
    assert names(tmp_path) == ["a/deep/er/x.webp", "a.tif", "b/1.jpg", "b/2.PNG", "c.bmp"]
    found = read_data(tmp_path)
    assert found.classes == ("a", "b")
    assert [found.class_of(image) for image in found.images] == ["a", None, "b", "b", None]
    assert found.notes == ()


def test_other_files_are_left_out_and_said(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for name in ("labels.csv", "b.txt", "README"):
        (tmp_path / name).write_text("text")
    assert names(tmp_path) == ["a.png"]
    (note,) = read_data(tmp_path).notes
    assert note.startswith("left out 3 files") and ".csv" in note and "README" in note


def test_links_count_and_those_in_circles_end(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "x.png")
    folder = tmp_path / "data"
    picture(folder / "a" / "y.png")
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "up").symlink_to(folder)
    assert names(folder) == ["a/y.png", "b/x.png"]
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "lost.png").symlink_to(tmp_path / "nothing.png")
    assert names(tmp_path / "alone") == ["lost.png"]
    with pytest.raises(RepfuseError, match=r"lost\.png cannot be read"):
        pixels(tmp_path / "alone" / "lost.png", 3, (4, 4))


def test_links_to_each_other_end_and_those_to_what_is_around_are_not_followed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "data" / name / f"{name}.png")
    (tmp_path / "data" / "a" / "b").symlink_to(tmp_path / "data" / "b")
    (tmp_path / "data" / "b" / "a").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "around").symlink_to(tmp_path)
    picture(tmp_path / "x.png")
    assert names(tmp_path / "data") == ["a/a.png", "a/b/b.png", "b/a/a.png", "b/b.png"]


def test_folders_of_classes_are_read_as_imagefolder_reads_them(tmp_path: Path) -> None:
    for name in ("owl/2.PNG", "owl/1.jpg", "cat/deep/er/x.webp", "dog/c.bmp", "dog/0.txt"):
        picture(tmp_path / name, None if not name.endswith("txt") else "PNG")
    theirs, ours = ImageFolder(tmp_path), read_data(tmp_path)
    classes, _ = labelled(tmp_path, len(theirs.classes))
    assert set(zip(map(str, ours.images), classes, strict=True)) == set(theirs.samples)


def test_images_are_what_imagefolder_takes_for_them(tmp_path: Path) -> None:
    with pytest.raises(RepfuseError, match="no images") as caught:
        read_data(tmp_path)
    assert f"Give a folder with {', '.join(IMG_EXTENSIONS)} files" in caught.value.hint
    for suffix in IMG_EXTENSIONS:
        (tmp_path / f"x{suffix}").touch()
    assert len(names(tmp_path)) == len(IMG_EXTENSIONS)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize(("content", "said"), [((), "no files"), (("a.npz", "b.npz"), ".npz")])
def test_a_folder_without_images_is_refused(content: tuple[str, ...], said: str, tmp_path: Path) -> None:
    for name in content:
        (tmp_path / name).write_text("text")
    with pytest.raises(RepfuseError, match="no images") as caught:
        read_data(tmp_path)
    assert said in caught.value.why
    assert ".webp" in caught.value.hint


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a" / "x.png")
    picture(tmp_path / "b" / "x.png")
    listing = os.scandir

    def closed(path: str) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(RepfuseError, match=r"folder .*/b cannot be read") as caught:
        read_data(tmp_path)
    assert caught.value.why == "Permission denied"


# --- labels ------------------------------------------------------------------------------------------------------


def images(root: Path, folders: list[str]) -> None:
    """An image in each folder, or outside of any where there are none; what is in it is never looked at."""
    for folder in folders or [""]:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "x.png").touch()


@pytest.mark.parametrize(
    ("folders", "classes", "expected"),
    [
        (["cat", "dog", "owl"], 3, {"cat": 0, "dog": 1, "owl": 2}),
        (["cat", "dog"], 3, None),
        (["cat", "dog"], None, None),
        ([], 3, None),
        (["0", "2"], 3, {"0": 0, "2": 2}),
        (["00", "01", "02"], 3, {"00": 0, "01": 1, "02": 2}),
        (["1", "01"], 3, None),
        (["1", "2", "3"], 3, {"1": 0, "2": 1, "3": 2}),
        (["1", "2", "3"], 10, {"1": 1, "2": 2, "3": 3}),
        (["1", "10", "2", "3", "4", "5", "6", "7", "8", "9"], 10, None),
        (["0", "7"], 5, None),
        (["0", "dog"], 2, {"0": 0, "dog": 1}),
        (["-1", "0"], 2, {"-1": 0, "0": 1}),
        (["²", "³"], 2, {"²": 0, "³": 1}),
    ],
)
def test_folders_stand_for_classes(
    folders: list[str], classes: int | None, expected: dict[str, int] | None, tmp_path: Path
) -> None:
    images(tmp_path, folders)
    found, said = labelled(tmp_path, classes)
    assert found == (expected and [expected[folder] for folder in folders])
    assert said.startswith("labels: " if found else "no labels: ")


def test_where_numbers_and_names_count_differently_it_is_said(tmp_path: Path) -> None:
    folders = sorted(map(str, range(11)))
    images(tmp_path / "eleven", folders)
    found, said = labelled(tmp_path / "eleven", 11)
    assert found == list(map(int, folders))
    assert "otherwise" in said
    images(tmp_path / "ten", list(map(str, range(10))))
    assert "otherwise" not in labelled(tmp_path / "ten", 10)[1]


@given(st.lists(st.text("0129a-", min_size=1, max_size=3), unique=True, max_size=12), st.integers(2, 12))
def test_labels_are_always_classes_of_the_network(folders: list[str], classes: int) -> None:
    with TemporaryDirectory() as root:
        images(Path(root), folders)
        found, _ = labelled(Path(root), classes)
    if found is not None:
        assert len(set(found)) == len(found) == len(folders)
        assert 0 <= min(found) <= max(found) < classes


# --- files -------------------------------------------------------------------------------------------------------

KINDS = {"jpg": "JPEG", "png": "PNG", "ppm": "PPM", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_kind_is_decoded_whatever_its_suffix(suffix: str, channels: int, tmp_path: Path) -> None:
    path = picture(tmp_path / f"x.{suffix}", KINDS[suffix])
    found = pixels(path, channels, (6, 8))
    expected = np.array(Image.open(path).convert("RGB" if channels == 3 else "L")).reshape(6, 8, channels)
    assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1))
    other = path.rename(tmp_path / "x.bmp")
    assert torch.equal(pixels(other, channels, (6, 8)), found)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_colours(mode: str, tmp_path: Path) -> None:
    path = picture(tmp_path / "x.png", mode=mode)
    assert pixels(path, 3, (6, 8)).shape == (3, 6, 8)


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG whose header promises that many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def cut(path: Path, part: float) -> Path:
    content = picture(path, size=(64, 64)).read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    return path


def deep(path: Path) -> Path:
    Image.fromarray(np.full((6, 8), 40_000, dtype=np.uint16)).save(path)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


HOSTILE = {
    "empty": (lambda path: written(path, b""), "cannot identify"),
    "text": (lambda path: written(path, b"hello, world\n" * 50), "cannot identify"),
    "cut png": (lambda path: cut(path, 0.5), "truncated"),
    "cut jpg": (lambda path: cut(path.with_suffix(".jpg"), 0.5), "truncated"),
    "cut webp": (lambda path: cut(path.with_suffix(".webp"), 0.5), ""),
    "cut bmp": (lambda path: cut(path.with_suffix(".bmp"), 0.5), "truncated"),
    "cut tif": (lambda path: cut(path.with_suffix(".tif"), 0.5), ""),
    "bomb, warned of": (lambda path: bomb(path, 10_000, 10_000), "decompression bomb"),
    "bomb, refused": (lambda path: bomb(path, 60_000, 60_000), "decompression bomb"),
    "sixteen bits": (deep, "more than 8 bits"),
    "postscript": (lambda path: written(path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "cannot identify"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_image_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, said = HOSTILE[name]
    path = make(tmp_path / "image.png")
    with pytest.raises(RepfuseError) as caught:
        pixels(path, 3, (64, 64))
    assert caught.value.what == f"The image {path} cannot be read."
    assert said in caught.value.why
    assert caught.value.exit_code == 2


def test_what_needs_another_program_is_never_opened(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")  # Pillow would run Ghostscript to read it
    with pytest.raises(RepfuseError, match="cannot be read"):
        pixels(written(tmp_path / "image.png", buffer.getvalue()), 3, (8, 8))
