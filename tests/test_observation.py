"""What a trace of a network would miss, and is refused, warned of, or contradicted by its outputs."""

from __future__ import annotations

import ctypes
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import lirpa_fastwarmup as fw
from lirpa_fastwarmup.engine.observation import untraceable
from lirpa_fastwarmup.engine.soundness import UnsoundBoundError
from lirpa_fastwarmup.engine.tracing import TracedPathWarning, unchanged


class Base(nn.Module):
    """Class 1 if the mean of the inputs exceeds 1; values of 200 and more are reset, by :meth:`reset`."""

    def __init__(self):
        super().__init__()
        self.mean, self.head = nn.Linear(16, 4), nn.Linear(4, 2)
        with torch.no_grad():
            self.mean.weight.fill_(1 / 16)
            self.mean.bias.zero_()
            self.head.weight.copy_(torch.tensor([[0.0], [0.25]]).expand(2, 4))
            self.head.bias.copy_(torch.tensor([1.0, 0.0]))

    def forward(self, x):
        return self.head(self.reset(self.mean(x)))


class View(Base):
    def reset(self, h):
        same = h.view(len(h), 4)
        h.masked_fill_(h > 200, 0.0)
        return same


class InPlaceModule(Base):
    def reset(self, h):
        same = h.view(len(h), 4)
        nn.Hardtanh(-200, 200, inplace=True)(h)
        return same


class ViewChanged(Base):
    def reset(self, h):
        h.view(len(h), 4).clamp_(max=200)
        return h


class Detached(Base):
    def reset(self, h):
        h.detach().clamp_(max=200)
        return h


class Data(Base):
    def reset(self, h):
        h.data.clamp_(max=200)
        return h


class DataRead(Base):
    def reset(self, h):
        return h - (h.data - 200).relu()


class Shared(Base):
    def reset(self, h):
        capped = h.detach().clamp(max=200)
        return h * 0 + torch.empty(0).set_(capped)


class Assigned(Base):
    def reset(self, h):
        h.data = h.clamp(max=200)
        return h


class WrittenTwice(Base):
    def reset(self, h):
        same = h.view(len(h), 4)
        h.clamp_(max=200)
        same += 1
        return same


class InputInPlace(Base):
    def forward(self, x):
        x.clamp_(max=200)
        return super().forward(x)

    def reset(self, h):
        return h


class IsTracing(Base):
    def reset(self, h):
        return h if torch.jit.is_tracing() else h.clamp(max=200)


class WithoutGradients(Base):
    def reset(self, h):
        return h if torch.is_grad_enabled() else h.clamp(max=200)


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clamp(max=200)

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def symbolic(graph, h):
        return graph.op("Identity", h)


class Symbolic(Base):
    def reset(self, h):
        return Clamp.apply(h)


@pytest.mark.parametrize("example", [1, 2, 5])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (View, "masked_fill_, which changes in place what linear then reads through another tensor"),
        (InPlaceModule, "hardtanh, which changes in place what linear then reads"),
        (ViewChanged, "clamp_, which changes in place what linear then reads"),
        (Detached, "clamp_, which changes in place what linear then reads"),
        (Data, "clamp_, which changes in place what linear then reads"),
        (DataRead, r"\.data, of which a trace keeps the values alone"),
        (Shared, "set_"),
        (Assigned, "an assignment to the data of a tensor"),
        (WrittenTwice, "clamp_, which changes in place what add_ then reads"),
        (InputInPlace, "clamp_, which changes its input in place"),
        (IsTracing, "something else while it is traced"),
        (WithoutGradients, "something else while it is traced"),
        (Symbolic, r"Clamp, an autograd\.Function whose symbolic"),
    ],
)
def test_what_an_export_drops_is_refused_wherever_it_acts(kind, message, example):
    with pytest.raises(NotImplementedError, match=message):
        fw.BoundedModule(kind(), torch.rand(example, 16))


class InPlace(Base):
    """Operations in place that a trace follows."""

    def reset(self, h):
        h.relu_()
        same = h.view(len(h), 4)
        copied = h.clone()
        copied.clamp_(max=200)
        first, *_ = same.shape
        return nn.functional.relu(same.reshape(first, 4) + copied, inplace=True)


class ActivatedBefore(Base):
    def reset(self, h):
        out = nn.functional.relu(h, inplace=True)
        return out + h


@pytest.mark.parametrize("kind", [InPlace, ActivatedBefore])
def test_operations_in_place_that_a_trace_follows_are_accepted(kind):
    model = kind()
    with torch.no_grad():
        model.mean.weight.normal_()
    bounded = fw.BoundedModule(model, torch.rand(2, 16))
    x = 100 * torch.randn(50, 16)
    assert torch.allclose(bounded.eval()(x), model(x), atol=1e-3)


class Formatted(Base):
    def reset(self, h):
        return h.flip(1) if float(f"{h.min():.4f}") > 150 else h


class ByNumpy(Base):
    def reset(self, h):
        return h.flip(1) if np.from_dlpack(h.detach()).min() > 150 else h


