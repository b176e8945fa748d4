// Decoded tensors to pictures.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace quantempo::runtime {

// 8-bit pixels, row by row, channels interleaved (1: grey, 3: RGB).
struct Picture {
  std::size_t width = 0, height = 0, channels = 0;
  std::vector<std::uint8_t> pixels;
};

// One sample (channels, height, width) in about [-1, 1]; a NaN becomes black.
Picture to_picture(const float* decoded, std::size_t channels, std::size_t height, std::size_t width);

// Pictures of one size, side by side in rows with white between them; 0 columns: about as many as rows.
Picture grid(const std::vector<Picture>& pictures, std::size_t columns);

// A PNG file's bytes.  The Python package writes the same pixels with the same filters.
std::string encode_png(const Picture& picture);

}  // namespace quantempo::runtime
