"""What all builders share: where the files come from, which records are left out, and what is known of the data set.

A builder says what its data set is (`FACTS`), lists its records with their splits (`list_records`) and makes rows of
one (`read_record`). Everything else is here: a local copy or a verified download, patients that must not cross splits,
missing and broken records that are skipped, counted and named, and a cache that knows the state of folder and code.
"""

import hashlib
import json
import logging
import os
import posixpath
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import datasets

from data_builders.downloads import PHYSIONET_URL, ZENODO_URL, fetch, list_physionet, list_zenodo
from data_builders.schema import ecg_features
from data_builders.splits import check_no_patient_crosses
from modeling_ecgmoe import leads
from modeling_ecgmoe.ecg_files import Ecg, EcgFileError

logger = logging.getLogger(__name__)

MAX_LISTED = 20  # records named in one log line
SKIPPED_FILE = "skipped_records.jsonl"  # beside the built rows
URL_VARIABLES = {"physionet": "ECGMOE_PHYSIONET_URL", "zenodo": "ECGMOE_ZENODO_URL"}
_URLS = {"physionet": PHYSIONET_URL, "zenodo": ZENODO_URL}
_BATCH_BYTES = 2**24  # of signal, kept in memory by each writing process
# The files of `modeling_ecgmoe` that have a part in a row.
_READING_CODE = ("leads.py", "recording.py", "tasks.py", "*_files.py")


@dataclass(frozen=True)
class Facts:
    """What is known of a data set, for its `DatasetInfo` and for the README's table.

    Args:
        title: the name that the field uses.
        version: of the publication that the builder reads.
        about: one or two sentences: what was recorded, where, and how it is split.
        host: "physionet" or "zenodo".
        project: PhysioNet's short name, or the number of the Zenodo record.
        doi: of this version.
        license: as the publisher names it.
        citation: BibTeX.
        records, patients: the official counts; None where the publisher gives none.
        sampling_rates: in Hz.
        leads: how many.
        length: of a recording.
        labels: what is known of a recording.
        access: "open", "credentialed", or "open, ..." where the recordings are open and something that belongs to them
            is not; only open recordings are downloaded.
    """

    title: str
    version: str
    about: str
    host: str
    project: str
    doi: str
    license: str
    citation: str
    records: int
    patients: int | None
    sampling_rates: tuple[int, ...]
    leads: str
    length: str
    labels: str
    access: str = "open"

    @property
    def homepage(self) -> str:
        """The page of this version."""
        return f"https://doi.org/{self.doi}"

    @property
    def is_open(self) -> bool:
        """Whether the recordings can be had without a login."""
        return self.access.startswith("open")

    @property
    def how_to_get(self) -> str:
        """What a user without a copy has to do."""
        if self.host == "zenodo":
            command = f"pip install zenodo_get && zenodo_get {self.project} -o {self.project}  # and unpack the zips"
        else:
            login = "" if self.is_open else " --user YOUR_NAME --ask-password"
            command = (
                f"wget -r -N -c -np -nH --cut-dirs=3 -P {self.project}{login} "
                f"{PHYSIONET_URL}/files/{self.project}/{self.version}/"
            )
        return (
            f"download {self.title} {self.version} from {self.homepage}, for instance with\n    {command}\n"
            "and pass that folder as data_dir"
        )


@dataclass(frozen=True, slots=True)
class RecordEntry:
    """One record of the listing.

    Args:
        record_id: its name in messages and in the column `record_id`.
        patient_id: whose it is; patients never cross splits.
        split: where it goes.
        files: what must be there to read it, relative to the data folder, with "/".
        facts: what the tables say about it, for `read_record`.
    """

    record_id: str
    patient_id: str
    split: str
    files: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SkippedRecord:
    """A record that is not among the rows, and why."""

    record_id: str
    split: str
    reason: str


