#include "decisions.hpp"

#include <cmath>
#include <limits>

namespace quantempo::runtime {

void Decisions::forget() {
  for (auto& row : rows_) row.known = false, row.sum = 0.0, row.age = 0;
}

void Decisions::reused() {
  for (auto& row : rows_) ++row.age;
}

std::vector<bool> Decisions::choose(const Decide& decide, const float* indicator, std::size_t width) {
  std::vector<bool> refresh(rows_.size(), true);
  for (std::size_t index = 0; index < rows_.size(); ++index) {
    auto& row = rows_[index];
    const float* values = indicator + index * width;
    if (row.reference.size() != width) row.known = false;
    refresh[index] = !row.known || outgrown(decide, row, values);
    if (refresh[index]) {
      row.sum = 0.0;
      row.age = 0;
    } else {
      ++row.age;
    }
    if (!refresh[index] && decide.last_refresh) continue;
    row.reference.assign(values, values + width);
    row.size = 0.0;
    for (const float value : row.reference) row.size = row.size + std::fabs(static_cast<double>(value));
    row.known = true;
  }
  return refresh;
}

bool Decisions::outgrown(const Decide& decide, Row& row, const float* values) {
  double difference = 0.0;
  for (std::size_t i = 0; i < row.reference.size(); ++i) {
    difference = difference + std::fabs(static_cast<double>(values[i]) - static_cast<double>(row.reference[i]));
  }
  const double change = row.size > 0.0 ? difference / row.size : std::numeric_limits<double>::quiet_NaN();
  if (!std::isfinite(change)) return true;
  double estimate = decide.polynomial[0];
  for (std::size_t i = 1; i < decide.polynomial.size(); ++i) {
    const double product = estimate * change;
    estimate = product + decide.polynomial[i];
  }
  if (estimate < 0.0) estimate = 0.0;
  row.sum = row.sum + estimate;
  const double measure = decide.accumulate ? row.sum : estimate;
  // Written so that a NaN refreshes.
  return !(measure < decide.threshold) || row.age >= decide.max_consecutive;
}

std::vector<std::vector<std::size_t>> chunks(const std::vector<std::size_t>& rows) {
  std::vector<std::vector<std::size_t>> found;
  for (std::size_t start = 0; start < rows.size();) {
    std::size_t length = 1;
    while (length * 2 <= rows.size() - start) length *= 2;
    found.emplace_back(rows.begin() + static_cast<std::ptrdiff_t>(start),
                       rows.begin() + static_cast<std::ptrdiff_t>(start + length));
    start += length;
  }
  return found;
}

}  // namespace quantempo::runtime
