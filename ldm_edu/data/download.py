"""Data sets from the network: large files fetched over connections that break, checked, unpacked, and cut to a subset."""

# What the module does, and why:
#
# Resuming. Bytes go to `name.part`; the file gets its own name only when it is whole and checked, by a rename. After a
# break the rest is asked for, but only if the file at the server is still the same: its version (`ETag`, or the date of
# its last change) is noted beside the part and sent as `If-Range`. Where a server sends no version, a download goes on
# only if a checksum will tell in the end whether the pieces fit.
#
# Checks. A file that is not whole rarely looks broken. Sizes and checksums (SHA-256, or the MD5 sums that authors of
# older data sets have published) are compared before a file is used, also where it was there already.
#
# Pages in place of files. Google Drive, where CelebA lies, answers with a web page when too many people have taken a file
# (its quota), and so do networks that ask for a login. A page is never saved as a file: the error says what it tells. The
# form with which Drive asks whether to download a large file anyway is answered.
#
# Archives. One whose members would be written outside the folder (absolute names, `..`, links) is refused as a whole,
# before anything is written. Unpacking goes on after an interruption: a member that is there is whole.
#
# Subsets. Every beginning of the order of images is a fair sample of all splits, and is the same on every machine, so a
# larger subset contains the smaller one. The list files are cut to the images that are there, and written last.
#
# What is there stays. Images are never replaced or removed. A list file is overwritten only if this module wrote it and
# nobody has changed it since (`downloads/made.json` has the checksums).
#
# By hand. Where a program cannot get a file, the error says which page to open, which files to take, where to put them,
# and which command goes on from there.

import hashlib
import json
import lzma
import os
import re
import shlex
import shutil
import stat
import struct
import time
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import unescape
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ldm_edu.basics import progress
from ldm_edu.data.coco import COCO_FOLDERS
from ldm_edu.data.folders import name_bytes, split_by_name
from ldm_edu.errors import DownloadError, LDMError
from ldm_edu.files import BROKEN_NAME, appending, brief, copy_whole, folder_for, load_json, parse_json
from ldm_edu.files import printable, read_json, reading, remove_leftovers, save_json, write_bytes, write_text, writing

__all__ = ["fetch", "unpack", "download_celeba", "download_coco"]

# ---- Is this the file?


def checksum(
    path: str | Path,
    kind: str = "md5",  # or "sha256"
) -> str:
    "The checksum of a file in hexadecimal digits. The file is read in pieces, so it may be larger than the memory."
    new = {"md5": lambda: hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256}[kind]
    with reading(path, DownloadError), open(path, "rb") as file:
        return hashlib.file_digest(file, new).hexdigest()


def difference(
    path: str | Path,
    size: int | None = None,  # bytes
    md5: str | None = None,
    sha256: str | None = None,
) -> str | None:  # None where it does not differ in what is known
    "How a file differs from the published one: in size, or in a checksum (compared last, since it takes longest)."
    if size is not None and (there := Path(path).stat().st_size) != size:
        return f"has {there:,} bytes, not {size:,}"
    for kind, expected in (("sha256", sha256), ("md5", md5)):
        if expected is not None and (found := checksum(path, kind)) != expected.lower():
            return f"has the {kind} {found}, not {expected}"
    return None


# ---- Going on after a break


class _Interrupted(Exception):
    "A connection failed in a way that may pass: another try may succeed."

    def __init__(
        self,
        reason: str,
        wait: float = 0.0,  # seconds that the server asks us to wait
        stale: bool = False,  # are the bytes that came so far of no use?
    ):
        super().__init__(reason)
        self.wait, self.stale = wait, stale


# Behind the reason why a file could not be written.
_KEPT = ". Mend this or choose another folder: what came so far is kept, and the same command goes on from there"


def _number(text: str) -> int | None:
    "A whole number in a header of a server; None where something else stands there."
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _length(response: HTTPResponse) -> int | None:
    "Bytes of the whole file, of which a response is all or a part; None where the server does not say."
    if response.status == 206:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        length = response.headers.get("Content-Length", "")
    return _number(length)


