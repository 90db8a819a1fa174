"""The experiments behind the paper's tables, and the lab's: which runs, as config file + overrides.

python -m ambijax.tables --table 2 --corpus cremad --checkpoint /path/to/Qwen2-Audio-7B-Instruct --out runs/tables
python -m ambijax.tables --lab --out runs/lab
"""

# Row of a table -> (config file, what it changes there). No steps: the start is evaluated as it is.
METHODS = {
    "base": ("sft", {"steps": 0}),
    "Audio-Reasoner": ("audio_reasoner", {}),  # its own checkpoint: --audio_reasoner; its own way to ask
    "SFT": ("sft", {}),
    "DPO": ("dpo", {}),
    "GRPO": ("grpo", {}),
    "GRPOz": ("grpoz", {}),
    "SFT, no KL": ("sft", {"loss.lambda_kl": 0.0}),
    "DPO, no KL": ("dpo", {"loss.lambda_kl": 0.0}),
    "SFT, no CoT": ("sft", {"data.cot": False}),
}

# Table -> its rows. "-> other" tests what the row above it learned on the corpus it has not seen.
TABLES = {
    "2": ("base", "Audio-Reasoner", "SFT", "DPO", "GRPO", "GRPOz"),
    "3": ("SFT", "SFT, no CoT", "SFT -> other", "SFT, no CoT -> other"),
    "figure2": ("SFT", "SFT, no KL", "DPO", "DPO, no KL"),
}
OTHER = {"cremad": "iemocap", "iemocap": "cremad", "tiny": "tiny_iemocap", "tiny_iemocap": "tiny"}
FOLDS = 5  # paper, for IEMOCAP; unknown for CREMA-D

# How intervals are made: see significance.py. 95 % from so many draws is stable to the third digit.
BOOTSTRAP = {"seed": 0, "samples": 4000, "level": 0.95}
ALPHA = 0.05  # of the corrected tests

# The lab: every method on both synthetic corpora, what one learned of the first tested on the second. Seed s trains
# and tests on fold s mod 5 as well, so that five seeds test every speaker once.
_SHARED = ("base", "SFT", "DPO", "GRPO", "GRPOz", "SFT, no KL", "DPO, no KL")
LAB = {
    "tiny": (*_SHARED, "SFT, no CoT", "SFT -> other", "SFT, no CoT -> other"),
    "tiny_iemocap": _SHARED,
}
LAB_SEEDS = 5
# Settings of the lab by config file; what is not here is the file's own `tiny`. Every method sees the same 160 prompts
# in the same order, in as many updates of the same learning rate: the one of `configs/sft.py:tiny`. Two cores set
# their number: five seeds are 65 trainings.
_LAB = {"steps": 40, "data.batch_size": 4, "optim.learning_rate": 2e-3, "checkpoint.every": 20}
LAB_SETTINGS = {
    "sft": _LAB,
    "dpo": _LAB,
    "grpo": {**_LAB, "grpo.samples": 4},  # half of K: the roll-out is most of a step
    "grpoz": {**_LAB, "grpo.samples": 4},
}
# The ten-minute version: one seed, half the clips, and so short that only gross differences show.
_QUICK = {"steps": 12, "data.batch_size": 4, "eval.max_clips": 40}
QUICK_SETTINGS = {
    "sft": _QUICK,
    "dpo": _QUICK,
    "grpo": {**_QUICK, "grpo.samples": 4},
    "grpoz": {**_QUICK, "grpo.samples": 4},
}

# The paper's orderings in JS, stated before any run: (claim, row with the lower JS, row with the higher JS, whether the
# claim is that they are close, corpora). The lab's corpora stand for CREMA-D (tiny) and IEMOCAP (tiny_iemocap).
_BOTH = ("tiny", "tiny_iemocap")
ORDERINGS = (
    ("the objective helps", "SFT", "base", False, _BOTH),  # .21 < .25, .29 < .40
    ("preferences help", "DPO", "base", False, _BOTH),  # .17 < .25, .23 < .40
    ("preferences beat imitation", "DPO", "SFT", False, _BOTH),  # .17 < .21, .23 < .29
    ("reward alone hardly helps", "GRPO", "base", True, _BOTH),  # .25 and .25, .36 and .40
    ("gold in the group helps", "GRPOz", "GRPO", False, _BOTH),  # .20 < .25, .20 < .36
    ("gold in the group beats imitation", "GRPOz", "SFT", False, _BOTH),  # .20 < .21, .20 < .29
    ("on CREMA-D preferences are best", "DPO", "GRPOz", False, ("tiny",)),  # .17 < .20
    ("on IEMOCAP gold in the group is best", "GRPOz", "DPO", False, ("tiny_iemocap",)),  # .20 < .23
    ("KL helps SFT", "SFT", "SFT, no KL", False, _BOTH),  # Figure 2
    ("KL helps DPO", "DPO", "DPO, no KL", False, _BOTH),  # Figure 2
    ("reasoning hardly matters in its domain", "SFT", "SFT, no CoT", True, ("tiny",)),  # .21 and .22
    ("reasoning helps in another domain", "SFT -> other", "SFT, no CoT -> other", False, ("tiny",)),  # .38 < .52
)
CLOSE = 0.05  # bits; the paper's GRPO and base differ by .04 on IEMOCAP and by nothing on CREMA-D
