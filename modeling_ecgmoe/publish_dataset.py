"""A data set on the Hub: Parquet shards, and a page that says where it comes from and what is in it.

It takes what a `datasets` builder prepared and what is known of the data set; it does not know the builders.
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import DatasetCardData, get_token

from .leaks import find_leaks
from .upload import PublishError, Upload

MAX_SHARD_BYTES = 500_000_000  # of rows before compression
MAX_SHOWN_LABELS = 20
PAGE = "README.md"
# How publishers write their licences, and what the Hub calls them.
LICENSES = {
    "cc by 4.0": "cc-by-4.0",
    "creative commons attribution 4.0 international public license": "cc-by-4.0",
    "cc0 1.0": "cc0-1.0",
    "odc-by": "odc-by",
    "odc-by 1.0": "odc-by",
    "open data commons attribution license v1.0": "odc-by",
    "odbl 1.0": "odbl",
    "open data commons open database license v1.0": "odbl",
}
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
# The columns that all builders share; what a data set has beyond them is in its publisher's words.
COLUMNS = {
    "record_id": "name of the record in the source",
    "patient_id": "whose it is; never in two splits",
    "signal": "(leads, samples) in mV, NaN = missing",
    "sampling_rate": "Hz",
    "lead_names": "one for each row of `signal`",
    "age": "years; null where unknown or hidden",
    "age_over_89": "the exact age is hidden for privacy",
    "recording_date": "as the source gives it, often shifted for privacy",
    "report": "as the source gives it",
    "fold": "as the source deals its patients out",
    "scp_codes": "SCP-ECG statements with their likelihood in percent, 0 where not given",
    "statements": "all codes of `scp_codes`",
    "superclass": "NORM, MI, STTC, CD, HYP; null where no statement is diagnostic",
    "arrhythmia": "rhythm statements; null where none is known",
    "quality": "which remarks on the recording were made",
    "baseline_drift": "the remark itself, mostly the leads it is about",
    "static_noise": "as `baseline_drift`",
    "burst_noise": "as `baseline_drift`",
    "electrodes_problems": "as `baseline_drift`",
    "start_sample": "where the window begins in the record",
    "beat_samples": "the annotated beats, in samples of `signal`",
    "beat_symbols": "their symbols in PhysioNet's code",
    "beat_classes": "their classes after AAMI: N, S, V, F, Q",
    "rr_interval_ms": "mean interval between beats, in ms",
    "heart_axis": "electrical axis of the heart",
}


class Facts(Protocol):
    """What must be known of a data set, as the builders of `data_builders` have it."""

    @property
    def title(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def about(self) -> str: ...
    @property
    def doi(self) -> str: ...
    @property
    def license(self) -> str: ...
    @property
    def citation(self) -> str: ...
    @property
    def records(self) -> int: ...
    @property
    def patients(self) -> int | None: ...
    @property
    def access(self) -> str: ...


def check_access(facts: Facts) -> None:
    """Refuse data that its users may not hand on.

    Raises:
        PublishError: the access is not open.
    """
    if facts.access != "open":
        raise PublishError(
            f"{facts.title} is {facts.access}: who has it has agreed not to share it, and a copy on the Hub, private "
            f"or not, would hand it to third parties; point people to https://doi.org/{facts.doi} and publish the "
            "command that builds it, or an adapter trained on it where its licence allows that"
        )


def dataset_upload(
    configs: Mapping[str, Any],
    facts: Facts,
    repo_id: str,
    folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Upload:
    """A data set as Parquet with its page.

    Args:
        configs: configuration to its splits, as a prepared builder's `as_dataset()` gives them; the first is the
            default.
        facts: what is known of it.
        repo_id: where it shall go; what lies there under `data/` and is not part of this is taken away.
        folder: an empty one for the shards, which must last until they are sent.
        max_shard_bytes: of rows before compression.

    Raises:
        PublishError: its users may not hand it on, there is nothing in it, or a text in it must not go out.
    """
    import datasets

    check_access(facts)
    if not configs or not all(configs.values()):
        raise PublishError(f"there are no rows of {facts.title} to publish")
    files: dict[str, Path | bytes] = {}
    for config, splits in configs.items():
        for split, rows in splits.items():
            _check_texts(f"{config}, {split}", rows)
            num_shards = max(1, math.ceil(rows.data.nbytes / max_shard_bytes))
            for index in range(num_shards):
                name = f"data/{config}/{split}-{index:05d}-of-{num_shards:05d}.parquet"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                rows.shard(num_shards, index, contiguous=True).to_parquet(folder / name)
                files[name] = folder / name
    header = DatasetCardData(
        pretty_name=f"{facts.title} {facts.version}",
        size_categories=[_size_category(max(sum(map(len, splits.values())) for splits in configs.values()))],
        task_categories=["other"],
        tags=["ecg", "electrocardiogram", "medical", "physiology", "time-series"],
        **_license(facts),
    )
    _add_structure(header, configs, files, datasets)
    page = f"---\n{header.to_yaml()}\n---\n\n{_page(configs, facts, repo_id)}"
    return Upload(repo_id, "dataset", files | {PAGE: page.encode()}, owned=("data/*",))


def _check_texts(place: str, rows: Any) -> None:
    """Look at the texts of all rows: a path of the machine that built them must not go out.

    Raises:
        PublishError: column and row are named.
    """
    import datasets

    texts = [name for name, kind in rows.features.items() if kind == datasets.Value("string")]
    columns = {f"{place}, column {name}": "\n".join(_one_line(v) for v in rows[name]).encode() for name in texts}
    leak = next(find_leaks(columns, get_token()), None)
    if leak is not None:
        raise PublishError(f"nothing was sent, take this out first (line means row): {leak}")


def _one_line(value: str | None) -> str:
    return " ".join((value or "").split())


def _add_structure(header: DatasetCardData, configs: Any, files: dict[str, Path | bytes], datasets: Any) -> None:
    """What `load_dataset` reads: where each split lies, and of which type each column is."""
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs

    places, infos = {}, {}
    for number, (config, splits) in enumerate(configs.items()):
        paths = [{"split": split, "path": f"data/{config}/{split}-*"} for split in splits]
        places[config] = {"data_files": paths} | ({"default": True} if number == 0 else {})
        sizes = {split: (rows.data.nbytes, len(rows)) for split, rows in splits.items()}
        infos[config] = datasets.DatasetInfo(
            features=next(iter(splits.values())).features,
            splits={s: {"name": s, "num_bytes": size, "num_examples": n} for s, (size, n) in sizes.items()},
            download_size=sum(
                path.stat().st_size
                for name, path in files.items()
                if isinstance(path, Path) and name.startswith(f"data/{config}/")
            ),
            dataset_size=sum(size for size, _ in sizes.values()),
        )
    MetadataConfigs(places).to_dataset_card_data(header)
    DatasetInfosDict(infos).to_dataset_card_data(header)


def _license(facts: Facts) -> dict[str, Any]:
    known = LICENSES.get(facts.license.lower())
    if known:
        return {"license": known}
    return {"license": "other", "license_name": facts.license, "license_link": f"https://doi.org/{facts.doi}"}


def _size_category(num_rows: int) -> str:
    return next((name for limit, name in SIZES if num_rows < limit), "1M<n<10M")


# ---------------------------------------------------------------------------------------------------------------- page


def _page(configs: Mapping[str, Any], facts: Facts, repo_id: str) -> str:
    patients = f" of {facts.patients:,} patients" if facts.patients else ""
    default, splits = next(iter(configs.items()))
    first_split, rows = next(iter(splits.items()))
    published = {config: sum(map(len, c.values())) for config, c in configs.items()}
    is_whole = all(count == facts.records for count in published.values())
    counts = ", ".join(f"{count:,} rows in {config}" for config, count in published.items())
    part = "" if is_whole else f" **This copy holds {counts}**, see Limits."
    return f"""\
