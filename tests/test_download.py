from __future__ import annotations

import hashlib
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lirpa_fastwarmup.experiments.data.download import CorruptFileError, Source, download
from lirpa_fastwarmup.experiments.data.files import fetched

CONTENT = bytes(range(256)) * 20_000  # 5 MB, in several chunks.
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT at every path, and what the path asks for besides."""

    breaks_left = 0
    ranges: list[str | None] = []  # noqa: RUF012 (set anew by each test's server)

    def log_message(self, *_): ...

    def do_GET(self):
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        if self.path == "/missing":
            self.send_error(404, "no such file")
            return
        content = CONTENT if self.path != "/corrupt" else CONTENT[:-1] + b"?"
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.path != "/no-ranges" else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if type(self).breaks_left:
            type(self).breaks_left -= 1
            body = body[: len(body) // 2]  # And the connection is closed.
        self.wfile.write(body)


@pytest.fixture
def server():
    handler = type("Server", (Server,), {"ranges": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield handler, f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


fetch = partial(download, pause=0.0)


def source(address, path="file", checksum=CHECKSUM):
    return Source("file.bin", f"{address}/{path}", checksum)


def test_a_file_arrives_whole_and_is_not_fetched_twice(server, tmp_path):
    handler, address = server
    path = fetch(source(address), tmp_path / "deep" / "er")
    assert path.read_bytes() == CONTENT
    assert [one.name for one in path.parent.iterdir()] == ["file.bin"]
    assert fetch(source(address), path.parent) == path
    assert handler.ranges == [None]


def test_a_broken_line_is_taken_up_where_it_broke(server, tmp_path):
    handler, address = server
    handler.breaks_left = 2
    assert fetch(source(address), tmp_path).read_bytes() == CONTENT
    half, three_quarters = len(CONTENT) // 2, len(CONTENT) * 3 // 4
    assert handler.ranges == [None, f"bytes={half}-", f"bytes={three_quarters}-"]


def test_what_has_arrived_stays_for_the_next_call(server, tmp_path):
    handler, address = server
    handler.breaks_left = 2
    with pytest.raises(OSError, match=r"could not be downloaded: .*ended after \d+ of \d+ bytes"):
        fetch(source(address), tmp_path, attempts=2)
    assert [one.name for one in tmp_path.iterdir()] == ["file.bin.part"]
    assert fetch(source(address), tmp_path).read_bytes() == CONTENT
    assert handler.ranges[-1] == f"bytes={len(CONTENT) * 3 // 4}-"


def test_a_server_without_ranges_sends_all_of_it_again(server, tmp_path):
    handler, address = server
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(source(address, "no-ranges"), tmp_path).read_bytes() == CONTENT
    assert handler.ranges == ["bytes=1000-"]


def test_leftovers_longer_than_the_file_are_thrown_away(server, tmp_path):
    _, address = server
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    assert fetch(source(address), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("leftover", [b"", b"x" * 1000])
def test_a_wrong_checksum_leaves_nothing_behind(leftover, server, tmp_path):
    _, address = server
    if leftover:
        (tmp_path / "file.bin.part").write_bytes(leftover)  # Of something else.
    with pytest.raises(CorruptFileError, match=rf"checksum sha256:\w+, and {CHECKSUM} was expected"):
        fetch(source(address, "file" if leftover else "corrupt"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_not_there_is_asked_for_once(server, tmp_path):
    handler, address = server
    with pytest.raises(OSError, match="could not be downloaded: HTTP Error 404"):
        fetch(source(address, "missing"), tmp_path)
    assert len(handler.ranges) == 1


def test_without_network_the_error_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    # Nothing listens at port 9 of this host.
    sources = [Source(name, f"http://127.0.0.1:9/{name}", CHECKSUM) for name in ("one.gz", "two.gz")]
    with pytest.raises(OSError, match="Digits could not be downloaded") as caught:
        fetched("Digits", sources, tmp_path / "cache")
    for text in ("http://127.0.0.1:9/one.gz", "http://127.0.0.1:9/two.gz", str(tmp_path / "cache"), "--data-dir"):
        assert text in str(caught.value)
