"""The labels of MIMIC-IV-ECG against a second, plain implementation, on real laboratory values and on made-up ones."""

import csv
import gzip
import random
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from mini_mimic import SERUM, SODIUM, WHOLE_BLOOD, MimicEcg, lab, write_ecg_tables, write_hosp

from data_builders.mimic_labels import Counts, PotassiumRule, label_ecgs

PATIENT = 10_000_001
NOON = datetime(2150, 3, 1, 12)
KNOWN = {"subject_id": PATIENT, "gender": "F", "anchor_age": 60, "anchor_year": 2148}


def minutes(count: float) -> timedelta:
    return timedelta(minutes=count)


def label(
    folder: Path,
    labs: list[dict[str, Any]],
    ecgs: list[MimicEcg] | None = None,
    patients: list[dict[str, Any]] | None = None,
    admissions: list[dict[str, Any]] | None = None,
    suffix: str = ".csv.gz",
    eol: str = "\n",
    **rule: Any,
) -> tuple[list[dict[str, Any]], Counts]:
    """The labels of ECGs, by default of one at noon, as dictionaries."""
    write_ecg_tables(folder / "ecg", ecgs or [MimicEcg(PATIENT, 40_000_000, NOON)], suffix.removesuffix(".gz"), eol)
    write_hosp(folder / "hosp", labs, patients or [KNOWN], admissions, suffix, eol)
    rows, counts = label_ecgs(folder / "ecg", folder, PotassiumRule(**rule))
    return rows.to_dicts(), counts


def value_of(folder: Path, *labs: dict[str, Any], **rule: Any) -> tuple[float | None, float | None]:
    """Value and distance for one ECG at noon."""
    ((row,), _) = label(folder, list(labs), **rule)
    return row["potassium_mmol_l"], row["potassium_distance_min"]


# Which value belongs to an ECG


def test_the_closest_value_before_or_after_is_taken(tmp_path: Path) -> None:
    before, after = lab(PATIENT, NOON - minutes(20), 3.0), lab(PATIENT, NOON + minutes(19), 5.0)
    assert value_of(tmp_path, before, after) == (5.0, 19.0)


def test_of_two_as_close_the_earlier_is_taken(tmp_path: Path) -> None:
    after, before = lab(PATIENT, NOON + minutes(20), 5.0), lab(PATIENT, NOON - minutes(20), 3.0)
    assert value_of(tmp_path, after, before) == (3.0, -20.0)


def test_of_two_at_the_same_time_the_first_number_is_taken(tmp_path: Path) -> None:
    second, first = lab(PATIENT, NOON, 5.0, labevent_id=8), lab(PATIENT, NOON, 3.0, labevent_id=7)
    assert value_of(tmp_path, second, first) == (3.0, 0.0)


@pytest.mark.parametrize("sign", [-1, 1])
def test_exactly_sixty_minutes_are_in_reach_and_a_second_more_is_not(tmp_path: Path, sign: int) -> None:
    assert value_of(tmp_path, lab(PATIENT, NOON + sign * minutes(60))) == (4.0, sign * 60.0)
    assert value_of(tmp_path, lab(PATIENT, NOON + sign * (minutes(60) + timedelta(seconds=1)))) == (None, None)


def test_the_reach_is_an_argument(tmp_path: Path) -> None:
    far = lab(PATIENT, NOON - minutes(90))
    assert value_of(tmp_path, far, max_distance_min=90) == (4.0, -90.0)
    assert value_of(tmp_path, lab(PATIENT, NOON - minutes(1)), max_distance_min=0.5) == (None, None)


def test_another_patients_value_is_not_taken(tmp_path: Path) -> None:
    assert value_of(tmp_path, lab(PATIENT + 1, NOON)) == (None, None)


def test_only_the_specimens_of_the_rule_count(tmp_path: Path) -> None:
    labs = (
        lab(PATIENT, NOON, 140, SODIUM),
        lab(PATIENT, NOON, 5.9, WHOLE_BLOOD),
        lab(PATIENT, NOON + minutes(9), 5.0),
    )
    assert value_of(tmp_path, *labs) == (5.0, 9.0)
    assert value_of(tmp_path, *labs, specimens=("whole_blood",)) == (5.9, 0.0)
    assert value_of(tmp_path, *labs, specimens=("serum", "whole_blood")) == (5.9, 0.0)


