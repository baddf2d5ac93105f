"""What the commands of `ecgmoe` do: predict, embed, export and publish. Their arguments are in `cli.py`.

Nothing heavy is imported before a command has understood its arguments, so that mistakes are answered at once.
"""

import argparse
import contextlib
import sys
import tempfile
import time
import warnings
from collections import Counter
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
    from .upload import Upload

EXIT_OK, EXIT_SOME_FAILED = 0, 1


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
    from .ecg_files import find_ecgs, find_others
    from .leads import LEADS, find_lead

    leads = tuple(name for part in args.leads or () for name in part.split(",") if name)
    if args.leads and not any(map(find_lead, leads)):
        raise CommandError(f"--leads {' '.join(leads)}: none is one of the twelve leads {', '.join(LEADS)}")
    paths = find_ecgs(args.paths)
    passed_over = find_others(args.paths, paths) if not (paths and args.quiet) else []
    counts = Counter(path.suffix.lower() or "without suffix" for path in passed_over)
    others = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
    if not paths:
        there = f" among its files ({others})" if others else ""
        raise CommandError(f"there is no ECG file in {', '.join(map(str, args.paths))}{there}")
    if others:
        note = f"ecgmoe: passed over in folders: {others}; name a file itself to have it read"
        print(printable(note), file=sys.stderr)
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
    from .recording import EcgFileWarning

    started, num_failed, num_warned = time.monotonic(), 0, 0
    with (
        warnings.catch_warnings(category=EcgFileWarning, action="ignore"),  # each line says it of its record
        contextlib.closing(predict_records(many, paths, facts, args.batch_size)) as lines,
    ):
        # None: a bar on a terminal, nothing in a log.
        for line in tqdm(lines, total=len(paths), unit=" records", disable=True if args.quiet else None):
            with tqdm.external_write_mode():
                write(line)
                num_warned += bool(line.get("quality", {}).get("warnings"))
                if line["status"] != "ok":
                    num_failed += 1
                    if tell and not args.quiet:
                        print("ecgmoe:", printable(f"{line['error']} ({line['path']})"), file=sys.stderr)
    if not args.quiet:
        count, seconds = f"{len(paths) - num_failed} of {len(paths)} records {answered}", time.monotonic() - started
        warned = f", {num_warned} of them with warnings" if num_warned else ""
        print(f"ecgmoe: {count} in {seconds:.1f} s{warned}", file=sys.stderr)
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
        asked = [str(path) for path in paths]
        with EmbeddingTable(args.out, many.base, many.config.record_size, args.resume, asked) as table:
            paths = [path for path in paths if str(path) not in table.done]
            return ask_records(args, many, paths, facts, table.write, "embedded")
    except OSError as error:
        raise CommandError(f"--out {args.out} cannot be written: {error.strerror or error}") from error


def export(args: argparse.Namespace) -> int:
    """`ecgmoe export`; returns the exit status."""
    if args.int8 and (args.format != "onnx" or not args.check):
        raise CommandError("--int8 needs --format onnx, and --check with recordings that show the ranges of numbers")
    if args.out.is_dir() and any(args.out.iterdir()):
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


def publish(args: argparse.Namespace) -> int:
    """`ecgmoe publish`; returns the exit status."""
    from .upload import PublishError, send

    with contextlib.ExitStack() as stack:
        try:
            upload = dataset_to_publish(args, stack) if args.kind == "dataset" else _to_publish(args)
            if args.dry_run:
                upload.check()
                print(f"{upload.url} would hold", *upload.tree(), "", upload.page(), sep="\n")
            else:
                sdk = "gradio" if args.kind == "space" else None
                done = send(upload, args.private, f"Publish this {args.kind} with ecgmoe", sdk)
        except PublishError as error:
            raise CommandError(str(error)) from error
    for name in upload.left_out:
        print(f"ecgmoe: not published, since it is no part of it: {name}", file=sys.stderr)
    if not args.dry_run:
        for remark in done.remarks:
            print(f"ecgmoe: the Hub remarks: {remark}", file=sys.stderr)
        for path in done.removed:
            print(f"ecgmoe: taken away, since it is no part of it any more: {path}", file=sys.stderr)
        count = len(done.changed) + len(done.removed)
        print(done.url, f"{count} files in commit {done.commit}" if count else f"nothing changed since {done.commit}")
    return EXIT_OK


def _to_publish(args: argparse.Namespace) -> "Upload":
    """The model, the adapter or the web page that the arguments name."""
    from . import publish
    from .adapter_card import BASE_MODEL

    if args.kind == "model":
        return publish.model_upload(args.folder, args.repo_id)
    if args.kind == "adapter":
        base, revision = args.base or BASE_MODEL, args.base_revision
        if not args.dry_run:  # which asks nobody
            revision = publish.pinned_base(args.folder, base, revision)
        return publish.adapter_upload(args.folder, args.repo_id, base, revision)
    source = args.source or Path(__file__).resolve().parent.parent
    return publish.space_upload(source, args.repo_id, args.model or str(source / "hub" / "model"))


def dataset_to_publish(args: argparse.Namespace, stack: contextlib.ExitStack) -> "Upload":
    """The data set that the arguments name, built where it is not yet; its shards last as long as the stack.

    The only place of this package that knows the builders, which not everyone has installed.
    """
    try:
        import datasets

        from data_builders import find_builder
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is not installed; pip install 'ecg-moe[data]'") from error
    from .publish_dataset import check_access, dataset_upload

    try:
        found = find_builder(args.name)
        check_access(found.FACTS)
        names = args.config or [found.DEFAULT_CONFIG_NAME or c.name for c in found.BUILDER_CONFIGS]
        configs = {}
        for name in dict.fromkeys(names):
            builder = found(config_name=name, data_dir=args.data_dir, cache_dir=args.cache_dir)
            builder.download_and_prepare(num_proc=args.num_proc)
            configs[name] = builder.as_dataset()
    except (ConnectionError, FileNotFoundError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise CommandError(" ".join(str(error).split())) from error
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ecgmoe-", dir=args.cache_dir))
    return dataset_upload(configs, found.FACTS, args.repo_id, Path(folder), args.shard_mb * 1_000_000)
