"""What all experiments share, and the corpora they can run on: `get_config('tiny' | 'tiny_iemocap' | 'cremad' |
'iemocap')`.

Every number of an experiment stands in this directory, none in the package. "Paper" marks what the paper states;
"unknown" marks what it leaves open and we had to choose. An algorithm's own file changes only what it is about.
"""

import os
from importlib import resources

from ml_collections import ConfigDict

from ambijax import emotions

CACHE = (os.environ.get("XDG_CACHE_HOME") or "~/.cache") + "/ambijax"  # where compiled programs are kept, too


def get_config(corpus: str) -> ConfigDict:
    """The common part of every experiment on one corpus."""
    c = ConfigDict()
    c.seed = 0
    c.algorithm = "sft"  # sft | dpo | grpo | grpoz
    c.steps = 3000  # unknown; CREMA-D's training folds are 550 batches of 8 an epoch. 0: evaluate the start
    c.init_from = ""  # a run or a PEFT directory to take adapters from; the paper's DPO and GRPO start from the base

    c.model = ConfigDict()
    c.model.checkpoint = "Qwen2-Audio-7B-Instruct"  # Hugging Face directory, or one written by ambijax.convert
    c.model.dtype = "bfloat16"  # of base weights and activations; adapters, norms and softmax stay float32
    c.model.weights = "float"  # int8: the decoder layers' matrices in half the memory; logits .3 % off (docs/int8.md)
    c.model.cache = "float"  # int8: keys and values of a roll-out in about half the memory (docs/int8.md)
    # In float32 on one CPU device "xla" is kernels of our own (ambijax/model/cpu_kernels.py).
    c.model.attention = "xla"  # of tower and prompt; cudnn on GPUs, splash on TPUs: fused kernels, not measured yet
    c.model.decoding = "xla"  # attention of roll-outs; triton on a GPU: two kernels a layer, no slot read in vain
    # A layer keeps what its matrix products made, 2.7 MB a token at 7B, and computes norms, rope and softmax again: a
    # quarter less arithmetic in an update than "nothing_saveable", which keeps nothing and is what a full chip needs.
    c.model.remat = "products_saveable"

    c.lora = ConfigDict()
    c.lora.rank = 8  # paper: r = 8, alpha = 16 on attention and feed-forward projections
    c.lora.alpha = 16.0
    c.lora.dropout = 0.0  # in RL the policy that samples and the one that learns must agree
    c.lora.audio_tower = False  # the tower is frozen, so that its output is computed once a clip

    # Product = number of devices; -1 takes what the others leave. Sampling and evaluation read every weight for every
    # token: split by heads each chip reads its own, split by fsdp it would gather all of them first, in 35 times the
    # time. An SFT update of eight prompts is faster split by heads, too (docs/scaling.md).
    c.mesh = ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = 1
    c.mesh.tensor = -1

    c.hosts = ConfigDict()  # of a run on several machines
    c.hosts.heartbeat = 100  # seconds without a sign of life until a process counts as dead; jax's own default
    c.hosts.start = 300  # seconds to wait for all processes at the start; jax's own default

    c.data = ConfigDict()
    c.data.batch_size = 8  # prompts a step, over all devices; unknown
    # Lengths in 10 ms mel frames that clips are put into; a batch takes the smallest that holds its longest clip, and
    # the slots of the split's longest prompt there. Each is another set of programs, compiled when a first batch falls
    # into it and not before: CREMA-D's clips need two of them, and a 12 s clip of IEMOCAP does not pay for 30 s.
    c.data.windows = (256, 512, 768, 1024, 1536, 2048, 3000)
    c.data.features = f"{CACHE}/features"  # outputs of the frozen tower, a clip's made once ever; "" keeps none
    c.data.max_tokens = 256  # completion length; the paper's chains of thought are about 150 words
    c.data.pack = False  # True: padding is left out between attentions; exact, with up to four programs for one
    c.data.cot = True  # False: answer without reasoning (Table 3)
    c.data.gold_label = "argmax"  # class word of the curated trajectory; unknown, alternative: sample from the votes

    c.prompt = ConfigDict()
    c.prompt.style = "steps"  # paper: keywords, three steps, answer; audio_reasoner is the published baseline's own

    c.optim = ConfigDict()
    c.optim.train = ("lora/.*",)  # regular expressions over variable paths; the rest is frozen
    c.optim.learning_rate = 1e-4  # paper, for SFT
    c.optim.warmup = 0.03  # paper: linear over 3 % of the steps, then cosine to zero
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.0  # unknown; LoRA is its own regulariser
    c.optim.clip = 1.0  # global norm; unknown
    c.optim.accumulate = 1  # parts a batch is collected and updated in: less memory, the same update
    c.optim.micro_batch = 0  # prompts of a part whose gradient is formed at once, in the update alone; 0: all of it

    c.loss = ConfigDict()
    c.loss.lambda_ce = 1.0  # unknown; of SFT and DPO, in GRPOz it is grpo.gold_ce
    c.loss.lambda_kl = 1.0  # unknown; not in GRPO; while it is on, CE leaves the class word out: both fight there
    c.loss.kl_direction = "forward"  # paper: KL(p || phat) covers all votes; or reverse, which seeks one mode
    c.loss.reverse_floor = 0.01  # reverse alone: share of uniform votes, lest a class without any costs infinity
    c.loss.chunk = 32  # completion positions per slice of vocabulary logits; bounds memory, changes nothing

    c.readout = ConfigDict()
    c.readout.temperature = 1.0  # divides the class logits

    c.guard = ConfigDict()
    c.guard.max_skipped = 10  # batches skipped in a row that stop the run: a bad clip is one, bad settings are all
    c.guard.spike_sigma = 0.0  # > 0 also skips losses so far above the mean; 6 is safe, 0 leaves outliers to the clip
    c.guard.spike_window = 128  # applied updates over which mean and deviation are taken

    c.warn = ConfigDict()  # a roll-out metric beyond its threshold is said once
    c.warn.degenerate = 0.9  # above: share of prompts whose roll-outs all earn the same; none is preferred to another
    c.warn.format = 0.5  # below: format reward; the paper's runs stay above .9
    c.warn.tokens = 16.0  # below: mean completion length; the curated ones are about 90 tokens or more
    c.warn.logp_gap = 0.1  # above: nats a token between decoding and scoring; float32 has 1e-6, an int8 cache 1e-3

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps
    c.checkpoint.seconds = 600.0  # or so much time, whichever comes first: what a kill costs at most
    c.checkpoint.keep = 2
    c.checkpoint.grace = 8.0  # seconds after SIGTERM for the step under way; schedulers kill after 10 to 30

    c.eval = ConfigDict()
    c.eval.batch_size = 16  # clips at once
    c.eval.max_clips = -1  # of the test split, evenly spaced, for a manifest goes by speakers; -1: all
    c.eval.every = 0  # steps between evaluations on dev, and one at the end; 0: none, the paper selects nothing
    c.eval.dev_clips = 256  # of dev for these, evenly spaced; JS has a deviation of .15, so their mean is sure to .01
    c.eval.metric = "js"  # of dev, the lower the better: the checkpoint where it is lowest is kept; or brier, kl
    c.eval.checkpoint = "last"  # or best: which one is the run's model, for the test split and for other commands
    c.eval.resamples = 2000  # bootstrap draws; the ends of a 95 % interval then move by 2 % of its width
    c.eval.level = 0.95  # of confidence
    c.eval.cluster = "utterance"  # what is drawn: utterance, or speaker with all he says (from ten speakers on)
    c.eval.draws = 100  # random halves and panels of an utterance's annotators, for the human ceiling
    c.eval.base = True  # also evaluate the base without adapters; a table needs that once, not in every run

    c.log_every = 10  # steps
    c.watchdog_seconds = 1800.0  # a step that takes longer leaves all stacks in stacks-0.txt; 7B compiles in minutes
    c.tracker = ""  # tensorboard | wandb | trackio: sends metrics and a table of predictions there, too
    c.tracker_audio = False  # with sounds, transcripts and reasonings; IEMOCAP's licence forbids that

    variants = {"tiny": _tiny, "tiny_iemocap": _tiny_iemocap, "cremad": _cremad, "iemocap": _iemocap}
    if corpus not in variants:
        raise ValueError(f"no variant {corpus!r}; choose one of {', '.join(variants)}, as in configs/sft.py:tiny")
    variants[corpus](c)
    return c


