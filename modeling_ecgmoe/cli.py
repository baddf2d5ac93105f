"""The command line. `ecgmoe predict` reads ECG files and answers every task for each of them; `ecgmoe embed` gives
their embeddings; `ecgmoe export` writes the model for other runtimes.

Nothing heavy is imported before the arguments are understood, so that `--help` and mistakes answer at once.
"""

import argparse
import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .answer_files import (
    FORMATS,
    TEXT,
    CommandError,
    JsonLines,
    Output,
    check_model,
    check_out,
    printable,
    resume_out,
    show_record,
)

if TYPE_CHECKING:
    from .adapters import MultiTask
    from .prediction import FileFacts

EXIT_OK, EXIT_SOME_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 0, 1, 2, 130, 141

HELP_PREDICT = """\
Answer every task for ECG files. Folders are walked; the header and the signal file of a WFDB record count once.

Without --out the answers go to stdout: as a table where that is a terminal, one JSON object a line otherwise."""
EPILOG_PREDICT = """\
Beside --out FILE, FILE.model.json says which model and adapters answered; --resume goes on with these alone.

A JSON line holds record, path, status, sampling_rate, leads, duration_s, quality and tasks; a record that cannot be
answered has status "error" and the reason in error, and the others go on.

CSV columns: record, path, status, error, sampling_rate (Hz), leads (joined by ;), duration_s, and for each task
  a regression      <task>, and <task>_low and <task>_high, the ends of its interval where it has one
  a classification  <task>, the labels given (joined by ;), and <task>_<label>, the probability of each
  either            <task>_evidence, where the adapter was not trained on real recordings

Exit status: 0 all answered, 1 some records failed, 2 refused as asked, 130 interrupted.
This is research software and not a medical device."""

HELP_EMBED = """\
Write the embedding of ECG files: one vector for each, to search with and to fit small models on.

It is the `pooler_output` of the model as pretrained, without any adapter; that of a recording longer than ten seconds
is the mean over its windows. Folders are walked; the header and the signal file of a WFDB record count once."""
EPILOG_EMBED = """\
Columns of the Parquet file, one row a record: record, path, status, error, sampling_rate (Hz), leads, duration_s and
embedding (a list of fixed size, float32). A record that cannot be read has status "error", the reason in error and no
embedding, and the others go on. After Ctrl-C the file holds what was known; --resume goes on with it.

Exit status: 0 all embedded, 1 some records failed, 2 refused as asked, 130 interrupted."""

HELP_EXPORT = """\
Write the backbone and all task adapters as one graph for other runtimes, and prove that it answers alike.

Inputs are what the feature extractor makes, for any number of records and beats at once, padded to ten seconds; the
outputs are the logits of each task. The folder holds the graph, the tasks' cards, preprocessor_config.json,
export.json with sizes and differences, check.npz with prepared inputs and their answers, and a README on how to run.

With --int8, model_int8.onnx has 8-bit convolutions, whose ranges come from the recordings of --check: name some dozens
of your own. It is not held to 1e-4; benchmarks/results/export.json has what it loses."""
EPILOG_EXPORT = """\
Needs the extra `onnx` for --format onnx: pip install 'ecg-moe[onnx]'.
Nothing is left in --out where an answer differs by more than 1e-4 from PyTorch.

Exit status: 0 written and checked, 2 refused, with the reason on stderr."""


