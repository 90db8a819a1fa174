"""How the tiny lab's base model was made: every weight trained from random, to follow the format with hard labels.

    python -m ambijax.tiny.make --out runs/make_tiny

runs this with the corpus, tokenizer and random checkpoint that it makes first. Cross entropy covers the class word and
the soft label is not used, so that the model starts where the paper's base starts: collapsed to one label.
"""

from ml_collections import ConfigDict

from configs import sft


def get_config(corpus: str = "tiny") -> ConfigDict:
    c = sft.get_config(corpus)
    c.steps = 2200
    c.data.batch_size = 16
    c.data.speakers = 100
    c.data.clips_per_speaker = 40
    c.data.seed = 7  # other speakers than those of the experiments
    c.lora.dropout = 0.0
    c.loss.lambda_kl = 0.0
    c.loss.chunk = 112  # a vocabulary this small needs no slices
    c.optim.train = ("params/.*",)
    c.optim.learning_rate = 1.5e-3
    c.optim.weight_decay = 0.01
    c.eval.max_clips = 160
    c.checkpoint.every = 400
    c.log_every = 20
    return c
