"""Publishing for real: the client against a Hub on 127.0.0.1, and people who then load what lies there by its id."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_client import ROOT, Client, client_environment
from hub_server import Hub, Trouble, running_hub
from test_remote_code import OPEN_THE_FOLDER, WITHOUT_THE_PACKAGE
from tiny_model import save_tiny_model, tiny_model

from data_builders.synthetic import synthetic_ecg, write_wfdb
from modeling_ecgmoe.adapters import MultiTask
from modeling_ecgmoe.ecg_files import read_ecg
from modeling_ecgmoe.feature_extraction_ecgmoe import EcgMoeFeatureExtractor
from modeling_ecgmoe.leads import LEADS

TASKS = ("age", "sex")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as running:
        yield running


@pytest.fixture(autouse=True)
def calm(hub: Hub) -> Iterator[None]:
    """No trouble is left for the next test, nor the requests of the one before."""
    hub.requests.clear()
    yield
    hub.troubles.clear()
    hub.stall = None


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub.url, tmp_path_factory.mktemp("client"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two adapters beside it."""
    return save_tiny_model(tmp_path_factory.mktemp("hub"), tasks=TASKS, simulated=("sex",))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wfdb(synthetic_ecg(sampling_rate=250).ecg, tmp_path_factory.mktemp("records"), "record")


@pytest.fixture(scope="module")
def published(hub: Hub, client: Client, model: Path) -> str:
    """The commit of the model on the Hub; its adapters lie there too."""
    done = client("ecgmoe", "model", str(model), "--repo_id", "me/tiny")
    assert done["status"] == 0, done["err"]
    for task in TASKS:
        folder = str(model.parent / "adapters" / task)
        done = client("ecgmoe", "adapter", folder, "--repo_id", f"me/tiny-{task}", "--base", "me/tiny")
        assert done["status"] == 0, done["err"]
    return hub.commits_of("models", "me/tiny")[0]


# What comes back


def test_a_model_lies_there_as_one_commit_whose_page_and_id_are_told(hub: Hub, client: Client, model: Path) -> None:
    done = client("ecgmoe", "model", str(model), "--repo_id", "me/told")
    (commit,) = hub.commits_of("models", "me/told")
    assert done["out"].startswith(f"{hub.url}/me/told ")
    assert done["out"].rstrip().endswith(f"files in commit {commit}")
    files = hub.files_of("models", "me/told")
    assert files["model.safetensors"].data == (model / "model.safetensors").read_bytes()
    assert files["model.safetensors"].is_lfs
    assert not files["config.json"].is_lfs


def test_a_second_call_makes_no_commit_and_sends_no_file(
    hub: Hub, client: Client, model: Path, published: str
) -> None:
    done = client("ecgmoe", "model", str(model), "--repo_id", "me/tiny")
    assert done["out"].split("\n")[0] == f"{hub.url}/me/tiny nothing changed since {published}"
    assert hub.commits_of("models", "me/tiny") == [published]
    assert not [request for request in hub.requests if "lfs" in request or "/commit/" in request]


def test_the_model_and_its_adapters_answer_by_id_as_the_folder_does(
    client: Client, model: Path, record: Path, published: str
) -> None:
    many = MultiTask.from_pretrained(model)
    ecg = read_ecg(record)
    expected = many.answer([many.prepare(ecg.signal, ecg.sampling_rate, ecg.lead_names)])[0]
    adapters = [f"me/tiny-{task}" for task in TASKS]
    found = client("answer", "me/tiny", adapters, str(record), revision=published)
    assert found == json.loads(json.dumps(expected))


def test_peft_loads_an_adapter_by_its_id_on_the_base_and_commit_that_it_names(
    hub: Hub, client: Client, model: Path, record: Path, published: str
) -> None:
    config = json.loads(hub.files_of("models", "me/tiny-age")["adapter_config.json"].data)
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", published)
    many = MultiTask.from_pretrained(model, ["age"])
    ecg = read_ecg(record)
    window = many.extractor.extract(ecg.signal, ecg.sampling_rate, ecg.lead_names)
    found = client("peft_logits", "me/tiny", "me/tiny-age", "age", str(record))
    np.testing.assert_allclose(found, many.logits([window])["age"][0], atol=1e-5)


