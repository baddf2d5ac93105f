"""What the electrocardiograph's own report in MIMIC-IV-ECG states: classes and rhythm statements from lines of text.

A report has up to 18 short lines by a program of the recorder (three makers, upper or lower case, with or without a
full stop), not by a physician. Two readings of it:

- `first_line_class`: one of 15, the label of the authors of EnECG (arXiv 2511.22935) as far as it is known. They
  publish the names and not the rule. The names are the most frequent first lines, nearly in the order in which others
  counted them (sinus rhythm 48 %, sinus bradycardia 9 %, sinus tachycardia 7 %, ...), and "other"; so the class is
  taken to be the first line, compared as a whole. It says what comes first, not what is there: "Sinus tachycardia
  with PVC(s)" is "other", and so is whatever only the second line says.
- `stated_classes`, `rhythm_statements`: all that any line states, by the patterns below; "other" where it states none
  of them.

A finding is stated unless its clause takes it back: what is no longer present, not seen, absent, resolved or replaced,
what follows no, without, cannot rule out, and what is only possible, probable, suggested or to be considered. A clause
ends at a comma, semicolon, full stop, dash between blanks, or "but". Two classes are guesses of the recorder by name,
"possible ectopic atrial rhythm" and "consider acute ST elevation MI": they are stated by their guess.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

SINUS, BRADYCARDIA, TACHYCARDIA = "sinus rhythm", "sinus bradycardia", "sinus tachycardia"
FIBRILLATION, SINUS_ARRHYTHMIA = "atrial fibrillation", "sinus arrhythmia"
BORDERLINE_BLOCK = "sinus rhythm with borderline 1st degree a-v block"
FIRST_DEGREE_BLOCK = "sinus rhythm with 1st degree a-v block"
RAPID_FIBRILLATION = "atrial fibrillation with rapid ventricular response"
WITH_PAC, WITH_PVC = "sinus rhythm with pac(s)", "sinus rhythm with pvc(s)"
PACING, INFARCTION = "ventricular pacing", "consider acute st elevation mi"
WARNING, ECTOPIC = "warning: data quality may affect interpretation", "possible ectopic atrial rhythm"
OTHER = "other"
REPORT_CLASSES = (
    SINUS, BRADYCARDIA, TACHYCARDIA, FIBRILLATION, BORDERLINE_BLOCK, FIRST_DEGREE_BLOCK, RAPID_FIBRILLATION,
    SINUS_ARRHYTHMIA, WITH_PAC, PACING, INFARCTION, WARNING, WITH_PVC, ECTOPIC, OTHER,
)  # fmt: skip

# Finding to its pattern in a normalised clause. "Flutter or fibrillation" is neither.
_OR = r" ?(?:/|-|or) ?(?:atrial )?"
_FIRST_DEGREE = r"(?:1st|first)[- ]degree (?:a-?v|atrioventricular)[- ]block"
_FINDINGS = {
    name: re.compile(pattern)
    for name, pattern in {
        "SR": r"\bsinus rhythm\b",
        "SBRAD": r"\bsinus brady(?:cardia|arrhythmia)",
        "STACH": r"\bsinus tachy(?:cardia|arrhythmia)",
        "SARRH": r"\bsinus (?:brady|tachy)?arr?hythmia",
        "AFIB": rf"(?<!flutter/)(?<!flutter or )\b(?:atrial fibrillation|a-?fib)\b(?!{_OR}flutter)",
        "AFLT": rf"(?<!fibrillation/)(?<!fibrillation or )(?<!fib/)\b(?:atrial |a-?)flutter\b(?!{_OR}fib)",
        "PACE": r"\b(?:(?:bi|atrio-?)?ventricular|atrial|dual|demand|a-?v|v)[- ](?:sequential )?(?:dual[- ])?"
        r"(?:chamber )?pac(?:ed|ing)\b|\b(?:electronic|artificial|sequential|demand|ventricular) (?:\S+ )?pacemaker|"
        r"\bpacemaker rhythm|\bpaced rhythm",
        "BIGU": r"\bbigemin",
        "TRIGU": r"\btrigemin",
        "PSVT": r"\bparoxysmal supraventricular tachycardia|\bpsvt\b",
        "SVTAC": r"(?<!paroxysmal )\bsupraventricular tachycardia|\bsvt\b",
        "SVARR": r"\bsupraventricular arrhythmia",
        "rapid response": r"\b(?:rapid|fast) ventricular (?:response|rate)|\brvr\b",
        "borderline block": rf"\bborderline {_FIRST_DEGREE}",
        "first degree block": rf"(?<!borderline ){_FIRST_DEGREE}",
        "PAC": r"\bpacs?\b|\bpac\(s\)|\bapcs?\b|\b(?:premature atrial|atrial premature|supraventricular premature)",
        "PVC": r"\bpvcs?\b|\bpvc\(s\)|\bvpcs?\b|\b(?:premature ventricular|ventricular premature)",
        PACING: r"\b(?:bi|atrio-?)?ventricular[- ]pac(?:ed|ing)\b|\bv[- ]pac(?:ed|ing)\b",
    }.items()
}
RHYTHM_FINDINGS = ("SR", "AFIB", "STACH", "SARRH", "SBRAD", "PACE", "SVARR", "BIGU", "AFLT", "SVTAC", "PSVT", "TRIGU")
# Guesses by name, looked for before guesses are set aside.
_GUESSES = {
    WARNING: re.compile(r"\bdata quality may affect interpretation"),
    ECTOPIC: re.compile(r"\b(?:possible|probable|consider) ectopic atrial rhythm"),
    INFARCTION: re.compile(r"\bconsider acute st[- ]elevation mi\b"),
}
# A class that is one finding, or several that the report states together.
_CLASS_FINDINGS = {
    SINUS: {"SR"}, BRADYCARDIA: {"SBRAD"}, TACHYCARDIA: {"STACH"}, FIBRILLATION: {"AFIB"},
    BORDERLINE_BLOCK: {"SR", "borderline block"}, FIRST_DEGREE_BLOCK: {"SR", "first degree block"},
    RAPID_FIBRILLATION: {"AFIB", "rapid response"}, SINUS_ARRHYTHMIA: {"SARRH"}, WITH_PAC: {"SR", "PAC"},
    PACING: {PACING}, INFARCTION: {INFARCTION}, WARNING: {WARNING}, WITH_PVC: {"SR", "PVC"}, ECTOPIC: {ECTOPIC},
}  # fmt: skip

_CLAUSE_END = re.compile(r"[,;]|\.(?:\s|$)|\s-+\s|\bbut\b")
_CONTINUES = re.compile(r"^\s*(?:-\s*\w|with\b)", re.IGNORECASE)
# What takes back all that its clause says.
_WHOLE = re.compile(r"\bno longer\b|\bnot\b|\bcannot be\b|\babsent\b|\bresolved\b|\bunlikely\b|\bquestionable\b|\?")
# What takes back what follows it in its clause.
_ONWARDS = re.compile(
    r"\bcan ?not (?:rule out|exclude)|\bno\b(?! longer)|\b(?:without|absence of|rather than|rule out|possibl[ey]|"
    r"probabl[ey]|likely|consider|suspect|suggests?|suggestive|suggesting|may be|might be|could be|versus|vs|replaced|"
    r"replaces)\b"
)
_DENIED = re.compile(r"\bcan ?not (?:rule out|exclude)|\b(?:no|not|without|unlikely)\b")


def first_line_class(lines: Sequence[str]) -> str | None:
    """The class that the report's first line is, word for word but for case, stops and ornaments; None without one."""
    for line in lines:
        if text := _normalised(line):
            return text if text in REPORT_CLASSES[:-1] else OTHER
    return None


