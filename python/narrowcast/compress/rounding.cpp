// Lanes are rows (in search_scales groups of one row), so that every lane does the same sums in the
// same order: results do not depend on the instruction set or on the number of threads.
#include "rounding.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/half.h"
#include "common/parallel.h"

// One source, compiled for each instruction set and chosen at load time; there are no intrinsics.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define NC_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define NC_CLONES
#endif

namespace narrowcast {
namespace {

constexpr int kLanes = 32;

// out[r] = sum over i of coefficients[i] * values[i][r]
NC_CLONES void combine(const float* __restrict coefficients, const float* __restrict values,
                       int64_t count, float* __restrict out) {
  float sum[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float c = coefficients[i];
    for (int r = 0; r < kLanes; ++r) sum[r] += c * values[i * kLanes + r];
  }
  for (int r = 0; r < kLanes; ++r) out[r] = sum[r];
}

struct Range {
  float low, high;
};

// The nearest code of each lane's target, and what it stands for.
NC_CLONES void nearest_codes(const float* __restrict target, const float* __restrict inverse,
                             const float* __restrict scale, const float* __restrict offset,
                             Range range, float* __restrict code, float* __restrict value) {
  for (int r = 0; r < kLanes; ++r) {
    float q = (target[r] - offset[r]) * inverse[r];
    q = q >= range.low ? q : range.low;
    q = q <= range.high ? q : range.high;
    q = (q + 0x1.8p23f) - 0x1.8p23f;  // to the nearest integer, ties to even
    code[r] = q;
    value[r] = q * scale[r] + offset[r];
  }
}

float stored(float value, bool half) { return half ? from_float16(to_float16(value)) : value; }

Range code_range(const RoundedLayer& layer) {
  return {static_cast<float>(layer.low), static_cast<float>(layer.high)};
}

// kLanes rows of a layer, transposed.
class Tile {
 public:
  explicit Tile(const RoundedLayer& layer)
      : layer_(layer),
        groups_(layer.columns / layer.group),
        weight_(layer.columns * kLanes),
        error_(weight_.size()),
        code_(weight_.size()),
        scale_(groups_ * kLanes),
        inverse_(scale_.size()),
        offset_(scale_.size()),
        slope_(layer.group * kLanes),
        step_(slope_.size()) {}

  void load(int64_t first) {
    first_ = first;
    count_ = std::min<int64_t>(kLanes, layer_.rows - first);
    std::fill(weight_.begin(), weight_.end(), 0.0f);
    std::fill(code_.begin(), code_.end(), 0.0f);
    std::fill(scale_.begin(), scale_.end(), 1.0f);
    std::fill(offset_.begin(), offset_.end(), 0.0f);
    for (int64_t r = 0; r < count_; ++r) {
      const int64_t row = (first + r) * layer_.columns, grids = (first + r) * groups_;
      for (int64_t k = 0; k < layer_.columns; ++k) {
        weight_[k * kLanes + r] = layer_.weight[row + k];
        code_[k * kLanes + r] = static_cast<float>(layer_.codes[row + k]);
      }
      for (int64_t g = 0; g < groups_; ++g) {
        scale_[g * kLanes + r] = layer_.scale[grids + g];
        offset_[g * kLanes + r] = layer_.offset[grids + g];
      }
    }
    for (size_t i = 0; i < scale_.size(); ++i) inverse_[i] = 1 / scale_[i];
  }

  void store() const {
    for (int64_t r = 0; r < count_; ++r) {
      const int64_t row = (first_ + r) * layer_.columns, grids = (first_ + r) * groups_;
      for (int64_t k = 0; k < layer_.columns; ++k)
        layer_.codes[row + k] = static_cast<int8_t>(code_[k * kLanes + r]);
      for (int64_t g = 0; g < groups_; ++g) {
        layer_.scale[grids + g] = scale_[g * kLanes + r];
        layer_.offset[grids + g] = offset_[g * kLanes + r];
      }
    }
  }

  void in_order(const int32_t* order, const float* feed) {
    float target[kLanes];
    for (int64_t p = 0; p < layer_.columns; ++p) {
      const int64_t k = order[p];
      combine(feed + p * layer_.columns, error_.data(), p, target);
      for (int r = 0; r < kLanes; ++r) target[r] += weight_[k * kLanes + r];
      choose(k, target, &error_[p * kLanes]);
    }
  }

  void measure_errors() {
    for (int64_t k = 0; k < layer_.columns; ++k) {
      const int64_t g = k / layer_.group * kLanes;
      for (int r = 0; r < kLanes; ++r)
        error_[k * kLanes + r] =
            weight_[k * kLanes + r] - (code_[k * kLanes + r] * scale_[g + r] + offset_[g + r]);
    }
  }