@dataclass
class Partial:
    "An unfinished download: the bytes so far, and beside them a note of their address and version."

    path: Path  # of the bytes so far
    url: str
    checked: bool  # will a checksum tell in the end whether the pieces fit?

    @property
    def note(self) -> Path:
        "The file with the address and version of the bytes."
        return self.path.with_name(self.path.name + ".json")

    @property
    def have(self) -> int:
        "The number of bytes that are there."
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> dict[str, Any]:
        "The note on the bytes that are there; {} where there are none, or where they come from another address."
        try:
            known = load_json(self.note) if self.have else {}
        except LDMError:
            known = {}
        return known if known.get("url") == self.url else {}

    def drop_links(self) -> None:
        "Begin anew where somebody has put a link under the name of a part: what comes would be written elsewhere."
        if self.path.is_symlink() or self.note.is_symlink():
            self.drop()

    def drop(self) -> None:
        "Delete what came so far."
        for path in (self.path, self.note):
            path.unlink(missing_ok=True)

    def headers(self) -> dict[str, str]:
        """Headers that ask for the rest if the file at the server is still of the same version.

        {} asks for the whole file: nothing is there yet, or neither a version nor a checksum would tell whether
        the pieces fit. A weak ETag (W/...) promises the same meaning, not the same bytes, and is not used.
        """
        version = self.version()
        tag = version.get("etag") or ""
        same = tag if tag.startswith('"') else version.get("modified")
        if not version or not (same or self.checked):
            return {}
        return {"Range": f"bytes={self.have}-"} | ({"If-Range": same} if same else {})

    def begin(self, response: HTTPResponse) -> int | None:  # bytes of the whole file, where known
        """Keep the bytes that are there if the response goes on from them, else delete them and start again.

        Status 206 announces the rest. It is accepted only if version and size agree with the note, and if the rest
        begins where the bytes end; _Interrupted where they do not. Any other status brings the whole file.
        """
        get, before = response.headers.get, self.version()
        now = {"url": self.url, "etag": get("ETag"), "modified": get("Last-Modified"), "size": _length(response)}
        if response.status == 206:
            changed = [key for key in now if now[key] and before.get(key) and now[key] != before[key]]
            if changed or not get("Content-Range", "").startswith(f"bytes {self.have}-"):
                raise _Interrupted("the file has changed at the server since the first part came", stale=True)
            return now["size"] or before.get("size")
        self.drop()
        write_text(json.dumps(now), self.note, DownloadError, sync=False)  # one for each of thousands of images
        return now["size"]


# ---- Answers that are no file


_QUOTA = re.compile(r"quota exceeded|too many users have viewed or downloaded", re.I)


def _page_message(page: str) -> str:
    "What a web page that came in place of a file tells: that a quota is used up, or its title."
    if _QUOTA.search(page):
        return "Google Drive's limit for this file is used up, many people took it; it usually opens again within a day"
    title = re.search(r"<title[^>]*>(.*?)</title>", page, re.S | re.I)
    named = f' ("{printable(" ".join(unescape(title[1]).split()))[:200]}")' if title else ""
    return f"a web page came in place of the file{named}; does this network, or the publisher, ask for a login?"


def _confirmed_address(page: str) -> str | None:
    "The address behind the button `download anyway` of Google Drive; None where the page has no such form."
    form = re.search(r'<form[^>]*id="download-form"[^>]*action="([^"]+)"(.*?)</form>', page, re.S)
    if form is None:
        return None
    fields = re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', form[2])
    return unescape(form[1]) + "?" + urlencode([(name, unescape(value)) for name, value in fields])


_PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses of errors that may pass
_STATUS_MEANINGS = {
    401: "asks for a login",
    403: "refuses to give it",
    404: "has no such file",
    410: "no longer has it",
    429: "asks for a pause",
    503: "is overloaded",
}
_LONGEST_WAIT = 60.0  # seconds, even if a server asks for more
_PAGE_BYTES = 1 << 18  # of a web page, that are read


def _http_error(error: HTTPError, url: str) -> DownloadError | _Interrupted:
    "The error for an HTTP status: _Interrupted where another try may succeed, else DownloadError."
    said = f"{urlsplit(url).netloc} {_STATUS_MEANINGS.get(error.code, 'failed')} ({error.code} {printable(str(error.reason))})"
    page = error.read(_PAGE_BYTES).decode(errors="replace")
    after = error.headers.get("Retry-After", "")
    if _QUOTA.search(page):
        return DownloadError(f"{url}: {_page_message(page)}")
    # 416: the part that is here is longer than the file at the server.
    if error.code in _PASSING_STATUSES or error.code == 416:
        wait = min(float(_number(after) or 0), _LONGEST_WAIT)
        return _Interrupted(said, wait, stale=error.code == 416)
    return DownloadError(f"{url}: {said}; was it moved?")


def _check_address(url: str) -> str:
    "`url`, where it is an address in the web; else DownloadError."
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as http://[::1
        is_right = False
    if not is_right or re.search(r"[^!-~]", url):  # a blank, a control character, or a letter beyond ASCII
        raise DownloadError(
            f"url should begin with http:// or https:// and a server, with %20 and the like for other letters than "
            f"those of ASCII, not {printable(repr(url))}"
        )
    return url


class _WebOnly(HTTPRedirectHandler):
    "Follows a redirect to http:// and https:// only; the one of urllib goes to ftp:// too."

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        return super().redirect_request(req, fp, code, msg, headers, _check_address(newurl))


def _open(url: str, headers: dict[str, str], timeout: float) -> HTTPResponse:
    "The answer of a server that is all of a file or a part; _Interrupted or DownloadError where it is none."
    request = Request(_check_address(url), headers={"User-Agent": "ldm_edu"} | headers)
    try:
        response = build_opener(_WebOnly).open(request, timeout=timeout)
    except HTTPError as error:
        with error:
            raise _http_error(error, url) from error
    except LDMError:
        raise
    except ValueError as error:  # from urllib, for what is no address
        raise DownloadError(f"{url} leads to something that is no address ({brief(error)})") from error
    if response.status not in (200, 206):  # such as 204, an answer without content
        with response:
            raise _Interrupted(f"{urlsplit(url).netloc} sent no file (status {response.status})")
    return response


