"""Downloads against a server on this machine that misbehaves on demand. Nothing here leaves the loopback."""

import hashlib
import io
import json
import random
import struct
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ldm_edu.cli import app
from ldm_edu.data import download
from ldm_edu.data.celeba import CelebA
from ldm_edu.data.coco import COCO
from ldm_edu.data.download import (
    COCO_FILES,
    TERMS,
    Remote,
    accept_terms,
    celeba_files,
    checksum,
    coco_files,
    dataset_folder,
    download_celeba,
    download_coco,
    fair_order,
    fetch,
    fetch_all,
    subset_annotations,
    subset_list,
    terms_accepted,
    unpack,
)
from ldm_edu.data.folders import split_by_name
from ldm_edu.errors import DownloadError

BODY = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(BODY).hexdigest()
QUOTA = (
    b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body><p>Sorry, you can't view or "
    b"download this file at this time.</p><p>Too many users have viewed or downloaded this file recently.</p></body>"
)


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.faults[path]` is a list of faults, one for each request, the last one stays."""

    def do_GET(self):
        server, (path, query) = self.server, (urlsplit(self.path).path, parse_qs(urlsplit(self.path).query))
        faults = server.faults.get(path, [])
        fault = (faults.pop(0) if len(faults) > 1 else faults[0]) if faults else {}
        server.asked.append((path, self.headers["Range"], self.headers["If-Range"], query))
        if "files" in fault:
            server.files |= fault["files"]
        body = fault.get("page", server.files.get(path))
        if body is None or "status" in fault:
            return self.answer(fault.get("status", 404), fault.get("page", b""), fault.get("headers", {}))
        tags = {"etag": {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, "none": {}}
        tags |= {"weak": {"ETag": 'W/"1"'}, "date": {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}}
        headers = tags[fault.get("version", "etag")] | fault.get("headers", {})
        start = self.start(fault, body, headers)
        if start is not None and start >= len(body):
            return self.answer(416, b"", {})
        if start is not None:
            headers["Content-Range"] = fault.get("range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.answer(200 if start is None else 206, body[start or 0 :], headers, fault)

    def start(self, fault, body, headers):
        wish, version = self.headers["Range"], self.headers["If-Range"]
        if wish is None or "ignore" in fault:
            return None
        if version is not None and version not in headers.values() and "reckless" not in fault:
            return None
        return int(wish.removeprefix("bytes=").removesuffix("-"))

    def answer(self, status, body, headers, fault=None):
        fault = fault or {}
        self.send_response(status)
        if "no length" not in fault:
            self.send_header("Content-Length", str(len(body)))
        html = body.lstrip()[:9].lower() in (b"<!doctype", b"<html><he") or body.startswith(b"<form")
        headers = {"Content-Type": "text/html; charset=utf-8" if html else "application/octet-stream"} | headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: fault.get("cut")])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.asked = {"/file.bin": BODY}, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def naps(monkeypatch):
    """The pauses between tries, taken in no time."""
    slept = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    return slept


def wishes(server):
    return [wish for _, wish, _, _ in server.asked]


def files_under(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


# --- fetch ---


def test_a_file_arrives_whole_and_alone(server, tmp_path):
    path = fetch(f"{server.url}/file.bin", tmp_path / "new" / "folder" / "file.bin", md5=MD5, size=len(BODY))
    assert path.read_bytes() == BODY and files_under(tmp_path) == ["new/folder/file.bin"]


def test_a_file_that_is_there_is_checked_and_not_fetched_again(server, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(BODY)
    sha = hashlib.sha256(BODY).hexdigest().upper()
    assert fetch(f"{server.url}/file.bin", path, sha256=sha, md5=MD5, size=len(BODY)) == path and not server.asked
    path.write_bytes(BODY[:-1])
    with pytest.raises(DownloadError, match="299,999 bytes, not 300,000.*remove it"):
        fetch(f"{server.url}/file.bin", path, size=len(BODY))
    assert path.read_bytes() == BODY[:-1]  # it is the user's: we do not remove it


@pytest.mark.parametrize("version", ["etag", "date"])
def test_cut_connections_are_resumed_where_they_broke(server, tmp_path, naps, version):
    server.faults["/file.bin"] = [{"version": version, "cut": 100_000}, {"version": version, "cut": 50_000}]
    server.faults["/file.bin"] += [{"version": version}]
    path = fetch(f"{server.url}/file.bin", tmp_path / "file.bin")
    assert path.read_bytes() == BODY and wishes(server) == [None, "bytes=100000-", "bytes=150000-"]
    assert all(condition for _, wish, condition, _ in server.asked if wish) and len(naps) == 2


@pytest.mark.parametrize("version", ["weak", "none"])
def test_without_a_version_a_resume_needs_a_checksum(server, tmp_path, naps, version):
    faults = [{"version": version, "cut": 100_000}, {"version": version}]
    server.faults["/file.bin"] = list(faults)
    assert fetch(f"{server.url}/file.bin", tmp_path / "a").read_bytes() == BODY
    assert wishes(server) == [None, None]
    server.faults["/file.bin"] = list(faults)
    assert fetch(f"{server.url}/file.bin", tmp_path / "b", md5=MD5).read_bytes() == BODY
    assert wishes(server)[2:] == [None, "bytes=100000-"]


def test_a_server_that_ignores_range_is_read_from_the_start(server, tmp_path, naps):
    server.faults["/file.bin"] = [{"cut": 200_000}, {"ignore": True, "cut": 250_000}, {"ignore": True}]
    assert fetch(f"{server.url}/file.bin", tmp_path / "file.bin").read_bytes() == BODY


def test_another_run_goes_on_with_what_an_earlier_one_left(server, tmp_path, naps):
    server.faults["/file.bin"] = [{"cut": 123_456}, {"status": 503}]
    with pytest.raises(DownloadError, match="503"):
        fetch(f"{server.url}/file.bin", tmp_path / "file.bin")
    assert files_under(tmp_path) == ["file.bin.part", "file.bin.part.json"]
    server.faults.clear()
    assert fetch(f"{server.url}/file.bin", tmp_path / "file.bin", md5=MD5).read_bytes() == BODY
    assert wishes(server)[-1] == "bytes=123456-" and files_under(tmp_path) == ["file.bin"]


def test_a_part_that_is_complete_already_is_not_asked_for_again(server, tmp_path, monkeypatch):
    real = download.os.replace

    def stop(source, target):
        if target == tmp_path / "file.bin":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(download.os, "replace", stop)  # ended between the last byte and the rename
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{server.url}/file.bin", tmp_path / "file.bin")
    monkeypatch.undo()
    assert fetch(f"{server.url}/file.bin", tmp_path / "file.bin").read_bytes() == BODY and len(server.asked) == 1


@pytest.mark.parametrize("fault", [{}, {"reckless": True}], ids=["If-Range is honoured", "If-Range is ignored"])
def test_a_file_that_changed_at_the_server_is_never_glued_together(server, tmp_path, naps, fault):
    new = BODY[::-1]
    server.faults["/file.bin"] = [{"cut": 100_000}, fault | {"files": {"/file.bin": new}}, fault]
    assert fetch(f"{server.url}/file.bin", tmp_path / "file.bin").read_bytes() == new


def test_a_part_of_another_address_is_not_used(server, tmp_path, naps):
    server.files["/other.bin"] = BODY[::-1]
    server.faults["/file.bin"] = [{"cut": 1000}, {"status": 404}]
    with pytest.raises(DownloadError, match="404"):
        fetch(f"{server.url}/file.bin", tmp_path / "x", md5=MD5)
    assert fetch(f"{server.url}/other.bin", tmp_path / "x").read_bytes() == BODY[::-1]
    assert wishes(server)[-1] is None


@pytest.mark.parametrize("note", ["", "no json", "[]", "{}"])
def test_a_part_with_a_broken_note_is_begun_again(server, tmp_path, note):
    (tmp_path / "x.part").write_bytes(b"rubbish")
    (tmp_path / "x.part.json").write_text(note)
    assert fetch(f"{server.url}/file.bin", tmp_path / "x", md5=MD5).read_bytes() == BODY


def test_a_part_longer_than_the_file_is_begun_again(server, tmp_path, naps):
    url = f"{server.url}/file.bin"
    (tmp_path / "x.part").write_bytes(BODY + b"more")
    (tmp_path / "x.part.json").write_text(json.dumps({"url": url}))
    assert fetch(url, tmp_path / "x", md5=MD5).read_bytes() == BODY


def test_a_wrong_part_is_found_by_the_checksum_and_thrown_away(server, tmp_path):
    url = f"{server.url}/file.bin"
    (tmp_path / "x.part").write_bytes(b"\0" * 100_000)
    (tmp_path / "x.part.json").write_text(json.dumps({"url": url}))
    with pytest.raises(DownloadError, match="md5.*thrown away"):
        fetch(url, tmp_path / "x", md5=MD5)
    assert files_under(tmp_path) == []
    assert fetch(url, tmp_path / "x", md5=MD5).read_bytes() == BODY


@pytest.mark.parametrize("facts", [{"md5": "0" * 32}, {"sha256": "0" * 64}], ids=["md5", "sha256"])
def test_a_wrong_checksum_leaves_nothing_behind(server, tmp_path, facts):
    with pytest.raises(DownloadError, match=f"{next(iter(facts))}.*thrown away"):
        fetch(f"{server.url}/file.bin", tmp_path / "x", **facts)
    assert files_under(tmp_path) == []


def test_a_wrong_size_is_found_before_the_file_is_fetched(server, tmp_path):
    with pytest.raises(DownloadError, match="300,000 bytes now, not 5"):
        fetch(f"{server.url}/file.bin", tmp_path / "x", size=5)
    assert not (tmp_path / "x.part").exists() or not (tmp_path / "x.part").stat().st_size


def test_no_length_is_read_to_the_end_and_checked(server, tmp_path, naps):
    server.faults["/file.bin"] = [{"no length": True}]
    assert fetch(f"{server.url}/file.bin", tmp_path / "a", md5=MD5).read_bytes() == BODY
    server.faults["/file.bin"] = [{"no length": True, "cut": 1000}]
    with pytest.raises(DownloadError, match="thrown away"):
        fetch(f"{server.url}/file.bin", tmp_path / "b", md5=MD5)


def test_an_empty_file_is_a_file(server, tmp_path):
    server.files["/empty"] = b""
    assert fetch(f"{server.url}/empty", tmp_path / "empty", size=0).read_bytes() == b""


@pytest.mark.parametrize("status", [200, 204, 205])
def test_nothing_is_no_file_where_nothing_says_that_it_is_meant(server, tmp_path, naps, status):
    server.faults["/file.bin"] = [{"page": b"", "status": status} if status != 200 else {"page": b""}]
    with pytest.raises(DownloadError, match="sent (an empty file|no file .status 20[45].).*tried 4 times"):
        fetch(f"{server.url}/file.bin", tmp_path / "x.jpg")
    assert not (tmp_path / "x.jpg").exists()
    server.faults["/file.bin"].append({})
    assert fetch(f"{server.url}/file.bin", tmp_path / "x.jpg").read_bytes() == BODY


def test_an_empty_file_that_lies_there_is_fetched_again(server, tmp_path):
    """A power cut leaves such files, and so did an empty answer."""
    (tmp_path / "x.jpg").write_bytes(b"")
    assert fetch(f"{server.url}/file.bin", tmp_path / "x.jpg").read_bytes() == BODY
    (tmp_path / "y").write_bytes(b"")
    with pytest.raises(DownloadError, match="y has 0 bytes, not 300,000.*remove it"):
        fetch(f"{server.url}/file.bin", tmp_path / "y", size=len(BODY))


@pytest.mark.parametrize("header", ["Content-Length", "Content-Range", "Retry-After"])
@pytest.mark.parametrize("number", ["\xb2", "\xb9\xb2", "-1", "9" * 500, "1e3", ""])
def test_headers_that_are_no_numbers_are_not_believed(server, tmp_path, naps, header, number):
    headers = {header: f"bytes 0-299999/{number}" if header == "Content-Range" else number}
    server.faults["/file.bin"] = [{"status": 503, "headers": headers}, {"headers": headers, "no length": True}, {}]
    try:
        assert fetch(f"{server.url}/file.bin", tmp_path / "x", md5=MD5).read_bytes() == BODY
    except DownloadError as error:
        assert header == "Content-Length" and "thrown away" in str(error)  # an answer without a body, as it says
    assert max(naps) <= 60


def test_redirects_are_followed_with_the_range(server, tmp_path, naps):
    server.faults["/old"] = [{"status": 302, "headers": {"Location": "/file.bin"}}]
    server.faults["/file.bin"] = [{"cut": 1000}, {}]
    assert fetch(f"{server.url}/old", tmp_path / "x").read_bytes() == BODY
    assert server.asked[-1][:2] == ("/file.bin", "bytes=1000-")


@pytest.mark.parametrize("status, said", [(404, "no such file"), (403, "refuses"), (401, "login"), (410, "no longer")])
def test_a_final_answer_is_not_asked_for_twice(server, tmp_path, naps, status, said):
    server.faults["/file.bin"] = [{"status": status}]
    with pytest.raises(DownloadError, match=said):
        fetch(f"{server.url}/file.bin", tmp_path / "x")
    assert len(server.asked) == 1 and files_under(tmp_path) == []


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_passing_failure_is_tried_again(server, tmp_path, naps, status):
    server.faults["/file.bin"] = [{"status": status, "headers": {"Retry-After": "7"}}, {"status": status}, {}]
    assert fetch(f"{server.url}/file.bin", tmp_path / "x").read_bytes() == BODY
    assert naps == [7, 2]  # as long as the server asks; else one second, two, four


def test_patience_ends_but_not_while_the_file_grows(server, tmp_path, naps):
    server.faults["/file.bin"] = [{"status": 503}]
    with pytest.raises(DownloadError, match="overloaded.*tried 4 times"):
        fetch(f"{server.url}/file.bin", tmp_path / "x")
    assert len(server.asked) == 4 and naps == [1, 2, 4]
    server.faults["/file.bin"] = [{"cut": 10_000}]
    assert fetch(f"{server.url}/file.bin", tmp_path / "x").read_bytes() == BODY
    assert len(server.asked) == 4 + 30


def test_a_server_that_always_cuts_at_the_same_place_is_given_up(server, tmp_path, naps):
    server.faults["/file.bin"] = [{"cut": 10_000, "ignore": True}]
    with pytest.raises(DownloadError, match="broke after 10,000 of 300,000 bytes; tried 4 times"):
        fetch(f"{server.url}/file.bin", tmp_path / "x")


def test_nobody_there(tmp_path, naps):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as gone:
        port = gone.server_port
    with pytest.raises(DownloadError, match=rf"no connection to 127.0.0.1:{port}"):
        fetch(f"http://127.0.0.1:{port}/file.bin", tmp_path / "x")
    assert files_under(tmp_path) == []


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/hostname",
        "ftp://127.0.0.1/x",
        "/etc/hostname",
        "C:\\x",
        "",
        "http://[::1",
        "http://",
        "http:///x",
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1:a/x",
        "http://127.0.0.1/é",
        "http://127.0.0.1/a b",
        "http://é.org/",
        "http://127.0.0.1/\r\nHost: x",
        "http://127.0.0.1/\x1b[2J",
    ],
)
def test_only_the_web_is_fetched_from(url, tmp_path):
    with pytest.raises(DownloadError, match="http"):
        fetch(url, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_every_error_of_an_address_is_one_printable_line(tmp_path):
    with pytest.raises(DownloadError) as caught:
        fetch("http://127.0.0.1/\x1b[2J\n\ud800", tmp_path / "x")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("target", ["ftp://127.0.0.1:1/x", "file:///etc/hostname", "data:,x", "http://[::1"])
def test_redirects_lead_to_the_web_only(server, tmp_path, naps, target):
    server.faults["/old"] = [{"status": 302, "headers": {"Location": target}}]
    with pytest.raises(DownloadError):
        fetch(f"{server.url}/old", tmp_path / "x")
    assert files_under(tmp_path) == [] and not naps and len(server.asked) == 1


def test_a_silent_server_is_not_waited_for_for_ever(tmp_path, naps):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(DownloadError, match="timed out"):
            fetch(url, tmp_path / "x", tries=2, timeout=0.1)


# --- pages in place of files ---


@pytest.mark.parametrize("fault", [{"page": QUOTA}, {"page": QUOTA, "status": 403}, {"page": QUOTA, "status": 429}])
def test_drives_quota_page_is_recognised(server, tmp_path, naps, fault):
    server.faults["/file.bin"] = [fault]
    with pytest.raises(DownloadError, match="limit for this file is used up"):
        fetch(f"{server.url}/file.bin", tmp_path / "x.zip")
    assert len(server.asked) == 1 and files_under(tmp_path) == []


def test_a_login_page_is_no_file(server, tmp_path):
    server.faults["/file.bin"] = [{"page": b"<html><head><title>\nSign\n in &amp; go</title></head></html>"}]
    with pytest.raises(DownloadError, match='a web page came in place of the file \\("Sign in & go"\\)'):
        fetch(f"{server.url}/file.bin", tmp_path / "x.zip")
    assert files_under(tmp_path) == []


@pytest.mark.parametrize(
    "page, status", [(b"<html><head><title>\x1b]0;x\x07\x1b[2J&#27;[31m!</title>", 200), (b"", 404)]
)
def test_what_a_server_says_does_not_steer_the_terminal(server, tmp_path, page, status, monkeypatch):
    monkeypatch.setattr(Handler, "responses", {404: ("\x1b[2Jgone", "")}, raising=True)
    server.faults["/file.bin"] = [{"page": page} if status == 200 else {"status": status}]
    with pytest.raises(DownloadError) as caught:
        fetch(f"{server.url}/file.bin", tmp_path / "x.zip")
    assert str(caught.value).isprintable() and r"\x1b[2J" in str(caught.value)


def scan_page(action):
    fields = {"id": "0B7", "confirm": "t", "uuid": "a&amp;b"}
    hidden = "".join(f'<input type="hidden" name="{name}" value="{value}">' for name, value in fields.items())
    return (
        "<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>"
        f'<form id="download-form" action="{action}" method="get">'
        f'<input type="submit" id="uc-download-link" value="Download anyway"/>{hidden}</form>'
    ).encode()


def test_drives_download_anyway_is_answered(server, tmp_path, naps):
    server.faults["/drive"] = [{"page": scan_page(f"{server.url}/file.bin")}]
    server.faults["/file.bin"] = [{"cut": 1000}, {}]
    assert fetch(f"{server.url}/drive", tmp_path / "x").read_bytes() == BODY
    assert server.asked[1][3] == {"id": ["0B7"], "confirm": ["t"], "uuid": ["a&b"]}
    assert wishes(server) == [None, None, "bytes=1000-", "bytes=1000-"]


@pytest.mark.parametrize("action", ["{url}/drive", "file:///etc/hostname"])
def test_a_form_leads_neither_in_circles_nor_to_this_disk(server, tmp_path, action):
    server.faults["/drive"] = [{"page": scan_page(action.format(url=server.url))}]
    with pytest.raises(DownloadError, match="web page|http"):
        fetch(f"{server.url}/drive", tmp_path / "x")
    assert len(server.asked) <= 2 and not (tmp_path / "x").exists()


# --- the disk ---


def test_no_room_is_said_before_anything_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match="300 kB more are needed, and the disk has 1 kB left"):
        fetch(f"{server.url}/file.bin", tmp_path / "x")
    monkeypatch.undo()
    assert fetch(f"{server.url}/file.bin", tmp_path / "x").read_bytes() == BODY


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_is_said_and_the_line_is_not_blamed(server, tmp_path, naps, monkeypatch):
    class Full(download.Partial):
        def begin(self, response):
            total = super().begin(response)
            self.path.symlink_to("/dev/full")
            return total

    monkeypatch.setattr(download, "Partial", Full)
    with pytest.raises(DownloadError, match="the disk is full"):
        fetch(f"{server.url}/file.bin", tmp_path / "x")
    assert len(server.asked) == 1 and not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match="cannot be written.*choose another folder"):
        fetch(f"{server.url}/file.bin", tmp_path / "file" / "x")


@pytest.mark.parametrize("name", ["x.part", "x.part.json"])
def test_a_link_under_the_name_of_a_part_is_not_followed(server, tmp_path, naps, name):
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / name).symlink_to("mine")
    server.faults["/file.bin"] = [{"cut": 1000}, {}]
    assert fetch(f"{server.url}/file.bin", tmp_path / "x", md5=MD5).read_bytes() == BODY
    assert (tmp_path / "mine").read_bytes() == b"mine" and files_under(tmp_path) == ["mine", "x"]


def test_a_folder_in_the_place_of_the_file(server, tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(DownloadError, match="x is a folder"):
        fetch(f"{server.url}/file.bin", tmp_path / "x")


# --- many files ---


def test_many_files_and_the_first_failure_keeps_what_came(server, tmp_path, naps):
    names = [f"{i}.jpg" for i in range(50)]
    server.files |= {f"/{name}": name.encode() for name in names}
    fetch_all({tmp_path / "all" / name: f"{server.url}/{name}" for name in names})
    assert all((tmp_path / "all" / name).read_text() == name for name in names)
    del server.files["/20.jpg"]
    addresses = {tmp_path / "some" / name: f"{server.url}/{name}" for name in names}
    with pytest.raises(DownloadError, match="20.jpg"):
        fetch_all(addresses, workers=1)
    assert not [name for name in files_under(tmp_path / "some") if not name.endswith(".jpg")]
    server.files["/20.jpg"], before = b"20.jpg", len(server.asked)
    fetch_all(addresses)
    assert len(files_under(tmp_path / "some")) == 50 and len(server.asked) - before < 50


# --- archives ---


def zipped(files, **options) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def a_link(name, target) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


EVIL = ["", "../x", "a/../../x", "/tmp/x", "..\\x", "a\\..\\..\\x", "C:\\x", "C:x", "//host/x"]


def shortened(archive: bytes) -> bytes:
    """An archive from which a letter was cut before its directory, and one in it: its end says where that is."""
    end = archive.rindex(b"PK\5\6")
    size, start = struct.unpack("<II", archive[end + 12 : end + 20])
    return archive[: end + 12] + struct.pack("<II", size - 1, start - 1) + archive[end + 20 :]


@pytest.mark.parametrize("name", EVIL)
def test_an_archive_that_leads_outside_is_refused_whole(name, tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped({"good.txt": b"good", "Q" if name == "" else name: b"evil"}))
    if name == "":  # Python writes no empty name, and another program may
        content = (tmp_path / "a.zip").read_bytes()
        for head, place in ((b"PK\3\4", 26), (b"PK\1\2", 28)):
            at = content.rindex(head)
            length = 30 if place == 26 else 46
            content = content[: at + place] + b"\0" + content[at + place + 1 : at + length] + content[at + length + 1 :]
        (tmp_path / "a.zip").write_bytes(shortened(content))
    with pytest.raises(DownloadError, match="outside the folder"):
        unpack(tmp_path / "a.zip", tmp_path / "in" / "here")
    assert files_under(tmp_path) == ["a.zip"]


def test_links_in_an_archive_are_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped({a_link("here", "/tmp"): b"/tmp", "here/x": b"evil"}))
    with pytest.raises(DownloadError, match="outside the folder"):
        unpack(tmp_path / "a.zip", tmp_path / "in")
    assert files_under(tmp_path) == ["a.zip"]


def test_unpacking_takes_what_is_wanted_and_keeps_what_is_there(tmp_path):
    content = {"a/1.txt": b"1", "a/2.txt": b"2", "__MACOSX/a/._1.txt": b"", "b/3.txt": b"3"}
    (tmp_path / "a.zip").write_bytes(zipped(content, compression=zipfile.ZIP_DEFLATED))
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "1.txt").write_bytes(b"mine")
    assert unpack(tmp_path / "a.zip", tmp_path / "out", lambda name: name.startswith("a/")) == [
        tmp_path / "out" / "a" / "1.txt", tmp_path / "out" / "a" / "2.txt"]  # fmt: skip
    assert files_under(tmp_path / "out") == ["a/1.txt", "a/2.txt"]
    assert (tmp_path / "out" / "a" / "1.txt").read_bytes() == b"mine"
    unpack(tmp_path / "a.zip", tmp_path / "out")
    assert files_under(tmp_path / "out") == ["a/1.txt", "a/2.txt", "b/3.txt"]


def test_names_in_an_archive_do_not_steer_the_terminal(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped({"../\x1b[2J": b"evil"}))
    with pytest.raises(DownloadError) as caught:
        unpack(tmp_path / "a.zip", tmp_path / "in")
    assert str(caught.value).isprintable()


def test_unpacking_follows_no_link_and_leaves_no_half_file(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in (".x.txt.part", "x.txt"):
        (out / name).symlink_to(tmp_path / ("mine" if name[0] == "." else "nowhere"))
    (out / ".x.txt.999999999-a1b2c3").write_bytes(b"half")  # of a process that was killed
    (out / "y.txt").write_bytes(b"")  # of a power cut
    (tmp_path / "a.zip").write_bytes(zipped({"x.txt": b"x", "y.txt": b"y", "empty.txt": b""}))
    unpack(tmp_path / "a.zip", out)
    assert (tmp_path / "mine").read_bytes() == b"mine" and not (tmp_path / "nowhere").exists()
    assert [(out / name).read_bytes() for name in ("x.txt", "y.txt", "empty.txt")] == [b"x", b"y", b""]
    assert files_under(out) == [".x.txt.part", "empty.txt", "x.txt", "y.txt"]  # the link is somebody's own


@pytest.mark.parametrize("make, says", [
    (lambda path: None, "is missing"),
    (lambda path: path.mkdir(), "a folder stands in its place"),
    (lambda path: path.symlink_to("gone"), "is a link that leads nowhere"),
    (lambda path: path.symlink_to(path.name), "a link leads back to itself"),
    (lambda path: path.write_bytes(b"no archive"), "is not a whole zip archive .*get it again"),
])  # fmt: skip
def test_what_is_wrong_with_an_archive_is_said(tmp_path, make, says):
    make(tmp_path / "a.zip")
    with pytest.raises(DownloadError, match=f"a.zip.*{says}"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    with pytest.raises(DownloadError, match="the name is too long"):
        unpack(tmp_path / ("a" * 300 + ".zip"), tmp_path / "out")


def test_unpacking_checks_the_room_and_reports_a_missing_archive(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(zipped({"zeros": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(DownloadError, match="10 MB more are needed"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    with pytest.raises(DownloadError, match="none.zip"):
        unpack(tmp_path / "none.zip", tmp_path / "out")
    assert files_under(tmp_path / "out") == []


def test_damaged_archives_are_refused_or_unpacked_right(tmp_path):
    """Cut off anywhere, or with a byte changed anywhere: our error, or the right content; never another error."""
    rng, content = random.Random(0), {f"f/{i}.txt": bytes([i]) * 50 * i for i in range(6)}
    whole = zipped(content, compression=zipfile.ZIP_DEFLATED)
    refusals = 0
    for i in range(200):
        damaged = bytearray(whole)
        if i % 2:
            damaged = damaged[: rng.randrange(len(whole))]
        else:
            damaged[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
        archive, out = tmp_path / f"{i}.zip", tmp_path / str(i)
        archive.write_bytes(damaged)
        try:
            unpack(archive, out)
        except DownloadError as error:
            refusals += 1
            assert str(archive) in str(error) or "cannot be written" in str(error) or "more are needed" in str(error)
        for name in files_under(out) if out.exists() else []:
            assert name not in content or (out / name).read_bytes() == content[name]
    assert refusals > 100  # all that were cut off, and most of the others


# --- subsets ---


def test_every_beginning_of_the_order_is_a_fair_sample():
    groups = {f"{i:06d}.jpg": "train" if i <= 1628 else "validation" if i <= 1827 else "test" for i in range(1, 2027)}
    order, sizes = fair_order(groups), Counter(groups.values())
    assert sorted(order) == sorted(groups) and order == fair_order(dict(reversed(groups.items())))
    counts = Counter()
    for m, name in enumerate(order, 1):
        counts[groups[name]] += 1
        assert all(abs(counts[s] - m * sizes[s] / len(groups)) <= 2 for s in sizes)
    assert set(map(groups.get, order[:6])) == {"train", "validation", "test"}
    assert order[:100] != sorted(order[:100]) and fair_order({}) == []


def test_lists_are_cut_line_by_line():
    text = "3\r\nSmiling Hat\r\n1.jpg -1  1\r\n2.jpg  1  1\r\n3.jpg -1 -1\r\n"
    assert subset_list(text, ["3.jpg", "1.jpg"]) == "2\r\nSmiling Hat\r\n1.jpg -1  1\r\n3.jpg -1 -1\r\n"
    assert subset_list(text, ["1.jpg", "2.jpg", "3.jpg"]) == text
    assert subset_list("1.jpg 0\n2.jpg 1", ["2.jpg"]) == "2.jpg 1" and subset_list("", []) == ""


# --- CelebA ---


def picture(seed) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (22, 18, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def publish(server, files) -> dict[str, Remote]:
    server.files |= {f"/{name}": content for name, content in files.items()}
    return {
        name: Remote(name, f"{server.url}/{name}", len(content), hashlib.md5(content).hexdigest())
        for name, content in files.items()
    }


FACES = {f"{i:06d}.jpg": picture(i) for i in range(1, 101)}
ATTRIBUTES = "100\nSmiling Hat\n" + "".join(f"{name} 1 {1 if i % 3 else -1}\n" for i, name in enumerate(FACES))
PARTITION = "".join(f"{name} {0 if i < 80 else 1 + (i >= 90)}\n" for i, name in enumerate(FACES))


@pytest.fixture
def celeba(server):
    archive = zipped({f"img_align_celeba/{name}": content for name, content in FACES.items()})
    return publish(server, {"list_attr_celeba.txt": ATTRIBUTES.encode(), "list_eval_partition.txt": PARTITION.encode(),
                            "img_align_celeba.zip": archive})  # fmt: skip


def faces(folder):
    return {path.name for path in (folder / "celeba" / "img_align_celeba").iterdir()}


def test_celeba_whole(server, celeba, tmp_path, naps):
    server.faults["/img_align_celeba.zip"] = [{"cut": 20_000}, {}]
    root = download_celeba(tmp_path, files=celeba)
    assert root == tmp_path / "celeba" and faces(tmp_path) == set(FACES)
    assert (root / "list_attr_celeba.txt").read_text() == ATTRIBUTES  # whole official files stay as they are
    assert [len(CelebA(tmp_path, split)) for split in ("train", "validation", "test")] == [80, 10, 10]
    before = len(server.asked)
    download_celeba(tmp_path, files=celeba)
    download_celeba(tmp_path, 1000, files=celeba)
    assert len(server.asked) == before


def test_a_subset_of_celeba_grows_and_never_shrinks(server, celeba, tmp_path):
    root = download_celeba(tmp_path, 20, files=celeba)
    data = {split: CelebA(tmp_path, split) for split in ("train", "validation", "test")}
    assert {split: (len(d), d.missing) for split, d in data.items()} == {
        "train": (16, 0), "validation": (2, 0), "test": (2, 0)}  # fmt: skip
    assert (root / "list_attr_celeba.txt").read_text().startswith("20\nSmiling Hat\n")
    assert len((root / "list_eval_partition.txt").read_text().splitlines()) == 20
    twenty, before = faces(tmp_path), len(server.asked)
    download_celeba(tmp_path, 10, files=celeba)
    assert faces(tmp_path) == twenty
    download_celeba(tmp_path, 50, files=celeba)
    assert twenty < faces(tmp_path) and len(faces(tmp_path)) == 50
    download_celeba(tmp_path, files=celeba)
    assert faces(tmp_path) == set(FACES) and (root / "list_attr_celeba.txt").read_text() == ATTRIBUTES
    assert len(server.asked) == before  # all from the official files that were kept
    download_celeba(tmp_path / "other", 20, files=celeba)
    assert faces(tmp_path / "other") == twenty  # the same everywhere


def test_pictures_that_vanished_come_back(celeba, tmp_path):
    download_celeba(tmp_path, 20, files=celeba)
    (tmp_path / "celeba/img_align_celeba" / min(faces(tmp_path))).unlink()
    download_celeba(tmp_path, 20, files=celeba)
    assert len(faces(tmp_path)) == 20 and CelebA(tmp_path).missing == 0


def test_unpacking_that_was_interrupted_goes_on(celeba, tmp_path, monkeypatch):
    real, done = download.shutil.copyfileobj, []

    def copy(source, sink):
        real(source, sink)
        done.append(1)
        if len(done) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(download.shutil, "copyfileobj", copy)
    with pytest.raises(KeyboardInterrupt):
        download_celeba(tmp_path, 20, files=celeba)
    assert len(faces(tmp_path)) == 6 and not (tmp_path / "celeba/list_attr_celeba.txt").exists()
    download_celeba(tmp_path, 20, files=celeba)
    assert len(done) == 7 + 14 and len(faces(tmp_path)) == 20


def test_drives_quota_says_what_to_do_and_goes_on_from_there(server, celeba, tmp_path, naps):
    page = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
    known = celeba_files()
    celeba = {name: replace(remote, page=page, listed=known[name].listed) for name, remote in celeba.items()}
    server.faults["/list_attr_celeba.txt"] = server.faults["/img_align_celeba.zip"] = [{"page": QUOTA}]
    with pytest.raises(DownloadError) as caught:
        download_celeba(tmp_path / "my data", 20, files=celeba)
    message = str(caught.value)
    for said in ("limit for this file is used up", page, "Anno/list_attr_celeba.txt", "Eval/list_eval_partition.txt",
                 "Img/img_align_celeba.zip", str(tmp_path / "my data/celeba/downloads")):  # fmt: skip
        assert said in message
    assert message.endswith(f"ldm-edu data celeba --data-dir '{tmp_path / 'my data'}' --subset 20")
    downloads = tmp_path / "my data/celeba/downloads"
    (downloads / "list_attr_celeba.txt").write_text(ATTRIBUTES)
    with pytest.raises(DownloadError) as caught:
        download_celeba(tmp_path / "my data", 20, files=celeba)
    assert "Img/" in str(caught.value) and "Anno/" not in str(caught.value)  # only what is still missing
    (downloads / "img_align_celeba.zip").write_bytes(server.files["/img_align_celeba.zip"])
    download_celeba(tmp_path / "my data", 20, files=celeba)
    assert len(faces(tmp_path / "my data")) == 20


def test_files_put_there_by_hand_are_checked_and_used(server, celeba, tmp_path):
    root = tmp_path / "celeba"
    root.mkdir()
    for name in celeba:  # beside the images' folder, as data/README.md says
        (root / name).write_bytes(server.files[f"/{name}"])
    download_celeba(tmp_path, files=celeba)
    assert not server.asked and faces(tmp_path) == set(FACES)
    for folder in (tmp_path / "b/celeba", tmp_path / "c/celeba/downloads"):
        folder.mkdir(parents=True)
        (folder / "img_align_celeba.zip").write_bytes(server.files["/img_align_celeba.zip"][:-9])
        with pytest.raises(DownloadError, match="(?s)is not whole.*Remove it.*By hand"):
            download_celeba(folder.parents[folder.name == "downloads"], 20, files=celeba)


def test_what_is_not_ours_is_not_touched(server, celeba, tmp_path):
    root = tmp_path / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    chosen = subset_list(ATTRIBUTES, ["000001.jpg", "000005.jpg"])
    (root / "list_attr_celeba.txt").write_text(chosen)
    for name in ("000001.jpg", "000005.jpg"):
        (root / "img_align_celeba" / name).write_bytes(b"retouched")
    for n in (None, 1, 2):
        assert download_celeba(tmp_path, n, files=celeba) == root  # all that the list names is there
    with pytest.raises(DownloadError, match="list_attr_celeba.txt is there, and was not made by this command"):
        (root / "img_align_celeba" / "000005.jpg").unlink()
        download_celeba(tmp_path, 50, files=celeba)
    assert (root / "list_attr_celeba.txt").read_text() == chosen and faces(tmp_path) == {"000001.jpg"}
    assert (root / "img_align_celeba" / "000001.jpg").read_bytes() == b"retouched"
    assert "/img_align_celeba.zip" not in [path for path, *_ in server.asked]  # refused before the large file


def test_a_whole_official_list_stays_whole(server, celeba, tmp_path):
    root = tmp_path / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    (root / "list_attr_celeba.txt").write_text(ATTRIBUTES)
    (root / "img_align_celeba" / "000001.jpg").write_bytes(FACES["000001.jpg"])
    download_celeba(tmp_path, 20, files=celeba)
    assert (root / "list_attr_celeba.txt").read_text() == ATTRIBUTES and len(faces(tmp_path)) == 21
    assert sum(len(CelebA(tmp_path, split)) for split in ("train", "validation", "test")) == 21


def test_an_archive_without_the_pictures_is_said(server, celeba, tmp_path):
    celeba |= publish(server, {"img_align_celeba.zip": zipped({"other/000001.jpg": b""})})
    with pytest.raises(DownloadError, match="lacks 20 images"):
        download_celeba(tmp_path, 20, files=celeba)


@pytest.mark.parametrize("n", [0, -3])
def test_a_subset_has_pictures(n, tmp_path):
    for call in (download_celeba, lambda folder, n: download_coco(folder, n=n)):
        with pytest.raises(DownloadError, match="n should be"):
            call(tmp_path, n)


def test_the_official_files_are_torchvisions():
    from torchvision.datasets import CelebA as theirs

    known = {name: (number, md5) for number, md5, name in theirs.file_list}
    for name, remote in celeba_files("https://drive/?id=").items():
        assert (remote.url.removeprefix("https://drive/?id="), remote.md5) == known[name] and remote.size > 10**6
    assert celeba_files()["img_align_celeba.zip"].url.startswith("https://drive.usercontent.google.com/download?")


# --- COCO ---


PHOTOS = {f"{i:012d}.jpg": picture(1000 + i) for i in range(80)}


def coco_archives(server, **changes) -> dict[str, bytes]:
    """COCO's archives in the official form; `changes` are made to every image's entry."""
    square = {"category_id": 7, "iscrowd": 0}
    boxed = square | {"area": 81.0, "bbox": [2.0, 3.0, 9.0, 9.0], "segmentation": [[2.0, 3.0, 11.0, 3.0, 11.0, 12.0]]}
    segment = square | {"id": 1, "bbox": [0, 0, 18, 22], "area": 396}
    images = [
        {"id": i, "file_name": name, "coco_url": f"{server.url}/val2017/{name}", "height": 22, "width": 18} | changes
        for i, name in enumerate(PHOTOS)
    ]
    notes = {
        "captions": [{"id": i, "image_id": i // 5, "caption": f"photo {i // 5} {i % 5}"} for i in range(400)],
        "instances": [boxed | {"id": i, "image_id": i} for i in range(60)],
        "panoptic": [
            {"image_id": i, "file_name": f"{i:012d}.png", "segments_info": [segment]} for i in range(len(images))
        ],
    }
    kinds = [{"id": 7, "name": "train", "supercategory": "vehicle", "isthing": 1, "color": [1, 2, 3]}]
    shared = {"info": {}, "licenses": [], "images": images, "categories": kinds}
    texts = {f"annotations/{kind}_val2017.json": json.dumps(shared | {"annotations": n}) for kind, n in notes.items()}
    buffer = io.BytesIO()
    Image.new("RGB", (18, 22), (1, 0, 0)).save(buffer, "PNG")
    maps = {f"panoptic_val2017/{note['file_name']}": buffer.getvalue() for note in notes["panoptic"]}
    panoptic = texts.popitem()
    return {
        "val2017.zip": zipped({f"val2017/{name}": photo for name, photo in PHOTOS.items()}),
        "annotations_trainval2017.zip": zipped(texts),
        "panoptic_annotations_trainval2017.zip": zipped(
            dict([panoptic]) | {"annotations/panoptic_val2017.zip": zipped(maps)}
        ),
    }


@pytest.fixture
def coco(server):
    server.files |= {f"/val2017/{name}": photo for name, photo in PHOTOS.items()}
    return publish(server, coco_archives(server))


def photos(folder):
    return {path.name for path in (folder / "coco" / "val2017").iterdir()}


def asked_for(server):
    return {path for path, *_ in server.asked}


def test_a_few_of_coco_are_fetched_one_by_one(server, coco, tmp_path, naps):
    server.faults["/val2017/" + min(PHOTOS)] = [{"status": 503}, {}]
    root = download_coco(tmp_path, n=20, files=coco)
    assert "/val2017.zip" not in asked_for(server) and len(photos(tmp_path)) == 20
    data = COCO(tmp_path, "val2017")
    assert len(data) == 20 and data.missing == 0
    splits = {name: split_by_name(name) for name in photos(tmp_path)}
    assert set(splits.values()) == {"train", "validation", "test"}
    for kind in ("captions", "instances"):
        content = json.loads((root / f"annotations/{kind}_val2017.json").read_text())
        assert {image["file_name"] for image in content["images"]} == photos(tmp_path)
        assert {note["image_id"] for note in content["annotations"]} <= {image["id"] for image in content["images"]}
        assert content["categories"]
    before = len(server.asked)
    download_coco(tmp_path, n=15, files=coco)
    assert len(server.asked) == before and len(photos(tmp_path)) == 20


def test_many_of_coco_come_from_the_archive(server, coco, tmp_path):
    download_coco(tmp_path, n=21, files=coco)  # more than a quarter of the 80
    assert "/val2017.zip" in asked_for(server) and len(server.asked) == 2 and len(photos(tmp_path)) == 21
    download_coco(tmp_path, n=30, files=coco)
    assert len(server.asked) == 2 and len(photos(tmp_path)) == 30  # few more, but the archive is here


def test_coco_whole_and_from_a_subset_to_the_whole(server, coco, tmp_path):
    download_coco(tmp_path / "a", n=5, files=coco)
    root = download_coco(tmp_path / "a", files=coco)
    download_coco(tmp_path / "b", files=coco)
    official = zipfile.ZipFile(io.BytesIO(server.files["/annotations_trainval2017.zip"]))
    for kind in ("captions", "instances"):
        name = f"annotations/{kind}_val2017.json"
        assert (root / name).read_bytes() == official.read(name)
    assert photos(tmp_path / "a") == photos(tmp_path / "b") == set(PHOTOS) and len(COCO(tmp_path / "b")) == 80
    for archive in (root / "downloads").glob("*.zip"):
        archive.unlink()  # they may be deleted
    before = len(server.asked)
    download_coco(tmp_path / "a", files=coco)
    assert len(server.asked) == before


def test_panoptic_maps_come_later_or_at_once(server, coco, tmp_path):
    download_coco(tmp_path, n=12, files=coco)
    root = download_coco(tmp_path, n=12, panoptic=True, files=coco)
    maps = {path.stem for path in (root / "annotations/panoptic_val2017").iterdir()}
    assert maps == {name.removesuffix(".jpg") for name in photos(tmp_path)} and len(maps) == 12
    content = json.loads((root / "annotations/panoptic_val2017.json").read_text())
    assert len(content["images"]) == len(content["annotations"]) == 12
    assert not list((root / "downloads").rglob("panoptic_val2017.zip"))
    data = COCO(tmp_path, "val2017", size=16, keys=("image", "caption", "segmentation"))
    assert len(data) == 12 and data[0]["segmentation"].shape == (16, 16)
    before = len(server.asked)
    download_coco(tmp_path, n=12, panoptic=True, files=coco)
    assert len(server.asked) == before


def test_a_photo_that_is_gone_leads_to_the_archive_by_hand(server, coco, tmp_path):
    del server.files["/val2017/" + fair_order({name: split_by_name(name) for name in PHOTOS})[3]]
    with pytest.raises(DownloadError) as caught:
        download_coco(tmp_path, n=10, files=coco)
    assert "404" in str(caught.value) and "val2017.zip" in str(caught.value) and "--subset 10" in str(caught.value)
    assert not (tmp_path / "coco/annotations").exists()  # lists come last
    (tmp_path / "coco" / "val2017.zip").write_bytes(server.files["/val2017.zip"])
    download_coco(tmp_path, n=10, files=coco)
    assert len(COCO(tmp_path, "val2017")) == 10


def test_annotations_that_are_not_ours_are_not_touched(server, coco, tmp_path):
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/captions_val2017.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(DownloadError, match="not made by this command"):
        download_coco(tmp_path, n=10, files=coco)
    assert not (root / "val2017").exists()
    assert (root / "annotations/captions_val2017.json").read_text() == '{"images": [], "annotations": []}'


@pytest.mark.parametrize(
    "change, said",
    [({"file_name": "../../x.jpg"}, "no plain file name"), ({"coco_url": "file:///etc/hostname"}, "http://")],
)
def test_annotations_that_lead_elsewhere_are_refused(server, coco, tmp_path, change, said):
    coco |= publish(server, coco_archives(server, **change))
    with pytest.raises(DownloadError, match=said):
        download_coco(tmp_path, n=1, files=coco)
    assert not list(tmp_path.rglob("*.jpg"))


@pytest.mark.parametrize("content", ['{"images": 3}', "[1]", "3", "null", '{"images": [{"id": 1}]}', '{"images": [3]}',
                                     '{"images": [{"file_name": 3}]}', '{"images": [{"file_name": "../x"}]}',
                                     "[" * 100_000, '{"images"'])  # fmt: skip
@pytest.mark.parametrize("kind", ["captions", "panoptic"])
def test_lists_of_another_form_are_named(server, coco, tmp_path, content, kind):
    for name in ("captions", "instances", "panoptic"):
        path = tmp_path / f"coco/annotations/{name}_val2017.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"images": [], "annotations": []}')
    (tmp_path / f"coco/annotations/{kind}_val2017.json").write_text(
        content.replace("images", "annotations") if kind == "panoptic" else content
    )
    with pytest.raises(DownloadError, match=f"{kind}_val2017.json (has not the form.*move it away|is not JSON)"):
        download_coco(tmp_path, n=10, panoptic=True, files=coco)
    assert not server.asked


def test_an_empty_photograph_is_fetched_again(server, coco, tmp_path):
    download_coco(tmp_path, n=10, files=coco)
    name = min(photos(tmp_path))
    (tmp_path / "coco/val2017" / name).write_bytes(b"")
    download_coco(tmp_path, n=10, files=coco)
    assert (tmp_path / "coco/val2017" / name).read_bytes() == PHOTOS[name]


@pytest.mark.parametrize("record", ["{}", '{"annotations/captions_val2017.json": 3}',
                                    '{"annotations/captions_val2017.json": {}}'])  # fmt: skip
def test_a_damaged_record_of_lists_makes_them_somebody_elses(server, coco, tmp_path, record):
    root = download_coco(tmp_path, n=10, files=coco)
    (root / "downloads/made.json").write_text(record)
    (root / "val2017" / min(photos(tmp_path))).unlink()
    with pytest.raises(DownloadError, match="captions_val2017.json is there, and was not made by this command"):
        download_coco(tmp_path, n=20, files=coco)


def test_an_archive_of_annotations_without_captions(server, coco, tmp_path):
    coco |= publish(server, {"annotations_trainval2017.zip": zipped({"captions_val2017.json": b"{}"})})
    with pytest.raises(DownloadError, match="lacks annotations/captions_val2017.json"):
        download_coco(tmp_path, n=10, files=coco)


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(DownloadError, match="val2017"):
        download_coco(tmp_path, split="validation")


def test_coco_files_lie_where_they_are_published():
    files = coco_files()
    assert files["val2017.zip"].url == "http://images.cocodataset.org/zips/val2017.zip"
    assert files["annotations_trainval2017.zip"].url.endswith(".org/annotations/annotations_trainval2017.zip")
    assert set(files) == set(COCO_FILES) and all(len(f.sha256) == 64 for f in files.values())


def test_real_pictures_arrive_as_they_are(real_data, server, tmp_path):
    """The real subset of COCO, published here in the official form, fetched, and read by the same loader."""
    source = real_data / "coco"
    if not (source / "annotations" / "panoptic_val2017.json").exists():
        pytest.skip("no panoptic annotations in the subset")
    names = [f"annotations/{kind}_val2017.json" for kind in ("captions", "instances", "panoptic")]
    theirs, ours = b"http://images.cocodataset.org", server.url.encode()
    texts = {name: (source / name).read_bytes().replace(theirs, ours) for name in names}
    maps = {f"panoptic_val2017/{p.name}": p.read_bytes() for p in source.glob("annotations/panoptic_val2017/*.png")}
    server.files |= {f"/val2017/{path.name}": path.read_bytes() for path in (source / "val2017").iterdir()}
    panoptic = {names[2]: texts.pop(names[2]), "annotations/panoptic_val2017.zip": zipped(maps)}
    archives = {"annotations_trainval2017.zip": texts, "panoptic_annotations_trainval2017.zip": panoptic}
    files = publish(server, {name: zipped(content) for name, content in archives.items()} | {"val2017.zip": b""})
    download_coco(tmp_path, n=30, panoptic=True, files=files)
    keys = ("image", "caption", "captions", "boxes", "instances", "segmentation")
    fetched, whole = (COCO(folder, "val2017", size=64, keys=keys) for folder in (tmp_path, real_data))
    at = {file.name: i for i, file in enumerate(whole.files)}
    assert len(COCO(tmp_path, "val2017")) == 30 and 0 < len(fetched) <= 30
    for i, file in enumerate(fetched.files):
        a, b = fetched[i], whole[at[file.name]]
        assert a["captions"] == b["captions"] and (a["image"] == b["image"]).all()
        assert a["boxes"].shape == b["boxes"].shape and (a["instances"] == b["instances"]).all()


# --- terms ---


def test_terms_are_accepted_once_for_each_folder(tmp_path, monkeypatch):
    assert not terms_accepted("celeba", tmp_path)
    accept_terms("celeba", tmp_path)
    assert (
        terms_accepted("celeba", tmp_path)
        and not terms_accepted("celeba", tmp_path / "b")
        and not terms_accepted("coco", tmp_path)
    )
    monkeypatch.setitem(TERMS, "celeba", "new terms")
    assert not terms_accepted("celeba", tmp_path)


def test_home_is_where_the_data_set_lies(tmp_path):
    assert dataset_folder("celeba", tmp_path) == tmp_path / "celeba"
    (tmp_path / "img_align_celeba").mkdir()
    assert dataset_folder("celeba", tmp_path) == tmp_path
    with pytest.raises(DownloadError, match="celeba, coco"):
        dataset_folder("imagenet", tmp_path)
    for name in ("~nobody-of-that-name/x", "a\0b"):
        with pytest.raises(DownloadError, match="data_dir .* is no name that a folder can have"):
            dataset_folder("celeba", name)


def test_checksums_are_of_the_content(tmp_path):
    (tmp_path / "x").write_bytes(BODY)
    assert checksum(tmp_path / "x") == MD5
    assert checksum(str(tmp_path / "x"), "sha256") == hashlib.sha256(BODY).hexdigest()


def test_annotations_of_nothing():
    nothing = {"images": [], "annotations": [], "info": 1}
    assert subset_annotations(nothing, ["a"]) == nothing


# --- the command ---


@pytest.fixture
def ldm_edu(celeba, coco, monkeypatch):
    """`ldm-edu data`, as it is typed, with our server in the official one's place."""
    monkeypatch.setattr(download, "celeba_files", lambda: celeba)
    monkeypatch.setattr(download, "coco_files", lambda: coco)
    return lambda *words, **options: CliRunner().invoke(app, ["data", *map(str, words)], **options)


def test_the_terms_are_shown_and_asked_for_once(ldm_edu, server, tmp_path):
    words = ("celeba", "--data-dir", tmp_path, "--subset", 10)
    for answer, said in (("n\n", "nothing was downloaded"), ("", "--yes")):
        result = ldm_edu(*words, input=answer)
        assert result.exit_code == 1 and said in result.output and "non-commercial research" in result.output
        assert not server.asked and not files_under(tmp_path)
    result = ldm_edu(*words, input="y\n")
    assert result.exit_code == 0 and len(faces(tmp_path)) == 10, result.output
    result = ldm_edu("celeba", "--data-dir", tmp_path, "--subset", 12)
    assert result.exit_code == 0 and "non-commercial" not in result.output and len(faces(tmp_path)) == 12


@pytest.mark.parametrize("words, said", [
    (("coco", "--split", "validation"), "train2017 or val2017, not 'validation'"),
    (("celeba", "--split", "val2017"), "split and panoptic are for coco only"),
    (("celeba", "--panoptic"), "split and panoptic are for coco only"),
    (("imagenet",), "known: celeba, coco"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_the_terms_are_asked(ldm_edu, server, tmp_path, words, said):
    result = ldm_edu(*words, "--data-dir", tmp_path, "--yes")
    assert result.exit_code == 1 and said in result.output and "terms in short" not in result.output
    assert not server.asked and not files_under(tmp_path)


def test_coco_from_the_command_line(ldm_edu, tmp_path):
    result = ldm_edu("coco", "--data-dir", tmp_path, "--subset", 10, "--panoptic", "--yes")
    assert result.exit_code == 0 and "Creative Commons" in result.output, result.output
    assert len(COCO(tmp_path, "val2017", keys=("image", "caption", "segmentation"))) == 10


def test_a_failure_names_the_command_that_goes_on(ldm_edu, server, tmp_path):
    server.faults["/img_align_celeba.zip"] = [{"page": QUOTA}]
    result = ldm_edu("celeba", "--data-dir", tmp_path, "--subset", 10, "--yes")
    assert result.exit_code == 1 and "Traceback" not in result.output
    again = result.output.strip().splitlines()[-1].partition("go on with: ")[2]
    assert again == f"ldm-edu data celeba --data-dir {tmp_path} --subset 10"
    (tmp_path / "celeba/downloads/img_align_celeba.zip").write_bytes(server.files["/img_align_celeba.zip"])
    result = ldm_edu(*again.split()[2:])
    assert result.exit_code == 0 and len(faces(tmp_path)) == 10


def test_ctrl_c_says_how_to_go_on(ldm_edu, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm_edu.cli.download_celeba", stop)
    result = ldm_edu("celeba", "--data-dir", tmp_path, "--yes")
    assert result.exit_code == 130 and "the same command goes on" in result.output


def test_the_folder_of_the_settings_is_the_default(ldm_edu, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_EDU_DATA_DIR", str(tmp_path))
    assert ldm_edu("celeba", "--subset", 10, "--yes").exit_code == 0 and len(faces(tmp_path)) == 10
    result = ldm_edu("coco", "--split", "validation", "--yes")
    assert result.exit_code == 1 and "train2017 or val2017" in result.output