class EcgBuilder(datasets.GeneratorBasedBuilder):
    """Base of the builders.

    `Builder(config_name=..., data_dir=...)`, then `download_and_prepare(num_proc=2)` and `as_dataset("train")`.
    Without `data_dir` the open data sets are downloaded. A copy that lacks records is used as far as it goes: missing
    and broken records are left out, named in the log, in `skipped_records()` and, as a count, in `info.description`;
    a split without any record is left out.

    Args:
        data_dir: a folder as the publisher ships it.
        base_url: another server with the publisher's paths; the environment variables of `URL_VARIABLES` do the same.

    Raises:
        FileNotFoundError: the folder or what it must hold is not there, or the server does not have it.
        ValueError: a credentialed data set without `data_dir`, a table or listing that must not be believed, a patient
            in two splits, or not one sound record.
    """

    FACTS: ClassVar[Facts]
    SPLITS: ClassVar[tuple[str, ...]] = ("train", "validation", "test")  # in this order, as far as they have records

    def __init__(
        self, *args: Any, data_dir: str | Path | None = None, base_url: str | None = None, **kwargs: Any
    ) -> None:
        facts = self.FACTS
        if data_dir is None and not facts.is_open:
            raise ValueError(f"data_dir is missing, and {facts.title} needs a login: {facts.how_to_get}")
        self.base_url = base_url or os.environ.get(URL_VARIABLES[facts.host]) or _URLS[facts.host]
        self.folder = Path("") if data_dir is None else Path(data_dir)
        self._missing: list[SkippedRecord] = []
        self._building = False
        # The state of folder and code is part of the cache's name: no older build hides what was completed or mended.
        kwargs.setdefault("hash", self._fingerprint(None if data_dir is None else self.folder))
        super().__init__(*args, data_dir=None if data_dir is None else str(data_dir), **kwargs)
        if not kwargs.get("writer_batch_size"):
            self._writer_batch_size = self._rows_in_a_batch()

    # What a builder has of its own

    def signal_shape(self) -> tuple[int, int] | None:
        """(leads, samples) where all records of the configuration have the same, else None."""
        raise NotImplementedError

    def columns(self) -> dict[str, Any]:
        """The columns beyond `schema.ecg_features`, name to feature."""
        raise NotImplementedError

    def is_wanted(self, path: str) -> bool:
        """Whether the configuration reads this file of the publisher's listing."""
        raise NotImplementedError

    def list_records(self, folder: Path) -> list[RecordEntry]:
        """All records that the data set should have, whether their files are there or not.

        Raises:
            FileNotFoundError: a table is missing.
            ValueError: a table must not be believed.
        """
        raise NotImplementedError

    def read_record(self, entry: RecordEntry) -> Iterator[dict[str, Any]]:
        """The rows of a record, without the columns that are null; `record_id` must differ between them.

        Raises:
            EcgFileError, FileNotFoundError: it is broken; it is skipped, the others are not.
        """
        raise NotImplementedError

    @classmethod
    def watched(cls, folder: Path) -> Iterable[Path]:
        """The folders (with all below them) and tables whose change makes a new build."""
        return [folder]

    # What they share

    def _info(self) -> datasets.DatasetInfo:
        facts = self.FACTS
        patients = f" of {facts.patients:,} patients" if facts.patients else ""
        return datasets.DatasetInfo(
            description=(
                f"{facts.title} {facts.version}: {facts.records:,} records{patients}. {facts.about} "
                f"Configuration {self.config.name}: {self.config.description}."
            ),
            citation=facts.citation,
            homepage=facts.homepage,
            license=facts.license,
            features=ecg_features(self.signal_shape(), **self.columns()),
        )

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        if self.config.data_dir is None:
            self.folder = self._fetch(dl_manager)
        elif not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder}: {self.FACTS.how_to_get}")
        title = self.FACTS.title
        entries = self.list_records(self.folder)
        splits = [split for split in self.SPLITS if any(entry.split == split for entry in entries)]
        check_no_patient_crosses({s: [e.patient_id for e in entries if e.split == s] for s in splits})
        self._missing, generators = [], []
        for split in splits:
            listed = [entry for entry in entries if entry.split == split]
            found = [entry for entry in listed if self._has_files(entry)]
            names = {entry.record_id for entry in found}
            missing = [entry.record_id for entry in listed if entry.record_id not in names]
            self._missing += [SkippedRecord(name, split, "its files are missing") for name in missing]
            if missing:
                logger.warning(
                    "%s %s: %d of %d records have no files in %s and are skipped: %s",
                    title, split, len(missing), len(listed), self.folder, _shorten(missing, ", "),
                )  # fmt: skip
            if found:
                generators.append(datasets.SplitGenerator(name=split, gen_kwargs={"records": found}))
            else:
                logger.warning("%s %s: none of its records is there; the split is left out", title, split)
        if not generators:
            example = " and ".join(entries[0].files) if entries else "records"
            raise FileNotFoundError(
                f"{self.folder} holds none of the {len(entries) or self.FACTS.records} records of {title}, expected "
                f"for instance {example}: {self.FACTS.how_to_get}"
            )
        return generators

    def _generate_examples(self, records: list[RecordEntry]) -> Iterator[tuple[str, dict[str, Any]]]:
        nulls, broken = dict.fromkeys(self.info.features), []
        for entry in records:
            try:
                for row in self.read_record(entry):
                    yield row["record_id"], nulls | row
            except (EcgFileError, FileNotFoundError) as error:
                broken.append(SkippedRecord(entry.record_id, entry.split, str(error)))
        if broken:
            logger.warning(
                "%s: %d broken records are skipped:\n  %s",
                self.FACTS.title, len(broken), _shorten([f"{b.record_id}: {b.reason}" for b in broken], "\n  "),
            )  # fmt: skip
        if broken and self._building:  # often in a process of its own: told through a file
            self._write_skipped(f"{SKIPPED_FILE}.{uuid.uuid4().hex}", broken)

    def _download_and_prepare(self, dl_manager: datasets.DownloadManager, *args: Any, **kwargs: Any) -> None:
        self._building = True
        try:
            super()._download_and_prepare(dl_manager, *args, **kwargs)
        finally:
            self._building = False
        skipped = list(self._missing)
        for path in sorted(self._fs.glob(posixpath.join(self._output_dir, f"{SKIPPED_FILE}.*"))):
            skipped += _read_skipped(self._fs, path)
            self._fs.rm(path)
        self._write_skipped(SKIPPED_FILE, skipped)
        num_rows = sum(split.num_examples for split in self.info.splits.values())
        if not num_rows:
            raise ValueError(
                f"not one record of {self.FACTS.title} in {self.folder} is sound, the first: {skipped[-1].record_id}: "
                f"{skipped[-1].reason}; {self.FACTS.how_to_get}"
            )
        num_missing = len(self._missing)
        self.info.description = (
            f"{self._info().description} This build has {num_rows:,} rows; left out were {num_missing:,} records "
            f"whose files are missing and {len(skipped) - num_missing:,} broken ones."
        )

    def skipped_records(self) -> list[SkippedRecord]:
        """The records that the last build left out, in this process or an earlier one; empty before any build."""
        path = posixpath.join(self._output_dir, SKIPPED_FILE)
        return _read_skipped(self._fs, path) if self._fs.exists(path) else []

    def _rows_in_a_batch(self) -> int:
        shape = self.signal_shape()
        return 8 if shape is None else max(1, min(250, _BATCH_BYTES // (4 * shape[0] * shape[1])))

    def _write_skipped(self, name: str, skipped: list[SkippedRecord]) -> None:
        with self._fs.open(posixpath.join(self._output_dir, name), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(record)) + "\n" for record in skipped)

    def _fetch(self, manager: datasets.DownloadManager) -> Path:
        """Download what the configuration reads; the folder it lies in then."""
        facts = self.FACTS
        if manager.is_streaming:
            raise ValueError(f"streaming reads a local copy, and data_dir is missing: {facts.how_to_get}")
        server = hashlib.sha256(self.base_url.encode()).hexdigest()[:8]
        folder = Path(self._cache_downloaded_dir) / f"{facts.project}-{facts.version}-{server}"
        try:
            if facts.host == "zenodo":
                files = list_zenodo(manager, facts.project, self.base_url)
            else:
                files = list_physionet(manager, facts.project, facts.version, self.base_url)
            fetch(manager, [file for file in files if self.is_wanted(file.path)], folder)
        except (FileNotFoundError, ConnectionError) as error:
            raise type(error)(f"{error}; or {facts.how_to_get}") from error
        return folder

    def _has_files(self, entry: RecordEntry) -> bool:
        for name in entry.files:
            if PurePosixPath(name).is_absolute() or os.path.isabs(name) or ".." in PurePosixPath(name).parts:
                raise ValueError(
                    f"the tables of {self.FACTS.title} name a record outside {self.folder}: {name!r}; "
                    f"{self.FACTS.how_to_get}"
                )
        return all(os.path.exists(os.path.join(self.folder, name)) for name in entry.files)

    @classmethod
    def _fingerprint(cls, folder: Path | None) -> str:
        """A short digest of the data's state (files, sizes, newest change, per folder) and of the code behind rows."""
        digest = hashlib.sha256(cls.FACTS.version.encode())
        for path in _code_files():
            digest.update(path.name.encode() + path.read_bytes())
        if folder is None:  # downloaded files are what their publisher lists
            return digest.hexdigest()[:16]
        for watched in cls.watched(folder):
            if watched.is_file():
                status = watched.stat()
                digest.update(f"{watched.relative_to(folder)} {status.st_size} {status.st_mtime_ns}".encode())
            for parent, folders, _ in os.walk(watched):
                folders.sort()
                with os.scandir(parent) as found:
                    states = [entry.stat() for entry in found if entry.is_file()]
                size, newest = sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)
                digest.update(f"{os.path.relpath(parent, folder)} {len(states)} {size} {newest}".encode())
        return digest.hexdigest()[:16]


