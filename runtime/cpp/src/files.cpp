#include "files.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "error.hpp"
#include "sha256.hpp"

namespace quantempo::runtime {

namespace {

[[noreturn]] void unreadable(const std::string& shown_as, const std::string& why) {
  throw Error(Kind::BundleError, shown_as, "a file that cannot be read (" + why + ")", "a readable file",
              "missing rights, or a damaged disk", "look at the file's rights");
}

class Descriptor {
 public:
  explicit Descriptor(const std::string& path) : number_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW)) {}
  ~Descriptor() {
    if (number_ >= 0) ::close(number_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int number() const { return number_; }

 private:
  int number_;
};

}  // namespace

FileType file_type(const std::string& path) {
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) return FileType::Missing;
  if (S_ISLNK(status.st_mode)) return FileType::Link;
  if (S_ISREG(status.st_mode)) return FileType::Regular;
  return S_ISDIR(status.st_mode) ? FileType::Folder : FileType::Other;
}

std::string read_file(const std::string& path, const std::string& shown_as, std::size_t limit) {
  const Descriptor file(path);
  struct stat status {};
  if (file.number() < 0 || ::fstat(file.number(), &status) != 0) unreadable(shown_as, std::strerror(errno));
  if (!S_ISREG(status.st_mode)) unreadable(shown_as, "not a regular file");
  if (static_cast<std::uint64_t>(status.st_size) > limit) {
    throw Error(Kind::BundleError, shown_as, std::to_string(status.st_size) + " bytes",
                "at most " + std::to_string(limit) + " bytes", "the file is damaged, or of another kind",
                "compile the bundle again");
  }
  std::string text(static_cast<std::size_t>(status.st_size), '\0');
  std::size_t done = 0;
  while (done < text.size()) {
    const auto count = ::read(file.number(), text.data() + done, text.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) unreadable(shown_as, std::strerror(errno));
    if (count == 0) break;
    done += static_cast<std::size_t>(count);
  }
  text.resize(done);
  return text;
}

void write_file(const std::string& path, const std::string& bytes) {
  const std::string temporary = path + "." + std::to_string(::getpid()) + ".tmp";
  std::FILE* file = std::fopen(temporary.c_str(), "wb");
  bool whole = file != nullptr && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size();
  int code = whole ? 0 : errno;
  if (file != nullptr && std::fclose(file) != 0 && whole) whole = false, code = errno;
  if (whole && std::rename(temporary.c_str(), path.c_str()) == 0) return;
  if (whole) code = errno;
  if (file != nullptr) std::remove(temporary.c_str());
  throw Error(Kind::RequestError, path, "a file that cannot be written (" + std::string(std::strerror(code)) + ")",
              "a path to write to", "a missing folder, missing rights, or a full disk", "choose another path");
}

std::string file_digest(const std::string& path, const std::string& shown_as) {
  const Descriptor file(path);
  if (file.number() < 0) unreadable(shown_as, std::strerror(errno));
  constexpr std::size_t chunk = std::size_t{1} << 18;
  const std::unique_ptr<unsigned char[]> buffer(new unsigned char[chunk]);
  Sha256 digest;
  while (true) {
    const auto count = ::read(file.number(), buffer.get(), chunk);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) unreadable(shown_as, std::strerror(errno));
    if (count == 0) return digest.hex();
    digest.update(buffer.get(), static_cast<std::size_t>(count));
  }
}

MappedFile::MappedFile(const std::string& path) {
  const Descriptor file(path);
  struct stat status {};
  if (file.number() < 0 || ::fstat(file.number(), &status) != 0) throw std::runtime_error(std::strerror(errno));
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ == 0) return;
  data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.number(), 0);
  if (data_ == MAP_FAILED) throw std::runtime_error(std::strerror(errno));
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

}  // namespace quantempo::runtime
