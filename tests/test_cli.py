"""The commands, as a user meets them: in processes of their own, killed in the middle, with
mistakes."""
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import erc_moe
from erc_moe.cli import main
from erc_moe.cli.core import COMMANDS
from erc_moe.cli.using import trained_on
from erc_moe.conversations import DataError
from erc_moe.training import Run


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "A corpus of one's own: a CSV file and features beside it."
    path = tmp_path_factory.mktemp("own")/"talk.csv"
    rng = np.random.default_rng(0)
    means = rng.normal(size=(3, 5))
    rows, words = [], []
    for split, n in (("train", 12), ("validation", 4), ("test", 5)):
        for i in range(n):
            for j in range(rng.integers(3, 8)):
                y = int(rng.integers(3))
                rows.append(
                    dict(
                        conversation=f"{split}{i}", speaker="AB"[j % 2], text=f"turn {j}",
                        label=["neutral", "joy", "anger"][y], split=split))
                words.append(means[y] + 0.7*rng.normal(size=5))
    pd.DataFrame(rows).to_csv(path, index=False)
    np.save(path.with_suffix(".words.npy"), np.array(words, np.float32))
    np.save(path.with_suffix(".voice.npy"), np.array(words, np.float32)[:, :2] + 1)
    return path


def training(table, out, *more):
    return [
        "train", "--corpus", str(table), "--text", "words", "--speech", "voice", "--seeds", "2",
        "--set",
        "epochs=4", "--set", "hidden=8", "--device", "cpu", "--out", str(out), *more]


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")/"own"
    assert main(training(table, out)) == 0
    return out


