"""ECGs in XML: HL7 aECG, GE MUSE, Philips (Sierra) and Mortara ELI, told apart by their root element.

`ecgdatakit` parses them, after `defusedxml` has: entities and all that would be fetched from elsewhere are refused.
"""

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .device_files import parsing, read_bytes, to_ecg
from .recording import Ecg, EcgFileError, Facts, shown

MAX_XML_BYTES = 2**25
_MAX_XML_VALUES = 2**22


def read_xml(path: Path, facts: Facts) -> Ecg:
    """An ECG in XML.

    Raises:
        EcgFileError: the root element is none of `ROOTS`, or the document cannot be read or must not be believed.
    """
    content = read_bytes(path, MAX_XML_BYTES)
    with parsing("XML", path):
        from ecgdatakit.parsing.helpers.xml import parse_xml_root

        root = parse_xml_root(content)
        reader = ROOTS.get(root.tag)
        if reader is None:
            raise EcgFileError(f"expected an ECG in XML ({', '.join(ROOTS)}), found {shown(root.tag)}")
        return reader(path, root, facts)


def looks_like_ecg_xml(start: bytes) -> bool:
    """Whether the first bytes of an XML file open one of the root elements of `ROOTS`."""
    is_wide = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = start.decode("utf-16" if is_wide else "utf-8", errors="ignore")
    root = re.search(r"<(?:[\w.-]+:)?([A-Za-z][\w.-]*)[\s>/]", text)
    return root is not None and root[1] in ROOTS


def _read_aecg(path: Path, root: Any, facts: Facts) -> Ecg:
    """HL7 annotated ECG (ANSI/HL7 V3 ECG R1-2004): the rhythm series."""
    from ecgdatakit.parsing.parsers.hl7_aecg import HL7aECGParser

    series = [
        s
        for s in root.findall("component/series")
        if (code := s.find("code")) is None or code.get("code", "").upper() != "REPRESENTATIVE_BEAT"
    ]
    sets = [found for s in series for found in s.findall("component/sequenceSet")]
    if len(sets) > 1:
        raise EcgFileError(f"it holds {len(sets)} rhythm recordings; export them apart")
    record = HL7aECGParser().parse(path)
    for lead in record.leads:
        if lead.resolution_unit and not lead.adc_resolution:  # the library goes on with 1
            raise EcgFileError(f"lead {shown(lead.label)} has no scale; export it again")
    rate = record.raw_metadata["rhythm_time"]["sampling_rate_exact"]
    return to_ecg(record, facts, rates=[rate] * len(record.leads))


def _read_muse(path: Path, root: Any, facts: Facts) -> Ecg:
    """GE MUSE `RestingECG`: the rhythm, not the median beats. Most files hold eight leads; the others follow."""
    from ecgdatakit.parsing.parsers.ge_muse_xml import GEMuseXMLParser

    rhythms = [w for w in root.findall("Waveform") if (w.findtext("WaveformType") or "").strip().lower() != "median"]
    if len(rhythms) > 1:
        raise EcgFileError(f"it holds {len(rhythms)} rhythm recordings; export them apart")
    record = GEMuseXMLParser().parse(path)
    late = [lead.label for lead in record.leads if "LeadTimeOffset" in lead.annotations]
    if late:
        raise EcgFileError(f"its leads {shown(late)} start later than the others; export simultaneous leads")
    return to_ecg(record, facts)


def _read_philips(path: Path, root: Any, facts: Facts) -> Ecg:
    """Philips PageWriter and TraceMaster, `restingecgdata` 1.03 to 1.04.02, XLI compression undone."""
    from ecgdatakit.parsing.parsers.sierra_xml import SierraXMLParser

    waveforms = next(root.iter("parsedwaveforms"), None)
    if waveforms is not None:
        _check_xli("".join((waveforms.text or "").split()), waveforms.get("dataencoding", ""))
    ecg = to_ecg(SierraXMLParser().parse(path), facts)
    _check_limb_leads(ecg)
    return ecg


def _check_limb_leads(ecg: Ecg) -> None:
    """Refuse limb leads that are what compression leaves of them: there III is stored as what I and II do not explain.

    Raises:
        EcgFileError: III is nothing like II - I.
    """
    limbs = [ecg.signal[ecg.lead_names.index(name)] for name in ("I", "II", "III") if name in ecg.lead_names]
    if len(limbs) == 3:
        expected = limbs[1] - limbs[0]
        if np.std(limbs[2] - expected) > 0.5 * np.std(expected) + 0.02:
            raise EcgFileError("its leads I, II and III contradict each other (III is not II - I); export it again")


def _check_xli(text: str, encoding: str) -> None:
    """Refuse a waveform that would unpack to more than `_MAX_XML_VALUES`, whether or not it is compressed.

    The lengths of the strings in an LZW table are enough to know the length of the output, without making it.

    Raises:
        EcgFileError: it is one.
    """
    if encoding != "Base64":
        return
    data = base64.b64decode(text)
    position = total = 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "little", signed=True)
        position += 8
        if size <= 0 or size > len(data) - position:
            return  # not XLI, or damaged: the parser knows
        total += _lzw_length(data[position : position + size])
        if total > 2 * _MAX_XML_VALUES:
            raise EcgFileError(f"it unpacks to more than {_MAX_XML_VALUES} values; export it again")
        position += size


def _lzw_length(chunk: bytes, bits: int = 10) -> int:
    """How many bytes an LZW stream of fixed code width unpacks to."""
    num_codes = 8 * len(chunk) // bits
    stream = f"{int.from_bytes(chunk, 'big'):0{8 * len(chunk)}b}"
    last_code = 2**bits - 2
    lengths, next_code = dict.fromkeys(range(256), 1), 256
    total = previous = 0
    for start in range(0, bits * num_codes, bits):
        code = int(stream[start : start + bits], 2)
        if code > last_code:
            break
        length = lengths.setdefault(code, previous + 1)
        if previous and next_code <= last_code:
            lengths[next_code] = previous + 1
            next_code += 1
        total += length
        previous = length
    return total


def _read_mortara(path: Path, root: Any, facts: Facts) -> Ecg:
    """Mortara ELI: the rhythm channels."""
    from ecgdatakit.parsing.parsers.mortara_el250 import MortaraEL250Parser

    return to_ecg(MortaraEL250Parser().parse(path), facts)


ROOTS: dict[str, Callable[[Path, Any, Facts], Ecg]] = {
    "AnnotatedECG": _read_aecg,
    "RestingECG": _read_muse,
    "restingecgdata": _read_philips,
    "ECG": _read_mortara,
}
