"The systems that the papers' tables compare with, a module each: the same contract as every model, the equations of their papers."
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
