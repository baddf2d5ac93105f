"""One commit to the Hub: what would change, whether it may go out, and what to do where the Hub refuses.

The Hub is compared with the files first, so that nothing is sent twice: a second call makes no commit, and after an
interruption the large files that arrived are not sent again. A commit follows the one it was compared with, or is not
made.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx

from .leaks import find_leaks

MAX_REGULAR_BYTES = 10_000_000  # the Hub takes larger files as LFS objects only
LFS_SUFFIXES = {".arrow", ".bin", ".npy", ".npz", ".onnx", ".parquet", ".safetensors", ".zip"}
MAX_LEAKS = 5  # named in one message


class PublishError(Exception):
    """It cannot be published so. The message is one line: what is wrong, what to do."""


@dataclass
class Upload:
    """What one repository shall hold.

    Args:
        repo_id: owner/name.
        repo_type: "model", "dataset" or "space".
        files: path in the repository to the file, or to its content.
        owned: patterns (of `fnmatch`) of files that are ours: those there that `files` lacks are taken away.
        left_out: files that were found beside them and do not go.
    """

    repo_id: str
    repo_type: str
    files: dict[str, Path | bytes]
    owned: tuple[str, ...] = ()
    left_out: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The page of the repository."""
        prefix = constants.REPO_TYPES_URL_PREFIXES.get(self.repo_type, "")
        return f"{constants.ENDPOINT}/{prefix}{self.repo_id}"

    def check(self) -> None:
        """Refuse what must not go out.

        Raises:
            PublishError: a secret, or a trace of this machine; file and place are named. Or no name of a repository.
        """
        if not all(self.repo_id.partition("/")) or self.repo_id.count("/") > 1:
            raise PublishError(f"{self.repo_id!r} is not a name of a repository; it is OWNER/NAME")
        leaks = list(find_leaks(self.files, get_token()))
        if leaks:
            more = f"; and {len(leaks) - MAX_LEAKS} more" if len(leaks) > MAX_LEAKS else ""
            found = "; ".join(map(str, leaks[:MAX_LEAKS]))
            raise PublishError(f"nothing was sent, take this out first: {found}{more}")

    def page(self) -> str:
        """The text of the page."""
        content = self.files["README.md"]
        return content.read_text(encoding="utf-8") if isinstance(content, Path) else content.decode()

    def tree(self) -> list[str]:
        """The files as they will lie there: size, whether git or LFS keeps them, path."""
        lines = []
        for path, content in sorted(self.files.items()):
            kind = "LFS" if is_large(path, content) else "regular"
            lines.append(f"{_size(content):>13,}  {kind:<7}  {path}")
        return lines


@dataclass(frozen=True)
class Changes:
    """How files differ from a repository: its commit, what is new or other there, what is no longer wanted."""

    head: str
    changed: list[str]
    removed: list[str]

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed)


@dataclass(frozen=True)
class Published:
    """What came of it: the page, the commit it shows, and what that commit changed (nothing: it was there).

    Attributes:
        remarks: what the Hub said about the header of the page.
    """

    url: str
    commit: str
    changed: list[str]
    removed: list[str]
    remarks: list[str] = field(default_factory=list)


def send(upload: Upload, private: bool, message: str, space_sdk: str | None = None) -> Published:
    """Create the repository where there is none, and make one commit of everything that differs.

    Args:
        private: of a new repository; an existing public one is refused.
        space_sdk: of a new Space.

    Raises:
        PublishError: something must not go out, or the Hub refused; the message says what to do.
    """
    upload.check()
    if get_token() is None:
        raise PublishError("you are not logged in to the Hub; run `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="ecg-moe")
    with explained(upload, "nothing was published"):
        if private and _is_public(api, upload):
            raise PublishError(
                f"{upload.url} exists and is public; make it private in its settings, or leave out --private"
            )
        api.create_repo(
            upload.repo_id,
            repo_type=upload.repo_type,
            private=private or None,
            exist_ok=True,
            space_sdk=space_sdk,
        )
    with explained(upload, "nothing was committed"):
        changes = compare(api, upload)
        if not changes:
            return Published(upload.url, changes.head, [], [])
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always")
            try:
                commit = _commit(api, upload, changes, message)
            except httpx.TransportError:
                # The Hub may have made the commit and only its answer was lost.
                now = compare(api, upload)
                if now or now.head == changes.head:
                    raise
                commit = now.head
    said = [_one_line(remark.message) for remark in remarks if issubclass(remark.category, UserWarning)]
    return Published(upload.url, commit, changes.changed, changes.removed, said)


def compare(api: HfApi, upload: Upload) -> Changes:
    """What a commit would change."""
    head = api.repo_info(upload.repo_id, repo_type=upload.repo_type).sha
    assert head is not None  # of an existing repository it is always given
    tree = api.list_repo_tree(upload.repo_id, recursive=True, revision=head, repo_type=upload.repo_type)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    changed = [
        path for path, content in upload.files.items() if path not in there or not _is_same(content, there[path])
    ]
    removed = [
        path
        for path in there
        if path not in upload.files and any(fnmatchcase(path, pattern) for pattern in upload.owned)
    ]
    return Changes(head, sorted(changed), sorted(removed))


def is_large(path: str, content: Path | bytes) -> bool:
    """Whether the Hub will keep a file as an LFS object, by its rules for new repositories."""
    if Path(path).suffix in LFS_SUFFIXES or _size(content) > MAX_REGULAR_BYTES:
        return True
    return b"\0" in (content.read_bytes() if isinstance(content, Path) else content)


def _commit(api: HfApi, upload: Upload, changes: Changes, message: str) -> str:
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path, upload.files[path]) for path in changes.changed
    ]
    operations += [CommitOperationDelete(path) for path in changes.removed]
    commit = api.create_commit(
        upload.repo_id,
        operations,
        commit_message=message,
        repo_type=upload.repo_type,
        parent_commit=changes.head,
    )
    return commit.oid


