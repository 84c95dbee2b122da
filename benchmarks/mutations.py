"""Mutation score of `verify`: plant one fault at a time in the code that computes bounds, and count those it reports.

    python benchmarks/mutations.py

Each fault is one plausible programming error (a sign, a dropped bias, exchanged ends, an offset by one, stale
statistics) in a function of the engine or of this package that computes bounds; forward passes stay correct. The
function's source is edited and compiled anew, for as long as `verify` runs on a small network that contains the
operator. A fault is caught if `verify` raises `UnsoundBoundError`. Networks without a fault must pass.

Prints a Markdown table: the check that caught each fault first, and how many samples are certified that are not without
the fault, if there is no attack. The exit status is 1 if fewer than 95 % of the faults are caught, if fewer than 20
exist in the installed release of auto_LiRPA, or if a network without a fault fails.
"""

from __future__ import annotations

import contextlib
import inspect
import pkgutil
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.compat import ENGINE_VERSION
from lirpa_fastwarmup.engine.soundness import UnsoundBoundError

SAMPLES = 16
RESTARTS = {"without an attack": 0, "with PGD": 5}
METHODS = ("IBP", "CROWN-IBP", "CROWN")
# What each kind of contradiction is called in the table, by words of its text.
CHECKS = {
    "interval arithmetic": "interval arithmetic",
    "radius 0": "box of radius 0",
    "value outside": "bounds of a node",
    "margin": "attained margin",
    "misclassified": "PGD's point",
}


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Dense(Residual):
    """x and branch(x), concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.branch(x)], 1)


class Smooth(nn.Module):
    """Constant arithmetic, a transposition, a difference of two branches and activations other than ReLU."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([-2.0, 3.0, -1.0, 2.0] * 3))
        self.register_buffer("shift", torch.linspace(-1, 1, 12))
        self.first, self.left, self.right = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.first((1 - x) * self.scale + self.shift), 0.2)
        h = h.view(-1, 4, 4).transpose(1, 2).flatten(1)
        return torch.tanh(3 * self.left(h)) - torch.sigmoid(2 * self.right(h))


def _conv_bn(channels: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups), nn.BatchNorm2d(out))


def _cnn() -> nn.Module:
    return nn.Sequential(
        _conv_bn(2, 4), nn.ReLU(), _conv_bn(4, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12), nn.ReLU()
    )


def _resnet() -> nn.Module:
    stem = (fw.models.Normalize([0.4, 0.5, 0.6], [0.3, 0.2, 0.3]), _conv_bn(3, 4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    block = Residual(_conv_bn(4, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    return nn.Sequential(*stem, block, nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())


def _mobilenet() -> nn.Module:
    depthwise = _conv_bn(8, 8, 3, groups=8)
    block = Dense(_conv_bn(4, 8, 1), nn.ReLU6(), depthwise, nn.ReLU6(), _conv_bn(8, 4, 1))
    return nn.Sequential(_conv_bn(3, 4, 3, 2), nn.ReLU6(), block, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _video() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 3, 3, 2, 1), nn.ReLU(), nn.Conv3d(3, 4, 2), nn.ReLU(), nn.Flatten())


# The features, the shape of the input, and a radius at which the methods certify some samples and leave others.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "CNN": (_cnn, (2, 8, 8), 0.003),
    "ResNet": (_resnet, (3, 16, 16), 0.0015),
    "smooth": (Smooth, (12,), 0.02),
    "MobileNet": (_mobilenet, (3, 8, 8), 0.004),
    "3-d": (_video, (1, 4, 8, 8), 0.004),
}


@dataclass(frozen=True)
class Subject:
    """A network, samples that it classifies correctly, and a radius."""

    bounded: fw.BoundedModule
    x: Tensor
    y: Tensor
    eps: float

    @classmethod
    def make(cls, name: str) -> Subject:
        """The network of that name, freshly initialised, with BatchNorm statistics as if it had been trained."""
        torch.manual_seed(0)
        build, shape, eps = NETWORKS[name]
        features, x = build().eval(), torch.rand(SAMPLES, *shape)
        for module in features.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, std=2)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, -4.6, 0.7).exp_()  # From 0.01 to 2.
        with torch.no_grad():
            last = nn.Linear(features(x).shape[1], 4)
            std, mean = torch.std_mean(last(features(x)), 0)  # Standardised logits predict every class.
            last.weight.div_(std.unsqueeze(1))
            last.bias.sub_(mean).div_(std)
            network = nn.Sequential(features, last).eval()
            return cls(fw.BoundedModule(network, x[:2]).eval(), x, network(x).argmax(1), eps)


