"""A local page to record or drop a clip and see how people would hear it, the reasoning as it is written.

    pip install -e '.[demo]'
    python -m ambijax.demo --model runs/tiny            then open http://127.0.0.1:7860

It has example clips of the tiny lab, with the votes of simulated listeners. Only this machine can reach it.
"""

import argparse
import dataclasses
import importlib.util
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np

from ambijax import audio, compilation, emotions, errors, listener
from ambijax.corpora import synthetic
from ambijax.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
BRACKETED = ("[::1]", "[")  # the last as an address; and all that Starlette of before 2026 sees of "[::1]:7860"
EXAMPLES = 6
# Speakers that no tiny model was trained on; ambiguous clips come about by themselves.
CORPUS = dataclasses.replace(synthetic.CREMAD_LIKE, seed=7, speakers=EXAMPLES, clips_per_speaker=1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ambijax.demo", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, type=Path, help="run directory, export, PEFT adapter or Qwen2-Audio checkpoint")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets others in; there is no password")
    add("--port", type=int, default=7860)
    add("--base", action="store_true", help="the model before training")
    add("--labels", help="class words, separated by commas, for a checkpoint that does not name its own")
    add("--checkpoint", type=Path, help="where the base weights lie, if not where the run or the adapter says")
    args = parser.parse_args()
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise ConfigError("the demo needs two more packages: pip install 'ambijax[demo]'")
    import uvicorn

    from ambijax.demo import server

    compilation.keep()
    labels = emotions.classes(args.labels) if args.labels else None
    listening = _listen(args.host, args.port)
    model = listener.load(args.model, base=args.base, labels=labels, checkpoint=args.checkpoint)
    with tempfile.TemporaryDirectory(prefix="ambijax-demo-") as directory:
        corpus = synthetic.write(Path(directory) / "examples", CORPUS)
        demo = server.Demo(model, args.model.resolve().name, corpus, corpus.utterances[:EXAMPLES])
        print("warming up: the first clip would wait for the compiler", file=sys.stderr)
        for _ in model.stream(0.1 * np.random.default_rng(0).standard_normal(audio.SAMPLE_RATE)):
            pass
        if args.host not in LOOPBACK:
            print(f"--host {args.host}: everybody who reaches this machine can use the page", file=sys.stderr)
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"open http://{host}:{listening.getsockname()[1]}", flush=True)
        hosts = [*LOOPBACK[:2], *BRACKETED] if args.host in LOOPBACK else ["*"]
        uvicorn.Server(uvicorn.Config(demo.app(hosts), log_level="warning")).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A socket, bound before the model is read; port 0 takes any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from None
    return listening


if __name__ == "__main__":
    errors.run(main)