class PaddedByValue(Base):
    """PyTorch's own code reads the value."""

    def reset(self, h):
        return h + nn.functional.pad(0 * h[:, 1:], (0, 1), value=(h.min() - 150).relu().detach())


class NewFromList(Base):
    def reset(self, h):
        return h + h.new_tensor([(h.min() - 150).relu()])


class FromList(Base):
    def reset(self, h):
        return h + torch.as_tensor([(h.min() - 150).relu()])


class Bytes(Base):
    def reset(self, h):
        return h.flip(1) if ctypes.c_float.from_address(h.data_ptr()).value > 150 else h


@pytest.mark.parametrize("kind", [Formatted, ByNumpy, PaddedByValue, NewFromList, FromList, Bytes])
def test_reading_values_is_warned_of_at_its_place(kind):
    with pytest.warns(TracedPathWarning, match=r"reads the value of a tensor at .*test_observation\.py"):
        fw.BoundedModule(kind(), torch.rand(2, 16))


class LargeBatches(Base):
    def reset(self, h):
        return h.clamp(max=200) if len(h) > 16 else h


def test_outputs_of_the_bounded_network_are_compared_at_every_sample():
    """None of the first samples shows the difference."""
    model = LargeBatches().eval()
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([210.0, 0.0]))
    bounded = fw.BoundedModule(model, torch.rand(2, 16))
    x = torch.full((40, 16), 150.0)
    x[33] = 180.0
    y = model(x).argmax(1)
    options = {"pgd_steps": 1, "input_range": (0.0, 255.0)}
    assert fw.verify(bounded, (x[:16], y[:16]), 35.0, **options).verified_error.value == 0
    with pytest.raises(UnsoundBoundError, match="sample 33 has other outputs than the bounded network"):
        fw.verify(bounded, (x, y), 35.0, **options)


class Undefined(nn.Linear):
    def forward(self, x):
        return super().forward(x) * torch.tensor([torch.nan, 1.0, 1.0])


def test_outputs_that_are_nan_are_errors():
    bounded = fw.BoundedModule(Undefined(5, 3).eval(), torch.rand(2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fw.verify(bounded, (torch.rand(6, 5), torch.zeros(6, dtype=torch.int64)), 0.1, pgd_steps=1)
    assert found.standard_error.value == 1
    assert found.pgd_error.value == 1
    assert all(one.falsified and not one.correct for one in found.certificates)


class Looked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(5, 3), nn.Embedding(9, 3, max_norm=0.5)

    def forward(self, x, k):
        return self.linear(x) + self.table(k)


def test_embeddings_that_change_their_weights_are_refused():
    with pytest.raises(NotImplementedError, match="embedding with max_norm, which changes the weights"):
        fw.BoundedModule(Looked(), (torch.rand(2, 5), torch.tensor([0, 1])))


class Constant(Base):
    """Zero wherever the samples lie, with a bump at 150 that a trace would flatten."""

    def reset(self, h):
        return (1 - (h - 150).abs()).relu() * (0.0 if torch.jit.is_tracing() else 100.0)


def test_numbers_that_depend_on_tracing_are_refused():
    with pytest.raises(NotImplementedError, match="something else while it is traced"):
        fw.BoundedModule(Constant(), torch.rand(2, 16))


class BufferView(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("cap", torch.ones(1))

    def reset(self, h):
        self.cap.view(-1).fill_(0.5)
        return h * self.cap


def test_a_buffer_that_is_written_through_a_view_is_refused():
    with pytest.raises(NotImplementedError, match="fill_, which changes in place what mul then reads"):
        fw.BoundedModule(BufferView(), torch.rand(2, 16))


SIDE = {
    "size to a power": lambda h: h * h.size(1) ** -0.5,
    "quotient of a size": lambda h: h * (1 / h.shape[1]),
    "root of a size": lambda h: h / math.sqrt(h.shape[1]),
    "padding by half a size": lambda h: nn.functional.pad(h, (math.ceil(h.shape[1] / 2),) * 2)[:, 2:-2],
    "views": lambda h: h.view(h.size(0), -1, h.size(1) // 2).reshape(h.shape),
    "a kept copy": lambda h: (h.detach().mean(), h * 2)[1],
    "a term with gradients": lambda h: (h.pow(2).mean() if torch.is_grad_enabled() else None, h * 2)[1],
    "a shape": lambda h: nn.functional.relu_(h.view(len(h), 2, 2)).view_as(h),
    "values that are not used": lambda h: (h.data.mean(), h * 2)[1],
    "a copy that is not read again": lambda h: (h.detach(), nn.functional.relu_(h))[1],
}


class Beside(Base):
    def __init__(self, function):
        super().__init__()
        self.reset = function


@pytest.mark.parametrize("name", SIDE)
def test_sizes_and_what_the_output_does_not_depend_on_are_no_branches(name):
    model = Beside(SIDE[name])
    with unchanged(model):
        _, reasons = untraceable(model, [torch.rand(2, 16)])
    assert reasons == []
