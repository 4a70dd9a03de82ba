// Hand-offs: how a value computed by one block reaches the blocks that need it.
//
// Contract. What is published is a word: a payload of one or several values, and a tag. Words are stored and loaded whole
// (relaxed atomics; arch::Word is as wide as the target moves at once). The tag of a call's n-th token is n + 1, and
// exchange memory is zero when a call starts. A reader polls the word itself until the tag is the one of the token it works
// on; then the payload is the one that belongs to it, because both travelled together. No other memory is handed over, so
// nothing needs to be ordered: there are no fences, counters or barriers between blocks.
//
// Runs. A block publishes its values of a channel as one run of consecutive words. Every run of a channel has room for the
// same number of words, and a block publishes all of them, so where a word stands does not depend on who wrote it.
//
// Scope. Of most channels only blocks of one device are writers and readers (writers(), call.h). Their accesses need not be seen by
// other GPUs, and where a target knows the difference, they are faster.
//
// Copies. Where a device has several dies, a channel that many blocks read has a copy for each: its writer stores every word
// once per die, and a block polls the copy of the die that it belongs to. So no more blocks poll a line than belong to a die.
// A copy's word is a word like any other: it has its own tag and one writer, and nothing is said about the order in which
// copies are stored. Where words have one reader (inboxes, logits), or a device has one die, there is one.
//
// Proof that no word is overwritten before it was read. Each word of each copy has exactly one writing block
// (jax_mono/handoffs.py, tested) and is written at most once per token, because every layer has channels of its own.
// Summaries, logits and the choice have two places, used by even and odd tokens in turn; all other channels have one.
//   A block publishes its summary of token n after all its reads of token n but those of summaries, logits and choice, and
//   it reads those before anything of token n + 1. It starts token n + 1 only after it has read the summaries of token n of
//   every block of every device, or the choice, whose writer has.
//   - One place: let W write a word for token n + 1 that R reads for token n. W has started n + 1, so R has published its
//     summary of n, so R has read the word.
//   - Two places: let W write a word for token n + 2 that R reads for token n. W has started n + 2, so R has published its
//     summary of n + 1, so R has left token n, so R has read the word.
// Where a block is many threads, "after" holds for all of them: a barrier of the block stands between the reads and the
// summary, and between the summaries and the next token.
//
// Proof that nobody waits for ever. Every block takes the steps of a token in the same order (jax_mono/flow.py), and waits only
// for words that are published at an earlier step of it, or of the token before. So of all blocks that have not ended, one at
// the earliest step can go on. Delayed sums are taken in before a product and were published layers ago.
//
// KV cache, residuals and histories are not handed over: the block that writes a part is the only one that reads it.
//
// A wait is bounded. The first block that waits too long raises `aborted`; every other wait sees it and gives up; every
// block notes where it waited, and all leave the token loop.
#pragma once

#include "kernel/call.h"

namespace mono::MONO_VARIANT {

constexpr u32 kLostTag = 0xffffffffu;  // never awaited: budgets are 31-bit
constexpr i32 kFloatsPerWord = arch::kFloatsPerWord;
template <class T>
constexpr i32 kWeightsPerWord = arch::kWeightsPerWord<T>;

// Words that hold `values` values.
MONO_DEVICE constexpr i32 words_for(i32 values, i32 per_word) { return (values + per_word - 1) / per_word; }
constexpr i32 kTileWords = (arch::kTileRows + kFloatsPerWord - 1) / kFloatsPerWord;  // of a tile's rows

// Polls a word until its tag is the wanted one, and returns it. Gives up, with another tag, when the call has failed or the
// wait was too long; then notes `key` at `place`, if it is the first wait of the block to do so: later ones only follow from
// it. Out of line: every hand-off has a wait, and most of them end here.
MONO_COLD arch::Word wait_long(Control* control, volatile i32* failed, u64* place, u64 key, const arch::Word* at,
                               arch::Pump* pump) {
  if (*failed) return {};
  const u32 tag = Place(key).epoch();
  i64 start = 0;  // of waits that are not short
  MONO_ROLLED
  for (;;) {
    const arch::Word word = arch::poll(at, tag, pump);
    if (arch::tag_of(word) == tag) return word;
    if (arch::load_acquire(&control->aborted)) break;
    const i64 now = arch::nanoseconds();
    if (start == 0) start = now;
    if (now - start > control->wait_limit) break;
    arch::yield();
  }
  if (!*failed) arch::store_place(place, key);
  *failed = 1;
  arch::store_release(&control->aborted, 1);
  return {};
}

// One block's (on a GPU: one thread's) end of all hand-offs during one token.
struct Link {
  Control* control;
  u64* place;            // this block's entry of Control::places
  volatile i32* failed;  // near: set by the block's first wait in vain; its other threads see it after the next barrier
  const i32* lost;       // near: the hand-off of this block that a test asked to lose, or -1
  arch::Pump pump{};
  u32 tag = 0;

