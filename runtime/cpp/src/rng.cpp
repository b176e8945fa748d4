#include "rng.hpp"

#include <cfloat>
#include <cmath>

namespace quantempo::runtime {

// The arithmetic is a contract: no wider registers (x87), and no contraction, which the build switches off.
static_assert(FLT_EVAL_METHOD == 0, "build for a target whose float and double are evaluated as such (SSE2, NEON)");

namespace {

constexpr double kLn2High = 6.93147180369123816490e-01;  // 33 bits, so that a small integer times it is exact
constexpr double kLn2Low = 1.90821492927058770002e-10;
constexpr double kSqrtHalf = 0.7071067811865476;

struct Ratio {
  double numerator[8], denominator[8];  // highest power first

  double operator()(double r) const {
    double top = numerator[0], bottom = denominator[0];
    for (int i = 1; i < 8; ++i) {
      top = top * r + numerator[i];
      bottom = bottom * r + denominator[i];
    }
    return top / bottom;
  }
};

constexpr Ratio kCentre = {
    {2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608},
    {5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0}};
constexpr Ratio kMiddle = {
    {7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734},
    {1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0}};
constexpr Ratio kFar = {
    {2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
     0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772},
    {2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0}};

float normal_of(std::uint32_t low, std::uint32_t high) {
  const std::uint64_t bits = ((std::uint64_t{high} << 32 | low) >> 11) | 1;
  return static_cast<float>(inverse_normal(static_cast<double>(bits) * 0x1p-53));
}

}  // namespace

Block philox(Block c, std::uint64_t key) {
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{c[0]} * 0xD2511F53u, p1 = std::uint64_t{c[2]} * 0xCD9E8D57u;
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

double log64(double x) {
  int exponent = 0;
  double mantissa = std::frexp(x, &exponent);
  if (mantissa < kSqrtHalf) mantissa *= 2.0, --exponent;
  const double power = exponent;
  const double s = (mantissa - 1.0) / (mantissa + 1.0);
  const double square = s * s;
  double series = 1.0 / 23;
  for (int n = 10; n > 0; --n) series = series * square + 1.0 / (2 * n + 1);
  const double tail = series * square * s;
  return power * kLn2High + (power * kLn2Low + 2.0 * (s + tail));
}

double inverse_normal(double p) {
  const double q = p - 0.5;
  if (!(std::fabs(q) > 0.425)) return q * kCentre(0.180625 - q * q);
  const double r = std::sqrt(-log64(p < 1.0 - p ? p : 1.0 - p));
  const double value = r <= 5.0 ? kMiddle(r - 1.6) : kFar(r - 5.0);
  return q < 0.0 ? -value : value;
}

void standard_normal(std::uint64_t seed, std::uint32_t stream, std::uint32_t draw, float* out, std::size_t count) {
  for (std::size_t at = 0; at < count; at += 2) {
    const std::uint64_t block = at / 2;
    const Block words =
        philox({static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), stream, draw}, seed);
    out[at] = normal_of(words[0], words[1]);
    if (at + 1 < count) out[at + 1] = normal_of(words[2], words[3]);
  }
}

}  // namespace quantempo::runtime
