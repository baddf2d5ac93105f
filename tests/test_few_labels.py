"""Few labels: what is drawn, what each learner may see, and a whole run on miniatures."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import save_tiny_model, tiny_model

from benchmarks import few_labels
from benchmarks.few_labels import ADAPTER, CNN, HEART_AXIS, PROBE, FewLabelsArguments
from benchmarks.tables import KEYS, render_table
from modeling_ecgmoe.tasks import Task
from records import Records

SIDE = Task("side", "multi_class", "which way the QRS complex points", "side", ("flat", "up", "down"))


def synthetic_records(count: int, seed: int = 0, windows: int = 1) -> Records:
    """Records of 2 s in which a spike points up, down or is missing; two records of each patient."""
    rng = np.random.default_rng(seed)
    sides = np.arange(count) % 3
    records = Records.__new__(Records)
    record_of = np.repeat(np.arange(count), windows)
    values = 0.1 * rng.normal(size=(len(record_of), 12, 200)).astype(np.float32)
    values[:, :, 40::80] += np.array([0.0, 3.0, -3.0])[sides[record_of], None, None]
    peaks = np.tile(np.array([40.0, 120.0], np.float32), (len(record_of), 1))
    records.signal = {
        "input_values": torch.from_numpy(values.astype(np.float16)),
        "lead_mask": torch.ones(len(record_of), 12, dtype=torch.bool),
        "sample_mask": torch.ones(len(record_of), 200, dtype=torch.bool),
        "r_peaks": torch.from_numpy(peaks),
        "rr_intervals_s": torch.tensor([0.0, 0.8]).expand(len(record_of), 2),
        "period_s": torch.full((len(record_of),), 0.8),
    }
    records.record_of = torch.from_numpy(record_of)
    records.labels = {
        "side": torch.from_numpy(SIDE.targets([SIDE.labels[side] for side in sides])),
        "age": torch.from_numpy(rng.uniform(20, 80, (count, 1)).astype(np.float32)),
    }
    records.record_ids = [f"r{i}" for i in range(count)]
    records.patient_ids = [f"p{i // 2}" for i in range(count)]
    return records


def test_a_part_keeps_windows_labels_and_names_of_its_records() -> None:
    records = synthetic_records(6, windows=2)
    part = few_labels.part_of(records, np.array([4, 1]))
    assert part.record_ids == ["r1", "r4"]
    assert part.record_of.tolist() == [0, 0, 1, 1]
    assert part.patient_ids == ["p0", "p2"]
    torch.testing.assert_close(part.signal["input_values"], records.signal["input_values"][[2, 3, 8, 9]])
    torch.testing.assert_close(part.labels["age"], records.labels["age"][[1, 4]])
    assert len(records) == 12


def test_a_draw_has_each_class_as_often_and_no_patient_twice() -> None:
    records = synthetic_records(300)
    fit, inner = few_labels.draw(records, SIDE, 30, np.random.default_rng(0))
    assert (len(fit), len(inner)) == (24, 6)
    for index, each in ((fit, 8), (inner, 2)):
        assert records.labels["side"][index].sum(dim=0).tolist() == [each] * 3
    both = np.concatenate([fit, inner])
    assert len({records.patient_ids[i] for i in both}) == len(both)
    other = np.concatenate(few_labels.draw(records, SIDE, 30, np.random.default_rng(1)))
    assert set(other) != set(both)


def test_a_draw_leaves_out_records_without_a_label() -> None:
    records = synthetic_records(60)
    records.labels["age"][::2] = torch.nan
    age = few_labels.TASKS["age"]
    both = np.concatenate(few_labels.draw(records, age, 10, np.random.default_rng(0)))
    assert len(both) == 10
    assert (both % 2 == 1).all()
    with pytest.raises(ValueError, match="0 labelled records are too few"):
        few_labels.draw(records, age, 10, np.random.default_rng(0), within=np.arange(0, 60, 2))


def test_the_number_of_steps_is_the_same_rule_for_adapter_and_cnn() -> None:
    arguments = FewLabelsArguments(epochs=20, batch_size=32, min_steps=80, max_steps=300)
    assert [arguments.steps(count) for count in (24, 320, 5000)] == [80, 200, 300]


def test_axes_that_say_no_direction_are_unknown() -> None:
    assert [HEART_AXIS.read(text) for text in ("MID", "ALAD", "RAD", "SAG", "AXL", None)] == [
        "normal", "left", "right", None, None, None,
    ]  # fmt: skip


def test_the_learners_learn_what_there_is_to_learn_and_the_rows_say_so() -> None:
    arguments = FewLabelsArguments(counts=[60], draws=2, min_steps=12, max_steps=12, batch_size=24, resamples=30)
    model = tiny_model().eval()
    test = few_labels.encode(model, synthetic_records(60, seed=1))
    trial = few_labels.Trial([SIDE], 60, {"related labels seen": "nothing"})
    (row,) = few_labels.rows_of_draws(model, synthetic_records(400), test, [trial], arguments)
    assert row["labelled records"] == 60
    assert row[PROBE]["value"] > 0.9
    assert row[CNN]["value"] > 0.6
    for name in (ADAPTER, PROBE, CNN):
        assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
        assert np.mean(row[name]["draws"]) == pytest.approx(row[name]["value"])
        assert len(row[name]["draws"]) == 2
    gap = row[ADAPTER]["value"] - row[CNN]["value"]
    assert row["adapter minus CNN"]["value"] == pytest.approx(gap)


def test_in_cross_validation_each_record_is_answered_without_its_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def answer_one(into, tasks, few, model, arguments):
        patients = [set(material.records.patient_ids) for material in few[:3]]
        seen.append(few.test.records.record_ids)
        assert not patients[2] & (patients[0] | patients[1])
        for name in (ADAPTER, PROBE, CNN):
            answers = np.full((len(few.test.records.record_ids), 3), 1 / 3)
            into.setdefault(SIDE.name, {})[name] = [answers]

    monkeypatch.setattr(few_labels, "add_answers", answer_one)
    records = synthetic_records(30)
    records.labels["side"][:3] = torch.nan
    question = few_labels.HeldOut(SIDE, lambda side: side, "nothing")
    arguments = FewLabelsArguments(folds=3, resamples=20)
    row = few_labels.cross_validated_row(tiny_model().eval(), records, question, 12, arguments)
    assert sorted(name for names in seen for name in names) == sorted(records.record_ids[3:])
    assert row["labelled records"] == 12
    assert row[ADAPTER]["n"] == 27
    assert row[ADAPTER]["value"] == 0.5


def test_a_task_the_model_knows_gets_a_new_head() -> None:
    """Otherwise the answers would be those of all labels, and not of a few."""
    model = tiny_model(tasks={"age": few_labels.TASKS["age"].to_dict()}).eval()
    with torch.no_grad():
        model.heads["head_age"].bias.fill_(1000.0)
    records = synthetic_records(30)
    material = few_labels.encode(model, records)
    few = few_labels.Few(material.part(np.arange(20)), material.part(np.arange(20, 30)), material, seed=0)
    arguments = FewLabelsArguments(min_steps=1, max_steps=1)
    answers = few_labels.adapter_answers(model, few_labels.TASKS["age"], few, arguments)
    assert np.abs(answers).max() < 1000
    assert model.heads["head_age"].bias.item() == 1000.0


def test_a_whole_run_on_miniatures(mini_ptb_xl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ptb-xl"
    shutil.copytree(mini_ptb_xl, folder)
    table = folder / "ptbxl_database.csv"
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        codes = ({"NORM": 100.0, "SR": 0.0}, {"IMI": 50.0, "AFIB": 0.0})[number % 2]
        row |= {"scp_codes": codes, "sex": number % 2}
        row |= {"heart_axis": ("MID", "LAD", "RAD", "SAG")[number % 4], "weight": 60 + number, "height": 150 + number}
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    words = [
        "few_labels", "--data_dir", folder, "--cache_dir", tmp_path / "cache", "--num_proc", 1, "--counts", 6,
        "--model", save_tiny_model(tmp_path / "hub", tasks=()), "--resamples", 20,
        "--shares", 0.4, "--draws", 1, "--min_steps", 2, "--max_steps", 2,
        "--out", tmp_path / "few_labels.json",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    few_labels.main()
    held_out, seen = (json.loads((tmp_path / f"few_labels{end}.json").read_text()) for end in ("", "_seen"))
    assert set(held_out) >= set(KEYS)
    assert [row["labelled records"] for row in held_out["rows"]] == [6, 6, 6]
    assert [row["task"] for row in held_out["rows"]][1:] == ["body weight", "body height"]
    assert held_out["rows"][1]["median"]["unit"] == "kg"
    assert [row["task"] for row in seen["rows"]] == list(few_labels.SEEN)
    for result in (held_out, seen):
        assert str(tmp_path) not in json.dumps(result)
        assert "LoRA adapter" in render_table(result)
