// Saves: durable bytes, the fence, completion, strides, boxes, aliases, damage, closing, threads, and that
// nothing grows.
#include "check.h"
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>

static char noticed[256];
static atomic_int notices;

static void on_log(void *context, int32_t level, const char *text) {
  CHECK(context == &notices && (level == 0 || level == 1));
  if (!strstr(text, "handles of an executor")) return;
  if (atomic_fetch_add(&notices, 1) == 0) snprintf(noticed, sizeof noticed, "%s", text);
}

typedef struct {
  atomic_int calls, kind;
  char error[512];
  ashore_executor *executor;
  ashore_save *save;
} ended;

static void on_end(void *context, int32_t kind, const char *error) {
  ended *e = context;
  CHECK((error == NULL) == (kind == ASHORE_OK || kind == ASHORE_SKIPPED));
  if (error) snprintf(e->error, sizeof e->error, "%s", error);
  e->kind = kind;
  if (e->executor) {
    // It has ended, so this does not wait; a close would.
    CHECK(ashore_save_wait(e->save, 60, NULL) == kind);
    ashore_save_free(e->save);
  }
  e->calls++;
}

static int until(atomic_int *number, int wanted) {
  for (int i = 0; i < 60000 && *number < wanted; i++) usleep(1000);
  return *number;
}

// A loop that mutates its tensors right after the fence.
static void training(const char *folder) {
  ashore_executor *executor = opened(folder, SMALL);
  enum { COUNT = 300000 };
  weights *w = made("w", COUNT), *small = made("small", 3);
  for (uint64_t step = 1; step <= 5; step++) {
    OK(ashore_fence(executor, NULL, 0));
    fill(w, step);
    fill(small, step);
    ashore_tensor all[2] = {told(w), told(small)};
    ashore_save *save = NULL;
    OK(ashore_save_begin(executor, step, all, 2, NULL, &save));
    ended e = {.calls = 0};
    OK(ashore_save_then(save, on_end, &e));
    OK(ashore_fence(executor, NULL, 0));
    CHECK(w->released == (int)step && small->released == (int)step);
    OK(ashore_save_staged(save, 0));
    fill(w, 77);
    fill(small, 77);
    ashore_committed cost = {.size = sizeof cost};
    OK(ashore_save_wait(save, 60, &cost));
    CHECK(cost.bytes == 4 * (COUNT + 3) && cost.durable >= cost.staged && cost.staged > 0 && cost.size == sizeof cost);
    CHECK(until(&e.calls, 1) == 1 && e.kind == ASHORE_OK);
    // From this call, when it has ended; any number of times.
    OK(ashore_save_then(save, on_end, &e));
    CHECK(e.calls == 2);
    // An older program knows less of the struct.
    struct {
      size_t size;
      uint64_t bytes, untouched;
    } older = {16, 0, 5};
    OK(ashore_save_wait(save, 0, (ashore_committed *)&older));
    CHECK(older.bytes == cost.bytes && older.untouched == 5);
    ashore_progress progress;
    OK(ashore_save_progress(save, &progress));
    CHECK(progress.phase == ASHORE_PHASE_ENDED && progress.bytes == cost.bytes && progress.written >= cost.bytes);
    FAILS(ashore_save_cancel(save), ASHORE_CONFLICT, "too late");
    ashore_save_free(save);
    ashore_checkpoint *checkpoint = NULL;
    OK(ashore_latest(executor, &checkpoint));
    CHECK(ashore_checkpoint_step(checkpoint) == (int64_t)step);
    holds(checkpoint, "w", COUNT, step);
    holds(checkpoint, "small", 3, step);
    ashore_checkpoint_free(checkpoint);
  }
  OK(ashore_close(executor, 60));
  unmade(w);
  unmade(small);
}

