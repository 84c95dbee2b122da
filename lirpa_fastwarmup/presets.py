"""Runs by name."""

from __future__ import annotations

from lirpa_fastwarmup.training.settings import Settings

PRESETS: dict[str, Settings] = {
    "mnist5k": Settings(
        preset="mnist5k",
        dataset="mnist5k",
        eps=0.1,
        batch_size=64,
        epochs=20,
        ramp_start=1,
        ramp_length=10,
        lr_milestones=(15, 18),
        width=8,
        hidden=64,
    ),
}


def preset(name: str) -> Settings:
    """The settings called ``name``.

    Raises:
        ValueError: there are none of that name; the text lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]
