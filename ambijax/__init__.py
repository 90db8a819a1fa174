"""ambijax: post-train audio language models on ambiguous emotion, in JAX.

model = ambijax.load("runs/tiny")
model.predict(["clip.wav"])[0].distribution
"""

__version__ = "0.1.0"


def load(run, *, base=False):
    """Opens a run directory for prediction; see `ambijax.predict.load`."""
    from ambijax import predict  # here, so that `import ambijax` stays instant

    return predict.load(run, base=base)
