"""Files of a published data set through the download manager of `datasets`, each checked against its published digest.

PhysioNet lists every file of a version with its SHA-256 in SHA256SUMS.txt, Zenodo every file of a record with its MD5
in the record's JSON. Single files are fetched instead of PhysioNet's zip: only those that a configuration reads, each
verified by itself, and after an interruption those that had arrived are not fetched again. The listing is a stranger's
text: no name in it leads out of the folder.
"""

import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import aiohttp
import datasets

PHYSIONET_URL = "https://physionet.org"
ZENODO_URL = "https://zenodo.org"
MAX_LISTING_BYTES = 2**28  # the longest, of MIMIC-IV-ECG with 1.6 million files, has some 200 MB
MAX_NAMED = 5  # files named in one message

_SHA256_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *]?(?P<path>\S.*)")
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class PublishedFile:
    """A file as its publisher lists it; `path` is relative to the data set's folder."""

    path: str
    url: str
    algorithm: str
    digest: str


def list_physionet(manager: datasets.DownloadManager, slug: str, version: str, base_url: str) -> list[PublishedFile]:
    """The files of a PhysioNet project.

    Raises:
        FileNotFoundError, ConnectionError: the listing cannot be had.
        ValueError: it is not one.
    """
    folder = f"{base_url.rstrip('/')}/files/{slug}/{version}"
    url = f"{folder}/SHA256SUMS.txt"

    def parse(text: str) -> Iterator[PublishedFile]:
        for line in text.splitlines():
            match = _SHA256_LINE.fullmatch(line)
            if match is None:
                raise ValueError(f"expected 'digest  path' in every line, found {line[:100]!r}")
            path = _plain(match["path"])
            yield PublishedFile(path, f"{folder}/{quote(path)}", "sha256", match["digest"])

    return _read_listing(manager, url, parse)


def list_zenodo(manager: datasets.DownloadManager, record: str, base_url: str) -> list[PublishedFile]:
    """The files of a Zenodo record.

    Raises:
        FileNotFoundError, ConnectionError: the listing cannot be had.
        ValueError: it is not one.
    """
    base_url = base_url.rstrip("/")

    def parse(text: str) -> Iterator[PublishedFile]:
        for file in json.loads(text)["files"]:
            algorithm, _, digest = file["checksum"].partition(":")
            if algorithm not in ("md5", "sha256"):
                raise ValueError(f"unknown digest {algorithm!r}")
            path = _plain(file["key"])
            yield PublishedFile(path, f"{base_url}/records/{record}/files/{quote(path)}", algorithm, digest)

    return _read_listing(manager, f"{base_url}/api/records/{record}", parse)


def fetch(manager: datasets.DownloadManager, files: Iterable[PublishedFile], folder: Path) -> None:
    """Download files, verify them and lay them out in `folder` under their own names.

    What is there already is not fetched again. A file whose digest is wrong is thrown away, all others are kept.

    Raises:
        FileNotFoundError, ConnectionError: a file cannot be had.
        ValueError: files do not have their published digest.
    """
    missing = [file for file in files if not (folder / file.path).is_file()]
    if not missing:
        return
    paths = _download(manager, [file.url for file in missing])
    wrong = []
    for file, path in zip(missing, paths, strict=True):
        if _digest(path, file.algorithm) != file.digest:
            os.remove(path)
            wrong.append(file.url)
            continue
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(path, target)
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(missing)} files do not have the digest that their publisher lists and were thrown "
            f"away: {', '.join(wrong[:MAX_NAMED])}; run again to fetch them again"
        )


def extract_member(archive: Path, member: str, folder: Path, max_bytes: int) -> Path:
    """One named file of a zip archive, written into `folder`; nothing else of the archive is touched.

    Raises:
        ValueError: it is not a sound zip archive, lacks the file, or the file is larger than `max_bytes`.
    """
    target = folder / PurePosixPath(member).name
    if target.is_file():
        return target
    partial = target.with_name(f"{target.name}.incomplete")
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as source, partial.open("wb") as sink:
            promised = opened.getinfo(member).file_size
            if promised > max_bytes:
                raise ValueError(f"{member} in {archive} is {promised} bytes long, expected at most {max_bytes}")
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)  # reads no more than promised and compares the checksum
        partial.replace(target)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive} is no sound zip archive with {member} in it: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _read_listing(
    manager: datasets.DownloadManager, url: str, parse: Callable[[str], Iterator[PublishedFile]]
) -> list[PublishedFile]:
    (path,) = _download(manager, [url])
    try:
        if os.path.getsize(path) > MAX_LISTING_BYTES:
            raise ValueError(f"it is longer than {MAX_LISTING_BYTES} bytes")
        return list(parse(Path(path).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        os.remove(path)  # or the next try would find it in the cache
        raise ValueError(f"{url} is not a listing of files that can be believed: {error!r}") from error


def _download(manager: datasets.DownloadManager, urls: list[str]) -> list[str]:
    try:
        return manager.download(urls)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the server has no {error}") from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ConnectionError(
            f"the download from {urls[0]} broke off ({type(error).__name__}: {error}); run again: files that had "
            "arrived are kept"
        ) from error


def _plain(path: str) -> str:
    """A path of a listing, which must stay inside its folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in parts[0] or "\0" in path:
        raise ValueError(f"it lists {path[:100]!r}, outside its own folder")
    return path


def _digest(path: str, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _link(source: str, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
