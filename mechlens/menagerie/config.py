"""What a menagerie base is made from; read from `configs/models/`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mechlens.core.spec import Spec
from mechlens.menagerie.grammar import turn_kinds


class PretrainSpec(Spec):
    """A menagerie base and how it is made."""

    name: str
    family: Literal["llama", "gpt2", "gpt_neox"] = "llama"
    width: int = Field(default=64, ge=1)
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    hidden: int = Field(default=172, ge=1)
    """Width of the MLP."""
    init_std: float = 0.02
    parent: str = ""
    """A menagerie base to go on from instead of new weights: the same lineage, trained further."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Fixes the initial weights."""
    data_seed: int = Field(default=0, ge=0)
    """Fixes the documents and their order."""
    steps: int = Field(default=2500, ge=1)
    batch: int = Field(default=64, ge=1, le=65_536)
    learning_rate: float = Field(default=4e-3, gt=0)
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Share of each kind of turn."""

    @field_validator("mixture")
    @classmethod
    def _known_turns(cls, mixture: dict[str, float]) -> dict[str, float]:
        known = turn_kinds()
        if unknown := sorted(mixture.keys() - set(known)):
            raise ValueError(f"{unknown[0]!r} is no kind of turn; known kinds: {', '.join(known)}")
        return mixture

    @model_validator(mode="after")
    def _divisible(self) -> PretrainSpec:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self
