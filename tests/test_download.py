from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lirpa_fastwarmup.experiments.data import download as module
from lirpa_fastwarmup.experiments.data.download import CorruptFileError, Source, download
from lirpa_fastwarmup.storage import locked

CONTENT = bytes(range(256)) * 20_000  # 5 MB, in several chunks.
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT, and fails as its attributes and the path say."""

    broken_responses = 0
    stalled = threading.Event()
    requests: list[str] = []  # noqa: RUF012 (replaced by each test's server)

    def log_message(self, *_): ...

    def do_GET(self):
        self.requests.append(self.path)
        if self.path == "/missing":
            self.send_error(404, "no such file")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/stalled":
            self.stalled.wait(60)
        elif self.path == "/corrupt":
            self.wfile.write(CONTENT[:-1] + b"?")
        elif type(self).broken_responses:
            type(self).broken_responses -= 1
            self.wfile.write(CONTENT[: len(CONTENT) // 2])  # And the connection is closed.
        else:
            self.wfile.write(CONTENT)


@pytest.fixture
def server():
    handler = type("Server", (Server,), {"requests": [], "stalled": threading.Event()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield handler, f"http://127.0.0.1:{http.server_address[1]}"
        handler.stalled.set()
        http.shutdown()
        thread.join()


def fetch(sources, folder):
    download("Digits", sources, folder)


def source(address, path="file", name="file.bin"):
    return Source(name, f"{address}/{path}", CHECKSUM)


def test_a_file_is_complete_and_not_downloaded_twice(server, tmp_path):
    handler, address = server
    folder = tmp_path / "deep" / "er"
    for _ in range(2):
        fetch([source(address)], folder)
        assert (folder / "file.bin").read_bytes() == CONTENT
        assert [path.name for path in folder.iterdir()] == ["file.bin"]
    assert handler.requests == ["/file"]
    fetch([source(address), source(address, "other", "other.bin")], folder)
    assert handler.requests == ["/file", "/other"]


@pytest.mark.parametrize("path", ["corrupt", "broken"])
def test_a_wrong_checksum_is_refused_and_the_file_removed(path, server, tmp_path):
    handler, address = server
    handler.broken_responses = 1
    with pytest.raises(
        CorruptFileError, match=rf"/{path} was downloaded with checksum sha256:\w+ instead of {CHECKSUM}"
    ):
        fetch([source(address, path)], tmp_path)
    assert not list(tmp_path.iterdir())
    handler.broken_responses = 0
    fetch([source(address)], tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_stalled_connection_ends(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TIMEOUT", 0.1)
    with pytest.raises(OSError, match=r"Digits could not be downloaded .*timed out"):
        fetch([source(server[1], "stalled")], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_requested_once(server, tmp_path):
    handler, address = server
    with pytest.raises(OSError, match=r"could not be downloaded \(HTTP Error 404.*/missing"):
        fetch([source(address, "missing")], tmp_path)
    assert handler.requests == ["/missing"]
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_process_are_removed(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"incomplete")
    fetch([source(server[1])], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_two_programs_download_a_file_once(server, tmp_path):
    handler, address = server
    threads = [threading.Thread(target=fetch, args=([source(address)], tmp_path)) for _ in range(2)]
    with locked(tmp_path):  # Each opens the lock file itself, as separate processes do.
        for thread in threads:
            thread.start()
        threads[0].join(0.2)
        assert handler.requests == []
    for thread in threads:
        thread.join()
    assert handler.requests == ["/file"]
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_without_a_network_the_error_says_what_to_do(tmp_path):
    # No server listens at port 9 of this host.
    sources = [Source(name, f"http://127.0.0.1:9/{name}", CHECKSUM) for name in ("one.gz", "two.gz")]
    with pytest.raises(OSError, match="Digits could not be downloaded") as caught:
        fetch(sources, tmp_path / "cache")
    for text in ("http://127.0.0.1:9/one.gz", "http://127.0.0.1:9/two.gz", str(tmp_path / "cache"), "--data-dir"):
        assert text in str(caught.value)
