"""Streams: each image once an epoch, the same bits after a stop, what is held out, damage, remote shards."""

import gc
import gzip
import io
import itertools
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import webdataset
from data.files import add_to_tar, load, png, save, write_shard
from data.server import Server, serving
from data.test_processes import in_two
from PIL import Image

from vqgen.cli.runs import run_images
from vqgen.data import look, order, stream
from vqgen.data.describe import describe
from vqgen.data.order import Place, StreamBatches, image_batches, streamed_batches
from vqgen.data.sources import remote
from vqgen.data.sources import shards as shards_module
from vqgen.data.sources.shards import sample_of
from vqgen.data.stream import ImageStream, OrderedStream
from vqgen.distributed import computed_by_main
from vqgen.errors import InputError
from vqgen.settings import DataConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(shards_module, "PAUSES", (0, 0, None))
    return tmp_path / "cache" / "vqgen"


@pytest.fixture
def shards(tmp_path) -> Path:
    """Seven shards of 20 to 26 images; image k of all has brightness k and class k % 3, but two have none."""
    number = itertools.count()
    (tmp_path / "there").mkdir()
    for shard in range(7):
        samples = {f"{key:04}": next(number) for key in range(20 + shard)}
        labels = {key: None if k in (5, 70) else b"%d\n" % (k % 3) for key, k in samples.items()}
        write_shard(tmp_path / "there" / f"x-{shard}.tar", {key: (k, labels[key]) for key, k in samples.items()})
    return tmp_path / "there"


def opened(source: object, **settings) -> tuple[ImageStream, object]:
    return load(source, stream=True, **{"shuffle_buffer": 16, **settings})


def taken(images: ImageStream, count: int, *, first: int = 0, workers: int = 0, batch: int = 4, seed: int = 0):
    """The brightness (count, B) and the class ids of batches."""
    place = Place(seed, batch, 1, first)
    if workers <= 2:
        batches = streamed_batches(images, place, workers=workers, device=CPU)
    else:  # in turn here, as in a loader, because many processes take seconds to start
        each = []
        for worker in range(workers):
            with patch.object(order, "get_worker_info", lambda w=worker: SimpleNamespace(num_workers=workers, id=w)):
                each.append(iter(StreamBatches(images, place)))
        batches = (next(each[i % workers]) for i in itertools.count())
    x, class_ids = zip(*itertools.islice(batches, count), strict=True)
    return torch.stack(x)[:, :, 0, 0, 0].tolist(), torch.stack(class_ids).tolist()


def flat(nested: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(nested))


def brightness(images) -> list[int]:
    return [int(images.read(i)[0, 0, 0]) for i in range(len(images))]


def test_each_image_comes_once_an_epoch_with_its_class_and_none_is_held_out(shards):
    train, held_out = opened(shards / "x-*.tar")
    kept = brightness(held_out)
    expected = set(range(161)) - set(kept)
    assert 1 < len(kept) < 20
    x, class_ids = taken(train, 3 * len(expected), batch=1)
    for epoch in range(3):
        assert sorted(flat(x)[epoch * len(expected) : (epoch + 1) * len(expected)]) == sorted(expected)
    assert flat(class_ids) == [-1 if k in (5, 70) else k % 3 for k in flat(x)]
    assert (train.class_names, train.channels, held_out.class_names) == (["0", "1", "2"], 1, ["0", "1", "2"])
    assert held_out.class_ids.tolist() == [-1 if k in (5, 70) else k % 3 for k in kept]
    assert flat(x)[: len(expected)] != flat(x)[len(expected) : 2 * len(expected)]
    other, _ = load(shards / "x-*.tar")  # random access holds out the same images
    assert sorted(set(range(161)) - set(brightness(other))) == sorted(kept)
    assert flat(taken(train, 10, seed=1)[0]) != flat(taken(train, 10)[0])


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 9], ids=lambda workers: f"{workers} workers")
@pytest.mark.parametrize("known", [True, False], ids=["counts known", "counts lost"])
def test_a_stream_goes_on_with_the_same_bits(shards, cache, workers, known):
    train, held_out = opened(shards / "x-{0..6}.tar")
    count = 2 * (161 - len(held_out)) // 4 + 5
    whole = taken(train, count, workers=workers)
    for first in (2, 20, 37, count - 3) if workers in (1, 2) else range(1, count - 3, 4):
        if not known:
            for file in cache.glob("streams/*/counts"):
                file.unlink()
        x, class_ids = taken(train, 3, first=first, workers=workers)
        assert x == whole[0][first : first + 3], first
        assert class_ids == whole[1][first : first + 3]


