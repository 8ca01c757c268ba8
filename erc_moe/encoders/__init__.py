"Stage 1: transformers tuned to embed single utterances of text and speech."
