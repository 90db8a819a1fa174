"""GRPO: roll-outs rewarded for a read-out close to the votes and for the format (paper, equations 6 and 7).

python -m ambijax.train --config configs/grpo.py:tiny --workdir runs/grpo_tiny
python -m ambijax.train --config configs/grpo.py:cremad --workdir runs/grpo_cremad
python -m ambijax.train --config configs/grpo.py:iemocap --workdir runs/grpo_iemocap
"""

from ml_collections import ConfigDict

from configs import base


def get_config(corpus: str = "cremad") -> ConfigDict:
    c = base.get_config(corpus)
    c.algorithm = "grpo"
    c.optim.learning_rate = 2e-5  # paper
    c.data.batch_size = 4  # prompts; the group multiplies it

    c.reward = ConfigDict()  # R = w_js (1 - JS) + w_fmt format
    c.reward.w_js = 1.0  # unknown
    c.reward.w_fmt = 1.0  # unknown
    c.reward.format = "exact"  # 1 when the format is followed to the letter, else 0; or partial credit; unknown

    c.grpo = ConfigDict()
    c.grpo.samples = 8  # K; unknown
    c.grpo.temperature = 1.0  # of sampling, and of pi in the loss, gold's share included
    c.grpo.updates = 1  # mu: updates a roll-out
    # True: the update differentiates what the roll-out computed instead of computing it again. At 7B that is 2.7 MB for
    # each token of the batch until then (docs/recipes.md), and logp_gap compares no more than the head.
    c.grpo.keep_activations = False
    c.grpo.eps_low = 0.2  # clip range of the ratio pi / pi_old
    c.grpo.eps_high = 0.2  # DAPO raises it to 0.28
    c.grpo.beta_kl = 0.04  # weight of k3(ref, pi); 0 skips the reference forward pass
    c.grpo.aggregate = "sequence_mean"  # paper; or token_mean over the batch (DAPO), constant_length (Dr. GRPO)
    c.grpo.scale = "std"  # A = (R - mean) / (std + eps); or none (Dr. GRPO)
    c.grpo.ddof = 1  # sample standard deviation
    c.grpo.eps = 1e-4
    c.grpo.min_std = 0.0  # a floor keeps groups that are all alike from blowing noise up to advantages of one
    # What only GRPOz reads: the curated trajectory as member K + 1 of the group.
    c.grpo.gold_reward = "maximal"  # paper: the gold reward is the maximum; or measured
    # In the surrogate, too; with statistics only, the samples' advantages sum to a push away from all of them. L_KL and
    # plain cross entropy on gold have weights of their own: loss.lambda_kl and grpo.gold_ce.
    c.grpo.gold_in_loss = True
    c.grpo.gold_ce = 0.0  # weight of plain cross entropy on gold, beside its share of the surrogate
    c.grpo.gold_gamma = 0.0  # > 0 shapes gold's surrogate to p / (p + gamma)
    c.grpo.gold_adv_clip = float("inf")  # largest advantage of gold
    if corpus.startswith("tiny"):
        c.steps = 70
        c.data.batch_size = 4
        c.optim.learning_rate = 1e-3  # a model this small takes far larger steps
        # The tiny base is so certain of one label that L_KL starts at four nats. At weight 1 it drowns everything else
        # and one completion in ten loses the format (docs/log.md).
        c.loss.lambda_kl = 0.1
        c.grpo.gold_ce = 1.0  # the ratio of L_KL to cross entropy decides (docs/log.md)
    return c
