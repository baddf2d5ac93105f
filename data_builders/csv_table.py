"""A table of one's own: a CSV file with a row for each recording, its file and its labels.

Files are whatever `read_ecg` reads, of any leads, rate and length. Labels stay text until a task asks for them, see
`label_column`.
"""

import csv
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from data_builders.label_column import is_known, same_label
from data_builders.schema import ecg_features
from data_builders.splits import check_no_patient_crosses, split_of_patient
from modeling_ecgmoe import ecg_files
from modeling_ecgmoe.ecg_files import EcgFileError, read_ecg

logger = logging.getLogger(__name__)

SPLITS = {"train": 0.7, "validation": 0.15, "test": 0.15}  # shares of the patients, where the table names no splits
SPLIT_NAMES = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"}
MAX_LISTED = 20  # records named in one log line


@dataclass
class EcgCsvConfig(datasets.BuilderConfig):
    """What the columns of the table mean, and what its files do not say themselves.

    Args:
        csv: the table.
        path_column: the file of each recording, relative to `data_dir`, or to the table's folder where not given.
        patient_column: whose recording it is; each recording is a patient of its own where not given.
        split_column: "train", "validation" or "test"; by the hash of the patient where not given.
        sampling_rate: in Hz, of files that do not give it.
        lead_names: of files that do not name their leads, in file order.
        file_unit: "V", "mV", "uV" or "nV", of files that do not give it.
    """

    csv: str = ""
    path_column: str = "path"
    patient_column: str | None = None
    split_column: str | None = None
    sampling_rate: float | None = None
    lead_names: list[str] | None = None
    file_unit: str | None = None


