#include "host/shared_library.h"

#include <dlfcn.h>

#include <stdexcept>

namespace mono {

SharedLibrary::SharedLibrary(std::string what, const std::vector<std::string>& names, const std::string& remedy)
    : what_(std::move(what)) {
  std::string tried;
  for (const std::string& name : names) {
    handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_) {
      name_ = name;
      return;
    }
    const char* reason = dlerror();
    tried += (tried.empty() ? "" : "; ") + (reason ? std::string(reason) : name);
  }
  throw std::runtime_error("no " + what_ + " (" + tried + "); " + remedy);
}

void* SharedLibrary::address(const char* symbol) const {
  void* found = dlsym(handle_, symbol);
  if (!found)
    throw std::runtime_error(name_ + " is no " + what_ + " that can be used: it has no function " + symbol +
                             "; update it, or name another one");
  return found;
}

}  // namespace mono
