"""Render the speech of the sample corpus with espeak-ng: `python tools/render_sample.py [utterance
id ...]` (all by default).

Reads erc_moe/sample/conversations.csv and writes erc_moe/sample/audio/*.opus. Everything random is
drawn from a generator seeded
with a hash of the utterance, conversation or speaker, so that one espeak-ng version always gives
the same samples. (The Ogg
container carries a random stream number: rendering again changes the files' bytes, not their
sound.)

How an utterance gets its voice:

1. The speaker's name draws a voice, a base pitch and a pace, the same throughout.
2. The emotion shifts nine measures of prosody (`EMOTIONS`), scaled by a strength drawn per
utterance. Some utterances are spoken
   with next to no emotion in the voice (`FLAT`), and every measure carries jitter (`JITTER`), so
   the emotions overlap.
3. espeak-ng speaks with that pitch, range and rate. Signal processing adds the rest: a bend of the
last syllables, tremor, creak,
   spectral tilt and loudness.
4. The conversation's room (a short decaying echo) and its background noise (pink) are added.
"""
import csv
import hashlib
import io
import subprocess
import sys
from multiprocessing import Pool
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import soundfile as sf
from scipy.interpolate import make_interp_spline
from scipy.signal import fftconvolve, resample_poly

SAMPLE = Path(__file__).resolve().parent.parent / "erc_moe" / "sample"
RATE = 16000
ESPEAK_VERSION = "1.51"   # made the shipped files; another version speaks a little differently

EMOTIONS = {   # shift of each measure at strength 1, from the speaker's own
    #             pitch  range  rate   gain  tilt     bend       tremor     creak  pause
    #             semit. %      log    dB    dB/oct.  semitones  semitones  depth  s
    "neutral":  [  0.0,    0,   0.00,  0.0,   0.0,     0.0,       0.00,      0.0,  0.00],
    "surprise": [  3.5,   60,   0.00,  1.5,   0.5,     4.0,       0.00,      0.0,  0.05],
    "fear":     [  2.5,  -40,   0.20, -3.0,  -0.5,     0.5,       0.60,      0.0,  0.00],
    "sadness":  [ -2.0,  -50,  -0.20, -4.0,  -2.0,    -2.0,       0.10,      0.1,  0.15],
    "joy":      [  2.0,   60,   0.08,  2.0,   1.0,     0.5,       0.00,      0.0,  0.00],
    "disgust":  [ -1.5,   20,  -0.16,  0.0,  -0.5,    -2.0,       0.00,      0.5,  0.10],
    "anger":    [  0.5,   20,   0.10,  5.0,   2.0,    -1.5,       0.00,      0.2,  0.00]}
# standard deviation
JITTER =        [  1.2,   25,   0.08,  2.0,   0.8,     1.0,       0.12,      0.1,  0.05]
FLAT = 0.22    # share of utterances whose voice gives next to nothing away

HIGH_VOICES = [
    "en-us+f1", "en-us+f2", "en-gb+f3", "en-gb-x-rp+f4", "en-us+Annie", "en-us+linda",
    "en-gb-scotland+f2", "en-029+f3", "en-us-nyc+f5", "en-gb+Andrea", "en-us+belinda",
    "en-gb-x-gbclan+f4", "en-gb+aunty", "en-us+steph"]
LOW_VOICES = [
    "en-us", "en-us+m1", "en-gb+m3", "en-gb-x-rp+m4", "en-us+m7", "en-gb-scotland+m2", "en-029+m3",
    "en-us-nyc+m6", "en-gb+Alex", "en-us+adam", "en-gb-x-gbclan+m7", "en-gb-x-gbcwmd+m1",
    "en-us+Marco", "en-gb+Lee"]
LOW_SPEAKERS = set(
    """Jonas, Tobias, Felix, Pavel, Hugo, Idris, Kofi, Darius, Emeka, Ravi, Noel, Bartek, Owen, Marlon, Dimitri, Linus,
Bruno, Milo, Mr. Abebe, Joost, Mr. Varga, Simon, Ivo, Chidi, Hakan, Anton, Coach Bell, Sergio, Leon, Cyrus, Ruben, Old Feng, Colin,
Nils, Basil, Malik, Theo, Gus, Viktor, Samir, Coach Ruiz, Kwame, Jun, Mattis, Caspian, Yusuf, Piet, Elio, Terence, Arun, Mr. Lund,
Kaito, Mr. Osei, Taavi, Benedikt, Lou, Miguel, Rafiq, Gareth, Tunde, Rui, Dwayne, Leopold, Sid, Mateo, Pascal, Enzo, Gerald, Ansel,
Lars, Abel, Ikaika, Xavi, Ozan, Joaquin, Ulrik, Alfons, Tor""".replace("\n", " ").split(", ")
)


def generator(*names: str) -> np.random.Generator:
    "A random generator that depends on `names` alone."
    return np.random.default_rng(
        int.from_bytes(hashlib.sha256("/".join(names).encode()).digest()[:8], "big"))