def _connect(url: str, headers: dict[str, str], timeout: float) -> HTTPResponse:
    "A response with a file; _Interrupted or DownloadError where the server sends an error or a web page."
    page = ""
    for _ in range(2):  # the second time for the address behind a form
        response = _open(url, headers, timeout)
        if response.headers.get_content_type() != "text/html":
            return response
        with response:
            page = response.read(_PAGE_BYTES).decode(errors="replace")
        if (form := _confirmed_address(page)) is None:
            break
        url = form
    raise DownloadError(f"{url}: {_page_message(page)}")


# ---- Fetching


_BLOCK_BYTES = 1 << 20  # read at a time


def _as_bytes(n: int | float) -> str:
    "A number of bytes as text, such as 1.4 GB."
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def _check_room(folder: Path, need: int) -> None:
    "DownloadError where the disk has less than `need` bytes left."
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DownloadError(
            f"{folder}: {_as_bytes(need)} more are needed, and the disk has {_as_bytes(free)} left; "
            "make room, or choose another folder"
        )


def _receive(
    partial: Partial,  # new bytes are appended to it
    size: int | None,  # bytes of the whole file, where that is known from elsewhere
    timeout: float,  # seconds without a byte
) -> None:
    "Receive a file over one connection. _Interrupted where another may bring more; what came until then is kept."
    try:
        with _connect(partial.url, partial.headers(), timeout) as response:
            total = partial.begin(response)
            if None not in (size, total) and size != total:
                raise DownloadError(f"{partial.url} has {total:,} bytes now, not {size:,}: another file lies there")
            left = max((total or 0) - partial.have, 0)
            _check_room(partial.path.parent, left)
            blocks = iter(lambda: response.read(_BLOCK_BYTES), b"")
            if left > _BLOCK_BYTES:
                blocks = progress(blocks, f"{partial.path.stem}, MiB", -(-left // _BLOCK_BYTES))
            with appending(partial.path, DownloadError, _KEPT) as append:
                for block in blocks:
                    append(block)
    except (OSError, HTTPException) as error:
        reason = printable(str(getattr(error, "reason", error)))
        raise _Interrupted(f"no connection to {urlsplit(partial.url).netloc} ({reason})") from error
    if total is not None and partial.have < total:
        raise _Interrupted(f"the connection broke after {partial.have:,} of {total:,} bytes")
    if not partial.have and size is None and not partial.checked:  # nothing says that an empty file is meant
        raise _Interrupted(f"{urlsplit(partial.url).netloc} sent an empty file")


def fetch(
    url: str,
    path: str | Path,  # of the finished file
    sha256: str | None = None,  # checksums, where they are known
    md5: str | None = None,
    size: int | None = None,  # bytes, where that is known
    tries: int = 4,  # give up after so many tries that bring nothing new
    wait: float = 1.0,  # seconds before the second try; doubled each time
    timeout: float = 30.0,  # seconds without a byte
) -> Path:
    """Download `url` to `path`, unless it is there. Goes on with an interrupted download.

    A file appears at `path` only when it is whole and has the size and the checksums that are given; an empty one only
    where one of them says so. What came of an unfinished one is kept in `<path>.part`. DownloadError says what is wrong and what to do: a file that is there
    and differs, a page in place of a file (a login, Google Drive's quota), a server that refuses or breaks off
    `tries` times in a row, a full disk.
    """
    path = Path(path)
    is_known = size is not None or bool(md5 or sha256)
    if path.exists() and not path.is_file():
        raise DownloadError(f"{path} is a folder, or something else that is no file: remove it, or choose another name")
    if path.exists() and (is_known or path.stat().st_size):  # an empty file is what a power cut leaves of one
        if differs := difference(path, size, md5, sha256):
            raise DownloadError(f"{path} {differs}: it is not whole, or another file; remove it and try again")
        return path
    _check_address(url)
    with writing(path, DownloadError, _KEPT):
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = Partial(path.with_name(path.name + ".part"), url, checked=bool(md5 or sha256))
    partial.drop_links()
    _complete(partial, size, tries, wait, timeout)
    if differs := difference(partial.path, size, md5, sha256):
        partial.drop()
        raise DownloadError(
            f"{url}: what came {differs}, and was thrown away; try again, and if that changes nothing, "
            "the publisher has put another file there"
        )
    with writing(path, DownloadError, _KEPT):
        os.replace(partial.path, path)
    partial.drop()
    return path


def _complete(partial: Partial, size: int | None, tries: int, wait: float, timeout: float) -> None:
    "Connect until the file is whole; DownloadError after `tries` connections in a row that brought nothing new."
    failures = 0
    most = partial.have
    while not partial.have or partial.have != partial.version().get("size"):
        try:
            return _receive(partial, size, timeout)
        except _Interrupted as interruption:
            if interruption.stale:
                partial.drop()
            failures = 0 if partial.have > most else failures + 1
            most = max(most, partial.have)
            if failures >= tries:
                raise DownloadError(f"{partial.url}: {interruption}; tried {tries} times") from interruption
            time.sleep(max(interruption.wait, wait * 2 ** max(failures - 1, 0)))


def fetch_all(
    addresses: Mapping[Path, str],  # for the path of every file its address
    workers: int = 8,  # connections at a time
) -> None:
    "Download many small files, several at a time. The first failure ends it; files that have arrived stay."
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(fetch, url, path) for path, url in addresses.items()]
        try:
            for job in progress(as_completed(jobs), "images", len(jobs)):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---- Unpacking


def _stays_inside(member: zipfile.ZipInfo) -> bool:
    "Would a member of an archive be written inside the folder? Not if it is a link or its name leads elsewhere."
    name = member.filename.replace("\\", "/")
    link = stat.S_ISLNK(member.external_attr >> 16)
    return bool(name) and not (link or name.startswith("/") or ":" in name or ".." in name.split("/"))


_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, LookupError, ValueError)
_DAMAGED += (OverflowError, RuntimeError)  # RuntimeError: a password, or a compression that is not known