def _code_files() -> list[Path]:
    """Every file of the package and of the readers under it: a row may depend on each."""
    own, reading = Path(__file__).parent, Path(leads.__file__).parent
    patterns = [(own, "*.py"), (own, "*.csv"), *((reading, name) for name in _READING_CODE)]
    return [path for folder, pattern in patterns for path in sorted(folder.glob(pattern))]


def find_headers(folder: Path) -> list[str]:
    """The WFDB records in a folder and all below it: their paths without suffix, relative, with "/", sorted."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders.sort()
        relative = Path(parent).relative_to(folder)
        found += [(relative / name[:-4]).as_posix() for name in sorted(names) if name.endswith(".hea")]
    return found


def signal_columns(ecg: Ecg) -> dict[str, Any]:
    """The columns of a row that a file gives."""
    return {"signal": ecg.signal, "sampling_rate": ecg.sampling_rate, "lead_names": list(ecg.lead_names)}


def _read_skipped(files: Any, path: str) -> list[SkippedRecord]:
    with files.open(path, "r", encoding="utf-8") as lines:
        return [SkippedRecord(**json.loads(line)) for line in lines]


def _shorten(texts: list[str], separator: str) -> str:
    shown = texts[:MAX_LISTED] + ([f"and {len(texts) - MAX_LISTED} more"] if len(texts) > MAX_LISTED else [])
    return separator.join(shown)
