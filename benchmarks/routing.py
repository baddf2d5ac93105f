"""What the experts of both paths take: which beats, which rhythms, how evenly, and what answers lose without them.

    python -m benchmarks.routing --data_dir ptb-xl --mitdb mit-bih-arrhythmia-database-1.0.0 --figure docs/routing.png

Both paths have one element for each beat: its shape, and the RR interval that it ends. Of each layer is measured

- how much the winning expert of a beat tells of its annotated type on MIT-BIH, no part of the training, and on
  PTB-XL of its record's rhythm and of whether it is premature: the normalised mutual information (NMI, 0 nothing to
  1 all). The bootstrap over patients leans upwards where few patients have a kind. Chance alone is above 0, so it is
  given three times more: kinds shuffled within each patient (experts know the patient, not the beat), patients
  exchanged (experts know no more than that patients differ), and all beats shuffled;
- load: the share of elements that each expert wins, and the entropy of the shares over that of equal shares;
- deletion: the change of the joint heads' answers where every element loses its winning expert, or another one drawn
  at random, and the next in line takes its place; or where all experts are drawn, with the weights as they were.

Axes: g patient, n beat, k kind of beat, e expert.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import entr
from torch import Tensor
from torch.nn import functional
from transformers import HfArgumentParser

from benchmarks.quality import origin
from data_builders import find_builder
from data_builders.mitdb import SAMPLING_RATE as MITDB_HZ
from evaluation import predict_logits
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.metrics import bootstrap_difference, bootstrap_interval
from modeling_ecgmoe.modeling_ecgmoe import EcgMoeForTasks
from modeling_ecgmoe.routing import Router, Routing
from modeling_ecgmoe.tasks import TASKS
from records import DataArguments, Records, batches, load_split

COMMAND = "python -m benchmarks.routing --data_dir ptb-xl --mitdb mit-bih-arrhythmia-database-1.0.0"
BEAT_TYPES = {
    "N": "normal", "L": "left bundle branch block", "R": "right bundle branch block", "A": "atrial premature",
    "V": "ventricular premature", "/": "paced",
}  # fmt: skip
RHYTHMS = ("SR", "AFIB", "STACH", "SBRAD", "SARRH", "PACE")
TIMING = ("in time", "premature")
PREMATURE = 0.8  # of the record's median RR interval: a beat after a shorter one is premature
TOLERANCE_S = 0.075  # between an annotated beat and the R peak that was found
ASKED = ("arrhythmia", "statements")
WINNER, ANOTHER, RANDOM = "winner deleted", "another deleted", "all drawn at random"
BOTH = "both paths"
LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
# Distinguishable with any colour vision (Okabe and Ito 2008), in the order of the page.
EXPERT_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
INK, GREY = "#1b1b1f", "#6b6b73"
QRS_S = (-0.07, 0.10)  # how much of a beat is drawn in the colour of its expert


@dataclass
class RoutingArguments:
    """What to measure, and where the results go."""

    mitdb: str = field(metadata={"help": "folder of the MIT-BIH Arrhythmia Database, or of a part of it"})
    model: str = field(default="hub/model", metadata={"help": "ECG-MoE with the heads arrhythmia and statements"})
    out: Path = field(default=Path("benchmarks/results/routing.json"), metadata={"help": "result file"})
    figure: Path | None = field(default=None, metadata={"help": "PNG of who takes what"})
    resamples: int = field(default=1000, metadata={"help": "bootstrap resamples of patients"})
    permutations: int = field(default=200, metadata={"help": "shuffles of each way"})
    max_windows: int | None = field(default=None, metadata={"help": "so many windows of MIT-BIH, evenly spread"})


def normalised_mi(table: np.ndarray) -> np.ndarray:
    """Mutual information over the mean of both entropies, as scikit-learn's `normalized_mutual_info_score`.

    Args:
        table: (..., k, e), how often kind and expert occur together; fractions count as well.

    Returns:
        (...), in [0, 1]; 0 where there is one kind or one expert only.
    """
    joint = table / table.sum(axis=(-2, -1), keepdims=True)
    of_kinds, of_experts = (entr(joint.sum(axis=axis)).sum(axis=-1) for axis in (-1, -2))
    shared = of_kinds + of_experts - entr(joint).sum(axis=(-2, -1))
    mean = (of_kinds + of_experts) / 2
    return np.divide(shared, mean, out=np.zeros_like(mean), where=mean > 1e-12).clip(0.0, 1.0)


def evenness(counts: np.ndarray) -> np.ndarray:
    """Entropy of the shares (..., e) over that of equal ones: 1 where all have as much, 0 where one has all."""
    shares = counts / counts.sum(axis=-1, keepdims=True)
    return entr(shares).sum(axis=-1) / np.log(counts.shape[-1])


def over_patients(
    name: str, statistic: Callable[[np.ndarray], np.ndarray], tables: np.ndarray, resamples: int
) -> dict[str, Any]:
    """A statistic of the sum of the patients' tables (g, ...) with its bootstrap interval, as in `MetricResult`."""
    patients = len(tables)
    drawn = np.random.default_rng(0).multinomial(patients, np.full(patients, 1 / patients), resamples)
    low, high = np.quantile(statistic(np.tensordot(drawn, tables, axes=1)), TAILS).tolist()
    value = float(statistic(tables.sum(axis=0)))
    return {"metric": name, "value": value, "low": low, "high": high, "level": LEVEL, "n": patients}