@contextmanager
def _reading(archive: Path) -> Iterator[zipfile.ZipFile]:
    "An open zip archive; DownloadError names one that is missing, damaged, or with a member outside the folder."
    with reading(archive, DownloadError, "zip archive"), open(archive, "rb"):
        pass  # what the system refuses has other remedies than a damaged archive
    try:
        with zipfile.ZipFile(archive) as file:
            if bad := [member.filename for member in file.infolist() if not _stays_inside(member)]:
                raise DownloadError(
                    f"{archive}: its member {bad[0]!r} would be written outside the folder. This is "
                    "not the official file: remove it. Nothing was unpacked"
                )
            yield file
    except LDMError:
        raise
    except _DAMAGED as error:
        raise DownloadError(
            f"{archive} is not a whole zip archive ({brief(error)}); remove it and get it again"
        ) from error


def _is_there(path: Path, size: int) -> bool:
    "Is a member of an archive there already? An empty file in its place is what a power cut leaves of one."
    return path.exists() and (not size or not path.is_file() or path.stat().st_size > 0)


def unpack(
    archive: str | Path,  # a zip file
    folder: str | Path,  # where its members go, under their own names
    wanted: Callable[[str], bool] = lambda name: not name.startswith("__MACOSX/"),  # which members
) -> list[Path]:  # of all wanted members, also of those that were there
    """Unpack the wanted members that are not there yet. Files that are there stay as they are.

    DownloadError where the archive is damaged, where the disk has no room, or where a member would be written
    outside the folder (an absolute name, `..`, a link). In the last two cases nothing is unpacked.
    """
    archive, folder = Path(archive), Path(folder)
    with _reading(archive) as file:
        members = [member for member in file.infolist() if not member.is_dir() and wanted(member.filename)]
        todo = [member for member in members if not _is_there(folder / member.filename, member.file_size)]
        parents = {(folder / member.filename).parent for member in todo} | {folder}
        for parent in sorted(parents):
            folder_for(parent / "file", DownloadError)
        if todo:
            remove_leftovers(folder)
        _check_room(folder, sum(member.file_size for member in todo))
        for member in progress(todo, f"unpacking {archive.name}"):
            path = folder / member.filename
            with writing(path, DownloadError, _KEPT), file.open(member) as source:
                copy_whole(source, path, sync=False)  # to wait for the disk is too slow for 200,000 images
    return [folder / member.filename for member in members]


# ---- Subsets


def fair_order(
    groups: Mapping[str, str],  # for every file name, its split
) -> list[str]:
    """All names in an order of which every beginning is a fair sample: shuffled, with the splits in their proportions.

    Each split is shuffled by a checksum of the names, so that the order is the same on every machine. The k-th of the
    N files of a split, counted from 0, gets the place (k + 1/2) / N, and the order is that of the places. In every
    beginning, each of three splits is less than one file away from its share.
    """
    members = defaultdict(list)
    for name in sorted(groups, key=lambda name: (zlib.crc32(name_bytes(name)), name)):
        members[groups[name]].append(name)
    place = {name: (k + 0.5) / len(names) for names in members.values() for k, name in enumerate(names)}
    return sorted(place, key=lambda name: (place[name], name))


def subset_list(
    text: str,  # one of CelebA's lists: a file name at the beginning of each line
    names: Sequence[str],  # of the files that stay
) -> str:
    "The lines of a list that belong to `names`. Where the list begins with a count, the count is adjusted."
    lines = text.splitlines(keepends=True)
    kept = set(names)
    header = 2 if lines and _number(lines[0].strip()) is not None else 0
    rows = [line for line in lines[header:] if line.split()[:1] and line.split()[0] in kept]
    if header:
        lines[0] = lines[0].replace(lines[0].strip(), str(len(rows)))
    return "".join(lines[:header] + rows)


def subset_annotations(
    content: dict[str, Any],  # of one of COCO's JSON files
    names: Sequence[str],  # file names of the images that stay
) -> dict[str, Any]:
    "The entries of some images, and their annotations; licences, categories and everything else stay."
    kept = set(names)
    images = [image for image in content["images"] if image["file_name"] in kept]
    numbers = {image["id"] for image in images}
    notes = [note for note in content["annotations"] if note["image_id"] in numbers]
    return content | {"images": images, "annotations": notes}


# ---- Where the official files are


@dataclass(frozen=True)
class Remote:
    "A published file: its address, and how it is recognised."

    name: str
    url: str
    size: int | None = None  # bytes
    md5: str | None = None
    sha256: str | None = None
    page: str = ""  # the web page where a person finds it
    listed: str = ""  # its name on that page

    def difference(self, path: Path) -> str | None:
        "How a file differs from this one; None where it does not."
        return difference(path, self.size, self.md5, self.sha256)


_DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
_CELEBA_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
_CELEBA_FILES = {  # name on the page, and bytes as TensorFlow Datasets has recorded them
    "list_attr_celeba.txt": ("Anno/list_attr_celeba.txt", 26_721_026),
    "list_eval_partition.txt": ("Eval/list_eval_partition.txt", 2_836_386),
    "img_align_celeba.zip": ("Img/img_align_celeba.zip", 1_443_490_838),
}


def celeba_files(
    server: str = _DRIVE,  # the beginning of an address, before the file's id
) -> dict[str, Remote]:
    "CelebA's official files, by name. Their ids on Google Drive and MD5 sums are those that torchvision knows."
    from torchvision.datasets import CelebA

    known = {name: (number, md5) for number, md5, name in CelebA.file_list}
    if lacking := set(_CELEBA_FILES) - set(known):
        raise DownloadError(f"this torchvision does not know of {', '.join(sorted(lacking))}; see {_CELEBA_PAGE}")
    return {
        name: Remote(name, server + known[name][0], size, known[name][1], page=_CELEBA_PAGE, listed=listed)
        for name, (listed, size) in _CELEBA_FILES.items()
    }


_COCO_SERVER = "http://images.cocodataset.org"  # not https: its certificate has another name
_COCO_PAGE = "https://cocodataset.org/#download"
COCO_FILES = {  # folder at the server, bytes, SHA-256
    "train2017.zip": ("zips", 19_336_861_798, "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    "val2017.zip": ("zips", 815_585_330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
    "annotations_trainval2017.zip": (
        "annotations",
        252_907_541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    ),
    "panoptic_annotations_trainval2017.zip": (
        "annotations",
        860_725_834,
        "c05f76d2129b6b561eb70efe16e7006df62f73fb92889132d373b9d90e31a370",
    ),
}


def coco_files(server: str = _COCO_SERVER) -> dict[str, Remote]:
    "COCO's official files, by name. Sizes and SHA-256 sums are those that TensorFlow Datasets has recorded."
    return {
        name: Remote(name, url := f"{server}/{folder}/{name}", size, sha256=sha256, page=_COCO_PAGE, listed=url)
        for name, (folder, size, sha256) in COCO_FILES.items()
    }


# ---- Terms, and a folder for each data set


TERMS = {
    "celeba": """CelebA, terms in short (the agreement: https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html):
  - for non-commercial research only, and so is what you derive from it;
  - the images are not to be copied, sold, published or passed on, whole or in part;
  - its authors own none of the images and are not liable for them; they may end your access at any time.
  They show real people: show them to as few as your work needs.""",
    "coco": """COCO, terms in short (https://cocodataset.org/#termsofuse):
  - the annotations are under Creative Commons Attribution 4.0: name the COCO Consortium where you use them;
  - COCO owns none of the images: each has a licence of its own (`images[].license` in the annotations), and
    Flickr's terms of use apply to them. Some licences forbid commercial use.""",
}
_INSIDE = {"celeba": "img_align_celeba", "coco": "annotations"}  # a folder by which the data set is recognised


def dataset_folder(
    name: str,  # "celeba" or "coco"
    data_dir: str | Path,
) -> Path:
    "The data set's folder: `data_dir` itself where the data set lies there already, else a folder in it."
    check_request(name)
    try:
        data_dir = Path(data_dir).expanduser()
        with suppress(OSError):
            os.lstat(data_dir)  # the system knows names that cannot be
    except BROKEN_NAME as error:
        raise DownloadError(f"data_dir {str(data_dir)!r} is no name that a folder can have ({error})") from error
    return data_dir if (data_dir / _INSIDE[name]).is_dir() else data_dir / name


def check_request(
    name: str,  # "celeba" or "coco"
    split: str | None = None,  # None: not said
    panoptic: bool = False,
) -> None:
    "DownloadError where there is no such data set, or no such split or maps of it: before anybody is asked for terms."
    if name not in _INSIDE:
        raise DownloadError(f"data set {name!r} cannot be downloaded; known: {', '.join(_INSIDE)}")
    if name != "coco" and (split is not None or panoptic):
        raise DownloadError(f"split and panoptic are for coco only: {name} comes as one archive, without them")
    if name == "coco" and split not in (None, *COCO_FOLDERS):
        raise DownloadError(f"split should be {' or '.join(COCO_FOLDERS)}, not {split!r}")


def terms_accepted(name: str, data_dir: str | Path) -> bool:
    "Were the data set's terms, in the form that they have here, accepted for this folder?"
    path = dataset_folder(name, data_dir) / "downloads" / "terms.json"
    return path.exists() and load_json(path).get("accepted") == TERMS[name]


def accept_terms(name: str, data_dir: str | Path) -> None:
    "Note in the data set's folder that its terms were accepted."
    path = dataset_folder(name, data_dir) / "downloads" / "terms.json"
    folder_for(path, DownloadError)
    save_json({"accepted": TERMS[name]}, path)


# ---- Getting files, by program or by hand


def _manual_steps(
    missing: Sequence[Remote],
    folder: Path,  # where they should go
    again: str,  # the command that goes on from there
) -> str:
    "Instructions for getting files with a browser, where a program cannot get them."
    files = "".join(f"\n       {r.listed or r.url}{f' ({_as_bytes(r.size)})' if r.size else ''}" for r in missing)
    return (
        f"By hand it goes like this:\n"
        f"  1. open {missing[0].page or missing[0].url} in a browser\n"
        f"  2. take{files}\n"
        f"  3. put {'them' if len(missing) > 1 else 'it'} into {folder}, still packed, under the same name\n"
        f"  4. go on with: {again}"
    )


@dataclass(frozen=True)
class _Place:
    "The folder of a data set, and the command that goes on with its download."

    root: Path
    again: str

    @property
    def downloads(self) -> Path:
        "The folder where the official files are kept as they came."
        return self.root / "downloads"

    def find(self, remote: Remote) -> Path | None:
        "The official file where it is here already, else None; DownloadError where another file has its name."
        for path in (self.downloads / remote.name, self.root / remote.name):
            if not path.exists():
                continue
            if not (differs := remote.difference(path)):
                return path
            # A list beside the images may differ: it may be cut to a subset.
            if path.parent == self.downloads or path.suffix == ".zip":
                raise DownloadError(f"{path} {differs}: it is not whole, or another file. Remove it")
        return None

    @contextmanager
    def or_by_hand(self, *missing: Remote) -> Iterator[None]:
        "Adds to a DownloadError inside how a person gets the missing files."
        try:
            yield
        except DownloadError as error:
            raise DownloadError(f"{error}\n{_manual_steps(missing, self.downloads, self.again)}") from error

    def obtain(
        self,
        *remotes: Remote,  # what is needed now
        later: Sequence[Remote] = (),  # what will be needed afterwards: instructions by hand name all of it at once
    ) -> list[Path]:
        "Official files, found here or fetched. Where that fails, the error says how to get them by hand."
        paths = []
        for i, remote in enumerate(remotes):
            others = (*remotes[i + 1 :], *later)
            missing = [r for r in others if not any((p / r.name).exists() for p in (self.downloads, self.root))]
            with self.or_by_hand(remote, *missing):
                found, path = self.find(remote), self.downloads / remote.name
                paths.append(found or fetch(remote.url, path, remote.sha256, remote.md5, remote.size))
        return paths

    def absent(self, folder: str, names: Sequence[str]) -> list[str]:
        "The files that are not in a folder."
        path, there = self.root / folder, set()
        if path.is_dir():
            with reading(path, DownloadError, "folder"), os.scandir(path) as entries:
                # An empty file is what a power cut leaves of one. (A link that leads nowhere is somebody's own.)
                there = {entry.name for entry in entries if not entry.is_file() or entry.stat().st_size}
        return [name for name in names if name not in there]


# ---- List files, of which only our own are overwritten


def _content(path: Path) -> bytes | None:
    "The bytes of a file; None where there is none."
    if not path.exists():
        return None
    with reading(path, DownloadError):
        return path.read_bytes()


@dataclass(frozen=True)
class _ListFiles:
    "The list files of a data set in `root`. Only lists that this module wrote are ever overwritten."

    root: Path

    @property
    def record(self) -> Path:
        "The file with a record of the lists written here: for each its MD5 sum, and whether it was cut to a subset."
        return self.root / "downloads" / "made.json"

    def made(self) -> dict[str, dict]:
        "The record of written lists; {} where there is none."
        known = load_json(self.record) if self.record.exists() else {}
        return {name: mark for name, mark in known.items() if isinstance(mark, dict)}

    def is_ours(self, name: str) -> bool:
        "Was this list written here, and is it unchanged since?"
        path, mark = self.root / name, self.made().get(name)
        return mark is not None and path.exists() and mark.get("md5") == checksum(path)

    def was_cut(self, name: str) -> bool:
        "Was this list written here and cut to a subset?"
        return self.is_ours(name) and self.made()[name].get("cut") is not False

    def plan(
        self,
        official: Mapping[str, bytes],  # lists as they were published, by their path in `root`
        cut: Callable[[bytes], bytes] | None,  # cuts a list to the wanted images; None: all are wanted
    ) -> dict[str, bytes]:
        """What the lists should hold: the official content where it is there already, else the content after `cut`.

        DownloadError where a list is there that was not written here. This is asked before any image is fetched.
        """
        planned = {}
        for name, content in official.items():
            path = self.root / name
            there = _content(path)
            planned[name] = content if cut is None or there == content else cut(content)
            if there not in (None, planned[name]) and not self.is_ours(name):
                raise DownloadError(
                    f"{path} is there, and was not made by this command, so it is not overwritten: "
                    "move it away, or choose another folder with --data-dir"
                )
        return planned

    def write(
        self,
        planned: Mapping[str, bytes],  # from `plan`
        official: Mapping[str, bytes],  # that `plan` was given
    ) -> None:
        "Write the lists that are not there in this form, and record that they were written here."
        for name, content in planned.items():
            path = self.root / name
            if _content(path) == content:
                continue
            for place in (path, self.record):
                folder_for(place, DownloadError)
            write_bytes(content, path, DownloadError)
            mark = {"md5": checksum(path), "cut": content != official[name]}
            save_json(self.made() | {name: mark}, self.record)


# ---- CelebA


def _command(name: str, data_dir: str | Path, **options: object) -> str:
    "The command line that does the same as a function here; options that are None or False are left out."
    words = ["ldm-edu", "data", name, "--data-dir", str(data_dir)]
    for option, value in options.items():
        if value is not None and value is not False:
            words += [f"--{option}"] if value is True else [f"--{option}", str(value)]
    return shlex.join(words)


def _check_n(n: int | None) -> None:
    "DownloadError where `n` is no number of images."
    if n is not None and n < 1:
        raise DownloadError(f"n should be a number of images of at least 1, or None for all, not {n}")


def _listed_files(text: str) -> list[str]:
    "The file names in one of CelebA's lists."
    rows = [line.split() for line in text.splitlines() if line.strip()]
    return [row[0] for row in (rows[2:] if rows and len(rows[0]) == 1 else rows)]


def _is_complete(
    place: _Place,
    listing: str,  # the list that says what belongs to the data set
    names: Sequence[str],  # the images that it names
    folder: str,  # where they are
    n: int | None,  # how many are wanted; None: all
) -> bool:
    "Are all wanted images there? Then nothing is fetched, and no network is needed."
    there = len(names) - len(place.absent(folder, names))
    whole = there == len(names) > 0 and not _ListFiles(place.root).was_cut(listing)
    return whole or (n is not None and there >= n)


def _choose_names(
    place: _Place,
    folder: str,  # where the images are
    groups: Mapping[str, str],  # for every image of the data set, its split
    n: int | None,  # how many are wanted; None: all
) -> list[str]:
    "The first `n` images in the fair order, and all that are there already: a subset grows and never shrinks."
    absent = set(place.absent(folder, list(groups)))
    return [name for i, name in enumerate(fair_order(groups)) if n is None or i < n or name not in absent]


def _unpack_missing(
    place: _Place,
    folder: str,  # where the images should be
    names: Sequence[str],  # that are wanted
    archive: Remote,  # that has them
    found: Path | None = None,  # the archive here, where it was found already
) -> None:
    "Unpack the images that are not there yet from an official archive."
    if not (missing := place.absent(folder, names)):
        return
    path = found or place.obtain(archive)[0]
    unpack(path, place.root, {f"{folder}/{name}" for name in missing}.__contains__)
    if lacking := place.absent(folder, names):
        first = printable(lacking[0])
        raise DownloadError(f"{path} lacks {len(lacking)} images, first {folder}/{first}; is it official?")


def download_celeba(
    data_dir: str | Path,  # the data set goes into `celeba` in it
    n: int | None = None,  # how many images; None: all 202,599
    files: Mapping[str, Remote] | None = None,  # where the official files lie; default: `celeba_files()`
) -> Path:  # the data set's folder, for `CelebA`
    """CelebA, or `n` of its images with the lists cut to them. See `TERMS`: by calling this you accept them.

    What is there already is not fetched again; a larger `n` adds images. The lists are written last, so that they
    never name an image that has not arrived. DownloadError says how to get by hand what cannot be fetched.
    """
    _check_n(n)
    place = _Place(dataset_folder("celeba", data_dir), _command("celeba", data_dir, subset=n))
    attributes = "list_attr_celeba.txt"
    partition = "list_eval_partition.txt"
    folder = "img_align_celeba"
    path = place.root / attributes
    before = _listed_files((_content(path) or b"").decode(errors="replace"))
    if _is_complete(place, attributes, before, folder, n):
        return place.root
    files = files or celeba_files()
    archive = files["img_align_celeba.zip"]
    paths = place.obtain(files[attributes], files[partition], later=[archive])
    texts = {name: _content(path) or b"" for name, path in zip((attributes, partition), paths)}
    splits = dict(line.split() for line in texts[partition].decode().splitlines() if line.strip())
    chosen = _choose_names(place, folder, splits, n)
    fewer = None if len(chosen) == len(splits) else lambda text: subset_list(text.decode(), chosen).encode()
    planned = _ListFiles(place.root).plan(texts, fewer)
    _unpack_missing(place, folder, chosen, archive)
    _ListFiles(place.root).write(planned, texts)
    return place.root


# ---- COCO


_SINGLE_FETCH_SHARE = 0.25  # up to this share of all images, images are fetched one by one


def _member(archive: Path, name: str) -> bytes:
    "The content of one file in an archive."
    with _reading(archive) as file:
        if name not in file.namelist():
            raise DownloadError(f"{archive} lacks {name}; is it the official one?")
        return file.read(name)


@contextmanager
def _coco_form(path: str | Path) -> Iterator[None]:
    "DownloadError in place of what goes wrong inside because a JSON file has not the form of COCO's."
    try:
        yield
    except LDMError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        told = f"something lacks {error}" if isinstance(error, KeyError) else brief(error)
        raise DownloadError(
            f"{path} has not the form of COCO's file ({told}): move it away, and this command makes it anew"
        ) from error


def _file_names(content: dict[str, Any], name: str) -> list[str]:
    "The file names in a list of one of COCO's files; ValueError where one is no plain name."
    names = [entry["file_name"] for entry in content[name]]
    for found in names:
        if not isinstance(found, str) or not found.isprintable() or Path(found).name != found or "\\" in found:
            raise ValueError(f"{printable(repr(found))} is no plain file name")
    return names


def _addresses(captions: bytes, path: str) -> dict[str, str]:
    "The address of each image, by its file name, from the content of COCO's file of captions."
    with _coco_form(path):
        content = parse_json(captions)
        return dict(zip(_file_names(content, "images"), (image["coco_url"] for image in content["images"])))


def _as_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()


def _coco_images(
    place: _Place,
    split: str,  # the images' folder
    names: Sequence[str],  # of the wanted images
    addresses: Mapping[str, str],  # of all images
    archive: Remote,  # with all images
) -> None:
    "Get the images that are not there yet: one by one if they are few and the archive is not here, else from it."
    missing = place.absent(split, names)
    found = None
    with place.or_by_hand(archive):
        found = place.find(archive) if missing else None
        if missing and found is None and len(missing) <= _SINGLE_FETCH_SHARE * len(addresses):
            fetch_all({place.root / split / name: addresses[name] for name in missing})
    _unpack_missing(place, split, names, archive, found)


def _coco_maps(
    place: _Place,
    split: str,
    panoptic: dict[str, Any],  # the content of the JSON file, cut to what is wanted
    archive: Path,  # panoptic_annotations_trainval2017.zip, which has an archive of the maps in it
) -> None:
    "Unpack the panoptic maps that are not there yet. The inner archive is removed afterwards."
    names = [note["file_name"] for note in panoptic["annotations"]]
    missing = {f"panoptic_{split}/{name}" for name in place.absent(f"annotations/panoptic_{split}", names)}
    if not missing:
        return
    [inner] = unpack(archive, place.downloads, f"annotations/panoptic_{split}.zip".__eq__) or [None]
    if inner is None:
        raise DownloadError(f"{archive} lacks annotations/panoptic_{split}.zip; is it the official one?")
    unpack(inner, place.root / "annotations", missing.__contains__)
    inner.unlink()
    if lacking := place.absent(f"annotations/panoptic_{split}", names):
        first = printable(lacking[0])
        raise DownloadError(f"{archive} lacks {len(lacking)} of the maps, first {first}; is it the official one?")


def _coco_is_complete(place: _Place, split: str, where: Mapping[str, str], n: int | None) -> bool:
    "Is everything there that was asked for: the list of each kind, the images, and with `panoptic` the maps?"
    paths = {kind: place.root / path for kind, path in where.items()}
    if not all(path.exists() for path in paths.values()):
        return False
    lists = {kind: read_json(path, DownloadError) for kind, path in paths.items()}
    names, maps = [], []
    for kind, content in lists.items():
        with _coco_form(paths[kind]):
            names = _file_names(content, "images") if kind == "captions" else names
            maps = _file_names(content, "annotations") if kind == "panoptic" else maps
    drawn = not maps or not place.absent(f"annotations/panoptic_{split}", maps)
    return drawn and _is_complete(place, where["captions"], names, split, n)


def download_coco(
    data_dir: str | Path,  # the data set goes into `coco` in it
    split: str = "val2017",  # or "train2017"
    n: int | None = None,  # how many images; None: all 5,000 or 118,287
    panoptic: bool = False,  # also the maps of what each pixel shows? They are 861 MB more
    files: Mapping[str, Remote] | None = None,  # where the official files lie; default: `coco_files()`
) -> Path:  # the data set's folder, for `COCO`
    """COCO 2017, or `n` of its images with JSON files cut to them. See `TERMS`: by calling this you accept them.

    Annotations come whole and are cut here. Up to a quarter of the images are fetched one by one, more of them come
    in the official archive. What is there already is not fetched again; the JSON files are written last.
    DownloadError says how to get by hand what cannot be fetched.
    """
    _check_n(n)
    check_request("coco", split)
    place = _Place(
        dataset_folder("coco", data_dir), _command("coco", data_dir, split=split, subset=n, panoptic=panoptic)
    )
    lists = _ListFiles(place.root)
    kinds = ("captions", "instances", "panoptic") if panoptic else ("captions", "instances")
    where = {kind: f"annotations/{kind}_{split}.json" for kind in kinds}
    if _coco_is_complete(place, split, where, n):
        return place.root
    files = files or coco_files()
    archives = [files[f"{word}annotations_trainval2017.zip"] for word in ("", "panoptic_")[: 1 + panoptic]]
    paths = place.obtain(*archives, later=[files[f"{split}.zip"]])
    official = {path: _member(paths[kind == "panoptic"], path) for kind, path in where.items()}
    addresses = _addresses(official[where["captions"]], f"{paths[0]}/{where['captions']}")
    chosen = _choose_names(place, split, {name: split_by_name(name) for name in addresses}, n)
    fewer = (
        None if len(chosen) == len(addresses) else lambda text: _as_json(subset_annotations(parse_json(text), chosen))
    )
    planned = lists.plan(official, fewer)
    _coco_images(place, split, chosen, addresses, files[f"{split}.zip"])
    if panoptic:
        _coco_maps(place, split, parse_json(planned[where["panoptic"]]), paths[1])
    lists.write(planned, official)
    return place.root
