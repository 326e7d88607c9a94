// Wrong requests of every kind: each is an error with a text, and every tensor is released once.
#include "check.h"
#include <math.h>
#include <sys/stat.h>

static void quiet(void *context, int32_t level, const char *text) {
  CHECK(!context && level == 1 && strstr(text, "checkpoints=1"));
}

static void handles(const char *folder) {
  ashore_executor *executor = opened(folder, SMALL);
  weights *w = made("w", 100);
  ashore_tensor t = told(w);
  ashore_save *save = NULL, *other = NULL;
  OK(ashore_save_begin(executor, 1, &t, 1, NULL, &save));
  OK(ashore_save_wait(save, 60, NULL));
  ashore_checkpoint *checkpoint = NULL, *none = NULL;
  OK(ashore_latest(executor, &checkpoint));
  CHECK(ashore_checkpoint_step(checkpoint) == 1);
  char *json = NULL;
  ashore_progress progress;

  long foreign[4] = {0};
  void *wrong[] = {NULL, foreign, (void *)1, (void *)3, (void *)-1, (void *)((uintptr_t)save + 4096), w->data};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    const char *why = wrong[i] ? "no such handle" : "the handle is null";
    void *h = wrong[i];
    FAILS(ashore_fence(h, NULL, 0), ASHORE_INVALID, why);
    FAILS(ashore_save_begin(h, 2, &t, 1, NULL, &other), ASHORE_INVALID, why);
    FAILS(ashore_latest(h, &none), ASHORE_INVALID, why);
    FAILS(ashore_latest_valid(h, &none, &json), ASHORE_INVALID, why);
    FAILS(ashore_step(h, 1, &none), ASHORE_INVALID, why);
    FAILS(ashore_report(h, &json), ASHORE_INVALID, why);
    FAILS(ashore_save_staged(h, 0), ASHORE_INVALID, why);
    FAILS(ashore_save_wait(h, 0, NULL), ASHORE_INVALID, why);
    FAILS(ashore_save_then(h, NULL, NULL), ASHORE_INVALID, why);
    FAILS(ashore_save_progress(h, &progress), ASHORE_INVALID, why);
    FAILS(ashore_save_cancel(h), ASHORE_INVALID, why);
    FAILS(ashore_restore(h, &t, 1), ASHORE_INVALID, why);
    FAILS(ashore_checkpoint_json(h, NULL, &json), ASHORE_INVALID, why);
    FAILS(ashore_checkpoint_rank_json(h, 0, "x", &json), ASHORE_INVALID, why);
    CHECK(ashore_checkpoint_step(h) == -1);
    ashore_save_free(h);
    ashore_checkpoint_free(h);
    if (h) FAILS(ashore_close(h, 1), ASHORE_INVALID, why);
    CHECK(other == NULL && none == NULL && json == NULL);
  }
  CHECK(w->released == 1 + 7);
  OK(ashore_close(NULL, 1));

  // Of another type, and freed.
  FAILS(ashore_save_wait((ashore_save *)executor, 0, NULL), ASHORE_INVALID, "handle=save");
  FAILS(ashore_fence((ashore_executor *)save, NULL, 0), ASHORE_INVALID, "handle=executor");
  FAILS(ashore_restore((ashore_checkpoint *)save, &t, 1), ASHORE_INVALID, "handle=checkpoint");
  ashore_save_free((ashore_save *)checkpoint);
  CHECK(ashore_checkpoint_step(checkpoint) == 1);
  ashore_save_free(save);
  FAILS(ashore_save_wait(save, 0, NULL), ASHORE_INVALID, "no such handle");
  ashore_save_free(save);
  OK(ashore_save_begin(executor, 2, &t, 1, NULL, &other));
  CHECK(other != save);
  FAILS(ashore_save_wait(save, 0, NULL), ASHORE_INVALID, "no such handle");
  OK(ashore_save_wait(other, 60, NULL));
  ashore_save_free(other);

  OK(ashore_log(quiet, NULL));
  OK(ashore_close(executor, 60));
  OK(ashore_log(NULL, NULL));
  FAILS(ashore_save_begin(executor, 3, &t, 1, NULL, NULL), ASHORE_INVALID, "no such handle");
  FAILS(ashore_close(executor, 60), ASHORE_INVALID, "no such handle");
  holds(checkpoint, "w", 100, 0);
  ashore_checkpoint_free(checkpoint);
  FAILS(ashore_restore(checkpoint, &t, 1), ASHORE_INVALID, "no such handle");
  CHECK(w->released == 1 + 7 + 1 + 1);
  unmade(w);
}

