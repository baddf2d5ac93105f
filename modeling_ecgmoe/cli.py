"""The command line: `ecgmoe predict`, `embed`, `export` and `publish`. What they do is in `commands.py`.

Nothing heavy is imported before the arguments are understood, so that `--help` and mistakes answer at once.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .answer_files import CommandError, printable
from .commands import embed, export, predict, publish

EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141

HELP_PREDICT = """\
Answer every task for ECG files. Folders are walked; the header and the signal file of a WFDB record count once.

Without --out the answers go to stdout: as a table where that is a terminal, one JSON object a line otherwise."""
EPILOG_PREDICT = """\
Beside --out FILE, FILE.model.json says which model and adapters answered; --resume goes on with these alone.

A JSON line holds record, path, status, sampling_rate, leads, duration_s, quality and tasks; a record that cannot be
answered has status "error" and the reason in error, and the others go on.

quality says in its warnings what to know of a recording: that it may be no ECG, swapped arm electrodes, and the like.
Answers of a recording longer than 10 seconds come from the mean of its windows' logits; windows in the answers of
rhythms and statements says in how many of them each label was given, and where it was most probable.

CSV columns: record, path, status, error, sampling_rate (Hz), leads (joined by ;), duration_s, warnings (joined by ;),
and for each task
  a regression      <task>, and <task>_low and <task>_high, the ends of its interval; empty where nothing was measured
  a classification  <task>, the labels given (joined by ;), and <task>_<label>, the probability of each
  several labels    <task>_windows too: of a long recording each label and in how many of its windows it was given
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
PUBLISHED = {
    "model": "a model with its code and its page",
    "adapter": "the adapter of a task, bound to a published model",
    "dataset": "a data set as Parquet with its page",
    "space": "the web page with all it runs on",
}
HELP_PUBLISH = """\
Put a model, an adapter, a data set or the web page on the Hugging Face Hub, in one commit.

The page is filled from what was measured. Files that hold a secret, a path or the name of this machine are refused,
and file and line are named. What is there already is not sent again: a second call changes nothing, and after an
interruption the same command goes on. Log in with `hf auth login`, or set HF_TOKEN."""
EPILOG_PUBLISH = """\
`ecgmoe publish WHAT --help` shows the arguments of each.
Exit status: 0 published, or nothing to change; 2 refused, with reason and way out on stderr; 130 interrupted."""


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
    _add_publish(commands)
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
    add("--sampling_rate", type=_positive(float), metavar="HZ", help="of files that do not give it; others must agree")
    add("--unit", choices=("V", "mV", "uV", "nV"), help="of files that do not give it; others must agree")
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


def _add_publish(commands: Any) -> None:
    command = commands.add_parser(
        "publish",
        help="put a model, an adapter, a data set or the web page on the Hugging Face Hub",
        description=HELP_PUBLISH,
        epilog=EPILOG_PUBLISH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = command.add_subparsers(required=True, metavar="WHAT", dest="kind")
    for kind, what in PUBLISHED.items():
        one = kinds.add_parser(kind, help=what, description=f"Publish {what}, in one commit.")
        one.set_defaults(run=publish)
        add = one.add_argument
        if kind in ("model", "adapter"):
            add("folder", type=Path, metavar="DIR", help="as save_pretrained or `train.py adapt` left it")
        if kind == "adapter":
            add("--base", metavar="ID", help="the published model that it adapts (default: ecg-moe/ecg-moe-base)")
            add("--base_revision", metavar="REV", help="branch, tag or commit of it (default: the newest commit)")
        if kind == "dataset":
            add("name", metavar="NAME", help="a builder of data_builders, such as ptb_xl")
            add("--data_dir", type=Path, metavar="DIR", help="a copy as the publisher of the data ships it")
            add("--config", nargs="+", metavar="NAME", help="configurations (default: the builder's default, or all)")
            add("--cache_dir", type=Path, metavar="DIR", help="where rows and shards are built")
            add("--num_proc", type=_positive(int), metavar="N", help="processes that build")
            add("--shard_mb", type=_positive(int), default=500, metavar="N", help="rows in one file (default: 500 MB)")
        if kind == "space":
            add("--model", metavar="DIR_OR_ID", help="goes along, or is loaded (default: hub/model of the sources)")
            add("--source", type=Path, metavar="DIR", help="the source tree (default: the one around this package)")
        add("--repo_id", required=True, metavar="OWNER/NAME", help="where it goes")
        add("--private", action="store_true", help="make a new repository private")
        add("--dry_run", action="store_true", help="show the files and the page, and send nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        print("ecgmoe:", printable(str(error)), file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        again = "with --out, the same command and --resume goes on" if args.run is predict else "run it again to go on"
        print(f"ecgmoe: interrupted; {again}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout has enough. Python flushes it again at exit, which must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
