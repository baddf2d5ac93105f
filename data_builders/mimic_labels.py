"""What MIMIC-IV knows of the patient behind each ECG: the closest potassium, age, sex, RR interval, admission.

MIMIC-IV-ECG (open) holds the recordings and what the electrocardiograph measured; MIMIC-IV's module `hosp`
(credentialed) holds laboratory values, patients and admissions. `labevents` has 118 million rows, so it is streamed:
memory holds the potassium values alone, some 3 % of the rows. Every table may be .parquet, .csv or .csv.gz.

Times are as in the tables: `charttime` is when the blood was drawn, `ecg_time` comes from the clock of the
electrocardiograph, which nothing kept in step with the hospital's. Both are shifted by the same days for one patient.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import polars as pl

logger = logging.getLogger(__name__)

FORMATS = (".parquet", ".csv", ".csv.gz")  # the first that is there is read: the cheapest first
ITEM_IDS = {"serum": 50971, "whole_blood": 50822}  # of d_labitems: "Potassium", "Potassium, Whole Blood"
UNITS = ("meq/l", "mmol/l")  # the same for an ion of one charge
POSSIBLE_MMOL_L = (1.0, 15.0)  # survived extremes are about 1.1 and 14
HIDDEN_AGE = 91  # the anchor age of everyone over 89
POSSIBLE_AGES = (0, 120)
POSSIBLE_RR_MS = (200, 3000)  # 0, 29999 and 65535 mean that nothing was measured
# What the electrocardiograph measured of the waves, by the name that says the unit.
WAVES = {
    **{name: f"{name}_ms" for name in ("p_onset", "p_end", "qrs_onset", "qrs_end", "t_end")},
    **{name: f"{name}_deg" for name in ("p_axis", "qrs_axis", "t_axis")},
}
NOT_MEASURED = (29999.0, 32767.0, -32768.0, 65535.0)
REPORT_LINES = tuple(f"report_{number}" for number in range(18))
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"

Columns = Mapping[str, pl.DataType | type[pl.DataType]]
_LABEVENTS: Columns = {
    "labevent_id": pl.Int64,
    "subject_id": pl.Int64,
    "itemid": pl.Int64,
    "charttime": pl.Datetime("us"),
    "valuenum": pl.Float64,
    "valueuom": pl.String,
    "comments": pl.String,
}
_PATIENTS: Columns = {"subject_id": pl.Int64, "gender": pl.String, "anchor_age": pl.Int64, "anchor_year": pl.Int64}
_ADMISSIONS: Columns = {
    "subject_id": pl.Int64,
    "hadm_id": pl.Int64,
    "admittime": pl.Datetime("us"),
    "dischtime": pl.Datetime("us"),
}
_RECORDS: Columns = {"subject_id": pl.Int64, "study_id": pl.Int64, "ecg_time": pl.Datetime("us"), "path": pl.String}
_MEASURED: Columns = {
    "study_id": pl.Int64,
    "cart_id": pl.String,
    **dict.fromkeys(REPORT_LINES, pl.String),
    "bandwidth": pl.String,
    "filtering": pl.String,
    **dict.fromkeys(("rr_interval", *WAVES), pl.Float64),
}
# What an ECG gets from MIMIC-IV.
_CLINICAL: Columns = {
    "age": pl.Float64,
    "age_over_89": pl.Boolean,
    "sex": pl.String,
    "hadm_id": pl.Int64,
    "potassium_distance_min": pl.Float64,
    "potassium_mmol_l": pl.Float64,
    "potassium_specimen": pl.String,
    "potassium_hemolysed": pl.Boolean,
    "potassium": pl.List(pl.String),
}


@dataclass(frozen=True)
class PotassiumRule:
    """Which laboratory value belongs to an ECG, and what it is called.

    Args:
        specimens: any of `ITEM_IDS`.
        max_distance_min: the blood was drawn at most so many minutes before or after the ECG.
        low_mmol_l, high_mmol_l: below is hypokalaemia, above is hyperkalaemia, neither at the edge.
        skip_hemolysed: pass over values of which the laboratory says that burst red cells falsify them.

    Raises:
        ValueError: a specimen is unknown or there is none, or a number makes no sense.
    """

    specimens: tuple[str, ...] = ("serum",)
    max_distance_min: float = 60.0
    low_mmol_l: float = 3.5
    high_mmol_l: float = 5.5
    skip_hemolysed: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "specimens", tuple(self.specimens))
        if not self.specimens or not set(self.specimens) <= ITEM_IDS.keys():
            raise ValueError(f"specimens must be some of {', '.join(ITEM_IDS)}, found {self.specimens}")
        if len(set(self.specimens)) < len(self.specimens):
            raise ValueError(f"specimens must be named once, found {self.specimens}")
        if not self.max_distance_min >= 0:
            raise ValueError(f"max_distance_min must not be negative, found {self.max_distance_min}")
        if not self.low_mmol_l <= self.high_mmol_l:
            raise ValueError(f"low_mmol_l must not be above high_mmol_l, found {self.low_mmol_l}, {self.high_mmol_l}")


@dataclass
class Counts:
    """How many rows were passed over for which reason, and how many ECGs got which label."""

    skipped_values: dict[str, int] = field(default_factory=dict)
    ecgs: dict[str, int] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------------- tables


def find_table(folder: Path, name: str) -> Path | None:
    """The table of that name in any of `FORMATS`, None where there is none."""
    return next((path for suffix in FORMATS if (path := folder / f"{name}{suffix}").is_file()), None)


def clinical_tables(clinical_dir: Path) -> dict[str, Path | None]:
    """The tables of MIMIC-IV, or of its folder `hosp`, that have a part in labels; None for one that is not there."""
    folder = clinical_dir / "hosp" if (clinical_dir / "hosp").is_dir() else clinical_dir
    return {name: find_table(folder, name) for name in ("labevents", "patients", "admissions")}


def scan_table(path: Path, columns: Columns, **only: list[int]) -> pl.LazyFrame:
    """Some columns of a table, lazily. What cannot be read as its column's type is null.

    Args:
        path: the table's file.
        columns: name to type.
        only: the values of a column whose rows are wanted; all other rows are passed over while the file is read.

    Raises:
        ValueError: the table lacks columns, or is no table.
    """
    try:  # every column of a CSV as text
        table = pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_csv(path, infer_schema_length=0)
        found = table.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}; get it again") from error
    lacking = [name for name in columns if name not in found]
    if lacking:
        raise ValueError(f"{path} lacks the columns {', '.join(lacking)}; found {', '.join(found.names())}")
    for name, values in only.items():
        # Before the other columns are looked at: polars does not move a filter above them by itself.
        table = table.filter(_as_type(name, found[name], columns[name]).is_in(values))
    return table.select(_as_type(name, found[name], wanted) for name, wanted in columns.items())


def _as_type(name: str, found: pl.DataType, wanted: pl.DataType | type[pl.DataType]) -> pl.Expr:
    column = pl.col(name)
    if wanted == pl.String and found == pl.String:
        text = column.str.strip_chars()
        return pl.when(text != "").then(text)
    if found == pl.String:
        column = column.str.strip_chars()
        if isinstance(wanted, pl.Datetime):
            return column.str.to_datetime(TIME_FORMAT, strict=False, time_unit="us")
    return column.cast(wanted, strict=False)


def collect(table: pl.LazyFrame, path: Path) -> pl.DataFrame:
    """Read a table piece by piece.

    Raises:
        ValueError: the file breaks off or is damaged, as after an interrupted download.
    """
    try:
        return table.collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path} is damaged or breaks off: {error}; get it again") from error


# ----------------------------------------------------------------------------------------------------------- potassium


def read_potassium(path: Path, rule: PotassiumRule, counts: Counts) -> pl.DataFrame:
    """The usable potassium values of `labevents`.

    Skipped, and counted by the first reason that holds: rows without patient or time, without a number (the result is
    a comment), in another unit or without one, outside `POSSIBLE_MMOL_L`, and haemolysed where the rule says so.

    Returns:
        `subject_id`, `charttime`, `potassium_mmol_l`, `potassium_specimen`, `potassium_hemolysed`; one row for a
        patient and time, sorted: of several values, the first specimen of the rule, then the first `labevent_id`.
    """
    comment = pl.col("comments").str.to_lowercase()
    # "Hemolysis falsely elevates K", "Slightly hemolyzed", but "Specimen not hemolyzed", "QNS to verify hemolysis".
    denied = comment.str.contains(r"\b(no|not|non|without)[ -]*ha?emoly|verify ha?emoly")
    unit = pl.col("valueuom").str.to_lowercase().is_in(UNITS)
    reason = (
        pl.when(pl.any_horizontal(pl.col("subject_id", "charttime").is_null()))
        .then(pl.lit("no patient or time"))
        .when(pl.col("valuenum").is_null() | pl.col("valuenum").is_nan())
        .then(pl.lit("no number"))
        .when(~unit.fill_null(value=False))
        .then(pl.lit("other unit"))
        .when(~pl.col("valuenum").is_between(*POSSIBLE_MMOL_L))
        .then(pl.lit("impossible"))
    )
    if rule.skip_hemolysed:
        reason = reason.when(pl.col("hemolysed")).then(pl.lit("haemolysed"))
    items = [ITEM_IDS[name] for name in rule.specimens]
    table = (
        scan_table(path, _LABEVENTS, itemid=items)
        .with_columns(hemolysed=(comment.str.contains("ha?emoly") & ~denied).fill_null(value=False))
        .with_columns(reason=reason)
        .drop("comments", "valueuom")
    )
    values = collect(table, path)
    skipped = values.drop_nulls("reason").group_by("reason").len().sort("reason")
    counts.skipped_values.update(skipped.iter_rows())
    return (
        values.filter(pl.col("reason").is_null())
        .with_columns(
            order=pl.col("itemid").replace_strict(items, range(len(items)), return_dtype=pl.Int8),
            potassium_specimen=pl.col("itemid").replace_strict(items, rule.specimens, return_dtype=pl.String),
        )
        .sort("subject_id", "charttime", "order", "labevent_id")
        .unique(["subject_id", "charttime"], keep="first", maintain_order=True)
        .select(
            "subject_id",
            "charttime",
            "potassium_specimen",
            potassium_mmol_l="valuenum",
            potassium_hemolysed="hemolysed",
        )
    )


def closest_potassium(ecgs: pl.DataFrame, values: pl.DataFrame, rule: PotassiumRule) -> pl.DataFrame:
    """Give each ECG the value of the same patient that was drawn closest to it; of two as close, the earlier one.

    Args:
        ecgs: with `subject_id` and `ecg_time`.
        values: see `read_potassium`.

    Returns:
        the ECGs in their order, with `potassium_mmol_l`, `potassium_distance_min` (positive: drawn after the ECG),
        `potassium_specimen`, `potassium_hemolysed` and `potassium`: hypokalaemia, hyperkalaemia or neither in a list.
        All null without a value in reach.
    """
    details = ("potassium_mmol_l", "potassium_specimen", "potassium_hemolysed")
    numbered = ecgs.select("subject_id", "ecg_time").with_row_index("row").sort("subject_id", "ecg_time")
    drawn = values.with_columns(drawn=pl.col("charttime")).select("subject_id", "charttime", "drawn", *details)
    found = numbered
    sides: dict[str, Literal["backward", "forward"]] = {"_before": "backward", "_after": "forward"}
    for side, strategy in sides.items():
        found = found.join_asof(
            drawn.rename({name: f"{name}{side}" for name in ("drawn", *details)}),
            left_on="ecg_time",
            right_on="charttime",
            by="subject_id",
            strategy=strategy,
            tolerance=timedelta(minutes=rule.max_distance_min),
            check_sortedness=False,  # sorted above, within each patient
        ).drop("charttime", strict=False)
    before, after = (_minutes(f"drawn{side}") for side in ("_before", "_after"))
    takes_before = after.is_null() | (before.abs() <= after)
    value = pl.col("potassium_mmol_l")
    labels = (
        found.with_columns(
            pl.when(takes_before).then(before).otherwise(after).alias("potassium_distance_min"),
            *(
                pl.when(takes_before).then(pl.col(f"{name}_before")).otherwise(pl.col(f"{name}_after")).alias(name)
                for name in details
            ),
        )
        .with_columns(
            potassium=pl.when(value < rule.low_mmol_l)
            .then(pl.lit(["hypokalaemia"]))
            .when(value > rule.high_mmol_l)
            .then(pl.lit(["hyperkalaemia"]))
            .when(value.is_not_null())
            .then(pl.lit([], dtype=pl.List(pl.String)))
        )
        .sort("row")
        .select("potassium_distance_min", *details, "potassium")
    )
    return ecgs.hstack(labels)


def _minutes(drawn: str) -> pl.Expr:
    return (pl.col(drawn) - pl.col("ecg_time")).dt.total_seconds(fractional=True) / 60.0


# ---------------------------------------------------------------------------------------------- patient and admission


def with_patients(ecgs: pl.DataFrame, path: Path, counts: Counts) -> pl.DataFrame:
    """Add `age`, `age_over_89` and `sex` ("male", "female") from `patients`, null where the patient is not in it.

    MIMIC-IV gives each patient's age in one year of the shifted calendar, the anchor; the age at the ECG is that and
    the years between, so it can be wrong by one. Whoever was over 89 in the anchor year has `HIDDEN_AGE` as anchor:
    the age is null then and `age_over_89` true, whenever the ECG was made. Ages outside `POSSIBLE_AGES`, which come
    from wrong clocks of electrocardiographs, are null and counted.
    """
    patients = collect(scan_table(path, _PATIENTS), path).unique("subject_id", keep="first", maintain_order=True)
    age = pl.col("anchor_age") + pl.col("ecg_time").dt.year() - pl.col("anchor_year")
    is_hidden = pl.col("anchor_age") >= HIDDEN_AGE
    joined = ecgs.join(patients, on="subject_id", how="left", maintain_order="left").with_columns(
        age=pl.when(~is_hidden).then(age).cast(pl.Float64),
        age_over_89=is_hidden,
        sex=pl.col("gender").str.to_uppercase().replace_strict({"M": "male", "F": "female"}, default=None),
    )
    is_possible = pl.col("age").is_between(*POSSIBLE_AGES)
    counts.ecgs["of a patient who is not in patients"] = joined["anchor_age"].null_count()
    counts.ecgs["with an impossible age, which is left out"] = joined.filter(~is_possible).height
    return joined.with_columns(age=pl.when(is_possible).then("age")).drop("gender", "anchor_age", "anchor_year")


def with_admissions(ecgs: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Add `hadm_id`: the admission of `admissions` in whose time, ends included, the ECG was made; of several, the one
    that began last. Null outside of any, as in the emergency department before admission."""
    stays = (
        collect(scan_table(path, _ADMISSIONS), path).drop_nulls().filter(pl.col("admittime") <= pl.col("dischtime"))
    )
    numbered = ecgs.with_row_index("row")
    inside = (
        numbered.select("row", "subject_id", "ecg_time")
        .join(stays, on="subject_id")
        .filter(pl.col("ecg_time").is_between("admittime", "dischtime"))
        .sort("admittime", "hadm_id")
        .unique("row", keep="last")
        .select("row", "hadm_id")
    )
    return numbered.join(inside, on="row", how="left", maintain_order="left").drop("row")


