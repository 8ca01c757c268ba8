"The models of the papers' tables, small ones of their own: what MiSTER-E and SURE are worth is measured beside them."
from .context_free import ContextFree, ContextFreeConfig, ContextFreeOutput

__all__ = ["ContextFree", "ContextFreeConfig", "ContextFreeOutput"]
