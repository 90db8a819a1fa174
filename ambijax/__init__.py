"""ambijax: post-train audio language models on ambiguous emotion, in JAX.

model = ambijax.load("runs/tiny")
model.predict("clip.wav").distribution
"""

__version__ = "0.1.0"


def load(model, *, base=False, labels=None, checkpoint=None):
    """Opens a run, an export or a checkpoint for prediction; see `ambijax.listener.load`."""
    from ambijax import listener  # here, so that `import ambijax` stays instant

    return listener.load(model, base=base, labels=labels, checkpoint=checkpoint)
