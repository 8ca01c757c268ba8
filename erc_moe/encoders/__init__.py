"Stage 1: transformers tuned to embed single utterances of text and speech."
from .text import EmotionTextEncoder, TextEncoderConfig
from .utterance import ENCODERS, EncoderConfig, UtteranceEncoder, load_encoder

__all__ = ["ENCODERS", "EmotionTextEncoder", "EncoderConfig", "TextEncoderConfig", "UtteranceEncoder", "load_encoder"]
