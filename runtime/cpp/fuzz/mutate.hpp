// Structure-aware mutation: JSON stays JSON most of the time, and the length of a safetensors header stays right.
#pragma once

#include <cstddef>
#include <cstdint>

// Changes an input (a selector byte, then a document) in place; returns its new size.
std::size_t mutate(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed);
