// A GPU driver: CUDA's driver API or HIP, through one class of the same shape.
//
// Both are loaded when they are first asked for. Their functions take the same arguments, so that one table of pointers
// serves both; driver_cuda.cc and driver_hip.cc fill it and supply what does differ. Device addresses, streams, modules
// and functions are opaque pointers to the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "host/shared_library.h"
#include "kernel/types.h"

namespace mono {

enum class Platform : i32 { kCuda = 1, kRocm = 2 };

// A function of the driver, with its name for error messages. All return an error number, 0 for success.
template <class... P>
struct DriverFunction {
  const char* name = nullptr;
  int (*call)(P...) = nullptr;
};

class Driver {
 public:
  virtual ~Driver() = default;
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // Every function below throws std::runtime_error that names the driver's function, its error and a remedy. Unless it
  // takes a device's ordinal, it works on the device that Current has made current.
  virtual Platform platform() const = 0;
  virtual const char* name() const = 0;  // of the platform, for messages
  int devices() const;                   // 0 if there are none
  std::string device_name(int ordinal) const;
  virtual std::string architecture(int ordinal) const = 0;  // as the compiler calls it
  int multiprocessors(int ordinal) const;
  int shared_limit(int ordinal) const;  // bytes of shared memory that a block may have

  void* allocate(size_t bytes) const;
  virtual void* allocate_exchange(size_t bytes) const = 0;  // memory that running kernels of other devices read and write
  void release(void* address) const;
  // Host memory that the kernels of all devices reach under the same address while they run.
  void* allocate_host(size_t bytes) const;
  void release_host(void* address) const;

  // On `stream`, in order.
  void copy_in(void* device, const void* host, size_t bytes, void* stream) const;
  void copy_out(void* host, const void* device, size_t bytes, void* stream) const;
  void zero(void* device, size_t bytes, void* stream) const;
  void synchronize(void* stream) const;

  void* load(const std::string& code) const;
  void unload(void* module) const;
  void* find(void* module, const char* function) const;  // null if the module has none of that name
  virtual void allow_shared(void* function, int bytes) const = 0;
  int resident_blocks(void* function, int threads, size_t shared_bytes) const;  // per multiprocessor
  // All blocks are resident together, or the launch fails.
  void launch(void* function, unsigned blocks, unsigned threads, unsigned shared_bytes, void* stream, void** arguments) const;

  // Lets the current device reach the memory of another one.
  virtual void reach(int ordinal) const = 0;

  // Functions beyond those above, by their names on this platform.
  template <class... P>
  void find_function(const char* name, DriverFunction<P...>& function) const {
    function.name = name;
    library_.find(name, function.call);
  }
  template <class... P, class... A>
  void run(const DriverFunction<P...>& function, A... arguments) const {
    if (int error = function.call(arguments...)) fail(function.name, error);
  }

 protected:
  explicit Driver(SharedLibrary library) : library_(std::move(library)) {}

  // Names of the functions in the order of the table below; then loads it and starts the driver.
  void start(const char* const (&names)[19]);
  [[noreturn]] void fail(const char* function, int error) const;
  virtual std::string error_name(int error) const = 0;
  const SharedLibrary& library() const { return library_; }
  int device(int ordinal) const;
  int attribute(int ordinal, int which) const;

  // What is current for this thread: a context or a device, as a number that only the platform understands.
  friend class Current;
  virtual intptr_t current() const = 0;
  virtual void make_current(intptr_t what) const = 0;
  virtual intptr_t place(int ordinal) const = 0;

  // Numbers that differ between the platforms.
  struct Numbers {
    int multiprocessors, shared_limit;  // device attributes
    unsigned host_flags;                // portable to all devices, mapped, coherent
  } numbers_{};

 private:
  SharedLibrary library_;
  DriverFunction<unsigned> init_;
  DriverFunction<int*> count_;
  DriverFunction<int*, int> device_;
  DriverFunction<char*, int, int> device_name_;
  DriverFunction<int*, int, int> attribute_;
  DriverFunction<void**, size_t> allocate_;
  DriverFunction<void*> release_;
  DriverFunction<void**, size_t, unsigned> allocate_host_;
  DriverFunction<void*> release_host_;
  DriverFunction<void**, void*, unsigned> host_address_;
  DriverFunction<void*, const void*, size_t, void*> copy_in_;
  DriverFunction<void*, const void*, size_t, void*> copy_out_;
  DriverFunction<void*, unsigned char, size_t, void*> fill_;
  DriverFunction<void*> synchronize_;
  DriverFunction<void**, const void*> load_;
  DriverFunction<void*> unload_;
  DriverFunction<void**, void*, const char*> find_;
  DriverFunction<int*, void*, int, size_t> occupancy_;
  DriverFunction<void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**> launch_;
};

// Makes a device current for this thread, and what was before at its end.
class Current {
 public:
  Current(const Driver& driver, int ordinal);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
  intptr_t before_, now_;
};

// The driver of a platform, loaded at the first call that succeeds. Throws std::runtime_error if it is not there.
const Driver& driver(Platform platform);

// Of driver_cuda.cc and driver_hip.cc.
const Driver& cuda_driver();
const Driver& hip_driver();

// JAX_MONO_DRIVER, if it is set, in place of the libraries that a platform is found under.
std::vector<std::string> driver_libraries(std::vector<std::string> usual);

}  // namespace mono
