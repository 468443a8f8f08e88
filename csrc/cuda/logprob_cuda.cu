// CUDA kernels of the log-prob op (sm_80, sm_90): a persistent grid whose blocks take one row after the other, 16-byte
// loads and stores.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "logprob_cuda.h"

namespace megatron_sip {
namespace {

constexpr int kWarp = 32;
// Half of what a block may have: several blocks share a multiprocessor, and memory is busy while one of them merges its
// threads. The gradient takes as many as registers allow without spills (but in float64); the statistics fewer, as they
// read four packs at a time and their rows should stay in the L2 cache.
constexpr int kMaxThreads = 512;
constexpr int kStatisticsBlocks = 2;
constexpr int kGradientBlocks = 3;
constexpr int kPackBytes = 16;
constexpr int kPacksInFlight = 4;

// float64 logits are computed in float64, all others in float32.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T narrow(Compute<T> x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half(x);
}

__device__ inline float exponential(float x) { return exp2f(x * 1.44269504f); }
__device__ inline double exponential(double x) { return exp(x); }

template <typename C>
__device__ inline C negative_infinity() {
  return -static_cast<C>(INFINITY);
}

template <typename T>
struct alignas(kPackBytes) Pack {
  static constexpr int kSize = kPackBytes / sizeof(T);
  T values[kSize];
};

// How a row splits into single elements up to a 16-byte boundary, packs, and single elements.
template <typename T>
struct RowSplit {
  int64_t head;
  int64_t packs;
  int64_t tail_begin;

  __device__ RowSplit(const T* row, int64_t length) {
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % kPackBytes);
    const int64_t missing = (kPackBytes - past) % kPackBytes / static_cast<int64_t>(sizeof(T));
    head = missing < length ? missing : length;
    packs = (length - head) / Pack<T>::kSize;
    tail_begin = head + packs * Pack<T>::kSize;
  }
};

// Running statistics of one thread; threads are merged in float64.
template <typename C>
struct Online {
  C highest = negative_infinity<C>();
  C sum = 0;

  template <typename T, int N>
  __device__ void add(const T (&values)[N]) {
    C high = highest;
#pragma unroll
    for (int i = 0; i < N; ++i) high = max(high, static_cast<C>(widen(values[i])));
    if (high == negative_infinity<C>()) {
      // Nothing but -inf, or NaN, which max() passes over and the sum must show.
#pragma unroll
      for (int i = 0; i < N; ++i) sum += isnan(widen(values[i])) ? static_cast<C>(widen(values[i])) : C(0);
      return;
    }
    if (high > highest) {
      sum *= exponential(highest - high);
      highest = high;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exponential(static_cast<C>(widen(values[i])) - highest);
  }
};

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ inline double sum_warp(double value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

__device__ inline double max_warp(double value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, mask));
  return value;
}

// The merged statistics of a warp's threads, on each of them; one exp a thread, which takes long in float64. A thread
// without a logit above -inf has factor 0 beside others, which leaves its sum what it is: 0, or NaN.
__device__ inline RowStatistics merge_warp(const RowStatistics& mine) {
  const double highest = max_warp(mine.reference);
  const double shift = highest == negative_infinity<double>() ? 0.0 : mine.reference - highest;
  return {highest, sum_warp(exp(shift) * mine.sum)};
}

// The merged statistics of all threads, on the first warp; the others must not write `shared` again before the block
// has synchronised. The block size is a multiple of the warp's.
__device__ inline RowStatistics merge_block(RowStatistics mine, RowStatistics* shared) {
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  mine = merge_warp(mine);
  if (lane == 0) shared[warp] = mine;
  __syncthreads();
  if (warp != 0) return mine;
  RowStatistics of_warp = {negative_infinity<double>(), 0};
  if (lane < blockDim.x / kWarp) of_warp = shared[lane];
  return merge_warp(of_warp);
}

// The sum over all threads, on each of them; the block must synchronise before the next call, which writes `shared`
// again.
__device__ inline double sum_block(double mine, double* shared) {
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  mine = sum_warp(mine);
  if (lane == 0) shared[warp] = mine;
  __syncthreads();
  if (warp == 0) {
    const double total = sum_warp(lane < blockDim.x / kWarp ? shared[lane] : 0.0);
    if (lane == 0) shared[0] = total;
  }
  __syncthreads();
  return shared[0];
}

