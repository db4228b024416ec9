"""Files at an address: fetched once, whole or not at all, and read as local files are."""

import errno
import glob
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from unittest.mock import Mock

import fsspec
import numpy as np
import pytest
from data.files import load, png, write_shard
from data.server import Server, serving
from data.test_processes import facts, in_two
from programs import ROOT

from vqgen.cli.runs import run_data, run_images
from vqgen.data.sources import remote
from vqgen.data.sources.remote import is_remote, local_copy
from vqgen.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    return tmp_path / "cache" / "vqgen" / "remote"


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder with three shards of four images each, in two classes with names."""
    folder = tmp_path / "there"
    folder.mkdir()
    for shard in range(3):
        write_shard(folder / f"x-{shard:03}.tar", {f"{k}": (10 * shard + k, b"%d" % (k % 2)) for k in range(4)})
    (folder / "classes.json").write_text('["cat", "dog"]')
    return folder


@pytest.fixture
def server(shards) -> Iterator[Server]:
    with serving(shards) as running:
        yield running


def test_shards_at_an_address_are_read_as_local_ones_are_and_fetched_once(server, shards, cache, caplog):
    url = f"{server.url}/x-{{000..002}}.tar"
    expected = facts(shards / "x-{000..002}.tar")
    assert facts(url) == expected
    assert len([r for r in caplog.records if f"fetching {url}: 4 files, 0.1 MiB, to {cache}" in r.message]) == 1
    assert server.counts["GET /x-001.tar"] == 1
    caplog.clear()
    assert facts(url) == expected
    assert facts(f"{server.url}/x-{{002,000,001}}.tar")[0][0] is not None  # the same files by another pattern
    assert server.counts["GET /x-001.tar"] == 1
    assert not caplog.records
    assert not list(cache.rglob("*.part"))


def test_a_changed_file_is_fetched_again_and_the_old_one_stays_for_those_who_read_it(server, shards):
    url = f"{server.url}/x-{{000..002}}.tar"
    before, _ = load(url, cache_gb=0)
    pixels = before.__getitems__(range(len(before)))[0]
    write_shard(shards / "x-001.tar", {f"{k}": (100 + k, b"0") for k in range(4)})
    assert facts(url) == facts(shards / "x-{000..002}.tar")
    assert (server.counts["GET /x-000.tar"], server.counts["GET /x-001.tar"]) == (1, 2)
    assert before.__getitems__(range(len(before)))[0].equal(pixels)


def test_without_its_server_a_source_is_read_from_the_cache_with_a_note(shards, cache, caplog):
    with serving(shards) as running:
        url = f"{running.url}/x-{{000..002}}.tar"
        expected = facts(url)
    caplog.clear()
    train, _ = load(url)
    assert facts(url) == expected
    assert train.notes[0].startswith(f"{url}: not asked whether it has changed (")
    assert caplog.records[0].message == train.notes[0]
    next((cache / "files").iterdir()).unlink()
    with pytest.raises(InputError, match=r"^source=http://127.*cannot be reached \(Connection refused\); check"):
        load(url)


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_connection_that_breaks_is_taken_up_again(server, shards, ranges, monkeypatch):
    monkeypatch.setattr(remote.Web, "chunk", 1000)
    server.ranges = ranges
    server.cuts["/x-001.tar"] = [3000, 6000]
    assert facts(f"{server.url}/x-{{000..002}}.tar") == facts(shards / "x-{000..002}.tar")
    size = (shards / "x-001.tar").stat().st_size
    others = sum((shards / name).stat().st_size for name in ("x-000.tar", "x-002.tar", "classes.json"))
    assert server.counts["GET /x-001.tar"] == 3
    assert server.bytes_sent - others == (size if ranges else 9000 + size)


@pytest.mark.parametrize("versions", [True, False], ids=["ETag", "no ETag"])
def test_what_was_fetched_before_the_end_is_not_fetched_again(server, shards, cache, versions):
    server.versions = versions
    url = f"{server.url}/x-{{000..002}}.tar"
    server.cuts["/x-002.tar"] = [5000, 5000, 5000, 5000]
    size = (shards / "x-002.tar").stat().st_size
    with pytest.raises(InputError, match=rf"x-002\.tar: the connection ended after 5000 of {size} bytes; try again"):
        load(url)
    server.cuts.clear()
    server.bytes_sent = 0
    missing = size - (5000 if versions else 0)  # without a version, the half may be of another file
    missing += sum(
        (shards / name).stat().st_size
        for name in ("x-000.tar", "x-001.tar", "classes.json")
        if not any(file.read_bytes() == (shards / name).read_bytes() for file in (cache / "files").iterdir())
    )
    assert facts(url) == facts(shards / "x-{000..002}.tar")
    assert server.bytes_sent == missing


def test_after_a_kill_a_fetch_goes_on(server, shards, cache):
    big = os.urandom(3_000_000)
    (shards / "big.npz").write_bytes(big)
    code = "import os, sys; from vqgen.data.sources import remote; remote.Web.chunk = 1000\n"
    code += "read = remote._read\ncount = 0\n"
    code += (
        "def dies(*args):\n global count; count += 1\n if count > 1000: os.kill(os.getpid(), 9)\n return read(*args)\n"
    )
    code += "remote._read = dies; remote.local_copy(sys.argv[1])"
    url = f"{server.url}/big.npz"
    ended = subprocess.run([sys.executable, "-c", code, url], cwd=ROOT, check=False)
    assert ended.returncode == -9
    part = next((cache / "files").iterdir())
    assert part.name.endswith(".part")
    done = part.stat().st_size
    assert 0 < done < 3_000_000
    assert Path(local_copy(url)[0]).read_bytes() == big
    assert server.starts == [0, done]


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("no.tar", 200, r"no\.tar: there is no such file \(404\); check the address$"),
        ("x-{000..004}.tar", 200, r"x-00[34]\.tar: there is no such file \(404\)"),
        ("x-001.tar", 403, r"x-001\.tar needs permission \(403\); log in"),
        ("x-001.tar", 401, r"x-001\.tar needs permission \(401\); log in"),
        ("x-001.tar", 400, r"x-001\.tar: the server refuses \(400\)"),
        (
            "x-001.tar",
            503,
            r"x-001\.tar cannot be reached \(Service Unavailable \(503\)\); check the address and the network$",
        ),
        ("x-*.tar", 200, r"a web server does not list its files; name them, as in x-\{000\.\.009\}\.tar"),
        ("", 200, "a web server does not list its files"),
        ("page.html", 200, r"page\.html is a web page; give the address of the file itself"),
        ("film.mp4", 200, "a file of an unknown type; give a folder"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line(server, shards, name, status, message):
    (shards / "page.html").write_text("<html>")
    (shards / "film.mp4").touch()
    server.answers["/x-001.tar"] = status
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        load(f"{server.url}/{name}")
    assert str(error.value).startswith(f"source={server.url}/{name}: ")
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 5


def test_other_addresses_that_cannot_be_used_are_one_line(monkeypatch):
    for url, message in {
        "http://127.0.0.1:9/x.tar": r"cannot be reached \(Connection refused\)",
        "http://no-such-host.invalid/x.tar": r"cannot be reached \(.*\); check the address and the network",
        "http://127.0.0.1:port/x.tar": r"cannot be reached \(",
        "gopher://host/x.tar": r"gopher:// is no known kind of address; use https://, s3:// or hf://",
        "memory://nowhere/x.tar": r"/nowhere/x\.tar: there is no such file; check the address",
        "memory://nowhere/x-*.tar": r"there is no such file; check the address",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            load(url)
        assert str(error.value).startswith(f"source={url}: ")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"s3:// needs a package that is not installed; pip install 'vqgen\[remote\]'"):
        load("s3://bucket/x.tar")


def test_a_full_disk_is_said_before_and_while_fetching(server, monkeypatch):
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(InputError, match=r"MiB to fetch, but .*remote has room for 0\.0 MiB; make room"):
            load(f"{server.url}/x-000.tar")
    assert not any(request.startswith("GET") for request in server.counts)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "rename", Mock(side_effect=full))
    with pytest.raises(InputError, match=r"remote cannot be written \(No space left on device\); make room, or name"):
        load(f"{server.url}/x-000.tar")


def test_every_file_system_of_fsspec(shards, tmp_path):
    memory = fsspec.filesystem("memory")
    for file in shards.iterdir():
        memory.pipe(f"/bucket/set/{file.name}", file.read_bytes())
        memory.pipe(f"/bucket/more/part{file.name[-5]}/{file.name}", file.read_bytes())
    memory.pipe("/bucket/set/.hidden.tar", b"")
    for pattern in ("x-*.tar", "x-{000..002}.tar", "x-00[012].tar", "x-{00?,9*}.tar"):
        if pattern != "x-{00?,9*}.tar":
            assert facts(f"memory://bucket/set/{pattern}") == facts(shards / pattern)
    with pytest.raises(InputError, match="there is no such file"):
        load("memory://bucket/set/x-{00?,9*}.tar")
    assert facts("memory://bucket/set/x-000.tar") == facts(shards / "x-000.tar")
    assert len(facts("memory://bucket/more/*/x-*.tar")[0][0]) > 0
    assert facts(f"file://{shards}/x-000.tar") == facts(shards / "x-000.tar")  # in place

    images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(4))
    memory.pipe("/bucket/a.npz", (tmp_path / "a.npz").read_bytes())
    assert facts("memory://bucket/a.npz") == facts(tmp_path / "a.npz")
    for k in range(6):
        for root in (tmp_path / "photos", None):
            name = f"{'cat' if k % 2 else 'dog'}/{k}.png"
            if root is None:
                memory.pipe(f"/bucket/photos/{name}", png(k))
            else:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(png(k))
    assert facts("memory://bucket/photos") == facts(tmp_path / "photos")
    assert facts("memory://bucket/photos/") == facts(tmp_path / "photos")


def test_a_name_that_leads_out_of_the_cache_is_refused(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/evil/x.tar", b"0")
    glob = type(memory).glob
    monkeypatch.setattr(
        type(memory), "glob", lambda *a, **k: {f"/evil/../..{key}": value for key, value in glob(*a, **k).items()}
    )
    with pytest.raises(InputError, match="its name leads out of the folder"):
        load("memory://evil/*.tar")


def test_one_process_of_a_machine_fetches(server, tmp_path, shards):
    url = f"{server.url}/x-{{000..002}}.tar"
    expected = json.loads(json.dumps(facts(shards / "x-{000..002}.tar")))
    assert in_two(tmp_path, lambda rank: facts(url)) == [expected, expected]
    assert all(server.counts[f"GET /x-00{k}.tar"] == 1 for k in range(3))
    assert all(server.counts[f"HEAD /x-00{k}.tar"] == 1 for k in range(3))
    (shards / "x-001.tar").unlink()
    shutil.rmtree(tmp_path / "cache")
    first, second = in_two(tmp_path, lambda rank: facts(url))
    assert first == second
    assert "x-001.tar: there is no such file (404)" in first


def test_two_runs_that_start_together_fetch_once(server):
    copies: list = []
    url = f"{server.url}/x-{{000..002}}.tar"
    threads = [threading.Thread(target=lambda: copies.append(local_copy(url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copies) == 4
    assert all(copy == copies[0] for copy in copies)
    assert all(server.counts[f"GET /x-00{k}.tar"] == 1 for k in range(3))


def test_an_address_that_is_signed_for_get_alone_and_one_with_a_password(server, monkeypatch):
    head = remote.Web._request

    def request(self, url, method, **headers):
        if method == "HEAD":
            server.answers["/x-000.tar"] = 403
        try:
            return head(self, url, method, **headers)
        finally:
            server.answers.clear()

    monkeypatch.setattr(remote.Web, "_request", request)
    assert Path(local_copy(f"{server.url}/x-000.tar?signature=1%2F")[0]).name == "x-000.tar"
    url = server.url.replace("//", "//me:p%40ss@")
    assert Path(local_copy(f"{url}/x-001.tar")[0]).name == "x-001.tar"
    assert server.logins["/x-001.tar"] == "Basic bWU6cEBzcw=="


def test_a_password_goes_to_no_other_server(server, shards):
    with serving(shards) as other:
        server.redirects = {"/x.tar": f"{other.url}/x-000.tar", "/y.tar": "/x-001.tar"}
        for name in ("x", "y"):
            assert Path(local_copy(f"{server.url}/{name}.tar".replace("//", "//me:p%40ss@", 1))[0]).is_file()
        assert other.logins["/x-000.tar"] is None
    assert server.logins["/x-001.tar"] == "Basic bWU6cEBzcw=="


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub's interface that reading a data set's files needs."""

    status = 200
    files: ClassVar = {"data/x-000.tar": b"", "data/x-001.tar": b""}

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        known = [{"type": "file", "path": name, "size": len(file), "oid": name} for name, file in self.files.items()]
        if path == "/api/datasets/org/name":
            content = json.dumps({"id": "org/name"}).encode()
        elif path.startswith("/api/datasets/org/name/tree/main"):
            root = [{"type": "directory", "path": "data", "oid": "d"}]
            content = json.dumps(known if path.endswith("data") else root).encode()
        else:
            content = self.files[path.removeprefix("/datasets/org/name/resolve/main/")]
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def test_the_files_of_a_data_set_of_the_hub_and_one_behind_a_login(shards, monkeypatch):
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint, "skip_instance_cache": True})
    monkeypatch.setattr(Hub, "files", {f"data/{file.name}": file.read_bytes() for file in sorted(shards.glob("*.tar"))})
    local, _ = local_copy("hf://datasets/org/name/data/x-*.tar")
    assert [Path(file).read_bytes() for file in sorted(glob.glob(local))] == [*Hub.files.values()]
    for status in (401, 403):
        monkeypatch.setattr(Hub, "status", status)
        with pytest.raises(InputError, match=rf"needs permission \({status}\); .* log in with `hf auth login`$"):
            load("hf://datasets/org/name/data/x-00[01].tar")
    hub.shutdown()
    hub.server_close()


