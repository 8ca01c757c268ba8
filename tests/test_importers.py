"""Feature files of the field: nothing in a pickle is run, every row finds its utterance, and
what does not fit is told."""
import io
import json
import os
import pickle
import struct
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from erc_moe.cli import main
from erc_moe.conversations import Conversation, DataError, Utterance
from erc_moe.corpora import Corpus, load_corpus
from erc_moe.features import (
    LAYOUTS, FeatureStore, FileLayout, import_features, importers, read_pickle)
from erc_moe.features.layouts import LABEL_ORDER, find_layout, match_utterances
from erc_moe.training import Run, train

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# MELD's conversations are numbered through its splits
FIRST = {"train": 0, "validation": 1039, "test": 1153}
WIDTHS = dict(text=16, speech=10, visual=12)


class Python2(pickle._Pickler):
    "Writes what Python 2 wrote: texts and bytes as byte strings, numpy under its old name."
    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, obj):
        data = obj if isinstance(obj, bytes) else obj.encode("latin1")
        if not self.bin: self.write(b"S" + repr(data)[1:].encode("ascii") + b"\n")
        else: self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(obj)

    def save_global(self, obj, name=None):
        module = {"numpy._core.multiarray": "numpy.core.multiarray", "builtins": "__builtin__"}.get(
            obj.__module__, obj.__module__)
        self.write(f"c{module}\n{obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch[str] = dispatch[bytes] = save_text
    dispatch[type] = dispatch[type(len)] = dispatch[type(lambda: 0)] = save_global


def python2(value, protocol):
    file = io.BytesIO()
    Python2(file, protocol).dump(value)
    return file.getvalue()


def small_corpus(name, seed=0):
    """18 conversations under the names of `name`; every fourth utterance of IEMOCAP's is
    unlabelled, MELD's numbers have gaps."""
    rng, labels, words, splits = (
        np.random.default_rng(seed), LABEL_ORDER.get(name, ["bad", "good"]),
        "we never said that you could take my old car".split(), {})
    for split, n in (("train", 10), ("validation", 3), ("test", 5)):
        splits[split] = []
        for i in range(n):
            conv = (
                f"{split}_dia{i + (i > 1)}"
                if name == "meld"
                else f"Ses0{dict(validation=1, test=5).get(split, 3)}F_impro{i:02d}"
            )
            uid = lambda j: (
                f"{conv}_utt{j + (j > 2)}" if name == "meld" else f"{conv}_{'FM'[j % 2]}{j:03d}")
            splits[split].append(Conversation(
                conv,
                [
                    Utterance(
                        uid(j),
                        "FM"[j % 2],
                        f"{' '.join(rng.choice(words, 4))} {j}.",
                        None
                        if name == "iemocap" and j % 4 == 3
                        else labels[rng.integers(len(labels))])
                    for j in range(rng.integers(5, 12))]))
    return Corpus(name, labels, splits, official=True)


def key(conv, name):
    return (
        FIRST[conv.partition("_")[0]] + int(conv.rpartition("dia")[2]) if name == "meld" else conv)


def entries_of(corpus, seed=1):
    """What the field's files hold of a corpus: entry name -> dictionary or list; the text and
    all else of an utterance depend on it alone."""
    rng, name = np.random.default_rng(seed), corpus.name
    held = {
        key(c.id, name): [u for u in c.utterances if u.label is not None]
        for c in corpus.conversations}
    per = lambda one: {k: [one(u) for u in us] for k, us in held.items()}
    entries = dict(
        ids=per(lambda u: int(u.id.rpartition("utt")[2]) if name == "meld" else u.id),
        labels=per(lambda u: corpus.labels.index(u.label)),
        sentences=per(lambda u: u.text),
        speakers=per(lambda u: list(np.eye(9, dtype=int)[u.speaker == "M"]))
        if name == "meld"
        else per(lambda u: u.speaker),
        **{
            m: {k: list(rng.normal(size=(len(us), w)).astype(np.float32)) for k, us in held.items()}
            for m, w in WIDTHS.items()},
        train=[key(c.id, name) for s in ("train", "validation") for c in corpus.splits[s]],
        test=[key(c.id, name) for c in corpus.splits["test"]],
        validation=[])
    return entries | {"-": entries["labels"]}


def laid_out(entries, layout): return [entries[e] for e in layout.entries.split()]


def layout(name): return next(l for l in LAYOUTS if l.name == name)


def write(path, value, protocol=2):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def expected(corpus, entries, modality):
    "utterance id -> row, by the entries' own order."
    held = {c.id: [u for u in c.utterances if u.label is not None] for c in corpus.conversations}
    return {
        u.id: row
        for c, us in held.items()
        for u, row in zip(us, entries[modality][key(c, corpus.name)])}


def assert_rows(imported, corpus, rows, modality):
    ids = [u.id for c in corpus.conversations for u in c.utterances]
    values, present = imported.stores[modality].lookup(ids)
    assert [i for i, p in zip(ids, present) if p] == [i for i in ids if i in rows]
    assert np.array_equal(
        values[present], np.stack([rows[i] for i in ids if i in rows]).astype(np.float32))


# The reader

simple = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.sampled_from([np.float32(1.5), np.int64(-3), range(3, 9)])
    | arrays(
        st.sampled_from(["<f4", ">f8", "i2", "?", "<U3", "S2"]),
        st.tuples(st.integers(0, 3), st.integers(0, 3))),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.sets(st.integers(), max_size=3)),
    max_leaves=8)