def associate(
    kinds: np.ndarray, weights: np.ndarray, patients: np.ndarray, resamples: int, permutations: int
) -> dict[str, Any]:
    """How much the experts tell of the kinds.

    Args:
        kinds: int (n,), from 0.
        weights: (n, e), 1 for the winning expert of a beat, or the router's probabilities.
        patients: int (n,), whose beat it is, from 0, each with one beat at least.

    Returns:
        The NMI with its interval, `chance` with mean and 95 % range of each way of shuffling and the share `p` of
        shuffles that reach the value, the `beats` of each kind, and their `shares` (k, e).
    """
    tables = np.zeros((patients.max() + 1, kinds.max() + 1, weights.shape[1]))
    np.add.at(tables, (patients, kinds), weights)
    result = over_patients("nmi", normalised_mi, tables, resamples)
    rng, of_kind, in_order = np.random.default_rng(1), np.eye(tables.shape[1]), np.argsort(patients, kind="stable")

    def within_patients() -> np.ndarray:
        shuffled = np.empty_like(kinds)
        shuffled[in_order] = kinds[np.lexsort((rng.random(len(kinds)), patients))]
        return of_kind[shuffled].T @ weights

    def patients_exchanged() -> np.ndarray:
        mix = tables.sum(axis=2) / tables.sum(axis=(1, 2))[:, None]
        return np.einsum("gk,ge->ke", mix[rng.permutation(len(mix))], tables.sum(axis=1))

    def all_shuffled() -> np.ndarray:
        return of_kind[rng.permutation(kinds)].T @ weights

    result["chance"] = {}
    for way in (within_patients, patients_exchanged, all_shuffled):
        values = normalised_mi(np.stack([way() for _ in range(permutations)]))
        low, high = np.quantile(values, TAILS).tolist()
        p = (1 + int((values >= result["value"]).sum())) / (1 + permutations)
        result["chance"][way.__name__] = {"value": float(values.mean()), "low": low, "high": high, "p": p}
    total = tables.sum(axis=0)
    shares = total / total.sum(axis=1, keepdims=True).clip(min=1e-12)
    return result | {"beats": total.sum(axis=1).round().astype(int).tolist(), "shares": shares.tolist()}


@dataclass(frozen=True)
class Routes:
    """What the routers made of recordings, by layer.

    Args:
        beats: float32 (records, beats, e), the probabilities for the element of each beat, NaN where there is none.
        load: (records, e), how many elements each expert won: beats, mean beat, coarse stretches.
    """

    beats: dict[str, np.ndarray]
    load: dict[str, np.ndarray]


def routers_of(model: EcgMoeForTasks) -> dict[str, Router]:
    """The router of each layer, by path, and by number where a path has several layers."""
    of_path = {
        path: [part for part in module.modules() if isinstance(part, Router)]
        for path, module in model.ecgmoe.encoder.paths.items()
    }
    return {
        path if len(routers) == 1 else f"{path} {number}": router
        for path, routers in of_path.items()
        for number, router in enumerate(routers, 1)
    }


