"Recordings: any sound or video file, any transcript, and the conversation that they make."
from ..corpora import core as _            # first: the readers of tables import from here
from .sound import prepare_sounds, read_sound, resample, sound_fault, sound_key, sound_length
from .transcripts import Turn, read_transcript
from .core import join_scene, load_recording
from .listen import listen, load_whisper
