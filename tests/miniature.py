"""Writes miniatures of official corpus releases, with their quirks: same layout and dialect, invented votes and sounds.

Nothing of a licensed corpus is in here: the sentences are ours, the sounds are noise, and real utterance ids, where a
test wants them, come from the caller.
"""

import csv
import random
import wave
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 72862\n" % (b"c6" * 32)


def write_wav(path: Path, seed: str, seconds: float = 0.05, rate: int = 16_000) -> None:
    """Quiet noise, another one for each seed; an empty seed is silence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n = round(seconds * rate)
    noise = np.random.default_rng(list(seed.encode())).integers(-999, 999, n) if seed else np.zeros(n)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(noise.astype("<i2").tobytes())


# CREMA-D ------------------------------------------------------------------------------------------------------------

LETTERS = "ADFHNS"
# Voice votes in the order of LETTERS: actors on both sides of the folds' borders, two pairs of twins, a tie, the
# clip without sound.
CREMAD = {
    "1001_IEO_NEU_XX": (0, 0, 0, 1, 10, 0),
    "1001_IEO_ANG_HI": (8, 1, 0, 0, 0, 0),
    "1006_TIE_HAP_XX": (0, 0, 0, 2, 7, 1),
    "1006_TIE_NEU_XX": (1, 0, 0, 0, 9, 0),
    "1017_IWW_ANG_XX": (5, 1, 0, 0, 3, 0),
    "1017_IWW_FEA_XX": (1, 0, 4, 0, 4, 0),
    "1018_DFA_DIS_XX": (2, 5, 0, 0, 2, 0),
    "1019_ITH_FEA_XX": (0, 0, 6, 0, 1, 2),
    "1037_TSI_SAD_XX": (0, 1, 0, 0, 4, 5),
    "1055_WSI_HAP_XX": (0, 0, 0, 9, 0, 0),
    "1076_MTI_SAD_XX": (0, 1, 0, 0, 5, 3),
    "1091_IOM_NEU_XX": (0, 0, 1, 1, 8, 0),
}
TWINS = {"1006_TIE_NEU_XX": "1006_TIE_HAP_XX", "1017_IWW_FEA_XX": "1017_IWW_ANG_XX"}
LEVELS = [f"{kind}Resp" for kind in ("meanEmo", "meanAnger", "meanDisgust", "meanFear", "meanHappy", "meanSad")]


def cremad(root: Path, clips: Mapping[str, Sequence[int]] = CREMAD) -> None:
    """A checkout with these voice votes. The raw table has one more vote a clip, first clicked after over ten s."""
    for clip in clips:
        write_wav(root / "AudioWAV" / f"{clip}.wav", "" if clip == "1076_MTI_SAD_XX" else TWINS.get(clip, clip))
    (root / "AudioWAV" / "._1001_IEO_NEU_XX.wav").write_bytes(b"\0\5\x16\7")
    (root / "AudioWAV" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    actors = sorted({int(clip[:4]) for clip in clips})
    sexes = [[a, 30, "Male" if a % 2 else "Female", "Caucasian", "Not Hispanic"] for a in actors]
    _table(root / "VideoDemographics.csv", ["ActorID", "Age", "Sex", "Race", "Ethnicity"], sexes)
    tabulated, raw, clicks = [], [], []
    for query in (1, 2, 3):  # voice only, face only, both: fileName alone is not unique
        for number, (clip, voice) in enumerate(clips.items(), 1):
            votes = voice if query == 1 else (*voice[1:], voice[0])
            answers = [letter for letter, n in zip(LETTERS, votes, strict=True) for _ in range(n)]
            top = ":".join(letter for letter, n in zip(LETTERS, votes, strict=True) if n == max(votes))
            agreement = max(votes) / len(answers)
            levels = [-1] * len(LEVELS)
            tabulated.append([f"{query}{number:05}", *votes, clip, len(answers), agreement, top, *levels])
            for session, answer in enumerate([*answers, "D"]):
                first = 12_001 if session == len(answers) else 1_500
                raw.append(_response(session, query, number, clip, answer))
                clicks.append([str(len(clicks)), f"p{session}", session, query, number, 7, first, 0, number, clip])
    raw.append(_response(99, 1, len(clips) + 1, "ANG_HI_practice", "A"))
    columns = ["", *LETTERS, "fileName", "numResponses", "agreement", "emoVote", *LEVELS]
    _table(root / "processedResults" / "tabulatedVotes.csv", columns, tabulated)
    columns = ",localid,pos,ans,ttr,queryType,numTries,clipNum,questNum,subType,clipName,sessionNums,respEmo,respLevel"
    _table(root / "finishedResponses.csv", [*columns.split(","), "dispEmo", "dispVal", "dispLevel"], raw)
    columns = ",localid,sessionNums,queryType,questNum,pos,ttr,numTries,clipNum,clipName"
    _table(root / "finishedEmoResponses.csv", columns.split(","), clicks)


def _response(session: int, query: int, number: int, clip: str, answer: str) -> list:
    """A final response. Its own time is not that of the first click: here the second voter's is over ten seconds."""
    ttr = {0: "NA", 1: 15_000}.get(session, 3_000)
    identity = ["7", f"p{session}", 7, f"{answer}_50", ttr, query, 0, number, number, 4, clip, session]
    return [*identity, answer, 50, "A", "HI", 80]