def command(*args, **kwargs):
    return subprocess.Popen(
        [
            sys.executable, "-m", "erc_moe", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **kwargs)


def test_one_command_is_installed():
    config = ConfigParser(delimiters=["="])
    config.read(Path(__file__).parent.parent/"settings.ini", encoding="utf-8")
    assert config["DEFAULT"]["console_scripts"] == "erc_moe=erc_moe.cli:main"


def test_version_and_the_list_of_commands(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"erc_moe {erc_moe.__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {name} +[A-Z].*\.$", text, re.M) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_in_sentences(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"erc_moe {name}" in text and "Example: erc_moe " in text
    options = re.split(r"\n  (?=-|[a-z]+ )", text[text.index("options:"):])[2:]
    assert all("." in o for o in options), "an option's help is a sentence"


HEAVY = {
    "torch", "numpy", "pandas", "transformers", "sklearn", "scipy", "matplotlib", "accelerate",
    "huggingface_hub", "rich", "multiprocessing"}


def imported(code):
    "The top-level modules that a program has imported when it ends."
    done = subprocess.run(
        [
            sys.executable, "-c",
            f"import sys\ntry:\n    {code}\nfinally:\n    print(*sys.modules, file=sys.stderr)"],
        capture_output=True,
        text=True)
    return {m.partition(".")[0] for m in done.stderr.splitlines()[-1].split()}


@pytest.mark.parametrize(
    "code",
    [
        "import erc_moe",
        *(f"from erc_moe.cli import main; main({argv!r})" for argv in (
            ["--help"], ["train", "--help"], ["predict", "--help"], ["completion", "bash"],
            ["train", "--corpus", "sample", "--out", "x", "--seeds", "0,0"], ["nonsense"])),
    ])
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    assert not HEAVY & imported(code)


def test_train_prints_the_table_and_writes_the_summary(run, table, capsys):
    assert main(training(table, run)) == 0
    out = capsys.readouterr().out
    summary = json.loads((run/"summary.json").read_text())
    for name in ("mixture", "speech", "text", "multimodal"): assert name in out
    assert f"{100*summary['test']['weighted_f1']['mean']:.1f} ± " in out
    assert (
        summary["command"].startswith("erc_moe train --corpus")
        and summary["config"]["model"]["hidden"] == 8)


def test_killed_and_started_again_is_as_never_killed(table, tmp_path):
    args = lambda out: training(
        table, out, "--seeds", "1", "--set", "epochs=25", "--checkpoint-seconds", "0")
    process = command(*args(tmp_path/"killed"))
    log, checkpoint = (
        tmp_path / "killed" / "seed-0" / "log.jsonl",
        tmp_path / "killed" / "seed-0" / "checkpoint.pt")
    deadline = time.monotonic() + 120
    while not (checkpoint.exists() and log.exists() and len(log.read_text().splitlines()) >= 5):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path/"killed"/"summary.json").exists() and checkpoint.exists()
    again, whole = (
        command(*args(tmp_path / "killed")), command(*args(tmp_path / "whole")))
    for p in (again, whole):
        _, err = p.communicate(timeout=300)
        assert p.returncode == 0, err
    killed, whole = Run(tmp_path/"killed"), Run(tmp_path/"whole")
    a, b = killed.model().state_dict(), whole.model().state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert killed.summary["test"] == whole.summary["test"]


def test_two_processes_train_one_model(table, tmp_path):
    script = tmp_path/"train.py"
    script.write_text(
        "import sys; from erc_moe.cli import main; "
        f"sys.exit(main({training(table, tmp_path / 'two', '--seeds', '1')!r}))")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            str(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Run(tmp_path/"two").summary["test"]["weighted_f1"]["mean"] > 0.2
    assert done.stdout.count("mister_e on talk") == 1, "one process reports"


def test_evaluate(run, table, capsys, tmp_path):
    assert (
        main(
            [
                "evaluate", str(run), "--corpus", str(table), "--split", "test", "--out",
                str(tmp_path / "again.json")])
        == 0)
    assert "per class F1" in capsys.readouterr().out
    again, summary = (
        json.loads((tmp_path / "again.json").read_text()),
        json.loads((run / "summary.json").read_text()))
    assert again["test"]["confusion"] == summary["test"]["confusion"]


def test_evaluate_finds_the_run_s_own_table(run, capsys, monkeypatch, tmp_path):
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    assert "per class F1" in capsys.readouterr().out
    summary = json.loads((run/"summary.json").read_text())
    with pytest.raises(DataError, match="Give its path: --corpus TABLE"):
        trained_on(summary | {"command": "erc_moe train --corpus=gone.csv"})


def test_predict_by_the_model_in_the_box(tmp_path, capsys, monkeypatch):
    chat = "Ana: That is wonderful news!\nBen: I know.\n"
    (tmp_path/"talk.txt").write_text(chat)
    assert main(["predict", str(tmp_path/"talk.txt")]) == 0
    said = capsys.readouterr().out
    assert "wonderful" in said and str(tmp_path/"talk.emotions.html") in said
    assert "wonderful" in (tmp_path/"talk.emotions.html").read_text(encoding="utf-8")
    of_file = pd.read_csv(tmp_path/"talk.emotions.csv")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(chat.encode())))
    assert main(["predict", "-", "--no-page", "--out", str(tmp_path/"pasted.csv")]) == 0
    assert pd.read_csv(tmp_path/"pasted.csv").p_joy.tolist() == of_file.p_joy.tolist()
    assert not (tmp_path/"pasted.html").exists()
    assert main(["predict", str(tmp_path/"talk.emotions.csv"), "--out",
                 str(tmp_path/"talk.emotions.csv")]) == 2
    assert "is the input" in capsys.readouterr().err


def test_an_rttm_file_says_who_speaks(tmp_path, capsys):
    words = [dict(word=w, start=i, end=i + 0.9) for i, w in enumerate("I won . No way".split())]
    segments = [dict(start=0, end=4.9, text="", words=words)]
    (tmp_path/"talk.json").write_text(json.dumps(dict(segments=segments)))
    (tmp_path/"talk.rttm").write_text("".join(
        f"SPEAKER talk 1 {start} {lasts} <NA> <NA> {who} <NA> <NA>\n"
        for who, start, lasts in (("Ann", 0, 2.95), ("Ben", 3, 2))))
    argv = ["predict", str(tmp_path/"talk.json"), "--speakers", str(tmp_path/"talk.rttm")]
    assert main(argv) == 0
    said = pd.read_csv(tmp_path/"talk.emotions.csv")
    assert said.speaker.tolist() == ["Ann", "Ben"] and said.text.tolist() == ["I won .", "No way"]


def test_a_label_that_the_model_does_not_know_is_passed_through(tmp_path, capsys):
    (tmp_path/"talk.csv").write_text(
        "conversation,speaker,text,label\nc,Ana,Hello.,contempt\nc,Ben,Hi.,joy\n")
    assert main(["predict", str(tmp_path/"talk.csv")]) == 0
    assert pd.read_csv(tmp_path/"talk.emotions.csv").label.tolist() == ["contempt", "joy"]


