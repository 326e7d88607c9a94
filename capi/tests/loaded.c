// Loads two copies of the library at run time, and closes them with threads alive.
//
// Copies know nothing of each other's handles. Arguments: a folder, the library, a copy of it.
#define _GNU_SOURCE
#include <ashore.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(holds) \
  if (!(holds)) fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #holds), exit(1)

typedef struct {
  void *library;
  int32_t (*open)(const char *, const char *, const ashore_ranks *, ashore_executor **);
  int32_t (*close)(ashore_executor *, double);
  int32_t (*fence)(ashore_executor *, const ashore_stream *, size_t);
  int32_t (*save)(ashore_executor *, uint64_t, const ashore_tensor *, size_t, const ashore_save_options *, ashore_save **);
  int32_t (*wait)(ashore_save *, double, ashore_committed *);
  uint32_t (*abi)(void);
} loaded;

static loaded load(const char *path) {
  loaded l = {.library = dlopen(path, RTLD_NOW | RTLD_LOCAL)};
  if (!l.library) fprintf(stderr, "%s\n", dlerror()), exit(1);
#define FIND(member, name) *(void **)&l.member = dlsym(l.library, name)
  FIND(open, "ashore_open");
  FIND(close, "ashore_close");
  FIND(fence, "ashore_fence");
  FIND(save, "ashore_save_begin");
  FIND(wait, "ashore_save_wait");
  FIND(abi, "ashore_abi");
  CHECK(l.open && l.close && l.fence && l.save && l.wait && l.abi);
  CHECK(l.abi() == ASHORE_ABI);
  return l;
}

static const char *settings = "{\"arena\": 2097152, \"chunk\": 262144, \"device\": \"host\"}";
static const char *folder, *path;

static void *used_and_closed(void *nothing) {
  loaded l = load(path);
  ashore_executor *executor = NULL;
  CHECK(l.open(folder, settings, NULL, &executor) == ASHORE_OK);
  CHECK(l.close(executor, 60) == ASHORE_OK);
  CHECK(!dlclose(l.library));
  return nothing;
}

int main(int count, char **arguments) {
  CHECK(count == 4);
  folder = arguments[1];
  path = arguments[2];
  loaded one = load(path), two = load(arguments[3]);
  CHECK(one.open != two.open);
  ashore_executor *of_one = NULL, *of_two = NULL;
  CHECK(one.open(folder, settings, NULL, &of_one) == ASHORE_OK);
  CHECK(two.open(folder, settings, NULL, &of_two) == ASHORE_OK);
  CHECK(two.fence(of_one, NULL, 0) == ASHORE_INVALID && one.fence(of_two, NULL, 0) == ASHORE_INVALID);
  CHECK(one.close(of_two, 1) == ASHORE_INVALID && two.close(of_one, 1) == ASHORE_INVALID);
  float data[4] = {1, 2, 3, 4};
  int64_t shape[1] = {4};
  ashore_tensor t = {.name = "w", .data = data, .shape = shape, .dims = 1, .dtype = ASHORE_F32};
  ashore_save *save = NULL;
  CHECK(one.save(of_one, 1, &t, 1, NULL, &save) == ASHORE_OK);
  CHECK(two.wait(save, 1, NULL) == ASHORE_INVALID);
  CHECK(one.wait(save, 60, NULL) == ASHORE_OK);
  CHECK(two.save(of_two, 2, &t, 1, NULL, &save) == ASHORE_OK);
  CHECK(two.wait(save, 60, NULL) == ASHORE_OK);

  // Closed with an executor alive, and from a thread that has ended.
  CHECK(!dlclose(two.library));
  CHECK(one.close(of_one, 60) == ASHORE_OK);
  pthread_t thread;
  for (int i = 0; i < 3; i++) CHECK(!pthread_create(&thread, NULL, used_and_closed, NULL) && !pthread_join(thread, NULL));
  CHECK(!dlclose(one.library));
  // It stays mapped: its threads, its fork handler and what it left in the C library still have their code.
  CHECK(dlopen(path, RTLD_NOW | RTLD_NOLOAD) && dlopen(arguments[3], RTLD_NOW | RTLD_NOLOAD));
  pid_t child = fork();
  if (child == 0) _exit(0);
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  puts("loaded: ok");
  return 0;
}