@pytest.mark.parametrize("readers", [1, 2, 5, 7, 8, 30])
def test_the_readers_together_have_each_image_once_an_epoch(shards, readers):
    train, held_out = opened(shards / "x-*.tar")
    seen = Counter()
    for reader in range(readers):
        one = stream._Reader(train, reader, readers, 0, 4)
        for epoch in range(2):
            seen.update((epoch, sample.name) for sample in one._epoch(epoch, 0))
    assert set(seen.values()) == {1}
    assert len(seen) == 2 * (161 - len(held_out))


def test_a_buffer_mixes_as_many_images_as_it_holds_and_never_holds_more(shards, monkeypatch):
    train, _ = opened(shards / "x-*.tar")
    in_memory, most = 0, 0
    read = ImageStream.training_samples

    def counted(self, number, wanted):
        nonlocal in_memory, most
        for sample in read(self, number, wanted):
            in_memory += 1
            most = max(most, in_memory)
            yield sample

    monkeypatch.setattr(ImageStream, "training_samples", counted)
    for buffer in (16, 1000):
        reader = stream._Reader(train, 0, 1, 0, buffer)
        in_order = [sample.name for sample in stream._Reader(train, 0, 1, 0, buffer)._epoch(0, 0)]
        in_memory = most = 0
        shuffled = []
        for sample in itertools.islice(reader.shuffled(0), len(in_order)):
            shuffled.append(sample.name)
            in_memory -= 1
        assert shuffled != in_order
        for start in range(0, len(in_order), buffer):
            assert sorted(shuffled[start : start + buffer]) == sorted(in_order[start : start + buffer])
        assert most <= min(buffer, len(in_order)) + 1


def test_what_is_read_again_to_go_on_is_at_most_a_block(shards, monkeypatch):
    train, _ = opened(shards / "x-*.tar")
    taken(train, 80, batch=4)
    read = []
    content = shards_module._content
    monkeypatch.setattr(
        shards_module, "_content", lambda tar, member, wanted: read.append(wanted) or content(tar, member, wanted)
    )
    taken(train, 1, first=79, batch=4)
    assert sum(read) <= 3 * (2 * 16 + 4)  # three files each


def test_streams_of_several_processes_are_disjoint_and_go_on(shards, tmp_path):
    def work(rank: int) -> object:
        train, _ = opened(shards / "x-*.tar")
        return [taken(train, 12, workers=2), taken(train, 4, first=8, workers=2), train.fingerprint]

    first, second = in_two(tmp_path, work)
    assert first[2] == second[2]
    for (whole, _), (rest, _), _ in (first, second):
        assert rest == whole[8:12]
    assert not set(flat(first[0][0])) & set(flat(second[0][0]))


def test_the_main_process_alone_describes_a_stream(shards, tmp_path):
    def work(rank: int) -> object:
        train, held_out = opened(shards / "x-*.tar")
        lines = describe(train, held_out, 8).short_lines() if rank == 0 else []
        return [lines[:1], computed_by_main(lambda: "in step")]

    (lines, first), (_, second) = in_two(tmp_path, work)
    assert lines[0].startswith("images: ")
    assert first == second == "in step"


def test_images_are_the_same_as_where_they_are_read_at_random(shards):
    train, _ = opened(shards / "x-*.tar")
    data = DataConfig(flip=True, workers=0)
    batches = image_batches(train, Place(0, 4, 1, 0), data=data, device=CPU)
    x, class_ids = next(batches)
    assert x.shape == (4, 1, 8, 8)
    assert x.dtype == torch.float32
    assert class_ids.shape == (4,)
    assert ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == taken(train, 1)[0][0]


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(shards, tmp_path):
    before = opened(shards / "x-*.tar")[0].fingerprint
    shards.rename(tmp_path / "moved")
    shards = tmp_path / "moved"
    assert opened(shards / "x-{0..6}.tar", shuffle_buffer=3, val_fraction=0.3)[0].fingerprint == before
    with serving(shards) as server:
        assert opened(f"{server.url}/x-{{0..6}}.tar")[0].fingerprint == before
    content = bytearray((shards / "x-3.tar").read_bytes())
    content[600] ^= 1
    (shards / "x-3.tar").write_bytes(content)
    changed = opened(shards / "x-*.tar")[0].fingerprint
    (shards / "classes.json").write_text('["a", "b", "c"]')
    assert len({before, changed, opened(shards / "x-*.tar")[0].fingerprint}) == 3