@quick
@given(simple, st.integers(0, 5))
def test_honest_content_is_read_as_pickle_reads_it(tmp_path_factory, value, protocol):
    path = tmp_path_factory.mktemp("honest")/"f.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    np.testing.assert_equal(read_pickle(path), pickle.loads(path.read_bytes()))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "dtype", ["<f4", ">f4", "<f8", ">f8", "<i8", ">i2", "?", "<U3", ">U3", "S2", "O"]
)
def test_arrays_of_every_kind(dtype, protocol, tmp_path):
    values = np.array([[1, 2, 30], [4, 5, 60]]).astype(dtype)
    for array in (
        values, np.asfortranarray(values), values[:, ::2], values[:0], values[0, 1:2].reshape(())):
        read = read_pickle(write(tmp_path/"f.pkl", array, protocol))
        assert (
            read.shape == array.shape
            and read.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
            and np.array_equal(read, array))


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_python_2(tmp_path, protocol):
    value = {
        "Ses01F_impro01": [np.arange(3, dtype=np.float32), np.float64(0.5)], "caf\xe9": ["M", "F"],
        60: {1, 2}, "t": (np.array([[1, 2], [3, 4]]).T, np.array(["a", 1], object))}
    data = python2(value, protocol)
    assert b"numpy.core.multiarray" in data
    with pytest.raises(UnicodeDecodeError): pickle.loads(data)                 # its texts are bytes
    (tmp_path/"f.pkl").write_bytes(data)
    np.testing.assert_equal(read_pickle(tmp_path/"f.pkl"), value)


class Reduced:
    def __init__(self, *reduced): self.reduced = reduced
    def __reduce__(self): return self.reduced


