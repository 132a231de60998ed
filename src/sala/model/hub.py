"""Sending a finished model folder to the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sala.errors import InputError


def require_pushable(repo: str) -> None:
    """Raise InputError unless the hub can be reached, knows who asks, and `repo` is a name for a repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _told(repo):
        validate_repo_id(repo)
        HfApi().whoami()


def push(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload a model folder to the repository `repo`, made if it is not there, and return its address.

    Raises:
        InputError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    with _told(repo):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload the model").repo_url)


@contextmanager
def _told(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--push {repo}: the hub does not take it ({reason}); expected a repository NAME/MODEL and a token of "
            "`hf auth login` that may write there"
        ) from error