@torch.inference_mode()
def route(model: EcgMoeForTasks, records: Records) -> Routes:
    """Send recordings of one window each through the backbone and keep what the routers say.

    Raises:
        ValueError: a path is missing, or has no RR intervals, or a recording is several windows.
    """
    if set(model.config.paths) != {"morphology", "rhythm"} or not model.config.period_aware:
        raise ValueError(
            f"expected both paths, period-aware, found {', '.join(model.config.paths)}; take such a model"
        )
    if len(records) != len(records.record_ids):
        raise ValueError(f"expected one window a record, found {len(records)} of {len(records.record_ids)} records")
    most = records.signal["r_peaks"].shape[1]
    beats: dict[str, list[Tensor]] = {name: [] for name in routers_of(model)}
    load: dict[str, list[Tensor]] = {name: [] for name in beats}
    for batch in batches(records):
        output = model.ecgmoe.encoder(**batch["signal"])
        is_beat = batch["signal"]["r_peaks"] >= 0
        found = {
            "morphology": (output.morphology_router_probs, output.beat_mask),
            "rhythm": (output.rhythm_router_probs, output.rhythm_mask),
        }
        layers = [(probs, found[path][1]) for path in model.config.paths for probs in found[path][0]]
        for name, (probs, mask) in zip(beats, layers, strict=True):
            of_beats = probs[:, -is_beat.shape[1] :]  # the mean beat and the coarse stretches come before
            of_beats = of_beats.masked_fill(~is_beat[..., None], torch.nan)
            beats[name].append(functional.pad(of_beats, (0, 0, 0, most - of_beats.shape[1]), value=torch.nan))
            won = functional.one_hot(probs.argmax(dim=-1), probs.shape[-1]) * mask[..., None]
            load[name].append(won.sum(dim=1))
    return Routes(*({name: torch.cat(parts).numpy() for name, parts in kept.items()} for kept in (beats, load)))


def associations(
    routes: Routes, kinds: np.ndarray, patient_ids: Sequence[str], arguments: RoutingArguments
) -> dict[str, Any]:
    """`associate` for each layer, of winners and of probabilities; kinds int (records, beats), -1 does not count.

    Raises:
        ValueError: no beat counts.
    """
    counted = kinds >= 0
    if not counted.any():
        raise ValueError(f"none of {kinds.size} beats is of a known kind; take more recordings")
    patients = np.broadcast_to(np.array(patient_ids)[:, None], kinds.shape)[counted]
    patients = np.unique(patients, return_inverse=True)[1]
    results: dict[str, Any] = {}
    for layer, probs in routes.beats.items():
        soft = probs[counted]
        won = np.eye(soft.shape[1])[soft.argmax(axis=1)]
        results[layer] = {
            name: associate(kinds[counted], weights, patients, arguments.resamples, arguments.permutations)
            for name, weights in (("winner", won), ("probabilities", soft))
        }
    return results


def load_of(won: np.ndarray, patient_ids: Sequence[str], resamples: int) -> dict[str, Any]:
    """The share of each expert and how even they are, from elements won (records, e)."""
    patients = np.unique(np.array(patient_ids), return_inverse=True)[1]
    tables = np.zeros((patients.max() + 1, won.shape[1]))
    np.add.at(tables, patients, won)
    shares = (tables.sum(axis=0) / tables.sum()).tolist()
    return {"shares": shares, "evenness": over_patients("evenness", evenness, tables, resamples)}


def match(peaks_s: np.ndarray, marks_s: np.ndarray) -> np.ndarray:
    """For each R peak the annotated beat that it is, int (peaks,), -1 for none: mutually nearest, within 75 ms."""
    if not len(peaks_s) or not len(marks_s):
        return np.full(len(peaks_s), -1)
    distance_s = np.abs(peaks_s[:, None] - marks_s)
    nearest, peak = distance_s.argmin(axis=1), np.arange(len(peaks_s))
    is_match = (distance_s.argmin(axis=0)[nearest] == peak) & (distance_s[peak, nearest] <= TOLERANCE_S)
    return np.where(is_match, nearest, -1)


def beat_types(rows: datasets.Dataset, records: Records, rate_hz: int) -> tuple[np.ndarray, float]:
    """The annotated type of each found beat, (records, beats), -1 for others; and the share of marks found."""
    annotated = rows.select_columns(["record_id", "beat_samples", "beat_symbols"]).to_list()
    truth = {row["record_id"]: (np.array(row["beat_samples"]), row["beat_symbols"]) for row in annotated}
    number = {symbol: number for number, symbol in enumerate(BEAT_TYPES)}
    peaks = records.signal["r_peaks"].numpy()
    kinds, marks = np.full(peaks.shape, -1), 0
    for row, name in enumerate(records.record_ids):
        samples, symbols = truth[name]
        for beat, mark in enumerate(match(peaks[row][peaks[row] >= 0] / rate_hz, samples / MITDB_HZ)):
            kinds[row, beat] = number.get(symbols[mark], -1) if mark >= 0 else -1
        marks += sum(symbol in BEAT_TYPES for symbol in symbols)
    return kinds, float((kinds >= 0).sum() / max(marks, 1))


