// Checks ashore.hpp: it frees objects, releases what keeps memory, and throws failures with their tensor.
#include <ashore.hpp>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#define CHECK(holds) \
  if (!(holds)) fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #holds), exit(1)

int main(int count, char **arguments) {
  CHECK(count == 2);
  const char *settings = R"({"arena": 2097152, "chunk": 262144, "device": "host"})";
  std::atomic<int> released = 0, ended = 0;
  {
    ashore::executor executor(arguments[1], settings);
    CHECK(!executor.latest());
    std::weak_ptr<const void> watched;
    ashore::save save = [&] {
      std::shared_ptr<float> memory(new float[3]{1, 2, 3}, [&](float *p) { delete[] p, released++; });
      watched = memory;
      ashore::state state;
      state.tensor("w", memory.get(), {3}, memory).alias("tied", "w").value("lr", "0.5").value("steps", "[1, 2]");
      return executor.save(1, state);
    }();
    // The state is gone; the save keeps the memory until it is staged.
    save.staged(60);
    CHECK(released == 1 && watched.expired());
    save.then([&](int32_t kind, const char *text) { ended += kind == ASHORE_OK && !text; });
    ashore_committed cost{};
    CHECK(save.wait(60, &cost) && cost.bytes == 12);
    auto newest = executor.latest();
    CHECK(newest->step() == 1 && newest->json("lr") == "0.5" && newest->json("steps") == "[1,2]");
    float to[3] = {};
    ashore::state target;
    newest->restore(target.tensor("w", to, {3}));
    CHECK(to[0] == 1 && to[2] == 3);
    std::string skipped;
    float tied[3] = {};
    ashore::state other;
    executor.latest_valid(&skipped)->restore(other.tensor("tied", tied, {3}));
    CHECK(tied[2] == 3 && skipped == "[]" && executor.latest_valid()->step() == 1);
    int64_t wrong[3] = {};
    ashore::state refused;
    refused.tensor("w", wrong, {3});
    try {
      newest->restore(refused);
      CHECK(!"restored");
    } catch (const ashore::error &e) {
      CHECK(e.kind == ASHORE_INVALID && e.tensor == "w" && e.step == 1 && std::string(e.what()).find("F32") < 100);
    }
    // Refused: what keeps the memory is released all the same.
    std::shared_ptr<float> memory(new float[3]{}, [&](float *p) { delete[] p, released++; });
    ashore::state twice;
    twice.tensor("w", memory.get(), {3}, memory).tensor("w", memory.get(), {3}, memory);
    try {
      executor.save(2, twice);
      CHECK(!"saved");
    } catch (const ashore::error &e) {
      CHECK(e.kind == ASHORE_INVALID && e.tensor == "w" && memory.use_count() == 3);
    }
    for (int i = 0; i < 10000 && !ended; i++) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    executor.close(60);
  }
  CHECK(released == 2 && ended == 1);
  CHECK(ashore::checkpoint(std::string(arguments[1]) + "/step-00000001").step() == 1);
  std::puts("raii: ok");
}
