"""The page of an exported model: its files, inputs and outputs, and a few lines that run it."""

from typing import Any

from .adapters import MultiTask
from .tasks import Task

MAX_LABELS = 12
RUN = {
    "onnx": """\
import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
tasks = json.load(open("tasks.json"))
given = np.load("check.npz")
inputs = {value.name: given[value.name] for value in session.get_inputs()}
for name, logits in zip(tasks, session.run(list(tasks), inputs)):
    print(name, logits[0], "expected", given[f"logits_{name}"][0])""",
    "torch_export": """\
import json
import numpy as np
import torch

model = torch.export.load("model.pt2").module()
given = np.load("check.npz")
inputs = {name: torch.from_numpy(given[name]) for name in given if not name.startswith("logits_")}
for name, logits in model(**inputs).items():
    print(name, logits[0], "expected", given[f"logits_{name}"][0])""",
}


def _meaning(task: Task) -> str:
    """The unit of a regression, or the labels; of many the first, and how many there are."""
    shown = task.unit or ", ".join(task.labels[:MAX_LABELS])
    return shown if len(task.labels) <= MAX_LABELS else f"{shown}, ... ({len(task.labels)} labels)"


def export_page(many: MultiTask, report: dict[str, Any]) -> str:
    """How to run what lies in the folder; report: what its `export.json` holds."""
    longest = max(many.cards, key=lambda name: len(many.cards[name].task.labels))
    form = "onnx" if report["opset"] else "torch_export"
    settings = many.extractor
    tasks = [
        f"| {name} | {card.task.kind.replace('_', ' ')} | {_meaning(card.task)} |" for name, card in many.cards.items()
    ]
    files = [
        f"| {name} | {found['mib']:.1f} MiB | {found['largest_difference']:.1e} |"
        for name, found in report["files"].items()
    ]
    return f"""\
# ECG-MoE, exported

Backbone and {len(many.cards)} task adapters as one graph. Made from the model with fingerprint `{many.base}`.

| file | size | largest difference of a logit from PyTorch |
|---|---:|---:|
{chr(10).join(files)}

The differences are over {report["windows_compared"]} windows, and over batches with leads, beats and samples missing;
`export.json` has each.

## Inputs

| name | shape | what |
|---|---|---|
| input_values | float32 (batch, 12, {settings.window_samples}) | mV / {settings.scale_mv} at \
{settings.sampling_rate} Hz, band-passed; I II III aVR aVL aVF V1 to V6; 0 where missing |
| lead_mask | bool (batch, 12) | which leads there are |
| sample_mask | bool (batch, {settings.window_samples}) | False on padding: a shorter recording is padded at its end |
| r_peaks | float32 (batch, beats) | R peaks in samples, -1 where there are no more |
| rr_intervals_s | float32 (batch, beats) | seconds since the beat before, 0 where unknown or not within 0.2 to 3 s |
| period_s | float32 (batch,) | the mean of the known intervals, 0 where unknown |

`preprocessor_config.json` holds the band, the scale and the limits. The package's feature extractor makes all of it
with numpy and scipy; `examples/run_onnx.py` of the source tree does it with numpy alone, and a shorter search for R
peaks.

## Outputs

One for each task, named like it: logits, float32 (batch, outputs). Of a recording with several windows, average them.

| task | kind | unit or labels |
|---|---|---|
{chr(10).join(tasks)}

All labels of a task, in the order of its outputs: `json.load(open("tasks.json"))["{longest}"]["task"]["labels"]`;
their codes are beside them.

A regression is `logit * spread + center` in its unit, its interval `half_widths` to both sides (the key is the fewest
leads it holds for), with `relative_widths` times (SD of the RR intervals + 10 ms) / their number. Where
`group_half_widths` has the same key, true values between two `group_bounds` have a half-width of their own, and the
interval reaches as far as there are values whose half-width is at least their distance from the answer. Nothing is
below `minimum`. `examples/run_onnx.py` computes it. With `x = logit + shift`, labels have the probability
`sigmoid((slope * x + bend * tanh(x)) / temperature)` (no shift is 0, no slope 1, no bend 0), classes of a multi class
task the softmax of their logits over the temperature; a label is given from its threshold on. All of it is in
`tasks.json`.

## Run

```python
{RUN[form]}
```

Research software, not a medical device: its answers must not guide the care of a patient.
"""