  MONO_DEVICE static i32 hand_off(Channel channel, i32 layer) { return layer * kChannels + channel; }

  // Tag for words published now; wrong on purpose where a test asked to lose this hand-off.
  MONO_DEVICE u32 out_tag(Channel channel, i32 layer) const {
    return hand_off(channel, layer) == *lost ? kLostTag : tag;
  }

  MONO_DEVICE bool has_arrived(const arch::Word& word) const { return arch::tag_of(word) == tag; }

  // Waits for one word of this token; an empty word once the call has failed.
  MONO_DEVICE arch::Word wait(const arch::Word* at, Channel channel, i32 layer) {
    return confirm(arch::load_word(at, writers(channel)), at, channel, layer);
  }
  // The same for a word that was loaded already.
  MONO_DEVICE arch::Word confirm(const arch::Word& word, const arch::Word* at, Channel channel, i32 layer) {
    return has_arrived(word) ? word : wait_on(at, channel, layer);
  }
  // The same for a word that was not there when somebody looked.
  MONO_DEVICE arch::Word wait_on(const arch::Word* at, Channel channel, i32 layer) {
    return wait_long(control, failed, place, Place(tag, layer, channel).key, at, arch::pump_of(pump));
  }

  // Waits for those words of this token that are wanted; at(k) is the address of the k-th. They are asked for together, because
  // each takes a round trip; and those that are still missing together again, for a while, and then one of them until it is
  // there. What has arrived is not asked for again: blocks that are late need the bandwidth. Words that are not wanted are
  // zero. A word alone is asked for each time, because a condition might wait for loads that are under way. `from`: the channel's
  // writers, which the compiler must know even where the channel is a variable.
  template <i32 kCount, class At, class Wanted>
  MONO_DEVICE void wait_for(arch::Word (&words)[kCount], Blocks from, Channel channel, i32 layer, At at, Wanted wanted) {
    MONO_UNROLLED
    for (i32 k = 0; k < kCount; ++k) words[k] = {};
    MONO_ROLLED
    for (i32 looks = 0;; ++looks) {
      i32 missing = -1;
      MONO_UNROLLED
      for (i32 k = 0; k < kCount; ++k)
        if (wanted(k) && (kCount == 1 || !has_arrived(words[k]))) words[k] = arch::load_word(at(k), from);
      MONO_UNROLLED
      for (i32 k = 0; k < kCount; ++k)
        if (wanted(k) && !has_arrived(words[k])) missing = k;
      if (missing < 0) return;
      if (looks < arch::kLooksAtAll) {
        arch::pause();
      } else if (!has_arrived(wait_on(at(missing), channel, layer))) {
        return;
      }
    }
  }

  // Waits for `count` words, at(i) is the address of the i-th, and hands them on: sink(i, word). The threads of the block
  // share the words; a thread asks for kBatch at once.
  template <i32 kBatch = arch::kWordsInFlight, class At, class Sink>
  MONO_DEVICE void read(i32 count, Channel channel, i32 layer, At at, Sink sink) {
    MONO_ROLLED
    for (i32 base = arch::thread(); base < count; base += kBatch * arch::kThreads) {
      arch::Word words[kBatch];
      auto index = [&](i32 k) { return base + k * i32(arch::kThreads); };
      auto wanted = [&](i32 k) { return k == 0 || index(k) < count; };
      wait_for(words, writers(channel), channel, layer, [&](i32 k) { return at(index(k)); }, wanted);
      MONO_UNROLLED
      for (i32 k = 0; k < kBatch; ++k)
        if (wanted(k)) sink(index(k), words[k]);
      pump.step();
    }
  }
};

// Publishes a word for blocks of this device, in as many copies as it has dies (`to` is its place in the first), or for one of any
// device.
MONO_DEVICE void publish(Shape h, Blocks readers, arch::Word* to, const arch::Word& word) {
  if (readers == Blocks::kOfDevice) {
    arch::store_copies(to, word, h.num_dies, h.copy_words);
  } else {
    arch::store_word(to, word);
  }
}

// Publishes `count` floats as a run of `words` words; value(i) is the i-th.
template <class Value>
MONO_DEVICE void publish_run(Shape h, Blocks readers, arch::Word* to, i32 words, u32 tag, i32 count, Value value) {
  arch::for_each(words, [&](i32 w) {
    float payload[kFloatsPerWord];
    for (i32 k = 0; k < kFloatsPerWord; ++k) {
      const i32 i = w * kFloatsPerWord + k;
      payload[k] = i < count ? value(i) : 0.0f;
    }
    publish(h, readers, to + w, arch::pack(tag, payload));
  });
}

}  // namespace mono::MONO_VARIANT
