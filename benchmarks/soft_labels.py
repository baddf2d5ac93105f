r"""What trained models answer for the training split, on average: targets for `train.py pretrain --soft_labels FILE`.

    python -m benchmarks.soft_labels --data_dir ptb-xl --models hub/model runs/plain_cnn/model \
        --out runs/soft.safetensors

Probabilities and values are averaged, not logits. Recordings are read whole and undisturbed.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.plain_cnn import PlainCnn
from evaluation import predict_logits
from modeling_ecgmoe.configuration_ecgmoe import PRETRAINING_TASKS
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks
from modeling_ecgmoe.tasks import TASKS
from records import DataArguments, Records, load_split


def load_model(folder: Path) -> Any:
    """ECG-MoE with its heads, or the plain CNN, whichever the folder holds.

    Raises:
        FileNotFoundError: it holds none.
    """
    if (folder / "config.json").is_file():
        return EcgMoeForTasks.from_pretrained(folder, dtype=torch.float32).eval()
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no model; train one with train.py pretrain or benchmarks.plain_cnn")
    return PlainCnn.from_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Write the mean answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--max_records", type=int)
    parser.add_argument("--out", required=True)
    options = parser.parse_args(argv)
    models = [load_model(Path(folder)) for folder in options.models]
    rows = load_split(DataArguments(data_dir=options.data_dir, max_records=options.max_records), options.split)
    records = Records(rows, EcgMoeFeatureExtractor(), [TASKS[name] for name in PRETRAINING_TASKS], num_proc=2)
    answers: dict[str, list[np.ndarray]] = {}
    for model in models:
        for name, logits in predict_logits(model, records, torch.device("cpu")).items():
            answers.setdefault(name, []).append(TASKS[name].answers(logits))
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: torch.from_numpy(np.mean(each, axis=0).astype(np.float32)) for name, each in answers.items()},
        options.out,
    )


if __name__ == "__main__":
    main()
