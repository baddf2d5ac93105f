"""Downloads over a real HTTP server on this machine: whole, cut off, missing, damaged, and listings that lie."""

import hashlib
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest

from data_builders import find_builder
from data_builders.downloads import extract_member
from tests.mini_sets import write_cinc2017, write_code15, write_sums


class Server(SimpleHTTPRequestHandler):
    """Serves a folder and counts; a path in `cut` is promised whole and given by half."""

    cut: set[str] = set()
    served: list[str] = []

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.served.append(path)
        if path not in self.cut:
            return super().do_GET()
        content = Path(self.translate_path(path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True
        return None


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the address where it is served."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # the tests run offline; this machine is not the net
    monkeypatch.setattr(Server, "cut", set())
    monkeypatch.setattr(Server, "served", [])
    datasets.disable_progress_bars()
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()
    datasets.enable_progress_bars()


@pytest.fixture
def physionet(site: tuple[Path, str]) -> tuple[Path, str]:
    """A PhysioNet that publishes a miniature of CinC 2017."""
    folder = write_cinc2017(site[0] / "files" / "challenge-2017" / "1.0.0")
    (folder / "sources.zip").write_bytes(b"not wanted")
    write_sums(folder)
    return folder, site[1]


def build(url: str | None, cache: Path, name: str = "cinc2017", num_proc: int | None = None) -> datasets.DatasetDict:
    builder = find_builder(name)(base_url=url, cache_dir=str(cache))
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset()


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_downloaded_set_is_the_local_one(physionet: tuple[Path, str], tmp_path: Path, num_proc: int | None) -> None:
    folder, url = physionet
    local = find_builder("cinc2017")(data_dir=folder, cache_dir=str(tmp_path / "local"))
    local.download_and_prepare()
    downloaded = build(url, tmp_path / "cache", num_proc=num_proc)
    for split, rows in local.as_dataset().items():
        assert downloaded[split].to_list() == rows.to_list()
    if num_proc is None:
        assert not any(path.endswith("sources.zip") for path in Server.served)


def test_a_mirror_may_be_named_by_the_environment(
    physionet: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECGMOE_PHYSIONET_URL", physionet[1])
    assert len(build(None, tmp_path)["train"]) == 4


def test_after_a_cut_connection_only_what_is_lacking_is_fetched(physionet: tuple[Path, str], tmp_path: Path) -> None:
    Server.cut = {"/files/challenge-2017/1.0.0/training/A00/A00004.mat"}
    with pytest.raises(ConnectionError, match=r"(?s)broke off.*run again.*10\.13026/d3hm-sf11"):
        build(physionet[1], tmp_path)
    Server.cut, Server.served = set(), []
    assert len(build(physionet[1], tmp_path)["train"]) == 4
    assert "/files/challenge-2017/1.0.0/training/A00/A00004.mat" in Server.served
    assert "/files/challenge-2017/1.0.0/training/A00/A00001.hea" not in Server.served


@pytest.mark.parametrize("lost", ["training/A00/A00002.mat", "SHA256SUMS.txt"])
def test_a_file_that_the_server_does_not_have_is_named(physionet: tuple[Path, str], tmp_path: Path, lost: str) -> None:
    (physionet[0] / lost).unlink()
    with pytest.raises(FileNotFoundError, match=rf"(?s)server has no .*{lost}.*wget"):
        build(physionet[1], tmp_path)


def test_a_server_that_is_not_there_is_told(tmp_path: Path, site: tuple[Path, str]) -> None:
    with pytest.raises((ConnectionError, FileNotFoundError), match=r"(?s)127\.0\.0\.1:9.*wget"):
        build("http://127.0.0.1:9", tmp_path)


def test_a_file_with_another_digest_is_thrown_away(physionet: tuple[Path, str], tmp_path: Path) -> None:
    path = physionet[0] / "training" / "A00" / "A00003.mat"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\x01\x02")
    with pytest.raises(ValueError, match=r"1 of \d+ files do not have the digest.*A00003\.mat"):
        build(physionet[1], tmp_path)
    path.write_bytes(content)
    assert len(build(physionet[1], tmp_path)["train"]) == 4


@pytest.mark.parametrize(
    "path", ["../../outside.hea", "/etc/outside.hea", "training/../../x.hea", "C:/x.hea", "a\\b.hea"]
)
def test_a_listing_that_leads_outside_is_refused(physionet: tuple[Path, str], tmp_path: Path, path: str) -> None:
    sums = physionet[0] / "SHA256SUMS.txt"
    sums.write_text(sums.read_text() + f"{'0' * 64}  {path}\n")
    with pytest.raises(ValueError, match="outside its own folder"):
        build(physionet[1], tmp_path)


def test_a_page_in_place_of_the_listing_is_refused(physionet: tuple[Path, str], tmp_path: Path) -> None:
    sums = physionet[0] / "SHA256SUMS.txt"
    content = sums.read_text()
    sums.write_text("<html>maintenance</html>\n")
    with pytest.raises(ValueError, match="expected 'digest  path' in every line, found '<html>"):
        build(physionet[1], tmp_path)
    sums.write_text(content)  # the page is not kept in the cache
    assert len(build(physionet[1], tmp_path)["train"]) == 4


def test_streaming_asks_for_a_local_copy(physionet: tuple[Path, str], tmp_path: Path) -> None:
    builder = find_builder("cinc2017")(base_url=physionet[1], cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"(?s)data_dir is missing.*wget"):
        builder.as_streaming_dataset("train")


# Zenodo, and archives


@pytest.fixture
def zenodo(site: tuple[Path, str], tmp_path: Path) -> tuple[Path, str]:
    """A Zenodo that publishes a miniature of CODE-15 % in its archives."""
    source = write_code15(tmp_path / "code15")
    folder = site[0] / "records" / "4916206" / "files"
    folder.mkdir(parents=True)
    shutil.copy(source / "exams.csv", folder)
    for part in range(2):
        with zipfile.ZipFile(folder / f"exams_part{part}.zip", "w") as archive:
            archive.write(source / f"exams_part{part}.hdf5", f"exams_part{part}.hdf5")
            archive.writestr("../outside.txt", "never written")
    _write_zenodo_listing(site[0])
    return folder, site[1]


def _write_zenodo_listing(site: Path) -> None:
    files = [
        {"key": path.name, "checksum": f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"}
        for path in sorted((site / "records" / "4916206" / "files").iterdir())
    ]
    (site / "api" / "records").mkdir(parents=True, exist_ok=True)
    (site / "api" / "records" / "4916206").write_text(json.dumps({"files": files}))


def test_code15_comes_out_of_zenodos_archives(zenodo: tuple[Path, str], tmp_path: Path) -> None:
    dataset = build(zenodo[1], tmp_path / "cache", "code15")
    assert sum(len(rows) for rows in dataset.values()) == 24
    assert not list(tmp_path.rglob("outside.txt"))


def test_an_archive_without_its_file_is_refused(zenodo: tuple[Path, str], tmp_path: Path) -> None:
    with zipfile.ZipFile(zenodo[0] / "exams_part0.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing else")
    _write_zenodo_listing(zenodo[0].parents[2])
    with pytest.raises(ValueError, match=r"no sound zip archive with exams_part0\.hdf5"):
        build(zenodo[1], tmp_path / "cache", "code15")


def test_a_listing_that_is_no_record_of_zenodo_is_refused(zenodo: tuple[Path, str], tmp_path: Path) -> None:
    (zenodo[0].parents[2] / "api" / "records" / "4916206").write_text('{"message": "gone"}')
    with pytest.raises(ValueError, match="not a listing of files that can be believed: KeyError"):
        build(zenodo[1], tmp_path / "cache", "code15")


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.hdf5", bytes(2**22))
    with pytest.raises(ValueError, match="4194304 bytes long, expected at most 1000000"):
        extract_member(tmp_path / "bomb.zip", "a.hdf5", tmp_path, 1_000_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bomb.zip"]


def test_a_damaged_archive_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.hdf5", bytes(range(256)) * 400)
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no sound zip archive"):
        extract_member(path, "a.hdf5", tmp_path, 10**6)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.zip"]
