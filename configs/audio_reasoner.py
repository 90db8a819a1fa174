"""Audio-Reasoner, the published Qwen2-Audio checkpoint with tags of its own that the paper compares with (Table 2).

python -m ambijax.evaluate --checkpoint Audio-Reasoner --config configs/audio_reasoner.py:cremad \
  --workdir runs/audio_reasoner_cremad

It is evaluated, not trained. It never writes our answer anchor, so its distribution is read out after an appended one.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(corpus: str = "cremad") -> ConfigDict:
    c = base.get_config(corpus)
    c.steps = 0
    c.prompt.style = "audio_reasoner"
    c.data.max_tokens = 112 if corpus.startswith("tiny") else 1024  # it plans, captions, reasons and sums up
    return c