@pytest.mark.parametrize("specimens", [("serum", "whole_blood"), ("whole_blood", "serum")])
def test_at_the_same_time_the_first_specimen_of_the_rule_is_taken(tmp_path: Path, specimens: tuple[str, str]) -> None:
    ((row,), _) = label(
        tmp_path, [lab(PATIENT, NOON, 4.1, WHOLE_BLOOD), lab(PATIENT, NOON, 4.3, SERUM)], specimens=specimens
    )
    assert row["potassium_specimen"] == specimens[0]
    assert row["potassium_mmol_l"] == (4.3 if specimens[0] == "serum" else 4.1)


# Which values are passed over


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"valuenum": "", "value": "___", "comments": "HEMOLYZED, TEST NOT DONE"}, "no number"),
        ({"valuenum": "GREATER THAN 10"}, "no number"),
        ({"valueuom": ""}, "other unit"),
        ({"valueuom": "mg/dL"}, "other unit"),
        ({"valuenum": 0}, "impossible"),
        ({"valuenum": 42}, "impossible"),
        ({"charttime": ""}, "no patient or time"),
        ({"comments": "HEMOLYSIS FALSELY ELEVATES K."}, "haemolysed"),
        ({"comments": 'Slightly hemolyzed, "verified".'}, "haemolysed"),
        ({"comments": "Haemolysed specimen"}, "haemolysed"),
    ],
)
def test_what_is_no_value_is_skipped_and_counted_and_the_next_one_taken(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    spoiled, good = lab(PATIENT, NOON) | changes, lab(PATIENT, NOON + minutes(30), 4.4)
    ((row,), counts) = label(tmp_path, [spoiled, good])
    assert row["potassium_mmol_l"] == 4.4
    assert counts.skipped_values == {reason: 1}


@pytest.mark.parametrize(
    "comment", ["", "VERIFIED.  NOT HEMOLYZED.", "NO HEMOLYSIS PRESENT", "QNS TO VERIFY HEMOLYSIS."]
)
def test_a_comment_that_denies_hemolysis_spoils_nothing(tmp_path: Path, comment: str) -> None:
    ((row,), counts) = label(tmp_path, [lab(PATIENT, NOON, 5.8, comments=comment)])
    assert (row["potassium_mmol_l"], row["potassium_hemolysed"]) == (5.8, False)
    assert counts.skipped_values == {}


def test_hemolysed_values_are_kept_and_marked_where_asked_for(tmp_path: Path) -> None:
    spoiled = lab(PATIENT, NOON, 5.8, comments="Hemolysis falsely elevates this test.")
    ((row,), counts) = label(tmp_path, [spoiled], skip_hemolysed=False)
    assert (row["potassium_mmol_l"], row["potassium_hemolysed"]) == (5.8, True)
    assert counts.skipped_values == {}


@pytest.mark.parametrize("unit", ["mEq/L", "MEQ/L", "mmol/L", " mmol/l "])
def test_millimoles_and_milliequivalents_are_the_same(tmp_path: Path, unit: str) -> None:
    assert value_of(tmp_path, lab(PATIENT, NOON, 4.4, valueuom=unit)) == (4.4, 0.0)


# What a value is called


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3.4, ["hypokalaemia"]), (3.5, []), (5.5, []), (5.6, ["hyperkalaemia"])],
)
def test_the_thresholds_themselves_are_normal(tmp_path: Path, value: float, expected: list[str]) -> None:
    ((row,), _) = label(tmp_path, [lab(PATIENT, NOON, value)])
    assert row["potassium"] == expected


def test_thresholds_are_arguments(tmp_path: Path) -> None:
    ((row,), _) = label(tmp_path, [lab(PATIENT, NOON, 5.3)], low_mmol_l=3.0, high_mmol_l=5.2)
    assert row["potassium"] == ["hyperkalaemia"]


