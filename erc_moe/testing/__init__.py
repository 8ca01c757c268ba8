"What a model, a corpus and a feature extractor of your own must keep, checked: `check_model(MyModel)`."
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
