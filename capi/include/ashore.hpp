// ashore for C++17: objects that free themselves, and exceptions for failures. A thin header over ashore.h.
#ifndef ASHORE_HPP
#define ASHORE_HPP
#include <ashore.h>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace ashore {

// A failure. what() returns its text.
struct error : std::runtime_error {
  explicit error(const ashore_error &e)
      : std::runtime_error(e.text), kind(e.kind), rank(e.rank), step(e.step), tensor(e.tensor ? e.tensor : ""),
        path(e.path ? e.path : "") {}
  int32_t kind, rank; // `kind` is an ashore_status
  int64_t step;
  std::string tensor, path; // empty if there is none
};

// Throws the failure of a call. Returns false for ASHORE_SKIPPED, otherwise true.
inline bool check(int32_t status) {
  if (status != ASHORE_OK && status != ASHORE_SKIPPED) throw error(*ashore_last_error());
  return status == ASHORE_OK;
}

template <class T>
constexpr int32_t dtype_of() {
  constexpr bool is_float = std::is_same_v<T, float> || std::is_same_v<T, double>;
  static_assert(is_float || (std::is_integral_v<T> && sizeof(T) <= 8), "give the dtype by state::tensor(ashore_tensor)");
  if (is_float) return sizeof(T) == 4 ? ASHORE_F32 : ASHORE_F64;
  constexpr int32_t all[] = {ASHORE_U8, ASHORE_I8, ASHORE_U16, ASHORE_I16, ASHORE_U32, ASHORE_I32, ASHORE_U64, ASHORE_I64};
  constexpr int first = 2 * ((sizeof(T) > 1) + (sizeof(T) > 2) + (sizeof(T) > 4));
  return std::is_same_v<T, bool> ? ASHORE_BOOL : all[first + std::is_signed_v<T>];
}

// Named tensors, and values as JSON texts, to save and to restore into.
class state {
public:
  // Adds a tensor with the packed elements of `data`. `keep` is held until no save reads the memory any more.
  template <class T>
  state &tensor(const std::string &name, T *data, std::vector<int64_t> shape, std::shared_ptr<const void> keep = {}) {
    ashore_tensor t{};
    t.name = name.c_str(), t.dtype = dtype_of<std::remove_const_t<T>>();
    t.data = const_cast<std::remove_const_t<T> *>(data);
    t.shape = shape.data(), t.dims = static_cast<uint32_t>(shape.size());
    return tensor(t, std::move(keep));
  }

  // Adds any tensor. Copies its name, shape, strides and box; `keep` replaces its `release` and `context`.
  state &tensor(const ashore_tensor &given, std::shared_ptr<const void> keep = {}) {
    auto &e = entries.emplace_back();
    ashore_tensor t = given;
    e.name = given.name ? given.name : "", t.name = e.name.c_str();
    auto *next = e.lists;
    for (auto *list : {&t.shape, &t.strides, &t.global_shape, &t.offset})
      if (auto &copy = *next++; *list) copy.assign(*list, *list + t.dims), *list = copy.data();
    t.release = nullptr, t.context = nullptr, e.keep = std::move(keep);
    tensors.push_back(t);
    return *this;
  }
  state &value(std::string name, std::string json) { return named(values, std::move(name), std::move(json)); }
  // Adds another name of a tensor, for tied weights: the bytes are saved once.
  state &alias(std::string name, std::string holder) { return named(aliases, std::move(name), std::move(holder)); }
  state() = default; // not movable, because it points into itself
  state(state &&) = delete;

private:
  friend class executor;
  friend class checkpoint;
  template <class T>
  state &named(std::vector<T> &all, std::string name, std::string text) {
    auto &kept = texts.emplace_back(std::move(name), std::move(text));
    all.push_back({kept.first.c_str(), kept.second.c_str()});
    return *this;
  }
  struct entry {
    std::string name;
    std::vector<int64_t> lists[4];
    std::shared_ptr<const void> keep;
  };
  std::deque<entry> entries; // a deque, so that pointers into it stay valid
  std::deque<std::pair<std::string, std::string>> texts;
  std::vector<ashore_tensor> tensors;
  std::vector<ashore_value> values;
  std::vector<ashore_alias> aliases;
};
template <class T, void (*free)(T *)>
struct freed {
  void operator()(T *handle) const { free(handle); }
};

