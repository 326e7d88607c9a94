// An exception that leaves a callback aborts the process, whatever calls it; it is never seen by a caller.
#include <ashore.h>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(holds) \
  if (!(holds)) fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #holds), exit(1)

namespace {

const char *const SMALL = "{\"arena\": 2097152, \"chunk\": 262144, \"device\": \"host\"}";

ashore_executor *opened(const char *root) {
  ashore_executor *executor = nullptr;
  CHECK(ashore_open(root, SMALL, nullptr, &executor) == ASHORE_OK);
  return executor;
}

void thrown(void *) { throw std::runtime_error("from release"); }
void unwound(void *) { _exit(4); }
void thrown_at_end(void *, int32_t, const char *) { throw std::runtime_error("from done"); }
void thrown_by_log(void *, int32_t, const char *) { throw std::runtime_error("from log"); }
int32_t thrown_by_group(void *, const void *, size_t, void *, double) { throw std::runtime_error("from all_gather"); }

// Runs `body` in a child, which must be aborted.
template <typename Body>
void aborts(const char *what, Body body) {
  pid_t child = fork();
  if (child == 0) {
    rlimit none{0, 0};
    setrlimit(RLIMIT_CORE, &none);
    // The text of the abort is not for the log of a test that passes.
    if (!freopen("/dev/null", "w", stderr)) _exit(3);
    alarm(30);
    try {
      body();
    } catch (...) {
      _exit(1);
    }
    _exit(2);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT) {
    fprintf(stderr, "%s: the child was not aborted: status %x\n", what, status);
    exit(1);
  }
}

}  // namespace

int main(int count, char **arguments) {
  CHECK(count == 2);
  const char *folder = arguments[1];
  float data[4] = {1, 2, 3, 4};
  int64_t shape[1] = {4};
  ashore_tensor t{};
  t.name = "w";
  t.data = data;
  t.shape = shape;
  t.dims = 1;
  t.dtype = ASHORE_F32;
  ashore_tensor throwing = t;
  throwing.release = thrown;

  // Within the call that refuses the tensors: the caller must not catch it, and nothing is unwound, which would
  // release the second tensor.
  ashore_tensor both[2] = {throwing, t};
  both[1].release = unwound;
  aborts("refused", [&] { ashore_save_begin(nullptr, 1, both, 2, nullptr, nullptr); });
  aborts("staged", [&] {
    ashore_executor *executor = opened(folder);
    ashore_save_begin(executor, 1, &throwing, 1, nullptr, nullptr);
    ashore_close(executor, 60);
  });
  aborts("done", [&] {
    ashore_executor *executor = opened(folder);
    ashore_save *save = nullptr;
    ashore_save_begin(executor, 2, &t, 1, nullptr, &save);
    ashore_save_then(save, thrown_at_end, nullptr);
    ashore_save_wait(save, 60, nullptr);
    ashore_close(executor, 60);
  });
  aborts("log", [&] {
    ashore_log(thrown_by_log, nullptr);
    ashore_executor *executor = opened(folder);
    ashore_save *save = nullptr;
    ashore_save_begin(executor, 3, &t, 1, nullptr, &save);
    ashore_close(executor, 60);
  });
  aborts("all_gather", [&] {
    ashore_ranks ranks{};
    ranks.world = 2;
    ranks.all_gather = thrown_by_group;
    ashore_executor *executor = nullptr;
    ashore_open(folder, SMALL, &ranks, &executor);
  });
  puts("throws: ok");
}
