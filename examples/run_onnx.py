"""Answers for a 12-lead ECG with onnxruntime and numpy alone: neither torch, nor transformers, nor this package.

    ecgmoe export --out exported
    python examples/run_onnx.py exported examples/sinus_75bpm.hea

It reads WFDB records of format 16 with the twelve leads and takes their first ten seconds. Band-pass, resampling and
scale are those of the feature extractor. The R peaks are found by a few lines: good enough for a clean recording, and
the reason why answers differ a little from `ecgmoe predict`, see benchmarks/results/export.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def read(header: Path, leads: list[str]) -> tuple[np.ndarray, float]:
    """Millivolts (12, samples) and Hz of a record."""
    first, *lines = [line.split() for line in header.read_text().splitlines() if not line.startswith("#")]
    gains = np.array([float(line[2].partition("/")[0].partition("(")[0]) for line in lines])
    raw = np.fromfile(header.with_suffix(".dat"), "<i2").reshape(-1, len(lines)).T / gains[:, None]
    return raw[[[line[-1].upper() for line in lines].index(lead.upper()) for lead in leads]], float(first[2])


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


def answer(logits: np.ndarray, card: dict, rr_s: np.ndarray) -> str:
    """What a task's logits (outputs,) mean, in words; the RR intervals say how sure their mean is."""
    task = card["task"]
    if task["kind"] == "regression":
        value, half = logits[0] * task["spread"] + task["center"], card["half_widths"].get("12", float("nan"))
        if card.get("relative_widths"):
            half *= (1000 * rr_s.std() + 10) / len(rr_s) if len(rr_s) > 1 else float("nan")
        return f"{value:.1f} {task['unit']} ({card['level']:.0%}: {value - half:.1f} to {value + half:.1f})"
    if task["kind"] == "multi_class":
        return task["labels"][int(np.argmax(logits))]
    shifted = (logits + np.array(card.get("shifts") or 0.0)) / card["temperature"]
    given = 1 / (1 + np.exp(-shifted)) >= np.array(card["thresholds"])
    if task["kind"] == "binary":
        return task["labels"][int(given[0])]
    return ", ".join(label for label, is_given in zip(task["labels"], given, strict=True) if is_given) or "no label"


if __name__ == "__main__":
    exported, record = Path(sys.argv[1]), Path(sys.argv[2])
    settings = json.loads((exported / "preprocessor_config.json").read_text())
    tasks = json.loads((exported / "tasks.json").read_text())
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    signal_mv, rate_hz = read(record, ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"])
    inputs = prepare(signal_mv, rate_hz, settings)
    rr_s = inputs["rr_intervals_s"][inputs["rr_intervals_s"] > 0]
    outputs = session.run(list(tasks), inputs)
    for (name, card), logits in zip(tasks.items(), outputs, strict=True):
        print(f"{name:12} {answer(logits[0], card, rr_s)}")
