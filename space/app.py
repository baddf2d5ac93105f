"""The web page: an ECG file in; the twelve leads on paper, every task's answer, and which expert took which beat out.

`python space/app.py` serves it on 127.0.0.1; GRADIO_SERVER_PORT and GRADIO_SERVER_NAME change where, ECGMOE_MODEL
names another model than the bundled one, or the one that the header of README.md names.
"""

import os
import shutil
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from huggingface_hub import metadata_load
from PIL import Image
from plotting import PAGE_S, draw_experts, draw_sheet

from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.answer_files import CommandError
from modeling_ecgmoe.commands import load_model
from modeling_ecgmoe.ecg_files import Ecg, find_ecgs
from modeling_ecgmoe.feature_extraction_ecgmoe import Prepared
from modeling_ecgmoe.leads import arrange_leads
from modeling_ecgmoe.prediction import FileFacts, predict_record, read_record
from modeling_ecgmoe.record_answers import UNTYPICAL
from modeling_ecgmoe.tasks import DESCRIPTIONS, Task

HERE = Path(__file__).resolve().parent
NOT_A_DEVICE = "This is a research tool and not a medical device. Its answers must not guide the care of a patient."
MAX_LABELS = 8
UNITS = ("V", "mV", "uV", "nV")
# Fonts of the reader's machine: the page asks no other server for anything.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
#answers table { width: 100%; border-collapse: collapse; }
#answers tr { border: 0; border-top: 1px solid var(--border-color-primary); }
#answers tr.more { border-top: 0; }
#answers th, #answers td { border: 0; text-align: left; padding: 0.2rem 1rem 0.2rem 0; vertical-align: top; }
#answers small { font-weight: normal; color: var(--body-text-color-subdued); }
#answers meter { width: 8rem; vertical-align: middle; }
"""

# What `analyse` gives: a message, the sheet, the answers as HTML, the experts, the line of `ecgmoe predict`.
Shown = tuple[str, Image.Image | None, str, Image.Image | None, dict[str, Any] | None]


def example_records() -> dict[str, Path]:
    """The bundled examples by name; they lie beside this file in a Space and above it in the source tree."""
    folder = next((folder for folder in (HERE / "examples", HERE.parent / "examples") if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in find_ecgs([folder])}


def analyse(many: MultiTask, path: Path, facts: FileFacts) -> Shown:
    """Everything the page shows of one file. A file that cannot be answered gives the reason as text."""
    line, prepared = predict_record(many, path, facts)
    del line["path"]  # where the upload lies on this machine is nobody's business, and clients would fetch it
    if prepared is None or line["status"] != "ok":
        return f"**Not answered.** {escape(line['error'])}", None, "", None, None
    explanation = many.explain(prepared)
    signal, rate = page_signal(many, read_record(path, facts), prepared)
    winners = explanation.beat_experts.argmax(axis=1) if explanation.beat_experts.size else []
    peaks_s = explanation.r_peaks_s[: len(winners)]
    title = f"{line['record']}   {line['sampling_rate']:g} Hz, {line['duration_s']:g} s"
    sheet = draw_sheet(signal, rate, prepared.leads, peaks_s, list(map(int, winners)), title)
    return quality_text(line), sheet, answers_html(line["tasks"], many), draw_experts(explanation), line


def page_signal(many: MultiTask, ecg: Ecg, prepared: Prepared) -> tuple[np.ndarray, float]:
    """What is drawn: the recording as it is, or where its start was refused the first window that was answered.

    Returns:
        (12, samples) in mV, and the sampling rate in Hz.
    """
    if len(prepared.windows) < len(many.extractor.windows(ecg.signal, ecg.sampling_rate)):
        window = prepared.windows[0]
        known = window["lead_mask"][:, None]
        return np.where(known, window["input_values"] * many.extractor.scale_mv, np.nan), many.extractor.sampling_rate
    start = ecg.signal[:, : round(PAGE_S * ecg.sampling_rate)]
    return arrange_leads(start, ecg.lead_names)[0], ecg.sampling_rate


def quality_text(line: dict[str, Any]) -> str:
    """The quality report in a sentence or two."""
    quality = line["quality"]
    parts = [f"Leads used: {', '.join(line['leads'])}.", f"{quality['beats']} beats in {line['duration_s']:g} s."]
    if quality["period_from"] != "r_peaks":
        parts.append(f"The heart's period comes from: {quality['period_from']}.")
    if (quality.get("typicality") or 0.0) >= UNTYPICAL:
        parts.append(f"More typical than {quality['typicality']:.0f} % of the recordings the model was checked on.")
    parts += [f"**{warning[0].upper()}{warning[1:]}.**" for warning in quality["warnings"]]
    return " ".join(parts)


def answers_html(tasks: dict[str, Any], many: MultiTask) -> str:
    """The answers of all adapters as a table, a row for each value or label."""
    rows = []
    for name, answer in tasks.items():
        task = many.cards[name].task
        cells = value_cells(answer, task) if "value" in answer else label_cells(answer)
        evidence = f" <b>[evidence: {escape(answer['evidence'])}]</b>" if "evidence" in answer else ""
        question = f"{escape(name)}{evidence}<br><small>{escape(task.description)}</small>"
        rows.append(f'<tr><th scope="row" rowspan="{len(cells)}">{question}</th>{cells[0]}</tr>')
        rows += [f'<tr class="more">{more}</tr>' for more in cells[1:]]
    return f"<table>{''.join(rows)}</table>"


def value_cells(answer: dict[str, Any], task: Task) -> list[str]:
    """A regression: value and interval, or why there is none."""
    if "reason" in answer:
        return [f"<td>none</td><td>{escape(answer['reason'])}</td>"]
    interval, unit, digits = "", escape(task.unit), task.decimals
    if "interval" in answer:
        low, high = answer["interval"]
        interval = f"{answer['level']:.0%} interval: {low:.{digits}f} to {high:.{digits}f} {unit}"
    return [f"<td><b>{answer['value']:.{digits}f} {unit}</b></td><td>{interval}</td>"]


def label_cells(answer: dict[str, Any]) -> list[str]:
    """A classification: the labels given, the most probable first, or the one that came nearest."""
    probabilities = answer["probabilities"]
    given = sorted(answer["labels"], key=lambda label: -probabilities[label])
    shown = given[:MAX_LABELS] or [max(probabilities, key=lambda label: probabilities[label])]
    cells = []
    for label in shown:
        text = (
            f"<b>{escape(label)}</b> {escape(DESCRIPTIONS.get(label, ''))}"
            if given
            else f"none; nearest {escape(label)}"
        )
        p = probabilities[label]
        cells.append(f'<td>{text}</td><td><meter value="{p:.4f}"></meter> {p:.2f}</td>')
    if len(given) > MAX_LABELS:
        cells.append(f"<td>and {len(given) - MAX_LABELS} more</td><td></td>")
    passing = {label: found for label, found in answer.get("windows", {}).items() if label not in given}
    for label, found in sorted(passing.items(), key=lambda item: -item[1]["highest"])[:MAX_LABELS]:
        where = f"in {found['windows']} of {found['of']} windows of 10 s, most at {found['start_s']:g} s"
        cells.append(f"<td><b>{escape(label)}</b> {where}</td><td>{found['highest']:.2f}</td>")
    return cells


def build_page(many: MultiTask) -> gr.Blocks:
    """The page around a model."""
    examples = example_records()

    def show_upload(files: list[str] | None, rate: float | None, unit: str | None, leads: str | None) -> Shown:
        if not files:
            return "Drop an ECG file first; of a WFDB record its .hea and .dat together.", None, "", None, None
        names = tuple((leads or "").replace(",", " ").split())
        with tempfile.TemporaryDirectory() as folder:
            # The upload scatters its files over folders; a WFDB header looks for its signals beside it.
            paths = [Path(shutil.copy(file, folder)) for file in files]
            records = find_ecgs([folder]) or find_ecgs(paths)
            if len(records) > 1:
                found = ", ".join(record.name for record in records)
                return f"**Not answered.** One record at a time, found {escape(found)}.", None, "", None, None
            return analyse(many, records[0], FileFacts(rate or None, names or None, unit or None))

    def show_example(name: str) -> Shown:
        return analyse(many, examples[name], FileFacts())

    with gr.Blocks(title="ECG-MoE", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"# ECG-MoE\nOne pass over an ECG, and a small adapter for each question. **{NOT_A_DEVICE}**")
        with gr.Row():
            files = gr.File(
                label="ECG file; of a WFDB record .hea and .dat together", file_count="multiple", height=140
            )
            with gr.Column():
                example = gr.Radio(list(examples), label="Or a bundled synthetic example", elem_id="examples")
                with gr.Accordion("What the file does not say itself", open=False):
                    rate = gr.Number(label="Sampling rate in Hz", value=None)
                    unit = gr.Dropdown(["", *UNITS], label="Unit", value="")
                    leads = gr.Textbox(label="Lead names in file order", placeholder="I II III aVR aVL aVF V1 ...")
                    again = gr.Button("Read the file again")
        message = gr.Markdown(elem_id="message")
        sheet = gr.Image(
            show_label=False, alt_text="The twelve leads", format="png", elem_id="sheet", interactive=False
        )
        answers = gr.HTML(elem_id="answers")
        experts = gr.Image(show_label=False, alt_text="Who spoke", format="png", elem_id="experts", interactive=False)
        with gr.Accordion("The same as JSON, as `ecgmoe predict` writes it", open=False):
            line = gr.JSON(elem_id="line")
        shown = [message, sheet, answers, experts, line]
        upload = [files, rate, unit, leads]
        gr.on([files.upload, again.click], show_upload, upload, shown, api_name="predict")
        example.input(show_example, example, shown, api_name="example")
    return page


def own_model() -> str | None:
    """The model that the header of this Space names, None where it lies beside the page."""
    models = (metadata_load(HERE / "README.md") or {}).get("models")
    return models[0] if models else None


def main() -> None:
    """Serve the page until interrupted."""
    try:
        many = load_model(os.environ.get("ECGMOE_MODEL") or own_model(), None)
    except CommandError as error:
        sys.exit(f"space/app.py: {error}")
    build_page(many).launch(theme=THEME, css=CSS, max_file_size="100mb", footer_links=["api"], show_error=True)


if __name__ == "__main__":
    main()
