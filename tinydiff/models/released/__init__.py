"""The JSON files of the released models as they were released, one file per repository.

So a model is planned and a file recognised without a download. No torch.

Each has `model_index`, `scheduler` (scheduler_config.json), and per component its `config` (config.json), its
number of `parameters`, and which list of `keys` in the tests its weights have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tinydiff.entries import Entries
from tinydiff.models import registry

DIRECTORY = Path(__file__).parent

REPOSITORIES: Entries = {
    path.stem.replace("__", "/"): json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(DIRECTORY.glob("*.json"))
}
"""Hub id -> its file. The model in the package is not here: its files are."""

COMPONENTS: Mapping[str, Mapping[str, tuple[str, Entries]]] = {
    row.name: {
        part: (REPOSITORIES[row.name]["model_index"][part][1], component["config"])
        for part, component in REPOSITORIES[row.name]["components"].items()
    }
    for row in registry.MODELS
    if row.name in REPOSITORIES
}
"""Model of the registry -> component -> (class named in model_index.json, entries of config.json)."""
