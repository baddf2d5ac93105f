"""`ecgmoe embed` on real files: what the table holds, what a bad record leaves alone, and the neighbours in it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_model import save_tiny_model, tiny_model

from data_builders.synthetic import SyntheticEcg, synthetic_ecg, write_wfdb
from modeling_ecgmoe.cli import main
from modeling_ecgmoe.ecg_files import read_ecg
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor

ROOT = Path(__file__).resolve().parents[1]
WriteRecord = Callable[..., tuple[Path, SyntheticEcg]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("hub"), ())


def embed(*arguments: object) -> int:
    return main(["embed", *map(str, arguments)])


def vectors_of(path: Path) -> dict[str, np.ndarray]:
    """record to its embedding, of those that have one."""
    rows = pq.read_table(path).to_pylist()
    return {row["record"]: np.array(row["embedding"]) for row in rows if row["embedding"] is not None}


def expected_of(path: Path) -> np.ndarray:
    """What transformers' own way gives for each window of a recording, averaged."""
    extractor, model, ecg = EcgMoeFeatureExtractor(), tiny_model().ecgmoe.eval(), read_ecg(path)
    signals = extractor.windows(ecg.signal, ecg.sampling_rate)
    features = extractor(signals, ecg.sampling_rate, ecg.lead_names, return_tensors="pt")
    features.pop("quality")
    with torch.no_grad():
        return model(**features).pooler_output.mean(dim=0).numpy()


def test_a_row_holds_the_pooled_output_of_the_pretrained_model(
    tmp_path: Path, model: Path, write_record: WriteRecord
) -> None:
    path, _ = write_record("r1")
    assert embed(path, "--model", model, "--out", tmp_path / "emb.parquet") == 0
    table = pq.read_table(tmp_path / "emb.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    (row,) = table.to_pylist()
    assert (row["record"], row["path"], row["status"], row["error"]) == ("r1", str(path), "ok", None)
    assert (row["sampling_rate"], row["duration_s"], len(row["leads"])) == (250.0, 10.0, 12)
    np.testing.assert_allclose(row["embedding"], expected_of(path), atol=1e-5)


def test_a_long_recording_is_the_mean_of_its_windows(tmp_path: Path, model: Path, write_record: WriteRecord) -> None:
    path, _ = write_record("long", duration_s=34, rhythm="atrial_fibrillation")
    assert embed(path, "--model", model, "--out", tmp_path / "emb.parquet") == 0
    np.testing.assert_allclose(vectors_of(tmp_path / "emb.parquet")["long"], expected_of(path), atol=1e-5)


def test_a_bad_record_is_listed_with_its_reason_and_the_others_go_on(
    tmp_path: Path, model: Path, write_record: WriteRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        path, _ = write_record(name)
    path.with_name("b.dat").unlink()
    assert embed(path.parent, "--model", model, "--out", tmp_path / "emb.parquet") == 1
    rows = {row["record"]: row for row in pq.read_table(tmp_path / "emb.parquet").to_pylist()}
    assert {name: row["status"] for name, row in rows.items()} == {"a": "ok", "b": "error", "c": "ok"}
    assert "b.dat" in rows["b"]["error"]
    assert rows["b"]["embedding"] is None
    err = capsys.readouterr().err
    assert "b.dat" in err
    assert "2 of 3 records embedded" in err


def test_resuming_keeps_what_is_there_and_tries_the_others_again(
    tmp_path: Path, model: Path, write_record: WriteRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    out, (path, _) = tmp_path / "emb.parquet", write_record("a")
    broken, _ = write_record("b")
    samples = broken.with_suffix(".dat").read_bytes()
    broken.with_suffix(".dat").write_bytes(b"")
    assert embed(path.parent, "--model", model, "--out", out) == 1
    before = vectors_of(out)
    broken.with_suffix(".dat").write_bytes(samples)
    capsys.readouterr()
    assert embed(path.parent, "--model", model, "--out", out, "--resume") == 0
    assert "1 of 1 records embedded" in capsys.readouterr().err
    after = vectors_of(out)
    assert set(after) == {"a", "b"}
    np.testing.assert_array_equal(after["a"], before["a"])
    assert len(pq.read_table(out)) == 2


def test_resuming_keeps_the_errors_of_files_that_are_not_asked_again(
    tmp_path: Path, model: Path, write_record: WriteRecord
) -> None:
    out, (path, _) = tmp_path / "emb.parquet", write_record("a")
    broken, _ = write_record("b")
    broken.with_suffix(".dat").write_bytes(b"")
    assert embed(path, broken, "--model", model, "--out", out) == 1
    assert embed(path, "--model", model, "--out", out, "--resume") == 0
    assert sorted(pq.read_table(out)["status"].to_pylist()) == ["error", "ok"]
    assert embed(broken, "--model", model, "--out", out, "--resume") == 1
    assert sorted(pq.read_table(out)["status"].to_pylist()) == ["error", "ok"]


def test_vectors_of_another_model_are_not_mixed(
    tmp_path: Path, model: Path, write_record: WriteRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write_record("a")
    out = tmp_path / "emb.parquet"
    assert embed(path, "--model", model, "--out", out) == 0
    table = pq.read_table(out)
    pq.write_table(table.replace_schema_metadata({"base": "0123456789abcdef"}), out)
    assert embed(path, "--model", model, "--out", out, "--resume") == 2
    assert "another model (0123456789abcdef" in capsys.readouterr().err
    assert len(pq.read_table(out)) == 1


def test_embeddings_are_not_overwritten(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "emb.parquet"
    out.write_bytes(b"something")
    assert embed(tmp_path, "--model", model, "--out", out) == 2
    assert out.read_bytes() == b"something"
    assert embed(tmp_path, "--model", model, "--out", tmp_path / "emb.csv") == 2
    assert ".parquet" in capsys.readouterr().err


def test_an_interrupted_run_leaves_a_whole_file(tmp_path: Path, model: Path) -> None:
    folder, out = tmp_path / "records", tmp_path / "emb.parquet"
    ecg = synthetic_ecg(sampling_rate=250).ecg
    for number in range(40):
        write_wfdb(ecg, folder, f"r{number}")
    command = [sys.executable, "-m", "modeling_ecgmoe.cli", "embed", folder, "--model", model, "--out", out]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [*map(str, command), "--batch_size", "1"],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stderr=subprocess.PIPE,
        )
    finally:
        signal.signal(signal.SIGINT, handler)
    part = out.with_name(out.name + ".part")
    while process.poll() is None and not part.exists():
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode in (130, 0)  # 0 where it was quicker than the signal
    assert len(vectors_of(out)) == len(pq.read_table(out))
    assert not part.exists()


def test_the_nearest_neighbour_of_a_record_is_its_double(tmp_path: Path, model: Path) -> None:
    folder, out = tmp_path / "records", tmp_path / "emb.parquet"
    for number, rate in enumerate((50, 75, 100, 130)):
        ecg = synthetic_ecg(sampling_rate=250, rate_bpm=rate, seed=number).ecg
        write_wfdb(ecg, folder, f"heart{rate}")
    write_wfdb(ecg, folder, "double")
    assert embed(folder, "--model", model, "--out", out) == 0

    def neighbours(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "examples" / "nearest_neighbours.py"), str(out), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    shown = neighbours("heart130", "--k", "2").stdout.split("\n")
    assert shown[0].split() == ["1.000", str(folder / "double.hea")]
    assert len(list(filter(None, shown))) == 2
    assert "not among the 5 embedded records" in neighbours("nobody").stderr
