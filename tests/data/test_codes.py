"""The token store: its content, and when it is made anew."""

import errno
import itertools
import json
import os
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch.utils.data import DataLoader

from vqgen.data import codes as codes_module
from vqgen.data.codes import TokenStore, encode_images
from vqgen.data.crops import Versions
from vqgen.data.images import ImageSet, load_images
from vqgen.data.order import BatchOrder, Place, token_batches
from vqgen.data.skipped import read_skipped
from vqgen.errors import InputError
from vqgen.settings import DataConfig
from vqgen.tokenizers.light import Light
from vqgen.tokenizers.vqmodel import VQModel, from_uint8


@pytest.fixture(scope="module", autouse=True)
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests may change the settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images in each of two classes, all different, and none equal to its mirror image."""
    random = np.random.default_rng(0)
    for class_name in ("cat", "dog"):
        (tmp_path / "pets" / class_name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(f"{tmp_path}/pets/{class_name}/{i}.png")
    return tmp_path / "pets"


def tokenizer(seed: int = 0, codebook_size: int = 64) -> VQModel:
    torch.manual_seed(seed)
    quantizer = {"codebook_size": codebook_size, "code_dim": 2}
    model = Light(patch_size=2, widths=(8,), quantizer=quantizer).eval().requires_grad_(False)
    model.quantizer.codebook.normal_(std=0.3)
    return model


def settings(folder: Path, **changes) -> DataConfig:
    return DataConfig(**{"source": str(folder), "image_size": 8, **changes})


@pytest.fixture
def encode(tmp_path, accelerator):
    """Encodes the training images of these data settings into a store below tmp_path / codes."""

    def encode(
        data: DataConfig,
        model: VQModel | None = None,
        tokenizer_hash: str = "w",
        mirror: bool = False,
        skipped=None,
        crops: int = 1,
    ):
        images = load_images(data)[0]
        store = encode_images(
            images,
            model or tokenizer(),
            tmp_path / "codes",
            tokenizer_hash=tokenizer_hash,
            mirror=mirror,
            accelerator=accelerator,
            skipped=skipped,
            crops=crops,
        )
        return store, images

    return encode


def expected_tokens(images: ImageSet, rows: list[int] | None = None, flip: bool = False) -> torch.Tensor:
    model = tokenizer()
    x = torch.from_numpy(np.stack([images.read(i) for i in (range(len(images)) if rows is None else rows)]))
    return model.code_layout(images.image_size).flatten(model.encode(from_uint8(x.flip(-1) if flip else x)))


def everything(store: TokenStore) -> tuple[torch.Tensor, torch.Tensor]:
    return store.__getitems__(list(range(len(store))))


def stores(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "codes").iterdir())


# Its content


@pytest.mark.parametrize("cache_gb", [1.0, 0.0], ids=["images in memory", "images from disk"])
@pytest.mark.parametrize("encoded_at_once", [64, 3])
def test_tokens_are_the_tokenizer_s_codes_of_each_image(encode, folder, monkeypatch, cache_gb, encoded_at_once):
    monkeypatch.setattr(codes_module, "ENCODED_AT_ONCE", encoded_at_once)
    store, images = encode(settings(folder, cache_gb=cache_gb))
    tokens, class_ids = everything(store)
    assert len(store) == len(images) == len(tokens)
    assert torch.equal(tokens, expected_tokens(images))
    assert len(tokens.unique()) > 10  # otherwise equality would prove little
    assert class_ids.tolist() == images.class_ids.tolist()
    assert (tokens.dtype, class_ids.dtype) == (torch.int64, torch.int64)


def test_mirror_images_come_after_the_images(encode, folder):
    store, images = encode(settings(folder), mirror=True)
    tokens, class_ids = everything(store)
    assert torch.equal(tokens, torch.cat([expected_tokens(images), expected_tokens(images, flip=True)]))
    assert class_ids.tolist() == images.class_ids.tolist() * 2


@pytest.mark.parametrize("crops", [5, 10])
def test_crops_come_one_after_another_and_images_that_do_not_load_have_none(encode, folder, tmp_path, capsys, crops):
    name = load_images(settings(folder))[0].names[1]
    (folder / name).write_bytes(b"")
    store, images = encode(settings(folder, cache_gb=0.0), crops=crops)
    good = [i for i in range(len(images)) if i != 1]
    assert (store.crops, len(store)) == (crops, crops * len(good))
    tokens, class_ids = everything(store)
    versions, model = Versions(images, crops, mirror=False), tokenizer()
    pixels = np.stack([versions.read(i) for i in good])  # (n, V, C, H, W)
    for v in range(crops):
        expected = model.code_layout(8).flatten(model.encode(from_uint8(torch.from_numpy(pixels[:, v].copy()))))
        assert torch.equal(tokens[v * len(good) : (v + 1) * len(good)], expected)
    assert len(tokens.unique(dim=0)) > 0.9 * len(tokens)
    assert class_ids.tolist() == images.class_ids[good].tolist() * crops
    said = capsys.readouterr().out
    assert said.startswith(f"encoding {len(images)} images in {crops} crops each, which takes {crops} times as long")
    made_from = json.loads((stores(tmp_path)[0] / "made_from.json").read_text())
    assert (made_from["crops"], made_from["mirror"]) == (crops, crops == 10)
    encode(settings(folder, cache_gb=0.0), crops=crops)
    assert capsys.readouterr().out == ""


def test_an_epoch_of_a_store_with_crops_takes_each_image_once(encode, folder):
    store, images = encode(settings(folder), crops=5)
    stream = token_batches(store, Place(0, 4, 1, 0), class_dropout=0.0, device=torch.device("cpu"))
    taken = torch.cat([tokens for tokens, _ in itertools.islice(stream, len(images) * 3 // 4)])  # three epochs
    everywhere = everything(store)[0]
    rows = [int((everywhere == tokens).all(dim=1).nonzero()[0]) for tokens in taken]
    for epoch in np.array(rows[: len(rows) // len(images) * len(images)]).reshape(-1, len(images)):
        assert sorted(epoch % len(images)) == list(range(len(images)))
    assert len({row // len(images) for row in rows}) == 5


@pytest.mark.parametrize(("codebook_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_tokens_take_no_more_bytes_than_the_vocabulary_asks_for(encode, folder, tmp_path, codebook_size, dtype):
    store, images = encode(settings(folder), tokenizer(codebook_size=codebook_size))
    assert store.tokens.dtype == dtype
    assert (stores(tmp_path)[0] / "tokens.npy").stat().st_size < len(images) * 16 * np.dtype(dtype).itemsize + 200
    assert everything(store)[0].max() > 1 << 15  # and the largest ids are stored correctly


def test_images_without_a_class_have_none(encode, tmp_path):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "grey.npz", images=random.integers(0, 256, (12, 8, 8, 3), np.uint8))
    store, _ = encode(settings(tmp_path / "grey.npz"))
    assert set(everything(store)[1].tolist()) == {-1}


@pytest.mark.parametrize("cache_gb", [1.0, 0.0], ids=["images in memory", "images from disk"])
@pytest.mark.parametrize("mirror", [False, True])
def test_images_that_do_not_load_are_left_out(encode, folder, caplog, cache_gb, mirror):
    names = load_images(settings(folder))[0].names
    for name in (names[1], names[-1]):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    store, images = encode(settings(folder, cache_gb=cache_gb), mirror=mirror)
    good = [i for i in range(len(images)) if images.read(i) is not None]
    assert len(good) == len(names) - 2
    assert len(store) == len(good) * (2 if mirror else 1)
    tokens, class_ids = everything(store)
    assert torch.equal(tokens[: len(good)], expected_tokens(images, good))
    assert class_ids.tolist() == images.class_ids[good].tolist() * (2 if mirror else 1)
    assert any(f"left out 2 of {len(names)} images" in message for message in caplog.messages) == (cache_gb == 0)


@pytest.mark.parametrize("cache_gb", [1.0, 0.0], ids=["images in memory", "images from disk"])
def test_images_that_do_not_load_are_named_by_the_store_and_each_run_that_takes_it(encode, folder, tmp_path, cache_gb):
    names = load_images(settings(folder))[0].names
    for name in (names[1], names[-1]):
        (folder / name).write_bytes(b"")
    expected = {names[1]: "empty, or no image", names[-1]: "empty, or no image"}
    for run in "ab":
        encode(settings(folder, cache_gb=cache_gb), mirror=True, skipped=tmp_path / f"{run}.txt")
        assert read_skipped(tmp_path / f"{run}.txt") == expected
    (store,) = stores(tmp_path)
    assert read_skipped(store / "skipped.txt") == expected
    with pytest.raises(InputError, match=r"gone/skipped\.txt cannot be written \(No such file or directory\)"):
        encode(settings(folder, cache_gb=cache_gb), mirror=True, skipped=tmp_path / "gone" / "skipped.txt")


def test_a_data_loader_gives_batches_in_the_order_of_its_sampler(encode, folder):
    store, _ = encode(settings(folder))
    loader = DataLoader(store, batch_sampler=BatchOrder(len(store), 4, 0, seed=0), collate_fn=lambda batch: batch)
    rows = next(iter(BatchOrder(len(store), 4, 0, seed=0)))
    tokens, class_ids = next(iter(loader))
    assert torch.equal(tokens, everything(store)[0][rows])
    assert torch.equal(class_ids, everything(store)[1][rows])


# When it is made anew


def test_the_same_images_are_not_encoded_again(encode, folder, tmp_path):
    first = everything(encode(settings(folder))[0])
    written = (stores(tmp_path)[0] / "tokens.npy").stat().st_mtime_ns
    # These are other weights under the same hash; they would give other codes if they were used.
    again = everything(encode(settings(folder), tokenizer(seed=1))[0])
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert len(stores(tmp_path)) == 1
    assert (stores(tmp_path)[0] / "tokens.npy").stat().st_mtime_ns == written


@pytest.mark.parametrize("setting", [{"workers": 0}, {"cache_gb": 0.0}, {"flip": True}, {"on_error": "raise"}], ids=str)
def test_settings_that_leave_the_images_as_they_are_do_not_matter(encode, folder, tmp_path, setting):
    encode(settings(folder))
    encode(settings(folder, **setting))
    assert len(stores(tmp_path)) == 1


@pytest.mark.parametrize("change", ["tokenizer", "content", "image_size", "resize", "background", "channels", "mirror"])
def test_a_store_is_made_anew_when_anything_it_is_made_of_changes(encode, folder, tmp_path, change):
    data = settings(folder)
    encode(data)
    if change == "tokenizer":
        encode(data, tokenizer_hash="other")
    elif change == "mirror":
        encode(data, mirror=True)
    elif change == "content":
        image = Image.open(folder / "cat" / "0.png")
        image.putpixel((0, 0), (1, 2, 3))
        image.save(folder / "cat" / "0.png")
        encode(data)
    elif change == "channels":
        encode(replace(data, channels=1), Light(channels=1, patch_size=2, widths=(8,)).eval())
    else:
        encode(replace(data, **{change: {"image_size": 16, "resize": "pad", "background": "black"}[change]}))
    assert len(stores(tmp_path)) == 2
    for store in stores(tmp_path):
        made_from = json.loads((store / "made_from.json").read_text())
        assert made_from.keys() == {
            "tokenizer", "data", "mirror", "image_size", "channels", "resize", "background",
        }  # fmt: skip


def test_a_changed_image_has_its_new_tokens(encode, folder):
    data = settings(folder)
    encode(data)
    name = load_images(data)[0].names[0]
    Image.new("RGB", (8, 8), "red").save(folder / name)
    store, images = encode(data)
    assert torch.equal(everything(store)[0], expected_tokens(images))


def test_an_encoding_that_was_interrupted_is_not_taken_for_a_whole_one(encode, folder, monkeypatch):
    monkeypatch.setattr(codes_module, "ENCODED_AT_ONCE", 4)
    model = tokenizer()
    calls = []

    def interrupted(x):
        calls.append(len(x))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return VQModel.encode(model, x)

    monkeypatch.setattr(model, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(settings(folder), model)
    store, images = encode(settings(folder))
    assert torch.equal(everything(store)[0], expected_tokens(images))


@pytest.mark.parametrize("name", ["tokens.npy", "class_ids.npy"])
@pytest.mark.parametrize("damage", ["cut short", "empty", "other", "gone"])
def test_a_store_that_does_not_load_is_made_again(encode, folder, tmp_path, caplog, name, damage):
    expected = everything(encode(settings(folder))[0])
    path = stores(tmp_path)[0] / name
    content = {"cut short": path.read_bytes()[:-8], "empty": b"", "other": b"no array" * 100, "gone": None}[damage]
    path.unlink() if content is None else path.write_bytes(content)
    assert torch.equal(everything(encode(settings(folder))[0])[0], expected[0])
    assert len(stores(tmp_path)) == 1
    assert [("does not load" in message) for message in caplog.messages] == [True]
    encode(settings(folder))
    assert len(caplog.messages) == 1


def test_nothing_is_left_of_an_encoding_that_failed(encode, folder, tmp_path, monkeypatch):
    model = tokenizer()
    monkeypatch.setattr(model, "encode", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(settings(folder), model)
    assert stores(tmp_path) == []


def test_a_store_for_which_there_is_no_room_is_refused_at_once(encode, folder, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))  # works for root, too
    try:
        with pytest.raises(InputError, match=rf"codes cannot be written \({os.strerror(errno.EFBIG)}\); name another"):
            encode(settings(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stores(tmp_path) == []


def test_the_room_for_a_store_is_there_before_it_is_written(tmp_path):
    codes_module._reserve(tmp_path / "x.npy", np.uint16, (1000, 1000))
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= 2_000_000
    assert np.load(tmp_path / "x.npy", mmap_mode="r+").shape == (1000, 1000)