def test_classes_by_name_by_list_and_those_that_come_too_late(tmp_path, monkeypatch, caplog):
    write_shard(tmp_path / "a.tar", {f"{k}": (k, b"cat" if k % 2 else b"dog\n") for k in range(20)})
    write_shard(tmp_path / "b.tar", {f"{k}": (100 + k, b"fox") for k in range(20)})
    train, _ = opened(tmp_path / "*.tar")
    assert train.class_names == ["cat", "dog", "fox"]
    x, class_ids = taken(train, 20)
    assert all(c == (2 if k >= 100 else 0 if k % 2 else 1) for k, c in zip(flat(x), flat(class_ids), strict=True))
    monkeypatch.setattr(look, "LOOKED_INTO", 1)
    train, _ = opened(tmp_path / "*.tar", val_fraction=0.1)
    assert train.class_names == ["cat", "dog"]
    x, class_ids = taken(train, 9)
    assert {c for k, c in zip(flat(x), flat(class_ids), strict=True) if k >= 100} == {-1}
    said = [record.message for record in caplog.records if "fox" in record.message]
    assert len(said) == 1
    assert said[0].endswith("list all classes in a classes.json beside the first shard")
    (tmp_path / "classes.json").write_text(json.dumps(["fox", "cat", "dog"]))
    train, _ = opened(tmp_path / "*.tar")
    assert train.class_names == ["fox", "cat", "dog"]
    x, class_ids = taken(train, 9)
    assert all(c == (0 if k >= 100 else 1 if k % 2 else 2) for k, c in zip(flat(x), flat(class_ids), strict=True))


def test_the_files_of_a_key_are_a_sample_if_one_is_an_image():
    assert sample_of("a", {".json": b"{}", ".cls": b"3"}) is None
    sample = sample_of("a", {".cls": b"3\n", ".mask.png": b"m", ".jpg": b"x", ".other": b""})
    assert sample == ("a", ".jpg", b"x", {".cls": b"3\n"})


def test_labels_are_where_random_access_finds_them(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for k in range(24):
            add_to_tar(tar, f"{k}.png", png(k))
            add_to_tar(tar, f"{k}.json", json.dumps({"category": f"kind{k % 3}", "info": {"size": k % 2}}).encode())
            add_to_tar(tar, f"{k}.txt", b"%d" % (k % 4))
    for key, names, rule in (
        (None, ["kind0", "kind1", "kind2"], 3),
        ("info.size", ["0", "1"], 2),
        ("txt", list("0123"), 4),
    ):
        train, held_out = opened(tmp_path / "x.tar", label_key=key)
        assert train.class_names == names
        x, class_ids = taken(train, 8, batch=2)
        assert flat(class_ids) == [k % rule for k in flat(x)]
        assert held_out.class_ids.tolist() == [k % rule for k in brightness(held_out)]
        assert train.notes[0] in load(tmp_path / "x.tar", label_key=key)[0].notes
    with pytest.raises(InputError, match=r"^source=.*x\.tar: label_key=colour is not in x\.tar/0\.json; its keys are "):
        opened(tmp_path / "x.tar", label_key="colour")


def test_images_of_16_bits_have_the_levels_of_all(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for k in range(1, 31):
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 8), 136 * k, np.uint16)).save(buffer, "PNG")
            add_to_tar(tar, f"{k:02}.png", buffer.getvalue())
    train, _ = opened(tmp_path / "x.tar")
    x, _ = taken(train, 10, batch=2)
    other, _ = load(tmp_path / "x.tar", cache_gb=0)
    assert train.levels == other.levels
    assert set(flat(x)) <= set(brightness(load(tmp_path / "x.tar")[0]))


def test_damage_is_passed_over_and_listed_or_refused(shards, tmp_path):
    with tarfile.open(shards / "x-0.tar", "w") as tar:
        for k in range(20):
            add_to_tar(tar, f"{k:04}.png", png(k)[: 30 if k == 7 else None])
    (shards / "x-1.tar").write_bytes((shards / "x-1.tar").read_bytes()[:30_000])
    train, _ = opened(shards / "x-*.tar")
    train.report_skipped(tmp_path / "skipped.txt")
    x, _ = taken(train, 50, workers=2)
    assert 7 not in flat(x)
    for first in (3, 21, 40):
        assert taken(train, 2, first=first, workers=2)[0] == x[first : first + 2]
    listed = (tmp_path / "skipped.txt").read_text().splitlines()
    assert sorted(line.partition("\t")[0] for line in listed) == ["x-0.tar/0007", "x-1.tar"]
    with pytest.raises(
        InputError, match=r"x-0\.tar/0007 \(.*\); repair or remove it|x-1\.tar cannot be read to its end"
    ):
        taken(opened(shards / "x-*.tar", on_error="raise")[0], 50)


