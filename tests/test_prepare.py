"""`prepare`: from a name, or from files, to a folder of atomic files that is whole or not there."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import pandas as pd
import pytest

from recbole_hatllm import cli
from recbole_hatllm.config import Config
from recbole_hatllm.data import prepare as preparing
from recbole_hatllm.data.dataset import HatDataset
from tests import test_readers as raw_files
from tests.conftest import hears_ctrl_c
from tests.file_server import Remote, serving
from tests.test_cli import ROOT, refused
from tests.test_cli import cli as run_cli

USERS, ITEMS, TAKEN = 12, 8, 6
OFFLINE = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")} | {"no_proxy": ""}


def reviews() -> list[tuple[str, str, int]]:
    """Every user takes some items in turn; one of them once more at the same second, and two rows are to be dropped."""
    rows = [
        (f"A{u:013}", f"B{(u + i) % ITEMS:09}", 1_400_000_000 + 86_400 * i) for u in range(USERS) for i in range(TAKEN)
    ]
    return [*rows, rows[3], ("A-once", "B000000001", 1_400_000_000), (rows[0][0], "B-untitled", 1_400_000_001)]


def titles() -> dict[str, str]:
    return {f"B{i:09}": f'Title &amp; "name" {i}' for i in range(ITEMS)}


def zipped(lines) -> bytes:
    return gzip.compress("".join(line + "\n" for line in lines).encode())


def raw_2018() -> dict[str, bytes]:
    """The files of amazon-games by name."""
    rows = [{"reviewerID": u, "asin": i, "overall": 5.0, "unixReviewTime": t} for u, i, t in reviews()]
    meta = [{"asin": item, "title": title} for item, title in titles().items()]
    return {
        "Video_Games_5.json.gz": zipped(map(json.dumps, rows)),
        "meta_Video_Games.json.gz": zipped(map(json.dumps, meta)),
    }


def benchmark() -> bytes:
    """A proc.zip as SeqRecBenchmark-Datasets has it."""
    users = {u: [(i, t) for v, i, t in reviews() if v == u and i in titles()] for u, _, _ in reviews()}
    users = {u: rows for u, rows in users.items() if len(rows) > 1}
    code = {item: 100 + number for number, item in enumerate(titles())}
    inter = pd.DataFrame({
        "UserID": range(100, 100 + len(users)),
        "ItemID": [[code[i] for i, _ in rows] for rows in users.values()],
        "Timestamp": [[t for _, t in rows] for rows in users.values()],
    })  # fmt: skip
    items = pd.DataFrame({"ItemID": list(code.values()), "Title": list(titles().values())})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, table in (("user2item.pkl", inter), ("item2title.pkl", items)):
            archive.writestr(name, pickled(table))
    return file.getvalue()


def pickled(table: pd.DataFrame) -> bytes:
    content = io.BytesIO()
    table.to_pickle(content)
    return content.getvalue()


def write(folder, files: dict[str, bytes]):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECBOLE_HATLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def prepare(tmp_path, capsys):
    """Runs the command in this process; data_path is `tmp_path`/data."""

    def run(*arguments, code=0) -> str:
        assert cli.main(["prepare", *map(str, arguments), f"--data_path={tmp_path / 'data'}"]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return run


def made(tmp_path) -> set[str]:
    """Names in the data folder, hidden ones too."""
    return {path.name for path in (tmp_path / "data").glob("*")} if (tmp_path / "data").is_dir() else set()


def whole(folder, name):
    """The folder is complete and RecBole reads it as the reviews above."""
    assert {path.name for path in folder.iterdir()} == {f"{name}.inter", f"{name}.item", "source.json"}
    dataset = HatDataset(Config("SASRec", name, config_dict={"data_path": str(folder.parent)}))
    assert (dataset.user_num - 1, dataset.item_num - 1, len(dataset.inter_feat)) == (USERS, ITEMS, USERS * TAKEN)
    assert sorted(dataset.titles[1:]) == [f'Title & "name" {i}' for i in range(ITEMS)]
    return json.loads((folder / "source.json").read_text())


# --- Where the files come from


def test_files_that_are_here_already(prepare, tmp_path):
    files = write(tmp_path / "raw", raw_2018())
    said = prepare("amazon-games", f"--from={files}")
    note = whole(tmp_path / "data" / "amazon-games", "amazon-games")
    assert re.search(r"users +12 +54,955", said) and "--dataset=amazon-games" in said  # beside the paper's
    assert re.search(r"5-core +12 +8 +72", said) and "repeated" in said
    assert note["format"] == "amazon2018" and note["k_core"] == 5 and note["statistics"]["users"] == USERS
    assert [file["file"] for file in note["files"]] == list(raw_2018()) and note["steps"][0]["interactions"] == 75
    assert all(len(file["sha256"]) == 64 and file["size"] for file in note["files"])
    assert str(tmp_path) not in json.dumps(note)
    one, two = (files / name for name in raw_2018())
    prepare("amazon-games", f"--from={two},{one}", "--force=true", "--k_core=2")
    assert json.loads((tmp_path / "data/amazon-games/source.json").read_text())["k_core"] == 2


def test_a_mirror_with_a_cut_connection(prepare, tmp_path):
    files = {f"/{name}": Remote(content, cuts=[len(content) // 2]) for name, content in raw_2018().items()}
    with serving(files) as base:
        prepare("amazon-games", f"--mirror={base}", "--show_progress=false")
        note = whole(tmp_path / "data" / "amazon-games", "amazon-games")
        assert note["source"] == "mcauley" and "no licence" in note["licence"]
        for file, (path, remote) in zip(note["files"], files.items()):
            assert remote.asked == ["", f"bytes={len(remote.content) // 2}-"] and remote.sent == len(remote.content)
            assert file["url"] == base + path and file["size"] == len(remote.content)
        prepare("amazon-games", f"--mirror={base}", "--force=true", "--show_progress=false")
    assert all(len(remote.asked) == 2 for remote in files.values()), "downloaded again"


def test_the_next_source_when_one_fails(prepare, tmp_path):
    raw = {f"/{name}": Remote(content) for name, content in raw_2018().items()}
    del raw["/meta_Video_Games.json.gz"]
    with serving({**raw, "/proc.zip": Remote(benchmark())}) as base:
        prepare("amazon-games", f"--mirror={base}", "--show_progress=false")
        assert whole(tmp_path / "data" / "amazon-games", "amazon-games")["source"] == "benchmark"
        said = prepare("amazon-games-2018", f"--mirror={base}", "--source=mcauley", "--show_progress=false", code=2)
    assert re.search(r"cannot be downloaded \(\S+meta_Video_Games\.json\.gz: HTTP 404", said)
    assert "Traceback" not in said and said.count("\n") == 1


FORMATS = [
    ("amazon-beauty-2014", "mcauley", raw_files.amazon2014),
    ("amazon-beauty-2014", "ratings", raw_files.ratings),
    ("amazon-beauty-2014", "recbole", lambda folder: raw_files.zipped(folder, raw_files.recbole, "Amazon_Beauty.zip")),
    ("amazon-beauty", "benchmark", lambda folder: raw_files.zipped(folder, raw_files.sequences, "proc.zip")),
    ("amazon-games-2018", "mcauley", raw_files.amazon2018),
    ("amazon-all-beauty-2023", "mcauley", raw_files.amazon2023),
    ("ml-1m", "grouplens", lambda folder: raw_files.zipped(folder, raw_files.movielens_1m, "ml-1m.zip")),
]


@pytest.mark.parametrize("name, source, make", FORMATS, ids=[f"{name}, {source}" for name, source, _ in FORMATS])
def test_every_format_from_files_and_from_a_server(prepare, tmp_path, name, source, make):
    make(tmp_path / "raw")
    if (plain := tmp_path / "raw" / "All_Beauty.jsonl").is_file():
        plain.with_name("All_Beauty.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    prepare(name, f"--from={tmp_path / 'raw'}", "--k_core=1")
    folder = tmp_path / "data" / name
    first = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".json"}
    counts = json.loads((folder / "source.json").read_text())["statistics"]
    assert (counts["users"], counts["items"], counts["interactions"], counts["title_coverage"]) == (3, 6, 8, 1.0)
    files = {f"/{file.name}": Remote(file.read_bytes()) for file in (tmp_path / "raw").iterdir()}
    with serving(files) as base:
        options = [f"--mirror={base}", f"--source={source}", "--k_core=1", "--force=true", "--show_progress=false"]
        if name == "ml-1m":  # its sha256 is known, and this is not it
            assert "bytes and not 5,917,549" in prepare(name, *options, code=2)
        else:
            prepare(name, *options)
            assert json.loads((folder / "source.json").read_text())["source"] == source
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".json"} == first


def test_a_table_of_ones_own(prepare, tmp_path):
    rows = [row for row in reviews() if row[1] in titles()]
    frame = pd.DataFrame(rows, columns=["uid", "sku", "ts"])
    frame.to_csv(tmp_path / "log.csv", index=False)
    pd.DataFrame(titles().items(), columns=["sku", "name"]).to_csv(tmp_path / "items.csv", index=False)
    said = prepare(
        "my-data", f"--inter={tmp_path / 'log.csv'}", f"--items={tmp_path / 'items.csv'}",
        "--columns=user=uid,item=sku,time=ts,title=name",
    )  # fmt: skip
    assert whole(tmp_path / "data" / "my-data", "my-data")["format"] == "tables" and "paper" not in said
    assert re.search(r"my-data +.*12 / 8 / 72", prepare("--list"))


def test_what_recbole_brings_along(prepare, tmp_path):
    said = prepare("ml-100k")
    assert "ready without preparing" in said and re.search(r"users +943", said) and re.search(r"items +1,682", said)
    assert not made(tmp_path)


def test_the_list(prepare, tmp_path):
    prepare("amazon-games", f"--from={write(tmp_path / 'raw', raw_2018())}")
    said = prepare("--list")
    assert re.search(r"^amazon-games +2018 +mcauley, benchmark, recbole +12 / 8 / 72$", said, flags=re.M)
    assert re.search(r"^ml-1m +2003 +grouplens, recbole +5\.9 MB$", said, flags=re.M)
    assert re.search(r"^ml-100k +1998 +RecBole itself +ready$", said, flags=re.M)
    for words in (
        "MIT",
        "no licence is stated",
        "user_id, item_id, timestamp; title",
        "amazon-boxes-2023",
        "no titles",
    ):
        assert words in said


# --- Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], r"the name of one dataset, and 0"),
        (["a", "b"], r"the name of one dataset, and 2"),
        (["amazon-gamez"], r"'amazon-gamez'.*amazon-games"),
        (["amazon-games", "--frm=x"], r"'frm'.*from"),
        (["amazon-games", "--source=snap"], r"'snap'.*mcauley, benchmark, recbole"),
        (["amazon-games", "--from=nowhere"], r"nowhere"),
        (["amazon-games", "--k_core=few", "--from=x"], r"k_core is 'few'"),
        (["amazon-games", "--force=perhaps"], r"force is 'perhaps'"),
        (["my", "--inter=x", "--from=x"], r"exclude each other"),
        (["my", "--items=x"], r"--items goes with --inter"),
        (["my", "--inter=nowhere.csv", "--columns=user=u,item=i,time=t,title=n"], r"nowhere\.csv"),
        (["my", "--inter=x", "--columns=user=u,usr=v"], r"--columns is 'user=u,usr=v'"),
        (["../my", "--from=x"], r"'\.\./my' cannot be the name"),
        (["--list", "--force=true"], r"prepare --list does not take force"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_end_in_one_sentence(prepare, tmp_path, arguments, message):
    said = prepare(*arguments, code=2)
    assert re.search(message, said) and said.startswith("error: ") and said.strip().count("\n") == 0
    assert not made(tmp_path)


def test_broken_files_leave_nothing(prepare, tmp_path):
    files = raw_2018()
    files["Video_Games_5.json.gz"] = files["Video_Games_5.json.gz"][:-40]
    said = prepare("amazon-games", f"--from={write(tmp_path / 'raw', files)}", code=2)
    assert "Video_Games_5.json.gz" in said and not made(tmp_path)


def test_a_folder_is_not_replaced_unasked(prepare, tmp_path):
    files = write(tmp_path / "raw", raw_2018())
    write(tmp_path / "data" / "amazon-games", {"mine.txt": b""})
    assert re.search(r"amazon-games exists already.*--force=true", prepare("amazon-games", f"--from={files}", code=2))
    assert (tmp_path / "data" / "amazon-games" / "mine.txt").exists()
    prepare("amazon-games", f"--from={files}", "--force=true")
    whole(tmp_path / "data" / "amazon-games", "amazon-games")


# --- Stopped in the middle


@pytest.mark.parametrize("where", ["apply", "write", "statistics", "table"])
def test_ctrl_c_leaves_a_whole_folder_or_none(prepare, tmp_path, monkeypatch, where):
    files = write(tmp_path / "raw", raw_2018())

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparing, where, stop)
        prepare("amazon-games", f"--from={files}", code=130)
    assert made(tmp_path) == ({"amazon-games"} if where == "table" else set())
    prepare("amazon-games", f"--from={files}", "--force=true")
    assert made(tmp_path) == {"amazon-games"}


def test_what_a_killed_process_left_is_cleared(prepare, tmp_path):
    write(tmp_path / "data" / ".amazon-games.123.tmp", {"amazon-games.inter": b"user"})
    prepare("amazon-games", f"--from={write(tmp_path / 'raw', raw_2018())}")
    assert made(tmp_path) == {"amazon-games"}


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_killed_while_downloading_it_goes_on_from_there(tmp_path, kind):
    raw = raw_2018()
    slow = Remote(raw["Video_Games_5.json.gz"], stops=True)
    rest = {"/meta_Video_Games.json.gz": Remote(raw["meta_Video_Games.json.gz"])}
    part = tmp_path / "cache" / "downloads" / "amazon-games" / "mcauley" / "Video_Games_5.json.gz.part"
    with serving({"/Video_Games_5.json.gz": slow, **rest}) as base:
        command = [sys.executable, str(ROOT / "run_hatllm.py"), "prepare", "amazon-games", f"--mirror={base}"]
        command += [f"--data_path={tmp_path / 'data'}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, **quiet, preexec_fn=hears_ctrl_c)
        deadline = time.monotonic() + 120
        while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(kind)
        assert process.wait(60) == (130 if kind == signal.SIGINT else -kind)
        have = part.stat().st_size
        assert 0 < have < len(slow.content) and not made(tmp_path)
        slow.stops = False
        assert cli.main(command[2:]) == 0
        assert slow.asked == ["", f"bytes={have}-"]
    whole(tmp_path / "data" / "amazon-games", "amazon-games")


# --- In a process of its own


def test_without_network_and_files_it_ends_at_once(tmp_path):
    environment = {**OFFLINE, "RECBOLE_HATLLM_CACHE": str(tmp_path / "cache")}
    for arguments in (
        ["prepare", "amazon-games"],
        ["--model=SASRec", "--dataset=amazon-games", f"--runs_dir={tmp_path}"],
    ):
        done = run_cli(*arguments, f"--data_path={tmp_path / 'data'}", **environment)
        (line,) = done.stderr.strip().splitlines()
        assert done.returncode == 2 and line.startswith("error: amazon-games is not in ")
        for words in ("cannot be downloaded (no server can be reached from here)", "prepare amazon-games`",
                      "/Video_Games_5.json.gz", "/meta_Video_Games.json.gz", "prepare amazon-games --from=FOLDER",
                      "--dataset=ml-100k works now."):  # fmt: skip
            assert words in line
        assert not made(tmp_path)


def test_a_run_prepares_what_it_needs(prepare, tmp_path):
    """The raw files are in the cache; the atomic files are made by the run itself."""
    with serving({f"/{name}": Remote(content) for name, content in raw_2018().items()}) as base:
        prepare("amazon-games", f"--mirror={base}", "--show_progress=false")
    done = run_cli(
        "--model=Pop", "--dataset=amazon-games", f"--data_path={tmp_path / 'other'}", f"--runs_dir={tmp_path}",
        "--show_progress=false", RECBOLE_HATLLM_CACHE=str(tmp_path / "cache"), **OFFLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"5-core +12 +8 +72", done.stdout) and "NDCG@10" in done.stdout
    whole(tmp_path / "other" / "amazon-games", "amazon-games")


def test_the_command_in_a_process_of_its_own(tmp_path):
    files = write(tmp_path / "raw", raw_2018())
    done = run_cli("prepare", "amazon-games", f"--from={files}", f"--data_path={tmp_path / 'data'}")
    assert done.returncode == 0 and done.stdout.rstrip().endswith("--dataset=amazon-games"), done.stderr
    whole(tmp_path / "data" / "amazon-games", "amazon-games")
    assert "exists already" in refused("prepare", "amazon-games", f"--from={files}", f"--data_path={tmp_path / 'data'}")
