// Trains a small regression with AdamW, saves after every step, and resumes bit for bit after a kill.
//
//   trainer DIRECTORY STEPS
#define _POSIX_C_SOURCE 200809L
#include <ashore.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { INPUTS = 64, OUTPUTS = 16, SIZE = INPUTS * OUTPUTS, BATCH = 8 };

static float weights[SIZE], first[SIZE], second[SIZE]; // the model, and the optimizer's two moments
static uint64_t generator = 42;                        // the random generator of the batches

// Ends the program with the library's error text if a call has failed.
static void must(int32_t status) {
  if (status != ASHORE_OK) {
    fprintf(stderr, "trainer: %s\n", ashore_last_error()->text);
    exit(1);
  }
}

static float drawn(void) {
  generator ^= generator << 13;
  generator ^= generator >> 7;
  generator ^= generator << 17;
  return (float)(generator >> 40) / (1 << 24) - 0.5f;
}

// Computes the gradient of the mean squared error of a batch, whose targets follow from its inputs. Returns
// the error.
static float gradient(float *grad) {
  float loss = 0;
  memset(grad, 0, SIZE * sizeof *grad);
  for (int b = 0; b < BATCH; b++) {
    float x[INPUTS];
    for (int i = 0; i < INPUTS; i++) x[i] = drawn();
    for (int o = 0; o < OUTPUTS; o++) {
      float y = -x[o];
      for (int i = 0; i < INPUTS; i++) y += weights[o * INPUTS + i] * x[i];
      loss += y * y;
      for (int i = 0; i < INPUTS; i++) grad[o * INPUTS + i] += 2 * y * x[i] / BATCH;
    }
  }
  return loss / BATCH;
}

static void adamw(const float *grad, int64_t step) {
  const float rate = 0.01f, decay = 0.01f, b1 = 0.9f, b2 = 0.999f;
  float bias1 = 1 - powf(b1, (float)step), bias2 = 1 - powf(b2, (float)step);
  for (int i = 0; i < SIZE; i++) {
    first[i] = b1 * first[i] + (1 - b1) * grad[i];
    second[i] = b2 * second[i] + (1 - b2) * grad[i] * grad[i];
    weights[i] -= rate * (first[i] / bias1 / (sqrtf(second[i] / bias2) + 1e-8f) + decay * weights[i]);
  }
}

int main(int count, char **arguments) {
  if (count != 3) return fprintf(stderr, "usage: trainer DIRECTORY STEPS\n"), 2;
  ashore_executor *executor = NULL;
  must(ashore_open(arguments[1], "{\"arena\": 4194304, \"chunk\": 1048576, \"keep_last\": 3}", NULL, &executor));

  // The same descriptions serve saves and restores: the memory stays where it is.
  int64_t shape[2] = {OUTPUTS, INPUTS};
  ashore_tensor state[3] = {
      {.name = "model.weight", .data = weights, .shape = shape, .dims = 2, .dtype = ASHORE_F32},
      {.name = "optimizer.first", .data = first, .shape = shape, .dims = 2, .dtype = ASHORE_F32},
      {.name = "optimizer.second", .data = second, .shape = shape, .dims = 2, .dtype = ASHORE_F32},
  };

  // Resume from the newest durable step.
  int64_t step = 0;
  ashore_checkpoint *newest = NULL;
  must(ashore_latest(executor, &newest));
  if (newest) {
    must(ashore_restore(newest, state, 3));
    char *json = NULL;
    must(ashore_checkpoint_json(newest, "generator", &json));
    generator = strtoull(json, NULL, 10);
    ashore_text_free(json);
    step = ashore_checkpoint_step(newest);
    ashore_checkpoint_free(newest);
    printf("resumed at step %lld\n", (long long)step);
  }

  while (step < atoll(arguments[2])) {
    float grad[SIZE];
    float loss = gradient(grad); // only reads memory that a save may still be reading
    nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    must(ashore_fence(executor, NULL, 0)); // before the optimizer writes
    adamw(grad, ++step);

    char text[24];
    snprintf(text, sizeof text, "%llu", (unsigned long long)generator);
    ashore_value value = {"generator", text};
    ashore_save_options options = {.size = sizeof options, .values = &value, .value_count = 1};
    must(ashore_save_begin(executor, (uint64_t)step, state, 3, &options, NULL)); // returns at once
    printf("step %lld loss %.6f\n", (long long)step, loss);
    fflush(stdout);
  }
  must(ashore_close(executor, 60)); // waits for the last saves, and returns an error that no call has returned

  uint64_t digest = 14695981039346656037u;
  for (size_t i = 0; i < sizeof weights; i++) digest = (digest ^ ((unsigned char *)weights)[i]) * 1099511628211u;
  printf("step %lld weights %016llx\n", (long long)step, (unsigned long long)digest);
  return 0;
}
