"""The published corpora against the papers' counts, and what a reader must never do.

Tests of the real corpora read the folder that ERC_MOE_DATA names. `python tests/test_corpora.py`
writes
results/corpora.json from it: the statistics and told faults that the notebooks show.
"""
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erc_moe.conversations import DataError
from erc_moe.corpora import Corpus, FeatureTable, load_corpus
from erc_moe.corpora.core import group_rows
from erc_moe.corpora.encodings import fix_text
from erc_moe.corpora.files import read_table

ROOT = Path(__file__).resolve().parent.parent
DATA = os.environ.get("ERC_MOE_DATA")
real = pytest.mark.skipif(
    not DATA, reason="ERC_MOE_DATA is unset: the real corpora are not at hand")
FORMS = {
    "meld": ("meld", {}), "emorynlp": ("emorynlp", {}), "iemocap": ("iemocap", {}),
    "iemocap cosmic": ("iemocap", dict(split="cosmic")), "mosi": ("mosi", {}),
    "mosi paper": ("mosi", dict(split="paper")), "mosi bclstm": ("mosi", dict(split="bclstm"))}


@pytest.fixture(scope="module")
def corpora() -> dict[str, Corpus]:
    return {key: load_corpus(name, DATA, **options) for key, (name, options) in FORMS.items()}


def summary(corpus: Corpus) -> dict:
    return dict(
        labels=corpus.labels, protocol_note=corpus.protocol_note, split_hash=corpus.split_hash,
        statistics=corpus.statistics().to_dict("index"), faults=corpus.faults)


# What the papers and the corpora's own documents say: conversations, labelled utterances per split.
PUBLISHED = {
    "meld": ((1038, 114, 280), (9989, 1109, 2610)),                     # Poria et al. 2019, table 3
    "emorynlp": ((659, 89, 79), (7551, 954, 984)),                      # the MELD repository's copy
    "iemocap": ((92, 28, 31), (4437, 1373, 1623)),  # MiSTER-E 4.1: sessions 2-4 / 1 / 5
    "iemocap cosmic": ((108, 12, 31), (5163, 647, 1623)),
    "mosi": ((52, 10, 31), (1284, 229, 686)),                           # Zadeh et al., official
    "mosi paper": ((49, 13, 31), (1188, 325, 686)),                     # MiSTER-E 4.1
    "mosi bclstm": ((49, 13, 31), (1164, 283, 752))}


@real
@pytest.mark.parametrize("key", FORMS)
def test_counts_are_the_published_ones(corpora, key):
    statistics = corpora[key].statistics()
    assert tuple(statistics["conversations"]) == PUBLISHED[key][0]
    assert tuple(statistics["labelled"]) == PUBLISHED[key][1]
    assert (statistics[corpora[key].labels].sum(axis=1) == statistics["labelled"]).all()


@real
@pytest.mark.parametrize("key", FORMS)
def test_the_committed_table_is_what_the_files_give(corpora, key):
    committed = json.loads((ROOT/"results"/"corpora.json").read_text())[key]
    assert json.loads(json.dumps(summary(corpora[key]))) == committed


@real
def test_iemocap_classes(corpora):
    totals = corpora["iemocap"].statistics()[corpora["iemocap"].labels].sum()
    assert totals.to_dict() == dict(
        happy=648, sad=1084, neutral=1708, angry=1103, excited=1041, frustrated=1849)


@real
def test_meld_utterances_are_found_by_id_in_spite_of_gaps(corpora):
    "Every id's number agrees with the official table, row by row."
    table = pd.read_csv(Path(DATA)/"meld"/"train_sent_emo.csv", keep_default_na=False)
    expected = {
        f"train_dia{d}_utt{u}": t
        for d, u, t in zip(table.Dialogue_ID, table.Utterance_ID, table.Utterance)}
    found = {u.id: u.text for c in corpora["meld"].splits["train"] for u in c.utterances}
    assert found == expected
    numbers = [
        [int(u.id.split("utt")[1]) for u in c.utterances] for c in corpora["meld"].conversations]
    assert all(n == sorted(n) for n in numbers) and any(n != list(range(len(n))) for n in numbers)


