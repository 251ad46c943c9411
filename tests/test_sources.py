"""Data from where users keep it: what is read is what was written, and nothing is unpickled."""

from __future__ import annotations

import pickle
import struct
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision import datasets as vision
from torchvision.transforms.functional import to_pil_image

from fxfuse.cli.sources import Data, Preparation, absolute, read_data
from fxfuse.errors import CheckpointError, InputError, MissingDependencyError

X = torch.arange(24, dtype=torch.float32).reshape(6, 4)
Y = torch.arange(6) % 3


def check(data: Data, *, labels: bool = True) -> None:
    assert len(data) == 6
    assert len(data.inputs) == 1
    assert torch.equal(data.inputs[0], X)
    assert (data.labels is not None) == labels
    if data.labels is not None:
        assert data.labels.dtype == torch.int64
        assert torch.equal(data.labels, Y)


def test_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    check(read_data(str(tmp_path / "x.npy")), labels=False)
    for names in (("inputs", "labels"), ("images", "targets"), ("x", "y")):
        arrays = dict(zip(names, (X.numpy(), Y.numpy().astype("uint8")), strict=True))
        np.savez_compressed(tmp_path / "d.npz", **arrays)
        check(read_data(str(tmp_path / "d.npz")))
    np.savez(tmp_path / "one.npz", anything=X.numpy())
    check(read_data(str(tmp_path / "one.npz")), labels=False)


def test_tensors(tmp_path: Path) -> None:
    save_file({"inputs": X, "labels": Y}, tmp_path / "d.safetensors")
    check(read_data(str(tmp_path / "d.safetensors")))
    for content, labels in ((X, False), ((X, Y), True), ({"x": X, "y": Y}, True)):
        torch.save(content, tmp_path / "d.pt")
        check(read_data(str(tmp_path / "d.pt")), labels=labels)
    torch.save((X, X), tmp_path / "d.pt")
    assert len(read_data(str(tmp_path / "d.pt")).inputs) == 2


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_data")
    monkeypatch.setitem(sys.modules, "own_data", module)
    monkeypatch.chdir(tmp_path)
    for made, labels in (
        (X, False),
        ((X, Y), True),
        ({"inputs": X, "labels": Y}, True),
        ([(X[:4], Y[:4]), (X[4:], Y[4:])], True),
        (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 4), True),
        (iter([X[:4], X[4:]]), False),
    ):
        module.make = lambda made=made: made
        check(read_data("own_data:make"), labels=labels)

    def endless():
        while True:
            yield X, Y

    module.make = endless
    assert len(read_data("own_data:make", Preparation(limit=9))) == 9


