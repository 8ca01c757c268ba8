"Scores of predictions, how far they can be trusted, and whether two systems differ."
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
