"""The Flower app that runs a job over gateways: a folder with nothing but its configuration, for `flwr run`."""

from __future__ import annotations

import json
from pathlib import Path

_TEXT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "ulearn-fleet"
version = "1.0.0"
description = "Federated rounds of boards behind several hosts"
license = "MIT"

[tool.flwr.app]
publisher = "ulearn"

[tool.flwr.app.components]
serverapp = "ulearn_host.federation.flower_server:app"
clientapp = "ulearn_host.federation.flower_client:app"

[tool.flwr.app.config]
folder = {folder}
gateways = {gateways}
timeout = {timeout}
updates = {updates}
"""


def write_app(app: Path, folder: Path, gateways: int, timeout_s: float = 3600.0, updates: bool = False) -> None:
    """Write the app into the folder `app`.

    folder: of the job (Root.create) on the host of the SuperLink. gateways: how many there must be to begin a round.
    timeout_s: how long a round waits for their answers. updates: have all updates passed up where sums would do.
    """
    app.mkdir(parents=True, exist_ok=True)
    values = {"folder": str(folder.resolve()), "gateways": gateways, "timeout": float(timeout_s), "updates": updates}
    text = _TEXT.format(**{key: json.dumps(value) for key, value in values.items()})
    (app / "pyproject.toml").write_text(text)
