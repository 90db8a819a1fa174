"""The model card of an export: what the weights are, what they learned from, how well they do, what they are not for.

Everything in it is read from the run: config.json, the corpus' own description, eval/test/summary.json.
"""

import dataclasses
import re
from pathlib import Path

from ml_collections import FrozenConfigDict

import ambijax
from ambijax import agent, assemble, manifest, reasoning
from ambijax.errors import DataError
from ambijax.evaluate import COLUMNS
from ambijax.workdir import read_object

PAPER = "Disentangling Reasoning in Large Audio-Language Models for Ambiguous Emotion Prediction"
CITATION = """@inproceedings{yu2026disentangling,
  title = {Disentangling Reasoning in Large Audio-Language Models for Ambiguous Emotion Prediction},
  author = {Yu and Dong and Honorio and Ghosh and Jia and Dang},
  booktitle = {Interspeech}, year = {2026}, note = {arXiv:2603.08230}
}"""
# What a corpus' description says -> what its licence asks of those who pass on a model.
_CORPUS_LICENCES = {
    "CREMA-D": "CREMA-D: database ODbL 1.0, contents DbCL 1.0; name it and its authors (Cao et al., 2014).",
    "IEMOCAP": "IEMOCAP: the USC licence, for research; neither audio nor transcripts may be passed on, and this "
    "directory holds none.",
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class About:
    """What an export knows of itself."""

    run: Path
    config: FrozenConfigDict
    kind: str  # peft | merged
    step: int  # updates done when these weights were saved
    best: bool  # chosen by dev score
    base_model: str
    licence: str


def render(about: About) -> str:
    """The card, Markdown with the header that the Hugging Face hub reads."""
    c = about.config
    described = _corpus_description(c)
    licences = [text for name, text in _CORPUS_LICENCES.items() if name in described]
    sections = {
        f"Emotion as a distribution: {agent.TITLES[c.algorithm]} on {Path(about.base_model).name}": _what(about),
        "Use": _use(about),
        "Data": f"{described}\n\nClasses: {', '.join(c.data.labels)}. The speakers of fold {c.data.fold} are held out.",
        "Training": _training(about),
        "Metrics": _metrics(about),
        "Intended use": "Research on how listeners disagree about emotion in speech: annotation studies, uncertainty, "
        "calibration. The output says how a group of listeners would label the voice, not what the speaker feels.",
        "Limits": "The classes are coarse and the listeners few, and from one culture each; acted speech is not "
        "spontaneous speech. The reasoning is generated text and may name cues that are not in the sound. Do not use "
        "it to judge, rank, hire, diagnose or watch people; in the EU, inferring emotions at work or in schools is "
        "prohibited (AI Act, article 5).",
        "Licence": "\n".join(
            f"- {line}"
            for line in (f"Base: the licence of {_named(about.base_model)} applies to what derives from it.", *licences)
        ),
        "Citation": f"```bibtex\n{CITATION}\n```",
    }
    (title, first), *rest = sections.items()
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in rest)
    return f"{_header(about)}\n# {title}\n\n{first}\n\n{body}\n"


def _header(about: About) -> str:
    named = _is_hub_name(about.base_model)
    tags = ["ambijax", "speech-emotion-recognition", "ambiguity", "qwen2-audio", *["lora"] * (about.kind == "peft")]
    lines = [
        *[f"base_model: {about.base_model}"] * named,
        f"library_name: {'peft' if about.kind == 'peft' else 'transformers'}",
        "pipeline_tag: audio-text-to-text",
        f"license: {about.licence}",
        f"tags: [{', '.join(tags)}]",
    ]
    return "\n".join(["---", *lines, "---"])


def _is_hub_name(base_model: str) -> bool:
    return bool(_HUB_NAME.fullmatch(base_model)) and not Path(base_model).exists()


def _named(base_model: str) -> str:
    """What strangers may call the base: its hub name, or of a directory of ours the last part."""
    return base_model if _is_hub_name(base_model) else Path(base_model).name


def _what(about: About) -> str:
    form = {
        "peft": "a LoRA adapter in PEFT's format",
        "merged": "a whole checkpoint, what was trained merged into the base weights",
    }[about.kind]
    reasons = ", reasons about words and voice," * about.config.data.cot
    return (
        f"This is {form}. It listens to a clip of speech{reasons} and predicts the distribution "
        f"of listeners' judgements over {len(about.config.data.labels)} emotions instead of one label. Method: "
        f"[{PAPER}](https://arxiv.org/abs/2603.08230), in the implementation of ambijax {ambijax.__version__}."
    )


