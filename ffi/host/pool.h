// Keeps objects that are costly to make for the next one who needs them.
#pragma once

#include <iterator>
#include <list>
#include <memory>
#include <mutex>
#include <utility>

namespace mono {

// Must outlive every object that was taken.
template <class Key, class T>
class Pool {
 public:
  // Takes an object that nobody uses, or makes one; it returns when the last reference goes. `fits` says whether an object
  // of a key will do.
  template <class Fits, class Make>
  std::shared_ptr<T> take(const Key& key, Fits fits, Make make) {
    std::unique_ptr<T> found;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto at = idle_.begin(); at != idle_.end(); ++at)
        if (fits(at->first, *at->second)) {
          found = std::move(at->second);
          idle_.erase(at);
          break;
        }
    }
    if (!found) found = make();
    return std::shared_ptr<T>(found.release(), [this, key](T* object) { put(key, std::unique_ptr<T>(object)); });
  }

 private:
  static constexpr size_t kIdle = 16;  // objects that are kept, the latest ones

  void put(const Key& key, std::unique_ptr<T> object) {
    std::list<std::pair<Key, std::unique_ptr<T>>> oldest;  // freed without the lock
    std::lock_guard<std::mutex> lock(mutex_);
    idle_.emplace_front(key, std::move(object));
    if (idle_.size() > kIdle) oldest.splice(oldest.end(), idle_, std::prev(idle_.end()));
  }

  std::mutex mutex_;
  std::list<std::pair<Key, std::unique_ptr<T>>> idle_;
};

}  // namespace mono
