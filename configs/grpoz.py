"""GRPOz: GRPO with the curated trajectory as one more member of every group (paper, equation 7).

python -m ambijax.train --config configs/grpoz.py:tiny --workdir runs/tiny            two CPU cores, no weights
python -m ambijax.train --config configs/grpoz.py:cremad --workdir runs/grpoz_cremad  CREMA-D, Qwen2-Audio-7B
python -m ambijax.train --config configs/grpoz.py:iemocap --workdir runs/grpoz_iemocap
"""

from ml_collections import ConfigDict

from configs import grpo


def get_config(corpus: str = "cremad") -> ConfigDict:
    c = grpo.get_config(corpus)
    c.algorithm = "grpoz"
    return c
