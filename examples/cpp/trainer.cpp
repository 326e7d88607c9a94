// Trains a small quadratic with momentum, saves after every step, and resumes bit for bit after a kill.
//
//   trainer DIRECTORY STEPS
#include <ashore.hpp>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

int main(int count, char **arguments) try {
  if (count != 3) return std::fprintf(stderr, "usage: trainer DIRECTORY STEPS\n"), 2;
  ashore::executor executor(arguments[1], R"({"arena": 4194304, "chunk": 1048576, "keep_last": 3})");

  std::vector<float> weights(4096), momentum(4096);
  for (size_t i = 0; i < weights.size(); i++) weights[i] = static_cast<float>(i % 17) - 8;
  double rate = 0.1;
  ashore::state state;
  state.tensor("model.weight", weights.data(), {64, 64}).tensor("optimizer.momentum", momentum.data(), {64, 64});

  int64_t step = 0;
  if (auto newest = executor.latest()) {
    newest->restore(state);
    rate = std::strtod(newest->json("rate").c_str(), nullptr);
    step = newest->step();
    std::printf("resumed at step %lld\n", static_cast<long long>(step));
  }

  while (step < std::atoll(arguments[2])) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2)); // forward and backward, which only read
    executor.fence(); // before the optimizer writes
    step++;
    for (size_t i = 0; i < weights.size(); i++) {
      momentum[i] = 0.9f * momentum[i] + weights[i] * static_cast<float>(i % 5 + 1) * 0.1f;
      weights[i] -= static_cast<float>(rate) * momentum[i];
    }
    rate *= 0.99;

    char text[32];
    std::snprintf(text, sizeof text, "%.17g", rate);
    ashore_value value{"rate", text};
    ashore_save_options options{};
    options.values = &value;
    options.value_count = 1;
    executor.save(static_cast<uint64_t>(step), state, options); // returns at once
    std::printf("step %lld rate %s\n", static_cast<long long>(step), text);
    std::fflush(stdout);
  }
  executor.close(60); // waits for the last saves, and throws an error that no call has thrown

  uint64_t digest = 14695981039346656037u;
  auto bytes = reinterpret_cast<unsigned char *>(weights.data());
  for (size_t i = 0; i < weights.size() * sizeof(float); i++) digest = (digest ^ bytes[i]) * 1099511628211u;
  std::printf("step %lld weights %016llx\n", static_cast<long long>(step), static_cast<unsigned long long>(digest));
} catch (const ashore::error &error) {
  std::fprintf(stderr, "trainer: %s\n", error.what());
  return 1;
}
