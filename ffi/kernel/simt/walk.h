// The pieces of a block's tape in the order in which they are read, for targets where each warp fetches its own. Included by
// the architecture headers, which supply uniform() and swizzle(); set_course.h fills course and swizzle.
#pragma once

namespace mono::MONO_VARIANT::arch {

constexpr u32 kGranuleBytes = Shape::granule_words * 2;  // of weights of 16 bits
constexpr u32 kLayerGranules = u32(Shape::layer_words / Shape::granule_words);
constexpr u32 kRegionPeriods = Shape::region_periods;
// Regions of memory that a block's layer tapes and its head tape touch.
constexpr i32 kLayersRegions = i32(touched_regions(i64(kLayerGranules) * Shape::num_layers, kRegionPeriods));
constexpr i32 kHeadRegions = i32(touched_regions(Shape::head_words / Shape::granule_words, kRegionPeriods));

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

// Where a block's granules lie if regions of memory exchange those of a period; in shared memory.
struct Swizzle {
  u32 layers_begun, head_begun;  // periods of the first region that come before the layer tapes and the head tape
  // By how many granules the tape's own lie further on, in each region that these tapes touch, and in one more.
  signed char further[kLayersRegions + kHeadRegions + 1];
};
MONO_DEVICE Swizzle& swizzle();

// The region in which a piece starts, and the one after it. A piece goes on in the next one at most: no region is shorter.
template <bool kExchanged>
class Regions {
 public:
  MONO_DEVICE u64 enter(bool, u32) { return 0; }
  MONO_DEVICE u32 beyond(u32) const { return 0; }
};
template <>
class Regions<true> {
 public:
  // By how many bytes a granule, so many from the start of the layer tapes or the head tape, lies further on.
  MONO_DEVICE u64 enter(bool head, u32 granule) {
    const Swizzle& s = swizzle();
    const u32 period = uniform(head ? s.head_begun : s.layers_begun) + granule;
    const signed char* further = s.further + (head ? kLayersRegions : 0) + period / kRegionPeriods;
    const u32 here = uniform(u32(i32(further[0]))), next = uniform(u32(i32(further[1])));
    left_ = (kRegionPeriods - period % kRegionPeriods) * kGranuleBytes;
    change_ = (next - here) * kGranuleBytes;
    return u64(i64(i32(here)) * kGranuleBytes);
  }
  // How much further than that a byte of the tape lies, counted from that granule. The order of bytes stays: no granule moves by
  // a whole period.
  MONO_DEVICE u32 beyond(u32 byte) const { return byte < left_ ? 0 : change_; }

 private:
  u32 left_ = 0, change_ = 0;
};

// Somewhere on the tape, at the start of a piece; pieces follow each other across stages, layers and tokens.
class Walk : Regions<(kRegionPeriods > 0)> {
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
      const u32 in_tape = uniform(run.start) + u32(index_) * bytes, granule = in_tape / kGranuleBytes;
      within_ = in_tape % kGranuleBytes;
      at_ = tape + u64(in_tape - within_) * Shape::period + layer;
      at_ += enter(stage_ == kHead, stage_ == kHead ? granule : u32(layer_) * kLayerGranules + granule);
    }
  }

  // The granule in which the piece starts; if tapes are in one piece, the piece itself.
  MONO_DEVICE u64 granule() const { return at_; }
  // From there, where a byte of the piece lies: the piece goes on in the same granule of the following periods, or in the one
  // that it is exchanged with.
  MONO_DEVICE u32 offset(u32 byte) const {
    return in_granules(within_ + byte, kGranuleBytes, u32(Shape::period)) + beyond(within_ + byte);
  }
  MONO_DEVICE u32 bytes(const Course& c) const { return uniform(c.runs[stage_].bytes); }  // of the piece

 private:
  i32 index_ = 0, stage_ = 0, layer_ = 0, fed_ = 0;
  u64 at_ = 0;
  u32 within_ = 0;
};

}  // namespace mono::MONO_VARIANT::arch
