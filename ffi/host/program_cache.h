// Compiled programs on disk, so that a process starts without a compiler's delay.
//
// A file is known by the SHA-256 of everything that its code depends on, and carries that key, its length and the SHA-256
// of the code: a file that was cut short or written over is compiled again. Files are written under another name and
// renamed, so that processes that start together cannot harm each other. What goes wrong costs the cache, nothing else.
#pragma once

#include <string>

namespace mono {

class ProgramCache {
 public:
  // In JAX_MONO_CACHE, else jax_mono in $XDG_CACHE_HOME or ~/.cache; nowhere if there is no such directory.
  ProgramCache();

  const std::string& directory() const { return directory_; }
  // Returns whether there is a whole program of this key.
  bool load(const std::string& key, std::string& code) const;
  // Returns whether it was written.
  bool store(const std::string& key, const std::string& code) const;

 private:
  std::string path(const std::string& key) const { return directory_ + "/" + key + ".program"; }

  std::string directory_;
};

}  // namespace mono