def prosody(utterance: str, emotion: str) -> np.ndarray:
    "The nine measures with which an utterance is spoken, as shifts from its speaker's own."
    rng = generator("prosody", utterance)
    strength = rng.uniform(0.0, 0.25) if rng.random() < FLAT else rng.uniform(0.6, 1.3)
    return strength * np.array(EMOTIONS[emotion]) + rng.normal(0, JITTER)


def speak(text: str, speaker: str, pitch: float, range: float, rate: float) -> np.ndarray:
    "espeak-ng's samples at 16 kHz in the voice of `speaker`, without the silence around them."
    rng = generator("speaker", speaker)
    voices = LOW_VOICES if speaker in LOW_SPEAKERS else HIGH_VOICES
    voice, pitch, rate = (
        voices[rng.integers(len(voices))], pitch + rng.normal(0, 1.2), rate + rng.normal(0, 0.05))
    wav = subprocess.run(
        [
            "espeak-ng",
            "-m",
            "--stdout",
            "-v",
            voice,
            # 5.7 of its steps are a semitone
            "-p",
            f"{np.clip(45 + 5.7 * pitch, 0, 99):.0f}",
            "-s",
            f"{165 * np.exp(rate):.0f}",  # words per minute
            '<speak><prosody '
            f'range="{np.clip(100 + range, 20, 220):.0f}%">{escape(text)}</prosody></speak>',
        ],
        capture_output=True,
        check=True,
    ).stdout
    samples, native = sf.read(io.BytesIO(wav))
    heard = np.flatnonzero(np.abs(samples) > 0.005)
    return resample_poly(samples[heard[0]:heard[-1] + 1], RATE, native)


def warp(x: np.ndarray, semitones: np.ndarray) -> np.ndarray:
    "Play `x` at a varying speed, `semitones` (T,) above or below its own."
    clock = np.cumsum(2 ** (-semitones / 12))   # when each sample of x is heard
    position = np.interp(np.arange(int(clock[-1])), clock, np.arange(len(x)))
    return make_interp_spline(np.arange(len(x)), x, k=3)(position)


def pink(n: int, rng: np.random.Generator) -> np.ndarray:
    "Pink noise of standard deviation 1."
    noise = np.fft.irfft(
        np.fft.rfft(rng.standard_normal(n)) / np.sqrt(np.maximum(np.fft.rfftfreq(n, 1 / RATE), 20)),
        n)
    return noise / noise.std()


def render(conversation: str, utterance: str, speaker: str, text: str, label: str) -> np.ndarray:
    "The samples of one utterance, float64 (T,) at 16 kHz, before compression."
    pitch, range, rate, gain, tilt, bend, tremor, creak, pause = prosody(utterance, label)
    rng = generator("signal", utterance)
    x = speak(text, speaker, pitch, range, rate)

    t = np.arange(len(x)) / RATE
    last_syllables = np.clip(1 - (t[-1] - t) / 0.45, 0, 1) ** 2
    x = warp(
        x,
        bend * last_syllables
        + max(tremor, 0) * np.sin(2 * np.pi * (rng.uniform(5, 7) * t + rng.random())))
    x *= 1 - np.clip(creak, 0, 0.8) * (
        np.sin(2 * np.pi * rng.uniform(35, 50) * np.arange(len(x)) / RATE) > 0)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(x), 1 / RATE), 100) / 500)
    x = np.fft.irfft(np.fft.rfft(x) * 10 ** (tilt * octaves / 20), len(x))
    x *= 10 ** ((gain - 27) / 20) / x.std()

    room = generator("room", conversation)
    decay, wet, floor = room.uniform(0.03, 0.12), room.uniform(0.05, 0.35), room.uniform(-62, -46)
    echo = room.standard_normal(int(0.4 * RATE)) * np.exp(
        -np.arange(int(0.4 * RATE)) / RATE / decay)
    x = np.concatenate([np.zeros(int((0.1 + max(pause, 0)) * RATE)), x, np.zeros(int(0.25 * RATE))])
    x = x + wet * fftconvolve(x, echo / np.linalg.norm(echo))[:len(x)]
    x = x + 10 ** ((floor + rng.normal(0, 2)) / 20) * pink(len(x), rng)
    return x * min(1, 0.97 / np.abs(x).max())


def rows() -> list[dict[str, str]]:
    "The rows of conversations.csv; `utterance` is the id, which the sound file is named after."
    with open(SAMPLE / "conversations.csv", newline="", encoding="utf-8") as f:
        return [row | {"utterance": Path(row["audio"]).stem} for row in csv.DictReader(f)]


def write(row: dict[str, str]):
    "Render one row and write its compressed file."
    samples = render(*(row[k] for k in ("conversation", "utterance", "speaker", "text", "label")))
    sf.write(
        SAMPLE / row["audio"], samples, RATE, format="OGG", subtype="OPUS", compression_level=0.95)


if __name__ == "__main__":
    with Pool() as pool:
        pool.map(
            write, [row for row in rows() if row["utterance"] in sys.argv[1:] or not sys.argv[1:]])