def test_a_stream_of_broken_images_ends(shards, monkeypatch):
    train, _ = opened(shards / "x-*.tar")
    monkeypatch.setattr(stream, "BROKEN_IN_A_ROW", 40)
    monkeypatch.setattr(ImageStream, "decode", lambda self, sample: None)
    with pytest.raises(InputError, match="none of 40 images in a row loads; repair them or give others"):
        taken(train, 1)


def test_a_shard_of_any_length_takes_no_memory(tmp_path):
    write_shard(tmp_path / "x.tar", {str(k): (k, b"0") for k in range(200)})
    samples = shards_module.TarShard(str(tmp_path / "x.tar"), "x.tar", None).samples(lambda name: False)
    assert len(list(itertools.islice(samples, 150))) == 150
    assert sum(type(thing) is tarfile.TarInfo for thing in gc.get_objects()) < 50
    assert len(list(samples)) == 50


def test_compressed_shards(shards, tmp_path):
    (tmp_path / "gz").mkdir()
    for shard in shards.glob("*.tar"):
        (tmp_path / "gz" / f"{shard.name}.gz").write_bytes(gzip.compress(shard.read_bytes()))
    train, _ = opened(tmp_path / "gz" / "x-*.tar.gz")
    x, _ = taken(train, 60)
    assert taken(train, 3, first=50)[0] == x[50:53]
    with serving(tmp_path / "gz") as server:
        train, _ = opened(f"{server.url}/x-{{0..6}}.tar.gz")
        assert taken(train, 60)[0] == x


@pytest.fixture
def server(shards) -> Iterator[Server]:
    with serving(shards) as running:
        yield running


def test_remote_shards_are_streamed_and_never_stored(shards, server, cache):
    local, _ = opened(shards / "x-{0..6}.tar")
    expected = taken(local, 90, workers=2)
    train, _ = opened(f"{server.url}/x-{{0..6}}.tar", workers=2)
    assert taken(train, 90, workers=2) == expected
    assert not (cache / "remote" / "files").exists()
    assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) < 60_000


def test_a_connection_that_breaks_in_a_stream_is_taken_up_again(shards, server):
    expected = taken(opened(shards / "x-{0..6}.tar")[0], 45)
    train, _ = opened(f"{server.url}/x-{{0..6}}.tar")
    server.cuts["/x-3.tar"] = [5_000, 9_000]
    assert taken(train, 45) == expected
    assert server.cuts["/x-3.tar"] == []
    server.cuts["/x-3.tar"] = [5_000] * 9
    with pytest.raises(
        InputError, match=r"x-3\.tar: the connection ended after \d+ of \d+ bytes; the same command goes"
    ):
        taken(train, 45)


def test_with_held_out_images_of_their_own_all_are_trained_on(shards, tmp_path):
    write_shard(tmp_path / "val.tar", {f"{k}": (200 + k, b"%d" % (k % 3)) for k in range(5)})
    train, held_out = opened(shards / "x-*.tar", val_source=str(tmp_path / "val.tar"))
    assert brightness(held_out) == [200, 201, 202, 203, 204]
    assert set(flat(taken(train, 161, batch=1)[0])) == set(range(161))


