// Decisions at run time: which rows refresh their cached features and which reuse them (docs/step-program.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "program.hpp"

namespace quantempo::runtime {

// The state of one lane's rows: reference indicator, sum of estimates and number of reuses since the last refresh.
class Decisions {
 public:
  explicit Decisions(std::size_t rows) : rows_(rows) {}

  // All rows were refreshed without a look at the indicator.
  void forget();
  // All rows reused their features without a look at the indicator.
  void reused();
  // Decides for each row, and takes note of it: per row, whether it refreshes.  `width` is that of one row.
  std::vector<bool> choose(const Decide& decide, const float* indicator, std::size_t width);

 private:
  struct Row {
    bool known = false;
    double sum = 0.0, size = 0.0;
    std::int64_t age = 0;
    std::vector<float> reference;
  };

  static bool outgrown(const Decide& decide, Row& row, const float* values);

  std::vector<Row> rows_;
};

// Rows in runs whose lengths are powers of two, longest first: so a lane needs few different batches.
std::vector<std::vector<std::size_t>> chunks(const std::vector<std::size_t>& rows);

}  // namespace quantempo::runtime
