"""Downloads: whole or not there, resumed where they stopped, never glued together from two versions."""

import hashlib
import json
import socket
import threading
import time

import numpy as np
import pytest

from recbole_hatllm.data.sources import download
from recbole_hatllm.data.sources.download import DownloadError, fetch, record
from recbole_hatllm.errors import DataError
from tests.file_server import Remote, serving

CONTENT = b"\x1f\x8b" + np.random.default_rng(0).bytes(1_000_000)
OTHER = b"\x1f\x8b" + np.random.default_rng(1).bytes(1_100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.0))


@pytest.fixture
def remote():
    return Remote(CONTENT)


@pytest.fixture
def base(remote):
    with serving({"/a.gz": remote}) as address:
        yield address


def get(base, target, **keys):
    return fetch([f"{base}/a.gz"], target, show_progress=False, **keys)


def only_whole(target):
    """Nothing that is half-made lies beside the file."""
    names = {path.name for path in target.parent.iterdir()} - {f".{target.name}.lock"}
    return names == {target.name, target.name + ".json"}


def test_a_file_with_its_sidecar_and_then_no_request(base, remote, tmp_path):
    target = tmp_path / "deep" / "a.gz"
    assert get(base, target, size=len(CONTENT), sha256=SHA256) == target and target.read_bytes() == CONTENT
    note = json.loads((tmp_path / "deep" / "a.gz.json").read_text())
    assert note == record(target) and (note["size"], note["sha256"]) == (len(CONTENT), SHA256)
    assert note["url"] == f"{base}/a.gz" and note["date"].startswith("20")
    get(base, target)
    assert remote.asked == [""] and only_whole(target)


def test_a_cut_connection_goes_on_where_it_was(base, remote, tmp_path):
    remote.cuts = [300_000, 200_000]
    get(base, tmp_path / "a.gz", sha256=SHA256)
    assert (tmp_path / "a.gz").read_bytes() == CONTENT and only_whole(tmp_path / "a.gz")
    assert remote.asked == ["", "bytes=300000-", "bytes=500000-"] and remote.sent == len(CONTENT)


def test_cuts_that_bring_something_new_are_not_counted(base, remote, tmp_path):
    remote.cuts = [50_000] * 15
    get(base, tmp_path / "a.gz", sha256=SHA256)
    assert remote.sent == len(CONTENT)


def test_a_connection_that_brings_nothing_is_given_up(base, remote, tmp_path):
    remote.cuts = [1000] + [0] * 20
    with pytest.raises(DownloadError, match=r"a\.gz could not be downloaded: http.*1,000 of 1,000,002 bytes") as caught:
        get(base, tmp_path / "a.gz")
    assert not caught.value.offline and len(remote.asked) == 4 and not (tmp_path / "a.gz").exists()


