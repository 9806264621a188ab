// The random words of one block of tokens, on the CPU: common/philox.h, sixteen counters at a time.
#pragma once

#include <cstdint>

#include "common/logits.h"

namespace taps::cpu {

// words[j] for the tokens first .. first + kBlock - 1 at an absolute position, under a seed; `first` divides by kBlock,
// `words` is aligned to 64 bytes.
using NoiseBlock = void (*)(int64_t seed, int64_t position, int64_t first, uint32_t* words);

// The fastest that this machine runs; all give the same words.
NoiseBlock noise_block();

}  // namespace taps::cpu
