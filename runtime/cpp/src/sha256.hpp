// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace quantempo::runtime {

class Sha256 {
 public:
  Sha256();
  void update(const void* data, std::size_t size);
  std::string hex();  // finishes; the object is spent

 private:
  void blocks(const unsigned char* data, std::size_t count);

  std::array<std::uint32_t, 8> state_;
  std::array<unsigned char, 64> pending_{};
  std::size_t held_ = 0;
  std::uint64_t total_ = 0;
};

// The digest of some bytes in hexadecimal.
std::string digest_of(const std::string& bytes);

}  // namespace quantempo::runtime
