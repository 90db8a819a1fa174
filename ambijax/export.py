"""A run in the form other tools load: a PEFT adapter, or a whole Hugging Face checkpoint, with model card and digests.

    python -m ambijax.export --run runs/tiny --format peft --out tiny-peft
    python -m ambijax.export --run runs/tiny --format merged --out tiny-merged [--push me/tiny-merged]

    README.md       the model card: base, data, training, metrics with intervals, licence, limits, citation
    ambijax.json    how the model is asked: class words, prompt, read-out; ambijax.load and the card's example read it
    SHA256SUMS      of every other file; `sha256sum -c SHA256SUMS` checks them
    peft            adapter_config.json, adapter_model.safetensors (peft.py)
    merged          W + alpha / r A B, config, tokenizer and preprocessor files, as transformers stores them

A merged checkpoint is computed a tensor at a time in float32 and written a shard at a time. The directory appears when
it is complete, so that a killed export leaves nothing that could be taken for one.
"""

import argparse
import hashlib
import json
import os
import re
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from ambijax import card, checkpoint, convert, errors, hugging_face, listener, peft, settings, workdir
from ambijax.errors import ConfigError
from ambijax.hugging_face import Parameter
from ambijax.model.config import LoraConfig


def export(
    run: Path,
    kind: str,
    out: Path,
    *,
    best: bool = False,
    base_model: str = "",
    dtype: str = "",
    licence: str = "other",
) -> None:
    """Writes a run's trained weights as a directory for other tools.

    Args:
      run: written by ambijax.train.
      kind: 'peft' or 'merged'.
      out: the directory to write; it must not exist.
      best: the checkpoint with the best dev score, also where the run's eval.checkpoint says last.
      base_model: what to call the base in the files, a hub name for example; '' is the run's model.checkpoint.
      dtype: of a merged checkpoint, 'bfloat16' or 'float32'; '' is the run's model.dtype.
      licence: a licence identifier for the model card's header.

    Raises:
      ConfigError: no such run, the format cannot hold what it trained, its base weights are not those it was trained
        on, or `out` exists or cannot be written.
    """
    config = settings.load(run)
    if best and not checkpoint.scored(run / "checkpoints"):
        raise ConfigError(
            f"no checkpoint of {run} has a score on dev: leave --best out, or train with eval.every above 0"
        )
    best = best or config.eval.checkpoint == "best"
    step, trained, meta = checkpoint.load_trained(run / "checkpoints", best=best)
    base_model = base_model or config.model.checkpoint
    about = card.About(run=run, config=config, kind=kind, step=step, best=best, base_model=base_model, licence=licence)
    if kind == "peft":
        if "params" in trained:
            raise ConfigError(f"{run} trained base weights, which no adapter holds; use --format merged")
        need = sum(x.nbytes for x in jax.tree.leaves(trained))
    else:
        _assert_same_base(run, config, meta)
        wanted = hugging_face.parameters_of(Path(config.model.checkpoint))
        need = sum(p.size * len(p.keys) for p in wanted) * jnp.dtype(dtype or config.model.dtype).itemsize
    with workdir.new_directory(out, need) as partial:
        if kind == "peft":
            peft.save(trained["lora"], partial, LoraConfig(**config.lora), base_model)
        else:
            merge(config, trained, partial, dtype=jnp.dtype(dtype or config.model.dtype))
        # Weights that were written in float32 are not to be rounded when they are read; nothing is computed in less.
        told = listener.about(config, "float32" if dtype == "float32" else "")
        (partial / listener.ABOUT).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        (partial / "README.md").write_text(card.render(about), encoding="utf-8")
        _write_sums(partial)


def _assert_same_base(run: Path, config: FrozenConfigDict, meta: dict) -> None:
    here = convert.digest(config.model.checkpoint)
    if meta.get("base") != here:
        raise ConfigError(
            f"{run} was trained on other weights than {config.model.checkpoint} holds now "
            f"(digest {str(meta.get('base'))[:12]} there, {here[:12]} here); put the right base there"
        )


