// Rounds the weights of a dense layer so that its outputs change least: plain loops over raw
// pointers.
//
// A weight [rows, columns] becomes code * scale + offset, with a scale and an offset per row and
// group of columns. What is made small is, for each row, error * H * error^T, where error is the
// row's change and H = E[x x^T] over the layer's inputs x.
#pragma once
#include <cstdint>

// Visible: _runtime, another library, calls these functions.
namespace __attribute__((visibility("default"))) narrowcast {

  struct RoundedLayer {
    int64_t rows = 0, columns = 0, group = 0;  // group divides columns
    int low = 0, high = 15;                    // least and greatest code
    bool zero_point = true;  // offset = -zero * scale for an integer zero among the codes, else 0
    bool half = true;        // scales and offsets are numbers of float16
    const float* weight = nullptr;  // [rows, columns], finite
    float* scale = nullptr;         // [rows, columns / group]
    float* offset = nullptr;        // [rows, columns / group]
    int8_t* codes = nullptr;        // [rows, columns]
  };

  // Scales and offsets with the least sum of importance[column] * error^2 under nearest codes, and
  // these codes. Codes of -8..7 use a scale of either sign: the larger side of a group gets the 8.
  void search_scales(const RoundedLayer& layer, const float* importance);

  // Codes one column after the other, as `order` names them; a column takes over its part of the
  // errors that those before it made: the weight at place p grows by the sum over i < p of
  // feed[p * columns + i] * error at place i. With H (in that order) = U D U^T, U unit upper
  // triangular, and feed = U^T this is GPTQ (Frantar et al., 2022) without an inverse.
  void round_in_order(const RoundedLayer& layer, const int32_t* order, const float* feed);

  // Coordinate descent on error * H * error^T: in each pass every scale, then every code, gets its
  // best value while all others stay. The error never grows. `hessian` is H [columns, columns].
  void refine(const RoundedLayer& layer, const int32_t* order, const float* hessian,
              int64_t passes);

}  // namespace narrowcast
