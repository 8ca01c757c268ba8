"""Write a scene of the sample corpus as one recording with subtitles: FOLDER/talk.wav and talk.srt.

`make demo` shows the model in the box on it.
"""
import sys
from pathlib import Path

from erc_moe.corpora import load_corpus
from erc_moe.recordings import join_scene


def stamp(seconds: float) -> str:
    """A time as SubRip writes it."""
    whole, thousandths = divmod(round(1000*seconds), 1000)
    return f"{whole//3600:02d}:{whole//60%60:02d}:{whole%60:02d},{thousandths:03d}"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    turns = join_scene(load_corpus("sample").splits["test"][0], folder/"talk.wav")
    (folder/"talk.srt").write_text("\n".join(
        f"{i}\n{stamp(t.start)} --> {stamp(t.end)}\n{t.speaker}: {t.text}\n"
        for i, t in enumerate(turns, 1)), encoding="utf-8")
