"""Tables, encodings, labels and arrays of anybody's: read as they are written, or refused in one
line, whatever is in them."""
import json
import string

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import torch
from erc_moe.conversations import DataError
from erc_moe.corpora import load_corpus
from erc_moe.corpora.core import read_features
from erc_moe.corpora.encodings import decode
from erc_moe.corpora.files import read_rows, read_table
from erc_moe.corpora.labels import ready_to_train
from erc_moe.corpora.own import load_own
from erc_moe.features import read_pickle

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# any character that a file can hold, but NUL; a carriage return alone ends a line of CSV
letters = st.characters(exclude_characters="\0\r", exclude_categories=["Cs"])
cell = st.text(letters, max_size=12) | st.sampled_from(
    ["NA", "null", "None", "nan", "1.0", "007", "True", '"', "a\nb", "\u2028", " x ", "1e400", ","])
header = st.lists(
    st.text(string.ascii_lowercase, min_size=1, max_size=6), min_size=1, max_size=5, unique=True)


@st.composite
def tables(draw):
    names = draw(header)
    row = st.lists(cell, min_size=len(names), max_size=len(names)).filter(any)
    return names, draw(st.lists(row, min_size=1, max_size=8))


def as_csv(names, rows, delimiter):
    quote = lambda c: '"' + c.replace('"', '""') + '"'
    return "\n".join(delimiter.join(map(quote, r)) for r in [names, *rows]) + "\n"


