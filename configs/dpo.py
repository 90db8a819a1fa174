"""On-policy DPO: the curated trajectory against a roll-out whose read-out is far from the votes (paper, equation 4).

python -m ambijax.train --config configs/dpo.py:tiny --workdir runs/dpo_tiny
python -m ambijax.train --config configs/dpo.py:cremad --workdir runs/dpo_cremad
python -m ambijax.train --config configs/dpo.py:iemocap --workdir runs/dpo_iemocap
"""

from ml_collections import ConfigDict

from configs import base


def get_config(corpus: str = "cremad") -> ConfigDict:
    c = base.get_config(corpus)
    c.algorithm = "dpo"
    c.optim.learning_rate = 5e-6  # paper

    c.dpo = ConfigDict()
    c.dpo.samples = 4  # roll-outs a prompt; unknown
    c.dpo.temperature = 1.0
    c.dpo.tau = 0.1  # bits: a roll-out is rejected when JS(p, phat) > tau; unknown
    c.dpo.negatives = "worst"  # worst | random | all of those above tau; unknown
    c.dpo.beta = 0.1  # unknown; the value of the DPO paper
    if corpus.startswith("tiny"):
        c.steps = 60
        c.data.batch_size = 8
        c.optim.learning_rate = 1e-3  # a model this small takes far larger steps
    return c
