"""Sound files and transcripts of every format that a test needs, written from samples and turns."""
import json
from fractions import Fraction

import av
import numpy as np
import pympi

from erc_moe.recordings import read_transcript

RATE = 16000


def write_sound(path, x, rate=RATE, codec="aac", video=False, late=0, gap=None):
    "x, float32 (T,) or (T, C), through an encoder; `late` and `gap` = (at, length) in samples."
    x = np.asarray(x, np.float32).reshape(len(x), -1)                                 # (T, C)
    with av.open(str(path), "w") as out:
        layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[x.shape[1]]
        track = out.add_stream(codec, rate=rate, layout=layout)
        if video:
            pictures = out.add_stream("mpeg4", rate=25)
            pictures.width = pictures.height = 32
            pictures.pix_fmt = "yuv420p"
            for i in range(25*len(x)//rate + 25):
                image = np.full((32, 32, 3), i % 255, np.uint8)
                picture = av.VideoFrame.from_ndarray(image, "rgb24")
                picture.pts = i
                out.mux(pictures.encode(picture))
            out.mux(pictures.encode(None))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x.reshape(1, -1)), "flt", layout)
        frame.sample_rate, fifo, at = rate, av.AudioFifo(), 0
        for part in av.AudioResampler(track.format.name, layout, rate).resample(frame):
            fifo.write(part)
        while fifo.samples:
            part = fifo.read(track.frame_size or 1024, partial=True)
            part.pts = at + late + (gap[1] if gap and at >= gap[0] else 0)
            part.time_base, at = Fraction(1, rate), at + part.samples
            out.mux(track.encode(part))
        out.mux(track.encode(None))


def clock(seconds, mark):
    ms = round(1000*seconds)
    hours, minutes = ms//3_600_000, ms//60_000 % 60
    return f"{hours:02d}:{minutes:02d}:{ms//1000 % 60:02d}{mark}{ms % 1000:03d}"


def write_srt(path, turns):
    cues = [f"{i}\n{clock(t.start, ',')} --> {clock(t.end, ',')}\n{t.speaker}: {t.text}\n"
            for i, t in enumerate(turns, 1)]
    path.write_text("\n".join(cues), encoding="utf-8")


def write_vtt(path, turns):
    cues = [f"{clock(t.start, '.')} --> {clock(t.end, '.')}\n<v {t.speaker}>{t.text}</v>\n"
            for t in turns]
    path.write_text("WEBVTT\n\n" + "\n".join(cues), encoding="utf-8")


ASS = """[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,20

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


def write_ass(path, turns):
    lines = [f"Dialogue: 0,{clock(t.start, '.')},{clock(t.end, '.')},Default,{t.speaker},0,0,0,,"
             f"{t.text}\n" for t in turns]
    path.write_text(ASS + "".join(lines), encoding="utf-8")


def write_textgrid(path, turns):
    tiers = []
    for k, name in enumerate(names := list(dict.fromkeys(t.speaker for t in turns)), 1):
        own = [t for t in turns if t.speaker == name]
        body = "".join(f"        intervals [{i}]:\n            xmin = {t.start}\n"
                       f'            xmax = {t.end}\n            text = "{t.text}"\n'
                       for i, t in enumerate(own, 1))
        tiers.append(f'    item [{k}]:\n        class = "IntervalTier"\n        name = "{name}"\n'
                     f"        xmin = 0\n        xmax = {turns[-1].end}\n"
                     f"        intervals: size = {len(own)}\n{body}")
    path.write_text('File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\n'
                    f"xmax = {turns[-1].end}\ntiers? <exists>\nsize = {len(names)}\nitem []:\n"
                    + "".join(tiers), encoding="utf-16" if path.stem.endswith("16") else "utf-8")


def write_eaf(path, turns):
    eaf = pympi.Eaf(author="")
    for name in dict.fromkeys(t.speaker for t in turns): eaf.add_tier(name)
    for t in turns: eaf.add_annotation(t.speaker, round(1000*t.start), round(1000*t.end), t.text)
    eaf.remove_tier("default")
    eaf.to_file(str(path))


def write_whisperx(path, turns):
    segments = [dict(start=t.start, end=t.end, text=f" {t.text}", speaker=t.speaker, words=[])
                for t in turns]
    path.write_text(json.dumps(dict(segments=segments)))


def write_csv(path, turns):
    quoted = [(t.speaker, f'"{t.text}"', t.start, t.end) for t in turns]
    lines = ["User,Message,Begin,End", *(",".join(map(str, q)) for q in quoted)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def write_jsonl(path, turns):
    path.write_text("".join(json.dumps(dict(name=t.speaker, utterance=t.text, onset=t.start,
                                            duration=t.end - t.start)) + "\n" for t in turns))


def write_rttm_and_words(path, turns):
    stretches = [f"SPEAKER talk 1 {t.start:.3f} {t.end - t.start:.3f} <NA> <NA> {t.speaker} "
                 "<NA> <NA>\n" for t in turns]
    path.with_suffix(".rttm").write_text("".join(stretches))
    words = []
    for t in turns:
        said = t.text.split()
        step = (t.end - t.start)/len(said)
        words += [dict(word=w, start=t.start + i*step, end=t.start + (i + 1)*step)
                  for i, w in enumerate(said)]
    segment = dict(start=0, end=words[-1]["end"], text="", words=words)
    path.write_text(json.dumps(dict(segments=[segment])))


WRITERS = {"a.srt": write_srt, "a.vtt": write_vtt, "a.ass": write_ass, "a.TextGrid": write_textgrid,
           "a16.TextGrid": write_textgrid, "a.eaf": write_eaf, "x.json": write_whisperx,
           "a.csv": write_csv, "a.jsonl": write_jsonl, "words.json": write_rttm_and_words}


def read_back(folder, name):
    speakers = folder/"words.rttm" if name == "words.json" else None
    return read_transcript(folder/name, speakers)
