// What the tests share: checks that name the line and the library's last error, and tensors whose releases
// are counted.
#ifndef CHECK_H
#define CHECK_H
#define _GNU_SOURCE
#include <ashore.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const SMALL = "{\"arena\": 2097152, \"chunk\": 262144, \"writers\": 2, \"device\": \"host\"}";

#define CHECK(holds)                                                                                                \
  do {                                                                                                              \
    if (!(holds)) {                                                                                                 \
      fprintf(stderr, "%s:%d: not true: %s\n  last error: %s\n", __FILE__, __LINE__, #holds,                        \
              ashore_last_error()->text);                                                                           \
      exit(1);                                                                                                      \
    }                                                                                                               \
  } while (0)

// Checks that a call succeeds.
#define OK(call)                                                                                                    \
  do {                                                                                                              \
    int32_t got_ = (call);                                                                                          \
    if (got_ != ASHORE_OK) {                                                                                        \
      fprintf(stderr, "%s:%d: %s: status %d: %s\n", __FILE__, __LINE__, #call, (int)got_, ashore_last_error()->text); \
      exit(1);                                                                                                      \
    }                                                                                                               \
  } while (0)

// Checks that a call fails with this status and a text that contains `part`.
#define FAILS(call, status, part)                                                                                   \
  do {                                                                                                              \
    int32_t got_ = (call);                                                                                          \
    const ashore_error *last_ = ashore_last_error();                                                                \
    if (got_ != (status) || last_->kind != got_ || !strstr(last_->text, part)) {                                    \
      fprintf(stderr, "%s:%d: %s: status %d, wanted %d with '%s': %s\n", __FILE__, __LINE__, #call, (int)got_,      \
              (int)(status), part, last_->text);                                                                    \
      exit(1);                                                                                                      \
    }                                                                                                               \
  } while (0)

// Memory with a tensor over it: floats with known values, and a counter of releases.
typedef struct {
  float *data;
  int64_t shape[1];
  char name[32];
  atomic_int released;
} weights;

static inline float value_of(uint64_t step, size_t index) { return (float)(step * 1000 + index % 997); }

static inline void fill(weights *w, uint64_t step) {
  for (int64_t i = 0; i < w->shape[0]; i++) w->data[i] = value_of(step, (size_t)i);
}

static inline weights *made(const char *name, size_t count) {
  weights *w = calloc(1, sizeof *w);
  w->data = malloc(count * sizeof(float));
  w->shape[0] = (int64_t)count;
  snprintf(w->name, sizeof w->name, "%s", name);
  fill(w, 0);
  return w;
}

static inline void unmade(weights *w) {
  free(w->data);
  free(w);
}

static inline void released(void *context) { atomic_fetch_add(&((weights *)context)->released, 1); }

static inline ashore_tensor told(weights *w) {
  ashore_tensor t = {.name = w->name, .data = w->data, .shape = w->shape, .dims = 1, .dtype = ASHORE_F32};
  t.release = released;
  t.context = w;
  return t;
}

// Checks that a checkpoint has the values of `step` in the tensor of this name.
static inline void holds(ashore_checkpoint *checkpoint, const char *name, size_t count, uint64_t step) {
  weights *w = made(name, count);
  ashore_tensor target = told(w);
  OK(ashore_restore(checkpoint, &target, 1));
  for (size_t i = 0; i < count; i++) CHECK(w->data[i] == value_of(step, i));
  CHECK(w->released == 0);
  unmade(w);
}

static inline ashore_executor *opened(const char *root, const char *settings) {
  ashore_executor *executor = NULL;
  OK(ashore_open(root, settings, NULL, &executor));
  CHECK(executor != NULL);
  return executor;
}

// The path of this name under the folder that the test was given. Up to 16 are valid at a time.
static inline const char *under(const char *folder, const char *name) {
  static char paths[16][512];
  static int next;
  char *path = paths[next++ % 16];
  snprintf(path, sizeof paths[0], "%s/%s", folder, name);
  return path;
}

#endif
