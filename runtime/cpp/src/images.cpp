#include "images.hpp"

#include <zlib.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "error.hpp"

namespace quantempo::runtime {

namespace {

constexpr std::size_t kGap = 2;

void put_number(std::string& out, std::uint32_t number) {
  for (int shift = 24; shift >= 0; shift -= 8) out += static_cast<char>(number >> shift);
}

void put_chunk(std::string& out, const char* type, const std::string& body) {
  put_number(out, static_cast<std::uint32_t>(body.size()));
  const std::string part = type + body;
  out += part;
  put_number(out, static_cast<std::uint32_t>(
                      crc32(0, reinterpret_cast<const Bytef*>(part.data()), static_cast<uInt>(part.size()))));
}

std::uint8_t paeth(int left, int up, int corner) {
  const int estimate = left + up - corner;
  const int a = std::abs(estimate - left), b = std::abs(estimate - up), c = std::abs(estimate - corner);
  if (a <= b && a <= c) return static_cast<std::uint8_t>(left);
  return static_cast<std::uint8_t>(b <= c ? up : corner);
}

// A row after one of PNG's five filters.
void filter(int type, const std::uint8_t* row, const std::uint8_t* above, std::size_t size, std::size_t step,
            std::uint8_t* out) {
  for (std::size_t i = 0; i < size; ++i) {
    const int left = i >= step ? row[i - step] : 0, up = above[i], corner = i >= step ? above[i - step] : 0;
    const int base = type == 0 ? 0 : type == 1 ? left : type == 2 ? up : type == 3 ? (left + up) / 2 : paeth(left, up, corner);
    out[i] = static_cast<std::uint8_t>(row[i] - base);
  }
}

// Each row with the filter whose bytes, as signed numbers, have the smallest sum of magnitudes; the first of equals.
std::string filtered(const Picture& picture) {
  const std::size_t size = picture.width * picture.channels;
  const std::vector<std::uint8_t> blank(size, 0);
  std::vector<std::uint8_t> tried(size), best(size);
  std::string out;
  for (std::size_t y = 0; y < picture.height; ++y) {
    const std::uint8_t* row = picture.pixels.data() + y * size;
    const std::uint8_t* above = y == 0 ? blank.data() : row - size;
    long smallest = -1;
    int chosen = 0;
    for (int type = 0; type < 5; ++type) {
      filter(type, row, above, size, picture.channels, tried.data());
      long sum = 0;
      for (const auto byte : tried) sum += byte < 128 ? byte : 256 - byte;
      if (smallest >= 0 && sum >= smallest) continue;
      smallest = sum, chosen = type;
      best = tried;
    }
    out += static_cast<char>(chosen);
    out.append(reinterpret_cast<const char*>(best.data()), size);
  }
  return out;
}

}  // namespace

Picture to_picture(const float* decoded, std::size_t channels, std::size_t height, std::size_t width) {
  Picture picture{width, height, channels, std::vector<std::uint8_t>(channels * height * width)};
  const std::size_t plane = height * width;
  for (std::size_t i = 0; i < plane; ++i) {
    for (std::size_t channel = 0; channel < channels; ++channel) {
      float value = decoded[channel * plane + i] * 0.5f + 0.5f;
      if (value < 0.0f) value = 0.0f;
      if (value > 1.0f) value = 1.0f;
      if (std::isnan(value)) value = 0.0f;
      picture.pixels[i * channels + channel] = static_cast<std::uint8_t>(std::nearbyint(value * 255.0f));
    }
  }
  return picture;
}

Picture grid(const std::vector<Picture>& pictures, std::size_t columns) {
  if (columns == 0) {
    while (columns * columns < pictures.size()) ++columns;
  }
  const auto& first = pictures.at(0);
  const std::size_t rows = (pictures.size() + columns - 1) / columns;
  Picture sheet{columns * (first.width + kGap) - kGap, rows * (first.height + kGap) - kGap, first.channels, {}};
  sheet.pixels.assign(sheet.width * sheet.height * sheet.channels, 255);
  const std::size_t bytes = first.width * first.channels;
  for (std::size_t index = 0; index < pictures.size(); ++index) {
    const std::size_t left = index % columns * (first.width + kGap), top = index / columns * (first.height + kGap);
    for (std::size_t y = 0; y < first.height; ++y) {
      std::memcpy(sheet.pixels.data() + ((top + y) * sheet.width + left) * first.channels,
                  pictures[index].pixels.data() + y * bytes, bytes);
    }
  }
  return sheet;
}

std::string encode_png(const Picture& picture) {
  if (picture.channels != 1 && picture.channels != 3) {
    throw Error(Kind::RequestError, "PNG", std::to_string(picture.channels) + " channels", "1 or 3",
                "the decoder makes no pictures", "take the latents or the pixels instead");
  }
  const std::string plain = filtered(picture);
  uLongf size = compressBound(static_cast<uLong>(plain.size()));
  std::string packed(size, '\0');
  const int failed = compress2(reinterpret_cast<Bytef*>(packed.data()), &size,
                               reinterpret_cast<const Bytef*>(plain.data()), static_cast<uLong>(plain.size()), 6);
  if (failed != Z_OK) throw Error(Kind::OutOfMemory, "PNG", "zlib error " + std::to_string(failed), "room", "no memory", "free some");
  packed.resize(size);
  std::string header;
  put_number(header, static_cast<std::uint32_t>(picture.width));
  put_number(header, static_cast<std::uint32_t>(picture.height));
  header += std::string{8, static_cast<char>(picture.channels == 1 ? 0 : 2), 0, 0, 0};
  std::string out = "\x89PNG\r\n\x1a\n";
  put_chunk(out, "IHDR", header);
  put_chunk(out, "IDAT", packed);
  put_chunk(out, "IEND", "");
  return out;
}

}  // namespace quantempo::runtime
