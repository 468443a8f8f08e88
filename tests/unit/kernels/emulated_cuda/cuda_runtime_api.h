// As much of CUDA's execution model as csrc/cuda/logprob_cuda.cu uses, on one CPU thread, so that the kernels' own
// source runs where there is no GPU. Blocks run one after the other; the threads of a block are fibers that run until a
// barrier, in an order that the caller chooses: a missing barrier shows as a result that depends on it.
//
// It shows what the kernels compute and that every thread reaches every barrier. It says nothing about speed, memory
// ordering within a warp, registers, or the GPU's own exp and log.
#pragma once

#include <math.h>
#include <stdint.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

inline float max(float a, float b) { return fmaxf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

namespace emulated {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 32 * 1024;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline double exchanged[1024];
inline int order = 0;  // 0: threads in order, 1: in reverse, else the seed of a random order

inline void wait_at(State barrier) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.state = barrier;
  swapcontext(&fiber.context, &scheduler);
}

inline void run_body() {
  body();
  Fiber& fiber = fibers[threadIdx.x];
  fiber.state = State::kDone;
  swapcontext(&fiber.context, &scheduler);
}

// Lets go the threads [begin, end) if all of them wait at `barrier`.
inline bool release(unsigned begin, unsigned end, State barrier) {
  for (unsigned t = begin; t < end; ++t) {
    if (fibers[t].state != barrier) return false;
  }
  for (unsigned t = begin; t < end; ++t) fibers[t].state = State::kReady;
  return true;
}

inline bool release_barriers() {
  bool any = release(0, blockDim.x, State::kAtBlockBarrier);
  for (unsigned t = 0; t < blockDim.x; t += kWarpSize) {
    any = release(t, std::min(t + kWarpSize, blockDim.x), State::kAtWarpBarrier) || any;
  }
  return any;
}

inline bool all_done() {
  return std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.state == State::kDone; });
}

inline void run_block() {
  fibers = std::vector<Fiber>(blockDim.x);
  for (Fiber& fiber : fibers) {
    fiber.stack.reset(new char[kStackBytes]);
    fiber.state = State::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_body, 0);
  }
  std::vector<unsigned> turns(blockDim.x);
  std::iota(turns.begin(), turns.end(), 0u);
  if (order == 1) std::reverse(turns.begin(), turns.end());
  std::mt19937 random(order);
  do {
    if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
    for (const unsigned thread : turns) {
      if (fibers[thread].state != State::kReady) continue;
      threadIdx.x = thread;
      swapcontext(&scheduler, &fibers[thread].context);
    }
  } while (release_barriers());
  if (!all_done()) {
    std::fprintf(stderr, "threads of block %u wait at a barrier that others do not reach\n", blockIdx.x);
    std::abort();
  }
}

// Stands for kernel<<<blocks, threads, shared, stream>>>.
template <typename Kernel>
auto launch(Kernel kernel, unsigned blocks, unsigned threads, size_t, cudaStream_t) {
  return [=](auto... arguments) {
    gridDim.x = blocks;
    blockDim.x = threads;
    body = [=] { kernel(arguments...); };
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block();
  };
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait_at(emulated::State::kAtBlockBarrier); }

inline double __shfl_xor_sync(unsigned, double value, int mask) {
  emulated::exchanged[threadIdx.x] = value;
  emulated::wait_at(emulated::State::kAtWarpBarrier);
  const double other = emulated::exchanged[threadIdx.x ^ static_cast<unsigned>(mask)];
  emulated::wait_at(emulated::State::kAtWarpBarrier);  // before it is overwritten
  return other;
}

// Few blocks, so that each of them goes through several rows.
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
