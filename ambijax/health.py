"""What must be said about a run while it trains: updates that were skipped, and roll-outs that teach nothing."""

import math

import jax
from absl import logging
from ml_collections import FrozenConfigDict

from ambijax.errors import NonFiniteError
from ambijax.journal import Log
from ambijax.update import updates

# Metric of a roll-out, where it goes wrong, the threshold's key in config.warn, what it means.
_COLLAPSES = (
    ("reward/degenerate", "above", "degenerate", "the roll-outs of a prompt all earn the same, and none is preferred"),
    ("rollout/format", "below", "format", "the model is losing the answer format"),
    ("rollout/tokens", "below", "tokens", "the chains of thought are collapsing"),
    ("logp_gap", "above", "logp_gap", "decoding and scoring disagree: one policy samples and another one learns"),
)


class Health:
    """Watches the outcome of every step, one step late: by then it is known without waiting for the device."""

    def __init__(self, config: FrozenConfigDict, log: Log, skipped: int) -> None:
        """`skipped` updates were skipped before."""
        self._config, self._log, self._skipped = config, log, skipped
        self._watched = [row for row in _COLLAPSES if config.data.cot or row[0] != "rollout/tokens"]
        self._last: tuple[int, list[str], dict] | None = None
        self._said: set[str] = set()

    def note(self, step: int, ids: list[str], aux: dict[str, jax.Array]) -> None:
        """The step under way, its utterances and what the update will return; looks at the step before.

        Raises:
          NonFiniteError: as `look`.
        """
        self.look()
        self._last = (step, ids, aux)

    def look(self) -> None:
        """Waits for the step under way and writes its batch down if its update was skipped.

        Raises:
          NonFiniteError: the updates of too many batches in a row were skipped.
        """
        if self._last is None:
            return
        step, ids, aux = self._last
        self._last = None
        skipped, in_a_row = int(aux["skipped/total"]), int(aux["skipped/in_a_row"])
        if skipped > self._skipped:
            self._skipped = skipped
            self._log.bad_batch(step, ids, float(aux["loss"]), float(aux["gradient_norm"]))
            logging.warning("step %d: update skipped, %d so far; bad_batches.jsonl names its utterances", step, skipped)
        if in_a_row >= self._config.guard.max_skipped * updates(self._config):
            loss, norm = float(aux["loss"]), float(aux["gradient_norm"])
            spike = " (a spike by guard.spike_sigma)" * (math.isfinite(loss) and math.isfinite(norm))
            raise NonFiniteError(
                f"{in_a_row} updates in a row were skipped, the last at step {step}: loss {loss:g}, gradient norm "
                f"{norm:g}{spike}; bad_batches.jsonl names the utterances, the last checkpoint is finite"
            )

    def warn(self, step: int, values: dict[str, float]) -> None:
        """Says once when a metric crosses its threshold in config.warn, and again after it has recovered."""
        if math.isfinite(values.get("rollout/js", 0)):
            self._said.discard("rollout/js")
        elif "rollout/js" not in self._said:
            self._said.add("rollout/js")
            logging.warning("step %d: rollout/js is not finite: read-outs in samples.jsonl are no numbers", step)
        for metric, side, key, meaning in self._watched:
            if metric not in values:
                continue
            value, threshold = values[metric], self._config.warn[key]
            if not (value > threshold if side == "above" else value < threshold):
                self._said.discard(key)
            elif key not in self._said:
                self._said.add(key)
                text = "step %d: %s = %.3g is %s warn.%s = %g: %s"
                logging.warning(text, step, metric, value, side, key, threshold, meaning)
