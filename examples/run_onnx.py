"""Answers for a 12-lead ECG with onnxruntime and numpy alone: neither torch, nor transformers, nor this package.

    ecgmoe export --out exported
    python examples/run_onnx.py exported examples/sinus_75bpm.hea

It reads WFDB records of format 16 in mV with the twelve leads, in `.dat` or `.mat` files, and takes their first ten
seconds. Band-pass, resampling and scale are those of the feature extractor. The R peaks are found by a few lines: good
enough for a clean recording, and the reason why answers differ a little from `ecgmoe predict`, see
benchmarks/results/export.json.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime

LEADS = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
FILES = ["model.onnx", "tasks.json", "preprocessor_config.json"]
NUMBER = r"[\d.]*[1-9][\d.]*"
RECORD_LINE = re.compile(rf"\S+ (?P<signals>\d+) (?P<rate>{NUMBER})(?:/\S+)?(?: (?P<samples>\d+)(?: .*)?)?")
SIGNAL_LINE = re.compile(  # gain, baseline and unit; resolution and zero of the converter; three numbers; the lead
    rf"(?P<file>\S+) 16(?:\+(?P<skip>\d+))? (?P<gain>{NUMBER})(?:\((?P<baseline>-?\d+)\))?(?:/[mM][vV])? \d+ "
    r"(?P<zero>-?\d+) -?\d+ -?\d+ \d+ (?P<lead>\S+)"
)


def read(header: Path) -> tuple[np.ndarray, float]:
    """Millivolts (12, samples) and Hz of a record; a ValueError or an OSError says why it cannot be read."""
    text = header.read_text(encoding="utf-8", errors="replace")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    record = RECORD_LINE.fullmatch(lines[0]) if lines else None
    if record is None or int(record["signals"]) != len(lines) - 1:
        raise ValueError("this is no header of a WFDB record in one segment; name a .hea file")
    signals = {}
    for row, line in enumerate(lines[1:]):
        signal = SIGNAL_LINE.fullmatch(line)
        if signal is None or signal["file"] != lines[1].split()[0]:
            raise ValueError(f"expected signals of format 16 in mV in one file, found {line}; ask `ecgmoe predict`")
        signals[signal["lead"].upper()] = row, signal
    if missing := [lead for lead in LEADS if lead.upper() not in signals]:
        raise ValueError(f"the leads {' '.join(missing)} are missing; `ecgmoe predict` needs no more than one")
    rows, chosen = zip(*(signals[lead.upper()] for lead in LEADS), strict=True)
    path, width = header.with_name(chosen[0]["file"]), len(lines) - 1
    raw = np.fromfile(path, "<i2", offset=int(chosen[0]["skip"] or 0))
    samples = int(record["samples"] or len(raw) // width)
    if len(raw) < samples * width:
        raise ValueError(f"{path.name} is cut off, {len(raw)} of {samples * width} values are there; copy it again")
    raw = raw[: samples * width].reshape(samples, width).T[list(rows)]
    if (raw == -(2**15)).any() or not np.ptp(raw, axis=1).all():
        raise ValueError("it has gaps or flat leads; `ecgmoe predict` leaves them out")
    baselines, gains = zip(*((float(s["baseline"] or s["zero"]), float(s["gain"])) for s in chosen), strict=True)
    return (raw - np.array(baselines)[:, None]) / np.array(gains)[:, None], float(record["rate"])


def filtered(signal: np.ndarray, rate_in: float, settings: dict) -> np.ndarray:
    """Band-passed and resampled in one step, as the mirror image goes on at both ends."""
    length_in, length_out = signal.shape[1], round(signal.shape[1] * settings["sampling_rate"] / rate_in)
    spectrum = np.fft.rfft(np.concatenate([signal, signal[:, ::-1]], axis=1))[:, : length_out + 1]
    hz = np.arange(spectrum.shape[1]) * (0.5 * rate_in / length_in)
    (a, b), (c, d) = settings["high_pass_hz"], settings["low_pass_hz"]
    rise, fall = (0.5 - 0.5 * np.cos(np.pi * np.clip((hz - x) / (y - x), 0, 1)) for x, y in ((a, b), (c, d)))
    return np.fft.irfft(spectrum * rise * (1 - fall), 2 * length_out)[:, :length_out] * (length_out / length_in)


def find_r_peaks(signal: np.ndarray, rate: float) -> np.ndarray:
    """R peaks in samples: steep, above 40 % of a usual QRS, at least 0.25 s apart; moved to the top of the wave."""
    steep = np.sqrt(np.convolve((np.gradient(signal, axis=1) ** 2).sum(axis=0), np.ones(9) / 9, mode="same"))
    near, second = int(0.25 * rate), int(rate)
    highest = np.lib.stride_tricks.sliding_window_view(np.pad(steep, near), 2 * near + 1).max(axis=1)
    usual = np.median([steep[i : i + second].max() for i in range(0, len(steep) - second + 1, second)])
    height, half = np.sqrt((signal**2).sum(axis=0)), int(0.06 * rate)
    peaks = []
    for at in np.flatnonzero((steep == highest) & (steep > 0.4 * usual)):
        top = max(at - half, 0) + int(np.argmax(height[max(at - half, 0) : at + half + 1]))
        before, here, after = height[np.clip([top - 1, top, top + 1], 0, len(height) - 1)]
        bend = before - 2 * here + after
        peaks.append(top + (0.5 * (before - after) / bend if bend < 0 else 0.0))
    return np.array(peaks)


def prepare(signal: np.ndarray, rate_in: float, settings: dict) -> dict[str, np.ndarray]:
    """The inputs of the graph, for one record."""
    rate, samples = settings["sampling_rate"], round(settings["window_s"] * settings["sampling_rate"])
    if signal.shape[1] < settings["min_duration_s"] * rate_in:
        raise ValueError(f"it is shorter than the {settings['min_duration_s']} s that the model needs")
    values = filtered(signal[:, : round(settings["window_s"] * rate_in)], rate_in, settings)[:, :samples]
    values = np.clip(values, -settings["clip_mv"], settings["clip_mv"])
    peaks = find_r_peaks(values, rate)
    rr_s = np.diff(peaks, prepend=-np.inf) / rate
    rr_s = np.where((rr_s >= 0.2) & (rr_s <= 3.0), rr_s, 0.0)
    padded = np.pad(values / settings["scale_mv"], ((0, 0), (0, samples - values.shape[1])))
    return {
        "input_values": padded[None].astype(np.float32),
        "lead_mask": np.ones((1, 12), bool),
        "sample_mask": (np.arange(samples) < values.shape[1])[None],
        "r_peaks": (peaks if len(peaks) else np.array([-1.0]))[None].astype(np.float32),
        "rr_intervals_s": (rr_s if len(peaks) else np.zeros(1))[None].astype(np.float32),
        "period_s": np.array([rr_s[rr_s > 0].mean() if (rr_s > 0).any() else 0.0], np.float32),
    }


def interval(value: float, card: dict, rr_s: np.ndarray) -> tuple[float, float]:
    """The ends of a regression's interval for twelve leads, as `AdapterCard.intervals` gives it.

    It reaches as far as there are truths whose group allows for their distance; the RR intervals say how sure their
    mean is.
    """
    most = max(card["half_widths"], key=int)
    halves, bounds = np.array([card["half_widths"][most]]), []
    if card.get("relative_widths"):
        halves *= ((1000 * rr_s.std() if len(rr_s) > 1 else 100) + 10) / len(rr_s)
    if most in card.get("group_half_widths", {}):
        halves, bounds = np.array(card["group_half_widths"][most]), card["group_bounds"]
    lows, highs = np.maximum(value - halves, [-np.inf, *bounds]), np.minimum(value + halves, [*bounds, np.inf])
    least = card["task"].get("minimum", -np.inf)
    return max(lows[lows <= highs].min(), least), max(highs[lows <= highs].max(), least)


def answer(logits: np.ndarray, card: dict, rr_s: np.ndarray) -> str:
    """What a task's logits (outputs,) mean, in words."""
    task = card["task"]
    if task["prior"] and not len(rr_s):
        return "none: no RR interval was found"
    if task["kind"] == "regression":
        value = max(logits[0] * task["spread"] + task["center"], task.get("minimum", -np.inf))
        ends = interval(value, card, rr_s) if card["half_widths"] else ()
        shown = f" ({card['level']:.0%}: {ends[0]:.1f} to {ends[1]:.1f})" if ends else ""
        return f"{value:.1f} {task['unit']}{shown}"
    if task["kind"] == "multi_class":
        return task["labels"][int(np.argmax(logits))]
    shifted = logits + np.array(card.get("shifts") or 0.0)
    curved = shifted * np.array(card.get("slopes") or 1.0) + np.tanh(shifted) * np.array(card.get("bends") or 0.0)
    given = 1 / (1 + np.exp(-curved / card["temperature"])) >= np.array(card["thresholds"] or 0.5)
    if task["kind"] == "binary":
        return task["labels"][int(given[0])]
    return ", ".join(label for label, is_given in zip(task["labels"], given, strict=True) if is_given) or "no label"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python run_onnx.py FOLDER_OF_ECGMOE_EXPORT RECORD.hea")
    exported, record = Path(sys.argv[1]), Path(sys.argv[2])
    if missing := [name for name in FILES if not (exported / name).is_file()]:
        sys.exit(f"{exported} holds no {' and no '.join(missing)}; make it with `ecgmoe export --out {exported}`")
    settings = json.loads((exported / "preprocessor_config.json").read_text())
    tasks = json.loads((exported / "tasks.json").read_text())
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    try:
        inputs = prepare(*read(record), settings)
    except (OSError, ValueError) as error:
        sys.exit(f"{record}: {error}")
    rr_s = inputs["rr_intervals_s"][inputs["rr_intervals_s"] > 0]
    outputs = session.run(list(tasks), inputs)
    for (name, card), logits in zip(tasks.items(), outputs, strict=True):
        print(f"{name:12} {answer(logits[0], card, rr_s)}")
