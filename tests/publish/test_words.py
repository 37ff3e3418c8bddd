"""What is told to others, and what their answers mean, without a server."""

import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sslkit.errors import UserError
from sslkit.publish import hub_upload
from sslkit.publish.hub_upload import _retry_delay
from sslkit.publish.redaction import public_name


@pytest.mark.parametrize(
    ("name", "public"),
    [
        *(("/data/pets/", "pets"), ("~/pets", "pets"), ("C:\\my data\\pets", "pets"), ("/", "images")),
        *(("local-dir:/home/me/enc", "local-dir:enc"), ("file:///srv/x.parquet", "x.parquet")),
        *(("user/data", "user/data"), ("hf_hub:user/x@v1", "hf_hub:user/x@v1"), ("builtin:fashion_mnist",) * 2),
        *(("knn k=20", "knn k=20"), ("pets/train", "pets/train"), ("", "")),
    ],
)
def test_public_names(name: str, public: str) -> None:
    assert public_name(name) == public


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("900", 60.0), ("nan", 3.0), ("soon", 3.0), (None, 3.0), ("-5", 3.0)],
)
def test_the_hub_says_how_long(asked: str | None, seconds: float) -> None:
    assert _retry_delay(answer_with(asked), 3.0) == seconds


def test_the_hub_says_until_when() -> None:
    assert 20 < _retry_delay(answer_with(formatdate(time.time() + 30, usegmt=True)), 3.0) <= 30
    assert _retry_delay(answer_with(formatdate(0, usegmt=True)), 3.0) == 0.0


def test_what_can_be_no_token_is_not_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub_upload.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_upload, "get_token", lambda: "hf_tokén")
    with pytest.raises(UserError, match="characters that no token has"):
        hub_upload.HubUpload("user/name", "main", tmp_path)


def answer_with(retry_after: str | None) -> Any:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return SimpleNamespace(response=SimpleNamespace(headers=headers))
