"""Time and memory of the potassium labels on a laboratory table of 50 million rows, as CSV, gzipped CSV and Parquet.

    python -m benchmarks.potassium_join --repeats 2

The tables are made up, in the layout and with the shares of MIMIC-IV and MIMIC-IV-ECG: 800,000 ECGs, 300,000 patients,
3 % of the rows potassium. They take 10 GB in a temporary folder and are deleted at the end. Every run is a process of
its own: the whole join, and only the reading of the potassium values, by the library that the project uses (polars)
and, where it is installed, by another (duckdb, with a memory limit of 1 GB). Seconds of processor time disturb each
other less than those on the wall.
"""

import argparse
import gzip
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.quality import ROOT, origin
from data_builders.mimic_labels import REPORT_LINES, TIME_FORMAT, WAVES

CHUNK_ROWS = 1_000_000
NUM_ECGS, NUM_PATIENTS, FIRST_PATIENT = 800_000, 300_000, 10_000_000
STAY_MIN = 3 * 24 * 60  # everything that happens to a patient lies within so many minutes
# The itemids of labevents and their shares; 50971 and 50822 are potassium, the rest stands for the other thousand.
ITEMS = {50971: 0.028, 50822: 0.003, 50983: 0.169, 50912: 0.2, 51221: 0.2, 51265: 0.2, 51006: 0.2}
COMMENTS = ("HEMOLYSIS FALSELY ELEVATES K.", 'VERIFIED, "NOT HEMOLYZED".', "New reference range as of ___.")
FORMATS = (".csv", ".csv.gz", ".parquet")
_START = "import resource, sys, time\nfrom pathlib import Path\nfolder, suffix = Path(sys.argv[1]), sys.argv[2]\n"
# VmHWM and not ru_maxrss: the latter counts what this process had before the program was started in it.
_END = """
used = resource.getrusage(resource.RUSAGE_SELF)
peak_kib = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.perf_counter() - began, used.ru_utime + used.ru_stime, int(peak_kib) / 1024, rows)
"""
PROGRAMS = {
    "the whole join (polars)": """
from data_builders.mimic_labels import PotassiumRule, label_ecgs
began = time.perf_counter()
ecgs, counts = label_ecgs(folder, folder / f"hosp{suffix}", PotassiumRule())
rows = counts.ecgs["with a potassium value"]
""",
    "potassium values alone (polars)": """
from data_builders.mimic_labels import Counts, PotassiumRule, read_potassium
began = time.perf_counter()
rule = PotassiumRule(skip_hemolysed=False)
rows = read_potassium(folder / f"hosp{suffix}" / f"labevents{suffix}", rule, Counts()).height
""",
    "potassium values alone (duckdb)": """
import duckdb
began = time.perf_counter()
path = folder / f"hosp{suffix}" / f"labevents{suffix}"
reads = "read_parquet(?)" if suffix == ".parquet" else "read_csv(?, header=true, all_varchar=true)"
database = duckdb.connect()
database.execute("set memory_limit='1GB'; set preserve_insertion_order=false")
rows = len(database.execute(f'''
    select distinct on (subject_id::bigint, charttime::timestamp) subject_id::bigint as subject_id,
        charttime::timestamp as charttime, valuenum::double, contains(lower(comments), 'hemoly')
    from {reads}
    where itemid::bigint = 50971 and valuenum::double between 1 and 15 and lower(valueuom) in ('meq/l', 'mmol/l')
    order by subject_id, charttime, labevent_id::bigint''', [str(path)]).fetchall())
""",
}


def laboratory(rows: int, seed: int) -> Iterator[pl.DataFrame]:
    """Pieces of a `labevents` in no order."""
    rng = np.random.default_rng(seed)
    for start in range(0, rows, CHUNK_ROWS):
        size = min(CHUNK_ROWS, rows - start)
        subject = rng.integers(0, NUM_PATIENTS, size)
        drawn = _times(subject, rng)
        value = np.round(rng.normal(4.2, 0.8, size), 1)
        comment = rng.choice(1 + len(COMMENTS), size, p=[0.9, 0.02, 0.01, 0.07])
        yield pl.DataFrame(
            {
                "labevent_id": np.arange(start + 1, start + size + 1),
                "subject_id": subject + FIRST_PATIENT,
                "hadm_id": subject + 20_000_000,
                "specimen_id": rng.integers(0, 10**8, size),
                "itemid": rng.choice(list(ITEMS), size, p=list(ITEMS.values())),
                "order_provider_id": pl.Series([None] * size, dtype=pl.String),
                "charttime": drawn,
                "storetime": drawn + np.timedelta64(60, "m"),
                "value": pl.Series(value).cast(pl.String),
                "valuenum": value,
                "valueuom": "mEq/L",
                "ref_range_lower": 3.3,
                "ref_range_upper": 5.1,
                "flag": _words(value > 5.1, "abnormal"),
                "priority": "ROUTINE",
                "comments": _words(comment, *COMMENTS),
            }
        )


def _words(which: np.ndarray, *words: str) -> pl.Series:
    """The first word where `which` is 1, the second where it is 2; null where it is 0."""
    return pl.Series([None, *words], dtype=pl.String).gather(pl.Series(which.astype(np.uint32)))