def _cremad(c: ConfigDict) -> None:
    c.data.corpus = "manifest"  # written by: python -m ambijax.prepare --corpus=cremad
    c.data.root = "data/cremad"
    c.data.labels = emotions.CREMAD
    c.data.fold = 0  # five speaker-independent folds; unknown in the paper
    c.data.dev = "next_fold"


def _iemocap(c: ConfigDict) -> None:
    c.data.corpus = "manifest"  # written by: python -m ambijax.prepare --corpus=iemocap
    c.data.root = "data/iemocap"
    c.data.labels = emotions.IEMOCAP
    c.data.fold = 0  # paper: leave one session out, five folds
    c.data.dev = "groups"  # a tenth of the training dialogs: a whole session would be too much


def _tiny(c: ConfigDict) -> None:
    """The tiny lab: a Qwen2-Audio of three million parameters that ships with the package, on synthetic speech."""
    c.model.checkpoint = str(resources.files("ambijax") / "tiny")
    c.model.dtype = "float32"  # two CPU cores
    c.mesh.data = -1
    c.mesh.tensor = 1
    c.data.corpus = "synthetic"  # written to data.root when it is not there
    c.data.like = "cremad"  # six classes, fixed neutral sentences, 4 to 12 listeners, a wide and quiet channel
    c.data.root = "runs/corpora/tiny"
    c.data.labels = emotions.CREMAD
    c.data.fold = 0
    c.data.dev = "next_fold"
    c.data.windows = (256,)  # clips of 1.0 to 2.4 s
    c.data.max_tokens = 112  # the offline teacher writes about 60 words
    c.data.speakers = 25
    c.data.clips_per_speaker = 16
    c.data.seed = 2026  # of the corpus; the tiny model was trained on other speakers
    c.eval.batch_size = 40
    c.checkpoint.every = 20
    c.log_every = 1


def _tiny_iemocap(c: ConfigDict) -> None:
    """The tiny lab's other corpus: as different from `tiny` as IEMOCAP is from CREMA-D."""
    _tiny(c)
    c.data.like = "iemocap"  # four classes, free sentences that carry feeling, 3 listeners, a narrow and noisy channel
    c.data.root = "runs/corpora/tiny_iemocap"
    c.data.labels = emotions.IEMOCAP
    c.data.speakers = 20  # four a fold; with the two of IEMOCAP's sessions five folds could show next to nothing
    c.data.clips_per_speaker = 20
    c.data.seed = 2027
    c.data.max_tokens = 128  # words the tiny tokenizer has not seen take more tokens