// Memory that is written before the fence: the save fails, and names the tensor.
static void forgotten(const char *folder) {
  ashore_executor *executor = opened(folder, SMALL);
  enum { COUNT = 4 << 20 };
  weights *w = made("layer.0.weight", COUNT);
  ashore_tensor t = told(w);
  ashore_save *save = NULL;
  OK(ashore_save_begin(executor, 1, &t, 1, NULL, &save));
  // 16 MiB do not fit into the arena of 2 MiB: the end is copied later.
  w->data[COUNT - 1] += 1;
  FAILS(ashore_save_wait(save, 60, NULL), ASHORE_INVALID, "layer.0.weight");
  CHECK(ashore_last_error()->step == 1 && !strcmp(ashore_last_error()->tensor, "layer.0.weight"));
  ended e = {.calls = 0};
  OK(ashore_save_then(save, on_end, &e));
  CHECK(e.calls == 1 && e.kind == ASHORE_INVALID && strstr(e.error, "layer.0.weight"));
  ashore_save_free(save);
  CHECK(w->released == 1);

  // With `at_save` there is nothing to forget.
  ashore_save_options options = {.size = sizeof options, .at_save = 1};
  fill(w, 2);
  OK(ashore_save_begin(executor, 2, &t, 1, &options, &save));
  fill(w, 3);
  OK(ashore_save_wait(save, 60, NULL));
  ashore_save_free(save);
  ashore_checkpoint *checkpoint = NULL;
  OK(ashore_step(executor, 2, &checkpoint));
  holds(checkpoint, "layer.0.weight", COUNT, 2);
  ashore_checkpoint_free(checkpoint);

  // A failure that no call has returned comes out of the next one.
  OK(ashore_save_begin(executor, 2, &t, 1, NULL, NULL));
  OK(ashore_fence(executor, NULL, 0));
  int32_t status = ASHORE_OK;
  for (int i = 0; i < 600 && status == ASHORE_OK; i++) {
    usleep(100000);
    status = ashore_save_begin(executor, 3 + (uint64_t)i, &t, 1, NULL, NULL);
  }
  CHECK(status == ASHORE_CONFLICT && ashore_last_error()->step == 2);
  OK(ashore_close(executor, 60));
  unmade(w);
}

static void strides_and_boxes(const char *folder) {
  ashore_executor *executor = opened(folder, SMALL);
  // A matrix of 3 x 4, told transposed, reversed, every second column, and one element for all.
  float matrix[12], zero = 9;
  for (int i = 0; i < 12; i++) matrix[i] = (float)i;
  int64_t transposed[2] = {4, 3}, by_column[2] = {1, 4}, twelve[1] = {12}, back[1] = {-1};
  int64_t columns[2] = {3, 2}, second[2] = {4, 2}, rows[2] = {3, 4}, packed[2] = {4, 1}, none[2] = {0, 0};
  int64_t whole[2] = {6, 4}, top[2] = {0, 0}, bottom[2] = {3, 0};
  ashore_tensor all[] = {
      {.name = "t", .data = matrix, .shape = transposed, .strides = by_column, .dims = 2, .dtype = ASHORE_F32},
      {.name = "back", .data = matrix + 11, .shape = twelve, .strides = back, .dims = 1, .dtype = ASHORE_F32},
      {.name = "second", .data = matrix, .shape = columns, .strides = second, .dims = 2, .dtype = ASHORE_F32},
      {.name = "same", .data = &zero, .shape = rows, .strides = none, .dims = 2, .dtype = ASHORE_F32},
      {.name = "plain", .data = matrix, .shape = rows, .strides = packed, .dims = 2, .dtype = ASHORE_F32},
      {.name = "scalar", .data = &zero, .dtype = ASHORE_F32},
      {.name = "empty", .shape = none, .dims = 1, .dtype = ASHORE_BF16},
      {.name = "boxes", .data = matrix, .shape = rows, .dims = 2, .dtype = ASHORE_F32, .global_shape = whole, .offset = top},
      {.name = "boxes", .data = matrix, .shape = rows, .dims = 2, .dtype = ASHORE_F32, .global_shape = whole, .offset = bottom},
  };
  ashore_save *save = NULL;
  OK(ashore_save_begin(executor, 1, all, sizeof all / sizeof *all, NULL, &save));
  OK(ashore_save_wait(save, 60, NULL));
  ashore_save_free(save);
  ashore_checkpoint *checkpoint = NULL;
  OK(ashore_latest(executor, &checkpoint));
  float t[12], reversed[12], every[6], same[12], plain[12], scalar = 0, both[24], part[8], scattered[24];
  int64_t four[2] = {4, 2}, from[2] = {1, 2}, apart[2] = {6, 2};
  for (int i = 0; i < 24; i++) scattered[i] = -1;
  ashore_tensor to[] = {
      {.name = "t", .data = t, .shape = transposed, .dims = 2, .dtype = ASHORE_F32},
      {.name = "back", .data = reversed, .shape = twelve, .dims = 1, .dtype = ASHORE_F32},
      {.name = "second", .data = every, .shape = columns, .dims = 2, .dtype = ASHORE_F32},
      {.name = "same", .data = same, .shape = rows, .strides = packed, .dims = 2, .dtype = ASHORE_F32},
      {.name = "plain", .data = plain, .shape = rows, .dims = 2, .dtype = ASHORE_F32},
      {.name = "scalar", .data = &scalar, .dtype = ASHORE_F32},
      {.name = "empty", .shape = none, .dims = 1, .dtype = ASHORE_BF16},
      {.name = "boxes", .data = both, .shape = whole, .dims = 2, .dtype = ASHORE_F32},
      {.name = "boxes", .data = part, .shape = four, .dims = 2, .dtype = ASHORE_F32, .offset = from, .global_shape = whole},
      // Rows of 6 floats, columns 2 apart.
      {.name = "t", .data = scattered, .shape = transposed, .strides = apart, .dims = 2, .dtype = ASHORE_F32},
  };
  OK(ashore_restore(checkpoint, to, sizeof to / sizeof *to));
  for (int i = 0; i < 12; i++) {
    CHECK(t[i] == (float)(i / 3 + i % 3 * 4) && reversed[i] == (float)(11 - i) && same[i] == 9 && plain[i] == (float)i);
  }
  for (int i = 0; i < 6; i++) CHECK(every[i] == (float)(i / 2 * 4 + i % 2 * 2));
  for (int i = 0; i < 24; i++) CHECK(both[i] == (float)(i % 12));
  for (int i = 0; i < 8; i++) CHECK(part[i] == (float)((i / 2 + 1) % 3 * 4 + i % 2 + 2));
  for (int i = 0; i < 24; i++) CHECK(scattered[i] == (i % 2 ? -1 : t[i / 2]));
  CHECK(scalar == 9);
  // A vector is no scalar.
  all[0] = (ashore_tensor){.name = "t", .data = &scalar, .dtype = ASHORE_F32};
  FAILS(ashore_restore(checkpoint, all, 1), ASHORE_INVALID, "stored=[4, 3] asked=[]");
  ashore_checkpoint_free(checkpoint);
  OK(ashore_close(executor, 60));
}

