"""Downloads against a local server: whole or not at all, resumed from any byte, and never a
wrong file."""
import hashlib
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from erc_moe.conversations import DataError
from erc_moe.corpora.download import FILES, RemoteFile, download_corpus, fetch

CONTENT = np.random.default_rng(0).bytes(300_000)
FILE = RemoteFile("some/folder/rows.bin", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


class Server:
    """Serves `content` at any path; `limit` bytes an answer, `ranges` understood or not,
    `status` for failures."""
    def __init__(self):
        self.content, self.limit, self.ranges, self.status, self.asked = (
            {f"/{FILE.path}": CONTENT}, None, True, None, [])
        outer, self.slow = self, False

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_): pass

            def do_GET(self):
                outer.asked.append((self.path, self.headers["Range"]))
                if outer.status: return self.send_error(outer.status)
                if self.path not in outer.content: return self.send_error(404)
                content = outer.content[self.path]
                start = (
                    int(self.headers["Range"][6:-1])
                    if outer.ranges and self.headers["Range"]
                    else 0)
                if start >= len(content): return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                if outer.slow:
                    try:
                        for i in range(start, len(content)):
                            self.wfile.write(content[i:i + 1]); time.sleep(.1)
                    except OSError: pass
                    return
                self.wfile.write(
                    content[start:] if outer.limit is None else content[start : start + outer.limit]
                )

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_file_arrives_whole(server, tmp_path):
    path = fetch(FILE, tmp_path/"new"/"folder", server.address)
    assert path == tmp_path/"new"/"folder"/"rows.bin" and path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["rows.bin"]


def test_many_breaks_are_carried_over(server, tmp_path):
    server.limit, tries = 70_000, 0
    while True:
        tries += 1
        try: path = fetch(FILE, tmp_path, server.address)
        except DataError as e:
            assert (
                f"broke off after {70_000 * tries} of 300000 bytes" in str(e)
                and not (tmp_path / "rows.bin").exists())
        else: break
    assert tries == 5 and path.read_bytes() == CONTENT
    assert [r for _, r in server.asked] == [
        None, "bytes=70000-", "bytes=140000-", "bytes=210000-", "bytes=280000-"]


@pytest.mark.parametrize("have", [1, 150_000, 299_999, 300_000])
def test_any_part_is_carried_on(server, tmp_path, have):
    (tmp_path/"rows.bin.part").write_bytes(CONTENT[:have])
    assert fetch(FILE, tmp_path, server.address).read_bytes() == CONTENT
    assert [r for _, r in server.asked] == ([f"bytes={have}-"] if have < FILE.size else [])


def test_a_spoilt_part_is_thrown_away_and_the_next_try_is_clean(server, tmp_path):
    (tmp_path/"rows.bin.part").write_bytes(b"?"*1000)
    with pytest.raises(DataError, match="not the file that was published"):
        fetch(FILE, tmp_path, server.address)
    assert list(tmp_path.iterdir()) == []
    assert fetch(FILE, tmp_path, server.address).read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_thrown_away(server, tmp_path):
    (tmp_path/"rows.bin.part").write_bytes(CONTENT + b"more")
    with pytest.raises(DataError, match="not the file that was published"):
        fetch(FILE, tmp_path, server.address)
    assert list(tmp_path.iterdir()) == []


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges = False
    (tmp_path/"rows.bin.part").write_bytes(b"?"*1000)
    assert fetch(FILE, tmp_path, server.address).read_bytes() == CONTENT


def test_a_changed_file_on_the_server_is_refused(server, tmp_path):
    server.content[f"/{FILE.path}"] = CONTENT[:-1] + b"?"
    with pytest.raises(DataError, match="SHA-256"): fetch(FILE, tmp_path, server.address)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(server, tmp_path):
    fetch(FILE, tmp_path, server.address)
    server.asked.clear()
    fetch(FILE, tmp_path, server.address)
    assert server.asked == []
    (tmp_path/"rows.bin").write_text("mine")
    with pytest.raises(DataError, match="Move it away"): fetch(FILE, tmp_path, server.address)
    assert (tmp_path/"rows.bin").read_text() == "mine"


@pytest.mark.parametrize(
    "status, words", [(404, "answered 404"), (403, "answered 403"), (500, "answered 500")]
)
def test_refusals_are_told(server, tmp_path, status, words):
    server.status = status
    with pytest.raises(DataError, match=words): fetch(FILE, tmp_path, server.address)
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_told_and_keeps_what_arrived(server, tmp_path):
    server.http.shutdown()
    server.http.server_close()
    (tmp_path/"rows.bin.part").write_bytes(CONTENT[:10])
    with pytest.raises(DataError, match="Check the network"): fetch(FILE, tmp_path, server.address)
    assert (tmp_path/"rows.bin.part").read_bytes() == CONTENT[:10]


@pytest.mark.skipif(
    not os.environ.get("ERC_MOE_DATA"),
    reason="ERC_MOE_DATA is unset: the real corpora are not at hand",
)
@pytest.mark.parametrize("name", FILES)
def test_the_checksums_are_those_of_the_official_files(server, tmp_path, name):
    "The whole way: official files on a server, downloaded, and read as the corpus."
    from erc_moe.corpora import load_corpus
    for file in FILES[name]:
        server.content[f"/{file.path}"] = (
            Path(os.environ["ERC_MOE_DATA"]) / name / Path(file.path).name
        ).read_bytes()
    paths = download_corpus(name, tmp_path/name, server.address)
    assert [p.stat().st_size for p in paths] == [f.size for f in FILES[name]]
    assert load_corpus(name, tmp_path).split_hash == load_corpus(name).split_hash


def test_a_licensed_corpus_is_not_downloaded(tmp_path):
    with pytest.raises(DataError, match="sails.usc.edu"): download_corpus("iemocap", tmp_path)


def test_a_download_that_crawls_is_given_up_and_keeps_what_came(server, tmp_path):
    server.slow, began = True, time.monotonic()
    with pytest.raises(DataError, match="comes too slowly.*carries on from what arrived"):
        fetch(FILE, tmp_path, server.address, deadline=1)
    assert time.monotonic() - began < 10
    came = (tmp_path/"rows.bin.part").read_bytes()
    assert 0 < len(came) < 30 and CONTENT.startswith(came)
    server.slow = False
    assert fetch(FILE, tmp_path, server.address).read_bytes() == CONTENT


def test_two_who_download_at_once_get_one_file(server, tmp_path):
    threads = [
        threading.Thread(target=fetch, args=(FILE, tmp_path, server.address)) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert (tmp_path/"rows.bin").read_bytes() == CONTENT and len(server.asked) == 1
