// Noise that every runtime can reproduce to the last bit: Philox 4x32-10, then the inverse normal distribution.
// The definition stands in docs/bundle-format.md under *Noise*.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace quantempo::runtime {

using Block = std::array<std::uint32_t, 4>;

Block philox(Block counter, std::uint64_t key);

// Natural logarithm of positive normal numbers, by operations that round the same everywhere.
double log64(double x);

// The inverse of the normal distribution by AS 241 (PPND16).
double inverse_normal(double p);

// Fills `out` with standard normals.  Counter words: block, block >> 32, stream, draw.
void standard_normal(std::uint64_t seed, std::uint32_t stream, std::uint32_t draw, float* out, std::size_t count);

}  // namespace quantempo::runtime