def _is_public(api: HfApi, upload: Upload) -> bool:
    try:
        return not api.repo_info(upload.repo_id, repo_type=upload.repo_type).private
    except RepositoryNotFoundError:
        return False


def _is_same(content: Path | bytes, there: RepoFile) -> bool:
    if _size(content) != there.size:
        return False
    if there.lfs is not None:
        with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256
    data = content.read_bytes() if isinstance(content, Path) else content
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == there.blob_id


def _size(content: Path | bytes) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


# ----------------------------------------------------------------------------------------------- what the Hub refuses


@contextmanager
def explained(upload: Upload, so_far: str) -> Iterator[None]:
    """Turn what the Hub and the network say into one line with the way out.

    Raises:
        PublishError: instead of the client's errors.
    """
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PublishError("the Hub is switched off by HF_HUB_OFFLINE; unset it to publish") from error
    except HfHubHTTPError as error:
        raise PublishError(f"{_refusal(upload, error)}; {so_far}") from error
    except LocalEntryNotFoundError as error:
        raise PublishError(f"{upload.repo_id} could not be fetched; {so_far}: {_one_line(error)}") from error
    except HFValidationError as error:
        raise PublishError(f"{upload.repo_id!r} is not a name of a repository: {_one_line(error)}") from error
    except ValueError as error:  # the Hub's opinion of the page's header, and answers that are none
        raise PublishError(f"the Hub does not take it: {_one_line(error)}; {so_far}") from error
    except (httpx.HTTPError, RuntimeError) as error:
        # The client wraps what goes wrong in a large file.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, HfHubHTTPError):
            raise PublishError(f"{_refusal(upload, cause)}; {so_far}") from error
        if not isinstance(cause, httpx.HTTPError):
            raise
        raise PublishError(
            f"the connection to {constants.ENDPOINT} broke off ({type(cause).__name__}); {so_far}, run the same "
            "command again to go on: what has arrived is not sent twice"
        ) from error


def _refusal(upload: Upload, error: HfHubHTTPError) -> str:
    """What the Hub refuses, and the way out."""
    status, owner = error.response.status_code, upload.repo_id.partition("/")[0]
    said = f" and says: {_one_line(error.server_message)}" if error.server_message else ""
    wait = error.response.headers.get("Retry-After")
    again = "run the same command again"
    reasons = {
        401: f"the Hub does not accept your token (401){said}; run `hf auth login` with a token of role write from "
        f"{constants.ENDPOINT}/settings/tokens",
        403: f"your token may not write to {upload.repo_id} (403){said}; use one of role write, of {owner} or of a "
        f"member of {owner}",
        404: f"there is no {upload.repo_type} {upload.repo_id} that your token may see (404){said}; check the name "
        "and the token",
        412: f"{upload.repo_id} was changed by someone else meanwhile (412){said}; look at it, and {again}",
        429: f"the Hub has had too many requests (429){said}; wait {f'{wait} s' if wait else 'a while'}, and {again}",
    }
    if status in reasons:
        return reasons[status]
    if status >= 500:
        return f"the Hub is in trouble ({status}){said}; wait a while, and {again}"
    return f"the Hub refuses ({status}){said or f': {_one_line(error)}'}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
