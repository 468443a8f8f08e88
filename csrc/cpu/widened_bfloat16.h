// bfloat16 products and attention by way of float32, for a processor without bfloat16 instructions (AVX2 alone). There
// torch multiplies bfloat16 number by number: 2 GFLOP/s in the gradient of a layer's input where the float32 product
// runs at
// 70. Widening all factors first costs little, and sums are float32 either way.
#pragma once

#include <torch/library.h>

namespace megatron_sip {

// While it lives, torch's dispatcher takes these kernels for bfloat16 on CPU. What is not bfloat16 or does not fit goes
// torch's way, mistakes included, and so does one row alone, which torch multiplies as fast as it reads.
class WidenedBFloat16 {
 public:
  WidenedBFloat16();

 private:
  torch::Library library_;
};

}  // namespace megatron_sip
