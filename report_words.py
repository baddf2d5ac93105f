"""The words of the reports as a target beside the labels: what cardiologists wrote says more than the codes they gave.

For pretraining alone; the head that answers goes before the model is saved.
"""

import datasets
import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from modeling_ecgmoe.tasks import Task

TASK_NAME = COLUMN = "report_words"
# A word, or a number with its full stop, such as the last digit of a device's date line.
TOKEN = r"[^\W\d_]{3,}|\d+\."
MOST_OFTEN = 0.6  # of the reports; words in more of them tell nothing


def add_report_words(rows: datasets.Dataset, loss_weight: float, min_reports: int) -> tuple[datasets.Dataset, Task]:
    """The rows with a column of the words and word pairs of their reports, and the task of finding them.

    Args:
        rows: with a column `report`, text or None.
        loss_weight: of the task, see `Task`.
        min_reports: words in fewer reports are left out.

    Raises:
        ValueError: there is no such column, or no word is frequent enough.
    """
    if "report" not in rows.column_names:
        raise ValueError(
            f"report words need a data set with the column 'report', found {', '.join(rows.column_names)}; "
            "leave out --report_weight"
        )
    reports = [text or "" for text in rows.with_format(None)["report"][:]]
    counter = CountVectorizer(
        binary=True, ngram_range=(1, 2), min_df=min_reports, max_df=MOST_OFTEN, token_pattern=TOKEN
    )
    try:
        found = counter.fit_transform(reports)
    except ValueError as error:  # scikit-learn says so where nothing is left
        raise ValueError(f"no word is in {min_reports} of {len(reports)} reports; lower --report_min_count") from error
    words = counter.get_feature_names_out()
    lists = [words[np.sort(found[row].indices)].tolist() for row in range(found.shape[0])]
    column = [words_of if text.strip() else None for words_of, text in zip(lists, reports, strict=True)]
    task = Task(
        name=TASK_NAME,
        kind="multi_label",
        description="words of the report",
        column=COLUMN,
        labels=tuple(words),
        loss_weight=loss_weight,
    )
    return rows.add_column(COLUMN, column), task
