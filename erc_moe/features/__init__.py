"Features: frozen text embeddings, openSMILE functionals, Praat's prosody, DenseNet faces, precomputed arrays; stored, standardised, attached to conversations."
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