def test_stage_2_and_the_evaluations_find_what_stage_1_was_trained_on(server, tmp_path, program, monkeypatch, caplog):
    url = f"{server.url}/x-{{000..002}}.tar"
    few = ["train.max_steps=1", "train.batch_size=4", "data.image_size=8", "tracking.wandb=disabled"]
    small = ["model.widths=[8]", "model.patch_size=2", "model.quantizer.codebook_size=4"]
    code, _, errors = program("stage1/train.py", f"data.source={url}", f"run_dir={tmp_path}/1", *small, *few)
    assert code == 0, errors
    assert f"fetching {url}" in caplog.text
    small = ["model.hidden_size=8", "model.num_hidden_layers=1", "model.num_attention_heads=1"]
    code, said, errors = program("stage2/train.py", f"stage1={tmp_path}/1", f"run_dir={tmp_path}/2", *small, *few)
    assert code == 0, errors
    assert f"source {url}" in said
    monkeypatch.chdir(tmp_path)
    train, _, own = run_images(tmp_path / "2", {}, 1)
    assert own
    assert train.fingerprint == load(url)[0].fingerprint
    assert run_data(tmp_path / "2", {"source": url}, 1).own
    assert not run_data(tmp_path / "2", {"source": f"{server.url}/x-000.tar"}, 1).own
    assert server.counts["GET /x-001.tar"] == 1


def test_only_images_are_taken_from_an_address(program):
    code, _, errors = program("stage1/train.py", "run_dir=s3://bucket/run")
    assert (code, errors) == (2, "error: run_dir=s3://bucket/run: is an address, but must be here; give a local path\n")
    code, _, errors = program("stage1/train.py", "data.source=http://127.0.0.1:9/x.tar", "run_dir=/nowhere")
    assert code == 2
    assert errors.startswith("error: data.source=http://127.0.0.1:9/x.tar: ")
    assert errors.count("\n") == 1
    sources = ["images=http://127.0.0.1:9/x.npz", "reference=digits", "data.image_size=8"]
    assert program("stage2/evaluate.py", *sources)[2].startswith("error: images=http://127.0.0.1:9/x.npz: ")


def test_which_sources_are_addresses():
    for source in ("https://a/b.tar", "s3://a", "hf://datasets/a/b", "HTTP://a/b", "memory://x"):
        assert is_remote(source)
    for source in ("digits", "C:\\x", "/a/b", "a://b/c"[1:], "./x://y", "~/x", "hf:name"):
        assert not is_remote(source)