# --------------------------------------------------------------------------------------------------------------- whole


def read_ecgs(data_dir: Path, counts: Counts) -> pl.DataFrame:
    """The ECGs of `record_list` with what `machine_measurements` says of them, one row for each, in the list's order.

    Returns:
        `subject_id`, `study_id`, `ecg_time`, `path`, `cart_id`, `bandwidth`, `filtering`, `report` (its lines that are
        not empty), `rr_interval_ms`, the waves by the names in `WAVES`; null where nothing was measured.

    Raises:
        FileNotFoundError: a table is not there.
        ValueError: a table is damaged, or lists a study twice.
    """
    records = _read_studies(data_dir, "record_list", _RECORDS)
    known = records.drop_nulls(["subject_id", "study_id", "path"])
    counts.ecgs["in lines of record_list that cannot be read, left out"] = records.height - known.height
    measured = _read_studies(
        data_dir,
        "machine_measurements",
        _MEASURED,
        "study_id",
        "cart_id",
        "bandwidth",
        "filtering",
        pl.concat_str(REPORT_LINES, separator="\n", ignore_nulls=True).alias("report"),
        pl.col("rr_interval").alias("rr_interval_ms"),
        *(pl.when(~pl.col(name).is_in(NOT_MEASURED)).then(name).alias(named) for name, named in WAVES.items()),
    )
    joined = known.join(measured, on="study_id", how="left", maintain_order="left")
    is_possible = pl.col("rr_interval_ms").is_between(*POSSIBLE_RR_MS)
    counts.ecgs["without a valid RR interval"] = joined.filter(~is_possible.fill_null(value=False)).height
    return joined.with_columns(
        report=pl.when(pl.col("report") != "").then("report"),
        rr_interval_ms=pl.when(is_possible).then("rr_interval_ms"),
    )