  void refine_codes(const int32_t* order, const float* hessian) {
    float target[kLanes];
    for (int64_t p = 0; p < layer_.columns; ++p) {
      const int64_t k = order[p];
      const float* row = hessian + k * layer_.columns;
      if (!(row[k] > 0)) {  // an input that never came: its weight is kept as well as can be
        choose(k, &weight_[k * kLanes], &error_[k * kLanes]);
        continue;
      }
      const float inverse = 1 / row[k];
      combine(row, error_.data(), layer_.columns, target);
      for (int r = 0; r < kLanes; ++r) {
        const float value = weight_[k * kLanes + r] - error_[k * kLanes + r];
        target[r] = value + target[r] * inverse;
      }
      choose(k, target, &error_[k * kLanes]);
    }
  }

  void refine_scales(const float* hessian) {
    for (int64_t g = 0; g < groups_; ++g) refine_scale(g, hessian);
  }

 private:
  // The code of column k nearest to target, and the error that it leaves.
  void choose(int64_t k, const float* target, float* error) {
    const int64_t g = k / layer_.group * kLanes;
    float value[kLanes];
    nearest_codes(target, &inverse_[g], &scale_[g], &offset_[g], code_range(layer_),
                  &code_[k * kLanes], value);
    for (int r = 0; r < kLanes; ++r) error[r] = weight_[k * kLanes + r] - value[r];
  }

  // The error is a parabola along a change of the scale: its lowest point, rounded as it is stored,
  // is taken where it is lower than the present one.
  void refine_scale(int64_t group, const float* hessian) {
    const int64_t first = group * layer_.group, g = group * kLanes;
    for (int64_t c = 0; c < layer_.group; ++c)
      combine(hessian + (first + c) * layer_.columns, error_.data(), layer_.columns,
              &slope_[c * kLanes]);
    float zero[kLanes], scale[kLanes], offset[kLanes], along[kLanes], bend[kLanes];
    for (int r = 0; r < kLanes; ++r)
      zero[r] = layer_.zero_point ? std::nearbyint(-offset_[g + r] * inverse_[g + r]) : 0.0f;
    for (int64_t c = 0; c < layer_.group; ++c)
      for (int r = 0; r < kLanes; ++r)
        step_[c * kLanes + r] = code_[(first + c) * kLanes + r] - zero[r];
    measure_step(first, hessian, along, bend);
    for (int r = 0; r < kLanes; ++r) {
      const float change = bend[r] > 0 ? along[r] / bend[r] : 0.0f;
      scale[r] = stored(scale_[g + r] + change, layer_.half);
      offset[r] = layer_.zero_point ? stored(-zero[r] * scale[r], layer_.half) : 0.0f;
    }
    for (int64_t c = 0; c < layer_.group; ++c)
      for (int r = 0; r < kLanes; ++r) {
        const float code = code_[(first + c) * kLanes + r];
        step_[c * kLanes + r] =
            (code * scale[r] + offset[r]) - (code * scale_[g + r] + offset_[g + r]);
      }
    measure_step(first, hessian, along, bend);
    for (int r = 0; r < kLanes; ++r) {
      const bool better = bend[r] - 2 * along[r] < 0;
      if (!better || scale[r] == 0 || !std::isfinite(scale[r]) || !std::isfinite(offset[r]))
        continue;
      scale_[g + r] = scale[r], offset_[g + r] = offset[r], inverse_[g + r] = 1 / scale[r];
      for (int64_t c = 0; c < layer_.group; ++c)
        error_[(first + c) * kLanes + r] -= step_[c * kLanes + r];
    }
  }

  // along = step . slope, bend = step H step, for a change of one group's weights by step_.
  void measure_step(int64_t first, const float* hessian, float* along, float* bend) const {
    std::fill_n(along, kLanes, 0.0f), std::fill_n(bend, kLanes, 0.0f);
    float curved[kLanes];
    for (int64_t c = 0; c < layer_.group; ++c) {
      combine(hessian + (first + c) * layer_.columns + first, step_.data(), layer_.group, curved);
      for (int r = 0; r < kLanes; ++r) {
        along[r] += step_[c * kLanes + r] * slope_[c * kLanes + r];
        bend[r] += step_[c * kLanes + r] * curved[r];
      }
    }
  }

  const RoundedLayer& layer_;
  int64_t groups_, first_ = 0, count_ = 0;
  std::vector<float> weight_, error_, code_, scale_, inverse_, offset_, slope_, step_;
};

template <class F>
void for_each_tile(const RoundedLayer& layer, F&& body) {
  const int64_t tiles = (layer.rows + kLanes - 1) / kLanes;
  parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    Tile tile(layer);
    for (int64_t t = begin; t < end; ++t) {
      tile.load(t * kLanes);
      body(tile);
      tile.store();
    }
  });
}

// A scale to try: how far below the largest weight it clips, how far its zero moves, its sign.
struct Candidate {
  float shrink, nudge, sign;
};

