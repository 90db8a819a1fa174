"""SFT: cross entropy of the curated trajectory + forward KL of the read-out to the votes (paper, equation 3).

    python -m ambijax.train --config configs/sft.py:tiny --workdir runs/sft_tiny          two CPU cores, no weights
    python -m ambijax.train --config configs/sft.py:cremad --workdir runs/sft_cremad      CREMA-D, Qwen2-Audio-7B
    python -m ambijax.train --config configs/sft.py:iemocap --workdir runs/sft_iemocap

Ablations (paper, Table 3 and Figure 2): --config.loss.lambda_kl=0, --config.loss.lambda_ce=0, --config.data.cot=False
"""

from ml_collections import ConfigDict

from configs import base


def get_config(corpus: str = "cremad") -> ConfigDict:
    c = base.get_config(corpus)
    c.algorithm = "sft"
    c.optim.learning_rate = 1e-4  # paper
    c.lora.dropout = 0.05  # unknown
    if corpus.startswith("tiny"):
        c.steps = 120
        c.data.batch_size = 16
        c.optim.learning_rate = 2e-3  # a model this small takes far larger steps
    return c