// Every way in which a save is refused releases every tensor once.
static void refused(const char *folder) {
  ashore_executor *executor = opened(folder, SMALL);
  weights *w = made("w", 16);
  weights *v = made("v", 16);
  int64_t negative[1] = {-1}, two[2] = {4, 4}, strides[2] = {INT64_MAX, 1}, outside[1] = {15};
  ashore_save *save = NULL;
  int times = 0;
#define REFUSED(change, part)                                                             \
  do {                                                                                    \
    ashore_tensor all[2] = {told(v), told(w)};                                            \
    ashore_tensor *t = &all[1];                                                           \
    ashore_save_options options = {.size = sizeof options};                               \
    ashore_value value = {"value", "1"};                                                  \
    options.values = &value;                                                              \
    ashore_alias alias = {"tied", "w"};                                                   \
    options.aliases = &alias;                                                             \
    (void)t;                                                                              \
    change;                                                                               \
    FAILS(ashore_save_begin(executor, 1, all, 2, &options, &save), ASHORE_INVALID, part); \
    times++;                                                                              \
    CHECK(save == NULL && v->released == times && w->released == times);                  \
  } while (0)
#define OF_W CHECK(ashore_last_error()->tensor && !strcmp(ashore_last_error()->tensor, "w"))
  REFUSED(t->name = NULL, "a text is null text=name tensor_index=1");
  REFUSED(t->name = "", "a tensor cannot have this name");
  REFUSED(t->name = "v", "two tensors have the same name");
  REFUSED(t->name = "\xff", "not utf-8");
  REFUSED(t->dtype = 0, "there is no such dtype dtype=0");
  OF_W;
  REFUSED(t->dtype = 99, "there is no such dtype dtype=99");
  REFUSED(t->shape = NULL, "array=shape");
  OF_W;
  REFUSED(t->shape = negative, "a size is negative shape=[-1]");
  REFUSED(t->data = NULL, "the memory of a tensor is null");
  OF_W;
  REFUSED(t->capture = 9, "there is no such capture capture=9");
  REFUSED((t->shape = two, t->dims = 2, t->strides = strides), "a stride overflows");
  REFUSED((t->dtype = ASHORE_F4, t->strides = strides), "have no strides");
  REFUSED(t->offset = outside, "a box has both");
  REFUSED((t->offset = outside, t->global_shape = w->shape), "reaches beyond its tensor");
  OF_W;
  REFUSED(t->on_device = 1, "cannot read tensors of a GPU executor=host tensors=cuda:0 tensor=\"w\"");
  OF_W;
  REFUSED(options.size = 3, "sizeof(ashore_save_options)");
  REFUSED((value.json = "NaN", options.value_count = 1), "not a json text value=\"value\"");
  REFUSED((value.json = "Infinity", options.metadata = &value, options.metadata_count = 1), "metadata=\"value\"");
  REFUSED((value.json = "{\"a\": 1", options.value_count = 1), "not a json text");
  REFUSED((value.json = "[18446744073709551616]", options.value_count = 1), "integer=18446744073709551616 value=\"value\"");
  REFUSED((value.json = NULL, options.value_count = 1), "a text is null");
  REFUSED((value.name = "", options.value_count = 1), "the name is empty");
  REFUSED((options.values = NULL, options.value_count = 1), "an array is null");
  REFUSED((alias.holder = "gone", options.alias_count = 1), "an alias needs the tensor that holds its bytes");
  CHECK(!strcmp(ashore_last_error()->tensor, "tied"));
  REFUSED((alias.name = "v", options.alias_count = 1), "two tensors have the same name");
  REFUSED((alias.name = "", options.alias_count = 1), "a tensor cannot have this name");
  REFUSED((alias.name = NULL, options.alias_count = 1), "a text is null text=name");
  REFUSED((alias.holder = NULL, options.alias_count = 1), "a text is null text=holder");
  REFUSED((options.aliases = NULL, options.alias_count = 1), "an array is null array=aliases");
  REFUSED(options.deadline_seconds = NAN, "a number of seconds");
  REFUSED(options.deadline_seconds = -1, "a number of seconds");
  FAILS(ashore_save_begin(executor, 1, NULL, 3, NULL, &save), ASHORE_INVALID, "an array is null");

  // A small tensor alone is refused on a device that is not there, also where the device is to be found.
  ashore_executor *choosing = opened(under(folder, "auto"), "{\"arena\": 2097152, \"chunk\": 262144}");
  ashore_tensor t = told(w);
  t.on_device = 1;
  t.stream.device = 7;
  CHECK(ashore_save_begin(choosing, 1, &t, 1, NULL, &save) != ASHORE_OK);
  CHECK(w->released == times + 1);
  OF_W;
  OK(ashore_close(choosing, 60));

  // Nothing of that harmed the executor. Success leaves the last error alone.
  t = told(w);
  OK(ashore_save_begin(executor, 1, &t, 1, NULL, &save));
  OK(ashore_save_wait(save, 60, NULL));
  CHECK(w->released == times + 2);
  FAILS(ashore_save_staged(save, -1), ASHORE_INVALID, "seconds=-1");
  OK(ashore_save_staged(save, INFINITY));
  CHECK(strstr(ashore_last_error()->text, "seconds=-1"));

  // It exists already: the failure of another thread is in the save, and has its step.
  ashore_save *again = NULL;
  int32_t kind = ashore_save_begin(executor, 1, &t, 1, NULL, &again);
  if (kind == ASHORE_OK) kind = ashore_save_wait(again, 60, NULL);
  CHECK(kind == ASHORE_CONFLICT && ashore_last_error()->step == 1 && ashore_last_error()->rank == -1);
  CHECK(w->released == times + 3);
  ashore_save_free(again);
  ashore_save_free(save);
  OK(ashore_close(executor, 60));
  unmade(w);
  unmade(v);
}

