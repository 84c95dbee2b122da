"""What an inspection comes to: figures of each layer, as a table, as CSV and as Markdown."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lirpa_fastwarmup.inspection.table import as_markdown, as_text
from lirpa_fastwarmup.storage import csv_text, write_atomically

_COLUMNS = 110


@dataclass(frozen=True)
class ReluStatistics:
    """The bounds on a ReLU layer's input, over a batch; l, u bound a neuron, c = (l + u)/2.

    Attributes:
        name: of the affine layer that feeds it.
        neurons: of one sample.
        half_width: Δ_i, the mean of (u − l)/2.
        gain: Δ_i over the mean of that of the ReLU layers that it reads, or over Δ_0.
        growth: Δ_i/Δ_0.
        always_active, always_inactive, unstable: shares with l > 0, with u ≤ 0, and of the others.
        dead: share of units, channels of a convolution and neurons of a linear layer, that are always inactive in every
            sample (and place): no gradient reaches their weights.
        mean_ratio: ρ_i, the sum of c over always-active neurons to that of −c over always-inactive ones.
        variance_ratio: s_i, the same of (c − mean c)².
        distance: mean absolute value of c. Where it is smaller than the half-width, most neurons are unstable.
    """

    name: str
    neurons: int
    half_width: float
    gain: float
    growth: float
    always_active: float
    always_inactive: float
    unstable: float
    dead: float
    mean_ratio: float
    variance_ratio: float
    distance: float

    @property
    def balance(self) -> float:
        """The smallest of ρ, 1/ρ, s and 1/s: 1 is balanced; NaN where no neuron is always inactive."""
        if self.always_inactive == 0:
            return math.nan
        ratios = (self.mean_ratio, self.variance_ratio)
        return min(min(ratio, 1 / ratio) if ratio > 0 else 0.0 for ratio in ratios)


@dataclass(frozen=True)
class AffineStatistics:
    """A convolution or linear layer.

    Attributes:
        name: qualified name of its module.
        fan_in: inputs that one output adds up.
        weight_std: standard deviation of its weights; ``None`` where a parametrisation computes them.
        ibp_std: that of the IBP initialisation.
        expected_gain: the factor by which it widens intervals by the formula, n·E|W| for fan-in n, and half of that
            where it reads ReLUs (Shi et al., NeurIPS 2021, section 3.1). BatchNorm is not in it; ``None`` as for the
            deviation.
        batchnorm: BatchNorm follows.
        classification: its output reaches the network's without a non-linearity, so that neither the IBP initialisation
            nor BatchNorm is for it.
    """

    name: str
    fan_in: float
    weight_std: float | None
    ibp_std: float
    expected_gain: float | None
    batchnorm: bool
    classification: bool

    @property
    def ratio(self) -> float | None:
        """Its deviation over that of the IBP initialisation."""
        return None if self.weight_std is None else self.weight_std / self.ibp_std


@dataclass(frozen=True)
class OutputStatistics:
    """A classifier's outputs, z, with k the class that it predicts.

    Attributes:
        gap: mean of z_k − max_{j≠k} z_j, on the samples themselves.
        lower_bound: mean of IBP's lower bound on that over the box.
        certified: share of samples whose predicted class, right or wrong, IBP proves to stay the same.
        spread: largest standard deviation of an output over the samples.
    """

    gap: float
    lower_bound: float
    certified: float
    spread: float


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, and what to do.

    Attributes:
        kind: "not finite", "exploded bounds", "wide bounds", "inactive ReLUs", "active ReLUs", "constant outputs",
            "imbalanced ReLUs", "unstable ReLUs" or "no BatchNorm".
        layers: where, by name; empty where it is the network as a whole.
        text: what was found, with its numbers, and the remedy.
    """

    kind: str
    layers: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True)
