"""The result of an inspection: statistics of each layer, as text, Markdown and CSV."""

import dataclasses
import html
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lirpa_fastwarmup.storage import csv_text, write_atomically

_LINE = 110  # Characters.
Table = Sequence[Sequence[str]]  # The heading first.


@dataclass(frozen=True)
class ReluStatistics:
    """Statistics of the pre-activations of a ReLU layer over a batch; l and u bound a neuron, c = (l + u)/2.

    Attributes:
        name: the affine layer that feeds the ReLU.
        neurons: number of neurons of one sample.
        half_width: Δ_i, the mean of (u − l)/2.
        gain: Δ_i over the mean half-width of the ReLU layers that it reads, or over Δ_0.
        growth: Δ_i/Δ_0.
        always_active, always_inactive, unstable: fractions with l > 0, with u ≤ 0, and of the other neurons.
        dead: fraction of channels or linear neurons that are always inactive everywhere: their weights get no gradient.
        mean_ratio: ρ_i, the sum of c over always-active neurons over the sum of −c over always-inactive ones.
        variance_ratio: s_i, the same ratio of (c − mean c)².
        distance: mean absolute value of c. If it is smaller than the half-width, most neurons are unstable.
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
        """The smallest of ρ, 1/ρ, s and 1/s: 1 is balanced; NaN if no neuron is always inactive."""
        if self.always_inactive == 0:
            return math.nan
        return min(min(one, 1 / one) if one > 0 else 0.0 for one in (self.mean_ratio, self.variance_ratio))


@dataclass(frozen=True)
class AffineStatistics:
    """Statistics of a convolution or linear layer.

    Attributes:
        name: qualified name of its module.
        fan_in: number of inputs that one output sums.
        weight_std, ibp_std: standard deviation of its weights (``None`` if computed), and of the IBP initialisation.
        expected_gain: n·E|W| for fan-in n, halved if it reads ReLUs: the factor by which the layer alone widens
            intervals (Shi et al., NeurIPS 2021, section 3.1); ``None`` as ``weight_std``.
        batchnorm: whether BatchNorm follows.
        classification: whether its output is the network's, up to linear operators; such a layer needs no BatchNorm.
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
        """``weight_std`` over ``ibp_std``."""
        return None if self.weight_std is None else self.weight_std / self.ibp_std


@dataclass(frozen=True)
class OutputStatistics:
    """Statistics of a classifier's outputs z; k is the predicted class.

    Attributes:
        gap: mean of z_k − max_{j≠k} z_j on the samples themselves.
        lower_bound: mean IBP lower bound on this gap over the box.
        certified: fraction of samples whose predicted class, right or wrong, IBP proves constant over the box.
        spread: largest standard deviation of an output over the samples.
    """

    gap: float
    lower_bound: float
    certified: float
    spread: float


@dataclass(frozen=True)
class Finding:
    """A problem of the network and its remedy.

    Attributes:
        kind: "not finite", "exploded bounds", "wide bounds", "inactive ReLUs", "active ReLUs", "constant outputs",
            "imbalanced ReLUs", "unstable ReLUs" or "no BatchNorm".
        layers: names of the affected layers; empty if the finding is about the whole network.
        text: the observation, with its numbers, and the remedy.
    """

    kind: str
    layers: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True)