// Tied weights: written once, restored under every name.
static void aliases(const char *folder) {
  ashore_executor *executor = opened(folder, SMALL);
  weights *w = made("embedding", 1000);
  ashore_tensor t = told(w);
  ashore_alias tied[] = {{"head", "embedding"}, {"last", "head"}};
  ashore_save_options options = {.size = sizeof options, .aliases = tied, .alias_count = 2};
  ashore_save *save = NULL;
  fill(w, 4);
  OK(ashore_save_begin(executor, 4, &t, 1, &options, &save));
  ashore_committed cost = {.size = sizeof cost};
  OK(ashore_save_wait(save, 60, &cost));
  CHECK(cost.bytes == 4000 && w->released == 1);
  ashore_save_free(save);
  ashore_checkpoint *checkpoint = NULL;
  OK(ashore_latest(executor, &checkpoint));
  holds(checkpoint, "embedding", 1000, 4);
  holds(checkpoint, "head", 1000, 4);
  holds(checkpoint, "last", 1000, 4);
  ashore_checkpoint_free(checkpoint);
  // An older program's options end before the aliases.
  options.size = offsetof(ashore_save_options, aliases);
  OK(ashore_save_begin(executor, 5, &t, 1, &options, NULL));
  OK(ashore_close(executor, 60));
  OK(ashore_checkpoint_open(under(folder, "step-00000005"), &checkpoint));
  t.name = "head";
  FAILS(ashore_restore(checkpoint, &t, 1), ASHORE_NOT_FOUND, "head");
  ashore_checkpoint_free(checkpoint);
  unmade(w);
}

// Changes the last byte of a step, which is one of its tensor.
static void damage(const char *folder, const char *step) {
  FILE *file = fopen(under(under(folder, step), "model.safetensors"), "r+");
  CHECK(file && !fseek(file, -1, SEEK_END));
  int byte = fgetc(file);
  CHECK(!fseek(file, -1, SEEK_END) && fputc(byte ^ 1, file) != EOF && !fclose(file));
}

