// Working memory that begins at a cache line, which tile registers and vectors load faster.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace megatron_sip {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// `count` values, not initialised.
template <typename T>
std::unique_ptr<T[], Free> aligned_memory(int64_t count) {
  constexpr std::size_t kLine = 64;
  void* memory = std::aligned_alloc(kLine, (count * sizeof(T) + kLine - 1) / kLine * kLine);
  if (memory == nullptr && count > 0) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>(static_cast<T*>(memory));
}

}  // namespace megatron_sip