def test_what_cannot_be_streamed_is_one_line(shards, tmp_path):
    (tmp_path / "empty.tar").write_bytes((shards / "x-0.tar").read_bytes()[:0] + bytes(10240))
    (tmp_path / "text.tar").write_text("text" * 600)
    write_shard(tmp_path / "one.tar", {"0": (0, None)})
    for source, message in {
        "digits": r"no shard|stream=true reads tar shards \(\.tar, \.tar\.gz, \.tgz,",
        shards: r"stream=true reads tar shards \(\.tar",
        shards / "no.tar": r"no shard .*no\.tar",
        tmp_path / "empty.tar": r"no image in empty\.tar \(looked for \.png",
        tmp_path / "text.tar": r"text\.tar cannot be read to its end \(",
        tmp_path / "one.tar": "is only one image, so none can be held out",
        "http://127.0.0.1:9/x.tar": "cannot be reached",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            opened(source)
        assert str(error.value).startswith(f"source={source}: ")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^data\.max_images=9: not for a stream, which has no end"):
        opened(shards / "x-*.tar", max_images=9)
    with pytest.raises(InputError, match=r"^data\.shuffle_buffer=0: must be at least 1"):
        DataConfig(shuffle_buffer=0)
    train, _ = opened(shards / "x-0.tar")
    for _ in range(2):  # the second time the number of images is known
        with pytest.raises(InputError, match=r"no images for one of 64 readers; lower data\.workers, or give more"):
            next(train.batches(63, 64, seed=0, batch_size=1, taken=0, buffer=4))


def test_shards_that_webdataset_writes(tmp_path):
    with webdataset.ShardWriter(f"{tmp_path}/y-%03d.tar", maxcount=10, verbose=0) as writer:
        for k in range(35):
            image = np.full((8, 8, 3), (k, 2 * k, 3 * k), np.uint8)
            writer.write({"__key__": f"dir.v1/{k:05}", "png": image, "cls": k % 4, "json": {"k": k}})
    train, held_out = opened(tmp_path / "y-{000..003}.tar")
    assert (train.channels, train.class_names) == (3, ["0", "1", "2", "3"])
    theirs = webdataset.WebDataset(f"{tmp_path}/y-{{000..003}}.tar", shardshuffle=False).decode("rgb8")
    theirs = {sample["__key__"]: sample for sample in theirs}
    assert len(theirs) == 35
    held = {name.partition("/")[2] for name in held_out.names}
    x, class_ids = taken(train, 35 - len(held), batch=1)
    expected = {s["png"][0, 0, 0]: s["cls"] for key, s in theirs.items() if key not in held}
    assert dict(zip(flat(x), flat(class_ids), strict=True)) == expected


def test_a_stream_in_order_is_what_is_trained_on(shards, cache):
    train, held_out = opened(shards / "x-*.tar")
    ordered = OrderedStream(train)
    assert ordered.resized([8, 16]).read(3).shape == (1, 8, 16)
    assert len(ordered) == 161 - len(held_out)
    pixels = [int(ordered.read(i)[0, 0, 0]) for i in range(len(ordered))]
    assert pixels == sorted(set(range(161)) - set(brightness(held_out)))
    assert ordered.class_ids.tolist() == [-1 if k in (5, 70) else k % 3 for k in pixels]
    later = OrderedStream(train)
    assert [int(later.read(i)[0, 0, 0]) for i in range(60, 99)] == pixels[60:99]
    late = OrderedStream(train)  # of several threads, that of the first image need not be the first to ask
    assert [int(late.read(i)[0, 0, 0]) for i in (71, 70, 72)] == [pixels[71], pixels[70], pixels[72]]
    shorter = OrderedStream(train)  # than when it was counted
    shorter.starts[1:] += 9
    first = int(shorter.starts[1])
    assert shorter.read(first - 2) is None
    assert int(shorter.read(first)[0, 0, 0]) == pixels[first - 9]
    assert len(shorter._ahead) < 2 * 64
    with ThreadPoolExecutor(4) as pool:
        assert [int(x[0, 0, 0]) for x in pool.map(OrderedStream(train).read, range(40, 120))] == pixels[40:120]
    counts = stream._read_counts(train.look.folder)
    assert sum(counts.values()) == len(ordered)
    taken(train, 80)
    assert stream._read_counts(train.look.folder) == counts


STAGE_1 = ["data.stream=true", "data.image_size=8", "data.shuffle_buffer=16", "data.workers=2", "train.batch_size=8"]
STAGE_1 += ["model.widths=[8]", "model.patch_size=2", "model.quantizer.codebook_size=4", "tracking.wandb=disabled"]
GAN = [*STAGE_1[:5], "data.image_size=32", "generator.width=4", "discriminator.width=4", "tracking.wandb=disabled"]


@pytest.mark.parametrize(("script", "options"), [("train.py", STAGE_1), ("train_gan.py", GAN)], ids=["vae", "gan"])
def test_programs_train_on_a_stream_and_go_on_with_the_same_bits(shards, tmp_path, program, script, options):
    given = [f"data.source={shards}/x-*.tar", *options, "train.max_steps=6", "train.checkpoint_every=3"]
    code, said, errors = program(f"stage1/{script}", f"run_dir={tmp_path}/1", *given)
    assert code == 0, errors
    assert "7 shards of training" in said
    last = tmp_path / "1" / "checkpoints" / "step_00000006"
    before = (tmp_path / "1" / "metrics.jsonl").read_text(), torch.load(last / "state.pt", weights_only=False)
    shutil.rmtree(last)
    code, said, errors = program(f"stage1/{script}", f"run_dir={tmp_path}/1", *given)
    assert (code, "from step 3" in said) == (0, True), said + errors
    after = torch.load(last / "state.pt", weights_only=False)
    for part in {"model", "disc"} & after.keys():
        for name, tensor in after[part].items():
            assert tensor.equal(before[1][part][name]), name
    shutil.rmtree(last)
    code, said, errors = program(f"stage1/{script}", f"run_dir={tmp_path}/1", *given, "data.workers=0")
    assert (code, "from step 3 with other batches of the stream, " in said) == (0, True), said + errors


def test_stage_2_encodes_a_stream_once_and_the_evaluations_take_some_of_it(shards, tmp_path, program):
    given = [f"data.source={shards}/x-*.tar", *STAGE_1, "train.max_steps=1", f"run_dir={tmp_path}/1"]
    code, _, errors = program("stage1/train.py", *given)
    assert code == 0, errors
    small = ["model.hidden_size=8", "model.num_hidden_layers=1", "model.num_attention_heads=1"]
    few = ["train.max_steps=1", "train.batch_size=4", "tracking.wandb=disabled", *small]
    code, said, errors = program("stage2/train.py", f"stage1={tmp_path}/1", f"run_dir={tmp_path}/2", *few)
    assert code == 0, errors
    held_out = len(opened(shards / "x-*.tar")[1])
    assert f"{161 - held_out} training and {held_out} held-out sequences" in said
    assert "stream True" in said
    assert (
        f"note: images: {161 - held_out} that stand for all of 7 shards of images, which are read as a stream" in said
    )
    card = (tmp_path / "2" / "model" / "README.md").read_text()
    assert "trained on 7 shards of images." in card
    assert f"(counted among {161 - held_out} of the images)" in card
    code, said, errors = program("stage2/sample.py", f"{tmp_path}/2", "num_images=1")
    assert (code, said.splitlines()[0]) == (0, "classes: 0, 1, 2"), errors
    train, evaluated, own = run_images(tmp_path / "2", {}, 1)
    assert (len(train), len(evaluated), own) == (161 - held_out, held_out, True)
    assert not set(train.names) & set(evaluated.names)


def test_what_workers_cannot_read_ends_the_program_with_one_line(shards, tmp_path, program):
    (shards / "x-4.tar").write_bytes((shards / "x-4.tar").read_bytes()[:30_000])
    given = [f"data.source={shards}/x-*.tar", *STAGE_1, "data.on_error=raise", "train.max_steps=30"]
    code, _, errors = program("stage1/train.py", *given, f"run_dir={tmp_path}/1")
    assert code == 2
    assert errors.splitlines()[-1].startswith(
        "error: x-4.tar cannot be read to its end (the mark at its end is missing);"
    )


def test_a_data_set_of_the_hub_in_a_stream(tmp_path):
    for k in range(30):
        save(tmp_path / "pets" / "train" / ("cat" if k % 3 else "dog") / f"{k:02}.png", k)
    train, held_out = opened(f"hf:{tmp_path}/pets", val_fraction=0.1)
    assert (train.class_names, held_out.class_names) == (["cat", "dog"], ["cat", "dog"])
    x, class_ids = taken(train, 30 - len(held_out), batch=1)
    assert sorted(flat(x) + brightness(held_out)) == list(range(30))
    assert flat(class_ids) == [0 if k % 3 else 1 for k in flat(x)]
    assert taken(train, 4, first=11, batch=1, workers=2)[0] == taken(train, 15, batch=1, workers=2)[0][11:]


def test_a_stream_is_previewed(shards, tmp_path, program):
    given = [f"data.source={shards}/x-*.tar", "data.stream=true", "data.image_size=8", f"out={tmp_path}/seen"]
    code, said, errors = program("stage1/preview.py", *given)
    assert code == 0, errors
    assert "that stand for all of 7 shards of images, which are read as a stream" in said
    assert (tmp_path / "seen" / "preview.png").is_file()