// Damaged steps are passed over, and reported.
static void damaged(const char *folder) {
  ashore_executor *executor = opened(folder, SMALL);
  ashore_checkpoint *checkpoint = NULL;
  char *skipped = NULL;
  OK(ashore_latest_valid(executor, &checkpoint, &skipped));
  CHECK(!checkpoint && !strcmp(skipped, "[]"));
  ashore_text_free(skipped);
  weights *w = made("w", 1000);
  ashore_tensor t = told(w);
  for (uint64_t step = 1; step <= 3; step++) {
    OK(ashore_fence(executor, NULL, 0));
    fill(w, step);
    OK(ashore_save_begin(executor, step, &t, 1, NULL, NULL));
  }
  OK(ashore_close(executor, 60));
  damage(folder, "step-00000003");

  executor = opened(folder, SMALL);
  OK(ashore_latest(executor, &checkpoint));
  CHECK(ashore_checkpoint_step(checkpoint) == 3);
  FAILS(ashore_restore(checkpoint, &t, 1), ASHORE_CORRUPT, "tensor=\"w\"");
  ashore_checkpoint_free(checkpoint);
  OK(ashore_latest_valid(executor, &checkpoint, &skipped));
  CHECK(ashore_checkpoint_step(checkpoint) == 2);
  holds(checkpoint, "w", 1000, 2);
  ashore_checkpoint_free(checkpoint);
  CHECK(strstr(skipped, "\"kind\":7") && strstr(skipped, "/step-00000003\"") && strstr(skipped, "\"step\":3"));
  CHECK(strstr(skipped, "tensor=") && !strstr(skipped, "\"step\":2"));
  ashore_text_free(skipped);
  OK(ashore_latest_valid(executor, &checkpoint, NULL));
  ashore_checkpoint_free(checkpoint);

  damage(folder, "step-00000001");
  damage(folder, "step-00000002");
  skipped = w->name;
  FAILS(ashore_latest_valid(executor, &checkpoint, &skipped), ASHORE_CORRUPT, "step=3");
  CHECK(!checkpoint && !skipped && ashore_last_error()->step == 3);
  OK(ashore_close(executor, 60));
  unmade(w);
}

static void ends(const char *folder) {
  const char *settings = "{\"arena\": 524288, \"chunk\": 65536, \"overlap\": {\"queue\": 8}, \"device\": \"host\"}";
  enum { COUNT = 1 << 20 };
  weights *w = made("w", COUNT);
  ashore_tensor t = told(w);

  // Closing waits for saves under way, and logs handles that are alive.
  ashore_executor *executor = opened(folder, settings);
  ashore_save *saves[4];
  ashore_checkpoint *checkpoint = NULL;
  for (uint64_t step = 0; step < 3; step++) {
    OK(ashore_fence(executor, NULL, 0));
    OK(ashore_save_begin(executor, step, &t, 1, NULL, &saves[step]));
  }
  notices = 0;
  OK(ashore_close(executor, 60));
  CHECK(w->released == 3);
  CHECK(notices == 1 && strstr(noticed, "handles of an executor that was closed are not freed saves=3 checkpoints=0"));
  for (int i = 0; i < 3; i++) OK(ashore_save_wait(saves[i], 0, NULL));
  for (int i = 0; i < 3; i++) ashore_save_free(saves[i]);

  // Cancelled, past its deadline, skipped, and closed without time: each tensor is released once.
  executor = opened(folder, settings);
  OK(ashore_save_begin(executor, 10, &t, 1, NULL, &saves[0]));
  OK(ashore_save_cancel(saves[0]));
  FAILS(ashore_save_wait(saves[0], 60, NULL), ASHORE_CANCELLED, "cancelled step=10");
  OK(ashore_fence(executor, NULL, 0));
  ashore_save_options options = {.size = sizeof options, .deadline_seconds = 1e-6};
  OK(ashore_save_begin(executor, 11, &t, 1, &options, &saves[1]));
  FAILS(ashore_save_wait(saves[1], 60, NULL), ASHORE_DEADLINE, "step=11");
  OK(ashore_fence(executor, NULL, 0));
  ended e = {.calls = 0};
  OK(ashore_save_begin(executor, 12, &t, 1, NULL, &saves[2]));
  OK(ashore_save_then(saves[2], on_end, &e));
  int32_t closed = ashore_close(executor, 0);
  CHECK(closed == ASHORE_OK || closed == ASHORE_DEADLINE);
  CHECK(until(&e.calls, 1) == 1);
  CHECK(e.kind == ASHORE_OK || e.kind == ASHORE_CANCELLED || e.kind == ASHORE_DEADLINE);
  CHECK(ashore_save_wait(saves[2], 0, NULL) == e.kind);
  CHECK(until(&w->released, 6) == 6);
  for (int i = 0; i < 3; i++) ashore_save_free(saves[i]);

  executor = opened(folder, "{\"arena\": 524288, \"chunk\": 65536, \"overlap\": \"skip\", \"device\": \"host\"}");
  OK(ashore_save_begin(executor, 20, &t, 1, NULL, &saves[0]));
  OK(ashore_fence(executor, NULL, 0));
  OK(ashore_save_begin(executor, 21, &t, 1, NULL, &saves[1]));
  CHECK(ashore_save_wait(saves[1], 60, NULL) == ASHORE_SKIPPED);
  // A handle is freed in the callback.
  ended freeing = {.executor = executor, .save = saves[0]};
  OK(ashore_save_then(saves[0], on_end, &freeing));
  CHECK(until(&freeing.calls, 1) == 1 && freeing.kind == ASHORE_OK);
  FAILS(ashore_save_wait(saves[0], 0, NULL), ASHORE_INVALID, "no such handle");
  ashore_save_free(saves[1]);
  OK(ashore_latest(executor, &checkpoint));
  CHECK(ashore_checkpoint_step(checkpoint) == 20);
  OK(ashore_close(executor, 60));
  CHECK(notices == 3 && w->released == 8);
  holds(checkpoint, "w", COUNT, 0);
  ashore_checkpoint_free(checkpoint);
  unmade(w);
}

