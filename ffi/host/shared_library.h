// A library that is opened while the program runs: nothing of a GPU's vendor is linked.
#pragma once

#include <string>
#include <vector>

namespace mono {

class SharedLibrary {
 public:
  // Opens the first of `names` that loads, and never closes it: drivers keep threads of their own. Throws
  // std::runtime_error that names `what`, everything that was tried, and `remedy`.
  SharedLibrary(std::string what, const std::vector<std::string>& names, const std::string& remedy);

  const std::string& name() const { return name_; }

  // Looks a function up. Throws std::runtime_error if the library has none of that name.
  template <class F>
  void find(const char* symbol, F*& function) const {
    function = reinterpret_cast<F*>(address(symbol));
  }

 private:
  void* address(const char* symbol) const;

  std::string what_, name_;
  void* handle_ = nullptr;
};

}  // namespace mono