// A row's statistics, on the first warp only, and with the condition of merge_block.
template <typename T>
__device__ RowStatistics read_statistics(const T* row, int64_t length, RowStatistics* shared) {
  const RowSplit<T> split(row, length);
  Online<Compute<T>> online;
  for (int64_t i = threadIdx.x; i < split.head; i += blockDim.x) {
    const T single[1] = {row[i]};
    online.add(single);
  }
  const Pack<T>* packs = reinterpret_cast<const Pack<T>*>(row + split.head);
  int64_t p = threadIdx.x;
  const int64_t stride = blockDim.x;
  for (; p + (kPacksInFlight - 1) * stride < split.packs; p += kPacksInFlight * stride) {
    Pack<T> loaded[kPacksInFlight];
#pragma unroll
    for (int u = 0; u < kPacksInFlight; ++u) loaded[u] = packs[p + u * stride];
#pragma unroll
    for (int u = 0; u < kPacksInFlight; ++u) online.add(loaded[u].values);
  }
  for (; p < split.packs; p += stride) {
    const Pack<T> loaded = packs[p];
    online.add(loaded.values);
  }
  for (int64_t i = split.tail_begin + threadIdx.x; i < length; i += blockDim.x) {
    const T single[1] = {row[i]};
    online.add(single);
  }
  return merge_block({static_cast<double>(online.highest), static_cast<double>(online.sum)}, shared);
}

// out = factor * exp(in - log_normaliser) over a row; by packs where both are aligned alike.
template <typename T>
__device__ void write_exponentials(T* out, const T* in, int64_t length, double log_normaliser, double factor) {
  using C = Compute<T>;
  const C shift = static_cast<C>(log_normaliser);
  const C by = static_cast<C>(factor) * exponential(static_cast<C>(static_cast<double>(shift) - log_normaliser));
  const auto result = [=](T x) { return narrow<T>(by * exponential(widen(x) - shift)); };
  const bool alike = reinterpret_cast<uintptr_t>(out) % kPackBytes == reinterpret_cast<uintptr_t>(in) % kPackBytes;
  const RowSplit<T> split(in, length);
  const int64_t head = alike ? split.head : length;
  for (int64_t i = threadIdx.x; i < head; i += blockDim.x) out[i] = result(in[i]);
  if (!alike) return;
  const Pack<T>* sources = reinterpret_cast<const Pack<T>*>(in + head);
  Pack<T>* results = reinterpret_cast<Pack<T>*>(out + head);
#pragma unroll 2
  for (int64_t p = threadIdx.x; p < split.packs; p += blockDim.x) {
    Pack<T> pack = sources[p];
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) pack.values[i] = result(pack.values[i]);
    results[p] = pack;
  }
  for (int64_t i = split.tail_begin + threadIdx.x; i < length; i += blockDim.x) out[i] = result(in[i]);
}

template <typename T>
__device__ void clear_row(T* out, int64_t first, int64_t width) {
  for (int64_t i = first + threadIdx.x; i < width; i += blockDim.x) out[i] = narrow<T>(Compute<T>(0));
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kStatisticsBlocks)
    statistics_kernel(DeviceRows rows, double* reference, double* sum) {
  __shared__ RowStatistics shared[kMaxThreads / kWarp];
  for (int64_t r = blockIdx.x; r < rows.rows; r += gridDim.x) {
    const RowStatistics row = read_statistics(static_cast<const T*>(rows.in) + r * rows.width, rows.columns, shared);
    if (threadIdx.x == 0) {
      reference[r] = row.reference;
      sum[r] = row.sum;
    }
    __syncthreads();  // the first warp has read `shared`
  }
}

