"Features: frozen text embeddings, openSMILE functionals, precomputed arrays; stored, standardised, attached to conversations."
from .importers import LAYOUTS, ImportedFeatures, Layout, import_features
from .pickles import read_pickle
from .pipeline import FeaturePipeline, cache_folder
from .speech import OPENSMILE_SETS, OpenSmile, read_audio
from .store import Extractor, FeatureStore, atomic_write, extract
from .text import TextEncoder
