"Corpora: what they become once read, and a reader for each."
from .core import SPLITS, Corpus, FeatureTable, plot_balance
from .registry import CORPORA, CorpusEntry, find_corpus, load_corpus, register_corpus