// Threads use and free the same handles.
static ashore_save *shared;

static void *waiting(void *nothing) {
  for (int i = 0; i < 2000; i++) {
    int32_t status = ashore_save_wait(shared, 0, NULL);
    CHECK(status == ASHORE_OK || status == ASHORE_DEADLINE || status == ASHORE_INVALID);
  }
  return nothing;
}

static void threads(const char *folder) {
  ashore_executor *executor = opened(folder, SMALL);
  weights *w = made("w", 1000);
  ashore_tensor t = told(w);
  for (uint64_t round = 0; round < 10; round++) {
    OK(ashore_save_begin(executor, round, &t, 1, NULL, &shared));
    pthread_t three[3];
    for (int i = 0; i < 3; i++) CHECK(!pthread_create(&three[i], NULL, waiting, NULL));
    sched_yield();
    ashore_save_free(shared);
    for (int i = 0; i < 3; i++) CHECK(!pthread_join(three[i], NULL));
  }
  OK(ashore_close(executor, 60));
  CHECK(w->released == 10);
  unmade(w);
}

static long of_status(const char *key) {
  char line[256];
  long found = -1;
  FILE *status = fopen("/proc/self/status", "r");
  while (fgets(line, sizeof line, status))
    if (!strncmp(line, key, strlen(key))) found = atol(line + strlen(key));
  fclose(status);
  return found;
}

static int descriptors(void) {
  int count = 0;
  DIR *open = opendir("/proc/self/fd");
  while (readdir(open)) count++;
  closedir(open);
  return count;
}

static void growth(const char *folder, int saves) {
  const char *keep = "{\"arena\": 2097152, \"chunk\": 262144, \"keep_last\": 2, \"device\": \"host\"}";
  ashore_executor *executor = opened(folder, keep);
  weights *w = made("w", 1000);
  ashore_tensor t = told(w);
  ashore_value value = {"lr", "0.5"};
  ashore_save_options options = {.size = sizeof options, .values = &value, .value_count = 1};
  long memory = 0, threads = 0;
  int files = 0;
  for (int step = 1; step <= saves; step++) {
    ashore_save *save = NULL;
    OK(ashore_save_begin(executor, (uint64_t)step, &t, 1, &options, &save));
    OK(ashore_save_wait(save, 60, NULL));
    ashore_save_free(save);
    FAILS(ashore_save_wait(save, 0, NULL), ASHORE_INVALID, "no such handle");
    ashore_checkpoint *checkpoint = NULL;
    char *json = NULL;
    OK(ashore_latest(executor, &checkpoint));
    OK(ashore_checkpoint_json(checkpoint, NULL, &json));
    ashore_text_free(json);
    ashore_checkpoint_free(checkpoint);
    if (step == saves / 4) {
      memory = of_status("VmRSS:");
      threads = of_status("Threads:");
      files = descriptors();
    }
  }
  // Tidying may still hold the descriptors of the last saves.
  for (int i = 0; i < 10000 && descriptors() > files + 4; i++) usleep(1000);
  long now = of_status("VmRSS:");
  printf("growth: %d saves, %ld kB then %ld kB, %ld threads, %d descriptors\n", saves, memory, now, threads, files);
  // A leak of one tensor's name per save would be some 100 kB; pages come and go.
  CHECK(now - memory < 2048 && of_status("Threads:") == threads && descriptors() <= files + 4);
  OK(ashore_close(executor, 60));
  CHECK(w->released == saves);
  unmade(w);
}

int main(int count, char **arguments) {
  CHECK(count >= 2);
  const char *folder = arguments[1];
  OK(ashore_log(on_log, &notices));
  training(under(folder, "training"));
  forgotten(under(folder, "forgotten"));
  strides_and_boxes(under(folder, "strides"));
  aliases(under(folder, "aliases"));
  damaged(under(folder, "damaged"));
  ends(under(folder, "ends"));
  threads(under(folder, "threads"));
  if (count > 2) growth(under(folder, "growth"), atoi(arguments[2]));
  puts("saves: ok");
  return 0;
}
