"""ambijax: post-train audio language models on ambiguous emotion, in JAX."""

__version__ = "0.1.0"
