// Saves and restores libtorch tensors: views, scalars, bfloat16, an empty tensor.
//
//   torch DIRECTORY
#include "ashore_torch.hpp"
#include <cstdio>

int main(int count, char **arguments) {
  if (count != 2) return 2;
  at::manual_seed(7);
  at::Tensor weight = at::randn({64, 32}), step = at::full({}, 5.0), flags = at::zeros({0}, at::kBool);
  at::Tensor half = at::randn({33}).to(at::kBFloat16), view = at::randn({8, 6}).t().slice(1, 0, 8, 2);
  at::Tensor before[] = {weight.clone(), step.clone(), flags.clone(), half.clone(), view.clone()};

  ashore::state state;
  add(state, "weight", weight);
  add(state, "step", step);
  add(state, "flags", flags);
  add(state, "half", half);
  add(state, "view", view);
  {
    ashore::executor executor(arguments[1], R"({"arena": 4194304, "chunk": 1048576})");
    auto save = executor.save(1, state);
    executor.fence(); // before anything writes the tensors
    for (at::Tensor *tensor : {&weight, &step, &half, &view}) tensor->zero_();
    if (!save.wait(60)) return 1;
    executor.latest()->restore(state); // in place, also into the view
  }
  at::Tensor *after[] = {&weight, &step, &flags, &half, &view};
  for (int i = 0; i < 5; i++) {
    if (!at::equal(before[i], *after[i])) return std::fprintf(stderr, "tensor %d differs\n", i), 1;
  }
  at::Tensor wrong = at::zeros({32, 64});
  ashore::state other;
  add(other, "weight", wrong);
  try {
    ashore::checkpoint(std::string(arguments[1]) + "/step-00000001").restore(other);
    return 1;
  } catch (const ashore::error &error) {
    if (error.kind != ASHORE_INVALID || error.tensor != "weight") return 1;
  }
  std::puts("torch: ok");
}
