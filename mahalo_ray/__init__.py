"""Multi-objective alignment of language models on Ray, with a balance chosen per request."""

__version__ = "0.1.0"
