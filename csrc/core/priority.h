// Priorities as exact integers.
//
//   leaf = clamp(rint(p^alpha * 2^20), 1, 2^32 - 1)   for p > 0
//   leaf = 0                                          for p = 0: never drawn
//
// Powers are computed from +, -, * and / alone, without libm and without fused multiply-add (build
// with -ffp-contract=off, nvcc -fmad=false). So every processor gets the same bits, and compilers
// vectorize loops over them. The relative error is below 1e-15.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/philox.h"

namespace fastreplay {

constexpr uint32_t kUnitLeaf = 1u << 20;  // p^alpha = 1
constexpr double kMaxLeaf = 4294967295.0;

// x rounded to an integer (ties to even), for |x| < 2^51.
FR_HOST_DEVICE inline double nearest(double x) {
  const double shift = 6755399441055744.0;  // 1.5 * 2^52: the last bit of the sum has value 1
  return (x + shift) - shift;
}

FR_HOST_DEVICE inline double from_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FR_HOST_DEVICE inline uint64_t to_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// log2 of a normal number x > 0. With x = 2^e m, m in [sqrt(1/2), sqrt(2)), s = (m - 1) / (m + 1):
// log2 m = 2 / ln 2 * (s + s^3 / 3 + s^5 / 5 + ...).
FR_HOST_DEVICE inline double log2_exact(double x) {
  const uint64_t bits = to_bits(x);
  // The bits of x minus those of sqrt(1/2): the exponent field is now e.
  const uint64_t offset = bits - 0x3FE6A09E667F3BCDull;
  // e as a double, without an integer conversion: written into the mantissa of 2^52, with a bias of
  // 2^11, which is subtracted.
  const double e = from_bits(0x4330000000000000ull + ((offset >> 52) ^ 0x800)) - 4503599627372544.0;
  const double m = from_bits(bits - (offset & 0xFFF0000000000000ull));
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double series = 1.0 / 21.0;
  series = series * z + 1.0 / 19.0;
  series = series * z + 1.0 / 17.0;
  series = series * z + 1.0 / 15.0;
  series = series * z + 1.0 / 13.0;
  series = series * z + 1.0 / 11.0;
  series = series * z + 1.0 / 9.0;
  series = series * z + 1.0 / 7.0;
  series = series * z + 1.0 / 5.0;
  series = series * z + 1.0 / 3.0;
  series = series * z + 1.0;
  return e + 2.8853900817779268 * s * series;
}

// 2^y for |y| < 1000. With y = k + f, |f| <= 1/2: 2^k times the Taylor series of e^(f ln 2).
FR_HOST_DEVICE inline double exp2_exact(double y) {
  const double k = nearest(y);
  const double g = (y - k) * 0.69314718055994531;
  double series = 1.0 / 6227020800.0;
  series = series * g + 1.0 / 479001600.0;
  series = series * g + 1.0 / 39916800.0;
  series = series * g + 1.0 / 3628800.0;
  series = series * g + 1.0 / 362880.0;
  series = series * g + 1.0 / 40320.0;
  series = series * g + 1.0 / 5040.0;
  series = series * g + 1.0 / 720.0;
  series = series * g + 1.0 / 120.0;
  series = series * g + 1.0 / 24.0;
  series = series * g + 1.0 / 6.0;
  series = series * g + 0.5;
  series = series * g + 1.0;
  series = series * g + 1.0;
  const uint64_t shifted = to_bits(k + 6755399441055744.0);  // 1.5 * 2^52: k is in the low bits
  return series * from_bits((shifted + 1023) << 52);
}

// The leaf of a finite p >= 0, where power = p^alpha.
FR_HOST_DEVICE inline uint32_t to_leaf(double p, double power) {
  double leaf = power * 1048576.0;
  leaf = leaf < kMaxLeaf ? leaf : kMaxLeaf;
  leaf = leaf > 1.0 ? leaf : 1.0;
  leaf = p > 0.0 ? leaf : 0.0;
  // Adding 2^52 rounds to an integer (ties to even), which is in the low bits of the sum.
  return static_cast<uint32_t>(to_bits(leaf + 4503599627370496.0));
}

// The leaf of a finite p >= 0, for alpha in [0, 1000]. The power is limited to [2^-22, 2^13]:
// outside this range the leaf is clamped anyway.
FR_HOST_DEVICE inline uint32_t quantise(double p, double alpha) {
  if (alpha == 1.0) return to_leaf(p, p);
  double y = alpha * log2_exact(p > 1e-300 ? p : 1e-300);
  y = y < 13.0 ? y : 13.0;
  y = y > -22.0 ? y : -22.0;
  return to_leaf(p, exp2_exact(y));
}

// The importance weight of a leaf, relative to that of the smallest leaf of its batch:
// (N P(i))^-beta / max_j (N P(j))^-beta = (smallest / leaf)^beta.
FR_HOST_DEVICE inline float importance_weight(uint32_t smallest, uint32_t leaf, double beta) {
  double y = beta * log2_exact(static_cast<double>(smallest) / static_cast<double>(leaf));
  y = y > -900.0 ? y : -900.0;
  return static_cast<float>(exp2_exact(y));
}

}  // namespace fastreplay
