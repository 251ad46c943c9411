"""Fourier transforms, and complex numbers seen as pairs of real ones."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxfuse.analysis.labels import AbstractTensor, DimLabels, Kind, numbered, positions, sources_of
from fxfuse.analysis.rules.algebra import drop, only_unlabelled
from fxfuse.analysis.rules.registry import Call, rule

aten = torch.ops.aten

_ALONG = "transformed along: the order of indices matters"


@rule(
    aten.fft_fft.default,
    aten.fft_ifft.default,
    aten.fft_rfft.default,
    aten.fft_irfft.default,
    aten.fft_hfft.default,
    aten.fft_ihfft.default,
    aten.fft_fft2.default,
    aten.fft_ifft2.default,
    aten.fft_rfft2.default,
    aten.fft_irfft2.default,
    aten.fft_fftn.default,
    aten.fft_ifftn.default,
    aten.fft_rfftn.default,
    aten.fft_irfftn.default,
)
def transform(call: Call) -> AbstractTensor:
    """Labels along the transformed dimensions freeze; the others pass one to one.

    The transform is linear, so the members' mean passes it.
    """
    x: AbstractTensor = call.args[0]
    call.coupling.record_use(x)
    given, sizes = call.argument("dim"), call.optional("s")
    if given is None:
        given = range(-len(sizes), 0) if sizes else range(x.rank)
    dims = {d % x.rank for d in ([given] if isinstance(given, int) else given)}
    rest = only_unlabelled(call.coupling, x, dims, _ALONG)
    shape = call.shape
    stuck = [d for f in x.fields if not x.is_parameter for d in dims if f.dims == (d,)]
    return replace(
        rest,
        shape=shape,
        fields=(*rest.fields, *(_frequencies(call, shape, d) for d in dict.fromkeys(stuck))),
        positions=positions(shape, (rest.unlabelled | dims) - set(stuck)),
        constant=None,
    )


def _frequencies(call: Call, shape: tuple[int, ...], dim: int) -> DimLabels:
    """Frequencies of frozen neurons: whatever reads them is the base member's, too."""
    start = call.coupling.fresh(shape[dim], (f"<{call.node.name}>", dim))
    found = numbered(shape, dim, start)
    call.coupling.freeze(found, Kind.KEEP_BASE, _ALONG)
    return found


@rule(aten.stft.default, aten.stft.center)
def short_time(call: Call) -> AbstractTensor:
    """`b? l -> b? f t`, or `b? f t 2`: every line is a signal of its own."""
    return _lines(call, 1)


@rule(aten.istft.default)
def inverse_short_time(call: Call) -> AbstractTensor:
    """`b? f t -> b? l`."""
    return _lines(call, 2)


def _lines(call: Call, inner: int) -> AbstractTensor:
    """Transform the last `inner` dimensions; a window has no neurons."""
    x, shape = call.args[0], call.shape
    call.coupling.record_use(x)
    for other in call.values()[1:]:
        only_unlabelled(call.coupling, other, range(other.rank), _ALONG)
    lead = x.rank - inner
    x = only_unlabelled(call.coupling, x, range(lead, x.rank), _ALONG)
    own = drop(x, range(lead, x.rank), keepdim=False) if lead else AbstractTensor(())
    spread = own.moved(lambda t: t.reshape(t.shape + (1,) * (len(shape) - lead)).expand(shape))
    varying = positions(shape, range(lead, len(shape)))
    sources = sources_of(call.values())
    return replace(spread, positions=(*spread.positions, *varying), sources=sources)


@rule(aten.view_as_complex.default)
def as_complex(call: Call) -> AbstractTensor:
    """`* 2 -> *`: a pair of real numbers is one neuron."""
    x: AbstractTensor = call.args[0]
    call.coupling.record_use(x)
    last = x.rank - 1
    x = only_unlabelled(call.coupling, x, [last], "the real part stands before the imaginary one")
    return drop(x, [last], keepdim=False)


@rule(aten.view_as_real.default)
def as_real(call: Call) -> AbstractTensor:
    """`* -> * 2`."""
    x, shape = call.args[0], call.shape
    call.coupling.record_use(x)
    pair: AbstractTensor = x.moved(lambda t: t.unsqueeze(-1).expand(shape))
    return replace(pair, positions=(*pair.positions, *positions(shape, [len(shape) - 1])))


@rule(
    aten.real.default,
    aten.imag.default,
    aten._conj.default,
    aten.conj.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
)
def part(call: Call) -> AbstractTensor:
    """A part of each number; the mean of the members passes."""
    value: AbstractTensor = call.args[0]
    call.coupling.record_use(value)
    return replace(value, constant=None)
