"""Sets of images: channels, held-out images, caching, broken images, and settings that are refused."""

import logging
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data.files import RED, load, save
from PIL import Image
from programs import ENVIRONMENT, ROOT
from soak.hostile import make_hostile, make_valid
from torch.utils.data import DataLoader

from vqgen.data import images as images_module
from vqgen.data.images import load_images, load_set, some_rows
from vqgen.data.order import read_batches
from vqgen.data.skipped import count_skipped, one_line, read_skipped
from vqgen.errors import InputError
from vqgen.settings import DataConfig

# Channels


def test_channels_are_probed(folder):
    assert load(folder)[0].channels == 1
    save(folder / "cat" / "grey_as_rgb.png", (9, 9, 9))
    assert load(folder)[0].channels == 1
    (folder / "cat" / "broken.png").write_bytes(b"")
    assert load(folder)[0].channels == 1
    for k in range(10):
        save(folder / "cat" / f"colour{k}.png", (9, 9, 10))
    train, val = load(folder)
    assert train.channels == val.channels == 3
    assert train.read(0).shape == (3, 8, 8)


@pytest.mark.parametrize("stored", ["L", "RGB"])
def test_one_image_with_colour_among_many_gives_three_channels(tmp_path, stored):
    rng = np.random.default_rng(0)
    grey = {f"{k:03}.png": Image.fromarray(rng.integers(0, 256, (9, 8), np.uint8)) for k in range(300)}
    for name, image in grey.items():
        save(tmp_path / "x" / name, image.convert(stored))
    save(tmp_path / "held" / "x.png", grey["000.png"])
    for cache_gb in (0, 1):
        train, _ = load(tmp_path / "x", val_source=str(tmp_path / "held"), cache_gb=cache_gb)
        assert train.channels == 1
        for k, image in enumerate(grey.values()):  # 9 rows of 8: the first 8 of them are whole
            np.testing.assert_array_equal(train.read(k)[0], np.asarray(image)[:8])
    assert 140 not in some_rows(300, 64)  # so few would not do
    coloured = np.asarray(grey["140.png"].convert("RGB")).copy()
    coloured[4, 4, 2] ^= 1
    save(tmp_path / "x" / "140.png", Image.fromarray(coloured))
    for cache_gb in (0, 1):
        train, held_out = load(tmp_path / "x", val_source=str(tmp_path / "held"), cache_gb=cache_gb)
        assert train.channels == held_out.channels == 3
        np.testing.assert_array_equal(train.read(140), coloured[:8].transpose(2, 0, 1))
        for k, image in enumerate(grey.values()):
            if k != 140:
                np.testing.assert_array_equal(train.read(k), np.asarray(image.convert("RGB"))[:8].transpose(2, 0, 1))


def test_images_with_colour_that_do_not_fit_are_decoded_later(folder):
    before, _ = load(folder, val_fraction=0, cache_gb=20 * 8 * 8 / 2**30)
    assert (before.in_memory, before.channels) == (True, 1)
    save(folder / "dog" / "9.png", (1, 2, 3))
    train, _ = load(folder, val_fraction=0, cache_gb=20 * 8 * 8 / 2**30)
    assert (train.in_memory, train.channels, len(train)) == (False, 3, 19)
    read, _ = train.__getitems__(range(19))
    assert read[:-1, :, 4, 4].tolist() == [[int(Path(name).stem) + 100 * (name > "d")] * 3 for name in train.names[:-1]]
    assert read[-1, :, 4, 4].tolist() == [1, 2, 3]