@quick
@given(tables(), st.sampled_from(",;\t"), st.sampled_from(
    ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"]))
def test_csv_is_read_as_it_was_written(tmp_path_factory, table, delimiter, encoding):
    names, rows = table
    path = tmp_path_factory.mktemp("csv")/"t.CSV"
    path.write_bytes(as_csv(names, rows, delimiter).encode(encoding))
    assert read_rows(path)[:2] == (names, rows)


@quick
@given(tables(), st.booleans(), st.booleans())
def test_json_is_read_as_it_was_written(tmp_path_factory, table, listed, escaped):
    names, rows = table
    objects = [dict(zip(names, r)) for r in rows]
    text = (
        json.dumps(objects, ensure_ascii=escaped) if listed
        else "\n".join(json.dumps(o, ensure_ascii=escaped) for o in objects))
    path = tmp_path_factory.mktemp("json")/("t.json" if listed else "t.JSONL")
    path.write_text(text, encoding="utf-8", newline="")
    assert read_rows(path) == (names, rows, list(range(1, len(rows) + 1)))


@quick
@given(tables(), st.data())
def test_a_row_with_other_fields_is_refused_with_its_line(tmp_path_factory, table, data):
    names, rows = table
    rows = [["".join(c.split("\n")) or "x" for c in r] for r in rows]
    at = data.draw(st.integers(0, len(rows) - 1))
    more = data.draw(st.booleans()) or len(names) == 1
    rows[at] = rows[at] + ["more"] if more else rows[at][:-1]
    path = tmp_path_factory.mktemp("fields")/"t.csv"
    path.write_text(as_csv(names, rows, ","), encoding="utf-8", newline="")
    with pytest.raises(DataError, match=rf"t.csv, line {at + 2} has \d+ fields under"):
        read_rows(path)


@quick
@given(st.binary(max_size=200), st.sampled_from(["t.csv", "t.jsonl", "t.json", "t.tsv", "t.xlsx"]))
def test_no_bytes_end_in_anything_but_a_data_error(tmp_path_factory, data, name):
    path = tmp_path_factory.mktemp("bytes")/name
    path.write_bytes(data)
    try: read_table(path, [])
    except DataError as e: assert "\n" not in str(e).strip() and name in str(e)


LANGUAGES = {
    "gb18030": "\u6211\u6ca1\u4e8b\uff0c\u53ea\u662f\u6709\u70b9\u7d2f\u3002|"
    "\u4f60\u4eca\u5929\u600e\u4e48\u4e86\uff1f",
    "big5": "\u6211\u6c92\u4e8b\uff0c\u53ea\u662f\u6709\u9ede\u7d2f\u3002|"
    "\u4f60\u4eca\u5929\u600e\u9ebc\u4e86\uff1f",
    "shift_jis": "\u304d\u3087\u3046\u306f\u3069\u3046\u3057\u305f\u306e\uff1f",
    "cp1251": "\u041d\u0438\u0447\u0435\u0433\u043e, \u044f \u0443\u0441\u0442\u0430\u043b.|"
    "\u042d\u0442\u043e \u0443\u0436\u0430\u0441\u043d\u043e.",
    "cp1250": "Dzi\u0119kuj\u0119, \u017ce mnie wys\u0142ucha\u0142e\u015b.|To okropne, "
    "jestem w\u015bciek\u0142a.",
    "cp1252": "It\u2019s fine \u2013 really\u2026|\u201cFine,\u201d he said."}


@pytest.mark.parametrize("encoding", LANGUAGES)
def test_a_guess_is_right_and_named(encoding):
    table = "conversation,speaker,text\n" + "".join(
        f'c,A,"{line}"\n' for line in LANGUAGES[encoding].split("|"))
    text, told = decode(table.encode(encoding), "t.csv")
    assert text == table and "a guess from its bytes" in told and "iconv -f" in told


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_right_text_is_never_changed(tmp_path):
    texts = [
        "\u00c5\u2026 ja", "\u201cP\u00c5\u201d", "V\u00c6\u2026", "N\u00c3O\u201d", "NA", "007"]
    path = write(tmp_path/"t.csv", "conversation,speaker,text,label\n" + "".join(
        f'c,A,"{t}",1.0\n' for t in texts))
    corpus = load_own(path)
    assert [u.text for u in corpus.conversations[0].utterances] == texts
    assert corpus.labels == ["1.0"] and not any("damaged" in f for f in corpus.faults)


HEAD = "conversation,speaker,text,label,split\n"


def conversations(labels, splits):
    return HEAD + "".join(
        f"c{i},A,Hm {j}.,{label},{split}\n"
        for i, split in enumerate(splits) for j, label in enumerate(labels))


@pytest.mark.parametrize("splits, problem", [
    (["train", "train", "test"], "t has no validation split"),
    (["train", "dev"], "t has no test split"), (["", "", ""], "t has no validation split"),
    (["valid", "Test"], "t has no train split"), (["train", "dev", "9"], "unknown split '9'")])
def test_a_missing_split_is_told_before_a_training(tmp_path, splits, problem):
    path = write(tmp_path/"t.csv", conversations(["joy", "anger"], splits))
    with pytest.raises(DataError, match=problem): ready_to_train(load_corpus(path))


def test_splits_in_any_spelling(tmp_path):
    path = write(tmp_path/"t.csv", conversations(["joy", "anger"], ["Train", "dev", "TEST"]))
    corpus = ready_to_train(load_corpus(path))
    assert [*corpus.splits] == ["train", "validation", "test"]
    assert any("'dev' as validation" in f for f in corpus.faults)


def test_spellings_of_a_label_are_settled_by_a_map(tmp_path):
    path = write(tmp_path/"t.csv", conversations(["joy", "Joy", " joy", "JOY "], ["train"]))
    with pytest.raises(DataError, match="differ only in case") as told: load_corpus(path)
    given_map = json.loads(str(told.value)[str(told.value).index("{"):])
    write(tmp_path/"map.json", json.dumps(given_map))
    for label_map in (given_map, tmp_path/"map.json"):
        assert load_corpus(path, label_map=label_map).labels == ["joy"]


def test_an_own_file_is_never_an_official_corpus(tmp_path):
    corpus = load_corpus(write(tmp_path/"meld.csv", conversations(["joy"], ["train"])))
    assert (corpus.name, corpus.known_as, corpus.path.name) == ("meld", "", "meld.csv")
    assert load_corpus("sample").known_as == "sample"


def test_a_prediction_asks_for_words_alone(tmp_path):
    path = write(tmp_path/"t.tsv", "Message\tEmotion\tsplit\nHi\tcontempt\tdev\nHo\tJoy\t9\n")
    (conv,) = load_own(path, splits=False).conversations
    assert (conv.id, conv.labels) == ("t", ["contempt", "Joy"])
    with pytest.raises(DataError, match="has no column 'conversation'"): load_own(path)


@quick
@given(st.integers(0, 2), st.binary(min_size=1, max_size=6), st.integers(0, 400))
def test_damaged_arrays_are_refused(tmp_path_factory, kind, junk, at):
    folder = tmp_path_factory.mktemp("arrays")
    path = folder/("f.npy" if kind == 0 else "f.safetensors")
    if kind == 0: np.save(path, np.ones((3, 2), np.float32))
    elif kind == 1: save_file({"a": np.ones((3, 2), np.float32)}, path)
    else: save_file({i: np.ones(2, np.float32) for i in "abc"}, path)
    whole = bytearray(path.read_bytes())
    at %= len(whole)
    whole[at:at + len(junk)] = junk
    path.write_bytes(whole)
    try: assert read_features(path, list("abc"), "f")[0].values.ndim == 2
    except DataError as e: assert "f" in str(e)


def test_bfloat16_is_read(tmp_path):
    save_torch(
        {"a": torch.tensor([[1.5, 2], [3, 4]], dtype=torch.bfloat16)}, tmp_path / "f.safetensors")
    assert read_features(tmp_path/"f.safetensors", ["x", "y"], "f")[0].values.tolist() == [
        [1.5, 2], [3, 4]]


@quick
@given(st.lists(st.sampled_from(
    [b"N", b"(", b"t", b"l", b"]", b"}", b"a", b"e", b"s", b"u", b"0", b"1", b"2", b"\x94", b"\x85",
     b"q\0", b"h\0", b"q\1", b"h\1", b"K\5", b"r\xff\xff\xff\x0f", b"\x96" + b"\xff"*8, b"R", b"b",
     b"\x8e" + b"\xff"*4 + b"\0"*4, b"\x81", b"X\2\0\0\0ab", b"c__builtin__\nset\n",
     b"cnumpy\nndarray\n", b"c_codecs\nencode\n", b"\x8f", b"\x91", b"\x90"]), max_size=60))
def test_any_program_of_a_pickle_is_read_or_refused(tmp_path_factory, program):
    path = tmp_path_factory.mktemp("pickle")/"f.pkl"
    path.write_bytes(b"".join(program) + b".")
    try: read_pickle(path)
    except DataError as e: assert "f.pkl" in str(e)


@pytest.mark.parametrize(
    "data",
    [
        b"(" * 200_000 + b"t" * 200_000 + b".",
        b"Nr\xff\xff\xff\x0f.",
        b"\x96" + b"\xff" * 6 + b"\x0f\0.",
        b"(" * 300 + b"l" * 300 + b".",
    ],
)
def test_pickles_that_claim_too_much_are_refused_before(tmp_path, data):
    (tmp_path/"f.pkl").write_bytes(data)
    with pytest.raises(DataError, match="nested over|keeps a value at|claims"):
        read_pickle(tmp_path/"f.pkl")


@pytest.mark.parametrize("name, text, problem", [
    ("t.csv", 'id,text\na,"open\nb,c\n', "line 2 is no CSV row"),
    ("t.csv", 'id,text\na,"b"c\n', "line 2 is no CSV row"),
    ("t.csv", "id,text\na,\0\n", "line 2 holds a NUL"),
    ("t.jsonl", '{"id": "\\ud800"}', "half a character"),
    ("t.jsonl", '{"id": {"a": 1}}', "more than a text"),
    ("t.jsonl", '{"id": 1, "id": 2}', "has 'id' twice"),
    ("t.jsonl", "[" * 100_000, "nested too deep"), ("t.csv", "id,id\n1,2\n", "2 columns 'id'"),
    ("t.csv", "", "t.csv is empty"), ("t.xlsx", "id\n1\n", "Rename it to t.csv")])
def test_what_is_no_table_is_told_in_one_line(tmp_path, name, text, problem):
    with pytest.raises(DataError, match=problem) as told: read_rows(write(tmp_path/name, text))
    assert "\n" not in str(told.value).strip()


def test_numbers_of_json_keep_their_digits(tmp_path):
    path = write(tmp_path/"t.jsonl", '{"a": 1.0, "b": 1e400, "c": ' + "9"*5000 + ', "d": true}')
    assert read_rows(path)[1] == [["1.0", "1e400", "9"*5000, "true"]]


def test_an_array_that_claims_more_than_it_holds_is_refused_before(tmp_path):
    np.save(tmp_path/"f.npy", np.ones((3, 2), np.float32))
    whole = (tmp_path/"f.npy").read_bytes()
    (tmp_path/"f.npy").write_bytes(whole.replace(b"(3, 2), }" + b" "*9, b"(3, 2000000000), }"))
    with pytest.raises(DataError, match="claims 24000000000 bytes and holds 24"):
        read_features(tmp_path/"f.npy", list("abc"), "f")


def test_a_prediction_keeps_what_a_table_says_of_its_rows(tmp_path):
    "Conversations by any name and in any kind of table, their order, their sound."
    from erc_moe.predict import read_conversations
    rows = [("d2", "A", "Hi"), ("d1", "B", "Go"), ("d2", "A", "Yes")]
    for ending, mark in ((".csv", ","), (".CSV", ";"), (".tsv", "\t")):
        for head in ("dialogue_id", "Conversation", "Thread"):
            path = tmp_path/f"t{ending}"
            path.write_text("\n".join(mark.join(r) for r in [(head, "speaker", "text"), *rows]))
            conversations, _, _ = read_conversations(path)
            assert [(c.id, len(c)) for c in conversations] == [("d2", 2), ("d1", 1)]
    for ending, joined in ((".json", "[{}]"), (".jsonl", "{}"), (".NDJSON", "{}")):
        objects = [json.dumps(dict(zip(("conv_id", "user", "text"), r))) for r in rows]
        (tmp_path/f"t{ending}").write_text(
            joined.format((", " if ending == ".json" else "\n").join(objects)))
        assert [len(c) for c in read_conversations(tmp_path/f"t{ending}")[0]] == [2, 1]
    (tmp_path/"o.csv").write_text("turn,speaker,text\n2,A,second\n1,B,first\n")
    (tmp_path/"a.csv").write_text("speaker,text,audio\nA,Hi,none.wav\n")
    assert [u.text for u in read_conversations(tmp_path/"o.csv")[0][0].utterances] == [
        "first", "second"]
    with pytest.raises(DataError, match="none.wav' does not exist"):
        read_conversations(tmp_path/"a.csv")


def test_an_error_is_one_short_line_whatever_it_quotes():
    cell = "x"*9999 + "\n\x1b[2J"
    told = str(DataError(f"the cell {cell} is no time", "Write\nseconds.", "c"*999))
    assert len(told) < 900 and told.isprintable() and told.endswith("Write seconds.")