def rhythms(records: Records) -> np.ndarray:
    """The rhythm of each beat's record, (records, beats): -1 unless it is its only rhythm statement and in RHYTHMS."""
    statements = np.nan_to_num(records.labels["arrhythmia"].numpy())
    wanted = statements[:, [TASKS["arrhythmia"].labels.index(rhythm) for rhythm in RHYTHMS]]
    is_one = (statements.sum(axis=1) == 1) & (wanted.sum(axis=1) == 1)
    is_known = records.signal["rr_intervals_s"].numpy() > 0
    return np.where(is_known, np.where(is_one, wanted.argmax(axis=1), -1)[:, None], -1)


def timing(records: Records) -> np.ndarray:
    """Whether each beat is premature, (records, beats): -1 in fibrillation and flutter, and where RR is unknown."""
    statements = np.nan_to_num(records.labels["arrhythmia"].numpy())
    irregular = statements[:, [TASKS["arrhythmia"].labels.index(name) for name in ("AFIB", "AFLT")]].any(axis=1)
    intervals_s = np.ma.masked_less_equal(records.signal["rr_intervals_s"].numpy(), 0.0)
    premature = intervals_s < PREMATURE * np.ma.median(intervals_s, axis=1)[:, None]
    return np.where(irregular[:, None], -1, premature.astype(int).filled(-1))


@contextmanager
def rerouted(routers: Sequence[Router], how: str, seed: int = 0) -> Iterator[None]:
    """While it lasts these routers send every element elsewhere: WINNER, ANOTHER or RANDOM; logits stay as they were.

    Raises:
        ValueError: there are fewer than two experts.
    """
    generator = torch.Generator().manual_seed(seed)

    def elsewhere(router: Router, _: Any, routing: Routing) -> Routing:
        logits = routing.logits
        if how == RANDOM:
            return routing._replace(experts=torch.rand(logits.shape, generator=generator).topk(router.top_k).indices)
        deleted = logits.argmax(dim=-1, keepdim=True)
        if how == ANOTHER:
            step = torch.randint(1, logits.shape[-1], deleted.shape, generator=generator)
            deleted = (deleted + step) % logits.shape[-1]
        weights, experts = torch.softmax(logits, dim=-1).scatter(-1, deleted, 0.0).topk(router.top_k, dim=-1)
        return Routing(logits, weights / weights.sum(dim=-1, keepdim=True), experts)

    with ExitStack() as stack:
        for router in routers:
            if len(router.weight) < 2:
                raise ValueError("deletion needs two experts or more, this model has one")
            stack.callback(router.register_forward_hook(elsewhere).remove)
        yield