std::vector<Candidate> candidates(const RoundedLayer& layer) {
  std::vector<Candidate> result;
  const bool few_codes = layer.high - layer.low < 32;
  for (int i = 0; i < (few_codes ? 14 : 6); ++i) {
    const float shrink = 1.0f - (few_codes ? 0.035f : 0.04f) * static_cast<float>(i);
    if (layer.zero_point)
      for (const float nudge : {0.0f, 0.5f, -0.5f}) result.push_back({shrink, nudge, 1.0f});
    else if (layer.low != -layer.high)
      for (const float sign : {1.0f, -1.0f}) result.push_back({shrink, 0.0f, sign});
    else
      result.push_back({shrink, 0.0f, 1.0f});
  }
  return result;
}

struct Grid {
  float scale, offset;
};

// The grid of a candidate for a group whose weights lie in [least, most], least <= 0 <= most.
Grid make_grid(const RoundedLayer& layer, float least, float most, Candidate candidate) {
  const auto [low, high] = code_range(layer);
  float scale;
  if (layer.zero_point)
    scale = (most - least) * candidate.shrink / (high - low);
  else if (low != -high)
    scale = (most > -least ? most : least) * candidate.shrink * candidate.sign / low;
  else
    scale = std::max(most, -least) * candidate.shrink / high;
  scale = stored(scale, layer.half);
  if (scale == 0) scale = 1;
  if (!layer.zero_point) return {scale, 0.0f};
  const float zero = std::nearbyint(low - least * candidate.shrink / scale + candidate.nudge);
  return {scale, stored(-std::clamp(zero, low, high) * scale, layer.half)};
}

// Groups `first` to `first + kLanes` of one row.
void search_groups(const RoundedLayer& layer, const std::vector<Candidate>& tried, int64_t row,
                   int64_t first, const float* importance, std::vector<float>& weights) {
  const int64_t groups = layer.columns / layer.group, size = layer.group;
  const int64_t count = std::min<int64_t>(kLanes, groups - first);
  const int64_t begin = row * layer.columns + first * size;
  std::fill(weights.begin(), weights.end(), 0.0f);
  float* const matters = weights.data() + size * kLanes;
  float least[kLanes] = {}, most[kLanes] = {};
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < size; ++c) {
      const float w = layer.weight[begin + r * size + c];
      weights[c * kLanes + r] = w, matters[c * kLanes + r] = importance[(first + r) * size + c];
      least[r] = std::min(least[r], w), most[r] = std::max(most[r], w);
    }
  float scale[kLanes], offset[kLanes], inverse[kLanes], code[kLanes], value[kLanes];
  float best_error[kLanes], best_scale[kLanes], best_offset[kLanes];
  std::fill_n(best_error, kLanes, std::numeric_limits<float>::infinity());
  std::fill_n(best_scale, kLanes, 1.0f), std::fill_n(best_offset, kLanes, 0.0f);
  for (const Candidate& candidate : tried) {
    for (int r = 0; r < kLanes; ++r) {
      const Grid grid = make_grid(layer, least[r], most[r], candidate);
      scale[r] = grid.scale, offset[r] = grid.offset, inverse[r] = 1 / grid.scale;
    }
    float error[kLanes] = {};
    for (int64_t c = 0; c < size; ++c) {
      const float* w = &weights[c * kLanes];
      nearest_codes(w, inverse, scale, offset, code_range(layer), code, value);
      for (int r = 0; r < kLanes; ++r)
        error[r] += (value[r] - w[r]) * (value[r] - w[r]) * matters[c * kLanes + r];
    }
    for (int r = 0; r < kLanes; ++r)
      if (error[r] < best_error[r])
        best_error[r] = error[r], best_scale[r] = scale[r], best_offset[r] = offset[r];
  }
  for (int r = 0; r < kLanes; ++r) inverse[r] = 1 / best_scale[r];
  for (int64_t r = 0; r < count; ++r) {
    layer.scale[row * groups + first + r] = best_scale[r];
    layer.offset[row * groups + first + r] = best_offset[r];
  }
  for (int64_t c = 0; c < size; ++c) {
    nearest_codes(&weights[c * kLanes], inverse, best_scale, best_offset, code_range(layer), code,
                  value);
    for (int64_t r = 0; r < count; ++r)
      layer.codes[begin + r * size + c] = static_cast<int8_t>(code[r]);
  }
}

}  // namespace

void search_scales(const RoundedLayer& layer, const float* importance) {
  const std::vector<Candidate> tried = candidates(layer);
  parallel_for(0, layer.rows, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> weights(2 * layer.group * kLanes);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t first = 0; first < layer.columns / layer.group; first += kLanes)
        search_groups(layer, tried, row, first, importance, weights);
  });
}

void round_in_order(const RoundedLayer& layer, const int32_t* order, const float* feed) {
  for_each_tile(layer, [&](Tile& tile) { tile.in_order(order, feed); });
}

void refine(const RoundedLayer& layer, const int32_t* order, const float* hessian, int64_t passes) {
  for_each_tile(layer, [&](Tile& tile) {
    tile.measure_errors();
    for (int64_t i = 0; i < passes; ++i) {
      tile.refine_scales(hessian);
      tile.refine_codes(order, hessian);
    }
  });
}

}  // namespace narrowcast
