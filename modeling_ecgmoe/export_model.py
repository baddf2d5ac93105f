"""The model for other runtimes: backbone and all adapters as one graph, as ONNX or as a program of torch.export.

Whoever runs the graph gives what the feature extractor makes and gets logits (b, outputs) for each task; `tasks.json`
holds what turns them into answers. Nothing is written that was not compared with PyTorch.
"""

import contextlib
import copy
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .adapters import SIGNAL_KEYS, MultiTask
from .ecg_files import find_ecgs, read_ecg
from .export_page import export_page
from .folding import FoldedStateSpace
from .temporal import StateSpace

TOLERANCE = 1e-4
PROGRAMS = {"onnx": "model.onnx", "torch_export": "model.pt2"}
INT8 = "model_int8.onnx"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
AXES = ("batch", "beats")
OPSET = 20  # what the parity and the sizes in benchmarks/results were measured with
Windows = Sequence[dict[str, Any]]
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class ExportError(ValueError):
    """The model cannot be exported as asked. The message is one line: what is wrong, what to do."""


# ----------------------------------------------------------------------------------------------------------- the graph


class GraphStateSpace(nn.Module):
    """`StateSpace` as a product with the matrix of its kernel, of which a graph keeps the two-sided kernel alone.

    Runtimes transform Fourier slowly or not at all. Sequences are `length` tokens long.
    """

    lags: Tensor

    def __init__(self, layer: StateSpace, length: int) -> None:
        super().__init__()
        self.layer, self.length = layer, length
        past, future = layer.kernel(length).float().split(length, dim=1)
        lags = torch.cat([future[:, 1:], past], dim=1)  # from 1 - length to length - 1
        lags[:, length - 1] += layer.skip
        self.register_buffer("lags", lags.detach().clone())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """See `StateSpace.forward`."""
        steps = torch.arange(self.length, device=x.device)
        lag = (steps[:, None] - steps + self.length - 1).flatten()
        matrix = self.lags.index_select(1, lag).unflatten(1, (self.length, self.length))
        u = self.layer.norm(x) * mask.transpose(1, 2)
        return self.layer.mixed(x, torch.matmul(matrix, u.permute(2, 1, 0)).permute(2, 1, 0))