static void settings(const char *folder) {
  ashore_executor *executor = (ashore_executor *)folder;
  FAILS(ashore_open(folder, "{\"arenna\": 1}", NULL, &executor), ASHORE_INVALID, "arenna");
  CHECK(executor == NULL);
  FAILS(ashore_open(folder, "{\"arena\": \"much\"}", NULL, &executor), ASHORE_INVALID, "much");
  FAILS(ashore_open(folder, "{\"save_timeout\": -3}", NULL, &executor), ASHORE_INVALID, "save_timeout=-3");
  FAILS(ashore_open(folder, "{\"chunk\": 5000}", NULL, &executor), ASHORE_INVALID, "chunk=5000");
  FAILS(ashore_open(folder, "{", NULL, &executor), ASHORE_INVALID, "settings");
  FAILS(ashore_open(folder, "[]", NULL, &executor), ASHORE_INVALID, "settings");
  FAILS(ashore_open(NULL, NULL, NULL, &executor), ASHORE_INVALID, "a text is null text=root");
  FAILS(ashore_open(folder, NULL, NULL, NULL), ASHORE_INVALID, "the place for a result is null");
  FAILS(ashore_open("/proc/nowhere/here", SMALL, NULL, &executor), ASHORE_NOT_FOUND, "/proc/nowhere");
  CHECK(ashore_last_error()->path && strstr(ashore_last_error()->path, "/proc/nowhere"));
  ashore_ranks ranks = {.rank = 1, .world = 3};
  FAILS(ashore_open(folder, SMALL, &ranks, &executor), ASHORE_INVALID, "several ranks need `all_gather`");
  ashore_ranks alone = {.rank = 0, .world = 1};
  OK(ashore_open(folder, "{\"arena\": 2097152, \"chunk\": 262144, \"save_timeout\": 1.5, \"device\": \"host\"}", &alone,
                 &executor));
  ashore_checkpoint *checkpoint = (ashore_checkpoint *)folder;
  OK(ashore_latest(executor, &checkpoint));
  CHECK(checkpoint == NULL);
  FAILS(ashore_latest_valid(executor, NULL, NULL), ASHORE_INVALID, "the place for a result is null");
  FAILS(ashore_step(executor, 3, &checkpoint), ASHORE_NOT_FOUND, "");
  FAILS(ashore_checkpoint_open(folder, &checkpoint), ASHORE_NOT_FOUND, "");
  char *report = NULL;
  OK(ashore_report(executor, &report));
  CHECK(strstr(report, "\"device\":\"host\"") && strstr(report, "\"arena\":2097152"));
  ashore_text_free(report);
  OK(ashore_close(executor, 60));
}