class Inspection:
    """Bounds and weights of a network over one batch, layer by layer. Prints as tables, in notebooks too.

    Attributes:
        eps: radius of the box, in units of the input (the largest one, if it varies).
        samples: number of samples in the batch.
        training: whether the network was in training mode, with BatchNorm's statistics from the batch.
        input_half_width: Δ_0, the mean half-width of the input of the first affine layers.
        relus, affine: the layers, in order of execution.
        output: statistics of the outputs, for a classifier; otherwise ``None``.
        findings: problems, the most serious first; empty if there are none.
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
        """The geometric mean of the gains, in a chain the m-th root of Δ_m/Δ_0; NaN without ReLUs."""
        gains = [layer.gain for layer in self.relus]
        positive = bool(gains) and min(gains) > 0
        return math.exp(math.fsum(map(math.log, gains)) / len(gains)) if positive else math.nan

    @property
    def dead(self) -> float:
        """The mean fraction of dead units over the ReLU layers; NaN without ReLUs."""
        return math.fsum(layer.dead for layer in self.relus) / len(self.relus) if self.relus else math.nan

    def to_csv(self, path: Path | str | None = None) -> str:
        """One row per layer, of kind "relu" or "affine"; columns of the other kind stay blank. Also writes ``path``."""
        relus = [{"kind": "relu", **dataclasses.asdict(layer)} for layer in self.relus]
        affine = [{"kind": "affine", **dataclasses.asdict(layer)} for layer in self.affine]
        text = csv_text([*relus, *affine])
        if path is not None:
            write_atomically(Path(path), text.encode())
        return text

    def to_markdown(self) -> str:
        """The tables and findings in GitHub's Markdown."""
        findings = [f"- **{one.kind}**: {one.text}" for one in self.findings] or [self.all_clear()]
        return "\n\n".join([*self._sections(str, as_markdown), *findings])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        findings = [textwrap.fill(f"! {one}", _LINE, subsequent_indent="  ") for one in self.findings]
        sections = self._sections(lambda text: textwrap.fill(text, _LINE), as_text)
        return "\n\n".join([*sections, "\n".join(findings) or self.all_clear()])

    def _sections(self, paragraph: Callable[[str], str], table: Callable[[Table], str]) -> list[str]:
        relus, affine = map(table, self.tables())
        legend, outputs = ([paragraph(text)] if text else [] for text in (self.legend(), self.output_text()))
        return [paragraph(self.heading()), relus, *legend, affine, *outputs]

    def heading(self) -> str:
        """Batch, radius and mode in one line."""
        mode = "training mode (BatchNorm of the batch)" if self.training else "evaluation mode"
        what = f"{self.samples:,} samples, eps {self.eps:.6g}, {mode}"
        return f"{what}; half-width at the input of the first layer: {self.input_half_width:.4g}"

    def legend(self) -> str:
        """The meaning of the columns of ReLU layers, and their healthy values; empty without ReLUs."""
        return _LEGEND if self.relus else ""

    def all_clear(self) -> str:
        """The sentence in place of findings, if there are none."""
        without = "No problem found; without ReLU layers, the bounds between layers are not judged."
        return "Nothing looks wrong." if self.relus else without

    def output_text(self) -> str:
        """The statistics of the outputs in a sentence; empty if there are none."""
        if self.output is None:
            return ""
        gap, lower = self.output.gap, self.output.lower_bound
        text = f"The predicted class leads by {gap:.3g} on average (IBP's lower bound: {lower:.3g}); IBP proves "
        return text + f"it constant, right or wrong, for {self.output.certified:.1%} of the samples."

    def tables(self) -> list[Table]:
        """The statistics of ReLU layers and of affine layers as two tables."""
        rows = [tuple(map(format, dataclasses.astuple(layer), _RELU_COLUMNS.values())) for layer in self.relus]
        relus: Table = [tuple(_RELU_COLUMNS), *rows] if rows else [("no ReLU layers",)]
        return [relus, [_AFFINE_HEAD, *map(_affine_row, self.affine)]]


# The columns of ReLU layers, in the order of the fields, and the formats of their values.
_RELU_COLUMNS = {"ReLU layer": "", "neurons": ",", "half-width": ".3g", "gain": ".3g", "growth": ".3g"}
_RELU_COLUMNS |= dict.fromkeys(("active", "inactive", "unstable", "dead"), ".1%")
_RELU_COLUMNS |= dict.fromkeys(("ρ", "s", "|centre|"), ".3g")
_AFFINE_HEAD = ("affine layer", "fan-in", "weight std", "IBP std", "ratio", "expected gain", "BatchNorm")
_LEGEND = (
    "gain: half-width over that of the layer before (healthy: below 2); growth: over that of the input. ρ, s: mean and "
    "variance of always-active over always-inactive neurons (healthy: 0.5 to 2; nan or inf if a state is empty). "
    "|centre|: mean distance of the bounds' centres from 0 (healthy: above the half-width)."
)


def _affine_row(layer: AffineStatistics) -> tuple[str, ...]:
    numbers = (layer.weight_std, layer.ibp_std, layer.ratio, layer.expected_gain)
    weights = ["–" if number is None else f"{number:.3g}" for number in numbers]
    batchnorm = "classification" if layer.classification else "yes" if layer.batchnorm else "no"
    return (layer.name or "(the network)", f"{layer.fan_in:g}", *weights, batchnorm)


def as_text(table: Table) -> str:
    """A table for terminals, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in lines)


def as_markdown(table: Table) -> str:
    """A table in GitHub's Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def history_columns(layers: Sequence[ReluStatistics]) -> dict[str, float]:
    """Columns ``statistic/layer`` of a history; the second layer of the same name is ``name#2``."""
    named: dict[str, ReluStatistics] = {}
    for layer in layers:
        earlier = sum(other.name == layer.name for other in named.values())
        named[f"{layer.name}#{earlier + 1}" if earlier else layer.name] = layer
    columns = [field.name for field in dataclasses.fields(ReluStatistics)[2:]]  # Without name and size.
    return {f"{column}/{name}": getattr(layer, column) for column in columns for name, layer in named.items()}
