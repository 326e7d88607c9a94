// Several processes: forks in the middle of a save and of other calls, kill -9, four ranks over pipes.
#include "check.h"
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

static int exit_of(pid_t child) {
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void in_a_child(ashore_executor *executor, ashore_save *save, const char *folder) {
  alarm(60);
  FAILS(ashore_fence(executor, NULL, 0), ASHORE_INVALID, "fork");
  FAILS(ashore_save_begin(executor, 9, NULL, 0, NULL, NULL), ASHORE_INVALID, "fork");
  FAILS(ashore_save_wait(save, 1, NULL), ASHORE_INVALID, "fork");
  ashore_save_free(save);
  FAILS(ashore_close(executor, 1), ASHORE_INVALID, "fork");
  FAILS(ashore_fence(executor, NULL, 0), ASHORE_INVALID, "no such handle");
  ashore_executor *own = opened(folder, SMALL);
  weights *w = made("w", 1000);
  ashore_tensor t = told(w);
  OK(ashore_save_begin(own, 1, &t, 1, NULL, NULL));
  OK(ashore_close(own, 60));
  CHECK(w->released == 1);
  unmade(w);
  _exit(0);
}

static void fork_in_a_save(const char *folder, const char *of_child) {
  ashore_executor *executor =
      opened(folder, "{\"arena\": 131072, \"chunk\": 65536, \"writers\": 1, \"device\": \"host\"}");
  enum { COUNT = 8 << 20 };
  weights *w = made("w", COUNT);
  ashore_tensor t = told(w);
  ashore_save *save = NULL;
  OK(ashore_save_begin(executor, 1, &t, 1, NULL, &save));
  ashore_progress progress;
  OK(ashore_save_progress(save, &progress));
  pid_t child = fork();
  if (child == 0) in_a_child(executor, save, of_child);
  CHECK(progress.phase == ASHORE_PHASE_WAITING || progress.phase == ASHORE_PHASE_STAGING);
  CHECK(exit_of(child) == 0);
  OK(ashore_save_wait(save, 60, NULL));
  CHECK(w->released == 1);
  ashore_save_free(save);
  ashore_checkpoint *checkpoint = NULL;
  OK(ashore_latest(executor, &checkpoint));
  holds(checkpoint, "w", COUNT, 0);
  ashore_checkpoint_free(checkpoint);
  OK(ashore_close(executor, 60));
  unmade(w);
}

static atomic_bool stop;

// Holds the table's lock as often as it can.
static void *using(void *executor) {
  while (!stop) OK(ashore_fence(executor, NULL, 0));
  return NULL;
}

static void fork_while_handles_are_used(const char *folder) {
  ashore_executor *executor = opened(folder, SMALL);
  pthread_t two[2];
  for (int i = 0; i < 2; i++) CHECK(!pthread_create(&two[i], NULL, using, executor));
  for (int i = 0; i < 100; i++) {
    pid_t child = fork();
    if (child == 0) {
      alarm(20);
      FAILS(ashore_fence(executor, NULL, 0), ASHORE_INVALID, "fork");
      _exit(0);
    }
    CHECK(exit_of(child) == 0);
  }
  stop = true;
  for (int i = 0; i < 2; i++) CHECK(!pthread_join(two[i], NULL));
  OK(ashore_close(executor, 60));
}

// Saves from where the newest step ends, until it is killed; checks first what it finds.
static void trainer(const char *folder, int report) {
  ashore_executor *executor = opened(folder, SMALL);
  enum { COUNT = 100000 };
  ashore_checkpoint *newest = NULL;
  OK(ashore_latest(executor, &newest));
  int64_t step = 0;
  if (newest) {
    step = ashore_checkpoint_step(newest);
    holds(newest, "w", COUNT, (uint64_t)step);
    ashore_checkpoint_free(newest);
  }
  weights *w = made("w", COUNT);
  for (;;) {
    step++;
    OK(ashore_fence(executor, NULL, 0));
    fill(w, (uint64_t)step);
    ashore_tensor t = told(w);
    ashore_save *save = NULL;
    OK(ashore_save_begin(executor, (uint64_t)step, &t, 1, NULL, &save));
    if (step % 3 == 0) {
      OK(ashore_save_wait(save, 60, NULL));
      CHECK(write(report, &step, sizeof step) == sizeof step);
    }
    ashore_save_free(save);
  }
}

static void killed(const char *folder) {
  int64_t durable = 0;
  for (int round = 0; round < 8; round++) {
    int ends[2];
    CHECK(!pipe(ends));
    pid_t child = fork();
    if (child == 0) {
      close(ends[0]);
      trainer(folder, ends[1]);
    }
    close(ends[1]);
    int64_t step = 0;
    int wanted = 1 + round % 3;
    while (wanted-- && read(ends[0], &step, sizeof step) == sizeof step) durable = step;
    usleep((useconds_t)(round * 1700));
    CHECK(!kill(child, SIGKILL) && exit_of(child) == 128 + SIGKILL);
    while (read(ends[0], &step, sizeof step) == sizeof step) durable = step;
    close(ends[0]);
    ashore_executor *executor = opened(folder, SMALL);
    ashore_checkpoint *newest = NULL;
    OK(ashore_latest(executor, &newest));
    CHECK(ashore_checkpoint_step(newest) >= durable);
    holds(newest, "w", 100000, (uint64_t)ashore_checkpoint_step(newest));
    ashore_checkpoint_free(newest);
    OK(ashore_close(executor, 60));
  }
  CHECK(durable >= 8);
}

// An all-gather over pipes: rank 0 collects and sends to all.
enum { RANKS = 4 };
static int up[RANKS][2], down[RANKS][2];
static atomic_int groups_released;

static int passed(int fd, void *at, size_t bytes, bool out) {
  for (size_t done = 0; done < bytes;) {
    ssize_t n = out ? write(fd, (char *)at + done, bytes - done) : read(fd, (char *)at + done, bytes - done);
    if (n <= 0) return 2;
    done += (size_t)n;
  }
  return 0;
}

static int32_t all_gather(void *context, const void *mine, size_t bytes, void *all, double seconds) {
  int rank = *(int *)context;
  if (!(seconds > 0)) return 1;
  if (rank) return passed(up[rank][1], (void *)mine, bytes, true) || passed(down[rank][0], all, bytes * RANKS, false);
  memcpy(all, mine, bytes);
  for (int from = 1; from < RANKS; from++)
    if (passed(up[from][0], (char *)all + (size_t)from * bytes, bytes, false)) return 2;
  for (int to = 1; to < RANKS; to++)
    if (passed(down[to][1], all, bytes * RANKS, true)) return 2;
  return 0;
}

static void no_group(void *context) {
  (void)context;
  atomic_fetch_add(&groups_released, 1);
}

static void rank_of(int rank, const char *folder) {
  alarm(120);
  ashore_ranks ranks = {.rank = (uint32_t)rank, .world = RANKS, .local_rank = (uint32_t)rank, .context = &rank};
  ranks.all_gather = all_gather;
  ranks.release = no_group;
  ranks.run = "run-7";
  ashore_executor *executor = NULL;
  OK(ashore_open(folder, SMALL, &ranks, &executor));
  // Each rank has rows of a matrix of 10 x 3; all have the same bias; rank 2 has a tensor alone.
  int64_t begin = rank * 3, rows = rank == 3 ? 1 : 3, shape[2] = {rows, 3}, global[2] = {10, 3}, at[2] = {begin, 0};
  float matrix[9], bias[5];
  for (int i = 0; i < 9; i++) matrix[i] = (float)(begin * 3 + i);
  for (int i = 0; i < 5; i++) bias[i] = (float)i;
  int64_t five[1] = {5};
  ashore_tensor all[3] = {
      {.name = "m", .data = matrix, .shape = shape, .dims = 2, .dtype = ASHORE_F32, .global_shape = global, .offset = at},
      {.name = "bias", .data = bias, .shape = five, .dims = 1, .dtype = ASHORE_F32},
      {.name = "only", .data = bias, .shape = five, .dims = 1, .dtype = ASHORE_F32},
  };
  char mine[16];
  snprintf(mine, sizeof mine, "%d", rank * 100);
  ashore_value shared = {"lr", "0.25"}, own = {"sample", mine};
  ashore_save_options options = {.size = sizeof options, .values = &shared, .value_count = 1};
  options.rank_values = &own;
  options.rank_value_count = 1;
  for (uint64_t step = 1; step <= 3; step++) {
    ashore_save *save = NULL;
    OK(ashore_save_begin(executor, step, all, rank == 2 ? 3 : 2, &options, &save));
    OK(ashore_save_wait(save, 60, NULL));
    OK(ashore_fence(executor, NULL, 0));
    ashore_save_free(save);
  }
  ashore_checkpoint *checkpoint = NULL;
  OK(ashore_latest(executor, &checkpoint));
  CHECK(ashore_checkpoint_step(checkpoint) == 3);
  // Restored in other boxes: two rows of each.
  float two[6], whole[5];
  int64_t other[2] = {2, 3}, from[2] = {rank * 2 + 1, 0};
  ashore_tensor to[2] = {
      {.name = "m", .data = two, .shape = other, .dims = 2, .dtype = ASHORE_F32, .offset = from, .global_shape = global},
      {.name = "only", .data = whole, .shape = five, .dims = 1, .dtype = ASHORE_F32},
  };
  OK(ashore_restore(checkpoint, to, 2));
  for (int i = 0; i < 6; i++) CHECK(two[i] == (float)(from[0] * 3 + i));
  CHECK(whole[4] == 4);
  char *json = NULL;
  OK(ashore_checkpoint_rank_json(checkpoint, (uint32_t)rank, "sample", &json));
  CHECK(!strcmp(json, mine));
  ashore_text_free(json);
  ashore_checkpoint_free(checkpoint);
  OK(ashore_close(executor, 60));
  for (int i = 0; i < 10000 && groups_released == 0; i++) usleep(1000);
  CHECK(groups_released == 1);
  _exit(0);
}

static void ranks(const char *folder) {
  for (int i = 0; i < RANKS; i++) CHECK(!pipe(up[i]) && !pipe(down[i]));
  pid_t children[RANKS];
  for (int rank = 0; rank < RANKS; rank++) {
    children[rank] = fork();
    if (children[rank] == 0) rank_of(rank, folder);
  }
  for (int rank = 0; rank < RANKS; rank++) CHECK(exit_of(children[rank]) == 0);
}

static int32_t fails(void *context, const void *mine, size_t bytes, void *all, double seconds) {
  (void)mine, (void)bytes, (void)all, (void)seconds;
  return *(int *)context;
}

static void ranks_that_fail(const char *folder) {
  ashore_executor *executor = NULL;
  for (int code = 1; code <= 2; code++) {
    ashore_ranks group = {.rank = 0, .world = 2, .all_gather = fails, .release = no_group, .context = &code};
    FAILS(ashore_open(folder, SMALL, &group, &executor), code == 1 ? ASHORE_DEADLINE : ASHORE_UNAVAILABLE, "all-gather");
    for (int i = 0; i < 10000 && groups_released < 2 * code - 1; i++) usleep(1000);
    CHECK(executor == NULL && groups_released == 2 * code - 1);
    group.rank = 5;
    FAILS(ashore_open(folder, SMALL, &group, &executor), ASHORE_INVALID, "rank");
    for (int i = 0; i < 10000 && groups_released < 2 * code; i++) usleep(1000);
    CHECK(executor == NULL && groups_released == 2 * code);
  }
}

int main(int count, char **arguments) {
  CHECK(count == 2);
  const char *folder = arguments[1];
  // Before the library has threads in this process.
  killed(under(folder, "killed"));
  ranks(under(folder, "ranks"));
  ranks_that_fail(under(folder, "fails"));
  fork_in_a_save(under(folder, "forked"), under(folder, "child"));
  fork_while_handles_are_used(under(folder, "used"));
  puts("processes: ok");
  return 0;
}
