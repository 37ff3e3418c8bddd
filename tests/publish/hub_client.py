"""A process that takes a server on this machine's own loop for the Hub, and runs commands there."""

import json
import os
import subprocess
import sys
from typing import Any

# Answers each line on its input: a command's words, as JSON. The Hub's client lives in a process of its own, for it
# reads its settings when it is imported.
CLIENT = """
import contextlib, io, json, sys
from sslkit.cli import main
from sslkit.evaluate.features import compared_encoders
from sslkit.evaluate.features.encoder import fingerprint
from sslkit.parts.backbone import BackboneConfig, create_backbone

loaded = []
load = compared_encoders.load_encoder
compared_encoders.load_encoder = lambda name: loaded.append(load(name)) or loaded[-1]

for line in sys.stdin:
    words = json.loads(line)
    said, complaint, loaded[:], built = io.StringIO(), io.StringIO(), [], []
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
        try:
            if words[0] == "backbone":
                built = fingerprint(create_backbone(BackboneConfig(name="test_vit", img_size=32, pretrained=words[1])))
                code, loaded = 0, [type("Built", (), {"module": None})]
            elif words[0] == "silence":
                from sslkit.publish import hub_upload
                hub_upload.READ_TIMEOUT, code = float(words[1]), 0
            else:
                main(words)
        except SystemExit as ended:
            code = ended.code
        except Exception as error:
            code, complaint = type(error).__name__, io.StringIO(str(error))
    weights = built if words[0] == "backbone" else [fingerprint(each.module) for each in loaded]
    print(json.dumps([code, said.getvalue(), complaint.getvalue(), weights]), flush=True)
"""


class Client:
    """A process that takes the server for the Hub."""

    def __init__(self, environment: dict[str, str]) -> None:
        unset = ("HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        command = [sys.executable, "-W", "ignore", "-c", CLIENT]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, env={**inherited, **environment}, **pipes)

    def ask(self, *words: str) -> tuple[Any, str, str, Any]:
        """Exit code, what was printed, what was complained of, and the fingerprints of what was loaded."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        code, said, complaint, weights = json.loads(self.process.stdout.readline())
        return code, said, complaint, weights

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
