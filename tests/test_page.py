"""The page as a file: what it shows and may load, its sound and size, and that words stay words."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings, strategies as st

from erc_moe import page as pages, page_sound
from erc_moe.conversations import Conversation, Utterance
from erc_moe.corpora import load_corpus
from erc_moe.recordings import read_sound
from erc_moe.training import Predictions

VOID = {"meta", "img", "br", "input", "link", "hr"}
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '"onmouseover=alert(1) x="',
    "' autofocus onfocus='alert(1)",
    "<!--",
    "-->",
    "&lt;b&gt;",
    "{{ 7*7 }}",
    "</style><style>*{display:none}",
    "javascript:alert(1)",
    "]]>",
    "\u2028",
    "<svg/onload=alert(1)>",
    "\x00<b>",
    "%3Cscript%3E",
]


class Reader(HTMLParser):
    "Counts tags, keeps attributes and what is shown."

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.shown, self.open, self.data = [], [], [], [], {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        (self.data.setdefault(inside, []) if inside in ("script", "style") else self.shown).append(
            data
        )


def predictions(
    conversations,
    labels=("neutral", "joy", "anger"),
    experts=("text", "speech", "multimodal"),
    gate=True,
    seed=0,
):
    rng, M = np.random.default_rng(seed), sum(map(len, conversations))
    said = {e: rng.dirichlet(np.ones(len(labels)), M) for e in experts}
    weights = rng.dirichlet(np.ones(len(experts)), M) if gate and experts else None
    mixture = (
        sum(w[:, None] * p for w, p in zip(weights.T, said.values()))
        if weights is not None
        else rng.dirichlet(np.ones(len(labels)), M)
    )
    return Predictions(list(conversations), list(labels), mixture, said, weights)


def chat(*words, speaker="Ann", id="chat", **more):
    return Conversation(id, [Utterance(f"u{i}", speaker, w, **more) for i, w in enumerate(words)])


def structure(html):
    "The tags of a page with ordinary words: what hostile ones must not change."
    return Reader(html).tags


hostile = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(max_size=20),
    st.tuples(st.sampled_from(HOSTILE), st.text(max_size=8)).map("".join),
).filter(bool)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(hostile, hostile, hostile, hostile, hostile)
def test_nothing_of_a_strangers_becomes_html(speaker, text, id, label, expert):
    labels = ["neutral", label if label != "neutral" else label + "x"]
    make = lambda s, t, i, l, e: predictions(
        [Conversation(i, [Utterance("a", s, t, l[1]), Utterance("b", s, t)])],
        l,
        ("text", e) if e != "text" else ("text", "texty"),
    )
    bad, good = (
        make(speaker, text, id, labels, expert),
        make("Ann", "Hi.", "chat", ["neutral", "calm"], "other"),
    )
    for draw in (
        lambda p: p.to_html(),
        lambda p: p._repr_html_(),
        lambda p: p.timeline(sound=False)._repr_html_(),
        lambda p: p.conversations[0]._repr_html_(),
    ):
        a, b = Reader(draw(bad)), Reader(draw(good))
        assert a.tags == b.tags
        assert [(t, k) for t, k, _ in a.attributes] == [(t, k) for t, k, _ in b.attributes]
        assert not any(k.startswith("on") for _, k, _ in a.attributes)
        assert all(
            "javascript:" not in (v or "").lower()
            for _, k, v in a.attributes
            if k in ("href", "src", "action")
        )
    facts = json.loads(next(d for d in Reader(bad.to_html()).data["script"] if d.startswith("{")))
    assert facts["labels"] == labels


def test_words_are_shown_as_they_were_written():
    shown = " ".join("".join(Reader(predictions([chat(*HOSTILE[:8])]).to_html()).shown).split())
    for words in HOSTILE[:8]:
        assert words in shown


def test_structure():
    conv = load_corpus("sample").splits["test"][0]
    html = predictions([conv], load_corpus("sample").labels).to_html(sound=False)
    page = Reader(html)
    assert not page.open, f"left open: {page.open}"
    assert page.tags.count("li") == len(conv) and page.tags.count("h1") == 1
    ids = [v for _, k, v in page.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    assert ("html", "lang", "en") in page.attributes
    for u in conv.utterances:
        assert u.text in page.shown
    assert page.shown.count(conv.utterances[0].speaker) >= sum(
        u.speaker == conv.utterances[0].speaker for u in conv.utterances
    )


def test_needs_nothing_beside_it(tmp_path):
    conv = load_corpus("sample").splits["test"][0]
    path = predictions([conv], load_corpus("sample").labels).to_html(tmp_path / "talk.html")
    assert [p.name for p in tmp_path.iterdir()] == ["talk.html"]
    page = Reader(path.read_text(encoding="utf-8"))
    for tag, key, value in page.attributes:
        if key in ("src", "href", "data", "poster", "action"):
            assert value.startswith(("data:", "#")), (tag, key, value)
    assert not re.search(
        r"url\(|@import|https?:(?!//www\.w3\.org/2000/svg)", path.read_text(encoding="utf-8")
    )


def test_policy_allows_its_own_script_and_style_alone():
    import hashlib

    page = Reader(predictions([chat("Hi.")]).to_html())
    policy = next(v for t, k, v in page.attributes if k == "content" and "default-src" in v)
    mark = lambda text: (
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
    )
    scripts = [s for s in page.data["script"] if not s.startswith("{")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == mark("".join(scripts)) and rules["style-src"] == mark(
        "".join(page.data["style"])
    )
    assert rules["media-src"] == "data:"
    assert not [a for a in page.attributes if a[1] == "style"], "a style attribute would be blocked"


def test_truth_is_shown_only_where_somebody_gave_one():
    without, some = (
        predictions([chat("Hi.", "Ho.")]),
        predictions(
            [Conversation("c", [Utterance("a", "Ann", "Hi.", "joy"), Utterance("b", "Ann", "Ho.")])]
        ),
    )
    for draw in (Predictions.to_html, Predictions._repr_html_):
        shown = " ".join(Reader(draw(without)).shown)
        assert "labelled" not in shown and "label" not in shown and "truth" not in shown
        assert "labelled" in " ".join(Reader(draw(some)).shown)
    assert "label" not in without.table() and "label" in some.table()


def test_a_model_without_experts_does_not_speak_of_them():
    html = predictions([chat("Hi.", "Ho.")], experts=()).to_html()
    shown = " ".join(Reader(html).shown).lower()
    assert "gate" not in shown and "expert" not in shown
    shown = " ".join(
        Reader(predictions([chat("Hi.")], experts=("text",), gate=False).to_html()).shown
    )
    assert "gate" not in shown


def test_disagreement_counts_only_experts_with_weight():
    p = np.array([[0.8, 0.2], [0.8, 0.2]])
    said = Predictions(
        [chat("Hi.", "Ho.")],
        ["joy", "anger"],
        p,
        {"text": p, "speech": p[:, ::-1]},
        np.array([[1, 0], [0.5, 0.5]]),
    )
    shown = Reader(said.to_html()).shown
    told = [s for s in shown if s.startswith("Experts disagree")]
    assert told == ["Experts disagree: joy (text), anger (speech)"]


def test_the_sound_is_the_clips():
    corpus = load_corpus("sample")
    conv = corpus.splits["test"][1]
    page = Reader(predictions([conv], corpus.labels).to_html())
    source = next(v for t, k, v in page.attributes if t == "audio" and k == "src")
    sound, rate = soundfile.read(
        io.BytesIO(base64.b64decode(source.split(",", 1)[1])), dtype="float32"
    )
    facts = json.loads(next(d for d in page.data["script"] if d.startswith("{")))
    assert len(facts["heard"]) == len(conv)
    for u, (start, end) in zip(conv.utterances, facts["heard"]):
        clip = read_sound(u.audio, rate)[0]
        heard = sound[round(start * rate) : round(start * rate) + len(clip)]
        assert abs((end - start) * rate - len(clip)) < 1e-3 * rate
        like = np.array(
            [
                np.corrcoef(clip[400:-400], heard[400 + s : len(clip) - 400 + s])[0, 1]
                for s in range(-400, 401)
            ]
        )
        assert abs(like.argmax() - 400) <= 1 and like.max() > 0.95, u.id


@pytest.mark.parametrize("there", [True, False], ids=["PyAV", "libsndfile"])
def test_both_encoders_keep_the_places(monkeypatch, there):
    if there:
        pytest.importorskip("av")
    else:
        monkeypatch.setattr(page_sound, "find_spec", lambda name: None)
    conv = load_corpus("sample").splits["test"][0]
    sound = page_sound.clip_sound(conv)
    packed, whole = page_sound.opus(sound), np.concatenate(list(sound.pieces()))
    again, rate = soundfile.read(io.BytesIO(packed), dtype="float32")
    assert (len(again), rate) == (len(whole), sound.rate)
    assert np.corrcoef(again, whole)[0, 1] > 0.9
    assert len(packed) < 6000 * sound.length


def test_long_sound_lies_beside(tmp_path, monkeypatch):
    corpus = load_corpus("sample")
    said = predictions(corpus.splits["test"][:2], corpus.labels)
    monkeypatch.setattr(pages, "EMBEDDED", 1000)
    path = said.to_html(tmp_path / "a talk.emotions.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a talk.emotions.2.opus",
        "a talk.emotions.html",
        "a talk.emotions.opus",
    ]
    page = Reader(path.read_text(encoding="utf-8"))
    assert [v for t, k, v in page.attributes if t == "audio" and k == "src"] == [
        "a%20talk.emotions.opus",
        "a%20talk.emotions.2.opus",
    ]
    assert "too long" in said.to_html() and "<audio" not in said.to_html()


def test_size_and_time_of_a_long_conversation():
    import time

    turns = [
        Utterance(
            f"u{i}",
            f"speaker {i % 4}",
            "Some words that somebody says. " * 3,
            None,
            None,
            5.4 * i,
            5.4 * i + 5,
        )
        for i in range(2000)
    ]
    began = time.perf_counter()
    html = predictions([Conversation("three hours", turns)], load_corpus("sample").labels).to_html()
    assert time.perf_counter() - began < 20
    assert len(html) < 5_000_000
    assert "2:59:5" in html


def test_times():
    page = pages.turn_spans(chat("a", "b"))
    assert page == ([(0, 1), (1, 2)], 2, False)
    some = Conversation(
        "c", [Utterance("a", "Ann", "x", start=1, end=2), Utterance("b", "Ann", "y")]
    )
    assert not pages.turn_spans(some)[2], "a time for some is a time for none"


def test_odd_conversations():
    for conv in (
        chat(""),
        chat("Hi.", speaker=""),
        Conversation("c", [Utterance("a", "Ann", "x", start=0, end=0)]),
        Conversation("c", [Utterance(str(i), f"s{i}", "x") for i in range(60)]),
    ):
        page = Reader(predictions([conv]).to_html())
        assert not page.open and page.tags.count("li") == len(conv)


def spreadsheet_texts():
    mark = st.sampled_from(
        [
            *"=+-@\t\r\n'",
            "＝",
            "－",
            ",",
            '"',
            ";",
            "NA",
            "null",
            "True",
            "1e5",
            "-5",
            "+3.5",
            "007",
            "",
        ]
    )
    return st.one_of(
        st.lists(mark, max_size=4).map("".join), st.tuples(mark, st.text(max_size=6)).map("".join)
    ).filter(lambda t: "\x00" not in t and not any("\ud800" <= c <= "\udfff" for c in t))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(spreadsheet_texts(), min_size=5, max_size=5))
def test_a_table_comes_back_as_it_was_and_holds_no_formula(tmp_path, words):
    "No cell begins as a formula; every text is text again; numbers stay numbers."
    import csv
    from erc_moe.training.predictions import read_csv

    labels = ["neutral", words[3] if words[3] not in ("", "neutral") else "joy"]
    said = predictions(
        [Conversation(words[0], [Utterance(words[1], words[2], words[4], labels[1])])],
        labels,
        ("text",),
    )
    path = said.write(tmp_path / "table.csv")
    back = read_csv(path).iloc[0]
    assert [
        back[c] for c in ("conversation", "utterance", "speaker", "text", "label", "predicted")
    ] == [words[0], words[1], words[2], words[4], labels[1], said.predicted[0]]
    assert back[f"p_{labels[0]}"] == round(said.probabilities[0, 0], 4)
    with open(path, encoding="utf-8", newline="") as f:
        for row in csv.reader(f):
            for cell in row:
                number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", cell)
                assert number or not cell.startswith(
                    ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
                ), cell


def test_a_table_never_replaces_what_was_read(tmp_path):
    from erc_moe.conversations import DataError

    said = predictions([chat("Hi.")])
    (tmp_path / "in.csv").write_text("conversation,speaker,text\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "in.csv")
    for name in ("in.csv", "link.csv", "../" + tmp_path.name + "/in.csv"):
        for write in (said.write, said.to_html):
            with pytest.raises(DataError, match="is what was read"):
                write(tmp_path / name, inputs=[tmp_path / "in.csv"])
    assert (tmp_path / "in.csv").read_text() == "conversation,speaker,text\n"


def test_a_full_disk_leaves_the_old_table(tmp_path, monkeypatch):
    import os

    said = predictions([chat("Hi.")])
    paths = [
        said.write(tmp_path / "t.csv"),
        said.write(tmp_path / "t.jsonl"),
        said.to_html(tmp_path / "t.html"),
    ]
    before = [p.read_bytes() for p in paths]

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    other = predictions([chat("Other words.")], seed=1)
    for path, write in zip(paths, (other.write, other.write, other.to_html)):
        with pytest.raises(OSError):
            write(path)
    assert [p.read_bytes() for p in paths] == before and len(list(tmp_path.iterdir())) == 3


def test_labels_that_are_numbers_stay_text(tmp_path):
    "A run whose labels are 0 and 1: the interval holds the score, and the report is written."
    from erc_moe.conversations import DataError
    from erc_moe.corpora.own import load_own
    from erc_moe.report import write_report
    from erc_moe.training import Run, train

    rows = ["conversation,order,speaker,text,label"]
    rows += [
        f"c{c},{i},{'AB'[i % 2]},{'yes good' if (c + i) % 2 else 'no bad'} {c} {i},{(c + i) % 2}"
        for c in range(12)
        for i in range(6)
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    run = train(
        "mister_e",
        load_own(tmp_path / "t.csv"),
        text="minilm",
        seeds=1,
        changes=dict(epochs=4),
        progress=False,
    )
    f1 = run.summary["test"]["weighted_f1"]
    assert f1["interval"]["low"] <= f1["mean"] <= f1["interval"]["high"]
    assert f1["interval"]["high"] > 0
    assert set(run.predictions().label) <= {"0", "1"}
    assert write_report(run).stat().st_size > 10_000

    # the same run, as a stranger could hand it on: every text of its summary is hostile
    evil = HOSTILE[0]
    words = ("corpus", "corpus_note", "selection", "preset", "command", "code_revision", "device")
    hostile = run.summary | {w: evil for w in words}
    hostile |= dict(faults=[evil], versions={evil: evil})
    hostile["features"] = run.summary["features"] | {"sources": {"text": evil}}
    hostile["config"] = dict(model={evil: evil}, training={evil: evil})
    (run.folder / "summary.json").write_text(json.dumps(hostile))
    before = Reader((run.folder / "report" / "index.html").read_text(encoding="utf-8"))
    again = Run(run.folder)
    page = Reader(write_report(again).read_text(encoding="utf-8"))
    assert page.tags.count("script") == before.tags.count("script")
    assert page.tags.count("img") == before.tags.count("img")
    assert not [a for a in page.attributes if a[1].startswith("on") or a[1] == "style"]
    assert evil in " ".join(page.shown)
    assert "img" not in Reader(again._repr_html_()).tags
    (run.folder / "summary.json").write_text(json.dumps(hostile | dict(seeds=[evil])))
    with pytest.raises(DataError, match="names the seed"): write_report(Run(run.folder))


def test_no_html_is_put_together_without_escaping():
    "An f-string with tags in it escapes nothing, and the package has none."
    import ast

    import erc_moe

    tag = re.compile(
        r"</?(a|b|i|p|div|span|table|t[rdh]|ul|li|img|h\d|section|svg|style|script)\b[^>]*>"
    )
    for path in Path(erc_moe.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                fixed = "".join(v.value for v in node.values if isinstance(v, ast.Constant))
                assert not tag.search(fixed), f"{path.name}, line {node.lineno}: {fixed[:60]!r}"


def test_a_turn_whose_sound_is_broken_is_shown_without_it(tmp_path):
    scene = load_corpus("sample").splits["test"][0]
    (tmp_path/"broken.wav").write_bytes(b"RIFF")
    first, *rest = scene.utterances[:3]
    broken = replace(first, audio=tmp_path/"broken.wav")
    for turns in ([broken, *rest], [broken]):
        page = predictions([Conversation("talk", turns)]).to_html()
        assert "cannot be read: 1" in page and ("data:audio" in page) == (len(turns) > 1)
