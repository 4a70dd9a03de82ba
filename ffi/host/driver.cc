#include "host/driver.h"

#include <cstdlib>
#include <stdexcept>

namespace mono {
namespace {

constexpr int kNoDevice = 100, kNotFound = 500;  // the same number on both platforms

struct Remedy {
  int error;
  const char* text;
};
// Error numbers that both platforms share, and what can be done.
const Remedy kRemedies[] = {
    {2, "the GPU's memory is full: free some, plan fewer blocks, or let XLA take less (XLA_PYTHON_CLIENT_MEM_FRACTION)"},
    {3, "the driver did not start; see that nvidia-smi or rocm-smi works for this user"},
    {35, "the driver is older than its library; update it"},
    {98, "the program does not fit this library; delete the cache directory (JAX_MONO_CACHE)"},
    {kNoDevice, "no GPU is visible; look at CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES, and at the access rights of /dev"},
    {101, "there is no device of this number; look at CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES"},
    {200, "the compiled program is damaged; delete the cache directory (JAX_MONO_CACHE)"},
    {209, "the program was compiled for another GPU; delete the cache directory (JAX_MONO_CACHE)"},
    {217, "the GPUs cannot reach each other's memory; use devices of one host that are linked"},
    {700, "the program went outside its memory: report this; only a new process can use the GPU again"},
    {701, "the program needs more registers or shared memory than there are; plan fewer blocks"},
    {719, "the program died: report this; only a new process can use the GPU again"},
    {720, "not all blocks fit on the GPU at once; plan fewer blocks"},
    {803, "library and kernel module of the driver are of different versions; reboot, or reinstall the driver"},
    {999, "the driver does not say why; restart the process, and see the system's log"},
};

const char* remedy(int error) {
  for (const Remedy& known : kRemedies)
    if (known.error == error) return known.text;
  return "see the driver's documentation and the system's log";
}

}  // namespace

void Driver::start(const char* const (&names)[19]) {
  const char* const* name = names;
  find_function(*name++, init_);
  find_function(*name++, count_);
  find_function(*name++, device_);
  find_function(*name++, device_name_);
  find_function(*name++, attribute_);
  find_function(*name++, allocate_);
  find_function(*name++, release_);
  find_function(*name++, allocate_host_);
  find_function(*name++, release_host_);
  find_function(*name++, host_address_);
  find_function(*name++, copy_in_);
  find_function(*name++, copy_out_);
  find_function(*name++, fill_);
  find_function(*name++, synchronize_);
  find_function(*name++, load_);
  find_function(*name++, unload_);
  find_function(*name++, find_);
  find_function(*name++, occupancy_);
  find_function(*name++, launch_);
  run(init_, 0u);
}

void Driver::fail(const char* function, int error) const {
  throw std::runtime_error(std::string(function) + " failed with " + error_name(error) + " (" + std::to_string(error) +
                           "); " + remedy(error));
}

int Driver::devices() const {
  int count = 0;
  const int error = count_.call(&count);
  if (error == kNoDevice) return 0;
  if (error) fail(count_.name, error);
  return count;
}

int Driver::device(int ordinal) const {
  int device = 0;
  run(device_, &device, ordinal);
  return device;
}

int Driver::attribute(int ordinal, int which) const {
  int value = 0;
  run(attribute_, &value, which, device(ordinal));
  return value;
}

std::string Driver::device_name(int ordinal) const {
  char text[256] = {};
  run(device_name_, text, int(sizeof text) - 1, device(ordinal));
  return text;
}

int Driver::multiprocessors(int ordinal) const { return attribute(ordinal, numbers_.multiprocessors); }
int Driver::shared_limit(int ordinal) const { return attribute(ordinal, numbers_.shared_limit); }

void* Driver::allocate(size_t bytes) const {
  void* address = nullptr;
  run(allocate_, &address, bytes);
  return address;
}
void Driver::release(void* address) const { run(release_, address); }

void* Driver::allocate_host(size_t bytes) const {
  void *address = nullptr, *mapped = nullptr;
  run(allocate_host_, &address, bytes, numbers_.host_flags);
  run(host_address_, &mapped, address, 0u);
  // True of every 64-bit system with either platform; it keeps one record good for host and devices.
  if (mapped != address) {
    run(release_host_, address);
    throw std::runtime_error(std::string(host_address_.name) + ": the GPU sees host memory under another address; " +
                             "it needs a driver with unified addressing");
  }
  return address;
}
void Driver::release_host(void* address) const { run(release_host_, address); }

void Driver::copy_in(void* device, const void* host, size_t bytes, void* stream) const {
  if (bytes) run(copy_in_, device, host, bytes, stream);
}
void Driver::copy_out(void* host, const void* device, size_t bytes, void* stream) const {
  if (bytes) run(copy_out_, host, device, bytes, stream);
}
void Driver::zero(void* device, size_t bytes, void* stream) const {
  if (bytes) run(fill_, device, static_cast<unsigned char>(0), bytes, stream);
}
void Driver::synchronize(void* stream) const { run(synchronize_, stream); }

void* Driver::load(const std::string& code) const {
  void* module = nullptr;
  run(load_, &module, static_cast<const void*>(code.data()));
  return module;
}
void Driver::unload(void* module) const { run(unload_, module); }

void* Driver::find(void* module, const char* function) const {
  void* found = nullptr;
  const int error = find_.call(&found, module, function);
  if (error == kNotFound) return nullptr;
  if (error) fail(find_.name, error);
  return found;
}

int Driver::resident_blocks(void* function, int threads, size_t shared_bytes) const {
  int blocks = 0;
  run(occupancy_, &blocks, function, threads, shared_bytes);
  return blocks;
}

void Driver::launch(void* function, unsigned blocks, unsigned threads, unsigned shared_bytes, void* stream,
                    void** arguments) const {
  run(launch_, function, blocks, 1u, 1u, threads, 1u, 1u, shared_bytes, stream, arguments);
}

Current::Current(const Driver& driver, int ordinal)
    : driver_(driver), before_(driver.current()), now_(driver.place(ordinal)) {
  if (now_ != before_) driver_.make_current(now_);
}

Current::~Current() {
  if (now_ == before_) return;
  try {
    driver_.make_current(before_);
  } catch (const std::exception&) {  // the next call that needs a device will say so
  }
}

const Driver& driver(Platform platform) { return platform == Platform::kCuda ? cuda_driver() : hip_driver(); }

std::vector<std::string> driver_libraries(std::vector<std::string> usual) {
  const char* named = std::getenv("JAX_MONO_DRIVER");
  if (named && *named) return {named};
  return usual;
}

}  // namespace mono
