"""The arithmetic of a step program on a device: linear forms, clamps, corrections, guidance.

It is the arithmetic that `quantempo.contracts.program` defines, bit for bit: float64 in the written order, one rounding
to float32, no contraction.  One small kernel per operation, queued in the engine's stream, so that registers never
leave the device.  The kernels are also plain C++ (`HOST` below): the tests compile them for this machine and compare
them with the host's registers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

from quantempo.errors import EngineError

MOST_TERMS = 16
HOST = "#define QT_HOST 1\n"
"""Put in front of `SOURCE` to compile it as C++ for this machine."""
SOURCE = r"""
#ifdef QT_HOST
#include <cmath>
#define KERNEL extern "C" void
#define EACH(i, n) for (unsigned long long i = 0; i < (n); ++i)
#else
#define KERNEL extern "C" __global__ void
#define EACH(i, n) \
  for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x, once = 1; once && i < (n); \
       once = 0)
#endif

struct Terms {
  const float* from[16];
  double weight[16];
  int count;
};

KERNEL lin(unsigned long long n, float* out, Terms terms) {
  EACH(i, n) {
    double sum = terms.count ? terms.weight[0] * (double)terms.from[0][i] : 0.0;
    for (int k = 1; k < terms.count; ++k) sum = sum + terms.weight[k] * (double)terms.from[k][i];
    out[i] = (float)sum;
  }
}

KERNEL clamp(unsigned long long n, float* out, const float* from, float low, float high) {
  EACH(i, n) {
    const float x = from[i];
    out[i] = x < low ? low : x > high ? high : x;  // not-a-number stays what it is
  }
}

KERNEL correct(unsigned long long n, float* out, const float* from, const float* gain, const float* bias,
               unsigned long long inner, unsigned long long channels) {
  EACH(i, n) {
    const unsigned long long c = i / inner % channels;
    const double product = (double)from[i] * (double)gain[c];
    out[i] = (float)(product + (double)bias[c]);
  }
}

KERNEL guide(unsigned long long n, float* out, const float* conditional, const float* unconditional,
             const int* null_row, const double* scale, unsigned long long size) {
  EACH(i, n) {
    const unsigned long long sample = i / size;
    const float c = conditional[i];
    if (null_row[sample] < 0) {
      out[i] = c;
    } else {
      const double u = (double)unconditional[(unsigned long long)null_row[sample] * size + i % size];
      const double step = ((double)c - u) * scale[sample];
      out[i] = (float)(u + step);
    }
  }
}

static inline
#ifndef QT_HOST
__device__
#endif
double guided(double c, double u, double scale) {
  const double step = (c - u) * scale;
  return u + step;
}