class EcgCsv(datasets.GeneratorBasedBuilder):
    """Recordings listed in a CSV file.

    `EcgCsv(csv="labels.csv")`, then `download_and_prepare()` and `as_dataset("train")`. The column `table` holds all
    cells of a row as text, and `place` says where it stands. A file in several rows is one recording, with what any of
    them knows; where two say different things of it, `conflicts` holds column and message. Files that cannot be read
    are left out. Both are counted and named whenever a split is opened.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: the table lacks a column, a patient or a split, a patient is in two splits, or a file has two
            patients or splits.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = EcgCsvConfig
    DEFAULT_WRITER_BATCH_SIZE = 100

    def __init__(self, *args: Any, csv: str | Path, data_dir: str | Path | None = None, **kwargs: Any) -> None:
        path_column = kwargs.get("path_column", EcgCsvConfig.path_column)
        others = {kind: kwargs[kind] for kind in ("patient_column", "split_column") if kwargs.get(kind)}
        self.folder = Path(data_dir) if data_dir else Path(csv).parent
        self.rows = read_table(Path(csv), {"path_column": path_column} | others)
        # The state of table, files and code is part of the cache's name.
        kwargs.setdefault("hash", _state_of(Path(csv), self.rows, self.folder, path_column))
        super().__init__(*args, csv=str(csv), data_dir=str(self.folder), **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        text = datasets.Value("string")
        columns = {"path": text, "table": dict.fromkeys(self.rows[0], text), "place": text, "problem": text}
        columns |= {"num_rows": datasets.Value("int32"), "conflicts": [{"column": text, "message": text}]}
        return datasets.DatasetInfo(features=ecg_features(None, **columns))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        config = self.config
        listed: dict[str, Entry] = {}
        for number, row in enumerate(self.rows):
            path = row[config.path_column].strip()
            patient = row[config.patient_column].strip() if config.patient_column else path
            if not patient and config.patient_column:
                raise ValueError(
                    f"{config.csv}: row {number + 1} has no {config.patient_column}; a patient must not be in two "
                    "splits, so fill it in, or leave the row out"
                )
            record = _record_of(self.folder / path) if path else f"row {number}"
            first = listed.setdefault(record, Entry(number, patient, self._split_of(number, row, patient), {}))
            if first.rows:
                self._check_same(first, number, row)
            first.rows[number] = row
        splits = {name: [entry for entry in listed.values() if entry[2] == name] for name in SPLITS}
        check_no_patient_crosses({name: [entry[1] for entry in entries] for name, entries in splits.items()})
        return [
            datasets.SplitGenerator(name=name, gen_kwargs={"entries": entries})
            for name, entries in splits.items()
            if entries
        ]

    def _check_same(self, first: "Entry", number: int, row: dict[str, str]) -> None:
        """Refuse a later row of a file that is of another patient or split than the first."""
        config, earlier = self.config, first.rows[first.number]
        for column in filter(None, (config.patient_column, config.split_column)):
            cells = earlier[column].strip(), row[column].strip()
            if column == config.split_column and self._split_of(number, row, first.patient) == first.split:
                continue
            if cells[0] != cells[1]:
                raise ValueError(
                    f"{config.csv}: rows {first.number + 1} and {number + 1} name one file, "
                    f"{row[config.path_column].strip()}, and hold {cells[0]!r} and {cells[1]!r} in the column "
                    f"{column!r}; keep one of them"
                )

    def _split_of(self, number: int, row: dict[str, str], patient: str) -> str:
        column = self.config.split_column
        if column is None:
            return split_of_patient(patient, SPLITS)
        name = row[column].strip().lower()
        name = SPLIT_NAMES.get(name, name)
        if name not in SPLITS:
            raise ValueError(
                f"{self.config.csv}: row {number + 1} is of split {row[column]!r}; expected {', '.join(SPLITS)}"
            )
        return name

    def _generate_examples(self, entries: list["Entry"]) -> Iterator[tuple[str, dict[str, Any]]]:
        config = self.config
        for number, patient, _, rows in entries:
            path = rows[number][config.path_column].strip()
            table, conflicts = _merged(rows, path)
            out: dict[str, Any] = {"record_id": Path(path).stem, "patient_id": patient, "path": path, "table": table}
            out |= {"place": place_of(path, *rows), "num_rows": len(rows), "conflicts": conflicts}
            try:
                if not path:
                    raise EcgFileError(f"row {number + 1} names no file")
                ecg = read_ecg(
                    self.folder / path,
                    sampling_rate=config.sampling_rate,
                    lead_names=config.lead_names,
                    unit=config.file_unit,
                )
                out |= {
                    "signal": ecg.signal,
                    "sampling_rate": ecg.sampling_rate,
                    "lead_names": list(ecg.lead_names),
                }
            except (EcgFileError, FileNotFoundError) as error:
                out |= {"signal": [], "lead_names": [], "problem": str(error)}
            yield str(number), out

    def as_dataset(self, split: str | None = None, **options: Any) -> datasets.Dataset | datasets.DatasetDict:
        """The recordings of a split that could be read, or of all splits; the others are named in the log."""
        if split is None:
            return datasets.DatasetDict({name: self.as_dataset(name, **options) for name in self.info.splits})
        if split not in self.info.splits:
            raise ValueError(
                f"{self.config.csv}: no recording is in the split {split}, of {len(self.rows)} rows; "
                f"there must be more patients, or name the splits in a column (--split_column)"
            )
        rows = super().as_dataset(split, **options)
        problems = rows["problem"][:]
        sound = rows.select([i for i, problem in enumerate(problems) if not problem])
        if not len(sound):
            raise ValueError(
                f"{self.config.csv}: none of the {len(rows)} files of {split} can be read, the first: "
                f"{rows['path'][0]}: {problems[0]}"
            )
        self.tell_problems(split)
        return sound.remove_columns(["num_rows", "problem"])

    def tell_problems(self, split: str) -> None:
        """Name the files of a split that cannot be read, and those that several rows name, in the log."""
        if split not in self.info.splits:
            return
        rows = super().as_dataset(split).select_columns(["path", "place", "num_rows", "problem"])[:]
        broken = [f"{path}: {problem}" for path, problem in zip(rows["path"], rows["problem"], strict=True) if problem]
        again = [place for place, count in zip(rows["place"], rows["num_rows"], strict=True) if count > 1]
        for found, what in ((broken, "cannot be read and are left out"), (again, "are in several rows and used once")):
            if found:
                logger.warning(
                    "%s, %s: %d of %d files %s:\n  %s",
                    Path(self.config.csv).name, split, len(found), len(rows["path"]), what, shorten(found),
                )  # fmt: skip


class Entry(NamedTuple):
    """A recording of the table: its first row's number from 0, its patient and split, and all its rows by number."""

    number: int
    patient: str
    split: str
    rows: dict[int, dict[str, str]]


