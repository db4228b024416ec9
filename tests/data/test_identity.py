"""The fingerprint, and the changes that change it."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
from data.files import load, save, write_shard

from vqgen.data import identity as identity_module


def rewrite(path: Path, at: int) -> None:
    """Changes one byte, but not the size or the time of modification."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_fingerprint_follows_content_names_and_classes(folder):
    def fingerprints(**settings):
        return [part.fingerprint for part in load(folder, **settings)]

    before = fingerprints()
    assert before == fingerprints()
    assert before[0] != before[1]
    int(before[0], 16)
    for settings in ({"image_size": 16}, {"resize": "pad"}, {"background": "red"}, {"cache_gb": 0}, {"channels": 3}):
        assert fingerprints(**settings) == before

    rewrite(folder / "cat" / "3.png", -20)
    one_byte = fingerprints()
    assert one_byte[0] != before[0]
    (folder / "cat").rename(folder / "bat")
    renamed = fingerprints()
    assert renamed[0] != one_byte[0]
    save(folder / "bat" / "new.png")
    assert fingerprints()[0] != renamed[0]


def test_fingerprint_is_of_the_images_that_load_or_not(damaged, tmp_path):
    settings = {"val_source": str(tmp_path / "held")}
    assert load(damaged, **settings)[0].fingerprint == load(damaged, **settings, cache_gb=0)[0].fingerprint


def test_fingerprint_of_large_sets_is_of_sizes_and_a_sample_of_bytes(folder, monkeypatch, tmp_path):
    whole = load(folder)[0].fingerprint
    monkeypatch.setattr(identity_module, "HASHED_BYTES", 100)
    before = load(folder)[0].fingerprint
    assert before != whole
    shutil.copytree(folder, tmp_path / "elsewhere")  # with other times of modification
    assert load(tmp_path / "elsewhere")[0].fingerprint == before
    rewrite(folder / "cat" / "3.png", -20)  # the sample covers small files whole
    assert load(folder)[0].fingerprint != before
    (folder / "dog" / "0.png").write_bytes((folder / "dog" / "0.png").read_bytes() + b"0")
    assert load(folder)[0].fingerprint != before


def test_the_sample_reads_few_bytes_of_a_large_file(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar", {str(k): (k, b"0") for k in range(4)})
    with (tmp_path / "a.tar").open("ab") as file:
        file.truncate(4 << 30)  # a hole, which takes no space
    start = time.monotonic()
    before = load(tmp_path / "a.tar")[0].fingerprint
    assert time.monotonic() - start < 5
    with (tmp_path / "a.tar").open("ab") as file:
        file.truncate((4 << 30) + 512)
    assert load(tmp_path / "a.tar")[0].fingerprint != before


def test_fingerprint_of_arrays_and_shards(tmp_path):
    pixels = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    before = load(tmp_path / "a.npz")[0].fingerprint
    stat = (tmp_path / "a.npz").stat()
    pixels[3, 7, 7] = 1
    np.savez(tmp_path / "a.npz", images=pixels)
    os.utime(tmp_path / "a.npz", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (tmp_path / "a.npz").stat().st_size == stat.st_size
    assert load(tmp_path / "a.npz")[0].fingerprint != before

    write_shard(tmp_path / "a.tar", {str(k): (k, b"0") for k in range(4)})
    before = load(tmp_path / "a.tar")[0].fingerprint
    rewrite(tmp_path / "a.tar", (tmp_path / "a.tar").read_bytes().index(b"{}"))
    assert load(tmp_path / "a.tar")[0].fingerprint != before