static void targets(const char *folder) {
  ashore_executor *executor = opened(folder, SMALL);
  weights *w = made("w", 12);
  ashore_tensor t = told(w);
  ashore_value values[2] = {{"lr", "0.1"}, {"rng", "[1, 18446744073709551615, -3]"}};
  ashore_value note = {"run", "{\"$of\": \"a\\u0000b\"}"};
  ashore_save_options options = {.size = sizeof options, .values = values, .value_count = 2};
  options.metadata = &note;
  options.metadata_count = 1;
  OK(ashore_save_begin(executor, 7, &t, 1, &options, NULL));
  OK(ashore_close(executor, 60));
  ashore_checkpoint *checkpoint = NULL;
  OK(ashore_checkpoint_open(under(folder, "step-00000007"), &checkpoint));
  CHECK(ashore_checkpoint_step(checkpoint) == 7);

  float to[24];
  for (int i = 0; i < 24; i++) to[i] = -1;
  int64_t other[1] = {11}, matrix[2] = {3, 4}, at[1] = {10}, three[1] = {3}, two[1] = {2};
#define NO_TARGET(change, status, part)                                          \
  do {                                                                           \
    ashore_tensor target = {.name = "w", .data = to, .shape = w->shape};         \
    target.dims = 1;                                                             \
    target.dtype = ASHORE_F32;                                                   \
    change;                                                                      \
    FAILS(ashore_restore(checkpoint, &target, 1), status, part);                 \
    for (int i = 0; i < 24; i++) CHECK(to[i] == -1);                             \
  } while (0)
  NO_TARGET(target.name = "x", ASHORE_NOT_FOUND, "tensor=\"x\"");
  NO_TARGET(target.dtype = ASHORE_I32, ASHORE_INVALID, "another dtype stored=F32 asked=I32 tensor=\"w\"");
  CHECK(ashore_last_error()->step == 7 && !strcmp(ashore_last_error()->tensor, "w"));
  NO_TARGET(target.shape = other, ASHORE_INVALID, "another shape stored=[12] asked=[11]");
  NO_TARGET((target.shape = matrix, target.dims = 2), ASHORE_INVALID, "stored=[12] asked=[3, 4]");
  NO_TARGET((target.shape = NULL, target.dims = 0), ASHORE_INVALID, "stored=[12] asked=[]");
  NO_TARGET((target.shape = three, target.offset = at), ASHORE_INVALID, "reaches beyond");
  NO_TARGET((target.shape = two, target.offset = at, target.global_shape = other), ASHORE_INVALID, "asked=[11]");
  NO_TARGET(target.data = NULL, ASHORE_INVALID, "the memory of a tensor is null");
  ashore_tensor both[2] = {{.name = "w", .data = to, .shape = w->shape, .dims = 1, .dtype = ASHORE_F32}};
  both[1] = both[0];
  both[1].data = to + 11;
  FAILS(ashore_restore(checkpoint, both, 2), ASHORE_INVALID, "two targets are in the same memory");
  CHECK(to[0] == -1);

  // A box, and the whole twice.
  ashore_tensor box = {.name = "w", .data = to, .shape = two, .dims = 1, .dtype = ASHORE_F32, .offset = at};
  OK(ashore_restore(checkpoint, &box, 1));
  CHECK(to[0] == value_of(0, 10) && to[1] == value_of(0, 11) && to[2] == -1);
  both[1].data = to + 12;
  OK(ashore_restore(checkpoint, both, 2));
  for (int i = 0; i < 24; i++) CHECK(to[i] == value_of(0, (size_t)i % 12));

  char *json = NULL;
  OK(ashore_checkpoint_json(checkpoint, "rng", &json));
  CHECK(!strcmp(json, "[1,18446744073709551615,-3]"));
  ashore_text_free(json);
  OK(ashore_checkpoint_rank_json(checkpoint, 0, "lr", &json));
  CHECK(!strcmp(json, "0.1"));
  ashore_text_free(json);
  FAILS(ashore_checkpoint_json(checkpoint, "gone", &json), ASHORE_NOT_FOUND, "value=\"gone\"");
  CHECK(json == NULL);
  FAILS(ashore_checkpoint_rank_json(checkpoint, 5, "lr", &json), ASHORE_INVALID, "");
  OK(ashore_checkpoint_json(checkpoint, NULL, &json));
  CHECK(strstr(json, "{\"bytes\":48,\"dtype\":\"F32\",\"name\":\"w\",\"shape\":[12]}"));
  CHECK(strstr(json, "\"lr\":0.1") && strstr(json, "\"run\":{\"$of\":\"a\\u0000b\"}") && strstr(json, "\"ranks\":1"));
  ashore_text_free(json);
  ashore_text_free(NULL);
  ashore_checkpoint_free(checkpoint);
  ashore_checkpoint_free(NULL);
  ashore_save_free(NULL);
  unmade(w);
}

int main(int count, char **arguments) {
  CHECK(count == 2 && ashore_abi() == ASHORE_ABI && strlen(ashore_version()) >= 5);
  CHECK(ashore_last_error() && ashore_last_error()->kind == ASHORE_OK && !ashore_last_error()->text[0]);
  const char *folder = arguments[1];
  handles(under(folder, "handles"));
  refused(under(folder, "refused"));
  settings(under(folder, "settings"));
  targets(under(folder, "targets"));
  puts("hostile: ok");
  return 0;
}