def test_without_a_value_nothing_is_known(tmp_path: Path) -> None:
    ((row,), _) = label(tmp_path, [lab(PATIENT, NOON + timedelta(days=1))])
    assert {name: row[name] for name in row if name.startswith("potassium")} == dict.fromkeys(
        (name for name in row if name.startswith("potassium")), None
    )
    assert "potassium" in row


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"specimens": ()}, "specimens must be some of serum, whole_blood"),
        ({"specimens": ("urine",)}, "specimens must be some of serum, whole_blood, found"),
        ({"specimens": ("serum", "serum")}, "specimens must be named once"),
        ({"max_distance_min": -1}, "max_distance_min must not be negative"),
        ({"max_distance_min": float("nan")}, "max_distance_min must not be negative"),
        ({"low_mmol_l": 6}, "low_mmol_l must not be above high_mmol_l"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PotassiumRule(**rule)


# Age, sex, admission, RR interval


@pytest.mark.parametrize(
    ("patient", "expected"),
    [
        ({"anchor_age": 60, "anchor_year": 2148}, (62.0, False)),
        ({"anchor_age": 60, "anchor_year": 2155}, (55.0, False)),
        ({"anchor_age": 89, "anchor_year": 2150}, (89.0, False)),
        ({"anchor_age": 91, "anchor_year": 2148}, (None, True)),
        ({"anchor_age": 20, "anchor_year": 2180}, (None, False)),  # -10 years: a wrong clock
        ({"anchor_age": "", "anchor_year": 2150}, (None, None)),
        ({"subject_id": PATIENT + 1, "anchor_age": 60, "anchor_year": 2148}, (None, None)),
    ],
)
def test_the_age_is_counted_from_the_anchor_year(
    tmp_path: Path, patient: dict[str, Any], expected: tuple[float | None, bool | None]
) -> None:
    ((row,), _) = label(tmp_path, [], patients=[KNOWN | patient])
    assert (row["age"], row["age_over_89"]) == expected


@pytest.mark.parametrize(("gender", "expected"), [("M", "male"), ("F", "female"), ("", None), ("X", None)])
def test_sex_is_read_from_the_gender_letter(tmp_path: Path, gender: str, expected: str | None) -> None:
    ((row,), _) = label(tmp_path, [], patients=[KNOWN | {"gender": gender}])
    assert row["sex"] == expected


def test_the_admission_is_that_in_whose_time_the_ecg_lies(tmp_path: Path) -> None:
    stays = [(1, -300, -100), (2, 0, 100), (3, -200, 0), (4, -50, 50)]  # minutes from noon; 4 began before 2
    admissions = [
        {"subject_id": PATIENT, "hadm_id": n, "admittime": NOON + minutes(a), "dischtime": NOON + minutes(b)}
        for n, a, b in stays
    ]
    ((row,), _) = label(tmp_path, [], admissions=admissions)
    assert row["hadm_id"] == 2
    ((row,), _) = label(tmp_path, [], admissions=admissions[:1])
    assert row["hadm_id"] is None


def test_admissions_may_lack_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ((row,), _) = label(tmp_path, [lab(PATIENT, NOON)])
    assert "holds no admissions: hadm_id is null" in caplog.text
    assert (row["hadm_id"], row["potassium_mmol_l"]) == (None, 4.0)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [(800, 800.0), (200, 200.0), (3000, 3000.0), (0, None), (199, None), (3001, None), (29999, None), (65535, None)],
)
def test_rr_codes_and_impossible_intervals_are_null(tmp_path: Path, measured: float, expected: float | None) -> None:
    ecg = MimicEcg(PATIENT, 40_000_000, NOON, rr_interval=measured)
    ((row,), counts) = label(tmp_path, [], [ecg])
    assert row["rr_interval_ms"] == expected
    assert counts.ecgs["without a valid RR interval"] == (expected is None)


def test_waves_that_were_not_measured_are_null(tmp_path: Path) -> None:
    ((row,), _) = label(tmp_path, [])
    assert (row["p_onset_ms"], row["p_end_ms"], row["t_end_ms"]) == (40.0, None, 600.0)
    assert (row["p_axis_deg"], row["qrs_axis_deg"], row["t_axis_deg"]) == (None, 30.0, None)


def test_an_empty_report_is_none(tmp_path: Path) -> None:
    ((row,), _) = label(tmp_path, [], [MimicEcg(PATIENT, 40_000_000, NOON, (" ", ""))])
    assert row["report"] is None


