// Files of a bundle: read whole, mapped or digested.
#pragma once

#include <cstddef>
#include <string>

namespace quantempo::runtime {

enum class FileType { Missing, Regular, Folder, Link, Other };

// What lies at a path; a link is not followed.
FileType file_type(const std::string& path);

// The bytes of a file.  Throws `BundleError` where it cannot be read, or is larger than `limit`.
std::string read_file(const std::string& path, const std::string& shown_as, std::size_t limit);

// Writes a file whole: it is complete when this returns, and as it was after an error.  Throws `RequestError`.
void write_file(const std::string& path, const std::string& bytes);

// SHA-256 of a file in hexadecimal, read in chunks.
std::string file_digest(const std::string& path, const std::string& shown_as);

// A file mapped read-only; empty files have no address.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);  // throws `std::runtime_error` in the system's words
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const unsigned char* data() const { return static_cast<const unsigned char*>(data_); }
  std::size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace quantempo::runtime