def test_a_set_with_colour_has_the_background_s_colour_around_its_grey_images(tmp_path):
    for k in range(70):
        save(tmp_path / "x" / f"{k:02}.png", Image.new("L", (4, 4), k))
    save(tmp_path / "x" / "99.png", RED)
    save(tmp_path / "held" / "x.png", 1)
    read = [load(tmp_path / "x", val_source=str(tmp_path / "held"), resize="pad", background="#102030", cache_gb=gb)[0]
            .__getitems__(range(71))[0] for gb in (0, 1)]  # fmt: skip
    assert torch.equal(*read)
    assert read[0][0, :, 0, 0].tolist() == [0x10, 0x20, 0x30]
    assert read[0][5, :, 4, 4].tolist() == [5, 5, 5]


def test_channels_of_an_array_are_decided_by_all_its_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3000, 4, 4, 1), np.uint8).repeat(3, 3)
    np.savez(tmp_path / "images.npz", images=images)
    train, _ = load(tmp_path / "images.npz", image_size=4)
    assert train.channels == 1
    assert np.array_equal(train.read(7)[0], images[int(train.names[7]), ..., 0])
    images[int(train.names[-2]), 3, 3, 1] ^= 1
    np.savez(tmp_path / "images.npz", images=images)
    train, held_out = load(tmp_path / "images.npz", image_size=4)
    assert train.channels == held_out.channels == 3
    assert np.array_equal(train.read(7), images[int(train.names[7])].transpose(2, 0, 1))


def test_channels_that_are_given_are_kept(folder, tmp_path):
    assert load(folder, channels=3)[0].read(0).shape == (3, 8, 8)
    colours = tmp_path / "colours"
    for k in range(3):
        save(colours / f"{k}.png", RED)
    read = load(colours, channels=1)[0].read(0)
    assert read.shape == (1, 8, 8)
    assert (read == 76).all()  # the luma of red


def test_channels_are_those_of_what_loads_where_the_sample_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "PROBED_IMAGES", 2)
    for k in range(1, 4):
        save(tmp_path / "x" / f"{k}.png", RED)
    for k in (0, 4):
        (tmp_path / "x" / f"{k}.png").write_bytes(b"")
    save(tmp_path / "held" / "x.png")
    train, _ = load(tmp_path / "x", val_source=str(tmp_path / "held"))
    assert (len(train), train.channels) == (3, 3)


# Held-out images


def test_split_does_not_depend_on_the_other_images(tmp_path):
    root = tmp_path / "flat"
    for k in range(60):
        save(root / f"{k}.png")
    before = set(load(root, val_fraction=0.3)[1].names)
    assert 6 < len(before) < 30
    for k in range(60, 90):
        save(root / f"{k}.png")
    after = set(load(root, val_fraction=0.3)[1].names)
    assert {name for name in after if int(Path(name).stem) < 60} == before
    for k in range(0, 60, 2):
        (root / f"{k}.png").unlink()
    assert set(load(root, val_fraction=0.3)[1].names) == {name for name in after if (root / name).exists()}


@pytest.mark.parametrize("val_fraction", [0, 0.999999])
def test_split_leaves_one_image_on_each_side(tmp_path, val_fraction):
    for k in range(2):
        save(tmp_path / "flat" / f"{k}.png")
    train, val = load(tmp_path / "flat", val_fraction=val_fraction)
    assert (len(train), len(val)) == (1, 1)


def test_val_source_classes_are_matched_by_name(folder, tmp_path):
    save(tmp_path / "held" / "dog" / "x.png", 3)
    train, val = load(folder, val_source=str(tmp_path / "held"))
    assert len(train) == 20
    assert val.class_ids.tolist() == [1]
    assert val.class_names == ["cat", "dog"]
    save(tmp_path / "held" / "bird" / "y.png")
    with pytest.raises(InputError, match="'bird'"):
        load(folder, val_source=str(tmp_path / "held"))
    for k in range(2):
        save(tmp_path / "flat" / f"{k}.png")
    _, val = load(tmp_path / "flat", val_source=str(tmp_path / "held"))
    assert (val.class_names, set(val.class_ids)) == ([], {-1})


def test_val_source_with_a_test_part_gives_that_part():
    _, val = load("digits", val_source="digits", image_size=32)
    assert len(val) == 2000


