// Computes logits from the last states of a pass, and refuses states and logits that are not
// finite.
#include <algorithm>

#include "base/finite.h"
#include "model/decoder.h"

namespace moerun {

void Decoder::issue_logits(const Pass& pass, std::size_t first, std::size_t rows) const {
  const LinearOutput output{static_cast<float>(1.0 / config_.logits_divisor),
                            /*accumulate=*/false};
  backend_.linear(pass.stream, weights_.lm_head, pass.workspace.normed.slice(first, rows),
                  pass.workspace.logits.slice(0, rows), output);
}

void Decoder::compute_logits(const Pass& pass, std::size_t first, Activations logits) const {
  if (backend_.is_host()) {
    const LinearOutput output{static_cast<float>(1.0 / config_.logits_divisor),
                              /*accumulate=*/false};
    backend_.linear(pass.stream, weights_.lm_head, pass.workspace.normed.slice(first, logits.rows),
                    logits, output);
    pass.stream.synchronize();
    for (std::size_t row = 0; row < logits.rows; ++row) {
      check_logits(pass, {logits.row(row), logits.cols});
    }
    return;
  }
  const Activations& staged = pass.workspace.logits;
  for (std::size_t done = 0; done < logits.rows; done += staged.rows) {
    const std::size_t rows = std::min(staged.rows, logits.rows - done);
    issue_logits(pass, first + done, rows);
    for (std::size_t row = 0; row < rows; ++row) {
      backend_.copy(pass.stream, reinterpret_cast<std::byte*>(logits.row(done + row)),
                    reinterpret_cast<const std::byte*>(staged.row(row)),
                    logits.cols * sizeof(float));
    }
    pass.stream.synchronize();
    for (std::size_t row = 0; row < rows; ++row) {
      check_logits(pass, {logits.row(done + row), logits.cols});
    }
  }
}

// Kernels propagate NaN and infinity, and the residual stream keeps them. A look at the output of
// every layer therefore finds the layer. On a device the host would have to wait for each.
void Decoder::check_states(const Pass& pass, Activations states,
                           const NonFinitePlace& place) const {
  if (!backend_.is_host() || pass.keeps_non_finite) return;
  for (std::size_t t = 0; t < pass.token_ids.size(); ++t) {
    if (all_finite({states.row(t), states.cols})) continue;
    refuse_non_finite(config_, weights_, pass.token_ids, place);
  }
}

void Decoder::check_logits(const Pass& pass, std::span<const float> logits) const {
  using Part = NonFinitePlace::Part;
  if (pass.keeps_non_finite || all_finite(logits)) return;
  refuse_non_finite(config_, weights_, pass.token_ids,
                    {backend_.is_host() ? Part::head : Part::anywhere});
}

}  // namespace moerun