def _record_of(path: Path) -> str:
    """One name for a file, however a table spells it: of a WFDB record, header and signals are one."""
    normal = Path(os.path.normpath(path))
    suffix = normal.suffix.lower()
    has_header = any(normal.with_suffix(ending).is_file() for ending in (".hea", ".HEA")) if suffix == ".mat" else True
    return str(normal.with_suffix("") if suffix in (".hea", ".dat", ".mat") and has_header else normal)


def _merged(rows: dict[int, dict[str, str]], path: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What the rows of one file know together, and a message for each column in which they disagree."""
    merged: dict[str, str] = {}
    told: dict[str, int] = {}  # the number of the row that a cell is from
    conflicts: dict[str, str] = {}
    for number, row in rows.items():
        for column, cell in row.items():
            if column not in merged or (is_known(cell) and not is_known(merged[column])):
                merged[column], told[column] = cell, number
            elif is_known(cell) and not same_label(cell, merged[column]):
                conflicts[column] = (
                    f"rows {told[column] + 1} and {number + 1} name one file, {path}, and hold "
                    f"{merged[column]!r} and {cell!r} in the column {column!r}"
                )
    return merged, [{"column": column, "message": message} for column, message in conflicts.items()]


def place_of(path: str, *numbers: int) -> str:
    """Where a recording stands in the table, for messages: the numbers of its rows, from 0, and its file."""
    return f"row{'s'[: len(numbers) > 1]} {', '.join(str(number + 1) for number in numbers)} ({path.strip()})"


def read_table(path: Path, columns: dict[str, str]) -> list[dict[str, str]]:
    """The rows of a CSV table, every cell as text.

    Args:
        path: separated by commas, semicolons or tabs, whichever the first line has most of.
        columns: what is asked for ("path_column") to the column that must be there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a table, or lacks a column.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such table: {path}; check --csv")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(",;\t", key=first.count), restval="")
            names = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = names
            rows = [{name: cell for name, cell in row.items() if name != ""} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV table in UTF-8 ({error}); save it as CSV UTF-8") from error
    while rows and not any("".join(cell or "").strip() for cell in rows[-1].values()):
        rows.pop()  # as spreadsheets leave them at the end
    # Spreadsheets leave columns without a name behind.
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if not rows or twice:
        raise ValueError(f"{path} has {f'the column {twice[0]!r} twice' if twice else 'no rows'}; mend the table")
    for number, row in enumerate(rows):
        if None in row:
            raise ValueError(f"{path}: row {number + 1} has more cells than the first line; quote cells with commas")
    for option, name in columns.items():
        if name not in names:
            raise ValueError(f"{path} has no column {name!r}; its columns are {', '.join(names)}; pass --{option}")
    return rows


def _state_of(table: Path, rows: list[dict[str, str]], folder: Path, path_column: str) -> str:
    """A short digest of the table, of the state of each of its files and of the code that reads them."""
    digest = hashlib.sha256(table.read_bytes())
    for pattern in ("leads.py", "recording.py", "*_files.py"):
        for code in sorted(Path(ecg_files.__file__).parent.glob(pattern)):
            digest.update(code.read_bytes())
    digest.update(Path(__file__).read_bytes())
    for row in rows:
        if not row[path_column].strip():
            continue
        path = folder / row[path_column].strip()
        for file in (path, *(path.with_suffix(suffix) for suffix in (".hea", ".dat", ".mat"))):  # a WFDB record
            if file.is_file():
                status = file.stat()
                digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def shorten(texts: Sequence[str], separator: str = "\n  ") -> str:
    """The first of many texts, and how many more there are."""
    more = [f"and {len(texts) - MAX_LISTED} more"] if len(texts) > MAX_LISTED else []
    return separator.join([*texts[:MAX_LISTED], *more])
