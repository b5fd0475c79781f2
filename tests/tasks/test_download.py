"""Downloads from a local HTTP server."""

import hashlib
import http.server
import threading

import pytest

from maml_jax.tasks import download
from maml_jax.tasks.cache import DataError

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def address():
    served = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.append(self.path)
            body = {"/intact.zip": CONTENT, "/short.zip": CONTENT[:-1], "/long.zip": CONTENT * 2}.get(self.path)
            body = b"\1" + CONTENT[1:] if self.path == "/changed.zip" else body
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", served
        server.shutdown()
        thread.join()


def archive(url):
    return download.Archive(url, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def test_an_intact_archive_is_fetched_once(address, tmp_path):
    url, served = address
    target = tmp_path / "new" / "intact.zip"
    for _ in range(2):
        download.fetch(archive(f"{url}/intact.zip"), target)
    assert target.read_bytes() == CONTENT and served == ["/intact.zip"]
    target.write_bytes(CONTENT[:100])
    download.fetch(archive(f"{url}/intact.zip"), target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["short", "long", "changed", "missing"])
def test_a_wrong_archive_raises_and_is_deleted(address, tmp_path, name):
    url, _ = address
    with pytest.raises(DataError, match=f"{url}/{name}.zip"):
        download.fetch(archive(f"{url}/{name}.zip"), tmp_path / "target.zip")
    assert not list(tmp_path.iterdir())


def test_the_error_names_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"Cannot write .*file/target.zip: .*or give another folder"):
        download.fetch(archive("http://127.0.0.1:1/target.zip"), tmp_path / "file" / "target.zip")


def test_the_official_archives_have_sizes_and_hashes():
    assert [archive.size for archive in download.OMNIGLOT] == [9_464_212, 6_462_886]
    assert all(len(archive.sha256) == 64 for archive in download.OMNIGLOT)
