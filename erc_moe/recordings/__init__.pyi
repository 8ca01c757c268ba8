"Recordings: any sound or video file, any transcript, and the conversation that they make."
from .core import join_scene, load_recording
from .listen import listen, load_whisper
from .sound import prepare_sounds, read_sound, resample, sound_fault, sound_key, sound_length
from .transcripts import read_transcript
from .turns import Turn
