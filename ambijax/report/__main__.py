"""Run directories -> report/index.html, to be opened in any browser, and report/figures/*.{png,svg,csv}.

    python -m ambijax.report runs/tiny [MORE ...] --out report/

The page holds the tables, the figures and every clip with its sound, votes, read-outs and reasoning, before and after
training. It loads nothing from anywhere. Sound is linked by relative path: move page and corpus together, or pass
--embed_audio where the licence of the corpus allows it.
"""

import argparse
import csv
import importlib.util
from pathlib import Path

from ambijax import errors
from ambijax.errors import ConfigError, DataError
from ambijax.report import runs


def main() -> None:
    args = parser().parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the report draws with matplotlib; install it with pip install 'ambijax[report]'")
    write(args.runs, args.out, split=args.split, corpus=args.corpus, embed_audio=args.embed_audio)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ambijax.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory written by ambijax.train")
    parser.add_argument("--out", type=Path, default=Path("report"), help="directory of the report")
    parser.add_argument(
        "--split", default="test", help="which evaluation, a directory under RUN/eval: test, dev, iemocap"
    )
    parser.add_argument("--corpus", type=Path, help="where the corpus lies now, if not where the run's settings say")
    parser.add_argument("--embed_audio", action="store_true", help="put the sound into the page instead of linking it")
    return parser


def write(directories: list[Path], out: Path, *, split: str, corpus: Path | None, embed_audio: bool) -> None:
    """Writes the report and says where it is."""
    from ambijax.report import clips, figures, page, style

    if len(directories) > style.MOST:
        raise ConfigError(f"{len(directories)} runs; at most {style.MOST} can be told apart side by side")
    _assert_ours(out / "index.html")
    report = runs.read(directories, split, corpus)
    gallery = clips.gallery(report, out, embed_audio=embed_audio)
    drawn = figures.draw(report)
    svgs = {}
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            png, svgs[name] = style.save(figure.figure, name)
            (out / "figures" / f"{name}.png").write_bytes(png)
            (out / "figures" / f"{name}.svg").write_text(svgs[name], encoding="utf-8")
            with (out / "figures" / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([figure.header, *figure.rows])
        (out / "index.html").write_text(page.render(report, gallery, drawn, svgs), encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write the report to {out}: {error.strerror}; choose another --out") from None
    if mute := sum(1 for clip in gallery["clips"] if clip["audio"] is None):
        why = next(clip["silence"] for clip in gallery["clips"] if clip["audio"] is None)
        print(f"{mute} of {len(gallery['clips'])} clips have no sound: {why}; --corpus DIR says where it lies")
    print(f"{len(gallery['clips'])} clips, {len(drawn)} figures: open {out / 'index.html'}")


def _assert_ours(path: Path) -> None:
    """Raises ConfigError: a page is there that no report was."""
    if path.is_file() and b'name="generator" content="ambijax"' not in path.read_bytes()[:1000]:
        raise ConfigError(f"{path} is somebody's page and no report; choose another --out, or move it away")


if __name__ == "__main__":
    errors.run(main)