def test_report_lines_keep_their_order_without_the_empty_ones(tmp_path: Path) -> None:
    ecg = MimicEcg(PATIENT, 40_000_000, NOON, ("Sinus rhythm", "", "Abnormal ECG"))
    ((row,), _) = label(tmp_path, [], [ecg])
    assert row["report"] == "Sinus rhythm\nAbnormal ECG"


# Tables as they come


@pytest.mark.parametrize("eol", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_every_format_gives_the_same_labels(tmp_path: Path, suffix: str, eol: str) -> None:
    ecgs = [MimicEcg(PATIENT, 40_000_000 + n, NOON + timedelta(hours=n)) for n in range(3)]
    labs = [
        lab(PATIENT, NOON, 3.2, comments='said "thrice",\nverified'),
        lab(PATIENT, NOON + timedelta(hours=2, minutes=5), 6.1, comments="Specimen hemolyzed"),
        lab(PATIENT, NOON + timedelta(hours=2, minutes=30), 5.7),
    ]
    rows, counts = label(tmp_path, labs, ecgs, suffix=suffix, eol=eol)
    assert [row["potassium_mmol_l"] for row in rows] == [3.2, 3.2, 5.7]
    assert [row["potassium_distance_min"] for row in rows] == [0.0, -60.0, 30.0]
    assert {(row["age"], row["sex"], row["cart_id"]) for row in rows} == {(62.0, "female", "6848296")}
    assert rows[0]["filtering"] == "60 Hz notch Baseline filter"
    assert counts.skipped_values == {"haemolysed": 1}


def test_the_cheapest_of_several_formats_is_read(tmp_path: Path) -> None:
    write_hosp(tmp_path / "hosp", [lab(PATIENT, NOON, 3.9)], [KNOWN], suffix=".parquet")
    assert value_of(tmp_path, lab(PATIENT, NOON, 4.4)) == (3.9, 0.0)


def test_without_clinical_tables_the_labels_that_need_them_are_null(tmp_path: Path) -> None:
    write_ecg_tables(tmp_path, [MimicEcg(PATIENT, 40_000_000, NOON)])
    rows, counts = label_ecgs(tmp_path, None, PotassiumRule())
    write_hosp(tmp_path, [], [KNOWN], [])
    with_tables, _ = label_ecgs(tmp_path, tmp_path, PotassiumRule())
    assert dict(rows.schema) == dict(with_tables.schema)
    assert rows.select("age", "sex", "hadm_id", "potassium").row(0) == (None, None, None, None)
    assert rows["rr_interval_ms"].to_list() == [800.0]
    assert counts.skipped_values == {}


def test_a_folder_without_the_tables_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    write_ecg_tables(tmp_path, [MimicEcg(PATIENT, 40_000_000, NOON)])
    with pytest.raises(FileNotFoundError, match=r"no labevents and no patients, each expected as .*clinical_dir"):
        label_ecgs(tmp_path, tmp_path, PotassiumRule())
    with pytest.raises(FileNotFoundError, match=r"holds no record_list\.csv"):
        label_ecgs(tmp_path / "nowhere", None, PotassiumRule())


def test_a_table_that_lacks_columns_is_refused_with_both(tmp_path: Path) -> None:
    write_ecg_tables(tmp_path, [MimicEcg(PATIENT, 40_000_000, NOON)])
    (tmp_path / "record_list.csv").write_text("subject_id,study\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns study_id, ecg_time, path; found subject_id, study"):
        label_ecgs(tmp_path, None, PotassiumRule())


@pytest.mark.parametrize("suffix", [".csv.gz", ".parquet"])
def test_a_table_that_breaks_off_is_refused(tmp_path: Path, suffix: str) -> None:
    random.seed(0)
    labs = [lab(PATIENT, NOON + minutes(n), random.uniform(2, 7)) for n in range(5000)]
    write_ecg_tables(tmp_path, [MimicEcg(PATIENT, 40_000_000, NOON)])
    write_hosp(tmp_path, labs, [KNOWN], suffix=suffix)
    path = tmp_path / f"labevents{suffix}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"labevents.*get it again"):
        label_ecgs(tmp_path, tmp_path, PotassiumRule())


def test_a_study_listed_twice_is_refused(tmp_path: Path) -> None:
    write_ecg_tables(tmp_path, [MimicEcg(PATIENT, 40_000_000, NOON)] * 2)
    with pytest.raises(ValueError, match="lists a study twice"):
        label_ecgs(tmp_path, None, PotassiumRule())


def test_unreadable_lines_of_the_record_list_are_counted(tmp_path: Path) -> None:
    write_ecg_tables(tmp_path, [MimicEcg(PATIENT, 40_000_000, NOON)])
    with (tmp_path / "record_list.csv").open("a") as file:
        file.write("10000002,4000")
    rows, counts = label_ecgs(tmp_path, None, PotassiumRule())
    assert rows.height == 1
    assert counts.ecgs["in lines of record_list that cannot be read, left out"] == 1


def test_an_ecg_without_a_readable_time_gets_no_label(tmp_path: Path) -> None:
    write_ecg_tables(tmp_path, [MimicEcg(PATIENT, 40_000_000, NOON), MimicEcg(PATIENT, 40_000_001, NOON)])
    table = tmp_path / "record_list.csv"
    table.write_text(table.read_text().replace("2150-03-01 12:00:00", "yesterday", 1))
    write_hosp(tmp_path, [lab(PATIENT, NOON)], [KNOWN])
    rows, _ = label_ecgs(tmp_path, tmp_path, PotassiumRule())
    assert rows["potassium_mmol_l"].to_list() == [None, 4.0]
    assert rows["age"].to_list() == [None, 62.0]


# Against a second implementation


def plain_labels(hosp: Path, ecgs: list[MimicEcg], rule: PotassiumRule) -> list[dict[str, Any]]:
    """What `label_ecgs` gives, by loops over csv rows and nothing else."""

    def read(name: str) -> list[dict[str, str]]:
        with gzip.open(hosp / f"{name}.csv.gz", "rt", newline="") as file:
            return list(csv.DictReader(file))

    specimens = {"50971": "serum", "50822": "whole_blood"}
    values = defaultdict(list)
    for row in read("labevents"):
        specimen = specimens.get(row["itemid"])
        if specimen not in rule.specimens or not row["valuenum"] or row["valueuom"] not in ("mEq/L", "mmol/L"):
            continue
        comment = row["comments"].lower()
        denies = any(words in comment for words in ("not hemoly", "no hemoly", "verify hemoly"))
        if "hemoly" in comment and not denies and rule.skip_hemolysed:
            continue
        order = (rule.specimens.index(specimen), int(row["labevent_id"]))
        values[row["subject_id"]].append((datetime.fromisoformat(row["charttime"]), order, float(row["valuenum"])))
    patients = {row["subject_id"]: row for row in read("patients")}
    admissions = read("admissions")
    labels = []
    for ecg in ecgs:
        best, number = None, None
        for drawn, order, value in values[str(ecg.subject_id)]:
            distance = abs(drawn - ecg.ecg_time)
            if distance <= timedelta(minutes=rule.max_distance_min):
                candidate = (distance, drawn, order)
                if best is None or candidate < best:
                    best, number = candidate, value
        patient = patients[str(ecg.subject_id)]
        anchor = int(patient["anchor_age"])
        inside = [
            (stay["admittime"], int(stay["hadm_id"]))
            for stay in admissions
            if stay["subject_id"] == str(ecg.subject_id)
            and stay["admittime"] <= ecg.ecg_time.isoformat(" ") <= stay["dischtime"]
        ]
        labels.append(
            {
                "potassium_mmol_l": number,
                "potassium_distance_min": best and (best[1] - ecg.ecg_time).total_seconds() / 60,
                "age": None if anchor == 91 else float(anchor + ecg.ecg_time.year - int(patient["anchor_year"])),
                "age_over_89": anchor == 91,
                "sex": {"M": "male", "F": "female"}[patient["gender"]],
                "hadm_id": max(inside)[1] if inside else None,
            }
        )
    return labels


def ecgs_around(hosp: Path, every: int = 1) -> list[MimicEcg]:
    """ECGs at telling distances from real potassium values: at the edge, beyond it, at the same minute, anywhere."""
    rng = random.Random(0)
    with gzip.open(hosp / "labevents.csv.gz", "rt", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["itemid"] in ("50971", "50822")]
    ecgs = []
    for number, row in enumerate(rows[::every]):
        offset = rng.choice([-61, -60, -59, 0, 59, 60, 61, rng.uniform(-60, 60), rng.uniform(-3000, 3000)])
        when = (datetime.fromisoformat(row["charttime"]) + minutes(offset)).replace(microsecond=0)
        ecgs.append(MimicEcg(int(row["subject_id"]), 40_000_000 + number, when))
    rng.shuffle(ecgs)
    return ecgs


@pytest.fixture(scope="session")
def demo_hosp(test_data: Path) -> Path:
    folder = test_data / "mimic-iv-clinical-database-demo-2.2" / "hosp"
    if not (folder / "labevents.csv.gz").is_file():
        pytest.skip(f"{folder.parent.name} (open, PhysioNet) is not in ECGMOE_TEST_DATA")
    return folder


@pytest.mark.parametrize(
    "rule",
    [
        PotassiumRule(),
        PotassiumRule(specimens=("serum", "whole_blood")),
        PotassiumRule(specimens=("whole_blood", "serum"), max_distance_min=600, skip_hemolysed=False),
    ],
)
def test_labels_of_the_demo_equal_those_of_plain_loops(demo_hosp: Path, tmp_path: Path, rule: PotassiumRule) -> None:
    ecgs = ecgs_around(demo_hosp, every=5)
    write_ecg_tables(tmp_path, ecgs)
    rows, _ = label_ecgs(tmp_path, demo_hosp, rule)
    expected = plain_labels(demo_hosp, ecgs, rule)
    assert rows["study_id"].to_list() == [ecg.study_id for ecg in ecgs]
    for row, plain in zip(rows.to_dicts(), expected, strict=True):
        assert {name: row[name] for name in plain} == pytest.approx(plain)
    assert 0.5 < sum(plain["potassium_mmol_l"] is not None for plain in expected) / len(expected) < 1.0


def test_the_demo_has_its_3321_potassium_values(demo_hosp: Path, tmp_path: Path) -> None:
    ecgs = ecgs_around(demo_hosp)
    assert len(ecgs) == 3324
    write_ecg_tables(tmp_path, ecgs)
    _, counts = label_ecgs(tmp_path, demo_hosp, PotassiumRule(specimens=("serum", "whole_blood")))
    assert counts.skipped_values == {"no number": 3, "haemolysed": 63}


def test_labels_of_generated_tables_equal_those_of_plain_loops(tmp_path: Path) -> None:
    rng = random.Random(1)
    people = range(PATIENT, PATIENT + 12)
    patients = [
        {"subject_id": p, "gender": rng.choice("MF"), "anchor_age": rng.choice([33, 70, 91]), "anchor_year": 2149}
        for p in people
    ]
    labs = [
        lab(
            rng.choice(people),
            NOON + minutes(rng.randrange(0, 6000)),
            rng.choice([2.8, 3.5, 4.0, 5.5, 6.2, ""]),
            rng.choice([SERUM, WHOLE_BLOOD, SODIUM]),
            valueuom=rng.choice(["mEq/L", "mEq/L", "mmol/L", "", "mg/dL"]),
            comments=rng.choice(["", "", "Specimen hemolyzed.", "NOT HEMOLYZED"]),
        )
        for _ in range(2000)
    ]
    stays = [
        {"subject_id": p, "hadm_id": 10 * p + n, "admittime": NOON + minutes(start),
         "dischtime": NOON + minutes(start + 900)}
        for p in people for n, start in enumerate(rng.sample(range(6000), 4))
    ]  # fmt: skip
    ecgs = [MimicEcg(rng.choice(people), 40_000_000 + n, NOON + minutes(rng.randrange(0, 6000))) for n in range(400)]
    rule = PotassiumRule(specimens=("serum", "whole_blood"), max_distance_min=45)
    rows, _ = label(
        tmp_path, labs, ecgs, patients, stays, specimens=rule.specimens, max_distance_min=rule.max_distance_min
    )
    expected = plain_labels(tmp_path / "hosp", ecgs, rule)
    for row, plain in zip(rows, expected, strict=True):
        assert {name: row[name] for name in plain} == pytest.approx(plain)
    kinds = Counter(tuple(row["potassium"] or ()) for row in rows)
    assert min(kinds[("hypokalaemia",)], kinds[("hyperkalaemia",)], kinds[()]) > 20
