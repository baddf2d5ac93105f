"""A table of one's own: a CSV file with a row for each recording, its file and its labels.

Files are whatever `read_ecg` reads, of any leads, rate and length. Labels stay text until a task asks for them, see
`label_column`.
"""

import csv
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

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
    cells of a row as text. Files that cannot be read are left out, counted and named whenever a split is opened.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: the table lacks a column, a patient or a split, or a patient is in two splits.
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
        columns = {"path": text, "table": dict.fromkeys(self.rows[0], text), "problem": text}
        return datasets.DatasetInfo(features=ecg_features(None, **columns))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        config, listed = self.config, []
        for number, row in enumerate(self.rows):
            # Two rows of one file are one patient too, where the table does not say whose they are.
            patient = row[config.patient_column or config.path_column].strip()
            if not patient and config.patient_column:
                raise ValueError(
                    f"{config.csv}: row {number + 1} has no {config.patient_column}; a patient must not be in two "
                    "splits, so fill it in, or leave the row out"
                )
            listed.append((str(number), patient, self._split_of(number, row, patient), row))
        splits = {name: [entry for entry in listed if entry[2] == name] for name in SPLITS}
        check_no_patient_crosses({name: [entry[1] for entry in entries] for name, entries in splits.items()})
        return [
            datasets.SplitGenerator(name=name, gen_kwargs={"entries": entries})
            for name, entries in splits.items()
            if entries
        ]

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

    def _generate_examples(
        self, entries: list[tuple[str, str, str, dict[str, str]]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        config = self.config
        for key, patient, _, row in entries:
            path = row[config.path_column].strip()
            out: dict[str, Any] = {"record_id": Path(path).stem, "patient_id": patient, "path": path, "table": row}
            try:
                if not path:
                    raise EcgFileError(f"row {int(key) + 1} names no file")
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
            yield key, out

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
        broken = [f"{path}: {problem}" for path, problem in zip(rows["path"][:], problems, strict=True) if problem]
        sound = rows.select([i for i, problem in enumerate(problems) if not problem]).remove_columns("problem")
        if not len(sound):
            raise ValueError(
                f"{self.config.csv}: none of the {len(rows)} files of {split} can be read, the first: {broken[0]}"
            )
        if broken:
            logger.warning(
                "%s, %s: %d of %d files cannot be read and are left out:\n  %s",
                Path(self.config.csv).name, split, len(broken), len(rows), shorten(broken),
            )  # fmt: skip
        return sound


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
            rows = [{name: cell for name, cell in row.items() if name != ""} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV table in UTF-8 ({error}); save it again") from error
    names = reader.fieldnames or []
    twice = [name for name, count in Counter(names).items() if count > 1]
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
