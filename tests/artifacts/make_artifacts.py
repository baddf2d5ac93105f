"""Write the golden checkpoint beside this file: a tiny model, one adapter, a recording, and what they answered.

    PYTHONPATH=tests:. python tests/artifacts/make_artifacts.py

Run it only where a change of the format or of the mathematics is meant, and say so in the change: the files stand for
every checkpoint that people have.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from tiny_model import save_tiny_model

from data_builders.synthetic import synthetic_ecg
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.leads import LEADS

FOLDER = Path(__file__).resolve().parent
SAMPLING_RATE = 250


def main() -> None:
    """Write `model/`, `adapters/age/` and `expected.npz`."""
    for name in ("model", "adapters"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    model = save_tiny_model(FOLDER, tasks=("age",))
    for code in model.glob("*.py"):
        code.unlink()  # the checkpoint has to work with the code of today, whatever that is
    # Millivolts as a recorder would store them, in steps of 1 µV: they fit two bytes.
    signal = np.round(1000 * synthetic_ecg(sampling_rate=SAMPLING_RATE, noise_mv=0.01, seed=7).ecg.signal)
    many = MultiTask.from_pretrained(model)
    window = many.extractor.extract((signal / 1000).astype(np.float32), SAMPLING_RATE, LEADS)
    features = many.extractor.pad([window], return_tensors="pt")
    features.pop("quality")
    with torch.no_grad():
        output = many.model(**features)
    np.savez_compressed(
        FOLDER / "expected.npz",
        signal_uv=signal.astype(np.int16),
        sampling_rate=SAMPLING_RATE,
        pooler_output=output.pooler_output,
        adapter_age=many.logits([window])["age"],
        fingerprint=many.base,
        **{f"features_{name}": features[name] for name in many.extractor.model_input_names},
        **{f"logits_{name}": logits for name, logits in output.logits.items()},
    )
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(json.dumps({"folder": FOLDER.name, "bytes": size}))


if __name__ == "__main__":
    main()