def deletions(model: EcgMoeForTasks, records: Records, resamples: int) -> dict[str, Any]:
    """layer to way of rerouting to task to `change` of its probabilities, mean absolute, and `macro_auroc` gained."""
    routers = routers_of(model)
    groups = {name: [router] for name, router in routers.items()} | {BOTH: list(routers.values())}
    options: dict[str, Any] = {"resamples": resamples, "groups": records.patient_ids}

    def answers() -> dict[str, np.ndarray]:
        logits = predict_logits(model, records, torch.device("cpu"), list(ASKED))
        return {task: TASKS[task].answers(values) for task, values in logits.items()}

    def compare(task: str, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
        targets = records.labels[task].numpy()
        change = bootstrap_interval("mae", before, after, **options)
        gained = bootstrap_difference("macro_auroc", targets, before, after, **options)
        return {
            "change": replace(change, per_label=[]).to_dict(),
            "macro_auroc": replace(gained, per_label=[]).to_dict(),
        }

    whole = answers()
    results: dict[str, Any] = {layer: {} for layer in groups}
    for layer, chosen in groups.items():
        for how in (WINNER, ANOTHER, RANDOM):
            with rerouted(chosen, how):
                found = answers()
            results[layer][how] = {task: compare(task, whole[task], found[task]) for task in ASKED}
    return results


def draw(path: Path, panels: dict[str, tuple[Sequence[str], dict[str, Any]]], strip: dict[str, Any] | None) -> None:
    """Write the figure: panels of title to names of the kinds and what `associate` found, below them the strip."""
    figure = Figure(figsize=(9.0, 5.2 if strip else 2.8), dpi=200, layout="constrained")
    rows = figure.add_gridspec(2, 1, height_ratios=(1.1, 1.0 if strip else 0.01))
    for axes, title in zip(figure.add_subfigure(rows[0]).subplots(1, len(panels)), panels, strict=True):
        _draw_shares(axes, title, *panels[title])
    if strip:
        _draw_strip(figure.add_subfigure(rows[1]).subplots(), **strip)
    figure.savefig(path)


def _draw_shares(axes: Axes, title: str, kinds: Sequence[str], found: dict[str, Any]) -> None:
    seen = [row for row, beats in enumerate(found["beats"]) if beats]
    shares = np.array(found["shares"])[seen]
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=1.25, aspect="auto")
    for (row, expert), share in np.ndenumerate(shares):
        colour = "white" if share > 0.6 else INK
        axes.text(expert, row, f"{100 * share:.0f} %", ha="center", va="center", color=colour, fontsize=9)
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_yticks(range(len(seen)), [f"{kinds[row]} ({found['beats'][row]:,})" for row in seen], fontsize=9)
    axes.set_xticks(range(shares.shape[1]), [f"E{number}" for number in range(1, shares.shape[1] + 1)], weight="bold")
    for expert, label in enumerate(axes.get_xticklabels()):
        label.set_color(EXPERT_COLOURS[expert % len(EXPERT_COLOURS)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def find_strip(
    rows: datasets.Dataset, records: Records, kinds: np.ndarray, probs: np.ndarray, rate_hz: int
) -> dict[str, Any] | None:
    """What `_draw_strip` shows: the first window with 3 normal and 3 ventricular beats, and no unknown ones."""
    is_beat = records.signal["r_peaks"].numpy() >= 0
    normal, ventricular = ((kinds == list(BEAT_TYPES).index(symbol)).sum(axis=1) for symbol in "NV")
    usable = ((kinds >= 0) == is_beat).all(axis=1) & (normal >= 3) & (ventricular >= 3)
    if not usable.any():
        return None
    at = int(usable.argmax())
    row = rows[rows["record_id"][:].index(records.record_ids[at])]
    return {
        "title": f"MIT-BIH {row['record']} from {row['start_sample'] // MITDB_HZ} s, lead {row['lead_names'][0]}",
        "signal_mv": np.asarray(row["signal"][0], dtype=np.float32),
        "peaks_s": records.signal["r_peaks"].numpy()[at][is_beat[at]] / rate_hz,
        "symbols": [list(BEAT_TYPES)[kind] for kind in kinds[at][is_beat[at]]],
        "experts": probs[at][is_beat[at]].argmax(axis=1),
    }


def _draw_strip(
    axes: Axes, title: str, signal_mv: np.ndarray, peaks_s: np.ndarray, symbols: Sequence[str], experts: np.ndarray
) -> None:
    time_s = np.arange(len(signal_mv)) / MITDB_HZ
    axes.plot(time_s, signal_mv, color=GREY, linewidth=0.9)
    low_mv, high_mv = float(np.nanmin(signal_mv)), float(np.nanmax(signal_mv))
    line_mv = 0.2 * (high_mv - low_mv)
    for peak_s, symbol, expert in zip(peaks_s, symbols, experts, strict=True):
        colour = EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]
        beat = (time_s >= peak_s + QRS_S[0]) & (time_s <= peak_s + QRS_S[1])
        axes.plot(time_s[beat], signal_mv[beat], color=colour, linewidth=2)
        axes.text(peak_s, high_mv + 0.4 * line_mv, symbol, ha="center", color=INK, fontsize=9)
        axes.text(peak_s, low_mv - line_mv, f"E{expert + 1}", ha="center", color=colour, fontsize=9, weight="bold")
    axes.set(xlim=(0, time_s[-1]), ylim=(low_mv - 1.3 * line_mv, high_mv + 1.3 * line_mv), xlabel="s", ylabel="mV")
    axes.set_title(f"{title}: annotated type above, winning morphology expert below", fontsize=10, color=INK)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def table_rows(asked: dict[str, dict[str, Any]], load: dict[str, Any], lost: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the README: one quantity each, one column a layer, the value and its 95 % interval."""

    def row(what: str, found: dict[str, dict[str, Any]], decimals: int = 3) -> dict[str, Any]:
        cells = {
            layer: f"{m['value']:z.{decimals}f} [{m['low']:z.{decimals}f}, {m['high']:z.{decimals}f}]"
            for layer, m in found.items()
        }
        return {"what": what} | {layer: cells.get(layer) for layer in lost}

    rows = []
    # A record has one rhythm: there is nothing to shuffle within.
    chances = {"beat type": ("within patients", "patients exchanged"), "rhythm": ("patients exchanged",)}
    for question, layers in asked.items():
        winners = {layer: found["winner"] for layer, found in layers.items()}
        rows.append(row(f"{question}, NMI with the winning expert", winners))
        for way in chances.get(question, ("within patients",)):
            by_chance = {layer: found["chance"][way.replace(" ", "_")] for layer, found in winners.items()}
            rows.append(row(f"{question}, NMI by chance, {way.replace('within', 'shuffled within')}", by_chance))
    soft = {layer: found["probabilities"] for layer, found in asked["beat type"].items()}
    rows.insert(1, row("beat type, NMI with the router's probabilities", soft))
    rows.append(row("evenness of load", {layer: found["evenness"] for layer, found in load.items()}))
    for task in ASKED:
        for key, what in (("change", "mean change of probabilities"), ("macro_auroc", "change of macro AUROC")):
            found = {how: {layer: ways[how][task][key] for layer, ways in lost.items()} for how in (WINNER, ANOTHER)}
            rows += [row(f"{task}, {what}, {how}", cells, decimals=4) for how, cells in found.items()]
    return rows


def read_mitdb(arguments: RoutingArguments, cache_dir: str | None) -> datasets.Dataset:
    """Windows of ten seconds of all records that are there."""
    builder = find_builder("mitdb")(config_name="windows", data_dir=arguments.mitdb, cache_dir=cache_dir)
    builder.download_and_prepare()
    rows = datasets.concatenate_datasets(list(builder.as_dataset().values()))
    if arguments.max_windows is not None and arguments.max_windows < len(rows):
        rows = rows.select(np.linspace(0, len(rows) - 1, arguments.max_windows).round().astype(int))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything, write the file and, where wanted, the figure."""
    parser = HfArgumentParser((DataArguments, RoutingArguments))
    data, arguments = parser.parse_args_into_dataclasses(args=argv)
    model = EcgMoeForTasks.from_pretrained(arguments.model).eval()
    extractor = EcgMoeFeatureExtractor.from_pretrained(arguments.model)

    rows = read_mitdb(arguments, data.cache_dir)
    holter = Records(rows, extractor, [], data.num_proc)
    beats, found = beat_types(rows, holter, extractor.sampling_rate)
    of_holter = route(model, holter)
    records = Records(load_split(data, "validation"), extractor, [TASKS[name] for name in ASKED], data.num_proc)
    routes = route(model, records)
    asked = {
        "beat type": associations(of_holter, beats, holter.patient_ids, arguments),
        "rhythm": associations(routes, rhythms(records), records.patient_ids, arguments),
        "premature": associations(routes, timing(records), records.patient_ids, arguments),
    }
    load = {layer: load_of(won, records.patient_ids, arguments.resamples) for layer, won in routes.load.items()}
    lost = deletions(model, records, arguments.resamples)
    kinds = {"beat type": list(BEAT_TYPES), "rhythm": RHYTHMS, "premature": TIMING}
    sizes = {"windows_of_MIT-BIH": len(holter), "records_of_PTB-XL": len(records)}
    details = {"kinds": kinds, "annotated_beats_found": found, "associations": asked, "load": load, "deletion": lost}
    result = {
        "name": arguments.out.stem,
        "command": COMMAND,
        "seed": 0,
        **origin(),
        "data": {"set": "MIT-BIH Arrhythmia Database 1.0.0; PTB-XL 1.0.3, 100 Hz, fold 9", **sizes},
        "rows": table_rows(asked, load, lost),
        "details": details,
    }
    arguments.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for row in result["rows"]:
        print(" | ".join(str(cell) for cell in row.values()))
    if arguments.figure is not None:
        shape, rhythm = (max(name for name in load if name.startswith(path)) for path in ("morphology", "rhythm"))
        panels = {
            "Beats each morphology expert wins": (list(BEAT_TYPES.values()), asked["beat type"][shape]["winner"]),
            "RR intervals each rhythm expert wins": (RHYTHMS, asked["rhythm"][rhythm]["winner"]),
        }
        strip = find_strip(rows, holter, beats, of_holter.beats[shape], extractor.sampling_rate)
        draw(arguments.figure, panels, strip)


if __name__ == "__main__":
    main()