def merge(config: FrozenConfigDict, trained: dict, out: Path, *, dtype: jnp.dtype) -> None:
    """Writes base + trained as a Hugging Face checkpoint into `out`; the host holds one shard.

    Args:
      config: of the run; names the base checkpoint, rank and alpha.
      trained: {'lora': ...}, {'params': ...} or both, host arrays; frozen leaves are absent.
      out: an empty directory.
      dtype: of the result. Sums are float32 whatever it is.
    """
    source = Path(config.model.checkpoint)
    wanted = hugging_face.parameters_of(source)
    read, read32 = (convert.reader(source, wanted, np.dtype(kind)) for kind in (dtype, np.float32))
    own = flax.traverse_util.flatten_dict(trained.get("params", {}), sep="/")
    lora = flax.traverse_util.flatten_dict(trained.get("lora", {}), sep="/")
    scale = np.float32(LoraConfig(**config.lora).scale)

    def value(parameter: Parameter, layer: int | None) -> np.ndarray:
        at = () if layer is None else (layer,)
        module, leaf = parameter.path.rsplit("/", 1)
        adapted = leaf == "kernel" and f"{module}/a" in lora
        if parameter.path in own:
            weight = np.asarray(own[parameter.path])[at]
        else:
            index = [slice(None)] * len(parameter.shape)
            rows = index if layer is None else [slice(layer, layer + 1), *index[1:]]
            weight = (read32 if adapted else read)(parameter, rows)
            weight = weight if layer is None else weight[0]
        if adapted:
            weight = weight.astype(np.float32) + scale * (lora[f"{module}/a"][at] @ lora[f"{module}/b"][at])
        return weight

    convert.write_hugging_face(value, source, out, dtype=dtype)


def _write_sums(directory: Path) -> None:
    lines = []
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    (directory / peft.SUMS).write_text("".join(lines))


def _token() -> str:
    if not (token := os.environ.get("HF_TOKEN")):
        raise ConfigError("--push needs a token with write access in the environment variable HF_TOKEN")
    return token


def push(directory: Path, repository: str) -> str:
    """Uploads an exported directory to the Hugging Face hub as a private repository; returns its address.

    The token comes from the environment variable HF_TOKEN alone, the hub's address from HF_ENDPOINT.

    Raises:
      ConfigError: no token, or the hub refuses; the directory stays as it is.
    """
    import huggingface_hub  # here: no other command needs it

    token = _token()
    hub = huggingface_hub.HfApi(token=token)
    try:
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=directory, commit_message="Export by ambijax")
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError, OSError) as error:
        reason = " ".join(str(error).split()).replace(token, "***")[:200]
        raise ConfigError(f"{directory} is written, but not pushed to {repository}: {reason}") from None
    return str(address)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ambijax.export", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run directory written by ambijax.train")
    parser.add_argument("--format", choices=("peft", "merged"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="the directory to write; it must not exist")
    parser.add_argument("--best", action="store_true", help="the checkpoint with the best score on dev")
    parser.add_argument("--base_model", default="", help="what to call the base, Qwen/Qwen2-Audio-7B-Instruct say")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="", help="of --format merged")
    parser.add_argument("--licence", default="other", help="identifier for the model card, apache-2.0 say")
    parser.add_argument("--push", metavar="USER/NAME", help="upload it, private; the token comes from HF_TOKEN")
    args = parser.parse_args()
    if args.dtype and args.format == "peft":
        raise ConfigError("--dtype is of --format merged; adapters are written as they were trained, in float32")
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", args.licence):
        raise ConfigError(f"--licence={args.licence} must be one identifier, apache-2.0 or cc-by-4.0 say")
    if args.push:
        _token()  # that there is one, before anything is written
    export(
        args.run,
        args.format,
        args.out,
        best=args.best,
        base_model=args.base_model,
        dtype=args.dtype,
        licence=args.licence,
    )
    print(f"written to {args.out}")
    if args.push:
        print(f"pushed to {push(args.out, args.push)}")


if __name__ == "__main__":
    errors.run(main)
