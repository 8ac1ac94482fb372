// Philox 4x32-10: random bits as a pure function of (seed, call, sample, attempt).
//
// The only state is a counter of calls. So a replay that is restored continues with the same draws,
// any thread can compute the bits of any sample, and CPU and CUDA draw the same.
//
//   key     = seed                                    (2 words)
//   counter = sample | attempt | call low | call high (4 words)
//   result  = words 0 and 1 of the block, as one 64-bit number
//
// Reference: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
// Cost: ten rounds of two 32-bit multiplications. Compilers vectorize a loop over samples.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FR_HOST_DEVICE __host__ __device__
#else
#define FR_HOST_DEVICE
#endif

namespace fastreplay {

FR_HOST_DEVICE inline uint64_t random64(uint64_t seed, uint64_t call, uint32_t sample,
                                        uint32_t attempt) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = sample, c1 = attempt;
  uint32_t c2 = static_cast<uint32_t>(call), c3 = static_cast<uint32_t>(call >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return uint64_t{c1} << 32 | c0;
}

// floor(a * b / 2^64). If `a` is 64 random bits, this is a random number below b; no value's
// probability differs from 1 / b by more than 2^-64.
FR_HOST_DEVICE inline uint64_t mulhi64(uint64_t a, uint64_t b) {
#ifdef __SIZEOF_INT128__
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#else
  const uint64_t a0 = a & 0xFFFFFFFF, a1 = a >> 32, b0 = b & 0xFFFFFFFF, b1 = b >> 32;
  const uint64_t middle = a1 * b0 + ((a0 * b0) >> 32);
  const uint64_t low_middle = a0 * b1 + (middle & 0xFFFFFFFF);
  return a1 * b1 + (middle >> 32) + (low_middle >> 32);
#endif
}

// Maps 64 random bits to part `sample` of `batch` equal parts of [0, 2^64):
// floor((sample * 2^64 + bits) / batch), computed in two 64-bit steps.
FR_HOST_DEVICE inline uint64_t stratum64(uint64_t bits, uint32_t sample, uint32_t batch) {
  // Long division in base 2^32: with sample < batch < 2^32, each partial dividend fits 64 bits.
  const uint64_t high = uint64_t{sample} << 32 | bits >> 32;
  const uint64_t quotient = high / batch, remainder = high % batch;
  return quotient << 32 | (remainder << 32 | (bits & 0xFFFFFFFF)) / batch;
}

}  // namespace fastreplay
