"""A corpus for a machine without data: a talker acts blends of emotions, and a panel of listeners votes.

Nobody knows what a clip "is". An actor is told one emotion and delivers a blend, more or less strongly; each listener
hears the tone of voice against the speaker's usual one, imperfectly and with habits of their own, and gives one vote.
So the ambiguity is in the sound, and the acted emotion is often not what most listeners choose.

    DIR/wav/<speaker>_<take>_<ACTED>.wav   16 kHz mono s16, 1.0 to 2.4 s
    DIR/votes.csv                          clip,listener,response: one row a vote
    DIR/manifest.jsonl                     see manifest.py; the chains of thought are the offline teacher's
    DIR/spec.json                          what was asked for; written last

A clip follows from (seed, speaker, take) alone, so more speakers or takes leave the sound and the votes of the others
as they were. (Their chains of thought may change: a speaker's usual voice is measured over all takes.)
"""

import csv
import dataclasses
import json
import re
import shutil
import uuid
from pathlib import Path

import numpy as np

from ambijax import acoustics, manifest, teacher
from ambijax.corpora import talker
from ambijax.emotions import CREMAD, IEMOCAP, soft_label
from ambijax.errors import ConfigError

GENERATOR = 1  # raise when the sound, the votes or the teacher's words change: old directories are then refused

# Streams of chance, so that nothing depends on what was drawn before it.
_SPEAKER, _LISTENER, _CLIP = range(3)

# The actors.
_ACTED_SHARE = (0.4, 1.0)  # how much of the blend is the emotion that was asked for
_INTENSITY = (0.4, 1.4)
_UNMEANT = 0.35  # standard deviations of the tone that mean nothing

_OWN_NORM = 6  # clips: with fewer, a speaker's usual voice is unknown to the teacher

# The listeners.
POOL = 100
_MISHEARD = 0.45  # standard deviations a dimension: nobody knows a speaker's usual voice exactly
_DOUBT = 1.5  # temperature of the choice
_HABIT = 0.4  # spread of a listener's bias towards each class, in logits
_TO_NEUTRAL = 0.4  # bias that all share, in logits: in doubt people choose neutral (CREMA-D)
_WORDS_COUNT = 1.2  # logits for an emotion that the words carry


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a synthetic corpus is made of; equal specs give byte-identical corpora."""

    seed: int
    labels: tuple[str, ...]
    speakers: int
    clips_per_speaker: int
    folds: int  # speaker-disjoint
    listeners: tuple[int, int]  # fewest and most votes a clip
    sentences: tuple[str, ...]
    channel: talker.Channel

    def __post_init__(self) -> None:
        problems = []
        if unknown := sorted(set(self.labels) - set(teacher.PROFILE)):
            problems.append(f"no profile for the labels {', '.join(unknown)}; known are {', '.join(teacher.PROFILE)}")
        if not 1 <= self.folds <= self.speakers:
            problems.append(f"folds={self.folds} must be between 1 and speakers={self.speakers}")
        if self.clips_per_speaker < 1:
            problems.append(f"clips_per_speaker={self.clips_per_speaker} must be at least 1")
        if not 1 <= self.listeners[0] <= self.listeners[1] <= POOL:
            problems.append(f"listeners={self.listeners} must be (fewest, most) between 1 and {POOL}")
        if mute := [s for s in self.sentences if not re.search("[aeiouy]", s.lower())]:
            problems.append(f"sentences without a vowel cannot be spoken: {mute}")
        if not self.sentences:
            problems.append("there are no sentences")
        if problems:
            raise ConfigError(f"synthetic corpus: {'; '.join(problems)}")


CREMAD_LIKE = Spec(
    seed=0,
    labels=CREMAD,
    speakers=50,
    clips_per_speaker=60,
    folds=5,
    listeners=(4, 12),
    sentences=(
        "The train leaves at ten.",
        "There is a letter on the desk.",
        "We should turn left here.",
        "It has been like this all week.",
        "My coat is in the other room.",
        "The shop opens in an hour.",
        "I left my keys at home.",
        "They painted the door again.",
        "Look at the time.",
        "The bus stops near the bank.",
        "He called me this morning.",
        "I think the window is open.",
    ),
    channel=talker.Channel(low=60, high=7600, noise=-62),
)

IEMOCAP_LIKE = Spec(
    seed=1,
    labels=IEMOCAP,
    speakers=10,
    clips_per_speaker=300,
    folds=5,
    listeners=(3, 3),
    sentences=(
        "What do you want me to do about it?",
        "I don't know yet.",
        "So when did she tell you?",
        "Well, that is how it goes.",
        "You have to fill in the form first.",
        "Are you coming with us or not?",
        "Yes, I heard about that.",
        "Let me see what I can find.",
        "He said he would call.",
        "Come on, sit down.",
        "Did you talk to them?",
        "It was a long way from here.",
        "I am so angry with you.",
        "This is ridiculous.",
        "You drive me mad.",
        "I hate this line.",
        "That is wonderful.",
        "I am so happy for you.",
        "We had a great time.",
        "I love this place.",
        "I miss him so much.",
        "I am sorry, he is gone.",
        "She died last year.",
        "I feel so alone here.",
    ),
    channel=talker.Channel(low=180, high=3600, noise=-50),
)


LIKE = {"cremad": CREMAD_LIKE, "iemocap": IEMOCAP_LIKE}


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip before it is a file."""

    id: str
    speaker: str
    sentence: str
    samples: np.ndarray  # int16 [n]
    tone: np.ndarray  # [V], the tone of voice that was reached
    listeners: np.ndarray  # int [J], the panel
    votes: np.ndarray  # int [J], class indices