# In memory or not


def identity(batch):
    return batch


@pytest.mark.parametrize("workers", [0, 2])
def test_lazy_and_in_memory_agree_and_serve_a_data_loader(folder, workers):
    (cached, _), (lazy, _) = load(folder), load(folder, cache_gb=0)
    assert cached.in_memory
    assert not lazy.in_memory
    assert pickle.loads(pickle.dumps(lazy)).names == lazy.names  # for workers that are spawned
    batches = []
    for images in (cached, lazy):
        loader = DataLoader(images, batch_size=7, collate_fn=identity, num_workers=workers if images is lazy else 0)
        batches.append(list(loader))
    for (x, class_ids), (lazy_x, lazy_class_ids) in zip(*batches, strict=True):
        assert torch.equal(x, lazy_x)
        assert torch.equal(class_ids, lazy_class_ids)
        assert lazy_x.is_contiguous()
    assert torch.equal(cached[[1, 2]][0], lazy[np.array([1, 2])][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_files_are_read_ahead_in_order_and_leave_torch_s_random_state(folder, workers):
    images, _ = load(folder, cache_gb=0, workers=workers)
    rows = [np.array([1, 0]), np.array([2]), np.array([0, 2, 1]), np.array([2, 2])]
    before = torch.get_rng_state()
    read = read_batches(images, rows)
    found = [next(read)]
    assert len(multiprocessing.active_children()) == workers
    found += read
    assert torch.equal(torch.get_rng_state(), before)
    for (x, class_ids), batch in zip(found, rows, strict=True):
        expected = images.__getitems__(batch)
        assert torch.equal(x, expected[0])
        assert torch.equal(class_ids, expected[1])


def test_cache_is_used_up_to_its_size(folder, tmp_path):
    save(tmp_path / "held" / "cat" / "x.png")
    num_bytes = 20 * 8 * 8
    assert load(folder, val_source=str(tmp_path / "held"), cache_gb=num_bytes / 2**30)[0].in_memory
    assert not load(folder, val_source=str(tmp_path / "held"), cache_gb=(num_bytes - 1) / 2**30)[0].in_memory


# Broken images


def test_broken_images_are_dropped_in_memory(damaged, tmp_path, caplog):
    train, _ = load(damaged, val_source=str(tmp_path / "held"))
    assert len(train) == len(train.names) == len(train.class_ids) == 17
    assert not {"cat/3.png", "cat/4.png", "dog/0.png"} & set(train.names)
    brightness = [int(Path(name).stem) + 100 * name.startswith("dog") for name in train.names]
    assert train.__getitems__(range(17))[0][:, 0, 0, 0].tolist() == brightness
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("skipped 3 images that do not load, first: cat/3.png (")
    assert caplog.records[0].levelno == logging.WARNING


def test_broken_images_are_replaced_by_the_next_where_lazy(damaged, tmp_path, caplog):
    train, _ = load(damaged, val_source=str(tmp_path / "held"), cache_gb=0)
    assert len(train) == 20
    assert train.read(3) is None
    assert train.read(4) is None
    assert train.read(5)[0, 0, 0] == 5
    pixels, class_ids = train.__getitems__([2, 3, 4, 10])
    assert pixels[:, 0, 0, 0].tolist() == [2, 5, 5, 101]
    assert class_ids.tolist() == [0, 0, 0, 1]
    assert len(caplog.messages) == 1
    assert "first: cat/3.png (" in caplog.messages[0]
    (damaged / "dog" / "9.png").write_bytes(b"no image")
    assert train.__getitems__([19])[0][0, 0, 0, 0] == 0  # goes round


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_broken_images_raise_if_asked_to(damaged, tmp_path, cache_gb):
    with pytest.raises(InputError, match=r"^an image does not load: cat/3\.png \([^\n]*data\.on_error=skip$"):
        load(damaged, val_source=str(tmp_path / "held"), on_error="raise", cache_gb=cache_gb)[0].__getitems__(range(20))


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty, or no image"), (b"%!PS-Adobe", "empty, or no image")])
def test_reason_is_short(damaged, tmp_path, caplog, content, reason):
    (damaged / "cat" / "0.png").write_bytes(content)
    load(damaged, val_source=str(tmp_path / "held"))
    assert caplog.messages == [f"skipped 4 images that do not load, first: cat/0.png ({reason})"]


@pytest.mark.parametrize(
    "settings", [{}, {"channels": 1}, {"channels": 3, "on_error": "raise"}, {"channels": 1, "cache_gb": 0}]
)
def test_no_image_loads(tmp_path, settings):
    for k in range(3):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / f"{k}.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"does not load|none of . images loads"):
        load(tmp_path / "flat", **settings)[0].__getitems__([0])


# Images from strangers


@pytest.mark.parametrize("cache_gb", [1, 0])
def test_each_hostile_file_is_counted_and_named_and_each_odd_one_loads(tmp_path, cache_gb):
    root, report = tmp_path / "strangers", tmp_path / "skipped.txt"
    valid, hostile = make_valid(root, 80, seed=0), make_hostile(root, 120, seed=0)
    for _ in range(2):  # the second time as in a resumed run
        train, val = load(root, cache_gb=cache_gb, image_size=16, channels=3)
        assert int(train.fingerprint, 16) != int(val.fingerprint, 16)
        for part in (train, val):
            part.report_skipped(report)
            if cache_gb == 0:
                for _ in DataLoader(part, batch_size=5, collate_fn=identity, num_workers=2):
                    pass
            else:
                assert {*part.names} <= {*valid}
        reasons = read_skipped(report)
        assert reasons.keys() == {one_line(name) for name in hostile}
        assert all(reasons.values())
        assert count_skipped(report) == len(hostile)
    assert len(train) + len(val) == (len(valid) if cache_gb else len(valid) + len(hostile))


def test_hostile_files_put_one_line_on_the_screen_and_the_host_keeps_its_filters_and_loggers(tmp_path):
    make_valid(tmp_path / "x", 40, seed=1)
    make_hostile(tmp_path / "x", 80, seed=1)
    save(tmp_path / "held" / "x.png")
    code = f"""
import logging, warnings
import accelerate, PIL.Image, torch, tqdm, vqgen.tokenizers.vqmodel  # these may change what they like

def state():
    pillow = logging.getLogger("PIL")
    loggers = [(x.level, x.propagate, list(x.handlers), list(x.filters)) for x in (logging.root, pillow)]
    return list(warnings.filters), loggers

before = state()
from vqgen.settings import DataConfig
from vqgen.data.codes import TokenStore
from vqgen.data.images import load_images
assert state() == before, "the import"
load_images(DataConfig(source={str(tmp_path / "x")!r}, val_source={str(tmp_path / "held")!r}, image_size=16))
assert state() == before, "the loading"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.startswith("skipped 80 images that do not load, first: ")
    assert done.stderr.count("\n") == 1


def test_a_hostile_file_raises_one_line_if_asked_to(tmp_path):
    for i, name in enumerate(make_hostile(tmp_path / "x", 60, seed=2)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / "x" / name).rename(tmp_path / str(i) / name)
        save(tmp_path / str(i) / "other.png")
        parts = load(tmp_path / str(i), on_error="raise", cache_gb=0, channels=3)
        (part,) = (part for part in parts if part.names == [name])
        with pytest.raises(InputError, match=r"^an image does not load: .*data\.on_error=skip$") as error:
            part.read(0)
        assert len(str(error.value).splitlines()) == 1


# Settings, whole sets and rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": "stretch"}, "resize=stretch is not known; use crop or pad"),
        ({"on_error": "ignore"}, "on_error=ignore is not known; use skip or raise"),
        ({"channels": 4}, "channels=4 is not known; use 1 or 3 or null"),
        ({"background": "blu"}, "background=blu is not a colour; use a name or #rrggbb"),
        ({"image_size": 0}, "image_size=0 is not a number of pixels; use 32, for example"),
        ({"image_size": 10**6}, "image_size=1000000: must be at most 32768"),
        ({"val_fraction": 1.0}, "val_fraction=1.0 must be at least 0 and below 1; use 0.05, for example"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        load("digits", **settings)
    assert str(error.value) == message


def test_some_rows_are_always_the_same_ones_of_every_class_in_turn():
    assert some_rows(5, None).tolist() == some_rows(5, 9).tolist() == [0, 1, 2, 3, 4]
    rows = some_rows(1000, 100)
    assert rows.tolist() == sorted(set(rows.tolist())) == some_rows(1000, 100).tolist()
    assert len(rows) == 100
    assert set((rows % 10).tolist()) == set(range(10))  # ten classes in turn


def test_a_whole_set_has_the_size_of_its_images_or_the_one_asked_for(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    data = DataConfig(source=f"{tmp_path}/images.npz")
    whole, held_out = load_set("images", data)
    assert (len(whole), whole.image_size, whole.channels, held_out) == (12, 20, 3, None)
    assert np.array_equal(whole.__getitems__(range(12))[0].permute(0, 2, 3, 1).numpy(), images)
    assert load_set("images", data, 16)[0].image_size == 16


def test_a_set_with_parts_comes_with_its_held_out_part():
    train, held_out = load_set("reference", DataConfig())
    assert (len(train), len(held_out)) == (20_000, 2_000)
    assert train.class_names == held_out.class_names


# Shapes


@pytest.mark.parametrize(("size", "scale"), [((20, 30), 2), ((30, 20), 2)])
def test_images_that_are_no_squares_are_cropped_or_padded_to_their_shape(tmp_path, size, scale):
    height, width = size
    whole = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    pixels = whole.repeat(scale, axis=0).repeat(scale, axis=1)
    for name in ("a", "b"):  # one becomes the held-out image
        save(tmp_path / "photos" / f"{name}.png", Image.fromarray(pixels))
    for resize in ("crop", "pad"):
        train, held_out = load(tmp_path / "photos", image_size=[height, width], resize=resize)
        assert (train.size, train.image_size, train.crop["image_size"]) == (size, [height, width], [height, width])
        expected = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        assert np.array_equal(train.read(0).transpose(1, 2, 0), np.asarray(expected))
        assert held_out.__getitems__([0])[0].shape == (1, 3, height, width)
    tall = load(tmp_path / "photos", image_size=[3 * height, width], resize="pad", background="red")[0].read(0)
    assert np.array_equal(tall[:, height : 2 * height].transpose(1, 2, 0), np.asarray(expected))
    assert (tall[:, :height] == np.array(RED)[:, None, None]).all()
    wide = load(tmp_path / "photos", image_size=[height, width // 2])[0].read(0)  # crops left and right
    half = Image.fromarray(pixels).resize(
        (width // 2, height), Image.Resampling.BICUBIC, (width * scale / 4, 0, width * scale * 3 / 4, height * scale)
    )
    assert np.array_equal(wide.transpose(1, 2, 0), np.asarray(half))


def test_a_size_is_a_side_or_height_and_width():
    assert DataConfig(image_size=[16, 16]) == DataConfig(image_size=16) == DataConfig(image_size="16")
    assert (DataConfig(image_size=(16, 24)).image_size, DataConfig(image_size=[16, 24]).size) == ([16, 24], (16, 24))
    for wrong in ([16], [16, 16, 16], "large", 16.0, True, None, [16, "x"]):
        with pytest.raises(InputError, match=r"^data\.image_size=.*: must be a number of pixels, or two as in \["):
            DataConfig(image_size=wrong)


def test_the_size_that_a_set_has_is_that_of_upright_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    save(tmp_path / "0.jpg", Image.new("RGB", (30, 20)), exif=exif)
    save(tmp_path / "1.jpg", Image.new("RGB", (20, 30)))
    assert load_set("images", DataConfig(source=str(tmp_path)))[0].image_size == [30, 20]


def test_a_whole_set_of_one_shape_that_is_no_square_keeps_it(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 20, 28, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    whole, _ = load_set("images", DataConfig(source=f"{tmp_path}/images.npz"))
    assert whole.image_size == [20, 28]
    assert np.array_equal(whole.__getitems__(range(12))[0].permute(0, 2, 3, 1).numpy(), images)


# A part of the images


@pytest.fixture
def uneven(tmp_path):
    """Three classes of 40, 4 and 1 images of their own brightness, and as many held out."""
    for part in ("train", "val"):
        for level, (name, count) in enumerate({"a": 40, "b": 4, "c": 1}.items()):
            for i in range(count):
                save(tmp_path / "uneven" / part / name / f"{i}.png", 100 * level + i)
    return tmp_path / "uneven"


def test_at_most_so_many_images_keep_every_class_and_are_always_the_same(uneven):
    whole = load(uneven)
    few, more = (load(uneven, max_images=count) for count in (8, 20))
    for part in (0, 1):
        assert (len(whole[part]), len(few[part]), len(more[part])) == (45, 8, 20)
        assert set(few[part].class_ids) == {0, 1, 2}
        assert set(few[part].names) < set(more[part].names) < set(whole[part].names)
        assert few[part].names == load(uneven, max_images=8, cache_gb=0)[part].names
        for i in range(8):
            at = whole[part].names.index(few[part].names[i])
            assert np.array_equal(few[part].read(i), whole[part].read(at))
        assert len({part.fingerprint for part in (whole[part], few[part], more[part])}) == 3
    places = [whole[0].names.index(name) for name in few[0].names]
    assert places == sorted(places)
    assert max(places[:6]) > 20  # a random part, not the first ones
    assert few[0].notes == ["max_images=8: 8 of 45 training images and 8 of 45 held-out ones, chosen at random"]
    assert load(uneven, max_images=1000)[0].names == whole[0].names
    data = DataConfig(source=str(uneven), image_size=8, max_images=8)
    assert [len(part) for part in load_set("images", data, 8)] == [8, 8]


def test_fewer_images_than_classes_are_refused(uneven):
    with pytest.raises(InputError, match=r"^max_images=2: is below the number of classes; give 3 or more$"):
        load(uneven, max_images=2)
    with pytest.raises(InputError, match=r"^data\.max_images=0: must be at least 1$"):
        DataConfig(max_images=0)


# From Python


def test_load_images_takes_a_source_and_settings_by_name(folder, tmp_path):
    train, held_out = load_images(str(folder), image_size=16, val_fraction=0.3)
    assert len(train) + len(held_out) == 20
    assert (train.image_size, train.channels, train.class_names) == (16, 1, ["cat", "dog"])
    assert set(train.class_ids) == {0, 1}
    same = load_images(DataConfig(source=str(folder), image_size=16, val_fraction=0.3))
    assert [part.names for part in same] == [train.names, held_out.names]
    save(tmp_path / "held" / "cat" / "x.png")
    train, held_out = load_images(folder, val_source=tmp_path / "held")
    assert (len(train), len(held_out)) == (20, 1)


def test_load_images_changes_settings_by_name_in_a_copy(folder):
    data = DataConfig(source=str(folder))
    assert load_images(data, image_size=8)[0].image_size == 8
    assert data == DataConfig(source=str(folder))
    with pytest.raises(TypeError, match="imagesize"):
        load_images(folder, imagesize=8)
    with pytest.raises(InputError, match=r"^source=nowhere: no such file or folder"):
        load_images("nowhere")
