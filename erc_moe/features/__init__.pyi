"Features: frozen text embeddings, openSMILE functionals, Praat's prosody, DenseNet faces, precomputed arrays; stored, standardised, attached to conversations."
from .importers import ImportedFeatures, import_features
from .layouts import LAYOUTS, FileLayout
from .pickles import read_pickle
from .pipeline import FeaturePipeline
from .prosody import Prosody8, prosody8
from .speech import OPENSMILE_SETS, OpenSmile
from .store import Extractor, FeatureStore, atomic_write, extract
from .text import TextEncoder
from .visual import DenseNet, DenseNetEncoder, read_frames
