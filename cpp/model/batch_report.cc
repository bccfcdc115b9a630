#include "model/batch_report.h"

#include <nlohmann/json.hpp>

namespace moerun {
namespace {

using Json = nlohmann::ordered_json;

Json rate(double amount, double seconds) {
  return amount > 0 && seconds > 0 ? Json(amount / seconds) : Json(nullptr);
}

double mean(double sum, double count) { return count > 0 ? sum / count : 0; }

Json ms(double seconds) { return seconds > 0 ? Json(1e3 * seconds) : Json(nullptr); }

Json prediction_json(const PredictionStats& prediction) {
  if (!prediction.is_there) return nullptr;
  const auto count = static_cast<double>(prediction.predictions);
  return {{"predictions", prediction.predictions},
          {"ms", ms(mean(prediction.seconds, count))},
          {"waited_ms", ms(mean(prediction.waited_seconds, count))}};
}

Json schedule_json(const ScheduleStats& schedule) {
  if (!schedule.is_there) return nullptr;
  const auto rounds = static_cast<double>(schedule.scheduled_rounds);
  return {{"active", schedule.is_active},
          {"rounds", schedule.rounds},
          {"scheduled_rounds", schedule.scheduled_rounds},
          {"split_ms", ms(mean(schedule.split_seconds, rounds))},
          {"predicted_experts", mean(static_cast<double>(schedule.predicted_experts), rounds)},
          {"predicted_in_order", mean(static_cast<double>(schedule.predicted_in_order), rounds)},
          {"token_ms_on", ms(schedule.token_seconds_on)},
          {"token_ms_off", ms(schedule.token_seconds_off)}};
}

}  // namespace

Json batch_json(const BatchStats& batch) {
  const auto steps = static_cast<double>(batch.steps);
  const auto decoded = static_cast<double>(batch.decode_tokens);
  Json layers = Json::array();
  double active = 0;
  for (const std::uint64_t count : batch.active_experts) {
    layers.push_back(mean(static_cast<double>(count), steps));
    active += static_cast<double>(count);
  }
  const double per_layer = mean(active, steps * static_cast<double>(layers.size()));
  return {{"waiting", batch.waiting},
          {"running", batch.running},
          {"finished", batch.finished},
          {"most_running", batch.most_running},
          {"prompt_tokens", batch.prompt_tokens},
          {"generated_tokens", batch.generated_tokens},
          {"decode_tokens", batch.decode_tokens},
          {"steps", batch.steps},
          {"prefill_s", batch.prefill_seconds},
          {"decode_s", batch.decode_seconds},
          {"prefill_tokens_per_s",
           rate(static_cast<double>(batch.prompt_tokens), batch.prefill_seconds)},
          {"decode_tokens_per_s", rate(decoded, batch.decode_seconds)},
          {"tokens_per_step", rate(decoded, steps)},
          {"active_experts", layers.empty() || steps == 0 ? Json(nullptr) : Json(per_layer)},
          {"active_experts_of_layers", steps == 0 ? Json::array() : layers},
          {"hit_rate", batch.lookups > 0 ? Json(static_cast<double>(batch.hits) /
                                                static_cast<double>(batch.lookups))
                                         : Json(nullptr)},
          {"ready_rate", batch.lookups > 0 ? Json(static_cast<double>(batch.ready) /
                                                  static_cast<double>(batch.lookups))
                                           : Json(nullptr)},
          {"bytes_per_token",
           decoded > 0 ? Json(static_cast<double>(batch.bytes) / decoded) : Json(nullptr)},
          {"prediction", prediction_json(batch.prediction)},
          {"schedule", schedule_json(batch.schedule)},
          {"kv_cache",
           {{"budget_bytes", batch.kv_budget_bytes},
            {"used_bytes", batch.kv_used_bytes},
            {"peak_bytes", batch.kv_peak_bytes}}}};
}

}  // namespace moerun