@real
def test_meld_speech_of_lost_and_broken_clips_is_not_observed(corpora):
    meld = corpora["meld"]
    unheard = [
        "train_dia125_utt3", "validation_dia110_utt7", "test_dia38_utt4", "test_dia220_utt0",
        "test_dia155_utt3", "train_dia309_utt0"]
    values, present = meld.arrays["prosody8"].lookup(unheard)
    assert not present.any() and np.isnan(values).all()
    assert {i for i in unheard if any(i in f for f in meld.faults)} == set(unheard)
    ids = [u.id for c in meld.conversations for u in c.utterances]
    values, present = meld.arrays["prosody8"].lookup(ids)
    assert present.sum() == 13708 - 2 - 14
    assert np.nanmax(values[:, 0]) < 40
    by_id = {u.id: u for c in meld.conversations for u in c.utterances}
    assert all(by_id[i].start is None and by_id[i].end is None for i in unheard[2:])
    assert set(meld.arrays["prosody8"].ids) <= set(ids)


@real
def test_meld_prosody_belongs_to_its_clip(corpora):
    """The measured length of a clip is the length that its subtitle times give: a shifted row
    would show."""
    meld = corpora["meld"]
    timed = [u for c in meld.conversations for u in c.utterances if u.start is not None]
    values, present = meld.arrays["prosody8"].lookup([u.id for u in timed])
    spoken = np.array([u.end - u.start for u in timed])
    far = np.abs(np.where(present, values[:, 0], spoken) - spoken) > 0.2
    assert [u.id for u, odd in zip(timed, far) if odd] == [
        "train_dia556_utt6", "test_dia151_utt2", "test_dia242_utt2"]
    assert any("train_dia556_utt6, test_dia151_utt2, test_dia242_utt2" in f for f in meld.faults)


@real
def test_iemocap_prosody_belongs_to_its_utterance(corpora):
    iemocap = corpora["iemocap"]
    utterances = [u for c in iemocap.conversations for u in c.utterances]
    values, present = iemocap.arrays["prosody8"].lookup([u.id for u in utterances])
    assert (
        present.all() and np.abs(values[:, 0] - [u.end - u.start for u in utterances]).max() < 0.001
    )
    assert all(
        a.start <= b.start
        for c in iemocap.conversations
        for a, b in zip(c.utterances, c.utterances[1:]))


@real
def test_iemocap_context_switch_keeps_every_label():
    kept, dropped = (
        load_corpus("iemocap", DATA, unlabelled_context=keep) for keep in (True, False))
    labelled = lambda corpus: [
        (u.id, u.label) for c in corpus.conversations for u in c.utterances if u.label]
    assert labelled(kept) == labelled(dropped) and len(labelled(kept)) == 7433
    assert (kept.statistics()["utterances"].sum(), dropped.statistics()["utterances"].sum()) == (
        10039, 7433)
    assert kept.split_hash != dropped.split_hash


@real
def test_iemocap_no_actor_is_heard_in_two_splits(corpora):
    speakers = [
        {u.speaker for c in convs for u in c.utterances}
        for convs in corpora["iemocap"].splits.values()]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 10


@real
def test_mosi_tells_that_the_selection_saw_test_labels(corpora):
    for key, seen in (
        ("mosi", "558 of this split's 686 test"), ("mosi bclstm", "0 of this split's 752 test")):
        assert seen in corpora[key].arrays["audio73"].note
        assert any(seen in f for f in corpora[key].faults)


@real
def test_mosi_label_is_the_sign_of_the_score(corpora):
    mosi = corpora["mosi"]
    utterances = [u for c in mosi.conversations for u in c.utterances]
    scores, _ = mosi.annotations["score"].lookup([u.id for u in utterances])
    assert all((u.label == "negative") == (s < 0) for u, s in zip(utterances, scores[:, 0]))


@real
def test_no_text_is_empty_or_carries_control_characters(corpora):
    for corpus in corpora.values():
        for u in (u for c in corpus.conversations for u in c.utterances):
            assert u.text.strip() and not any("\x7f" <= ch <= "\x9f" for ch in u.text), u.id