def _times(subject: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A minute of each patient's stay; stays begin at different times."""
    minutes = subject.astype(np.int64) * 97 + rng.integers(0, STAY_MIN, len(subject))
    return np.datetime64("2110-01-01T00:00:00", "us") + minutes.astype("timedelta64[m]")


def write_tables(folder: Path, rows: int, seed: int) -> None:
    """All tables: those of MIMIC-IV-ECG in the folder, those of `hosp` in every format in folders below."""
    rng = np.random.default_rng(seed + 1)
    for suffix in FORMATS:
        (folder / f"hosp{suffix}").mkdir()
    plain, zipped = (folder / f"hosp{suffix}" / f"labevents{suffix}" for suffix in FORMATS[:2])
    with plain.open("wb") as plain_file, gzip.open(zipped, "wb", compresslevel=1) as zipped_file:
        for number, piece in enumerate(laboratory(rows, seed)):
            text = piece.write_csv(include_header=number == 0, datetime_format=TIME_FORMAT).encode()
            plain_file.write(text)
            zipped_file.write(text)
    pl.scan_csv(plain, try_parse_dates=True).sink_parquet(folder / "hosp.parquet" / "labevents.parquet")
    everyone = np.arange(NUM_PATIENTS)
    patients = pl.DataFrame(
        {
            "subject_id": everyone + FIRST_PATIENT,
            "gender": rng.choice(["M", "F"], NUM_PATIENTS),
            "anchor_age": rng.integers(18, 92, NUM_PATIENTS),
            "anchor_year": 2110 + everyone * 97 // (365 * 24 * 60),
        }
    )
    begins = np.datetime64("2110-01-01T00:00:00", "us") + (everyone * 97).astype("timedelta64[m]")
    admissions = patients.select(
        "subject_id",
        (pl.col("subject_id") + 10_000_000).alias("hadm_id"),
        admittime=pl.Series(begins),
        dischtime=pl.Series(begins + np.timedelta64(STAY_MIN, "m")),
    )
    for suffix in FORMATS:
        for name, table in (("patients", patients), ("admissions", admissions)):
            table.write_csv(folder / f"hosp{suffix}" / f"{name}.csv", datetime_format=TIME_FORMAT)
    subject = rng.integers(0, NUM_PATIENTS, NUM_ECGS)
    ids = {"subject_id": subject + FIRST_PATIENT, "study_id": np.arange(NUM_ECGS) + 40_000_000}
    ecgs = pl.DataFrame(ids | {"ecg_time": _times(subject, rng)})
    path = pl.format("files/p{}/p{}/s{}/{}", pl.col("subject_id") // 10_000, "subject_id", "study_id", "study_id")
    ecgs.with_columns(file_name="study_id", path=path).write_csv(
        folder / "record_list.csv", datetime_format=TIME_FORMAT
    )
    lines = ["Sinus rhythm", "Possible left atrial abnormality", "Nonspecific T wave changes", "Abnormal ECG"]
    ecgs.with_columns(
        pl.lit(6848296).alias("cart_id"),
        *(pl.lit(lines[n] if n < len(lines) else None).alias(name) for n, name in enumerate(REPORT_LINES)),
        pl.lit("0.005-150 Hz").alias("bandwidth"),
        pl.lit("60 Hz notch Baseline filter").alias("filtering"),
        pl.Series("rr_interval", rng.integers(400, 1400, NUM_ECGS)),
        *(pl.lit(200).alias(name) for name in WAVES),
    ).write_csv(folder / "machine_measurements.csv", datetime_format=TIME_FORMAT)


def run(program: str, folder: Path, suffix: str) -> tuple[float, float, float, int]:
    """Seconds on the wall and of processor time, peak memory in MiB and result of a program in a new process."""
    command = [sys.executable, "-c", _START + PROGRAMS[program] + _END, str(folder), suffix]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program}, {suffix}: {done.stderr[-2000:]}")
    wall_s, processor_s, peak_mib, rows = map(float, done.stdout.split()[-4:])
    return wall_s, processor_s, peak_mib, int(rows)


def main() -> None:
    """Make the tables, measure, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000_000, help="of labevents")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/potassium_join.json")
    options = parser.parse_args()
    programs = [name for name in PROGRAMS if "duckdb" not in name or importlib.util.find_spec("duckdb")]
    found: dict[tuple[str, str], list[tuple[float, float, float, int]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        began = time.perf_counter()
        write_tables(folder, options.rows, options.seed)
        print(f"tables written in {time.perf_counter() - began:.0f} s")
        sizes = {s: (folder / f"hosp{s}" / f"labevents{s}").stat().st_size for s in FORMATS}
        for _ in range(options.repeats):
            for suffix in FORMATS:
                for program in programs:
                    found.setdefault((program, suffix), []).append(run(program, folder, suffix))
    rows: list[dict[str, Any]] = []
    for (program, suffix), runs in found.items():
        wall_s, processor_s, peaks_mib, results = zip(*runs, strict=True)
        rows.append(
            {
                "what": program,
                "format": suffix,
                "file_gb": round(sizes[suffix] / 1e9, 2),
                "wall_s": round(min(wall_s), 1),
                "processor_s": round(min(processor_s), 1),
                "peak_mib": round(max(peaks_mib)),
                "result_rows": results[0],
            }
        )
        print(rows[-1])
        if len({row["result_rows"] for row in rows if row["what"].split(" (")[0] == program.split(" (")[0]}) > 1:
            raise RuntimeError(f"{program} gives another number of rows from {suffix} than before")
    result = {
        "name": options.out.stem,
        "command": f"python -m benchmarks.potassium_join --repeats {options.repeats}",
        "seed": options.seed,
        **origin(),
        "data": {"set": "made up in MIMIC-IV's layout", "labevents": options.rows, "ecgs": NUM_ECGS},
        "rows": rows,
    }
    result["versions"] |= {name: importlib.import_module(name).__version__ for name in {"polars"} | _others()}
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def _others() -> set[str]:
    return {"duckdb"} if importlib.util.find_spec("duckdb") else set()


if __name__ == "__main__":
    main()
