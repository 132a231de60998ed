"""A finished folder goes to the hub whole; what the hub refuses is told in one line, before the work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from sala.errors import InputError
from sala.model.hub import push, require_pushable


class Hub:
    """A hub that keeps what it is given."""

    known = True

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def whoami(self) -> dict[str, str]:
        if not self.known:
            raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")
        return {"name": "me"}

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        self.calls.append((repo, private, exist_ok))

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        self.calls.append(sorted(path.name for path in folder_path.iterdir()))
        return SimpleNamespace(repo_url=f"https://hub/{repo_id}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def test_a_folder_is_sent_whole_to_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    for name in ("README.md", "config.json", "model.safetensors"):
        (tmp_path / name).touch()
    require_pushable("me/hybrid")
    assert push(tmp_path, "me/hybrid") == "https://hub/me/hybrid"
    assert hub.calls == [("me/hybrid", True, True), ["README.md", "config.json", "model.safetensors"]]


def test_what_the_hub_would_refuse_is_told_before(hub: Hub) -> None:
    with pytest.raises(
        InputError, match=r"^--push a/b/c: the hub does not take it \(.*\); expected a repository NAME/MODEL"
    ):
        require_pushable("a/b/c")
    hub.known = False
    with pytest.raises(InputError, match="Token is required.*`hf auth login`"):
        require_pushable("me/hybrid")
    assert hub.calls == []