// A save that is under way or has ended. The save goes on when this object is destroyed.
class save {
public:
  save() = default;
  // Returns true if the save became durable, and false if it was skipped.
  bool wait(double seconds, ashore_committed *cost = nullptr) {
    if (cost) cost->size = sizeof *cost;
    return check(ashore_save_wait(handle.get(), seconds, cost));
  }
  // Returns when the step is also durable in the tier of this name.
  void durable_in(const char *tier, double seconds) { check(ashore_save_durable_in(handle.get(), tier, seconds)); }
  void staged(double seconds) { check(ashore_save_staged(handle.get(), seconds)); }
  void cancel() { check(ashore_save_cancel(handle.get())); }
  // Calls `done` once, with a status and the text of a failure. An exception in it ends the program.
  void then(std::function<void(int32_t, const char *)> done) {
    using function = decltype(done);
    auto kept = std::make_unique<function>(std::move(done));
    auto call = [](void *context, int32_t kind, const char *text) noexcept {
      (*std::unique_ptr<function>(static_cast<function *>(context)))(kind, text);
    };
    check(ashore_save_then(handle.get(), call, kept.get()));
    kept.release();
  }

private:
  friend class executor;
  explicit save(ashore_save *begun) : handle(begun) {}
  std::unique_ptr<ashore_save, freed<ashore_save, ashore_save_free>> handle;
};

// A step that can be read.
class checkpoint {
public:
  checkpoint() = default;
  explicit checkpoint(const std::string &path) {
    ashore_checkpoint *opened = nullptr;
    check(ashore_checkpoint_open(path.c_str(), &opened));
    handle.reset(opened);
  }
  int64_t step() const { return ashore_checkpoint_step(handle.get()); }
  void restore(const state &to) { check(ashore_restore(handle.get(), to.tensors.data(), to.tensors.size())); }
  // Returns the JSON text of a value, or, without a name, of the checkpoint.
  std::string json(const char *name = nullptr) const {
    char *text = nullptr;
    check(ashore_checkpoint_json(handle.get(), name, &text));
    return owned(text);
  }

private:
  friend class executor;
  explicit checkpoint(ashore_checkpoint *opened) : handle(opened) {}
  static std::string owned(char *text) { return std::unique_ptr<char, freed<char, ashore_text_free>>(text).get(); }
  std::unique_ptr<ashore_checkpoint, freed<ashore_checkpoint, ashore_checkpoint_free>> handle;
};

class executor {
public:
  explicit executor(const std::string &root, const char *settings = nullptr, const ashore_ranks *ranks = nullptr) {
    ashore_executor *opened = nullptr;
    check(ashore_open(root.c_str(), settings, ranks, &opened));
    handle.reset(opened);
  }
  ashore::save save(uint64_t step, const state &state, ashore_save_options options = {}) {
    using kept = std::shared_ptr<const void>;
    std::vector<ashore_tensor> tensors(state.tensors);
    std::vector<std::unique_ptr<kept>> keeps;
    for (auto &e : state.entries) keeps.push_back(e.keep ? std::make_unique<kept>(e.keep) : nullptr);
    auto release = [](void *context) noexcept { delete static_cast<kept *>(context); };
    for (size_t i = 0; i < keeps.size(); i++)
      if ((tensors[i].context = keeps[i].release())) tensors[i].release = release;
    options.size = sizeof options;
    if (!options.values) options.values = state.values.data(), options.value_count = state.values.size();
    if (!options.aliases) options.aliases = state.aliases.data(), options.alias_count = state.aliases.size();
    ashore_save *begun = nullptr;
    check(ashore_save_begin(handle.get(), step, tensors.data(), tensors.size(), &options, &begun));
    return ashore::save(begun);
  }
  // Afterwards the program may write the tensors: in the streams `in` on the GPU; without any, on the host.
  void fence(const std::vector<ashore_stream> &in = {}) { check(ashore_fence(handle.get(), in.data(), in.size())); }
  std::optional<checkpoint> latest() {
    ashore_checkpoint *newest = nullptr;
    check(ashore_latest(handle.get(), &newest));
    return newest ? std::optional(checkpoint(newest)) : std::nullopt;
  }
  // The newest step whose bytes are all as written; `skipped` gets the JSON text of newer, damaged steps.
  std::optional<checkpoint> latest_valid(std::string *skipped = nullptr) {
    ashore_checkpoint *newest = nullptr;
    char *text = nullptr;
    check(ashore_latest_valid(handle.get(), &newest, skipped ? &text : nullptr));
    if (skipped) *skipped = checkpoint::owned(text);
    return newest ? std::optional(checkpoint(newest)) : std::nullopt;
  }
  // Waits for the saves under way, and throws the first failure that no call has returned. Without a call of
  // close(), the destructor waits five minutes, and failures are only logged.
  void close(double seconds) { check(ashore_close(handle.release(), seconds)); }

private:
  static void closed(ashore_executor *handle) { ashore_close(handle, 300); }
  std::unique_ptr<ashore_executor, freed<ashore_executor, closed>> handle;
};

} // namespace ashore
#endif