def stated_classes(lines: Sequence[str]) -> list[str] | None:
    """Every class of `REPORT_CLASSES` that the report states, in their order; None without a report."""
    findings = _findings(lines)
    if findings is None:
        return None
    return [name for name, needed in _CLASS_FINDINGS.items() if needed <= findings] or [OTHER]


def rhythm_statements(lines: Sequence[str]) -> list[str] | None:
    """The report's rhythm as PTB-XL's SCP-ECG statements; None without a report, or where it names none of them."""
    findings = _findings(lines) or set()
    return [code for code in RHYTHM_FINDINGS if code in findings] or None


def _findings(lines: Sequence[str]) -> set[str] | None:
    """What the lines state together; None where there is no text."""
    statements: list[str] = []
    for line in lines:
        if not _normalised(line):
            continue
        if statements and _CONTINUES.match(line) and not line.lstrip().startswith("--"):
            statements[-1] += " " + line.strip()  # "Sinus rhythm", "- first degree A-V block"
        else:
            statements.append(line)
    return set().union(*(_stated(statement) for statement in statements)) if statements else None


@lru_cache(maxsize=100_000)  # the recorders have some thousand sentences
def _stated(statement: str) -> frozenset[str]:
    """The findings of one statement that no negation and no doubt takes back."""
    found = set()
    for clause in _CLAUSE_END.split(_normalised(statement)):
        if not _DENIED.search(clause):
            found |= {name for name, pattern in _GUESSES.items() if pattern.search(clause)}
        clause = clause.rpartition("replaced by")[2]
        stated = _ONWARDS.split(clause, maxsplit=1)[0]
        if not _WHOLE.search(stated):
            found |= {name for name, pattern in _FINDINGS.items() if pattern.search(stated)}
    return frozenset(found)


def _normalised(line: str) -> str:
    """In lower case, with one blank between words, without the ornaments and stops around it."""
    return " ".join(line.lower().split()).strip("*-. ")