def _profiles(labels: tuple[str, ...]) -> np.ndarray:
    """The prototype of each class in the space of tones [K, V]."""
    return np.array([[teacher.PROFILE[label][name] for name in talker.VOICE] for label in labels])


def talker_of(spec: Spec, index: int) -> talker.Speaker:
    gender = ("female", "male")[(index % spec.folds + index // spec.folds) % 2]  # both in every fold
    return talker.speaker(np.random.default_rng([spec.seed, _SPEAKER, index]), gender)


def _tone(rng: np.random.Generator, spec: Spec, acted: int) -> np.ndarray:
    """The tone of voice [V] of an actor who was asked for the class `acted`: a blend, more or less intense."""
    share = rng.uniform(*_ACTED_SHARE)
    blend = (1 - share) * rng.dirichlet(np.full(len(spec.labels), 0.4))
    blend[acted] += share
    return rng.uniform(*_INTENSITY) * blend @ _profiles(spec.labels) + rng.normal(0, _UNMEANT, len(talker.VOICE))


def _sentence(rng: np.random.Generator, spec: Spec, acted: int) -> str:
    """A sentence whose words do not speak for another emotion than the acted one."""
    fitting = [
        s for s in spec.sentences if {e for _, e in teacher.lexical_cues(s)} <= {spec.labels[acted]}
    ] or spec.sentences
    return fitting[rng.integers(len(fitting))]


def opinions(rng: np.random.Generator, spec: Spec, tone: np.ndarray, sentence: str, panel: np.ndarray) -> np.ndarray:
    """How likely each listener of `panel` [J] is to choose each class for what can be heard: float64 [J, K]."""
    labels = spec.labels
    habits = np.stack([np.random.default_rng([spec.seed, _LISTENER, j]).normal(0, _HABIT, len(labels)) for j in panel])
    heard = tone + rng.normal(0, _MISHEARD, (len(panel), len(tone)))
    distance = np.sum((heard[:, None] - _profiles(labels)) ** 2, axis=-1)  # [J, K]
    said = {emotion for _, emotion in teacher.lexical_cues(sentence)}
    shared = np.array([_TO_NEUTRAL * (label == "neutral") + _WORDS_COUNT * (label in said) for label in labels])
    logits = -distance / (2 * _DOUBT) + habits + shared
    likely = np.exp(logits - logits.max(axis=1, keepdims=True))
    return likely / likely.sum(axis=1, keepdims=True)


def act(spec: Spec, who: talker.Speaker, index: int, take: int) -> Clip:
    rng = np.random.default_rng([spec.seed, _CLIP, index, take])
    acted = take % len(spec.labels)
    sentence = _sentence(rng, spec, acted)
    samples, tone = talker.speak(rng, who, sentence, _tone(rng, spec, acted), spec.channel)
    panel = rng.choice(POOL, size=rng.integers(spec.listeners[0], spec.listeners[1] + 1), replace=False)
    likely = opinions(rng, spec, tone, sentence, panel)
    votes = (likely.cumsum(axis=1) < rng.random(len(panel))[:, None]).sum(axis=1)
    return Clip(
        id=f"{index:03d}_{take:03d}_{spec.labels[acted][:3].upper()}",
        speaker=f"{index:03d}",
        sentence=sentence,
        samples=np.round(samples * 32767).astype(np.int16),
        tone=tone,
        listeners=panel,
        votes=np.minimum(votes, len(spec.labels) - 1),
    )


def write(root: str | Path, spec: Spec) -> manifest.Corpus:
    """Writes the corpus of `spec` to the directory `root`, whole or not at all; a directory that holds it is returned.

    Raises:
      ConfigError: the directory holds something else, or cannot be written.
    """
    root = Path(root).absolute()  # '.' has no name
    record = json.dumps({"generator": GENERATOR, **dataclasses.asdict(spec)}, indent=1) + "\n"
    if _complete(root, record):
        return manifest.read(root)
    partial = root.with_name(f"{root.name}.partial-{uuid.uuid4().hex}")  # not its pid, which is 1 in every container
    try:
        _write(partial, spec)
        (partial / "spec.json").write_text(record)
        partial.rename(root)
    except OSError as error:
        if not _complete(root, record):  # else another process wrote the same corpus meanwhile
            raise ConfigError(f"cannot write the synthetic corpus to {root}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest.read(root)


def is_free(root: Path) -> bool:
    """Whether nothing is there, or an empty directory."""
    return not root.exists() or (root.is_dir() and not any(root.iterdir()))


def _complete(root: Path, record: str) -> bool:
    """Whether the corpus of this record is there; False when nothing is, ConfigError when something else is."""
    if (root / "spec.json").is_file():
        if (root / "spec.json").read_text() == record:
            return True
        raise ConfigError(f"{root} holds another synthetic corpus (compare its spec.json); name another directory")
    if not is_free(root):
        raise ConfigError(f"{root} exists and is no synthetic corpus; name another directory")
    return False


def _write(root: Path, spec: Spec) -> None:
    import soundfile
    from tqdm import tqdm

    (root / "wav").mkdir(parents=True)
    people = [talker_of(spec, index) for index in range(spec.speakers)]
    clips, measured = [], []
    pairs = [(index, take) for index in range(spec.speakers) for take in range(spec.clips_per_speaker)]
    for index, take in tqdm(pairs, desc="synthetic corpus", unit="clip", disable=None):
        clip = act(spec, people[index], index, take)
        soundfile.write(root / "wav" / f"{clip.id}.wav", clip.samples, talker.SAMPLE_RATE, subtype="PCM_16")
        measured.append(acoustics.measure(clip.samples.astype(np.float32) / 32768))
        clips.append(dataclasses.replace(clip, samples=np.zeros(0, np.int16)))  # it is on disk now

    with (root / "votes.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["clip", "listener", "response"])
        for clip in clips:
            for listener, k in zip(clip.listeners, clip.votes, strict=True):
                table.writerow([clip.id, f"L{listener:03d}", spec.labels[k]])

    norms = acoustics.speaker_norms(measured, [clip.speaker for clip in clips], least=_OWN_NORM)
    utterances = []
    for clip, heard in zip(clips, measured, strict=True):
        counts = np.bincount(clip.votes, minlength=len(spec.labels))
        votes = {label: int(n) for label, n in zip(spec.labels, counts, strict=True) if n}
        p = soft_label(votes, spec.labels)
        index = int(clip.speaker)
        utterances.append(
            manifest.Utterance(
                id=clip.id,
                audio=f"wav/{clip.id}.wav",
                transcript=clip.sentence,
                speaker=clip.speaker,
                fold=index % spec.folds,
                votes=votes,
                cot=teacher.reason(clip.sentence, heard, norms[clip.speaker], p, spec.labels).render(),
                gender=people[index].gender,
            )
        )
    manifest.write(manifest.Corpus(root, tuple(utterances), labels=tuple(spec.labels)))
