// Hand-offs: how a value computed by one block reaches the blocks that need it.
//
// Contract. A published value is one 64-bit word: the payload in the lower half, a tag in the upper half. Words are
// stored and loaded whole (relaxed atomics). The tag of a call's n-th token is n + 1, and exchange memory is zero when
// a call starts. A reader polls the word itself until the tag is the one of the token it works on; then the payload is
// the one that belongs to it, because both halves travelled together. No other memory is handed over, so nothing needs
// to be ordered: there are no fences, counters or barriers.
//
// Proof that no word is overwritten before it was read. Each word has exactly one writing block (jax_mono/handoffs.py,
// tested) and is written at most once per token, because every layer has channels of its own. Summaries, logits and the
// choice have two copies, used by even and odd tokens in turn; all other channels have one.
//   A block publishes its summary of token n after all its reads of token n but those of summaries, logits and choice, and
//   it reads those before anything of token n + 1. It starts token n + 1 only after it has read the summaries of token n of
//   every block of every device, or the choice, whose writer has.
//   - One copy: let W write a word for token n + 1 that R reads for token n. W has started n + 1, so R has published its
//     summary of n, so R has read the word.
//   - Two copies: let W write a word for token n + 2 that R reads for token n. W has started n + 2, so R has published its
//     summary of n + 1, so R has left token n, so R has read the word.
//
// KV cache, residuals and histories are not handed over: the block that writes a part is the only one that reads it.
//
// A wait is bounded. The first block that waits too long raises `aborted`; every other wait sees it and gives up; every
// block notes where it waited, and all leave the token loop.
#pragma once

#include "call.h"

namespace mono::MONO_VARIANT {

constexpr int kSpins = 256;          // polls before the clock is looked at and the core is offered to others
constexpr u32 kLostTag = 0xffffffffu;  // never awaited: budgets are 31-bit

// One block's end of all hand-offs during one token.
struct Link {
  Control* control;
  i32 device, block;
  u64* place;  // this block's entry of Control::places
  arch::Pump pump{};
  u32 tag = 0;
  bool failed = false;

  // Tag for words published now; wrong on purpose where a test asked to lose this hand-off.
  u32 out_tag(Channel channel, i32 layer) const {
    bool lost = control->lost_device == device && control->lost_block == block && control->lost_layer == layer &&
                control->lost_channel == channel;
    return lost ? kLostTag : tag;
  }

  // Waits for one word of this token and returns its payload; 0 once the call has failed.
  MONO_DEVICE u32 wait(const arch::Word* at, Channel channel, i32 layer) {
    arch::Word word = arch::load_word(at);
    if (u32(word >> 32) == tag) return u32(word);
    return failed ? 0 : wait_long(at, channel, layer);
  }

  // Waits for `count` consecutive words and passes payloads on as floats: sink(index, value).
  template <class Sink>
  MONO_DEVICE void read(const arch::Word* at, i64 count, Channel channel, i32 layer, Sink sink) {
    for (i64 i = 0; i < count; ++i) {
      if (i % 8 == 0) pump.step();
      sink(i, arch::bits_float(wait(at + i, channel, layer)));
    }
  }

 private:
  u32 wait_long(const arch::Word* at, Channel channel, i32 layer) {
    i64 start = arch::nanoseconds();
    for (;;) {
      for (int spin = 0; spin < kSpins; ++spin) {
        arch::Word word = arch::load_word(at);
        if (u32(word >> 32) == tag) return u32(word);
        if (!pump.step()) arch::pause();
      }
      if (arch::load_acquire(&control->aborted)) break;
      if (arch::nanoseconds() - start > control->wait_limit) break;
      arch::yield();
    }
    arch::store_word(place, Place(tag, layer, channel).key);
    arch::store_release(&control->aborted, 1);
    failed = true;
    return 0;
  }
};

MONO_DEVICE arch::Word make_word(u32 tag, u32 payload) { return (arch::Word(tag) << 32) | payload; }
MONO_DEVICE void publish(arch::Word* at, u32 tag, float value) {
  arch::store_word(at, make_word(tag, arch::float_bits(value)));
}

}  // namespace mono::MONO_VARIANT