RECONSTRUCT = np.zeros(1).__reduce__()[0]
HOSTILE = {
    "os.system": b"cos\nsystem\n(S'touch {flag}'\ntR.",
    "posix.system, as os.system is pickled": pickle.dumps(Reduced(os.system, ("touch {flag}",)), 0),
    "eval": b"c__builtin__\neval\n(S'open(\"{flag}\", \"w\")'\ntR.",
    "eval by a protocol 4 name": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93(V"
    + b"open('{flag}', 'w')\ntR.",
    "a dotted name below what is let "
    "through": b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93(tR.",
    "subprocess by INST": b"(S'touch {flag}'\nisubprocess\ngetoutput\n.",
    "OBJ": b"(cos\nsystem\nS'touch {flag}'\no.",
    "NEWOBJ": b"\x80\x02cpathlib\nPath\n(t\x81.",
    "numpy.load": b"cnumpy\nload\n(S'{flag}'\nNI01\ntR.",
    "numpy's test runner": b"cnumpy.testing._private.utils\nrunstring\n(S'open(\"{flag}\", \"w\")'\n(dtR.",
    "hidden in a label": pickle.dumps([{"a": [Reduced(eval, ("open('{flag}', 'w')",))]}], 0),
    "getattr": b"c__builtin__\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
    "functools.partial": b"cfunctools\npartial\n(cos\nsystem\nS'touch {flag}'\ntR.",
    "copyreg's constructor": b"ccopy_reg\n_reconstructor\n(cpathlib\nPath\nc__builtin__\nobject\nNtR.",
    "an array of another class": b"cnumpy.core.multiarray\n_reconstruct\n(c__builtin__\nset\n(I0\ntS'b'\ntR.",
    "an array of memory maps": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nmemmap\n(I0\ntS'b'\ntR.",
    "a decoder that unpacks": b"c_codecs\nencode\n(S'payload'\nS'zlib'\ntR.",
    "a persistent id": b"Pwhatever\n.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a torch tensor": b"ctorch._utils\n_rebuild_tensor_v2\n(tR.",
    "a function's defaults": b"cnumpy.core.multiarray\n_reconstruct\n}S'__defaults__'\nNsb.",
    "a function's attribute": b"cnumpy.core.multiarray\n_reconstruct\n(N}S'call'\nNstb.",
    "a type's attribute": b"cnumpy\nndarray\n(N}S'tofile'\nNstb.",
    "a list too short for its array": pickle.dumps(np.array([None] * 3, object), 2).replace(
        b"K\x03\x85", b"K\x7f\x85"),
    "bytes too short for their array": pickle.dumps(np.arange(3), 2).replace(
        b"K\x03\x85", b"K\x7f\x85"),
    "a negative shape": pickle.dumps(np.arange(3), 2).replace(
        b"K\x03\x85", b"J\xfd\xff\xff\xff\x85"),
    "records": pickle.dumps(np.zeros(2, "f4,O"), 2),
    "a range without end": b"c__builtin__\nxrange\n(I0\nI100000000000\nI1\ntR."}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_run(name, tmp_path, monkeypatch):
    flag = tmp_path/"ran"
    data = HOSTILE[name].replace(b"{flag}", str(flag).encode())
    (tmp_path/"f.pkl").write_bytes(data)
    for module in (os, subprocess):
        monkeypatch.setattr(
            module, "system" if module is os else "getoutput", lambda *_: flag.touch())
    with pytest.raises(
        DataError, match="asks for .* not let through|no pickle of features, or a damaged one"
    ) as told:
        read_pickle(tmp_path/"f.pkl")
    assert "f.pkl" in str(told.value) and not flag.exists()
    assert read_pickle(write(tmp_path / "g.pkl", np.arange(3))).tolist() == [0, 1, 2], (
        "the reader is as it was")


def test_the_hostile_do_run_in_pickle(tmp_path):
    "So that the test above can fail."
    for name in (
        "os.system", "eval by a protocol 4 name", "OBJ", "subprocess by INST",
        "numpy's test runner"):
        flag = tmp_path/name.replace(" ", "-")
        pickle.loads(HOSTILE[name].replace(b"{flag}", str(flag).encode()))
        assert flag.exists(), name


def test_every_cut_is_told(tmp_path):
    data = pickle.dumps({"a": [np.arange(3), 1], "b": {"c"}}, 2)
    for end in range(len(data)):
        (tmp_path/"f.pkl").write_bytes(data[:end])
        with pytest.raises(DataError, match="Download it again"): read_pickle(tmp_path/"f.pkl")


@quick
@given(st.data())
def test_no_damage_ends_in_anything_but_a_data_error(tmp_path_factory, data):
    whole = bytearray(pickle.dumps(
        {
            "a": [np.arange(3, dtype=np.float32), np.array(["x", None], object), np.float64(1)],
            "b": {"c"}},
        data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged")/"f.pkl"
    path.write_bytes(whole)
    try: repr(read_pickle(path))
    except DataError: pass


# Every layout

@pytest.mark.parametrize("name", [l.name for l in LAYOUTS if not l.name.startswith("multiemo")])
@pytest.mark.parametrize(
    "written", ["python 2", "python 2, protocol 0", "protocol 2", "protocol 5"]
)
def test_layouts(name, written, tmp_path):
    corpus = small_corpus(layout(name).corpus)
    entries = entries_of(corpus)
    value = tuple(laid_out(entries, layout(name)))
    if written.startswith("python 2"):
        (tmp_path/"f.pkl").write_bytes(python2(value, 0 if "0" in written[8:] else 2))
    else: write(tmp_path/"f.pkl", value, int(written[-1]))
    imported = import_features(tmp_path/"f.pkl", corpus, tmp_path/"out")
    present = [m for m in WIDTHS if m in layout(name).entries.split()]
    assert (
        imported.record["layout"] == name
        and imported.record["widths"] == {m: WIDTHS[m] for m in present}
        and list(imported.sources) == present)
    assert (
        imported.record["agreement"] == {"labels": 1.0, "words": 1.0}
        and imported.record["same_test"] is True)
    for m in present: assert_rows(imported, corpus, expected(corpus, entries, m), m)
    told = " ".join(imported.record["told"])
    assert ("unlabelled utterances, which the file leaves out" in told) == (
        corpus.name == "iemocap")
    assert (
        "validation conversations that the file trains on: 3 of 3" in told
        and "its test conversations are the corpus'" in told)


@pytest.mark.parametrize("name", ["multiemo-iemocap", "multiemo-meld"])
def test_a_folder_of_multiemo(name, tmp_path):
    corpus = small_corpus(layout(name).corpus)
    entries = entries_of(corpus)
    folder = tmp_path/"IEMOCAP"
    folder.mkdir()
    with pytest.raises(DataError, match="A folder must hold Speakers.pkl"):
        import_features(folder, corpus, tmp_path/"out")
    write(folder/"Speakers.pkl", laid_out(entries, layout(name))[:-3])
    for m, file in dict(
        text="TextFeatures", speech="AudioFeatures", visual="VisualFeatures"
    ).items():
        write(folder/f"{file}.pkl", entries[m])
    imported = import_features(folder, corpus, tmp_path/"out")
    assert imported.record["layout"] == name
    for m in WIDTHS: assert_rows(imported, corpus, expected(corpus, entries, m), m)
    write(folder/"AudioFeatures.pkl", entries["visual"])
    with pytest.raises(DataError, match="holds another import .*sha256"):
        import_features(folder, corpus, tmp_path/"out")


def test_a_dictionary_by_the_fields_names(tmp_path):
    corpus = small_corpus("iemocap")
    entries = entries_of(corpus)
    value = {
        "videoIDs": entries["ids"], "videoLabels": entries["labels"], "roberta1": entries["text"],
        "roberta2": entries["speech"], "testVid": set(entries["test"])}
    imported = import_features(write(tmp_path/"f.pkl", value), corpus, tmp_path/"out")
    assert (
        imported.record["layout"] == "named"
        and imported.record["widths"] == {"text": 16}
        and imported.record["agreement"] == {"labels": 1.0})
    assert_rows(imported, corpus, expected(corpus, entries, "text"), "text")


def test_a_layout_fits_no_other_and_one_can_be_declared(tmp_path):
    for l in LAYOUTS:
        corpus = small_corpus(l.corpus)
        value = laid_out(entries_of(corpus), l)
        assert (
            find_layout(value, l.corpus)[0]
            == find_layout(value, l.corpus, l.name)[0]
            == find_layout(value, "own")[0]
            == l)
        other = next(o for o in LAYOUTS if o.corpus != l.corpus)
        with pytest.raises(
            DataError,
            match=f"does not fit the layout {other.name}; it has {len(value)} entries: 0 ",
        ):
            find_layout(value, l.corpus, other.name)
        with pytest.raises(DataError, match=f"fits {l.name}, but no layout of {other.corpus}"):
            find_layout(value, other.corpus)
    entries = entries_of(corpus := small_corpus("meld"))
    path = write(
        tmp_path / "f.pkl", [entries[e] for e in ("visual", "speech", "labels", "sentences")])
    with pytest.raises(
        DataError,
        match="fits no known layout of meld; it has 4 entries: 0 vectors of 12 .18., "
        "1 vectors of 10",
    ):
        import_features(path, corpus, tmp_path/"out")
    imported = import_features(
        path, corpus, tmp_path / "out", FileLayout("mine", "meld", "visual speech labels sentences")
    )
    assert imported.record["same_test"] is None
    for m in ("speech", "visual"): assert_rows(imported, corpus, expected(corpus, entries, m), m)


# Order, numbers and faults

@pytest.mark.parametrize("without", [(), ("ids",)])
@pytest.mark.parametrize("name", ["iemocap", "meld"])
@given(seed=st.integers(0, 10**6))
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_rows_in_any_order_go_to_their_utterances(name, without, seed, tmp_path_factory):
    "Found by their ids; by their words where ids are of no use."
    corpus, rng = small_corpus(name, seed), np.random.default_rng(seed)
    entries = entries_of(corpus)
    order = {k: rng.permutation(len(v)) for k, v in entries["labels"].items()}
    moved = {
        e: {k: [v[k][i] for i in order[k]] for k in v} if isinstance(v, dict) else v
        for e, v in entries.items()}
    for e in without: moved[e] = {k: ["?"]*len(v) for k, v in moved[e].items()}
    folder = tmp_path_factory.mktemp("order")
    imported = import_features(
        write(folder / "f.pkl", laid_out(moved, layout(f"sdt-{name}"))), corpus, folder / "out")
    for m in WIDTHS: assert_rows(imported, corpus, expected(corpus, entries, m), m)
    assert imported.record["agreement"] == {
        "labels": 1.0, "words": 1.0
    } and "in another order in the file" in " ".join(imported.record["told"])
    assert ("matched without ids" in " ".join(imported.record["told"])) == bool(without)


def test_the_same_words_go_to_the_labelled_one_then_to_the_earlier_one():
    conv = Conversation(
        "c",
        [
            Utterance(f"c{i}", "A", words, label)
            for i, (words, label) in enumerate(
                [("Yes.", None), ("Yes?", "happy"), ("Oh, yes!", None), ("yes", "sad")])])
    found = lambda *words: [u.id for u in match_utterances(conv, len(words), None, list(words))[0]]
    assert found("Yes", "YES!", "oh yes", "yes") == ["c1", "c3", "c2", "c0"] and found(
        "oh yes"
    ) == ["c2"]


def test_by_place_a_wrong_order_is_found_by_its_labels(tmp_path):
    corpus = small_corpus("meld")
    entries = entries_of(corpus)
    by_place = FileLayout("by place", "meld", "labels text")
    good = import_features(
        write(tmp_path / "f.pkl", [entries["labels"], entries["text"]]), corpus, tmp_path / "out",
        by_place)
    assert_rows(good, corpus, expected(corpus, entries, "text"), "text")
    turned = entries["labels"] | {1042: entries["labels"][1042][::-1]}
    first = next(
        u.id
        for u, n in zip(
            next(c for c in corpus.conversations if c.id == "validation_dia3").utterances,
            turned[1042])
        if u.label != corpus.labels[n])
    with pytest.raises(DataError, match="labels agree with the corpus' in 9.*here: ") as told:
        import_features(
            write(tmp_path / "f.pkl", [turned, entries["text"]]), corpus, tmp_path / "o2", by_place)
    assert (told.value.conversation, told.value.utterance) == ("validation_dia3", first)


def damaged(corpus, change):
    entries = entries_of(corpus)
    for e, v in entries.items():
        if isinstance(v, dict): entries[e] = {k: list(rows) for k, rows in v.items()}
    change(entries)
    return laid_out(entries, layout(f"sdt-{corpus.name}"))


K = "Ses05F_impro02"
FAULTS = {
    "labels of another order": (
        lambda e: e["labels"].update({k: [5 - n for n in v] for k, v in e["labels"].items()}),
        "labels agree with the corpus' in", "Ses03F_impro00"),
    "a label of every conversation": (
        lambda e: e["labels"].update({k: [(v[0] + 1) % 6, *v[1:]] for k, v in e["labels"].items()}),
        "labels agree with the corpus' in [78]", "Ses03F_impro00"),
    "a label beyond the classes": (
        lambda e: e["labels"].update({k: [n + 6 for n in v] for k, v in e["labels"].items()}),
        "'number ", "Ses03F_impro00"),
    "a conversation that is not there": (
        lambda e: e["labels"].pop(K),
        "the file lacks it: 17 conversations in the file, 18 in iemocap", K),
    "a conversation too many": (
        lambda e: e["labels"].update({"Ses09F": [0]}),
        "a conversation 'Ses09F' .19 in all., which is not in iemocap", "Ses09F"),
    "labels without ids": (lambda e: e["ids"][K].pop(), "labels and [0-9]+ ids for it", K),
    "words of another number": (lambda e: e["sentences"][K].append("more"), "sentences for it", K),
    "too many rows": (
        lambda e: [e[n][K].append(e[n][K][0]) for n in ("ids", "labels", "sentences")],
        "neither ids nor words tell which is which", K),
    "lost rows": (
        lambda e: [
            e[n][k].pop() for n in ("ids", "labels", "sentences", *WIDTHS) for k in e["labels"]],
        "no row for 18 labelled utterances, this one the first",
        "Ses03F_impro00"),
    "other words": (
        lambda e: e["sentences"].update(
            {K: ["Quite unlike, in every syllable!"] * len(e["sentences"][K])}),
        "other words in the file",
        K),
    "a row too few": (lambda e: e["speech"][K].pop(), "speech have the shape", K),
    "a wider row": (
        lambda e: e["visual"][K].__setitem__(0, np.zeros(13)), "visual cannot be read for it", K),
    "a wider conversation": (
        lambda e: e["visual"].update({K: [np.zeros(13)] * len(e["visual"][K])}),
        "and a width of 12", K),
    "text in place of numbers": (
        lambda e: e["text"].update({K: [["a"] * 16] * len(e["text"][K])}),
        "text cannot be read for it", K)}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_their_place(name, tmp_path):
    change, message, place = FAULTS[name]
    with pytest.raises(DataError, match=message) as told:
        import_features(
            write(tmp_path / "f.pkl", damaged(small_corpus("iemocap"), change)),
            small_corpus("iemocap"), tmp_path / "out")
    assert told.value.conversation == place
    assert not (tmp_path / "out" / "import.json").exists(), (
        "a failed import leaves nothing that looks finished")


def test_known_faults_are_told_and_their_rows_are_absent(tmp_path):
    "A clip that was lost, a row of NaN, a face that was not found, a corrected label."
    corpus = small_corpus("meld")
    big = replace(
        corpus,
        splits={
            s: [
                replace(
                    c,
                    utterances=tuple(
                        replace(u, id=f"{c.id.partition('_')[0]}_dia{n}_utt{j}")
                        for j, u in enumerate(c.utterances)),
                    id=f"{s}_dia{n}")
                for n, c in enumerate(convs * 8)]
            for s, convs in corpus.splits.items()})
    def change(e):
        for n in ("ids", "labels", "sentences", "speakers", *WIDTHS): e[n][1039].pop(2)
        e["speech"][1153][0] = e["speech"][1153][0]*np.nan
        e["visual"][1153][1] = np.zeros(12)
        e["labels"][1153][2] = (e["labels"][1153][2] + 1) % 7
    imported = import_features(write(tmp_path/"f.pkl", damaged(big, change)), big, tmp_path/"out")
    told = " ".join(imported.record["told"])
    for sentence in (
        "labelled utterances without a row: 1 (validation_dia0_utt2); not observed",
        "speech, rows with NaN or infinity: 1 (test_dia0_utt0); not observed",
        "visual, rows that are all 0: 1 (test_dia0_utt1); kept",
        "whose label in the file is another than the corpus': 1 (test_dia0_utt2)",
    ):
        assert sentence in told
    assert imported.stores["text"].absent == {"validation_dia0_utt2": "f.pkl has no row for it"}
    assert imported.stores["speech"].absent == {
        "validation_dia0_utt2": "f.pkl has no row for it",
        "test_dia0_utt0": "its row holds NaN or infinity"}
    assert (
        0.998 < imported.record["agreement"]["labels"] < 1
        and imported.record["agreement"]["words"] == 1)


def test_a_split_that_leaks_is_told(tmp_path):
    corpus = small_corpus("iemocap")
    entries = entries_of(corpus)
    entries["train"], entries["test"] = entries["train"] + entries["test"][:2], entries["test"][2:]
    imported = import_features(
        write(tmp_path / "f.pkl", laid_out(entries, layout("sdt-iemocap"))), corpus,
        tmp_path / "out")
    told = " ".join(imported.record["told"])
    assert (
        imported.record["same_test"] is False
        and "not the corpus'" in told
        and "test conversations that the file trains on: 2 of 5" in told)


# Once, and whole

def test_a_file_is_read_once_for_a_corpus(tmp_path, monkeypatch):
    corpus = small_corpus("iemocap")
    path = write(tmp_path/"f.pkl", laid_out(entries_of(corpus), layout("sdt-iemocap")))
    first = import_features(path, corpus, cache=tmp_path/"cache")
    monkeypatch.setattr(
        "erc_moe.features.importers.read_pickle", lambda _: pytest.fail("read again"))
    again = import_features(path, corpus, cache=tmp_path/"cache")
    assert again == first and again.stores["text"].content_hash == first.stores["text"].content_hash
    monkeypatch.undo()
    other = replace(corpus, splits=corpus.splits | {"train": corpus.splits["train"][::-1]})
    assert import_features(path, other, cache=tmp_path/"cache").folder != first.folder
    assert (
        import_features(path, corpus, cache=tmp_path / "cache", layout="sdt-iemocap").folder
        != first.folder)
    with pytest.raises(DataError, match="holds another import .its split_hash differs"):
        import_features(path, other, first.folder)


def test_an_import_that_was_stopped_is_finished(tmp_path, monkeypatch):
    corpus = small_corpus("iemocap")
    path = write(tmp_path/"f.pkl", laid_out(entries_of(corpus), layout("sdt-iemocap")))
    add = FeatureStore.add
    def stopped(self, *args):
        if self.path.name == "speech": raise KeyboardInterrupt
        add(self, *args)
    monkeypatch.setattr(FeatureStore, "add", stopped)
    with pytest.raises(KeyboardInterrupt): import_features(path, corpus, tmp_path/"out")
    monkeypatch.undo()
    imported = import_features(path, corpus, tmp_path/"out")
    for m in WIDTHS:
        assert_rows(imported, corpus, expected(corpus, entries_of(corpus), m), m)
        assert len(imported.stores[m].shards) == 1


def test_who_comes_second_waits_and_takes_what_is_there(tmp_path, monkeypatch):
    corpus, seen, second = small_corpus("iemocap"), [], threading.Event()
    path = write(tmp_path/"f.pkl", laid_out(entries_of(corpus), layout("sdt-iemocap")))
    def slowly(*args):
        if seen: second.set()
        seen.append(args)
        second.wait(1)
        return convert(*args)
    convert = importers._convert
    monkeypatch.setattr(importers, "_convert", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, other = pool.map(lambda _: import_features(path, corpus, tmp_path/"out"), range(2))
    assert len(seen) == 1 and first == other


# From the command line, on the sample corpus

@pytest.fixture(scope="module")
def sample_file(tmp_path_factory):
    corpus = load_corpus("sample")
    return write(
        tmp_path_factory.mktemp("sample") / "sample_features.pkl",
        laid_out(entries_of(corpus), layout("sdt-iemocap")))


@pytest.fixture(scope="module")
def run(sample_file):
    out = sample_file.parent/"run"
    assert (
        main(
            [
                "train", "--corpus", "sample", "--features", str(sample_file), "--model", "sure",
                "--preset", "cpu", "--set", "epochs=1", "--set", "width=16", "--seeds", "1",
                "--device", "cpu",
                "--cache", str(sample_file.parent / "cache"), "--out", str(out)])
        == 0)
    return out


def test_train_on_a_feature_file(run, sample_file, capsys):
    summary = Run(run).summary
    assert (
        summary["features"]["widths"] == WIDTHS
        and summary["features"]["imported"]["layout"] == "sdt-iemocap")
    assert summary["features"]["imported"]["file"] == "sample_features.pkl" and any(
        "labels agree in 100.00%" in f for f in summary["faults"])
    assert all(
        p.kind == "store" and not p.relative
        for parts in Run(run).pipeline.parts.values()
        for p in parts
    ), "nothing is special about imported features"
    main(
        [
            "train", "--corpus", "sample", "--features", str(sample_file), "--model", "sure",
            "--preset",
            "cpu", "--set", "epochs=1", "--set", "width=16", "--seeds", "1", "--device", "cpu",
            "--cache", str(sample_file.parent / "cache"), "--out", str(run)])
    assert "labels agree in 100.00%" in capsys.readouterr().out


def test_evaluate_gives_what_training_gave(run, tmp_path):
    assert main(["evaluate", str(run), "--out", str(tmp_path/"scores.json")]) == 0
    assert (
        json.loads((tmp_path / "scores.json").read_text())["test"]["confusion"]
        == Run(run).summary["test"]["confusion"])


def test_other_conversations_cannot_be_predicted_and_it_is_said(run, tmp_path, capsys):
    (tmp_path/"talk.csv").write_text("conversation,speaker,text\nlunch,Ana,Hello.\n")
    assert main(["predict", str(tmp_path/"talk.csv"), "--model", str(run)]) == 1
    err = capsys.readouterr().err
    assert (
        "the model's text features come from the store" in err
        and "lunch_0" in err
        and err.count("\n") == 1)


def test_a_named_source_comes_before_the_file(sample_file, tmp_path):
    run = train(
        "sure", "sample", features=sample_file, speech="none",
        visual=str(write_npy(tmp_path / "v.npy")), preset="cpu", seeds=1,
        changes=dict(epochs=1, width=16), device="cpu", cache=tmp_path / "cache", progress=False)
    assert run.summary["features"]["widths"] == {"text": 16, "visual": 3} and run.summary[
        "features"
    ]["sources"]["visual"].endswith("v.npy")


def write_npy(path):
    n = sum(len(c) for c in load_corpus("sample").conversations)
    np.save(path, np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32))
    return path


def test_import_command(sample_file, tmp_path, capsys):
    assert (
        main(
            ["import", str(sample_file), "--corpus", "sample", "--out", str(tmp_path / "stores")])
        == 0)
    out = capsys.readouterr().out
    assert (
        "labels agree in 100.00%" in out
        and f"--speech {tmp_path / 'stores' / 'speech'}: FeatureStore(" in out)
    assert (
        main(
            [
                "import", str(sample_file), "--corpus", "sample", "--layout", "sdt", "--out",
                str(tmp_path / "other")])
        == 1)
    assert "there is no layout 'sdt'. The layouts are" in capsys.readouterr().err
    bad = tmp_path/"bad.pkl"
    bad.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert (
        main(
            [
                "train", "--corpus", "sample", "--features", str(bad), "--out",
                str(tmp_path / "run")])
        == 1)
    assert (
        "asks for os.system, which is not let through" in capsys.readouterr().err
        and not (tmp_path / "run").exists())


# The corpora themselves

@pytest.mark.skipif(
    not os.environ.get("ERC_MOE_DATA"), reason="ERC_MOE_DATA names no folder with the corpora"
)
@pytest.mark.parametrize("name, utterances", [("iemocap", 7433), ("meld", 13708)])
def test_the_corpora_as_the_field_has_them(name, utterances, tmp_path):
    corpus = load_corpus(name)
    entries = entries_of(corpus)
    imported = import_features(
        write(tmp_path / "f.pkl", laid_out(entries, layout(f"sdt-{name}"))), corpus,
        tmp_path / "out")
    assert (
        len(imported.stores["text"]) == utterances
        and imported.record["same_test"]
        and imported.record["agreement"] == {"labels": 1.0, "words": 1.0})
    assert_rows(imported, corpus, expected(corpus, entries, "text"), "text")
    without_ids = laid_out(entries, layout(f"cosmic-{name}"))
    cosmic = import_features(write(tmp_path/"c.pkl", without_ids), corpus, tmp_path/"cosmic")
    assert cosmic.record["agreement"]["labels"] > 0.999
    if name == "meld": assert [k for k in range(1433) if k not in entries["labels"]] == [60]
