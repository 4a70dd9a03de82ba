// The resident program of one block: the whole token loop of one request.
#pragma once

#include "kernel/attention.h"
#include "kernel/sample.h"

namespace mono::MONO_VARIANT {

// Every lane of the own rows starts from the token's embedding.
template <class T>
MONO_DEVICE void embed(BlockState<T>& s, i32 token) {
  const T* row = static_cast<const T*>(s.call.embed) + i64(token) * s.header.hidden_size + s.first_row;
  arch::for_each(s.rows, [&](i32 r) {
    const float x = arch::to_float(row[r]);
    MONO_ROLLED
    for (i32 lane = 0; lane < s.lanes(); ++lane) s.residual(lane)[r] = x;
  });
}

// Takes one token through all layers; the residual stream after the last one is on its way.
template <class T>
MONO_DEVICE void forward(BlockState<T>& s, i32 token, i32 position) {
  embed(s, token);
  const float* rope = s.call.rope + i64(position) * s.header.head_dim;
  arch::for_each(s.header.head_dim, [&](i32 i) { s.scratch.rope[i] = rope[i]; });  // read after many barriers
  MONO_ROLLED
  for (i32 layer = 0; layer < s.header.num_layers; ++layer) {
    MONO_ROLLED
    for (i32 module = 0; module < kModules; ++module) {
      if (module == kAttention) {
        qkv_stage(s, layer, layer == 0 ? Input{token, 0, 0} : Input{-1, layer - 1, kMlp});
        attention_stage(s, layer, position);
      } else {
        up_stage(s, layer);
      }
      past_sums(s, layer, arch::anew(module));
      if (arch::anew(module) == kAttention) {
        o_stage(s, layer, position);
      } else {
        down_stage(s, layer);
      }
      mix_stage(s, layer, arch::anew(module));
    }
  }
}

// What the host wants, as seen by the one thread that asks: 0 to go on, else 1 + Finish.
template <class T>
MONO_DEVICE u32 host_signal(const BlockState<T>& s, i64 started) {
  Session* session = s.call.session;
  if (!session || s.device_index != 0 || s.block_index != 0) return 0;
  if (arch::load_acquire(&session->cancel)) return 1 + kCancelled;
  if (s.call.time_left && arch::nanoseconds() - started > s.call.time_left) return 1 + kDeadline;
  return 0;
}

template <class T>
MONO_DEVICE void report(const BlockState<T>& s, i32 step, const Choice& choice) {
  if (s.block_index != 0 || arch::thread() != 0) return;
  s.call.outputs.tokens[step] = choice.token;
  s.call.outputs.logprobs[step] = choice.logprob;
  Session* session = s.call.session;
  if (session && s.device_index == 0 && step < session->capacity) {
    session->tokens[step] = choice.token;
    session->logprobs[step] = choice.logprob;
    arch::store_release(&session->produced, step + 1);
    arch::wake(&session->produced);
  }
}

template <class T>
MONO_DEVICE void store_logits(const BlockState<T>& s, i32 step) {
  float* out = s.call.outputs.logits + i64(step) * s.header.max_vocab;
  for_own_logits(s, [&](i32 token, float logit) { out[token - s.device.vocab.first] = logit; });
}

template <class T>
MONO_DEVICE bool is_stop(const BlockState<T>& s, i32 token) {
  MONO_ROLLED
  for (i32 i = 0; i < s.call.request.num_stops; ++i)
    if (s.call.request.stops[i] == token) return true;
  return false;
}

// Generating feeds the request's tokens, then each sampled token, and counts a step per sampled token. Scoring feeds the
// request's tokens and counts a step for each.
template <class T>
MONO_DEVICE void run_block(BlockState<T>& s) {
  const Request& request = s.call.request;
  const bool scoring = request.mode == kScore;
  const i64 started = arch::nanoseconds();
  arch::for_each((s.header.vocab_size + 31) / 32, [&](i32 i) { s.scratch.seen[i] = 0; });
  arch::sync();
  mark_seen(s, request.history, request.num_history);
  arch::sync();

  i32 token = request.forced[0], step = 0;
  Finish finish = kLength;
  MONO_ROLLED
  for (i32 fed = 0; step < request.budget && finish == kLength; ++fed) {
    const i32 position = request.position + fed, next = fed + 1 < request.num_forced ? request.forced[fed + 1] : -1;
    const bool sampling = scoring || next < 0;
    s.link.tag = u32(fed) + 1;
    s.note(kBegun);
    forward(s, token, position);
    // Asked late, so that one token at most follows; but not last, because the host's memory is far away.
    const u32 signal = arch::thread() == 0 ? host_signal(s, started) : 0;
    if (sampling) head_stage(s);
    if (sampling && s.call.outputs.logits) store_logits(s, step);
    publish_summary(s, position, sampling, scoring ? next : -1, signal);
    s.note(kSummarised);
    const Choice choice = arch::agreed(sample_stage(s, sampling, step, position));
    arch::sync();
    const bool failed = arch::agreed(i32(*s.link.failed));
    arch::sync();  // before anyone's next wait can set it
    if (failed) return;
    s.note(kChosen);
    if (sampling) report(s, step++, choice);
    if (choice.signal) {
      finish = Finish(choice.signal - 1);
    } else if (!scoring && sampling) {
      token = choice.token;
      mark_seen(s, &choice.token, 1);
      if (is_stop(s, token)) finish = kStop;
    } else {
      token = next;
    }
  }
  if (s.block_index == 0 && arch::thread() == 0) {
    s.call.outputs.status[0] = step;
    s.call.outputs.status[1] = finish;
  }
}

}  // namespace mono::MONO_VARIANT