def _use(about: About) -> str:
    base, where = "", ""
    if about.kind == "peft":
        base, where = ", checkpoint=base", f'base = "path/to/{_named(about.base_model)}"  # downloaded before\n'
    return (
        f'```python\nimport ambijax\n\n{where}model = ambijax.load("this_directory"{base})\n'
        'model.predict("clip.wav").distribution\n```\n\n'
        "With transformers (4.57 or 5), the distribution is the softmax over the logits of the class words right after "
        f'"{reasoning.ANCHOR}", where each of them is one token: see docs/export.md of ambijax for the program. Words '
        "of several tokens are scored whole, by summed log-probability, which ambijax does. `ambijax.json` holds the "
        "class words."
    )


def _corpus_description(config: FrozenConfigDict) -> str:
    """What the corpus says of itself, where it is at hand."""
    if config.data.corpus == "synthetic":
        return "Synthetic speech of the tiny lab of ambijax, with simulated listeners: no person was recorded."
    root = manifest.directory(config.data.root)
    text = read_object(root / "corpus.json").get("description")
    return str(text or f"A corpus called {root.name}, with listeners' votes.")


def _training(about: About) -> str:
    c = about.config
    adapted = any(pattern.startswith("lora/") for pattern in c.optim.train)
    trained = [*[f"LoRA, rank {c.lora.rank}, alpha {c.lora.alpha:g}"] * adapted]
    trained += [f"base weights: {', '.join(f'`{p}`' for p in c.optim.train if p.startswith('params/'))}"] * bool(
        assemble.trains_base(c)
    )
    rows = {
        "algorithm": agent.TITLES[c.algorithm],
        "trained": "; ".join(trained),
        "updates": f"{about.step} of {c.steps}" + ", the best on dev" * about.best,
        "batch": f"{c.data.batch_size} prompts",
        "learning rate": f"{c.optim.learning_rate:g}, warm-up {c.optim.warmup:g}, then cosine",
        "loss weights": _weights(c),
        "seed": c.seed,
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _weights(config: FrozenConfigDict) -> str:
    """What stands beside the preferences of DPO and the surrogate of GRPO, or is all of SFT's loss."""
    written = "curated reasoning" if config.data.cot else "the answer line"
    if config.algorithm == "grpo":
        return f"KL to the base {config.grpo.beta_kl:g}"
    kl = f"KL to the votes {config.loss.lambda_kl:g}"
    if config.algorithm == "grpoz":
        return f"KL to the base {config.grpo.beta_kl:g}, {kl}, CE of {written} {config.grpo.gold_ce:g}"
    return f"CE of {written} {config.loss.lambda_ce:g}, {kl}"


def _metrics(about: About) -> str:
    """The table of the run's own evaluation, base and trained."""
    files = {
        title: about.run / "eval" / name / "summary.json"
        for title, name in {"base": "test-base", "these weights": "test"}.items()
    }
    summaries = {title: read_object(path) for title, path in files.items() if path.is_file()}
    if "these weights" not in summaries:
        return "Not evaluated: `python -m ambijax.evaluate --run RUN` before the export fills this in."
    chosen = about.best and about.config.eval.checkpoint == "last"  # here, and not by the run, which tested its last
    if chosen and about.step != about.config.steps:
        summaries[f"after {about.config.steps} updates"] = summaries.pop("these weights")
    level = about.config.eval.level
    try:
        clips = next(iter(summaries.values()))["clips"]
        cells = {title: [_cell(summary, key) for key in COLUMNS.values()] for title, summary in summaries.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        again = f"python -m ambijax.evaluate --run {about.run} writes it anew"
        raise DataError(
            f"{about.run / 'eval'}: a summary.json is not that of an evaluation ({error}); {again}"
        ) from None
    rows = [f"| {title} | {' | '.join(row)} |" for title, row in cells.items()]
    read_out = (
        "The model writes its reasoning freely, and the distribution is read out after it."
        if about.config.data.cot
        else "The distribution is read out without any reasoning before it."
    )
    note = (
        f"{clips} clips of speakers it never heard. {read_out} JS in bits; R2 is a clip's squared correlation over "
        f"classes; in brackets {level:.0%} bootstrap intervals."
    )
    return "\n".join([note, "", f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|", *rows])


def _cell(summary: dict, key: str) -> str:
    """A measure with its interval, both over the clips."""
    if summary.get(key) is None:
        return ""
    low, high = summary["intervals"].get(key, (None, None))
    return f"{summary[key]:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
