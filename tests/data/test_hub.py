"""Data sets of the Hugging Face Hub by name: a small Hub on this machine, local folders, and no Hub at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data.files import greys, save, write_table
from programs import ROOT
from torch.utils.data import DataLoader, IterableDataset

from vqgen.data.sources import hub
from vqgen.data.sources.hub import Address, hub_shards, parse
from vqgen.errors import InputError
from vqgen.settings import DataConfig

# Reads sources in a process of its own, because `datasets` looks at the environment only when it is imported.
READ = """
import json, sys, time
from vqgen.data.sources import open_source
from vqgen.data.sources.hub import hub_shards
from vqgen.errors import InputError
from vqgen.settings import DataConfig

for source in sys.argv[1:]:
    start, kind = time.monotonic(), source.partition(" ")[0]
    try:
        if kind == "stream":
            shards, names, notes = hub_shards(source.partition(" ")[2], DataConfig())
            rows = [(name, len(file), label) for shard in shards for name, file, label in shard.rows(lambda name: True)]
            shown = {"rows": rows, "head": shards[0].head(9).decode()}
        else:
            found = open_source("source", source, DataConfig())
            parts = [part for part in (found.train, found.held_out) if part is not None]
            greys = [[part.open(row).getpixel((0, 0)) for row in range(len(part.names))] for part in parts]
            shown = {"greys": greys, "names": list(found.train.names), "split": found.split, "notes": found.notes}
            shown |= {"class_names": found.train.class_names, "left_out": found.left_out}
    except InputError as error:
        shown = {"error": str(error)}
    print(json.dumps(shown | {"seconds": time.monotonic() - start}))
