#include "host/program_cache.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "host/sha256.h"

namespace mono {
namespace {

struct FileHeader {
  char magic[8];
  char key[64], checksum[64];
  u64 length;
};
constexpr char kMagic[9] = "MONOPRG1";

std::string digest(const std::string& code) {
  Sha256 hash;
  hash.add(code);
  return hash.hex();
}

bool write_all(int file, const char* data, size_t count) {
  while (count > 0) {
    const ssize_t written = ::write(file, data, count);
    if (written <= 0) return false;
    data += written;
    count -= size_t(written);
  }
  return true;
}

}  // namespace

ProgramCache::ProgramCache() {
  const char *named = std::getenv("JAX_MONO_CACHE"), *cache = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
  if (named && *named) {
    directory_ = named;
  } else if (cache && *cache) {
    directory_ = std::string(cache) + "/jax_mono";
  } else if (home && *home) {
    directory_ = std::string(home) + "/.cache/jax_mono";
  }
}

bool ProgramCache::load(const std::string& key, std::string& code) const {
  if (directory_.empty()) return false;
  std::ifstream file(path(key), std::ios::binary);
  FileHeader header;
  if (!file.read(reinterpret_cast<char*>(&header), sizeof header)) return false;
  if (std::memcmp(header.magic, kMagic, sizeof header.magic) || key.compare(0, 64, header.key, 64)) return false;
  std::ostringstream rest;
  rest << file.rdbuf();
  code = rest.str();
  return code.size() == header.length && digest(code).compare(0, 64, header.checksum, 64) == 0;
}

bool ProgramCache::store(const std::string& key, const std::string& code) const {
  if (directory_.empty()) return false;
  std::error_code error;
  std::filesystem::create_directories(directory_, error);
  static std::atomic<u64> count{0};
  const std::string other = path(key) + "." + std::to_string(::getpid()) + "." + std::to_string(count++);
  const int file = ::open(other.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (file < 0) return false;
  FileHeader header;
  std::memcpy(header.magic, kMagic, sizeof header.magic);
  std::memcpy(header.key, key.data(), sizeof header.key);
  std::memcpy(header.checksum, digest(code).data(), sizeof header.checksum);
  header.length = code.size();
  bool whole = write_all(file, reinterpret_cast<const char*>(&header), sizeof header) &&
               write_all(file, code.data(), code.size());
  whole = ::close(file) == 0 && whole;
  if (whole && std::rename(other.c_str(), path(key).c_str()) == 0) return true;
  std::remove(other.c_str());
  return false;
}

}  // namespace mono
