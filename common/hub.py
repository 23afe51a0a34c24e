"""The Hugging Face hub: names of repositories at a revision, their snapshots on this machine, errors in one line.

A reference is `org/name@revision`: a branch, a tag, a pull request (`refs/pr/1`) or a commit. The token is
huggingface_hub's own: HF_TOKEN, or what `hf auth login` stored. It is read nowhere else, and never written.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from common.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")


@dataclass(frozen=True)
class HubReference:
    """A repository at a revision."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"


def parse_reference(text: str) -> HubReference | None:
    """Parse `org/name@revision`; return None for a text without `@`. Raises UserError for a name that cannot be one."""
    repo, separator, revision = text.partition("@")
    if not separator:
        return None
    check_repo(repo, where=text)
    if not REVISION.fullmatch(revision) or ".." in revision:
        raise UserError(
            text,
            found=f"the revision {revision!r}",
            expected="a branch, a tag, refs/pr/N or a commit",
            fix="Correct it, as in org/name@main.",
        )
    return HubReference(repo, revision)


def check_repo(repo: str, *, where: str) -> None:
    """Raise UserError for a name that the hub would refuse; huggingface_hub has the rules."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    problem = "" if repo.count("/") == 1 else "no name of the form org/name"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        problem = str(error).rstrip(".")
    if problem:
        raise UserError(where, found=problem, expected="the name of a repository on the hub", fix="Correct it.")


def fetch_snapshot(reference: HubReference) -> Path:
    """Return the snapshot of a repository in the hub's cache; download what is missing of it.

    Its folder is named after the commit. Without network a cached snapshot is used. Raises UserError if there is none.
    """
    from huggingface_hub import snapshot_download

    with explain_hub(str(reference)):
        folder = Path(snapshot_download(reference.repo, revision=reference.revision))
    if reference.revision != folder.name:
        print(f"hub: {reference} is {folder.name}", file=sys.stderr)
    return folder


def revision_of(folder: Path) -> str | None:
    """Return `org/name@commit` of a snapshot in the hub's cache; None for any other folder."""
    parts = folder.absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not COMMIT.fullmatch(parts[-1]):
        return None
    kind, _, name = parts[-3].partition("--")  # models--org--name; a name itself never has two dashes
    return f"{name.replace('--', '/')}@{parts[-1]}" if kind == "models" and name else None


@contextmanager
def explain_hub(where: str) -> Iterator[None]:
    """Turn errors of requests to the hub into a UserError that names the repository and never the token."""
    from huggingface_hub import errors, get_session

    transport = import_module(type(get_session()).__module__.partition(".")[0])  # httpx; from version 2 on httpx2
    try:
        yield
    except errors.GatedRepoError:
        raise _refuse(where, "a gated repository", "access to it", "Ask for access on its page.") from None
    except errors.RepositoryNotFoundError:
        fix = "Correct the name. If it is private, set HF_TOKEN or run `hf auth login`."
        raise _refuse(where, "no such repository that this login may see", "one on the hub", fix) from None
    except errors.RevisionNotFoundError:
        raise _refuse(where, "no such revision", "a branch, tag or commit of it", "Correct it.") from None
    except errors.LocalTokenNotFoundError:
        raise _refuse(where, "no login", "a token", "Set HF_TOKEN or run `hf auth login`.") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        found = "no right to do this" if status in (401, 403) else f"HTTP status {status}"
        fix = "Set HF_TOKEN to a token with write access." if status in (401, 403) else "Try again later."
        raise _refuse(where, f"{found} from the hub", "an answer", fix) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, transport.TransportError) as error:
        offline = isinstance(error, errors.OfflineModeIsEnabled) or "HF_HUB_OFFLINE" in str(error)
        why = "HF_HUB_OFFLINE is set" if offline else "no network, or the hub does not answer"
        fix = f"Download it where there is network: hf download {where.replace('@', ' --revision ')}. Or give a folder."
        raise _refuse(where, f"no way to reach the hub ({why})", "it, or a copy in the hub's cache", fix) from None


def _refuse(where: str, found: str, expected: str, fix: str) -> UserError:
    return UserError(where, found=found, expected=expected, fix=fix)
