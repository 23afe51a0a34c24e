"""Pass the secrets among `--set` words to tasks without writing them to disk.

Plans, submitit's pickles and logs hold `serve.env.HF_TOKEN=<redacted>`. The value travels in an environment variable of
the submission, which sbatch passes on to its jobs (`--export=ALL`, its default) and keeps for requeued ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from common.errors import UserError
from common.redact import REDACTED, redact_override

VARIABLE = "DRAFTLINE_SECRETS"


def hide(overrides: Sequence[str]) -> list[str]:
    """Return `--set` words without secrets, and put the secrets into this process's environment."""
    redacted = [redact_override(word) for word in overrides]
    secrets = {hidden: word for hidden, word in zip(redacted, overrides, strict=True) if hidden != word}
    os.environ[VARIABLE] = json.dumps(secrets)
    return redacted


def hide_again(planned: Sequence[str], given: Sequence[str]) -> None:
    """Put the secrets that a plan was submitted with, `given` anew, into this process's environment.

    Raises UserError when one is missing, or when `given` has a word that the plan lacks.
    """
    redacted = hide(given)
    for word in (word for word in redacted if word not in planned or REDACTED not in word):
        raise UserError(
            f"--set {word}",
            found="a key that was not given a secret at the submission",
            expected="only keys whose values the plan does not keep",
            fix="Leave it out: a retry goes on with the recipe and the keys of the submission.",
        )
    for word in (word for word in planned if REDACTED in word and word not in redacted):
        raise UserError(
            f"--set {word}",
            found="no value: secrets are not written to disk",
            expected="the value of the submission",
            fix="Give `--set` with that key and its value again.",
        )


def reveal(words: Sequence[str]) -> list[str]:
    """Return a task's words with the secrets of the submission. Raises UserError for one that did not arrive."""
    secrets: dict[str, str] = json.loads(os.environ.get(VARIABLE, "{}"))
    revealed = [secrets.get(word, word) for word in words]
    for word in (word for word in revealed if REDACTED in word):
        raise UserError(
            word,
            found=f"no value in {VARIABLE}",
            expected="the environment of the submission",
            fix="Leave sbatch's --export at its default, ALL, or put the value into the recipe.",
        )
    return revealed