def test_an_earlier_revision_opens_without_this_package_and_answers_as_then(
    hub: Hub, client: Client, model: Path, published: str, tmp_path: Path
) -> None:
    newer = tmp_path / "newer"
    tiny_model(num_queries=1).save_pretrained(newer)
    EcgMoeFeatureExtractor().save_pretrained(newer)
    assert client("ecgmoe", "model", str(newer), "--repo_id", "me/tiny")["status"] == 0
    assert hub.commits_of("models", "me/tiny")[0] == published
    signal = synthetic_ecg(sampling_rate=250).ecg.signal
    np.savez(tmp_path / "signal.npz", signal=signal, names=np.array(LEADS))
    code = WITHOUT_THE_PACKAGE + OPEN_THE_FOLDER.replace("from_pretrained(folder", "from_pretrained(hub, revision=rev")
    code = code.replace("folder, out = sys.argv[1:]", "hub, rev, folder = sys.argv[1:]\nout = f'{folder}/report'")
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, "me/tiny", published, str(tmp_path)],
        env=client_environment(hub.url, tmp_path / "home"), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    features = EcgMoeFeatureExtractor()(signal, 250, LEADS, return_tensors="pt")
    features.pop("quality")
    expected = tiny_model().eval()(**features).pooler_output.detach()
    np.testing.assert_allclose(np.load(tmp_path / "report.npz")["pooler_output"], expected, atol=1e-6)
    assert json.loads((tmp_path / "report").read_text())["imported"] == []


def test_an_adapter_does_not_go_to_a_base_that_is_not_its_own(
    hub: Hub, client: Client, model: Path, published: str, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_model(num_queries=1).save_pretrained(other)
    EcgMoeFeatureExtractor().save_pretrained(other)
    client("ecgmoe", "model", str(other), "--repo_id", "me/other")
    folder = str(model.parent / "adapters" / "age")
    done = client("ecgmoe", "adapter", folder, "--repo_id", "me/wrong", "--base", "me/other")
    assert done["status"] == 2
    assert "was trained on base" in done["err"]
    assert ("models", "me/wrong") not in hub.repos


def test_a_header_that_the_hub_does_not_take_sends_nothing(hub: Hub, client: Client, model: Path) -> None:
    hub.troubles.append(Trouble("/api/validate-yaml", 400, message="license is unknown"))
    done = client("ecgmoe", "model", str(model), "--repo_id", "me/header")
    assert done["status"] == 2
    assert "Invalid metadata in README.md" in done["err"]
    assert hub.commits_of("models", "me/header") == []
    assert not [request for request in hub.requests if "lfs" in request]


# Who may


def test_a_private_model_is_not_given_to_those_without_a_token(hub: Hub, client: Client, model: Path) -> None:
    assert client("ecgmoe", "model", str(model), "--repo_id", "me/secret", "--private")["status"] == 0
    assert hub.repos[("models", "me/secret")].private
    assert "FileNotFoundError" in client("refused", "answer", "me/secret", [], "x", token=None)


def test_a_public_repository_is_not_taken_for_private(hub: Hub, client: Client, model: Path, published: str) -> None:
    before = hub.commits_of("models", "me/tiny")
    done = client("ecgmoe", "model", str(model), "--repo_id", "me/tiny", "--private")
    assert (done["status"], hub.commits_of("models", "me/tiny")) == (2, before)
    assert "exists and is public" in done["err"]


@pytest.mark.parametrize(
    ("token", "repo_id", "says"),
    [
        (None, "me/new", "you are not logged in to the Hub; run `hf auth login`, or set HF_TOKEN"),
        ("hf_stale", "me/new", "the Hub does not accept your token (401)"),
        ("hf_reader", "reader/new", "your token may not write to reader/new (403)"),
        ("hf_writer", "other/new", "your token may not write to other/new (403)"),
        ("hf_writer", "me/new/one", "'me/new/one' is not a name of a repository; it is OWNER/NAME"),
        ("hf_writer", "new", "'new' is not a name of a repository; it is OWNER/NAME"),
    ],
)
def test_those_who_may_not_are_told_in_one_line_what_to_do(
    hub: Hub, client: Client, model: Path, token: str | None, repo_id: str, says: str
) -> None:
    done = client("ecgmoe", "model", str(model), "--repo_id", repo_id, token=token)
    assert done["status"] == 2
    assert says in done["err"]
    assert done["err"].count("\n") == 1
    assert ("models", repo_id) not in hub.repos


def test_a_login_of_the_hubs_own_command_is_found(hub: Hub, client: Client, model: Path) -> None:
    (client.home / "token").write_text("hf_writer")
    done = client("ecgmoe", "model", str(model), "--repo_id", "me/login", token=None)
    (client.home / "token").unlink()
    assert done["status"] == 0, done["err"]


# What goes wrong


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (Trouble("repos/create", 429, {"Retry-After": "30"}), "too many requests (429) and says: trouble; wait 30 s"),
        (Trouble("GET /api/models/me/broken", 404), "there is no model me/broken that your token may see (404)"),
        (Trouble("/commit/main", 500, message="disk full"), "the Hub is in trouble (500) and says: disk full; wait"),
        (Trouble("/commit/main", 0), "broke off (RemoteProtocolError); nothing was committed, run the same command"),
        (Trouble("/commit/main", 412), "me/broken was changed by someone else meanwhile (412)"),
    ],
    ids=lambda value: f"{value.status} {value.where.split('/')[-1]}" if isinstance(value, Trouble) else "",
)
def test_what_the_hub_refuses_is_one_line_and_the_same_command_goes_on_later(
    hub: Hub, client: Client, model: Path, trouble: Trouble, says: str
) -> None:
    hub.repos.pop(("models", "me/broken"), None)
    hub.troubles.append(trouble)
    done = client("ecgmoe", "model", str(model), "--repo_id", "me/broken")
    assert done["status"] == 2
    assert says in done["err"]
    assert done["err"].count("\n") == 1
    assert ("models", "me/broken") not in hub.repos or not hub.commits_of("models", "me/broken")
    hub.troubles.clear()
    assert client("ecgmoe", "model", str(model), "--repo_id", "me/broken")["status"] == 0
    assert len(hub.commits_of("models", "me/broken")) == 1


