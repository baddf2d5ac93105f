"""The same heartbeats by two routes: the millivolts of real recordings do not depend on the file they come in."""

import warnings
from pathlib import Path

import numpy as np
import pyedflib
import pytest
import wfdb
from ecgdatakit import FileParser

from modeling_ecgmoe.ecg_files import EcgFileWarning, find_ecgs, read_ecg
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.leads import arrange_leads, find_lead

# By the phase of their cross spectra the 100 Hz files of PTB-XL run ahead of its 500 Hz files by 1.25 to 1.36 ms.
PTB_XL_LEAD_S = 0.00125


def advance(signal: np.ndarray, seconds: float, sampling_rate: float) -> np.ndarray:
    """The signal so much earlier, mirrored at its ends, by a phase in its spectrum."""
    mirrored = np.concatenate([signal, signal[:, ::-1]], axis=1).astype(np.float64)
    frequency_hz = np.fft.rfftfreq(mirrored.shape[1], 1.0 / sampling_rate)
    spectrum = np.fft.rfft(mirrored, axis=1) * np.exp(2j * np.pi * frequency_hz * seconds)
    return np.fft.irfft(spectrum, mirrored.shape[1], axis=1)[:, : signal.shape[1]]


def test_ptb_xl_at_500_hz_and_at_100_hz_is_one_signal(test_data: Path) -> None:
    extractor = EcgMoeFeatureExtractor()
    gains, errors = [], []
    folder = test_data / "ptb-xl" / "records100"
    pairs = [
        (path, low)
        for path in find_ecgs([test_data / "ptb-xl-500hz"])
        if (low := folder / path.parent.name / path.name.replace("_hr", "_lr")).exists()
    ]
    for path, low in pairs[:: max(1, len(pairs) // 50)]:
        signals = []
        for file, seconds in ((path, PTB_XL_LEAD_S), (low, 0.0)):
            ecg = read_ecg(file)
            arranged, _ = arrange_leads(advance(ecg.signal, seconds, ecg.sampling_rate), ecg.lead_names)
            resampled, _ = extractor.resample(arranged, np.isfinite(arranged), ecg.sampling_rate)
            signals.append(resampled[:, 50:-50])  # without the ends, where filters see different pasts
        gains.append(float((signals[0] * signals[1]).sum() / (signals[0] ** 2).sum()))
        errors.append(float(np.std(signals[0] - signals[1]) / np.std(signals[0])))
    assert len(gains) > 20
    # What is left is the anti-aliasing of the 100 Hz files: of 211 records, gains are .982 to 1.002
    # (half of them within .0002) and errors 0.8 % in the median, 13 % in the noisiest record.
    off = np.abs(np.array(gains) - 1.0)
    assert np.median(off) < 0.001
    assert off.max() < 0.03
    assert np.median(errors) < 0.015
    assert np.max(errors) < 0.15


def test_cinc_2021_holds_the_same_millivolts_as_ptb_xl(test_data: Path) -> None:
    originals = {f"HR{int(path.stem[:5]):05d}": path for path in find_ecgs([test_data / "ptb-xl-500hz"])}
    copies = [path for path in find_ecgs([test_data / "challenge-2021" / "PTB_PTBXL"]) if path.stem in originals]
    assert copies
    for copy in copies:
        original = originals[copy.stem]
        np.testing.assert_allclose(read_ecg(copy).signal, read_ecg(original).signal, atol=1e-6)


@pytest.mark.filterwarnings("ignore::modeling_ecgmoe.ecg_files.EcgFileWarning")
@pytest.mark.parametrize("folder", ["mit-bih-arrhythmia-database-1.0.0", "ludb"])
def test_a_record_converted_to_edf_holds_the_same_millivolts(test_data: Path, folder: str, tmp_path: Path) -> None:
    for number, path in enumerate(find_ecgs([test_data / folder])[::5]):
        record = wfdb.rdrecord(str(path.with_suffix("")), sampto=4500, physical=False)
        edf = tmp_path / f"{number}.edf"
        low, high = record.d_signal.min(axis=0) - 1, record.d_signal.max(axis=0) + 1
        headers = [
            {"label": name, "dimension": unit, "sample_frequency": record.fs,
             "digital_min": int(low[i]), "digital_max": int(high[i]),
             "physical_min": round((low[i] - record.baseline[i]) / record.adc_gain[i], 4),
             "physical_max": round((high[i] - record.baseline[i]) / record.adc_gain[i], 4)}
            for i, (name, unit) in enumerate(zip(record.sig_name, record.units, strict=True))
        ]  # fmt: skip
        with pyedflib.EdfWriter(str(edf), len(headers)) as file:
            file.setSignalHeaders(headers)
            seconds = len(record.d_signal) // record.fs
            for second in range(seconds):
                for row in record.d_signal[second * record.fs : (second + 1) * record.fs].T:
                    file.writeDigitalSamples(np.ascontiguousarray(row, dtype=np.int32))
        one, other = read_ecg(path), read_ecg(edf)
        assert other.sampling_rate == one.sampling_rate
        assert list(map(find_lead, other.lead_names)) == list(map(find_lead, one.lead_names))
        # EDF writes its range in 8 characters, here with four decimals.
        np.testing.assert_allclose(other.signal, one.signal[:, : seconds * record.fs], atol=0.0001)


@pytest.mark.filterwarnings("ignore::modeling_ecgmoe.ecg_files.EcgFileWarning")
@pytest.mark.parametrize("folder", ["mit-bih-arrhythmia-database-1.0.0", "ludb", "ptb-xl-500hz"])
def test_another_reader_of_wfdb_gives_the_same_millivolts(test_data: Path, folder: str) -> None:
    paths = find_ecgs([test_data / folder])
    for path in paths[:: len(paths) // 4]:
        other = FileParser.parse(path)
        ecg = read_ecg(path)
        signal = np.stack([lead.samples for lead in other.leads])
        np.testing.assert_allclose(ecg.signal, signal, atol=1e-5)


def test_ludb_is_read_with_the_warning_that_its_millivolts_are_none(test_data: Path) -> None:
    for path in find_ecgs([test_data / "ludb"]):
        with pytest.warns(EcgFileWarning, match="all its leads range over 1 mV"):
            read_ecg(path)


@pytest.mark.parametrize("folder", ["ptb-xl-500hz", "challenge-2021", "mit-bih-arrhythmia-database-1.0.0"])
def test_no_other_set_is_warned_about(test_data: Path, folder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", EcgFileWarning)
        for path in find_ecgs([test_data / folder])[::4]:
            read_ecg(path)