"""


def read(folder: Path, *sources: str, hub: Path | None = None) -> dict[str, dict]:
    """What a process finds in each source, with a Hub of these data sets or with one that does not answer."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    env["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody answers at this port
    program = [sys.executable, "-c", READ, *sources]
    if hub is not None:
        program = [sys.executable, str(ROOT / "tests" / "data" / "hub.py"), str(hub), *program]
    done = subprocess.run(program, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "examples/s" not in done.stderr  # no bars where nobody sees them
    return dict(zip(sources, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data sets of a Hub in sets/, and two folders that `datasets` understands."""
    root = tmp_path_factory.mktemp("hub")
    for user_and_name in ("ann/pets", "ann/gated", "ann/private"):
        data = root / "sets" / user_and_name / "data"
        write_table(data / "train-00000-of-00001.parquet", {"image": greys(8), "label": ["cat", "dog"] * 4})
        write_table(data / "test-00000-of-00001.parquet", {"image": greys(3, 50), "label": ["dog", "cat", "dog"]})
    for part, count in (("train", 6), ("test", 2)):
        for k in range(count):
            save(root / "photos" / part / ("cat" if k % 2 else "dog") / f"{k}.png", 40 + k)
    write_table(root / "table" / "train.parquet", {"image": greys(4)})
    return root


@pytest.fixture(scope="module")
def online(folder) -> dict[str, dict]:
    """What is found with a Hub."""
    known = ("hf:ann/pets", "hf:ann/pets:test", "stream hf:ann/pets", "hf:ann/pets:dev", "hf:ann/pets/big")
    return read(folder, *known, "hf:ann/gated", "hf:ann/private", "hf:bob/pets:train", hub=folder / "sets")


@pytest.fixture(scope="module")
def offline(folder, online) -> dict[str, dict]:
    """What is found afterwards without a Hub."""
    known = ("hf:ann/pets", "hf:ann/none", "stream hf:ann/pets")
    return read(folder, *known, "hf:photos", "hf:./table:train", "hf:./nowhere")


def test_a_data_set_of_the_hub(online):
    whole = online["hf:ann/pets"]
    assert "error" not in whole, whole
    assert whole["greys"] == [list(range(8)), [50, 51, 52]]
    assert whole["names"] == [f"train/{k}" for k in range(8)]
    assert (whole["split"], whole["class_names"], whole["left_out"]) == ("test", ["cat", "dog"], {})
    assert online["hf:ann/pets:test"]["greys"] == [[50, 51, 52]]
    stream = online["stream hf:ann/pets"]
    assert [(row[0], row[2]) for row in stream["rows"]] == [
        (f"train-00000-of-00001/{k}", ["cat", "dog"][k % 2]) for k in range(8)
    ]
    assert stream["head"] == "a" * 9  # the commit


def test_what_the_hub_does_not_have(online):
    gated, private, unknown = (online[source]["error"] for source in [*online][5:])
    assert "ann/gated needs a permission; ask for it at https://huggingface.co/datasets/ann/gated" in gated
    assert gated.endswith("then log in with `hf auth login`, or set HF_TOKEN")
    for message, name in ((private, "ann/private"), (unknown, "bob/pets")):
        assert f"the Hub has no data set {name} that you may read; check its name" in message
    assert 'Unknown split "dev"' in online["hf:ann/pets:dev"]["error"]
    assert "'big' not found" in online["hf:ann/pets/big"]["error"]
    assert not any("\n" in found.get("error", "") for found in online.values())


def test_the_cache_serves_without_a_hub(online, offline):
    assert {**offline["hf:ann/pets"], "seconds": 0} == {**online["hf:ann/pets"], "seconds": 0}
    missing = offline["hf:ann/none"]["error"]
    assert "ann/none is not in the cache" in missing
    assert "and the Hub cannot be reached; connect to the network" in missing
    assert "the Hub cannot be reached, so ann/pets cannot be streamed" in offline["stream hf:ann/pets"]["error"]
    assert max(found["seconds"] for found in offline.values()) < 15  # datasets alone would try for 23 seconds


def test_folders_that_datasets_understands(offline):
    assert sorted(offline["hf:photos"]["greys"][0]) == [40, 41, 42, 43, 44, 45]
    assert (offline["hf:photos"]["class_names"], offline["hf:photos"]["split"]) == (["cat", "dog"], "test")
    assert offline["hf:./table:train"]["greys"] == [[0, 1, 2, 3]]
    message = "./nowhere is neither a folder nor a name on the Hub; give hf:NAME or hf:USER/NAME"
    assert offline["hf:./nowhere"]["error"].endswith(message)


def test_a_program_ends_with_one_line_and_code_2(tmp_path, program, monkeypatch):
    monkeypatch.setattr(hub, "_answers", lambda address: False)
    code, _, errors = program("stage1/train.py", "data.source=hf:ann/pets", f"run_dir={tmp_path}/run")
    assert code == 2
    assert errors.count("\n") == 1
    assert "data.source=hf:ann/pets: ann/pets is not in the cache" in errors


def test_names(tmp_path):
    assert parse("hf:cifar10") == Address("cifar10", None, None)
    assert parse("hf:cifar10:train") == Address("cifar10", None, "train")
    assert parse("hf:ann/pets:train") == Address("ann/pets", None, "train")
    assert parse("hf:ann/pets/large:train") == Address("ann/pets", "large", "train")
    assert parse(f"hf:{tmp_path}:test") == Address(str(tmp_path), None, "test")
    assert parse("hf://datasets/ann/pets/a.tar") is None
    assert parse("photos") is None
    for wrong in ("hf:", "hf:a/b/c/d", "hf:a b", "hf:../x", "hf:x:train[:10%]", "hf:x:train+test"):
        with pytest.raises(InputError, match=r"; give "):
            parse(wrong)


def test_shards_of_a_stream(tmp_path):
    for number in range(2):
        images = greys(6, 6 * number)
        write_table(tmp_path / "pets" / f"train-{number}.parquet", {"image": images, "kind": ["a", "b", "c"] * 2})
    shards, names, notes = hub_shards(f"hf:{tmp_path}/pets", DataConfig())
    assert ([shard.name for shard in shards], names) == (["train-00000-of-00002", "train-00001-of-00002"], {})
    assert notes[1] == "kind: not used for classes; data.label_column= takes one of them"
    for _ in range(2):
        rows = [row for shard in shards for row in shard.rows(lambda name: True)]
        assert [name for name, *_ in rows] == [f"train-0000{n}-of-00002/{k}" for n in range(2) for k in range(6)]
        assert [content for _, content, _ in rows] == greys(12)
    some = [content for _, content, _ in shards[1].rows(lambda name: name.endswith(("/0", "/4")))]
    assert some == [greys(1, 6)[0], None, None, None, greys(1, 10)[0], None]
    assert shards[0].head(99) != shards[1].head(99)
    loader = DataLoader(_Rows(shards), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(content for _, content, _ in loader) == sorted(2 * greys(12))  # each worker reads what it is told to

    shards, names, notes = hub_shards(f"hf:{tmp_path}/pets", DataConfig(label_column="kind"))
    assert [label for *_, label in shards[0].rows(lambda name: False)] == ["a", "b", "c"] * 2
    with pytest.raises(InputError, match="label_column=x: no column of names or numbers; such columns are kind"):
        hub_shards(f"hf:{tmp_path}/pets", DataConfig(label_column="x"))


class _Rows(IterableDataset):
    """All rows of some shards, in each worker of a `DataLoader`."""

    def __init__(self, shards):
        self.shards = shards

    def __iter__(self):
        return (row for shard in self.shards for row in shard.rows(lambda name: True))


def test_a_stream_of_declared_classes_and_of_files(tmp_path):
    for k in range(6):
        save(tmp_path / "photos" / "train" / ("cat" if k % 2 else "dog") / f"{k}.png", 40 + k)
    shards, names, _ = hub_shards(f"hf:{tmp_path}/photos", DataConfig())
    assert names == {"0": "cat", "1": "dog"}
    rows = [row for shard in shards for row in shard.rows(lambda name: True)]
    assert sorted(content for _, content, _ in rows) == sorted(greys(6, 40))
    assert sorted(label for *_, label in rows) == ["0"] * 3 + ["1"] * 3
