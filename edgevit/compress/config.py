"""What the configuration of every step has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field


class StepConfig(BaseModel):
    """Settings of one step of a recipe. Subclasses say what data the step needs and where in a recipe it makes no sense."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    NOT_AFTER: ClassVar[Mapping[str, str]] = {}
    """Kinds of step it makes no sense after, each with what was expected."""

    images: int = Field(default=256, ge=16, le=4096, description="how many calibration images are used at most, where any are")

    @property
    def needs_images(self) -> bool:
        """Whether it looks at real images."""
        return False

    @property
    def uses_images(self) -> bool:
        """Whether it looks at real images where there are any, needed or not."""
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