def _table(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """As R writes it: text in quotes, numbers without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


# IEMOCAP ------------------------------------------------------------------------------------------------------------

TAGS = {
    "ang": "Anger", "hap": "Happiness", "exc": "Excited", "sad": "Sadness", "neu": "Neutral", "fru": "Frustration",
    "fea": "Fear", "sur": "Surprise", "dis": "Disgust", "oth": "Other",
}  # fmt: skip
# How often each consensus code occurs in the real release, and how many turns of sessions 1 to 5 the four classes keep.
CODES = {
    "xxx": 2507, "fru": 1849, "neu": 1708, "ang": 1103, "sad": 1084, "exc": 1041, "hap": 595, "sur": 107, "fea": 40,
    "oth": 3, "dis": 2,
}  # fmt: skip
KEPT = (1085, 1023, 1151, 1031, 1241)
COMMENTS = ("", "curious", "mildly aggravated but staying polite", "Anger; Sadness; not quite", "d\xe9j\xe0 vu")


def dialogs() -> dict[str, list[str]]:
    """A few dialogs with names as odd as the real ones, and their turns."""
    names = ["Ses01F_impro01", "Ses01M_script01_1", "Ses02F_impro02", "Ses02M_impro03", "Ses03M_impro05a"]
    names += [
        "Ses03M_impro05b",
        "Ses03M_impro08a",
        "Ses03M_impro08b",
        "Ses04F_script03_2",
        "Ses05M_script01_1",
        "Ses05M_script01_1b",
    ]
    return {name: [f"{name}_{speaker}{i:03}" for i in range(4) for speaker in "FM"] for name in names}


def full_order() -> dict[str, list[str]]:
    """As many dialogs and turns a session as the real release has, for want of the real ids."""
    order = {}
    sizes = zip((28, 30, 32, 30, 31), (1819, 1811, 2136, 2103, 2170), strict=True)
    for session, (n_dialogs, n_turns) in enumerate(sizes, 1):
        odd = [name for name in dialogs() if name.startswith(f"Ses0{session}") and name[-1] in "ab"]
        names = odd + [f"Ses0{session}{'FM'[i % 2]}_impro{i:02}" for i in range(n_dialogs - len(odd))]
        for d, name in enumerate(names):
            order[name] = [f"{name}_{'FM'[i % 2]}{i // 2:03}" for i in range(d, n_turns, n_dialogs)]
    return order


def real_codes(order: Mapping[str, Sequence[str]], seed: int = 0) -> dict[str, str]:
    """Turn -> consensus code, at random, but as often as in the real release and with as many kept a session."""
    rng = random.Random(seed)
    classes = ("ang", "hap", "exc", "sad", "neu")
    inside = [code for code, n in CODES.items() for _ in range(n) if code in classes]
    outside = [code for code, n in CODES.items() for _ in range(n) if code not in classes]
    rng.shuffle(inside)
    rng.shuffle(outside)
    codes = {}
    for session, kept in enumerate(KEPT, 1):
        turns = [turn for dialog in order.values() for turn in dialog if turn.startswith(f"Ses0{session}")]
        rng.shuffle(turns)
        for i, turn in enumerate(turns):
            codes[turn] = inside.pop() if i < kept else outside.pop()
    return codes


def iemocap(root: Path, order: Mapping[str, Sequence[str]], codes: Mapping[str, str], wavs: bool = True) -> None:
    """A release with these dialogs and turns; the external votes agree with the consensus `codes`."""
    rng = random.Random(1)
    for dialog, turns in order.items():
        session = root / f"Session{dialog[4]}"
        blocks, words = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n"], []
        for i, turn in enumerate(turns):
            blocks.append("\n".join(_block(turn, codes[turn], i, rng)))
            words.append(f"{turn} [{i:08.4f}-{i + 1:08.4f}]: This is turn {i}, said by someone.")
            if wavs:
                write_wav(session / "sentences" / "wav" / dialog / f"{turn}.wav", turn)
        words += [f"{dialog}_MXX0 [099.0000-100.0000]: No wav, no label.", "M: Not a turn at all."]
        labels = session / "dialog" / "EmoEvaluation"
        _text(labels / f"{dialog}.txt", "\n\n".join(blocks) + "\n\n")
        _text(labels / f"._{dialog}.txt", "\0\5\x16\7 resource fork [1 - 2]\tjunk\tjunk\t[]")
        _text(labels / "Categorical" / f"{dialog}_e1_cat.txt", "".join(f"{t} :Neutral state; ()\n" for t in turns))
        _text(session / "dialog" / "transcriptions" / f"{dialog}.txt", "\n".join(words) + "\n")
        _text(session / "dialog" / "transcriptions" / f"._{dialog}.txt", "\0")
        (session / "sentences" / "wav" / dialog).mkdir(parents=True, exist_ok=True)
        (session / "sentences" / "wav" / dialog / f"._{dialog}_F000.wav").write_bytes(b"\0")


def _block(turn: str, code: str, i: int, rng: random.Random) -> list[str]:
    """Three annotators, four now and then, whose ids vary; some give several tags; actors rate themselves last."""
    others = [tag for tag in TAGS.values() if tag != TAGS.get(code)]
    rng.shuffle(others)
    if code == "xxx":
        votes = [[others[0]], [others[1], others[2]], [others[3]]]
    else:
        votes = [[TAGS[code]], [TAGS[code], others[0]], [others[1]]]
    if i % 7 == 3:
        votes.append([others[4]] if code == "xxx" else [TAGS[code]])
    names = rng.sample(["E1", "E2", "E3", "E4", "E5", "E6"], len(votes))
    speaker = turn.rsplit("_", 1)[1][0]
    lines = [f"[{i:.4f} - {i + 1:.4f}]\t{turn}\t{code}\t[2.5000, 2.5000, 2.5000]"]
    for name, tags in zip(sorted(names), votes, strict=True):
        lines.append(f"C-{name}:\t{' '.join(f'{tag};' for tag in tags)}\t({rng.choice(COMMENTS)})")
    lines.append(f"C-{speaker}1:\tSurprise; Disgust;\t({rng.choice(COMMENTS)})")
    lines += [f"A-{name}:\tval 3; act 2; dom  2;\t()" for name in sorted(names)]
    return [*lines, f"A-{speaker}1:\tval ; act ; dom ;\t()"]


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("latin-1"))
