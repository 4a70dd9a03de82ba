// The resident program of one block: the whole token loop of one request.
#pragma once

#include "attention.h"
#include "sample.h"

namespace mono::MONO_VARIANT {

// Every lane starts from the token's embedding.
template <class T>
MONO_DEVICE void embed(BlockState<T>& s, i32 token) {
  const i32 hidden = s.header.hidden_size;
  const T* row = static_cast<const T*>(s.call.embed) + i64(token) * hidden;
  for (i32 lane = 0; lane < s.lanes(); ++lane) {
    for (i32 i = 0; i < hidden; ++i) s.scratch.x[i64(lane) * hidden + i] = arch::to_float(row[i]);
    for (i32 r = 0; r < s.rows; ++r) s.residual(lane)[r] = arch::to_float(row[s.first_row + r]);
  }
}

// Takes one token through all layers; scratch.x ends up as the final residual stream.
template <class T>
MONO_DEVICE void forward(BlockState<T>& s, i32 token, i32 position) {
  embed(s, token);
  for (i32 layer = 0; layer < s.header.num_layers && !s.link.failed; ++layer) {
    qkv_stage(s, layer);
    attention_stage(s, layer, position);
    o_stage(s, layer);
    mix_stage(s, layer, kAttention);
    read_residual(s, layer, kAttention);
    up_stage(s, layer);
    down_stage(s, layer);
    mix_stage(s, layer, kMlp);
    read_residual(s, layer, kMlp);
  }
}

// What the host wants, as seen by the one block that asks: 0 to go on, else 1 + Finish.
template <class T>
MONO_DEVICE u32 host_signal(const BlockState<T>& s) {
  Session* session = s.call.session;
  if (!session || s.device_index != 0 || s.block_index != 0) return 0;
  if (arch::load_acquire(&session->cancel)) return 1 + kCancelled;
  if (session->deadline && arch::nanoseconds() > session->deadline) return 1 + kDeadline;
  return 0;
}

template <class T>
MONO_DEVICE void report(const BlockState<T>& s, i32 step, const Choice& choice) {
  if (s.block_index != 0) return;
  s.call.outputs.tokens[step] = choice.token;
  s.call.outputs.logprobs[step] = choice.logprob;
  Session* session = s.call.session;
  if (session && s.device_index == 0 && step < session->capacity) {
    session->tokens[step] = choice.token;
    session->logprobs[step] = choice.logprob;
    arch::store_release(&session->produced, step + 1);
  }
}

template <class T>
MONO_DEVICE void store_logits(const BlockState<T>& s, i32 step) {
  float* out = s.call.outputs.logits + i64(step) * s.header.max_vocab;
  for_own_logits(s, [&](i32 token, float logit) { out[token - s.device.vocab.first] = logit; });
}

template <class T>
MONO_DEVICE bool is_stop(const BlockState<T>& s, i32 token) {
  for (i32 i = 0; i < s.call.request.num_stops; ++i)
    if (s.call.request.stops[i] == token) return true;
  return false;
}

template <class T>
MONO_DEVICE void run_block(const Call& call, i32 block) {
  BlockState<T> s(call, block);
  const Request& request = call.request;
  const bool scoring = request.mode == kScore;
  for (i32 i = 0; i < (s.header.vocab_size + 31) / 32; ++i) s.scratch.seen[i] = 0;
  for (i32 i = 0; i < request.num_history; ++i)
    if (request.history[i] >= 0) mark_seen(s, request.history[i]);

  i32 token = scoring ? request.forced[0] : request.first_token;
  i32 step = 0;
  Finish finish = kLength;
  while (step < request.budget && finish == kLength) {
    const i32 position = request.position + step;
    s.link.tag = u32(step) + 1;
    forward(s, token, position);
    head_stage(s);
    if (call.outputs.logits) store_logits(s, step);
    const i32 target = scoring && step + 1 < request.budget ? request.forced[step + 1] : -1;
    publish_summary(s, position, target, host_signal(s));  // asked last: the call ends with this very token
    const Choice choice = sample_stage(s, step, position);
    if (s.link.failed) return;
    report(s, step, choice);
    ++step;
    if (choice.signal) {
      finish = Finish(choice.signal - 1);
    } else if (!scoring && choice.token < 0) {
      finish = kNotFinite;  // options that overflow every score leave nothing to choose
    } else if (!scoring) {
      token = choice.token;
      mark_seen(s, token);
      if (is_stop(s, token)) finish = kStop;
    } else {
      token = target;
    }
  }
  if (block == 0) {
    call.outputs.status[0] = step;
    call.outputs.status[1] = finish;
  }
}

}  // namespace mono::MONO_VARIANT
