"Stage 1: transformers tuned to embed single utterances of text and speech."
from .beats import Beats, BeatsConfig
from .salmonn import Salmonn, SalmonnConfig
from .speech import EmotionSpeechEncoder, SpeechEncoderConfig
from .text import EmotionTextEncoder, TextEncoderConfig
from .utterance import ENCODERS, EncoderConfig, UtteranceEncoder, load_encoder

__all__ = ["Beats", "BeatsConfig", "ENCODERS", "EmotionSpeechEncoder", "EmotionTextEncoder", "EncoderConfig", "Salmonn", "SalmonnConfig", "SpeechEncoderConfig",
           "TextEncoderConfig", "UtteranceEncoder", "load_encoder"]