def test_a_limit_is_spread_over_the_source(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", inputs=np.arange(100.0)[:, None], labels=np.arange(100) // 10)
    data = read_data(str(tmp_path / "d.npz"), Preparation(limit=20))
    assert data.labels is not None
    assert data.labels.bincount().tolist() == [2] * 10
    assert torch.equal(data.inputs[0][:, 0] // 10, data.labels.to(torch.float64))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes, with three pictures of one colour each."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            image = torch.full((3, 6, 8), 40 * i + label, dtype=torch.uint8)
            to_pil_image(image).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_a_folder_of_images(pictures: Path) -> None:
    data = read_data(str(pictures))
    (images,) = data.inputs
    assert images.shape == (6, 3, 6, 8)
    assert images.dtype == torch.float32
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(images[:, 0, 0, 0] * 255, torch.tensor([0.0, 40, 80, 1, 41, 81]))
    prepared = Preparation(limit=4, size=(3, 5), mean=(0.5,), std=(0.5, 0.25, 0.5))
    (few,) = read_data(str(pictures), prepared).inputs
    assert few.shape == (4, 3, 3, 5)
    torch.testing.assert_close(few[0, :, 0, 0], torch.tensor([-1.0, -2.0, -1.0]))
    # Pictures without folders have no labels.
    alone = read_data(str(pictures / "dog"))
    assert alone.labels is None
    torch.testing.assert_close(alone.inputs[0], images[3:])


def test_images_that_do_not_fit(pictures: Path, tmp_path: Path) -> None:
    to_pil_image(torch.zeros(3, 9, 9, dtype=torch.uint8)).save(pictures / "dog" / "large.png")
    with pytest.raises(InputError, match="differ in size"):
        read_data(str(pictures))
    assert read_data(str(pictures), Preparation(size=(4, 4))).inputs[0].shape == (7, 3, 4, 4)
    with pytest.raises(InputError, match="mean and std need 1 or 3 values, got 2"):
        read_data(str(pictures), Preparation(size=(4, 4), mean=(0.1, 0.2)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a folder of images"):
        read_data(str(tmp_path / "empty"))


def png(width: int, height: int) -> bytes:
    """A picture that says that it is large."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1 << 20))
    chunks = (head, body, b"IEND")
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_images_have_bounds_before_they_are_decoded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer than Pillow itself rejects, or warns of.
    (pictures / "cat" / "0.png").write_bytes(png(9000, 9000))
    columns = {"image": [str(pictures / "cat" / "0.png")], "label": [0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    held = {"bytes": png(9000, 9000), "path": None}
    for name, image in (("large", held), ("elsewhere", {"bytes": None, "path": "/etc/passwd"})):
        table = datasets.Dataset.from_dict({**columns, "image": [image]}, features)
        table.save_to_disk(tmp_path / name)
    for spec, why in (
        (str(pictures), "9,000 x 9,000 pixels"),
        (f"datasets:{tmp_path / 'large'}", "9,000 x 9,000 pixels"),
        (f"datasets:{tmp_path / 'elsewhere'}", "cannot identify image"),
    ):

        def read(spec: str = spec, why: str = why) -> None:
            with pytest.raises(InputError, match="image 0 cannot be read") as caught:
                read_data(spec)
            assert why in caught.value.why

        assert memory_of(read) < 10 << 20
    (pictures / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="image 0 cannot be read"):
        read_data(str(pictures))
    (pictures / "cat" / "0.png").unlink()
    with pytest.raises(InputError, match="an image is too large"):
        read_data(str(pictures), Preparation(size=(10_000, 10_000)))
    monkeypatch.setattr("fxfuse.cli.sources.images._PIXELS", 47)
    with pytest.raises(InputError, match="an image is too large"):
        read_data(str(pictures))
    monkeypatch.setattr("fxfuse.cli.sources.images._PIXELS", 48)
    monkeypatch.setattr("fxfuse.cli.sources.images._MOST", 2000)
    with pytest.raises(InputError, match="set a limit"):
        read_data(str(pictures))
    assert len(read_data(str(pictures), Preparation(limit=2))) == 2


def test_a_data_set_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(vision.FakeData):
        """On disk, as far as anyone can tell."""

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert not download
            assert root == str(tmp_path)
            super().__init__(size=8 if train else 5, image_size=(1, 4, 4), num_classes=2)

    monkeypatch.setattr(vision, "Own", Own, raising=False)
    assert read_data(f"torchvision:Own:{tmp_path}").inputs[0].shape == (5, 1, 4, 4)
    assert len(read_data(f"torchvision:Own:{tmp_path}:train")) == 8
    assert len(read_data(f"torchvision:Own:{tmp_path}:test", Preparation(limit=3))) == 3
    with pytest.raises(InputError, match="no data set 'Nothing'"):
        read_data(f"torchvision:Nothing:{tmp_path}")
    with pytest.raises(InputError, match="nothing is downloaded"):
        read_data(f"torchvision:MNIST:{tmp_path}")


def test_hugging_face_datasets_are_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"fxfuse\[datasets\]"):
        read_data("datasets:somewhere")


@pytest.mark.parametrize("kind", ["values", "images"])
def test_hugging_face_datasets(kind: str, tmp_path: Path) -> None:
    if kind == "values":
        columns = {"input_ids": X.long().tolist(), "label": Y.tolist()}
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "d")
        data = read_data(f"datasets:{tmp_path / 'd'}")
        assert torch.equal(data.inputs[0], X.long())
    else:
        pictures = [to_pil_image(torch.full((1, 4, 4), i, dtype=torch.uint8)) for i in range(6)]
        columns = {"image": pictures, "label": Y.tolist()}
        own = datasets.Dataset.from_dict(columns)
        datasets.DatasetDict({"train": own.select([0]), "test": own}).save_to_disk(tmp_path / "d")
        data = read_data(f"datasets:{tmp_path / 'd'}")
        assert data.inputs[0].shape == (6, 1, 4, 4)
        torch.testing.assert_close(data.inputs[0][:, 0, 0, 0] * 255, torch.arange(6.0))
    assert data.labels is not None
    assert torch.equal(data.labels, Y)


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("few.npz", inputs=X.numpy(), labels=Y.numpy()[:4])
    np.savez("soft.npz", inputs=X.numpy(), labels=X.numpy())
    np.savez("other.npz", a=X.numpy(), b=Y.numpy())
    np.savez("none.npz", inputs=X.numpy()[:0])
    np.save("objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    np.save("texts.npy", np.array(["a", "b"]))
    Path("broken.npz").write_bytes(b"PK\x03\x04 no archive")
    Path("notes.csv").write_text("hello")
    for spec, said in (
        ("few.npz", "inputs and labels differ in length"),
        ("soft.npz", "not class numbers"),
        ("other.npz", "there are no inputs"),
        ("none.npz", "no examples"),
        ("objects.npy", "cannot be read"),
        ("texts.npy", "not numbers"),
        ("broken.npz", "cannot be read"),
        ("notes.csv", "a file of a known format, or module:function"),
        ("absent.npy", "cannot be read"),
        ("builtins:dict", "there are no inputs"),
    ):
        with pytest.raises(InputError, match=said):
            read_data(spec)
    torch.save(torch.nn.ReLU(), "module.pt")
    with pytest.raises(CheckpointError, match="holds pickled Python objects"):
        read_data("module.pt")
    with pytest.raises(InputError, match="the data have no labels"):
        Data((X,)).require_labels("here")


def test_a_source_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X.numpy())
    assert absolute("x.npy") == str(tmp_path / "x.npy")
    assert (
        absolute("torchvision:CIFAR10:data:train") == f"torchvision:CIFAR10:{tmp_path}/data:train"
    )
    assert absolute("datasets:data") == f"datasets:{tmp_path}/data"
    assert absolute("module:function") == "module:function"


# --- files that say that they are large ---


def header(shape: object, kind: str = "<f4") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def memory_of(call: Callable[[], object]) -> int:
    """Bytes that a call had at once, as far as Python and numpy tell."""
    tracemalloc.start()
    call()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def test_of_an_archive_only_the_wanted_rows_are_read(tmp_path: Path) -> None:
    path, rows = tmp_path / "packed.npz", 200_000
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("inputs.npy", "w") as file,
    ):
        file.write(header((rows, 250)))
        for _ in range(200):
            file.write(np.arange(1000, dtype="<f4").repeat(250).tobytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other.npy", b"nobody asks for it")
        archive.writestr("labels.npy", header((rows,), "<i8") + np.arange(rows).tobytes())
    assert path.stat().st_size < 4 << 20
    found = list[Data]()
    most = memory_of(lambda: found.append(read_data(str(path), Preparation(limit=1000))))
    assert most < 100 << 20, "all of it is 200 MB"
    (data,) = found
    assert data.labels is not None
    assert data.labels.tolist() == list(range(0, rows, 200))
    assert torch.equal(data.inputs[0][:, 7], (data.labels % 1000).float())


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize(
    "content",
    [
        header((10**9,)),
        header((10**9, 2**40, 2**40)),
        header((-1, 4)) + bytes(16),
        header((2, 2), "|O") + pickle.dumps([1]),
        b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b"{",
        b"\x93NUMPY\x09\x00" + bytes(50),
    ],
)
def test_a_header_cannot_announce_what_is_not_there(
    name: str, content: bytes, tmp_path: Path
) -> None:
    if name.endswith(".npz"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("inputs.npy", content)
    else:
        (tmp_path / name).write_bytes(content)

    def read() -> None:
        with pytest.raises(InputError, match="cannot be read"):
            read_data(str(tmp_path / name))

    assert memory_of(read) < 10 << 20


def test_what_is_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        file.write(header((10_000, 1_000_000)))
        file.truncate(file.tell() + 4 * 10**10)
    with pytest.raises(InputError, match="set a limit"):
        read_data(str(tmp_path / "x.npy"))
    assert len(read_data(str(tmp_path / "x.npy"), Preparation(limit=3))) == 3


def test_a_changed_byte_of_an_archive_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, inputs=X.numpy(), labels=Y.numpy())
    content = bytearray(path.read_bytes())
    content[content.index(X.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    for limit in (None, 2):
        with pytest.raises(InputError, match="CRC"):
            read_data(str(path), Preparation(limit=limit))