Change = tuple[types.FunctionType, types.CodeType]  # A function and other code for it.
# A line with a network and a function, and below it the faults of that function: a name, text of the function's source
# and what takes the place of it. A name that occurs twice is one fault with several edits, or with other edits in
# another release. Functions without a module are the engine's.
TABLE = """
CNN | BoundConv.interval_propagate
    IBP, convolution: radius by W, not by abs(W) | weight.abs() => weight
    IBP, convolution: no bias | v[2][0] if self.has_bias else None => None
3-d | lirpa_fastwarmup.engine.nodes:BoundConvNd.interval_propagate
    IBP, 3-d convolution: radius by W, not by abs(W) | weight.abs() => weight
smooth | BoundLinear._propagate_Linf
    IBP, linear: ends not exchanged where W < 0 | w.abs() => w
CNN | BoundLinear._propagate_Linf
    IBP, linear: radius halved twice | (h_U - h_L) / 2 => (h_U - h_L) / 4
smooth | BoundLinear.interval_propagate
    IBP, linear: no bias at the lower end | center - deviation + lb => center - deviation
CNN | lirpa_fastwarmup.engine.margins:margin_interval
    IBP, margins: sign | weight.index_select(0, labels).unsqueeze(1) - weight => weight - weight[labels, None]
    IBP, margins: the last bias left out | if bias and bias[0] is not None => if False
CNN | lirpa_fastwarmup.engine.batchnorm:SharedBatchNorm.interval_propagate
    IBP, BatchNorm: radius by the scale, not by its absolute value | scale.abs() / 2 => scale / 2
CNN | lirpa_fastwarmup.engine.batchnorm:SharedBatchNorm.scale_and_shift
    IBP, BatchNorm: statistics from before training | = mean, var => = 0 * mean, 0 * var + 1
    IBP, BatchNorm: no eps under the root | (self.current_var + self.eps) => self.current_var
ResNet | BoundAdd.interval_propagate
    IBP, sum: upper end of a branch in the lower end | x[0] + y[0] => x[0] + y[1]
smooth | BoundSub.interval_propagate
    IBP, difference: ends not exchanged | x[0] - y[1], x[1] - y[0] => x[0] - y[0], x[1] - y[1]
smooth | lirpa_fastwarmup.engine.nodes:BoundConstantArithmetic.interval_propagate
    IBP, scaling by factors < 0: ends not exchanged | torch.minimum(one, other), torch.maximum => one, torch.maximum
CNN | BoundRelu._backward_relaxation
    CROWN, ReLU: upper line through 0 | upper_b = upper_b.unsqueeze(0) => upper_b = 0 * upper_b.unsqueeze(0)
    CROWN, ReLU: intercept of the upper line in the lower line | lower_b = None => lower_b = upper_b.unsqueeze(0)
smooth | BoundLeakyRelu.bound_backward
    CROWN, LeakyReLU: lower slope 0 | (upper_d <= 0.5).to(upper_d.dtype)* self.alpha => 0
smooth | BoundRelu._relu_lower_bound_init
    CROWN, LeakyReLU: lower slope 0 | (upper_k <= 0.5).to(upper_k) * self.leaky_alpha => 0
smooth | BoundTanh.bound_relax_impl
    CROWN, Tanh and Sigmoid: tangent with the slope of another point | = dfunc(m) => = dfunc(lower)
    CROWN, Tanh and Sigmoid: tangent with the slope of the chord | k=k, x0=d_lower => k=k_direct, x0=d_lower
MobileNet | lirpa_fastwarmup.engine.nodes:BoundClamp.bound_backward
    CROWN, ReLU6: lines exchanged | (below, above) if is_lower => (above, below) if is_lower
MobileNet | lirpa_fastwarmup.engine.nodes:BoundClamp._lines
    CROWN, ReLU6: upper kink forgotten | end.clamp(self.low, self.high) => end.clamp(self.low)
ResNet | lirpa_fastwarmup.engine.nodes:BoundMaximumPool.bound_backward
    CROWN, max pooling: one element as the upper bound of all | best >= others => best > -math.inf
ResNet | lirpa_fastwarmup.engine.nodes:BoundMaximumPool._windows
    CROWN, max pooling: windows shifted by one | - self.padding[d] => - self.padding[d] + 1
CNN | BoundRelu._relu_mask_alpha
    alpha-CROWN, ReLU: slopes not clamped | torch.clamp(lb_lower_d, min=0., max=1.) => lb_lower_d
    alpha-CROWN, ReLU: slopes not clamped | torch.clamp(lb_lower_d, min=leaky_alpha, max=1.) => lb_lower_d
CNN | BoundRelu.clip_alpha_
    alpha-CROWN, ReLU: slopes not clamped | torch.clamp(v.data, 0., 1.) => v.data
CNN | BoundRelu.clip_alpha
    alpha-CROWN, ReLU: slopes not clamped | torch.clamp(v.data, self.leaky_alpha, 1.) => v.data
ResNet | BoundConv.bound_backward
    CROWN, convolution (matrix): no bias | last_A, x[2].lower) => last_A, 0 * x[2].lower)
    CROWN, convolution (matrix): one column off | next_A = next_A.view( => next_A = next_A.roll(1, -1).view(
CNN | BoundConv.bound_backward
    CROWN, convolution (patches): no bias | patches, x[2].lower) => patches, 0 * x[2].lower)
CNN | auto_LiRPA.patches:inplace_unfold
    CROWN, patches: one column off | (image, padding) => (image, (padding[0] + 1, padding[1] - 1, *padding[2:]))
3-d | lirpa_fastwarmup.engine.nodes:BoundConvNd.bound_backward
    CROWN, 3-d convolution: no bias | if len(x) == 3 else 0 => * 0
smooth | BoundLinear.bound_backward
    CROWN, linear: no bias | (last_A.to(bias).matmul(bias) => (0 * last_A.to(bias).matmul(bias)
CNN | BoundBatchNormalization.bound_backward
    CROWN, BatchNorm: mean not subtracted | bias - self.current_mean / => bias - 0 * self.current_mean /
    CROWN, BatchNorm: no eps under the root | (self.current_var + self.eps) => (self.current_var)
ResNet | BoundAdd.bound_backward
    CROWN, sum: coefficients for one branch only | (lA_y, uA_y) => (None, None)
smooth | BoundSub.bound_backward
    CROWN, difference: sign of the second operand | last_lA, y, sign=-1 => last_lA, y, sign=1
ResNet | lirpa_fastwarmup.engine.nodes:AdjointBounds.bound_backward
    CROWN, average pooling: four values divided by three | adjoint(rows)[0] => 4 / 3 * adjoint(rows)[0]
smooth | lirpa_fastwarmup.engine.nodes:BoundConstantArithmetic.bound_backward
    CROWN, arithmetic: constant not added | (last_A * shift) => (0 * last_A * shift)
MobileNet | BoundConcat.bound_backward
    CROWN, concatenation: split one channel off | torch.split(last_A, => torch.split(last_A.roll(1, self.axis + 1),
CNN | BoundFlatten.bound_backward
    CROWN, flattening: channels last | input_shape[1:]) => input_shape[2:], self.input_shape[1]).movedim(-1, 2)
smooth | BoundTranspose.bound_backward
    CROWN, transposition: not undone | last_A.permute(self.perm_inv_inc_one) => last_A
ResNet | auto_LiRPA.perturbations:PerturbationLpNorm.get_input_bounds
    CROWN, box: lower end taken for both | x_U = x + self.eps if self.x_U is None else self.x_U => x_U = x_L
ResNet | auto_LiRPA.perturbations:PerturbationLpNorm.concretize_matrix
    CROWN, box: radius halved twice | (x_ub - x_lb) / 2.0 => (x_ub - x_lb) / 4.0
ResNet | auto_LiRPA.concretize_func:constraints_solving
    CROWN, box: radius halved twice | (x_U - x_L) / 2.0 => (x_U - x_L) / 4.0
CNN | auto_LiRPA.perturbations:PerturbationLpNorm.concretize_patches
    CROWN, box: radius by A, not by abs(A) | patch_abs=True => patch_abs=False
CNN | lirpa_fastwarmup.engine.inputs:with_ends
    box: begins at the sample | x_L=lower => x_L=(lower + upper) / 2
CNN | lirpa_fastwarmup.boxes:box_ends
    box: half the radius | x - eps, x + eps => x - eps / 2, x + eps / 2
CNN | lirpa_fastwarmup.engine.bounds:other_classes
    margins: last class left out | .long() => .long() - (others == classes - 2).long()
"""