@pytest.mark.parametrize(
    "make,word", [
        (lambda p: p.write_text(""), "not a folder"), (lambda p: p.mkdir(mode=0o500), None)])
def test_a_place_that_cannot_be_written_to_is_one_line(make, word, tmp_path, capsys):
    (tmp_path/"talk.txt").write_text("Ana: Hello.\n")
    make(tmp_path/"place")
    if word is None and os.access(tmp_path/"place", os.W_OK): pytest.skip("root writes everywhere")
    out = tmp_path/"place"/"below"/"out.csv"
    assert main(["predict", str(tmp_path/"talk.txt"), "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "place" in err and (word or "permissions") in err


def test_a_closed_pipe_says_nothing(tmp_path):
    process = command("train", "--help")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() in (0, 141)


def test_debug_shows_the_traceback(capsys):
    assert main(["evaluate", "nowhere", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


WORDS = st.sampled_from([
    *COMMANDS, "--corpus", "sample", "--out", "", "-", "--seeds", "0,0", "--set", "lr", "lr=x",
    "--model", "nowhere", "--split", "--show", "--page", "--without", "text", "--debug", "\0",
    "--seed", "-1", "--workers", "9"*30, "/dev/null", ".", "é", "\ud800"])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(WORDS, max_size=6).filter(
    lambda argv: not {"download", "demo", "tune", "extract"} & set(argv[:1]) and "-" not in argv))
def test_no_command_line_ends_in_a_traceback(argv):
    out, err = io.StringIO(), io.StringIO()
    argv = [w for w in argv if w != "--debug"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): status = main(argv)
    assert status in (0, 1, 2) and "Traceback" not in err.getvalue()
    assert "unexpected" not in err.getvalue(), argv
    assert status == 0 or len(err.getvalue().splitlines()) == 1


def test_completion_in_bash(tmp_path):
    script = subprocess.run(
        [sys.executable, "-m", "erc_moe", "completion", "bash"], capture_output=True, text=True)
    assert script.returncode == 0
    (tmp_path/"completion.sh").write_text(script.stdout)
    ask = (
        f"source {tmp_path/'completion.sh'}; COMP_WORDS=(erc_moe tr); COMP_CWORD=1; "
        "_shtab_erc_moe erc_moe tr erc_moe; echo ${COMPREPLY[@]}")
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert done.stdout.split() == ["train"], done.stderr


def test_predict(run, table, tmp_path, capsys):
    new = tmp_path/"new.csv"
    rows = pd.read_csv(table).query("split == 'test'")
    rows[["conversation", "speaker", "text"]].to_csv(new, index=False)
    for name in ("words", "voice"):
        np.save(
            new.with_suffix(f".{name}.npy"), np.load(table.with_suffix(f".{name}.npy"))[rows.index])
    assert main(["predict", str(new), "--model", str(run), "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert "confidence" in said and "written to" in said and "\x1b" not in said
    got, saved = pd.read_csv(tmp_path/"new.emotions.csv"), Run(run).predictions(1)
    assert got.predicted.tolist() == saved.predicted.tolist() and np.allclose(
        got.confidence, saved.confidence, atol=2e-4)
    assert {"p_joy", "expert_speech", "expert_text", "expert_multimodal", "gate_text"} <= set(
        got.columns)
    assert (
        main(
            [
                "predict", str(new), "--model", str(run), "--without", "speech", "--out",
                str(tmp_path / "deaf.jsonl")])
        == 0)
    deaf = pd.read_json(tmp_path/"deaf.jsonl", lines=True)
    assert (deaf.gate_speech == 0).all()
    new.with_suffix(".voice.npy").unlink()
    assert main(["predict", str(new), "--model", str(run)]) == 1
    assert "voice" in capsys.readouterr().err


def test_features_of_another_width(run, table, tmp_path, capsys):
    new = tmp_path/"new.csv"
    pd.read_csv(table)[["conversation", "speaker", "text"]].to_csv(new, index=False)
    np.save(new.with_suffix(".words.npy"), np.zeros((len(pd.read_csv(new)), 7), np.float32))
    np.save(new.with_suffix(".voice.npy"), np.load(table.with_suffix(".voice.npy")))
    assert main(["predict", str(new), "--model", str(run)]) == 1
    assert re.search(r"7 wide.*trained with 5", capsys.readouterr().err)


def test_report(run, capsys):
    assert main(["report", str(run)]) == 0
    page = (run/"report"/"index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 6
    assert "http://" not in page and "https://" not in page



def test_a_summary_with_other_labels_is_one_line(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path/"run")
    summary = json.loads((run/"summary.json").read_text())
    for labels in (["sad", "mad", "glad"], [*summary["labels"], "sad"], summary["labels"][::-1]):
        (tmp_path/"run"/"summary.json").write_text(json.dumps(summary | {"labels": labels}))
        assert main(["report", str(tmp_path/"run")]) == 1
        err = capsys.readouterr().err
        assert "the predictions beside it anger, joy, neutral. Repeat the command" in err
        assert err.count("\n") == 1


def test_what_a_labelled_table_has_and_is_never_predicted_is_told(tmp_path, capsys):
    path = tmp_path/"t.csv"
    for column, told in (("label", True), ("other", False)):
        path.write_text(f"conversation,speaker,text,{column}\nc,A,Hello.,joy\nc,B,Hello.,disgust\n")
        assert main(["predict", str(path), "--no-page"]) == 0
        assert ("never predicted: " in capsys.readouterr().out) == told


def test_a_place_is_checked_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("erc_moe.load", lambda name: pytest.fail("it was loaded"), raising=False)
    (tmp_path/"talk.txt").write_text("Ana: Hello.\n")
    (tmp_path/"folder.csv").mkdir()
    (tmp_path/"page.html").mkdir()
    for out, why in (("folder.csv", "directory"), ("talk.txt/x.csv", "part of the path is a file"),
                     ("page.csv", "page.html"), ("n"*300 + ".csv", "shorter name")):
        assert main(["predict", str(tmp_path/"talk.txt"), "--out", str(tmp_path/out)]) == 1
        err = capsys.readouterr().err
        assert why in err and err.count("\n") == 1


@pytest.mark.parametrize("argv, status, told", [
    (["reproduce", "nope"], 1, "there is no experiment 'nope'"), (["nope"], 2, "invalid choice"),
    (["train", "--corpus", "sample", "--out", "x", "--se", "1"], 2, "unrecognized arguments: --se"),
    (["demo", "--port", "0"], 2, "from 1 to 65535"), (["--debug"], 2, "COMMAND"),
    (["demo", "--port", "70000"], 2, "from 1 to 65535")])
def test_what_is_no_command_line_is_one_line(argv, status, told, capsys):
    assert main(argv) == status
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


AWAY = """
import httpx, sys
from huggingface_hub.utils import _http
def away(*_, **__): raise httpx.ConnectError("no network")
httpx.Client.send = httpx.Client.request = away
_http.time.sleep = lambda seconds: None
from erc_moe.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_a_network_the_hub_says_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AWAY, "train", "--corpus", "sample", "--text", "hf:nobody/nothing",
         "--seeds", "1", "--out", str(tmp_path/"run")], capture_output=True, text=True)
    first, last = done.stderr.splitlines()
    assert done.returncode == 1 and first == "The hub is out of reach; trying for half a minute."
    assert "and the hub is out of reach. Check the network" in last


def test_a_test_selected_result_says_so_everywhere(table, tmp_path, capsys):
    assert main(training(table, tmp_path/"paper", "--protocol", "paper", "--seeds", "7,")) == 0
    out = capsys.readouterr().out
    # the heading; a row for the mixture and each expert
    assert out.count("test-selected") == 5 and out.count(" strict ") == 4
    assert main(["report", str(tmp_path/"paper")]) == 0
    assert "test-selected" in (tmp_path/"paper"/"report"/"index.html").read_text(encoding="utf-8")
    assert Run(tmp_path/"paper").seeds == [7]


def test_extract_and_use(table, tmp_path, capsys):
    look = "from erc_moe.features.published import PUBLISHED; PUBLISHED['minilm'].folder()"
    if subprocess.run([sys.executable, "-c", look], capture_output=True).returncode:
        pytest.skip("the offline MiniLM package is not installed")
    assert (
        main(
            [
                "extract", "--corpus", str(table), "--text", "minilm", "--out",
                str(tmp_path / "store")])
        == 0)
    assert (
        main([
                "train", "--corpus", str(table), "--text", str(tmp_path / "store"), "--seeds",
                "1", "--set",
                "epochs=1", "--out", str(tmp_path / "run")])
        == 0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["features"]["widths"] == {
        "text": 384}


@pytest.mark.parametrize(
    "name,args,status,message",
    [
        ("train", ["--corpus", "sample"], 2, "--out"),
        (
            "train",
            ["--corpus", "sample", "--out", "x", "--seeds", "none"],
            2,
            "neither a number of seeds nor a list",
        ),
        ("train", ["--corpus", "sample", "--out", "x", "--protocol", "lucky"], 2, "invalid choice"),
        (
            "train",
            ["--corpus", "simple", "--out", "x", "--text", "minilm"],
            1,
            "The corpora are sample, meld",
        ),
        (
            "train",
            ["--corpus", "meld", "--data", "nowhere", "--out", "x", "--text", "minilm"],
            1,
            "nowhere",
        ),
        ("train", ["--corpus", "sample", "--out", "x"], 1, "no features were asked for"),
        (
            "train",
            ["--corpus", "sample", "--out", "x", "--text", "nothing"],
            1,
            "unknown feature source 'nothing'",
        ),
        (
            "train",
            ["--corpus", "sample", "--out", "x", "--text", "minilm", "--model", "misty"],
            1,
            "The models are mister_e",
        ),
        (
            "train",
            ["--corpus", "sample", "--out", "x", "--text", "minilm", "--preset", "huge"],
            1,
            "It has paper, released, cpu",
        ),
        (
            "train",
            ["--corpus", "sample", "--out", "x", "--text", "minilm", "--set", "speed=1"],
            1,
            "one of these names: epochs",
        ),
        (
            "train",
            ["--corpus", "sample", "--out", "x", "--text", "minilm", "--set", "model=sure"],
            1,
            "cannot set 'model=sure'",
        ),
        (
            "train",
            ["--corpus", "sample", "--out", "x", "--text", "minilm", "--set", "epochs=0"],
            1,
            "epochs is 0",
        ),
        ("evaluate", ["nowhere"], 1, "holds no summary.json"),
        ("predict", ["talk.csv", "--model", "nowhere"], 1, "there is no model 'nowhere'"),
        ("report", ["nowhere"], 1, "holds no summary.json"),
        ("extract", ["--corpus", "sample", "--out", "x"], 1, "Give --text, --speech or --visual"),
        ("download", ["iemocap", "--out", "x"], 1, "not openly downloadable"),
    ],
)
def test_mistakes_end_with_one_line(name, args, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got = main([name, *args])
    err = capsys.readouterr().err.strip()
    assert (
        got == status
        and message in err
        and err.splitlines()[-1].startswith(f"erc_moe {name}: ")
        and "Traceback" not in err)
    assert not (tmp_path/"x"/"summary.json").exists()


def test_labels_are_mapped_clips_may_be_absent_and_evaluate_does_the_same(tmp_path, capsys):
    from erc_moe.cli.program import main
    from erc_moe.corpora import load_corpus
    rows = [f"c{i},{'AB'[j % 2]},turn {j} of {i},{'Joy joy sad odd'.split()[(i + j) % 4]},"
            for i in range(10) for j in range(4)]
    rows[5] += "broken.wav"
    (tmp_path/"broken.wav").write_bytes(b"RIFF no sound")
    clips = (u.audio for c in load_corpus("sample").conversations for u in c.utterances)
    rows = [r if r.endswith("wav") else f"{r}{next(clips)}" for r in rows]
    table = tmp_path/"t.csv"
    table.write_text("conversation,speaker,text,label,audio\n" + "\n".join(rows) + "\n")
    wanted = ["train", "--corpus", str(table), "--text", "minilm", "--seeds", "1", "--set",
              "epochs=1", "--out", str(tmp_path/"run"), "--cache", str(tmp_path/"cache")]
    assert main(wanted) == 1 and "--label-map" in capsys.readouterr().err
    (tmp_path/"map.json").write_text('{"Joy": "joy", "odd": null}')
    assert main([*wanted, "--label-map", str(tmp_path/"map.json")]) == 0
    summary = json.loads((tmp_path/"run/summary.json").read_text())
    assert summary["labels"] == ["joy", "sad"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path/"run")]) == 0        # the map is remembered
    assert "joy" in capsys.readouterr().out
    heard = [*wanted[:-3], str(tmp_path/"heard"), "--cache", str(tmp_path/"cache"), "--speech",
             "egemaps", "--label-map", str(tmp_path/"map.json")]
    assert main(heard) == 1 and "--missing absent" in capsys.readouterr().err
    assert main([*heard, "--missing", "absent"]) == 0
    assert "clips that cannot be used: 1 (c1_1:" in capsys.readouterr().out