def test_the_client_tries_again_what_may_be_tried_again(hub: Hub, client: Client, model: Path) -> None:
    hub.objects.clear()
    hub.troubles += [
        Trouble("/preupload/", 429, {"Retry-After": "0"}, times=1),
        Trouble("PUT /lfs/", 500, times=1),
        Trouble("PUT /lfs/", 0, times=1),
    ]
    done = client("ecgmoe", "model", str(model), "--repo_id", "me/again")
    assert done["status"] == 0, done["err"]
    assert len(hub.commits_of("models", "me/again")) == 1
    assert all(trouble.times == 0 for trouble in hub.troubles)


def test_a_commit_whose_answer_was_lost_is_not_taken_for_a_failure(hub: Hub, client: Client, model: Path) -> None:
    hub.troubles.append(Trouble("/commit/main", 0, times=1, after=True))
    done = client("ecgmoe", "model", str(model), "--repo_id", "me/lost")
    (commit,) = hub.commits_of("models", "me/lost")
    assert (done["status"], done["out"].split()[-1]) == (0, commit)


def test_a_download_that_is_cut_goes_on_where_it_was(hub: Hub, client: Client, published: str, tmp_path: Path) -> None:
    hub.troubles.append(Trouble("GET /cdn/", 500, times=1))
    hub.troubles.append(Trouble("HEAD /me/tiny-age/resolve", 429, {"Retry-After": "0"}, times=1))
    files = client("download", "me/tiny-age", "model", str(tmp_path / "copy"))
    expected = hub.files_of("models", "me/tiny-age")["adapter_model.safetensors"].data
    assert (tmp_path / "copy" / "adapter_model.safetensors").read_bytes() == expected
    assert "task.json" in files