// At a target the gradient is (sum of grad of its entries) - coefficient * p with p from the exact log-prob. The first
// entry of each token writes for all entries of that token.
template <typename T>
__device__ void write_targets(T* out, const DeviceEntries& entries, int64_t begin, int64_t end, int64_t columns,
                              double coefficient) {
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const int64_t entry = entries.order[i];
    const int64_t token = entries.targets[entry];
    const int64_t column = token - entries.vocab_start;
    if (column < 0 || column >= columns) continue;
    bool first = true;
    for (int64_t j = begin; j < i && first; ++j) first = entries.targets[entries.order[j]] != token;
    if (!first) continue;
    double total = 0;
    for (int64_t j = i; j < end; ++j) {
      const int64_t other = entries.order[j];
      if (entries.targets[other] == token) total += entries.grad[other];
    }
    const double share = coefficient == 0.0 ? 0.0 : coefficient * exp(entries.logprobs[entry]);
    out[column] = narrow<T>(static_cast<Compute<T>>(total - share));
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kGradientBlocks)
    gradient_kernel(DeviceRows rows, DeviceEntries entries, const double* log_normaliser, T* out_rows) {
  __shared__ double shared[kMaxThreads / kWarp];
  for (int64_t r = blockIdx.x; r < rows.rows; r += gridDim.x) {
    const T* in = static_cast<const T*>(rows.in) + r * rows.width;
    T* out = out_rows + r * rows.width;
    const int64_t begin = entries.begin[r], end = entries.begin[r + 1];
    double mine = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) mine += entries.grad[entries.order[i]];
    const double coefficient = sum_block(mine, shared);
    if (coefficient != 0.0) write_exponentials(out, in, rows.columns, log_normaliser[r], -coefficient);
    clear_row(out, coefficient != 0.0 ? rows.columns : 0, rows.width);
    __syncthreads();  // the row is written, and all have read what sum_block left
    write_targets(out, entries, begin, end, rows.columns, coefficient);
  }
}

// Calls `launch` with a null pointer of the logits' element type.
template <typename Launch>
cudaError_t dispatch(LogitType type, Launch launch) {
  switch (type) {
    case LogitType::kFloat32: return launch(static_cast<float*>(nullptr));
    case LogitType::kBFloat16: return launch(static_cast<__nv_bfloat16*>(nullptr));
    case LogitType::kFloat16: return launch(static_cast<__half*>(nullptr));
    case LogitType::kFloat64: return launch(static_cast<double*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

struct Grid {
  unsigned blocks;
  unsigned threads;
};

// As many blocks as the device holds at once, each large enough for its row.
template <typename Kernel>
cudaError_t persistent_grid(Kernel kernel, int64_t rows, int64_t columns, Grid* grid) {
  int threads = kMaxThreads;
  while (threads > 128 && threads * 16 > columns) threads /= 2;
  int device = 0, processors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0);
  const int64_t held = static_cast<int64_t>(std::max(resident, 1)) * std::max(processors, 1);
  grid->blocks = static_cast<unsigned>(std::min(rows, held));
  grid->threads = static_cast<unsigned>(threads);
  return error;
}

}  // namespace

cudaError_t launch_statistics(const DeviceRows& rows, double* reference, double* sum, cudaStream_t stream) {
  if (rows.rows == 0) return cudaSuccess;
  return dispatch(rows.type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    Grid grid{};
    const cudaError_t error = persistent_grid(statistics_kernel<T>, rows.rows, rows.columns, &grid);
    if (error != cudaSuccess) return error;
    statistics_kernel<T><<<grid.blocks, grid.threads, 0, stream>>>(rows, reference, sum);
    return cudaGetLastError();
  });
}

cudaError_t launch_gradient(const DeviceRows& rows, const DeviceEntries& entries, const double* log_normaliser,
                            void* out, cudaStream_t stream) {
  if (rows.rows == 0) return cudaSuccess;
  return dispatch(rows.type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    Grid grid{};
    const cudaError_t error = persistent_grid(gradient_kernel<T>, rows.rows, rows.columns, &grid);
    if (error != cudaSuccess) return error;
    gradient_kernel<T><<<grid.blocks, grid.threads, 0, stream>>>(rows, entries, log_normaliser, static_cast<T*>(out));
    return cudaGetLastError();
  });
}

}  // namespace megatron_sip
