"""Runs by name: the paper's (Shi et al., NeurIPS 2021), `mnist5k`, and `custom` for the user's own data."""

from typing import Any

from lirpa_fastwarmup.experiments.published import rows, settings_in
from lirpa_fastwarmup.experiments.training.settings import Settings

_ROWS: dict[str, dict[str, Any]] = {row["preset"]: row for row in rows("presets")}
DESCRIPTIONS = {name: row.pop("description") for name, row in _ROWS.items()}
# Settings for data that nobody has tuned any for: a start, not a recommendation. It has neither dataset nor radius.
_CUSTOM = settings_in(_ROWS.pop("custom"))
PRESETS = {name: Settings(**settings_in(row)) for name, row in _ROWS.items()}


def preset(name: str, **given: Any) -> Settings:
    """The settings of a preset; raises ValueError if it is unknown, or `custom` is not ``given`` dataset and eps."""
    if name == "custom":
        if given.get("dataset") is None:
            raise ValueError("the preset custom has no data of its own: name yours with --dataset, such as FILE.csv")
        if given.get("eps") is None:
            text = "the preset custom has no radius, because it depends on your data: give --eps, the largest change "
            text += "of inputs, in their units, that must not change the class (a sensor error). Start at a hundredth "
            raise ValueError(text + "of a typical standard deviation; raise it while the verified error is acceptable")
        return Settings(**_CUSTOM, dataset=given["dataset"], eps=given["eps"])
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(DESCRIPTIONS)}")
    return PRESETS[name]