def _read_studies(data_dir: Path, name: str, columns: Columns, *made: pl.Expr | str) -> pl.DataFrame:
    """A table with one row a study; `made` are the columns to make of those that are read, where not themselves."""
    path = find_table(data_dir, name)
    if path is None:
        raise FileNotFoundError(f"{data_dir} holds no {name}{FORMATS[1]}, nor one in {', '.join(FORMATS)}")
    table = scan_table(path, columns)
    read = collect(table.select(*made) if made else table, path)
    if read["study_id"].drop_nulls().is_duplicated().any():
        raise ValueError(f"{path} lists a study twice; get it again")
    return read


def label_ecgs(data_dir: Path, clinical_dir: Path | None, rule: PotassiumRule) -> tuple[pl.DataFrame, Counts]:
    """All ECGs of MIMIC-IV-ECG with their labels.

    Args:
        data_dir: with `record_list` and `machine_measurements`.
        clinical_dir: MIMIC-IV, or its folder `hosp`; None where the user has no access to it. `labevents` and
            `patients` are needed, `admissions` may lack. Labels that need what is not there are null.
        rule: of the potassium labels.

    Raises:
        FileNotFoundError: a table is not there.
        ValueError: a table is damaged.
    """
    counts = Counts()
    ecgs = read_ecgs(data_dir, counts)
    if clinical_dir is None:
        return ecgs.with_columns(pl.lit(None, kind).alias(name) for name, kind in _CLINICAL.items()), counts
    tables = clinical_tables(clinical_dir)
    labevents, patients, admissions = tables.values()
    if labevents is None or patients is None:
        lacking = [name for name in ("labevents", "patients") if tables[name] is None]
        raise FileNotFoundError(
            f"{clinical_dir} holds no {' and no '.join(lacking)}, each expected as {', '.join(FORMATS)}: clinical_dir "
            "is MIMIC-IV (https://doi.org/10.13026/kpb9-mt58, for credentialed users) or its folder hosp"
        )
    ecgs = with_patients(ecgs, patients, counts)
    if admissions is None:
        logger.warning("%s holds no admissions: hadm_id is null", clinical_dir)
        ecgs = ecgs.with_columns(hadm_id=pl.lit(None, pl.Int64))
    else:
        ecgs = with_admissions(ecgs, admissions)
    values = read_potassium(labevents, rule, counts)
    ecgs = closest_potassium(ecgs, values, rule)
    counts.ecgs |= {
        "with a potassium value": ecgs["potassium"].count(),
        "of these with hypokalaemia": ecgs.filter(pl.col("potassium").list.contains("hypokalaemia")).height,
        "of these with hyperkalaemia": ecgs.filter(pl.col("potassium").list.contains("hyperkalaemia")).height,
    }
    return ecgs, counts