def load_model(model: str | None, tasks: Sequence[str] | None) -> "MultiTask":
    """The model and its adapters, without the chatter of the libraries; with no tasks at all, to embed.

    Raises:
        CommandError: there is no such model or adapter, or they do not fit together.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
        from transformers.utils import logging

        from .adapters import MultiTask, default_model
        from .embeddings import Embedder

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            model = model or str(default_model())
            many = (Embedder if tasks == [] else MultiTask).from_pretrained(model, tasks)
        except (OSError, TypeError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
            raise CommandError(" ".join(str(error).split())) from error
    if not many.cards and tasks != []:
        raise CommandError(f"no task adapters lie beside {model}; name some with --tasks")
    return many


def open_outputs(args: argparse.Namespace, many: "MultiTask", stack: contextlib.ExitStack) -> list[Output]:
    """The file and the stdout that the arguments ask for."""
    outputs = []
    if args.out is not None:
        form = FORMATS[args.out.suffix.lower()](many.cards)
        file = stack.enter_context(args.out.open("a", **TEXT))
        file.write("" if file.tell() else form.head)
        outputs.append(Output(file, f"--out {args.out}", form.dump))
    if wants_table(args):
        outputs.append(Output(sys.stdout, "stdout", lambda line: show_record(line, many.cards)))
    elif args.out is None:
        outputs.append(Output(sys.stdout, "stdout", JsonLines(many.cards).dump))
    return outputs


def wants_table(args: argparse.Namespace) -> bool:
    """Whether people read stdout."""
    return args.table or (args.out is None and sys.stdout.isatty())


def asked_files(args: argparse.Namespace) -> "tuple[list[Path], FileFacts]":
    """The files that the arguments name, and what they say of them.

    Raises:
        CommandError: there is no file, or no lead among the names.
    """
    if not args.paths:
        raise CommandError("name the files or folders to read; --leads takes every word after it, so put it last")
    from .ecg_files import find_ecgs
    from .leads import LEADS, find_lead

    leads = tuple(name for part in args.leads or () for name in part.split(",") if name)
    if args.leads and not any(map(find_lead, leads)):
        raise CommandError(f"--leads {' '.join(leads)}: none is one of the twelve leads {', '.join(LEADS)}")
    paths = find_ecgs(args.paths)
    if not paths:
        raise CommandError(f"there is no ECG file in {', '.join(map(str, args.paths))}")
    from .prediction import FileFacts

    return paths, FileFacts(args.sampling_rate, leads or None, args.unit)


def ask_records(
    args: argparse.Namespace,
    many: "MultiTask",
    paths: list[Path],
    facts: "FileFacts",
    write: Callable[[dict[str, Any]], None],
    answered: str = "answered",
    tell: bool = True,
) -> int:
    """Ask the model about each file and hand its line on; returns the exit status.

    Args:
        answered: what has been done to a record, for the last line on stderr.
        tell: name the records that fail on stderr.
    """
    from tqdm import tqdm

    from .prediction import predict_records

    started, num_failed = time.monotonic(), 0
    with contextlib.closing(predict_records(many, paths, facts, args.batch_size)) as lines:
        # None: a bar on a terminal, nothing in a log.
        for line in tqdm(lines, total=len(paths), unit=" records", disable=True if args.quiet else None):
            with tqdm.external_write_mode():
                write(line)
                if line["status"] != "ok":
                    num_failed += 1
                    if tell and not args.quiet:
                        print("ecgmoe:", printable(f"{line['error']} ({line['path']})"), file=sys.stderr)
    if not args.quiet:
        count, seconds = f"{len(paths) - num_failed} of {len(paths)} records {answered}", time.monotonic() - started
        print(f"ecgmoe: {count} in {seconds:.1f} s", file=sys.stderr)
    return EXIT_SOME_FAILED if num_failed else EXIT_OK


def predict(args: argparse.Namespace) -> int:
    """`ecgmoe predict`; returns the exit status."""
    if args.resume and args.out is None:
        raise CommandError("--resume needs the --out file of the run to go on with")
    if args.out is not None:
        check_out(args.out, args.resume)
    paths, facts = asked_files(args)
    tasks = None if args.tasks is None else list(dict.fromkeys(filter(None, args.tasks.split(","))))
    many = load_model(args.model, tasks)
    with contextlib.ExitStack() as stack:
        try:
            if args.out is not None:
                check_model(args.out, many.identity(), args.resume)
            done = resume_out(args.out, FORMATS[args.out.suffix.lower()](many.cards), paths) if args.resume else ()
            paths = [path for path in paths if str(path) not in done]
            outputs = open_outputs(args, many, stack)
        except OSError as error:
            raise CommandError(f"--out {args.out} cannot be written: {error.strerror}") from error

        def write(line: dict[str, Any]) -> None:
            for output in outputs:
                output.write(line)

        return ask_records(args, many, paths, facts, write, tell=not wants_table(args))


def embed(args: argparse.Namespace) -> int:
    """`ecgmoe embed`; returns the exit status."""
    check_out(args.out, args.resume, (".parquet",))
    paths, facts = asked_files(args)
    many = load_model(args.model, [])
    from .embeddings import EmbeddingTable

    try:
        with EmbeddingTable(args.out, many.base, many.model.config.record_size, args.resume) as table:
            paths = [path for path in paths if str(path) not in table.done]
            return ask_records(args, many, paths, facts, table.write, "embedded")
    except OSError as error:
        raise CommandError(f"--out {args.out} cannot be written: {error.strerror or error}") from error


def export(args: argparse.Namespace) -> int:
    """`ecgmoe export`; returns the exit status."""
    if args.int8 and (args.format != "onnx" or not args.check):
        raise CommandError("--int8 needs --format onnx, and --check with recordings that show the ranges of numbers")
    if args.out.exists() and any(args.out.iterdir()):
        raise CommandError(f"--out {args.out} holds files already; name another folder")
    tasks = None if args.tasks is None else list(dict.fromkeys(filter(None, args.tasks.split(","))))
    many = load_model(args.model, tasks)
    from .export_model import ExportError, export_model

    try:
        report = export_model(many, args.out, args.format, args.check, args.int8)
    except ExportError as error:
        raise CommandError(str(error)) from error
    if not args.quiet:
        for name, found in report["files"].items():
            print(f"{args.out / name}: {found['mib']:.1f} MiB, largest difference {found['largest_difference']:.1e}")
    return EXIT_OK


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
        return value

    parse.__name__ = "number"  # what argparse calls it where `kind` fails
    return parse


def build_parser() -> argparse.ArgumentParser:
    """All arguments of `ecgmoe`."""
    parser = argparse.ArgumentParser(prog="ecgmoe", description="ECG-MoE: clinical answers from ECG files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_predict(commands)
    _add_embed(commands)
    _add_export(commands)
    return parser


def _add_predict(commands: Any) -> None:
    command = commands.add_parser(
        "predict",
        help="answer every task for ECG files",
        description=HELP_PREDICT,
        epilog=EPILOG_PREDICT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=predict)
    add = command.add_argument
    _add_files(command)
    add = command.add_argument
    add("--tasks", metavar="A,B", help="names, folders or ids of task adapters (default: all of the model)")
    add("--out", type=Path, metavar="FILE", help="write to FILE.jsonl or FILE.csv, a line as soon as it is known")
    add(
        "--resume",
        action="store_true",
        help="go on with --out, with the same model: skip the records that it answers, try the others again",
    )
    add("--table", action="store_true", help="print the answers as a table, whatever stdout is")


def _add_files(command: argparse.ArgumentParser) -> None:
    """What every command that reads ECG files understands."""
    add = command.add_argument
    add("paths", nargs="*", type=Path, metavar="PATH", help="ECG files, and folders of them")
    _add_model(command)
    add("--sampling_rate", type=_positive(float), metavar="HZ", help="of files that do not give it")
    add("--unit", choices=("V", "mV", "uV", "nV"), help="of files that do not give it")
    add(
        "--leads",
        nargs="+",
        metavar="NAME",
        help="the channels of files that do not name them, in file order; of other files, the leads to use",
    )
    add("--batch_size", type=_positive(int), default=32, metavar="N", help="10-second windows at once (default: 32)")
    add("--quiet", action="store_true", help="neither progress nor errors on stderr")


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="a folder, or an id on the Hugging Face Hub (default: hub/model of the sources)",
    )


def _add_embed(commands: Any) -> None:
    command = commands.add_parser(
        "embed",
        help="write the embedding of ECG files",
        description=HELP_EMBED,
        epilog=EPILOG_EMBED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=embed)
    _add_files(command)
    add = command.add_argument
    add("--out", type=Path, metavar="FILE", required=True, help="the Parquet file to write")
    add("--resume", action="store_true", help="go on with --out: skip the records that it holds, try the others again")


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write the model for other runtimes",
        description=HELP_EXPORT,
        epilog=EPILOG_EXPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=export)
    _add_model(command)
    add = command.add_argument
    add("--tasks", metavar="A,B", help="names, folders or ids of task adapters (default: all of the model)")
    add("--out", type=Path, metavar="DIR", required=True, help="the folder to write, empty or not there yet")
    add("--format", choices=("onnx", "torch_export"), default="onnx", help="(default: onnx)")
    add(
        "--check",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="ECG files or folders to compare on (default: the examples)",
    )
    add("--int8", action="store_true", help="write model_int8.onnx too; needs --check")
    add("--quiet", action="store_true", help="nothing on stdout")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        print("ecgmoe:", printable(str(error)), file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("ecgmoe: interrupted; with --out, the same command and --resume goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout has enough. Python flushes it again at exit, which must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