def test_a_missing_corpus_says_where_and_how(tmp_path, monkeypatch):
    for name, how in dict(
        meld="erc_moe download meld", emorynlp="erc_moe download emorynlp",
        iemocap="sails.usc.edu/iemocap", mosi="multicomp.cs.cmu.edu").items():
        with pytest.raises(DataError) as told: load_corpus(name, tmp_path)
        assert str(tmp_path/name) in str(told.value) and how in str(told.value)
        monkeypatch.delenv("ERC_MOE_DATA", raising=False)
        with pytest.raises(DataError, match="set ERC_MOE_DATA"): load_corpus(name)


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    (tmp_path/"mosi").mkdir()
    (tmp_path / "mosi" / "utterances.csv").write_text(
        "utterance_id,video_id,clip,text,score,split,bclstm_split\nv_1,v,1,HELLO,1,train,test\n")
    monkeypatch.setenv("ERC_MOE_DATA", str(tmp_path))
    assert load_corpus("mosi").conversations[0].utterances[0].text == "hello"


@given(
    st.lists(
        st.text(st.characters(codec="cp1252", exclude_categories=["Cc"]), max_size=12), max_size=6
    )
)
@settings(max_examples=200, deadline=None)
def test_control_characters_come_back_as_what_they_were(texts):
    """A text whose Windows-1252 bytes were read as Latin-1, unless it already looked like
    mojibake, is corrected exactly."""
    texts = [t for t in texts if fix_text([t])[1] == 0]
    damaged = [t.encode("cp1252").decode("latin-1") for t in texts]
    fixed, count = fix_text(damaged)
    assert fixed == texts
    assert count == sum(d != t for d, t in zip(damaged, texts))


@given(st.permutations(range(6)), st.lists(st.integers(0, 7), max_size=8))
def test_features_are_looked_up_by_id(order, asked):
    table = FeatureTable(
        "f", [f"u{i}" for i in order], np.array(order, dtype=float)[:, None] + [[0.0, 0.5]])
    values, present = table.lookup([f"u{i}" for i in asked])
    assert present.tolist() == [i < 6 for i in asked]
    assert [v.tolist() for v, i in zip(values, asked) if i < 6] == [
        [i, i + 0.5] for i in asked if i < 6]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["joy", "anger", ""])),
        min_size=1,
        max_size=20,
    )
)
def test_grouping_keeps_every_row_in_its_order(cells):
    rows = pd.DataFrame(
        dict(
            conversation=[c for c, _ in cells], id=[str(i) for i in range(len(cells))], speaker="s",
            text="t", label=[l for _, l in cells]))
    convs = group_rows(rows)
    assert [c.id for c in convs] == list(dict.fromkeys(c for c, _ in cells))
    for c in convs:
        assert [(u.id, u.label) for u in c.utterances] == [
            (str(i), l or None) for i, (k, l) in enumerate(cells) if k == c.id]


def test_a_byte_order_mark_is_no_part_of_a_column_name(tmp_path):
    (tmp_path/"t.csv").write_bytes("﻿id,text\na,b\n".encode())
    assert read_table(tmp_path/"t.csv", ["id"])["id"].tolist() == ["a"]


if __name__ == "__main__":
    told = {
        key: summary(load_corpus(name, DATA, **options)) for key, (name, options) in FORMS.items()}
    (ROOT / "results" / "corpora.json").write_text(
        json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def test_dailydialog_is_found_by_name_and_option(tmp_path):
    "The published layout in small: three folders, a file of words and one of numbers each."
    for split in ("train", "validation", "test"):
        folder = tmp_path/"dailydialog"/split
        folder.mkdir(parents=True)
        (folder/f"dialogues_{split}.txt").write_text(
            f"Is this {split} ? __eou__ It is ! __eou__\nWell . __eou__ Yes ? __eou__\n")
        (folder/f"dialogues_emotion_{split}.txt").write_text("0 4 \n5 0 \n")
    whole, felt = (
        load_corpus(name, tmp_path) for name in ("dailydialog", "dailydialog@neutral=false"))
    assert whole.labels == ["neutral", *felt.labels] and len(felt.labels) == 6
    assert [c.labels for c in felt.splits["test"]] == [[None, "happiness"], ["sadness", None]]
    assert "1 of test" in whole.faults[0]    # "Well. Yes?" is in every split
    assert whole.split_hash != felt.split_hash
    with pytest.raises(DataError, match="no option 'positive'"):
        load_corpus("dailydialog@positive=false", tmp_path)