# {facts.title} {facts.version}

{facts.about} The source has {facts.records:,} records{patients}.{part}

This is a copy of the source in another form: the same signals in millivolts as Parquet, the same labels, in the schema
that all data sets of ECG-MoE share. It is not by the authors of the source.

## Source

| | |
|---|---|
| publication | [doi.org/{facts.doi}](https://doi.org/{facts.doi}), version {facts.version} |
| licence | {facts.license} |
| access | {facts.access} |

Whoever uses it cites the source, see Citation.

## Loading

```python
from datasets import load_dataset

rows = load_dataset("{repo_id}", "{default}", split="{first_split}").with_format("numpy")
rows[0]["signal"].shape  # (leads, samples), millivolts

stream = load_dataset("{repo_id}", "{default}", split="{first_split}", streaming=True)  # nothing is downloaded first
```

## Splits

No patient is in two splits.

| configuration | split | rows | patients | bytes of rows |
|---|---|---:|---:|---:|
{_split_lines(configs)}

## Columns

| column | type | |
|---|---|---|
{_column_lines(rows)}

## Labels

{_label_lines(splits)}

## Consent and ethics

The recordings were collected, freed of what identifies a patient, and approved for publication by those who published
them; consent and the decision of the ethics committee are described there (doi {facts.doi}). Nothing was added here.
Do not try to find out who a patient is, and do not join this with data that could tell.

## Limits

{_limits(configs, facts, published)}

Research data, not a medical device: what is learned from it must not guide the care of a patient without the approval
that this needs.

## Citation

```bibtex
{facts.citation}
```
"""


def _split_lines(configs: Mapping[str, Any]) -> str:
    lines = []
    for config, splits in configs.items():
        for split, rows in splits.items():
            patients = f"{len(set(rows['patient_id'])):,}" if "patient_id" in rows.features else "–"
            lines.append(f"| {config} | {split} | {len(rows):,} | {patients} | {rows.data.nbytes:,} |")
    return "\n".join(lines)


def _column_lines(rows: Any) -> str:
    lines = []
    for name, kind in rows.features.items():
        names = getattr(kind, "names", None)
        text = f"{', '.join(names)}; null where unknown" if names else COLUMNS.get(name, "")
        lines.append(f"| `{name}` | {_type(kind)} | {text} |")
    return "\n".join(lines)


def _type(kind: Any) -> str:
    """A feature in a word or two."""
    if hasattr(kind, "shape") and kind.shape:
        return f"{kind.dtype} {tuple(kind.shape)}"
    if hasattr(kind, "feature"):
        return f"list of {_type(kind.feature)}"
    if isinstance(kind, dict):
        return ", ".join(f"{name} ({_type(inner)})" for name, inner in kind.items())
    return type(kind).__name__ if hasattr(kind, "names") else str(kind.dtype)


def _label_lines(splits: Any) -> str:
    """How often each label is there, for the columns with labels, in each split of the default configuration."""
    lines = [f"| column | label | {' | '.join(splits)} |", "|---|---|" + "---:|" * len(splits)]
    features = next(iter(splits.values())).features
    for name, kind in features.items():
        names = getattr(kind, "names", None)
        is_list = hasattr(kind, "feature") and getattr(kind.feature, "dtype", None) == "string"
        if names is None and (not is_list or name == "lead_names"):
            continue
        counts = {split: Counter(_labels(rows[name], names)) for split, rows in splits.items()}
        total = sum(counts.values(), Counter())
        for label, _ in total.most_common(MAX_SHOWN_LABELS):
            numbers = " | ".join(f"{counts[split][label]:,}" for split in splits)
            lines.append(f"| `{name}` | {label} | {numbers} |")
        if len(total) > MAX_SHOWN_LABELS:
            lines.append(
                f"| `{name}` | and {len(total) - MAX_SHOWN_LABELS} rarer | {' | '.join('' for _ in splits)} |"
            )
    return "\n".join(lines) if len(lines) > 2 else "There are none beside the columns above."


def _labels(values: Any, names: list[str] | None) -> list[str]:
    if names is not None:
        return ["unknown" if value is None else names[value] for value in values]
    return [label for labels in values for label in (["none known"] if labels is None else labels)]


def _limits(configs: Mapping[str, Any], facts: Facts, published: dict[str, int]) -> str:
    lines = []
    if any(count != facts.records for count in published.values()):
        counts = ", ".join(f"{count:,} rows in {config}" for config, count in published.items())
        lines.append(
            f"- The source has {facts.records:,} records, this copy {counts}: a configuration may be a part of the "
            "source, a record may give several rows, and what was missing or broken is left out."
        )
    for config, splits in configs.items():
        description = _one_line(next(iter(splits.values())).info.description)
        lines += [f"- {config}: {description}"] if description else []
    lines.append("- Ages, dates and labels are the source's, some under names that all sets share; none is mended.")
    return "\n".join(lines)