class Inspection:
    """Bounds and weights of a network, layer by layer, over one batch.

    Attributes:
        eps: radius of the box, in units of the input (the largest, where it varies).
        samples: of the batch.
        training: the network was in training mode, so that BatchNorm's statistics are the batch's.
        input_half_width: Δ_0, the mean half-width of what the first affine layers read.
        relus: ReLU layers, in order of execution.
        affine: affine layers, in order of execution.
        output: of a classifier with one input; otherwise ``None``.
        findings: what is wrong, the gravest first; empty if nothing is.
    """

    eps: float
    samples: int
    training: bool
    input_half_width: float
    relus: tuple[ReluStatistics, ...]
    affine: tuple[AffineStatistics, ...]
    output: OutputStatistics | None
    findings: tuple[Finding, ...] = ()

    @property
    def growth_per_layer(self) -> float:
        """The geometric mean of the gains: the m-th root of Δ_m/Δ_0; NaN without ReLUs."""
        if not self.relus or not self.relus[-1].growth > 0:
            return math.nan
        return self.relus[-1].growth ** (1 / len(self.relus))

    @property
    def dead(self) -> float:
        """The mean over ReLU layers of the share of dead units; NaN without ReLUs."""
        return math.fsum(layer.dead for layer in self.relus) / len(self.relus) if self.relus else math.nan

    def to_csv(self, path: Path | str | None = None) -> str:
        """One line for each layer, of kind "relu" or "affine", with a blank for what it has not; also to ``path``."""
        relus = [{"kind": "relu", **dataclasses.asdict(layer)} for layer in self.relus]
        text = csv_text([*relus, *({"kind": "affine", **dataclasses.asdict(layer)} for layer in self.affine)])
        if path is not None:
            write_atomically(Path(path), text.encode())
        return text

    def to_markdown(self) -> str:
        """The tables and findings in GitHub's Markdown."""
        parts = [self.heading(), *(as_markdown(table) for table in self.tables()), self.output_text()]
        return "\n\n".join(
            [part for part in parts if part] + [f"- **{one.kind}**: {one.text}" for one in self.findings]
        )

    _repr_markdown_ = to_markdown  # How notebooks show it.

    def __str__(self) -> str:
        parts = [self.heading(), *(as_text(table) for table in self.tables()), self.output_text()]
        wrapped = [textwrap.fill(f"! {one}", _COLUMNS, subsequent_indent="  ") for one in self.findings]
        findings = "\n".join(wrapped) or self.praise()
        return "\n\n".join([part for part in (*parts, findings) if part])

    def heading(self) -> str:
        """What was looked at, in a line."""
        mode = "training mode (BatchNorm of the batch)" if self.training else "evaluation mode"
        return (
            f"{self.samples:,} samples, eps {self.eps:.6g}, {mode}; half-width of what the first layer reads: "
            f"{self.input_half_width:.4g}"
        )

    def praise(self) -> str:
        """What to say where there is no verdict."""
        if self.relus:
            return "Nothing looks wrong."
        return "Nothing is known to be wrong; without ReLU layers, the bounds between layers are not judged."

    def output_text(self) -> str:
        """What is known of the outputs, in a sentence; empty if nothing is."""
        if self.output is None:
            return ""
        return (
            f"Predicted class: {self.output.gap:.3g} ahead of the next one, at least {self.output.lower_bound:.3g} "
            f"over the box, on average; proved to stay the same, right or wrong, for {self.output.certified:.1%} of "
            "the samples."
        )

    def tables(self) -> list[list[tuple[str, ...]]]:
        """The figures of ReLU layers and of affine layers, each table with its heading first."""
        none: list[tuple[str, ...]] = [("no ReLU layers",)]
        relus = [_RELU_HEAD, *map(_relu_row, self.relus)] if self.relus else none
        return [relus, [_AFFINE_HEAD, *map(_affine_row, self.affine)]]


_RELU_HEAD = (
    *("ReLU layer", "neurons", "half-width", "gain", "growth", "active", "inactive", "unstable", "dead"),
    *("ρ", "s", "|centre|"),
)
_AFFINE_HEAD = ("affine layer", "fan-in", "weight std", "IBP std", "ratio", "expected gain", "BatchNorm")


def _relu_row(layer: ReluStatistics) -> tuple[str, ...]:
    shares = (layer.always_active, layer.always_inactive, layer.unstable, layer.dead)
    return (
        layer.name,
        f"{layer.neurons:,}",
        *map(_number, (layer.half_width, layer.gain, layer.growth)),
        *(f"{value:.1%}" for value in shares),
        *map(_number, (layer.mean_ratio, layer.variance_ratio, layer.distance)),
    )


def _affine_row(layer: AffineStatistics) -> tuple[str, ...]:
    return (
        layer.name or "(the network)",
        f"{layer.fan_in:g}",
        *map(_number, (layer.weight_std, layer.ibp_std, layer.ratio, layer.expected_gain)),
        "classification" if layer.classification else "yes" if layer.batchnorm else "no",
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def history_columns(layers: Sequence[ReluStatistics]) -> dict[str, float]:
    """The figures of ReLU layers as a history's columns, ``figure/layer``; a second layer of a name is ``name#2``."""
    names: list[str] = []
    for layer in layers:
        earlier = sum(name.partition("#")[0] == layer.name for name in names)
        names.append(f"{layer.name}#{earlier + 1}" if earlier else layer.name)
    figures = [field.name for field in dataclasses.fields(ReluStatistics) if field.name not in ("name", "neurons")]
    return {
        f"{figure}/{name}": getattr(layer, figure)
        for figure in figures
        for name, layer in zip(names, layers, strict=True)
    }
