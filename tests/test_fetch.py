# SPDX-License-Identifier: Apache-2.0
"""Weights: where they are kept, resumed downloads, hashes and what is said when something fails."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from semisam import fetch
from semisam.fetch import FetchError, Weights, download

CONTENT = bytes(range(256)) * 5000
HASH = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`; the next answers end after the bytes in `cuts`. `asked` has (path, Range) of each."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/model.pt": CONTENT}
        self.cuts: list[int] = []
        self.asked: list[tuple[str, str | None]] = []
        self.ranges, self.etag, self.status = True, '"one"', 200
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        s = self.server
        s.asked.append((self.path, self.headers.get("Range")))
        content = s.files.get(self.path.partition("?")[0])
        if s.status != 200 or content is None:
            self.send_error(404 if content is None else s.status)
            return
        wanted = self.headers.get("Range") if s.ranges else None
        if self.headers.get("If-Range", s.etag) != s.etag:
            wanted = None
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        if start >= len(content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if s.etag:
            self.send_header("ETag", s.etag)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: s.cuts.pop(0)] if s.cuts else body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.setenv("SEMISAM_HOME", str(tmp_path / "home"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    monkeypatch.setattr(fetch.util, "find_spec", lambda name: None)


# ---- one file -----------------------------------------------------------------------------------


def test_a_file_arrives_whole_under_its_name(server, tmp_path):
    said = []
    path = download(f"{server.url}/model.pt", tmp_path / "new" / "model.pt", HASH, say=said.append)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"]
    assert server.asked == [("/model.pt", None)]
    assert said == [f"{path}: sha256 {HASH} (as it should be)"]


def test_a_cut_connection_is_continued(server, tmp_path):
    server.cuts = [300_000, 500_000, 0]
    path = download(f"{server.url}/model.pt", tmp_path / "model.pt", HASH, pause=0)
    assert path.read_bytes() == CONTENT
    assert [r for _, r in server.asked] == [None, "bytes=300000-", "bytes=800000-", "bytes=800000-"]


def test_a_later_call_continues_what_is_there(server, tmp_path):
    server.cuts = [700_000] + [0] * 9
    with pytest.raises(
        FetchError, match=r"ended after 700000 of 1280000 bytes \(5 times\); 700000 bytes are"
    ):
        download(f"{server.url}/model.pt", tmp_path / "model.pt", pause=0)
    assert not (tmp_path / "model.pt").exists()
    assert (tmp_path / "model.pt.part").stat().st_size == 700_000
    server.cuts, server.asked = [], []
    assert download(f"{server.url}/model.pt", tmp_path / "model.pt", HASH).read_bytes() == CONTENT
    assert server.asked == [("/model.pt", "bytes=700000-")]
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_without_an_etag_only_a_hash_makes_continuing_safe(server, tmp_path):
    server.etag = ""
    for expected, wanted in ((HASH, "bytes=700000-"), ("", None)):
        server.cuts, server.asked = [700_000], []
        path = download(f"{server.url}/model.pt", tmp_path / f"m{len(expected)}", expected, pause=0)
        assert path.read_bytes() == CONTENT
        assert [r for _, r in server.asked] == [None, wanted]


@pytest.mark.parametrize("why", ["another file now", "no ranges"])
def test_what_cannot_be_continued_begins_again(server, tmp_path, why):
    server.cuts = [700_000] + [0] * 9
    with pytest.raises(FetchError):
        download(f"{server.url}/model.pt", tmp_path / "model.pt", pause=0)
    server.cuts = []
    if why == "no ranges":
        server.ranges = False
        wanted = CONTENT
    else:
        server.etag, wanted = '"two"', CONTENT[::-1]
        server.files["/model.pt"] = wanted
    assert download(f"{server.url}/model.pt", tmp_path / "model.pt").read_bytes() == wanted


def test_all_bytes_were_there_already(server, tmp_path):
    (tmp_path / "model.pt.part").write_bytes(CONTENT)
    assert download(f"{server.url}/model.pt", tmp_path / "model.pt", HASH).read_bytes() == CONTENT
    (tmp_path / "other.pt.part").write_bytes(CONTENT + b"more")
    assert download(f"{server.url}/model.pt", tmp_path / "other.pt", HASH, pause=0).read_bytes() == CONTENT


def test_another_hash_removes_the_file(server, tmp_path):
    other = "0" * 64
    with pytest.raises(
        FetchError, match=rf"model.pt: expected the sha256 {other}, got {HASH}: .* was removed"
    ):
        download(f"{server.url}/model.pt", tmp_path / "model.pt", other)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there(server, tmp_path):
    with pytest.raises(FetchError, match=r"/none.pt: expected the file, got 404 .*: there is no such file"):
        download(f"{server.url}/none.pt", tmp_path / "none.pt")
    server.status = 403
    with pytest.raises(FetchError, match=r"got 403 .*: accept the licence"):
        download(f"{server.url}/model.pt", tmp_path / "model.pt")
    server.status = 500
    with pytest.raises(FetchError, match=r"got 500 .*: try again later"):
        download(f"{server.url}/model.pt", tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_no_network(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        FetchError, match=r"expected an answer, got none \(.*refused.*\): without a network, copy"
    ):
        download(f"http://127.0.0.1:{port}/model.pt", tmp_path / "model.pt")
    with pytest.raises(FetchError, match="expected an answer, got none"):
        download("nothing://here/model.pt", tmp_path / "model.pt")
    with pytest.raises(FetchError, match="expected an answer, got none"):
        download("no address", tmp_path / "model.pt")


# ---- models -------------------------------------------------------------------------------------


def test_home(monkeypatch, tmp_path):
    assert fetch.home() == tmp_path / "home"
    monkeypatch.delenv("SEMISAM_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if sys.platform == "linux":
        assert fetch.home() == tmp_path / "cache" / "semisam"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert str(fetch.home()).endswith("Library/Caches/semisam")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert fetch.home() == tmp_path / "local" / "semisam"


def test_a_model_of_several_files(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    model = Weights(hub="some/one", files=("v1/plan s.json", "v1/fold_0/w.pth"), load="v1", sha256={})
    server.files = {
        "/some/one/resolve/main/v1/plan%20s.json": b"{}",
        "/some/one/resolve/main/v1/fold_0/w.pth": CONTENT,
    }
    assert fetch.find("mine", model) is None
    said = []
    place = fetch.fetch("mine", model, say=said.append)
    assert place == tmp_path / "home" / "mine" / "v1" == fetch.find("mine", model)
    assert (place / "fold_0" / "w.pth").read_bytes() == CONTENT
    assert said[1] == f"{place / 'fold_0/w.pth'}: sha256 {HASH} (not checked: no hash is known for this file)"
    asked = len(server.asked)
    assert fetch.fetch("mine", model) == place  # what is there is not fetched again
    assert len(server.asked) == asked
    (place / "plan s.json").unlink()
    assert fetch.find("mine", model) is None


def test_known_hashes_are_checked_also_of_what_is_there(server):
    model = Weights(url=server.url, files=("model.pt",), sha256={"model.pt": HASH.upper()})
    place = fetch.fetch("mine", model)
    place.write_bytes(b"changed")
    with pytest.raises(FetchError, match=f"expected the sha256 {HASH}, got"):
        fetch.fetch("mine", model)
    assert fetch.find("mine", model) is None


def test_a_file_by_its_address(server, tmp_path):
    place = fetch.fetch("mine", Weights(), url=f"{server.url}/model.pt?download=true", checksum=HASH)
    assert place == tmp_path / "home" / "mine" / "model.pt" == fetch.find("mine", Weights())
    with pytest.raises(FetchError, match="expected an address that ends in a file's name"):
        fetch.fetch("mine", Weights(), url=server.url)


def test_no_source():
    with pytest.raises(
        FetchError, match=r"mine: no address is known .* \(see a page\); give --url, or put the"
    ):
        fetch.fetch("mine", Weights(page="a page"))
    with pytest.raises(FetchError, match=r"which file of a page is wanted is not known: give --file NAME"):
        fetch.fetch("mine", Weights(hub="some/one", page="a page"))
    with pytest.raises(FetchError, match=r"all files of some/one are wanted, which needs huggingface_hub"):
        fetch.fetch("mine", Weights(hub="some/one", snapshot=True))


def test_a_folder_with_parts_alone_is_not_found(tmp_path):
    folder = tmp_path / "home" / "mine"
    folder.mkdir(parents=True)
    (folder / "model.pt.part").write_bytes(b"1")
    assert fetch.find("mine", Weights(hub="some/one", snapshot=True)) is None
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1")
    assert fetch.find("mine", Weights(hub="some/one", snapshot=True)) == folder


def test_huggingface_hub_where_it_is(monkeypatch, tmp_path):
    calls = []

    def hf_hub_download(repo_id, filename, local_dir):
        calls.append((repo_id, filename))
        if filename == "gone":
            raise RuntimeError("Entry Not Found\nmore")
        place = os.path.join(local_dir, filename)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as file:
            file.write(CONTENT)
        return place

    def snapshot_download(repo_id, local_dir, allow_patterns):
        assert "*.safetensors" in allow_patterns
        calls.append((repo_id, None))
        hf_hub_download(repo_id, "a/config.json", local_dir)

    hub = types.SimpleNamespace(
        hf_hub_download=hf_hub_download, snapshot_download=snapshot_download, __version__="1"
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr(fetch.util, "find_spec", lambda name: name == "huggingface_hub" or None)
    one = Weights(hub="some/one", files=("v1/model.pt",), sha256={"v1/model.pt": HASH})
    said = []
    place = fetch.fetch("mine", one, say=said.append)
    assert place == tmp_path / "home/mine/v1/model.pt"
    assert "as it should be" in said[-1]
    fetch.fetch("mine", one)
    assert calls == [("some/one", "v1/model.pt")]
    with pytest.raises(FetchError, match="expected the sha256"):
        fetch.fetch("mine", one, checksum="1" * 64)
    assert not place.exists()
    with pytest.raises(FetchError, match=r"could not get gone of some/one: Entry Not Found$"):
        fetch.fetch("mine", one, file="gone")
    every = Weights(hub="some/all", snapshot=True)
    assert fetch.fetch("all", every) == tmp_path / "home/all" == fetch.find("all", every)
    assert (tmp_path / "home/all/a/config.json").is_file()
    assert not (tmp_path / "home/all.part").exists()
    asked = len(calls)
    assert fetch.fetch("all", every) == tmp_path / "home/all"
    assert len(calls) == asked
