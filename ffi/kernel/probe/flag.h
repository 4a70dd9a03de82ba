// The word that probes hand from block to block.
#pragma once

#include "kernel/types.h"

namespace mono::probe {

// As hand-offs have it, alone in its cache lines.
struct alignas(256) Flag {
  u32 payload[3];
  u32 tag;
};

}  // namespace mono::probe
