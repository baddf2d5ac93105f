"""What must not be published by accident: secrets, paths of a machine, names of machines.

Every text is read, and of safetensors what they say about themselves.
"""

import contextlib
import getpass
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

# The first characters of secrets as those who issue them document them; a few words around each keep prose out.
SECRETS = {
    "a Hugging Face token": r"\b(?:hf|hf_oauth|api_org)_[A-Za-z0-9]{30,}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})\b",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "a key of Amazon Web Services": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a key of an API": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"{}<>]+:[^\s/@'\"{}<>]+@",
    "a password": r"(?i)\b(?:password|passwd|secret|api_key|access_token)['\"]?\s*[:=]\s*['\"][^'\"\s{}<>]{8,}['\"]",
}
_ROOTS = (
    "Applications data gpfs home lustre mnt media nfs opt private proc root run scratch srv tmp Users usr var Volumes "
    "work workspace"
)
PLACES = {
    # Not a part of an address or of a relative path: what stands before the first slash ends a word.
    "an absolute path": rf"(?<![\w.~:/\\>)\]}}-])/(?:{_ROOTS.replace(' ', '|')})/[\w.-]+"
    r"|\b[A-Za-z]:\\\\?[\w.-]+\\|\bfile:///\S+",
    "an address of a private network": r"\b(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}\b",
    "a host of a private network": r"\b[a-z0-9][a-z0-9.-]*\.(?:internal|intranet|corp|lan|localdomain)\b",
}
MIN_NAME = 4  # shorter names of users and machines are words too
GENERAL_NAMES = {"localhost", "root", "user", "runner", "admin", "ubuntu", "debian", "jovyan", "docker", "build"}


@dataclass(frozen=True)
class Leak:
    """Something that must not go out: which file, where in it, what it is, and the text (secrets shortened)."""

    path: str
    place: str
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}, {self.place}: {self.what} ({self.text})"


def own_names(token: str | None = None) -> dict[str, str]:
    """What only this machine would write: its name, the user's home and name, and the token in use."""
    home = str(Path.home())
    found = {"the name of this machine": re.escape(socket.gethostname())}
    if len(Path(home).parts) > 2:
        found["the home of this user"] = re.escape(home)
    with contextlib.suppress(OSError, KeyError):  # a user without a name, as in some containers
        found["the name of this user"] = re.escape(getpass.getuser())
    kept = {
        what: rf"(?<![\w-]){name}(?![\w-])"
        for what, name in found.items()
        if len(name) >= MIN_NAME and name.lower() not in GENERAL_NAMES
    }
    return kept | ({"the token in use": re.escape(token)} if token else {})


def find_leaks(files: Mapping[str, Path | bytes], token: str | None = None) -> Iterator[Leak]:
    """Everything in these files that should stay here.

    Args:
        files: path on the Hub to the file or its content.
        token: of the login, which must be in none of them.
    """
    own = own_names(token)
    # A user or a machine may be called like a word of the text: these two are looked for in data and not in code.
    for path, content in files.items():
        named = {what: pattern for what, pattern in own.items() if not path.endswith(".py") or "name" not in what}
        patterns = {what: re.compile(pattern) for what, pattern in (SECRETS | PLACES | named).items()}
        for place, text in _texts(path, content):
            for what, pattern in patterns.items():
                for match in pattern.finditer(text):
                    is_secret = what in SECRETS or what == "the token in use"
                    yield Leak(path, place, what, f"{match[0][:6]}…" if is_secret else match[0])


def _texts(path: str, content: Path | bytes) -> Iterable[tuple[str, str]]:
    """(place, text) of all that can be read in a file."""
    if isinstance(content, Path) and path.endswith(".safetensors"):
        with safe_open(content, "np") as weights:
            return [(f"metadata {key!r}", text) for key, text in (weights.metadata() or {}).items()]
    data = content.read_bytes() if isinstance(content, Path) else content
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return []  # pictures, signals, weights: no text to read
    return [(f"line {number}", line) for number, line in enumerate(text.splitlines(), start=1)]
