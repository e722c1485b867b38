"""Which scheme every module gets where a recipe asks for an average of bits: the stored value that a plan makes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from compression_dags.quantization.formats import Choice

FILE = "schemes.json"


@dataclass(frozen=True)
class SchemePlan:
    """Module → scheme, and what it comes to.

    Attributes:
        bits: stored bits over weights.
        cost: predicted KL, nats a token.
    """

    choices: dict[str, Choice]
    bits: float
    cost: float

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, directory: Path) -> SchemePlan:
        raw = json.loads((directory / FILE).read_text())
        return cls({name: Choice(**choice) for name, choice in raw["choices"].items()}, raw["bits"], raw["cost"])