class TaskGraph(nn.Module):
    """Signal to logits of all tasks: what is exported."""

    def __init__(self, many: MultiTask) -> None:
        super().__init__()
        num_tokens = -(-many.extractor.window_samples // many.config.token_stride)
        self.encoder = copy.deepcopy(many.encoder)
        for module in list(self.encoder.modules()):
            for name, child in module.named_children():
                if isinstance(child, FoldedStateSpace):
                    setattr(module, name, GraphStateSpace(child.layer, num_tokens))
        self.fusion = many.stacked()
        self.many = many

    def forward(
        self,
        input_values: Tensor,
        lead_mask: Tensor,
        sample_mask: Tensor,
        r_peaks: Tensor,
        rr_intervals_s: Tensor,
        period_s: Tensor,
    ) -> dict[str, Tensor]:
        """See `EcgMoeModel.forward`; task to logits (b, outputs)."""
        encoded = self.encoder(input_values, lead_mask, sample_mask, r_peaks, rr_intervals_s, period_s)
        return self.many.task_logits(encoded)


def trace(many: MultiTask, windows: Windows) -> torch.export.ExportedProgram:
    """The graph as a program of torch.export, for any number of records and of beats.

    The length is that of the longest window. Shorter recordings are padded: masks keep what is not there out of every
    state, so that answers stay the same, and a graph of one length is smaller and quicker.

    Args:
        windows: at least two prepared windows, at least one of them with two beats.
    """
    graph = TaskGraph(many).eval()
    batch, beats = torch.export.Dim("batch", min=1, max=2**16), torch.export.Dim("beats", min=1, max=2**12)
    shapes = {
        "input_values": {0: batch},
        "lead_mask": {0: batch},
        "sample_mask": {0: batch},
        "r_peaks": {0: batch, 1: beats},
        "rr_intervals_s": {0: batch, 1: beats},
        "period_s": {0: batch},
    }
    # A single beat would be a constant of the graph.
    shown = sorted(windows, key=lambda window: len(window["r_peaks"]), reverse=True)[:2]
    inputs = {name: torch.from_numpy(value) for name, value in batch_of(many, shown).items()}
    with torch.no_grad():
        return torch.export.export(graph, (), inputs, dynamic_shapes=shapes, strict=False)


def write_onnx(program: torch.export.ExportedProgram, tasks: Sequence[str], path: Path) -> None:
    """Translate a program to ONNX, in one file."""
    import onnx
    from onnxscript import opset18, optimizer

    op: Any = opset18  # its types know of no plain numbers

    def searchsorted(sorted_sequence: Any, values: Any, right: bool = False, **kwargs: Any) -> Any:
        """How many elements of each row lie at or before each value; torch has no translation of its own."""
        assert right
        seen = op.LessOrEqual(op.Unsqueeze(sorted_sequence, [-2]), op.Unsqueeze(values, [-1]))
        return op.ReduceSum(op.Cast(seen, to=7), [-1], keepdims=0)

    # It tells every program that torchvision is not there.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        translated = torch.onnx.export(
            program,
            opset_version=OPSET,
            output_names=list(tasks),
            custom_translation_table={torch.ops.aten.searchsorted.Tensor: searchsorted},
            optimize=False,  # below, in a tenth of the time
            verbose=False,
            dynamo=True,
        )
    assert translated is not None
    optimizer.optimize_ir(translated.model, num_iterations=1, onnx_shape_inference=False)
    model = translated.model_proto
    del model.graph.value_info[:]  # every runtime infers them, and they name axes as the tracer did
    peaks = next(value for value in model.graph.input if value.name == "r_peaks")
    names = {dim.dim_param: name for dim, name in zip(peaks.type.tensor_type.shape.dim, AXES, strict=True)}
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    # Where each line of the network lies on this machine is nobody's business.
    for traced in (model.graph, *model.functions):
        for node in traced.node:
            del node.metadata_props[:]
    onnx.save(model, path)


def write_int8(source: Path, path: Path, batches: Sequence[dict[str, np.ndarray]]) -> None:
    """Quantise an ONNX file to 8-bit integers: weights by channel, activations by the range that the batches show.

    Heads keep their precision: what they lose goes straight into the answers. So do products of two activations.

    Args:
        batches: inputs of real recordings; what they do not show is cut.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    graph = onnx.load(source).graph
    constants = {constant.name for constant in graph.initializer if len(constant.dims) > 1}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    kept = [node.name for node in products if not constants.intersection(node.input)]
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a step that would fold large constants into the file
    try:
        quantize_static(
            source,
            path,
            Batches(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            nodes_to_exclude=kept + [node.name for node in _last_products(graph)],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        root.setLevel(level)


def _last_products(graph: Any) -> list[Any]:
    """The product that each output of an ONNX graph comes from."""
    maker = {name: node for node in graph.node for name in node.output}
    waiting, found = [maker[output.name] for output in graph.output], {}
    while waiting:
        node = waiting.pop()
        if node.op_type in ("MatMul", "Gemm"):
            found[node.name] = node
        else:
            waiting += [maker[name] for name in node.input if name in maker]
    return list(found.values())


# ----------------------------------------------------------------------------------------------------------- the check


def batch_of(many: MultiTask, windows: Windows) -> dict[str, np.ndarray]:
    """The graph's inputs, padded to the longest window."""
    features = many.extractor.pad(windows)
    extra = many.extractor.window_samples - features["input_values"].shape[2]
    inputs = {name: np.asarray(features[name]) for name in SIGNAL_KEYS}
    inputs["input_values"] = np.pad(inputs["input_values"], ((0, 0), (0, 0), (0, extra)))
    inputs["sample_mask"] = np.pad(inputs["sample_mask"], ((0, 0), (0, extra)))
    return inputs


