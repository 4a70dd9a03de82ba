// The pieces of a block's tape in the order in which they are read, for targets where each warp fetches its own. Included by
// the architecture headers, which supply uniform(); set_course.h fills the course.
#pragma once

namespace mono::MONO_VARIANT::arch {

// What of a block's tape is read in which order; in shared memory.
struct Course {
  struct Run {
    u32 start;  // of the first piece in the layer tape or head tape, in bytes
    u32 bytes;  // of a piece
    i32 count;  // of pieces
  };
  u64 layers, head;  // where these tapes start
  Run runs[kStages];
  i32 first_head;  // the fed token from which on the LM head is needed
};

constexpr u32 kGranuleBytes = Shape::granule_words * 2;  // of weights of 16 bits

// Somewhere on the tape, at the start of a piece; pieces follow each other across stages, layers and tokens.
class Walk {
 public:
  // Goes on by so many pieces.
  MONO_DEVICE void skip(const Course& c, i32 pieces) {
    index_ += pieces;
    i32 count = i32(uniform(u32(c.runs[stage_].count)));
    MONO_ROLLED
    while (index_ >= count) {
      index_ -= count;
      if (++stage_ == kHead && ++layer_ < Shape::num_layers) stage_ = 0;
      if (stage_ > kHead || (stage_ == kHead && fed_ < c.first_head)) {
        stage_ = layer_ = 0;
        ++fed_;
      }
      count = i32(uniform(u32(c.runs[stage_].count)));
    }
    const Course::Run& run = c.runs[stage_];
    const u32 bytes = uniform(run.bytes);
    const u64 tape = stage_ == kHead ? uniform(c.head) : uniform(c.layers);
    const u64 layer = stage_ == kHead ? 0 : u64(layer_) * (Shape::layer_words * 2 * Shape::period);
    if constexpr (Shape::period == 1) {
      at_ = tape + uniform(run.start) + layer + u64(index_) * bytes;
    } else {
      const u32 in_tape = uniform(run.start) + u32(index_) * bytes;
      within_ = in_tape % kGranuleBytes;
      at_ = tape + u64(in_tape - within_) * Shape::period + layer;
    }
  }

  // The granule in which the piece starts; if tapes are in one piece, the piece itself.
  MONO_DEVICE u64 granule() const { return at_; }
  // From there, where a byte of the piece lies: the piece goes on in the same granule of the following periods.
  MONO_DEVICE u32 offset(u32 byte) const { return in_granules(within_ + byte, kGranuleBytes, u32(Shape::period)); }
  MONO_DEVICE u32 bytes(const Course& c) const { return uniform(c.runs[stage_].bytes); }  // of the piece

 private:
  i32 index_ = 0, stage_ = 0, layer_ = 0, fed_ = 0;
  u64 at_ = 0;
  u32 within_ = 0;
};

}  // namespace mono::MONO_VARIANT::arch