@dataclass
class Fault:
    """A programming error: where to plant it, of :data:`NETWORKS`, and its edits (function, old text, new text)."""

    name: str
    network: str
    edits: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def methods(self) -> tuple[str, ...]:
        """The bounding methods to verify with."""
        return ("IBP", "alpha-CROWN") if self.name.startswith("alpha-CROWN") else METHODS

    def changes(self) -> list[Change]:
        """The functions to be edited, and their new code; none where the fault does not exist in this release."""
        return [change for edit in self.edits if (change := _change(*edit)) is not None]


def read_table() -> list[Fault]:
    """The faults of :data:`TABLE`."""
    faults: dict[str, Fault] = {}
    network = function = ""
    for line in filter(None, TABLE.splitlines()):
        left, right = line.split(" | ")
        if line.startswith(" "):
            old, new = right.split(" => ")
            faults.setdefault(left.strip(), Fault(left.strip(), network)).edits.append((function, old, new))
        else:
            network, function = left, right if ":" in right else f"auto_LiRPA.bound_general:{right}"
    return list(faults.values())


def _change(target: str, old: str, new: str) -> Change | None:
    try:
        function = pkgutil.resolve_name(target)
    except (AttributeError, ImportError):
        return None
    source = textwrap.dedent(inspect.getsource(function))
    source = source[source.index("def ") :]  # Without decorators.
    if old not in source:
        return None
    # A class around it gives super() its cell.
    wrapped = f"class Owner:\n{textwrap.indent(source.replace(old, new), '    ')}"
    code = compile(wrapped, target, "exec")
    for name in ("Owner", function.__name__):
        code = next(part for part in code.co_consts if isinstance(part, types.CodeType) and part.co_name == name)
    return function, code