def cases(windows: Windows) -> Iterator[tuple[str, Windows]]:
    """What a graph is compared on: batches of several sizes, with leads, beats and samples missing."""
    several = [windows[i % len(windows)] for i in range(5)]
    yield "one record", windows[:1]
    yield "two records", several[:2]
    yield "five records", several
    yield "two leads", [_with_leads(window, (0, 1)) for window in several]
    yield "a beat at the first sample", [_from_first_beat(window) for window in several]
    yield "no beats", [_without_beats(window) for window in several]
    yield "some without beats", [*several[:2], _without_beats(several[2])]
    yield "one shorter than the others", [*several[:2], _cut(several[2], 483)]
    yield "all short", [_cut(window, 301) for window in several]
    for start in range(0, len(windows), 32):
        yield f"records from {start}", windows[start : start + 32]


def _with_leads(window: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    mask = np.zeros_like(window["lead_mask"])
    mask[list(kept)] = window["lead_mask"][list(kept)]
    return window | {"lead_mask": mask, "input_values": window["input_values"] * mask[:, None]}


def _from_first_beat(window: dict[str, Any]) -> dict[str, Any]:
    peaks = window["r_peaks"]
    return window | {"r_peaks": peaks - peaks[0] if len(peaks) else peaks}


def _without_beats(window: dict[str, Any]) -> dict[str, Any]:
    return window | {"r_peaks": window["r_peaks"][:0], "rr_intervals_s": window["rr_intervals_s"][:0], "period_s": 0.0}


def _cut(window: dict[str, Any], samples: int) -> dict[str, Any]:
    beats = int((window["r_peaks"] < samples).sum())
    return window | {
        "input_values": window["input_values"][:, :samples],
        "sample_mask": window["sample_mask"][:samples],
        "r_peaks": window["r_peaks"][:beats],
        "rr_intervals_s": window["rr_intervals_s"][:beats],
    }


def compare(many: MultiTask, run: Run, windows: Windows) -> dict[str, float]:
    """Case to the largest absolute difference of any logit from the model as it is, unfolded and in PyTorch."""
    differences = {}
    for name, batch in cases(windows):
        features = many.extractor.pad(batch, return_tensors="pt")
        with torch.inference_mode():
            encoded = many.model.ecgmoe.encoder(**{key: features[key] for key in SIGNAL_KEYS})
            expected = many.task_logits(encoded)
        found = run(batch_of(many, batch))
        differences[name] = max(float(np.abs(found[task] - expected[task].numpy()).max()) for task in many.cards)
    return differences


def onnx_runner(path: Path, threads: int = 0) -> Run:
    """A function that runs an ONNX file; threads: 0 for as many as there are cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def torch_runner(path: Path) -> Run:
    """A function that runs a program of torch.export."""
    module = torch.export.load(path).module()

    @torch.inference_mode()
    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {k: v.numpy() for k, v in module(**{k: torch.from_numpy(v) for k, v in inputs.items()}).items()}

    return run


def windows_of(many: MultiTask, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The prepared windows of some ECG files; without any, of the examples in the source tree.

    Raises:
        ExportError: there are none, or one cannot be read.
    """
    examples = Path(__file__).resolve().parent.parent / "examples"
    files = find_ecgs(paths or [examples]) if paths or examples.is_dir() else []
    if not files:
        raise ExportError("there is no ECG file to compare on; name some as check")
    windows = []
    for path in files:
        try:
            ecg = read_ecg(path)
            windows += many.prepare(ecg.signal, ecg.sampling_rate, ecg.lead_names).windows
        except (FileNotFoundError, ValueError) as error:
            raise ExportError(f"{path} cannot be compared on: {error}") from error
    if len(windows) < 2 or not any(len(window["r_peaks"]) > 1 for window in windows):
        raise ExportError("at least two windows are compared on, one of them with two beats; name more as check")
    return windows


# ---------------------------------------------------------------------------------------------------------- the folder


def export_model(
    many: MultiTask, folder: Path, form: str = "onnx", check: Sequence[Path] = (), int8: bool = False
) -> dict[str, Any]:
    """Write a folder that another runtime needs nothing beside.

    Args:
        folder: empty or not there yet; nothing is left in it where the check fails.
        form: a key of `PROGRAMS`.
        check: ECG files, and folders of them, on which the graph has to answer as PyTorch does.
        int8: write `INT8` too.

    Returns:
        what `export.json` holds.

    Raises:
        ExportError: the folder cannot be written or holds files, packages, adapters or records are missing, or an
            answer differs by more than `TOLERANCE`.
    """
    if form not in PROGRAMS:
        raise ExportError(f"unknown format {form!r}; known are {', '.join(PROGRAMS)}")
    if int8 and (form != "onnx" or not check):
        raise ExportError("8-bit numbers need format onnx, and recordings that show their ranges: name some as check")
    missing = [name for name in ONNX_PACKAGES if form == "onnx" and find_spec(name) is None]
    if missing:
        raise ExportError(f"{', '.join(missing)} must be there for format onnx; pip install 'ecg-moe[onnx]'")
    if not many.cards:
        raise ExportError("there is no task to export; load an adapter")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} is a file or holds files already; name another folder")
    windows = windows_of(many, check)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=folder.name, dir=folder.parent)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error.strerror}; name another folder") from error
    with beside as temporary:
        work = Path(temporary) / "export"
        work.mkdir()
        program, path = trace(many, windows), work / PROGRAMS[form]
        if form == "onnx":
            write_onnx(program, list(many.cards), path)
            run = onnx_runner(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # weights that are views of one tensor
                torch.export.save(program, path)
            run = torch_runner(path)
        files = {path.name: _measured(many, path, run, windows)}
        worst = files[path.name]["largest_difference"]
        if not worst <= TOLERANCE:  # NaN too
            raise ExportError(f"an answer of {path.name} differs by {worst:.2g}, allowed is {TOLERANCE:g}; report it")
        if int8:
            write_int8(path, work / INT8, [batch_of(many, windows[i : i + 8]) for i in range(0, len(windows), 8)])
            files[INT8] = _measured(many, work / INT8, onnx_runner(work / INT8), windows)
        report = {
            "model": many.base,
            "tasks": list(many.cards),
            "opset": OPSET if form == "onnx" else None,
            "windows_compared": len(windows),
            "tolerance": TOLERANCE,
            "files": files,
            "versions": dict(_versions()),
        }
        _write_rest(many, work, report, windows[:2], run)
        if folder.exists():
            folder.rmdir()
        shutil.move(work, folder)
    return report


def _measured(many: MultiTask, path: Path, run: Run, windows: Windows) -> dict[str, Any]:
    differences = compare(many, run, windows)
    return {
        "mib": round(path.stat().st_size / 2**20, 2),
        "largest_difference": float(np.max(list(differences.values()))),
        "differences": differences,
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("torch", *ONNX_PACKAGES):
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def _write_rest(many: MultiTask, folder: Path, report: dict[str, Any], windows: Windows, run: Run) -> None:
    """Everything beside the graph: cards, preprocessing, an example with its answers, the report, how to run."""
    cards = {name: asdict(card) | {"task": card.task.to_dict()} for name, card in many.cards.items()}
    for name, values in (("tasks.json", cards), ("export.json", report)):
        (folder / name).write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    settings = {name: value for name, value in many.extractor.to_dict().items() if name != "auto_map"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    inputs = batch_of(many, windows)
    arrays: dict[str, Any] = inputs | {f"logits_{name}": value for name, value in run(inputs).items()}
    np.savez_compressed(folder / "check.npz", **arrays)
    (folder / "README.md").write_text(export_page(many, report), encoding="utf-8")