def test_ctrl_c_keeps_what_has_arrived(base, remote, tmp_path, monkeypatch):
    target = tmp_path / "a.gz"
    arriving = download._arriving

    def interrupted(response):
        for number, block in enumerate(arriving(response)):
            if number == 2:
                raise KeyboardInterrupt
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(download, "_arriving", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get(base, target)
    have = (tmp_path / "a.gz.part").stat().st_size
    assert 0 < have < len(CONTENT) and not target.exists() and not record(target)
    get(base, target, sha256=SHA256)
    assert remote.asked[1] == f"bytes={have}-" and target.read_bytes() == CONTENT and only_whole(target)


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("content", [OTHER, OTHER[:200_000], CONTENT[:-1] + b"x"], ids=["longer", "shorter", "as long"])
def test_a_file_that_changed_meanwhile_starts_over(base, remote, tmp_path, if_range, content):
    remote.cuts, remote.if_range = [300_000, 0, 0, 0], if_range
    with pytest.raises(DownloadError):
        get(base, tmp_path / "a.gz")
    assert (tmp_path / "a.gz.part").stat().st_size == 300_000
    remote.content, remote.etag, remote.cuts = content, '"2"', []
    get(base, tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == content and only_whole(tmp_path / "a.gz")


def test_a_kill_while_starting_over_glues_nothing_together(base, remote, tmp_path, monkeypatch):
    remote.cuts = [300_000, 0, 0, 0]
    with pytest.raises(DownloadError):
        get(base, tmp_path / "a.gz")
    remote.content, remote.etag, remote.cuts = OTHER, '"2"', []

    def kill(*_):
        raise KeyboardInterrupt

    for step in ("_write_json", "_open"):
        with monkeypatch.context() as patch:
            patch.setattr(download, step, kill)
            with pytest.raises(KeyboardInterrupt):
                get(base, tmp_path / "a.gz")
    get(base, tmp_path / "a.gz")
    assert (tmp_path / "a.gz").read_bytes() == OTHER


@pytest.mark.parametrize("etag", ["", 'W/"1"'], ids=["none", "weak"])
def test_what_cannot_be_told_apart_is_not_resumed(base, remote, tmp_path, etag):
    remote.etag, remote.cuts = etag, [300_000]
    get(base, tmp_path / "a.gz", sha256=SHA256)
    assert remote.asked == ["", ""]


def test_a_server_without_ranges_sends_it_all_again(base, remote, tmp_path):
    remote.ranges, remote.cuts = False, [300_000]
    get(base, tmp_path / "a.gz", sha256=SHA256)
    assert remote.asked == ["", "bytes=300000-"] and remote.sent == 300_000 + len(CONTENT)


def test_a_part_that_was_whole_already_needs_no_request(base, remote, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(download.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(download, "_write_json", lambda file, note: file.write_text(json.dumps(note)))
        with pytest.raises(KeyboardInterrupt):
            get(base, tmp_path / "a.gz")
    assert not (tmp_path / "a.gz").exists()
    get(base, tmp_path / "a.gz", sha256=SHA256)
    assert remote.asked == [""] and only_whole(tmp_path / "a.gz")


@pytest.mark.parametrize("too_long", [1, 10_000])
def test_a_wrong_content_length_is_no_whole_file(base, remote, tmp_path, too_long):
    remote.too_long = too_long
    with pytest.raises(DownloadError, match="ends at byte 1,000,002"):
        get(base, tmp_path / "a.gz")
    assert not (tmp_path / "a.gz").exists()


def test_without_content_length_the_end_is_the_end(base, remote, tmp_path):
    remote.length = False
    assert get(base, tmp_path / "a.gz", sha256=SHA256).read_bytes() == CONTENT


def test_a_size_that_is_not_the_known_one(base, remote, tmp_path):
    with pytest.raises(DownloadError, match="1,000,002 bytes and not 12"):
        get(base, tmp_path / "a.gz", size=12)
    assert remote.sent <= len(CONTENT) and not (tmp_path / "a.gz").exists()


def test_mirrors_are_tried_in_order(tmp_path):
    files = {"/bad/a.gz": Remote(OTHER), "/page/a.gz": Remote(b"<html>log in</html>"), "/good/a.gz": Remote(CONTENT)}
    files["/busy/a.gz"] = Remote(CONTENT, status=503)
    with serving(files) as base:
        urls = [f"{base}/{place}/a.gz" for place in ("gone", "bad", "page", "busy", "good")]
        fetch(urls, tmp_path / "a.gz", sha256=SHA256, show_progress=False)
        assert (tmp_path / "a.gz").read_bytes() == CONTENT and record(tmp_path / "a.gz")["url"] == urls[-1]
        assert len(files["/busy/a.gz"].asked) == 3 and len(files["/bad/a.gz"].asked) == 1
        with pytest.raises(DownloadError) as caught:
            fetch(urls[:-1], tmp_path / "b.gz", sha256=SHA256, show_progress=False)
    said = str(caught.value)
    for word in (
        *urls[:-1],
        "HTTP 404",
        f"sha256 is {hashlib.sha256(OTHER).hexdigest()}",
        "something else",
        "HTTP 503",
    ):
        assert word in said
    assert "\n" not in said and not (tmp_path / "b.gz").exists() and not (tmp_path / "b.gz.part").exists()


def test_a_mirror_that_is_gone_costs_nothing_of_what_is_here(tmp_path):
    files = {"/two/a.gz": Remote(CONTENT, cuts=[300_000, 0, 0, 0])}
    with serving(files) as base:
        urls = [f"{base}/one/a.gz", f"{base}/two/a.gz"]
        with pytest.raises(DownloadError):
            fetch(urls, tmp_path / "a.gz", show_progress=False)
        fetch(urls, tmp_path / "a.gz", sha256=SHA256, show_progress=False)
    assert files["/two/a.gz"].asked[-1] == "bytes=300000-"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"),
        lambda file: file.write_bytes(b"PK"),
        lambda file: file.with_name("a.gz.json").unlink(),
    ],
    ids=["a byte", "length", "no sidecar"],
)
def test_a_file_that_changed_on_disk_is_fetched_again(base, remote, tmp_path, spoil, caplog):
    get(base, tmp_path / "a.gz")
    spoil(tmp_path / "a.gz")
    with caplog.at_level("INFO"):
        get(base, tmp_path / "a.gz")
    assert "not as it was downloaded" in caplog.text and (tmp_path / "a.gz").read_bytes() == CONTENT


def test_no_network_is_said_at_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    urls = [f"http://127.0.0.1:{port}/a.gz", f"http://127.0.0.1:{port}/b.gz", "http://no-such-host.invalid/a.gz"]
    began = time.monotonic()
    with pytest.raises(DownloadError, match=r"refused.*cannot be reached.*host name is not known") as caught:
        fetch(urls, tmp_path / "a.gz", show_progress=False)
    assert caught.value.offline and time.monotonic() - began < 5


def test_two_at_once_make_one_request(base, remote, tmp_path):
    threads = [threading.Thread(target=get, args=(base, tmp_path / "a.gz")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert remote.asked == [""] and (tmp_path / "a.gz").read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/a\.gz could not be written.*RECBOLE_HATLLM_CACHE"):
        get(base, tmp_path / "file" / "a.gz")


def test_a_folder_as_mirror(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.gz").write_bytes(CONTENT)
    get((tmp_path / "there").as_uri(), tmp_path / "a.gz", sha256=SHA256)
    with pytest.raises(DownloadError, match=r"[Nn]o such file"):
        get((tmp_path / "nowhere").as_uri(), tmp_path / "b.gz")
