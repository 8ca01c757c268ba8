"Emotion recognition in conversations by mixtures of experts: `erc_moe.load(\"meld\").predict(...)`."
from importlib import import_module

__version__ = "0.1.0"
__all__ = ["Predictor", "load"]


def lazily(package, places):
    "A `__getattr__` (PEP 562): a name's module is imported when the name is first asked for."
    def get(name):
        if name not in places: raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{places[name]}"), name)
    return get


__getattr__ = lazily(__name__, dict(Predictor="predict", load="predict"))