@contextlib.contextmanager
def planted(changes: list[Change]) -> Iterator[None]:
    """Give functions other code, which everyone who imported them runs, for as long as the block lasts."""
    originals = [function.__code__ for function, _ in changes]
    try:
        for function, code in changes:
            function.__code__ = code
        yield
    finally:
        for (function, _), code in zip(changes, originals, strict=True):
            function.__code__ = code


def outcome(subject: Subject, methods: tuple[str, ...], restarts: int) -> tuple[str, set[int]]:
    """What caught the fault, "" if nothing did, and the samples certified."""
    samples = (subject.x, subject.y)
    result: Any
    try:
        result, found = fw.verify(subject.bounded, samples, subject.eps, methods, restarts=restarts), ""
    except UnsoundBoundError as error:
        result, text = error.result, error.contradictions[0]
        found = next((name for words, name in CHECKS.items() if words in text), text)
    except Exception as error:
        return f"crashed: {type(error).__name__}: {error}"[:90], set()
    return found, {sample.index for sample in result.certificates if sample.verified}


def main() -> int:
    """Run all faults, print the table, and return the exit status."""
    started = time.perf_counter()
    faults, subjects = read_table(), {name: Subject.make(name) for name in NETWORKS}
    sound: dict[tuple[str, tuple[str, ...]], set[int]] = {}
    failed, caught, exist = False, 0, 0
    print(f"auto_LiRPA {ENGINE_VERSION}\n\n| no fault | methods | certified | raised |\n| --- | --- | --- | --- |")
    for name, methods in dict.fromkeys((fault.network, fault.methods) for fault in faults):
        found, sound[name, methods] = outcome(subjects[name], methods, RESTARTS["with PGD"])
        failed |= bool(found)
        certified = f"{len(sound[name, methods])} of {SAMPLES}"
        print(f"| {name} | {', '.join(methods)} | {certified} | {found or 'nothing'} |", flush=True)
    columns = " | ".join(f"caught {name} by" for name in RESTARTS)
    print(f"\n| fault | network | {columns} | certificates added |\n| --- | --- | --- | --- | --- |", flush=True)
    for fault in faults:
        changes, subject = fault.changes(), subjects[fault.network]
        if not changes:
            print(f"| {fault.name} | {fault.network} | not in this release | | |", flush=True)
            continue
        with planted(changes):
            results = [outcome(subject, fault.methods, restarts) for restarts in RESTARTS.values()]
        texts = [found or "**nothing**" for found, _ in results]
        exist += 1
        caught += any(found and not found.startswith("crashed") for found, _ in results)
        false = results[0][1] - sound[fault.network, fault.methods]
        print(f"| {fault.name} | {fault.network} | {' | '.join(texts)} | {len(false)} |", flush=True)
    print(f"\n**{caught} of {exist} caught**, in {time.perf_counter() - started:.0f} s")
    return int(failed or exist < 20 or caught < 0.95 * exist)


if __name__ == "__main__":
    sys.exit(main())