def test_after_a_kill_the_same_command_goes_on_and_sends_nothing_twice(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.objects.clear()
    command = [sys.executable, "-m", "modeling_ecgmoe.cli", "publish", "space", "--repo_id", "me/killed"]
    command += ["--model", str(model), "--source", str(ROOT)]
    environment = client_environment(hub.url, tmp_path) | {"HF_TOKEN": "hf_writer", "PYTHONPATH": str(ROOT)}
    hub.stalled.clear()
    hub.stall = "/2"  # the second part of the weights
    running = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert hub.stalled.wait(60), "the upload never came that far"
    arrived = wait_for_small_objects(hub)
    running.kill()
    running.communicate()
    assert hub.commits_of("spaces", "me/killed") == []
    hub.stall = None
    hub.requests.clear()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(hub.commits_of("spaces", "me/killed")) == 1
    assert not [request for request in hub.requests if request.startswith("PUT") and request[9:73] in arrived]
    assert arrived


def wait_for_small_objects(hub: Hub) -> set[str]:
    """The objects that arrived; the examples have time to, beside the one that waits."""
    deadline = time.monotonic() + 20
    while len(hub.objects) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    return set(hub.objects)


# A data set


@pytest.fixture(scope="module")
def published_data(hub: Hub, client: Client, mini_ptb_xl: Path) -> list[str]:
    """PTB-XL in miniature on the Hub, in both sampling rates; the command that put it there."""
    command = ["dataset", "ptb_xl", "--data_dir", str(mini_ptb_xl), "--repo_id", "me/ptb-xl", "--shard_mb", "1"]
    command += ["--config", "100hz", "500hz"]
    done = client("ecgmoe", *command)
    assert done["status"] == 0, done["err"]
    return command


@pytest.mark.parametrize(("config", "split"), [("100hz", "train"), ("500hz", "train")])
def test_the_rows_on_the_hub_are_the_builders_by_id_streamed_and_as_parquet(
    hub: Hub, client: Client, mini_ptb_xl: Path, published_data: list[str], tmp_path: Path, config: str, split: str
) -> None:
    files = client("download", "me/ptb-xl", "dataset", str(tmp_path / "copy"))
    shards = [str(tmp_path / "copy" / name) for name in files if name.startswith(f"data/{config}/{split}-")]
    assert len(shards) == {"100hz": 2, "500hz": 3}[config]
    found = client("data_differences", "me/ptb-xl", str(mini_ptb_xl), config, split, shards)
    same = {"other features": {}, "rows": {"100hz": 32, "500hz": 10}[config], "wrong": []}
    # Parquet knows no seconds; by id the page says what they were.
    milliseconds = {"other features": {"recording_date": "Value('timestamp[ms]')"}}
    assert found == {"by id": same, "parquet": same | milliseconds, "streamed": same}


def test_a_data_set_built_again_makes_no_commit(hub: Hub, client: Client, published_data: list[str]) -> None:
    (commit,) = hub.commits_of("datasets", "me/ptb-xl")
    done = client("ecgmoe", *published_data)
    assert done["out"].split("\n")[0] == f"{hub.url}/datasets/me/ptb-xl nothing changed since {commit}"
    assert hub.commits_of("datasets", "me/ptb-xl") == [commit]


def test_shards_that_are_no_part_of_it_any_more_go_in_the_same_commit(
    hub: Hub, client: Client, published_data: list[str]
) -> None:
    client("ecgmoe", *published_data[:-3], "--config", "100hz", "--repo_id", "me/fewer")
    assert len(hub.commits_of("datasets", "me/fewer")) == 1
    done = client("ecgmoe", *published_data[:6], "--config", "100hz", "--repo_id", "me/fewer")
    assert len(hub.commits_of("datasets", "me/fewer")) == 2
    assert "taken away, since it is no part of it any more: data/100hz/train-00000-of-00002.parquet" in done["err"]
    shards = [name for name in hub.files_of("datasets", "me/fewer") if name.startswith("data/100hz/train")]
    assert shards == ["data/100hz/train-00000-of-00001.parquet"]


def test_a_dry_run_shows_files_and_page_and_asks_nobody(
    hub: Hub, client: Client, mini_ptb_xl: Path, model: Path
) -> None:
    command = ["--data_dir", str(mini_ptb_xl), "--repo_id", "me/dry", "--dry_run"]
    done = client("ecgmoe", "dataset", "ptb_xl", *command, token=None)
    assert (done["status"], hub.requests) == (0, [])
    assert "LFS      data/100hz/train-00000-of-00001.parquet" in done["out"]
    assert "regular  README.md" in done["out"]
    assert "doi.org/10.13026/kfzx-aw45" in done["out"]
    done = client("ecgmoe", "adapter", str(model.parent / "adapters" / "sex"), "--repo_id", "me/dry", "--dry_run")
    assert (done["status"], hub.requests) == (0, [])
    assert "Evidence: simulated" in done["out"]


# The web page

START_THE_SPACE = """
import runpy, sys
sys.path.insert(0, ".")
import modeling_ecgmoe
assert modeling_ecgmoe.__file__.startswith(sys.argv[1]), modeling_ecgmoe.__file__
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.mark.slow
def test_the_uploaded_web_page_starts_by_itself_and_answers(
    hub: Hub, client: Client, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "space"
    done = client("ecgmoe", "space", "--repo_id", "me/page", "--model", str(model), "--source", str(ROOT))
    assert done["status"] == 0, done["err"]
    assert hub.repos[("spaces", "me/page")].sdk == "gradio"
    client("download", "me/page", "space", str(folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    settings |= {"GRADIO_TEMP_DIR": str(tmp_path / "uploads"), "HF_HOME": str(tmp_path / "home")}
    code = WITHOUT_THE_PACKAGE + START_THE_SPACE
    with (tmp_path / "log.txt").open("w") as log:
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_TOKEN")}
        server = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], cwd=folder, env=kept | settings, stdout=log, stderr=log
        )
        try:
            line = ask_the_space(f"http://127.0.0.1:{port}", server, tmp_path / "log.txt")
        finally:
            server.terminate()
            server.wait()
    assert line["status"] == "ok"
    assert set(line["tasks"]) == set(TASKS)


def ask_the_space(url: str, server: subprocess.Popen, log: Path) -> dict:
    """The line of a bundled example, asked for as the page asks for it."""
    asked = json.dumps({"data": ["sinus_75bpm"]}).encode()
    deadline = time.monotonic() + 300
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            headers = {"Content-Type": "application/json"}
            call = urllib.request.Request(f"{url}/gradio_api/call/example", asked, headers)
            with urllib.request.urlopen(call, timeout=5) as answer:
                event = json.loads(answer.read())["event_id"]
            break
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    with urllib.request.urlopen(f"{url}/gradio_api/call/example/{event}", timeout=120) as stream:
        text = stream.read().decode()
    assert "event: complete" in text, text
    return json.loads(text.split("data: ")[-1])[-1]
