"""The Hub, where it cannot be reached: asked once, no retries, nothing on the screen but the sentence."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import timm
from huggingface_hub import constants
from huggingface_hub.utils import logging

from sslkit.data.sources.image_source import DataConfig, open_source
from sslkit.errors import UserError
from sslkit.evaluate import load_encoder
from sslkit.hub import availability as hub
from sslkit.parts.backbone import BackboneConfig, create_backbone


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Hub that is not there, and a test session that was not told to stay offline."""
    addresses: list[str] = []

    class Dead:
        def head(self, url: str, **_options: object) -> None:
            addresses.append(url)
            raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Dead)
    hub.is_reachable.cache_clear()
    yield addresses
    hub.is_reachable.cache_clear()


def test_it_is_asked_once_and_nobody_waits(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    start, verbosity = time.monotonic(), (logging.get_verbosity(), datasets.logging.get_verbosity())
    unreachable = rf"; the Hub, {constants.ENDPOINT}, cannot be reached from here$"
    with pytest.raises(UserError, match=r"no folder of that name here, and as a dataset of the Hub: .*" + unreachable):
        open_source(DataConfig(path="bad/nosuch"))
    with pytest.raises(UserError, match="its pretrained weights cannot be loaded: .*" + unreachable):
        load_encoder("resnet18")
    with pytest.raises(UserError, match="pretrained: no weights for 'resnet18'"):
        create_backbone(BackboneConfig(name="resnet18", pretrained=True, img_size=32))
    assert time.monotonic() - start < 10
    assert asked == [constants.ENDPOINT]
    assert capsys.readouterr().err == ""
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)
    assert (logging.get_verbosity(), datasets.logging.get_verbosity()) == verbosity


def test_nobody_asks_when_told_not_to(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, so the Hub was not contacted"):
        load_encoder("resnet18")
    assert asked == []


@pytest.mark.full
def test_the_command_says_one_sentence_and_nothing_of_retries(tmp_path: Path) -> None:
    """A whole process, against an address where nobody listens."""
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=0), str(tmp_path), safe_serialization=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    words = ["-m", "sslkit", "eval", "knn", str(tmp_path), "--data", "bad/nosuch"]
    ended = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert "cannot load 'bad/nosuch'" in ended.stderr
