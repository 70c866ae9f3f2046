"""What the configuration of every step has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class StepConfig(BaseModel):
    """Settings of one step of a recipe. Subclasses say what data the step needs and where in a recipe it makes no sense."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    NOT_AFTER: ClassVar[Mapping[str, str]] = {}
    """Kinds of step it makes no sense after, each with what was expected."""

    @property
    def needs_images(self) -> bool:
        """Whether it looks at real images."""
        return False

    @property
    def uses_images(self) -> bool:
        """Whether it looks at calibration images where there are any, as many as its ``images`` says."""
        return self.needs_images

    @property
    def variety(self) -> str:
        """Which variety of the step this is, where it depends on the settings what models it applies to."""
        return ""

    @property
    def needs_labels(self) -> bool:
        return False

    @property
    def trains(self) -> bool:
        """Whether it learns over many passes, on the images of ``--train``."""
        return False

    def out_of_place(self, before: Sequence[str]) -> str:
        """Why the step makes no sense after the kinds of step ``before``, or nothing."""
        return next((f"after {kind}, {reason}" for kind, reason in self.NOT_AFTER.items() if kind in before), "")