// One thread per sample: sums run strictly from first to last, so that every runtime agrees.
KERNEL guide_rescaled(unsigned long long n, float* out, const float* conditional, const float* unconditional,
                      const int* null_row, const double* scale, unsigned long long size, double rescale) {
  EACH(sample, n) {
    const float* c = conditional + sample * size;
    float* to = out + sample * size;
    if (null_row[sample] < 0) {
      for (unsigned long long i = 0; i < size; ++i) to[i] = c[i];
    } else {
      const float* u = unconditional + (unsigned long long)null_row[sample] * size;
      const double g = scale[sample];
      double deviation[2];
      for (int which = 0; which < 2; ++which) {
        double sum = which ? guided(c[0], u[0], g) : (double)c[0];
        for (unsigned long long i = 1; i < size; ++i) sum = sum + (which ? guided(c[i], u[i], g) : (double)c[i]);
        const double mean = sum / (double)size;
        double squares = 0.0;
        for (unsigned long long i = 0; i < size; ++i) {
          const double centred = (which ? guided(c[i], u[i], g) : (double)c[i]) - mean;
          const double square = centred * centred;
          squares = i ? squares + square : square;
        }
        deviation[which] = sqrt(squares / (double)(size - 1));
      }
      const double ratio = rescale * (deviation[0] / deviation[1]);
      const double factor = ratio + (1.0 - rescale);
      for (unsigned long long i = 0; i < size; ++i) to[i] = (float)(guided(c[i], u[i], g) * factor);
    }
  }
}
"""


class Terms(ctypes.Structure):
    """The struct of the same name in `SOURCE`."""

    _fields_ = (
        ("source", ctypes.c_uint64 * MOST_TERMS), ("weight", ctypes.c_double * MOST_TERMS), ("count", ctypes.c_int),
    )


class Launcher(Protocol):
    """What runs kernels; `quantempo.engines.cuda_device.CudaDevice` is one."""

    def prepare(self, source: str) -> None:
        """Compile kernels, unless that was done before."""

    def launch(self, source: str, kernel: str, count: int, arguments: Sequence[Any], stream: int) -> None:
        """Run a kernel over `count` elements."""


class DeviceMath:
    """Operations on float32 tensors at device addresses; `count` is always a number of elements.

    Args:
        device: runs the kernels.
        stream: where they are queued.
    """

    def __init__(self, device: Launcher, stream: int) -> None:
        self._device, self._stream = device, stream

    def prepare(self) -> None:
        """Compile the kernels.

        Raises:
            EngineError: the compiler refuses them.
            MissingExtra: there is none.
        """
        self._device.prepare(SOURCE)

    def lin(self, terms: Sequence[tuple[int, float]], out: int, count: int) -> None:
        """`out = Σ coefficient · source` in the written order; no terms make zeros.

        Raises:
            EngineError: more terms than a kernel takes.
        """
        if len(terms) > MOST_TERMS:
            raise EngineError(
                "device registers", found=f"a linear form of {len(terms)} terms", wanted=f"at most {MOST_TERMS}",
                cause="a sampler of unusually high order", remedy="run this program on ONNX Runtime",
            )
        packed = Terms(count=len(terms))
        for index, (source, weight) in enumerate(terms):
            packed.source[index], packed.weight[index] = source, weight
        self._launch("lin", count, _address(out), packed)

    def clamp(self, source: int, low: float, high: float, out: int, count: int) -> None:
        """`out = min(max(source, low), high)`; the bounds are rounded to float32 first."""
        self._launch("clamp", count, _address(out), _address(source), ctypes.c_float(low), ctypes.c_float(high))

    def correct(self, source: int, gain: int, bias: int, channels: int, inner: int, out: int, count: int) -> None:
        """`out = gain · source + bias` per channel; `inner` elements lie between two channels."""
        places = [_address(place) for place in (out, source, gain, bias)]
        self._launch("correct", count, *places, ctypes.c_uint64(inner), ctypes.c_uint64(channels))

    def guide(
        self, conditional: int, unconditional: int, null_rows: int, scales: int, out: int,
        shape: tuple[int, int], rescale: float = 0.0,
    ) -> None:
        """Classifier-free guidance, `u + g·(c - u)`, with rescaling where `rescale` is above 0.

        Args:
            conditional: (samples, size).
            unconditional: (guided samples, size).
            null_rows: int32 per sample, its row in `unconditional`; -1 where it is not guided.
            scales: float64 per sample.
            out: (samples, size).
            shape: samples and elements of one.
            rescale: see `quantempo.runtime.guidance`.
        """
        samples, size = shape
        places = [_address(place) for place in (out, conditional, unconditional, null_rows, scales)]
        if rescale:
            self._launch("guide_rescaled", samples, *places, ctypes.c_uint64(size), ctypes.c_double(rescale))
        else:
            self._launch("guide", samples * size, *places, ctypes.c_uint64(size))

    def _launch(self, kernel: str, count: int, *arguments: Any) -> None:
        self._device.launch(SOURCE, kernel, count, [ctypes.c_uint64(count), *arguments], self._stream)


def _address(place: int) -> Any:
    return ctypes.c_uint64(place)
