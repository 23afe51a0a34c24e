"""Upload an export to the Hugging Face hub.

`upload_folder` is resumable: with hf_xet it commits in parts, and a second call skips the files that are there and the
chunks that are stored; without it, blobs that are stored are not sent again. `upload_large_folder` would keep a list of
finished files inside the export; huggingface_hub 2 dropped it, since `upload_folder` resumes.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import IncompleteError, UserError
from common.hub import check_repo, explain_hub
from train.check import check_folder

STALE = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt")
"""Files of an earlier push that are deleted unless this one has them: a server would load them, too."""


def push(folder: Path, repo: str, *, public: bool) -> str:
    """Check an export and upload it as `repo`; return `org/name@commit`.

    Raises UserError for a wrong name, without a login or network, for a public repository without `public`, and if a
    file holds the token; IncompleteError if the folder is not what its certificate says.
    """
    from huggingface_hub import HfApi

    check_repo(repo, where=f"--push {repo}")
    certificate = check_folder(folder)
    _refuse_token(folder)
    api = HfApi(library_name="draftline")
    with explain_hub(repo):
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo).private:  # it existed; create_repo leaves it as it is
            raise UserError(
                repo,
                found="a public repository",
                expected="a private one",
                fix="Give --public if everybody may read the draft, or make it private on its settings page.",
            )
        try:
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"{certificate.name}, certificate {certificate.digest[:12]}",
                ignore_patterns=[".*", "*/.*"],
                delete_patterns=list(STALE),
            )
        except RuntimeError as error:  # of a blob, by huggingface_hub and hf_xet
            raise IncompleteError(
                f"{repo}: found a broken upload ({error}), expected every file. Run the same command again: what was "
                "sent is kept."
            ) from None
    pushed = f"{repo}@{commit.oid}"
    print(f"export: {folder} -> {pushed} (certificate {certificate.digest})")
    return pushed


def _refuse_token(folder: Path) -> None:
    """Raise UserError if a file holds the hub's token."""
    from huggingface_hub import get_token

    token = (get_token() or "").encode()
    for path in folder.rglob("*") if token else []:
        if path.is_file() and path.suffix != ".safetensors" and token in path.read_bytes():
            raise UserError(
                path, found="the hub's token in it", expected="no secret", fix="Remove it, and revoke the token."
            )
