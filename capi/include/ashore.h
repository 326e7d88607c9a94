// ashore: saves the state of training programs without stopping them. Generated from capi/src by cbindgen; do
// not edit. docs/c.md is the page for users; link with pkg-config (ashore) or find_package(ashore).
//
// Every function may be called from any thread. Texts are utf-8 and end with a zero byte; arrays hold as many
// elements as are stated. What is given to a function is read within the call, except the memory of tensors.
// A handle that is null, freed, of another type or of another copy of the library is ASHORE_INVALID, and is
// never read. Functions that return int32_t return an ashore_status.
//
// Callbacks come from any thread and must return soon. They must not throw: an exception aborts the process.
// In a forked child every handle of the parent is ASHORE_INVALID to a call that acts; open an executor there.

#ifndef ASHORE_H
#define ASHORE_H

#include <stddef.h>
#include <stdint.h>

// The number of this ABI. It is raised when callers must be compiled again. Otherwise, only functions are
// added, and members at the end of structs that begin with `size`.
#define ASHORE_ABI 1

// The result of a call. `ashore_last_error` has the text of a failure.
enum ashore_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // The call succeeded.
  ASHORE_OK = 0,
  // The request is wrong: change the call, the setting or the input.
  ASHORE_INVALID = 1,
  // The step, tensor, value or file does not exist.
  ASHORE_NOT_FOUND = 2,
  // The step exists already, or it is too late to cancel.
  ASHORE_CONFLICT = 3,
  // Too much is in flight: the same call can succeed later.
  ASHORE_BUSY = 4,
  // The storage or the quota is full. Older steps are intact.
  ASHORE_NO_SPACE = 5,
  // The storage, the device or another rank cannot be reached.
  ASHORE_UNAVAILABLE = 6,
  // The stored bytes differ from the bytes that were written.
  ASHORE_CORRUPT = 7,
  // The GPU failed. Saves that were staged still become durable.
  ASHORE_DEVICE = 8,
  // The save was cancelled, or its executor was closed before it was durable.
  ASHORE_CANCELLED = 9,
  // The deadline passed before the operation ended.
  ASHORE_DEADLINE = 10,
  // The step may or may not survive a crash: its publish began, and the outcome is unknown.
  ASHORE_INDETERMINATE = 11,
  // A bug in the library.
  ASHORE_INTERNAL = 12,
  // Not a failure: the save was not begun, because another save was under way and the setting `overlap` is
  // "skip" or "latest".
  ASHORE_SKIPPED = 100,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ashore_status ashore_status;
#else
typedef int32_t ashore_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Element types, by the names of safetensors. Their numbers never change.
enum ashore_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // A boolean, in a byte.
  ASHORE_BOOL = 1,
  // An unsigned byte.
  ASHORE_U8 = 2,
  // A signed byte.
  ASHORE_I8 = 3,
  // A signed integer of 16 bits.
  ASHORE_I16 = 4,
  // An unsigned integer of 16 bits.
  ASHORE_U16 = 5,
  // IEEE half precision.
  ASHORE_F16 = 6,
  // A brain float.
  ASHORE_BF16 = 7,
  // A signed integer of 32 bits.
  ASHORE_I32 = 8,
  // An unsigned integer of 32 bits.
  ASHORE_U32 = 9,
  // A float of 32 bits.
  ASHORE_F32 = 10,
  // A float of 64 bits.
  ASHORE_F64 = 11,
  // A signed integer of 64 bits.
  ASHORE_I64 = 12,
  // An unsigned integer of 64 bits.
  ASHORE_U64 = 13,
  // FP8, 4 bits of exponent.
  ASHORE_F8_E4M3 = 14,
  // FP8, 5 bits of exponent.
  ASHORE_F8_E5M2 = 15,
  // A scale of the MX formats.
  ASHORE_F8_E8M0 = 16,
  // A complex number of two F32.
  ASHORE_C64 = 17,
  // FP8 without infinities and a negative zero.
  ASHORE_F8_E4M3FNUZ = 18,
  // FP8 without infinities and a negative zero.
  ASHORE_F8_E5M2FNUZ = 19,
  // MXFP4: two elements to a byte, the last dimension even.
  ASHORE_F4 = 20,
  // MXFP6, 2 bits of exponent.
  ASHORE_F6_E2M3 = 21,
  // MXFP6, 3 bits of exponent.
  ASHORE_F6_E3M2 = 22,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ashore_dtype ashore_dtype;
#else
typedef int32_t ashore_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// When a save copies the bytes of a tensor.
enum ashore_capture
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Small tensors within the call, other tensors at the fence at the latest.
  ASHORE_CAPTURE_DEFAULT = 0,
  // Within the call: for step counters and statistics, which the program writes before the fence.
  ASHORE_CAPTURE_AT_SAVE = 1,
  // At the fence at the latest.
  ASHORE_CAPTURE_AT_FENCE = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ashore_capture ashore_capture;
#else
typedef uint32_t ashore_capture;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// The phase of a save.
enum ashore_phase
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // The save waits for earlier saves.
  ASHORE_PHASE_WAITING = 0,
  // Tensors are read.
  ASHORE_PHASE_STAGING = 1,
  // Every byte is copied, and bytes are being written.
  ASHORE_PHASE_WRITING = 2,
  // For one of several ranks: its files are durable, and rank 0 decides.
  ASHORE_PHASE_PROMISED = 3,
  // The step is being published.
  ASHORE_PHASE_PUBLISHING = 4,
  // The save has ended, with or without an error.
  ASHORE_PHASE_ENDED = 5,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ashore_phase ashore_phase;
#else
typedef int32_t ashore_phase;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// A step that can be read. Valid until `ashore_checkpoint_free`.
typedef struct ashore_checkpoint ashore_checkpoint;

// Saves the state of one program under one root. Valid from `ashore_open` until `ashore_close`.
typedef struct ashore_executor ashore_executor;

// A save that is under way or has ended. Valid from `ashore_save_begin` until `ashore_save_free`.
typedef struct ashore_save ashore_save;

// A failure of a call. `text` is never null. The other members are null, or -1, if the failure has none.
typedef struct {
  // An `ashore_status`.
  int32_t kind;
  // The rank on which the failure happened.
  int32_t rank;
  // The step that was being saved or restored.
  int64_t step;
  // What was attempted and what was wrong, with its cause.
  const char *text;
  // The name of the tensor.
  const char *tensor;
  // The file or directory.
  const char *path;
} ashore_error;

// The program's own group of ranks. Every rank opens an executor over the same root and begins the same
// saves in the same order; rank 0 decides, and its values and metadata are kept.
//
// A process that shall save alone, although a launcher has started it as one of several, sets `world` to 1
// and leaves `all_gather` null.
typedef struct {
  // The rank of this process, from 0.
  uint32_t rank;
  // The number of ranks.
  uint32_t world;
  // The number of this process among the ranks of its host, which chooses its GPU.
  uint32_t local_rank;
  // Puts `bytes` bytes from each rank, in the order of ranks, into `all`. `bytes` is the same on all
  // ranks. Returns 0; 1 if `seconds` passed first; or 2 for another failure, after which the group is not
  // used until the ranks open their executors again. One thread of the library makes these calls, one at a
  // time, in the same order on each rank.
  int32_t (*all_gather)(void *context, const void *mine, size_t bytes, void *all, double seconds);
  // Called once when `all_gather` will not be called any more, also after a failure of `ashore_open`. May
  // be null.
  void (*release)(void *context);
  // Passed to both functions.
  void *context;
  // The identity of the run, the same on all its ranks, which keeps the ranks of two jobs apart. Null: the
  // identity that the launcher gives, if it gives one.
  const char *run;
} ashore_ranks;

// A stream of a GPU.
typedef struct {
  // A CUstream or cudaStream_t of the device's primary context; null is the legacy default stream.
  void *handle;
  // The device, by its ordinal in this process.
  uint32_t device;
} ashore_stream;

// A tensor to save, or memory to restore into. Zero is the default of every member but `name` and `dtype`.
typedef struct {
  // The name of the tensor: not empty, utf-8.
  const char *name;
  // The address of the element with all indices 0: in host memory, or on the device if `on_device` is set.
  void *data;
  // The shape: `dims` numbers, like all arrays here. Null for a scalar.
  const int64_t *shape;
  // The distance between neighbours in each dimension, in ELEMENTS, as in DLPack and torch. Null: packed,
  // row-major. A tensor with strides is saved packed.
  const int64_t *strides;
  // The shape of the whole tensor, if this is a box of it. Null: this is the whole tensor. The ranks of a
  // job together save each element once; if several ranks have the same box, one of them writes it. A
  // restore compares this shape with the saved shape.
  const int64_t *global_shape;
  // The position in the whole tensor at which the box begins. In a save, null if `global_shape` is null. A
  // restore may set it without `global_shape`.
  const int64_t *offset;
  // The number of dimensions.
  uint32_t dims;
  // An `ashore_dtype`.
  int32_t dtype;
  // 0 for host memory, otherwise device memory.
  uint32_t on_device;
  // An `ashore_capture`. Not allowed for a box or in a restore.
  uint32_t capture;
  // The stream that wrote `data`; a restore writes in this stream. Only for device memory.
  ashore_stream stream;
  // Called once for each tensor of a save when nothing will read the tensor any more, whatever the outcome
  // of the save. Any thread may call it, also within the call of the save. Null: nothing is to be
  // released. A restore does not call it.
  void (*release)(void *context);
  // Passed to `release`.
  void *context;
} ashore_tensor;

// A named value.
typedef struct {
  // The name of the value: not empty, utf-8.
  const char *name;
  // One JSON text. 64-bit integers and doubles are kept exactly. Longer integers are refused. NaN is not
  // JSON, and is refused, too.
  const char *json;
} ashore_value;

// Another name of a tensor of the same save, such as the name of a tied weight. The bytes are written once,
// and a restore finds them under both names. Dtype, shape and boxes are those of the holder.
typedef struct {
  // The alias: not empty, utf-8, and not the name of a tensor.
  const char *name;
  // The name of the tensor that holds the bytes, or of an earlier alias of that tensor.
  const char *holder;
} ashore_alias;

// Puts a tensor into files of its own kind, which later steps share as long as their bytes stay the same:
// later steps clone or link these files instead of writing them.
typedef struct {
  // The name of the tensor, or an alias of it.
  const char *name;
  // Null: the tensor is frozen, which means it is not expected to change. Otherwise the group with which
  // the tensor changes. Each group has files of its own.
  const char *key;
} ashore_group;

// Options of one save. Zero is the default of every member but `size`.
typedef struct {
  // sizeof(ashore_save_options)
  size_t size;
  // Not 0: replace the step if it exists.
  uint32_t overwrite;
  // Not 0: capture every tensor within the call, for programs that cannot call a fence.
  uint32_t at_save;
  // The save fails if it is not durable this many seconds after the call. 0: the setting `save_timeout`
  // applies.
  double deadline_seconds;
  // Values in addition to the tensors: learning rates, states of random generators, positions in data.
  const ashore_value *values;
  // Notes of the user, which a restore does not need.
  const ashore_value *metadata;
  size_t value_count;
  size_t metadata_count;
  // Values of this rank alone. If one process saves, the same as `values`.
  const ashore_value *rank_values;
  size_t rank_value_count;
  // More names of tensors.
  const ashore_alias *aliases;
  size_t alias_count;
  // Tensors that are frozen, or in groups.
  const ashore_group *groups;
  size_t group_count;
} ashore_save_options;

// The cost of a durable save. Times are seconds since the call of the save.
typedef struct {
  // sizeof(ashore_committed), set by the caller. Members beyond it are not written.
  size_t size;
  // Bytes of tensors.
  uint64_t bytes;
  // How long the call and fences blocked their callers.
  double blocked;
  // When the last read of the program's memory ended.
  double staged;
  // When the step became durable.
  double durable;
  // Time from the last byte written until the step was durable: fsyncs, and the publish.
  double tail;
  // How many small tensors the call did not capture, because the budget was used up.
  uint64_t over_budget;
  // How many chunks a fence has copied on the GPU.
  uint64_t late_chunks;
  // Bytes of tensor files that were written.
  uint64_t written_bytes;
  // Bytes of tensor files that are clones of files of an older step.
  uint64_t cloned_bytes;
  // Bytes of tensor files that are files of an older step, under a second name.
  uint64_t linked_bytes;
  // How many unchanged files were written, because the file system refused to clone or link them.
  uint64_t refused_files;
} ashore_committed;

// The progress of a save, in bytes.
typedef struct {
  // Bytes of tensors to save.
  uint64_t bytes;
  // Bytes copied so far, including file headers.
  uint64_t staged;
  // Bytes written so far, including file headers.
  uint64_t written;
  // An `ashore_phase`.
  int32_t phase;
} ashore_progress;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Returns the ASHORE_ABI of the library that was loaded.
uint32_t ashore_abi(void);

// Returns the version of the library that was loaded, such as "0.1.0".
const char *ashore_version(void);

// Returns the last failure in this thread, never null. It is valid until the next failure in this thread;
// success and the *_free functions do not change it. Call this function in a statement of its own: C may
// evaluate the arguments of a call from the right, and would read the failure before the call that fails.
const ashore_error *ashore_last_error(void);

// Opens an executor over the directory `root`, creates the directory if it is missing, and sweeps dead
// attempts of earlier processes. `settings` is a JSON object of the members of `Settings` in the Rust
// library, with times in seconds, such as {"arena": 268435456, "keep_last": 3, "save_timeout": 600}; null is
// {}. Its member `tiers` lists the roots behind this one, nearest first, to which durable steps are copied:
// [{"root": "s3://bucket/run", "name": "store", "keep_last": 20}]. `ranks` is null for one rank, and is read
// only within the call. `executor` is null after a failure. Fails with ASHORE_INVALID if a launcher has
// started several ranks and `ranks` is null.
int32_t ashore_open(const char *root,
                    const char *settings,
                    const ashore_ranks *ranks,
                    ashore_executor **executor);

// Accepts no more saves, waits at most `seconds` for the saves under way, and ends the threads. Afterwards
// the handle is free, even if the call fails; a close in the `done` of `ashore_save_then` is refused, and
// frees nothing. Does nothing for null. Returns the first error of a save that no call has returned, or
// ASHORE_DEADLINE if saves had not ended: these saves have failed. Handles of the executor's saves and
// checkpoints stay valid, and checkpoints can still be read. The number of such handles is logged.
int32_t ashore_close(ashore_executor *executor, double seconds);

// Returns when nothing will read the tensors of all saves so far any more: then the program may write them.
// With `count` streams, the call makes these streams wait on the GPU instead, and returns as soon as that
// wait is queued: then the program may write GPU tensors in these streams, and host tensors at once. Takes
// some nanoseconds if no save is reading.
int32_t ashore_fence(ashore_executor *executor, const ashore_stream *streams, size_t count);

// Opens the newest durable step under the root. If there is none, `checkpoint` is null and the status
// ASHORE_OK.
int32_t ashore_latest(ashore_executor *executor, ashore_checkpoint **checkpoint);

// Opens the newest step whose bytes are all as written. Skips damaged steps and steps marked bad. Reads each
// examined step completely. `skipped` may be null; otherwise it receives the JSON text of the newer steps,
// newest first: [{"step": 8, "path": "...", "kind": 7, "text": "..."}, ...], where `kind` is an
// `ashore_status`. Free the text with ashore_text_free. Both results are null after a failure. If there is
// no step, `checkpoint` is null and the status ASHORE_OK. If there are steps and none is sound, the call
// fails with the damage of the newest.
int32_t ashore_latest_valid(ashore_executor *executor, ashore_checkpoint **checkpoint, char **skipped);

// Opens a step under the root. Fails with ASHORE_NOT_FOUND if the step does not exist.
int32_t ashore_step(ashore_executor *executor, uint64_t step, ashore_checkpoint **checkpoint);

// Makes a JSON object that describes an executor on this machine: its device and why it was chosen, its
// arena, how it writes. Free the text with ashore_text_free.
int32_t ashore_report(ashore_executor *executor, char **json);

// Begins a save and returns. `tensors` and `options` are read only within the call. Afterwards only the
// memory of the tensors is needed, each until its release. Each tensor is released once, whatever the
// outcome of the save. `options` may be null. `save` may be null: then the save goes on alone, and the next
// call of ashore_save_begin, or ashore_close, returns its failure. These calls also return the failure of a
// save whose handle was freed before a call had returned it.
int32_t ashore_save_begin(ashore_executor *executor,
                          uint64_t step,
                          const ashore_tensor *tensors,
                          size_t count,
                          const ashore_save_options *options,
                          ashore_save **save);

// Waits until nothing will read the tensors of a save any more, and each was released: then the program may
// write them. With 0 seconds the call only asks: ASHORE_DEADLINE means not yet. Returns the failure of the
// save if it has failed; then the program may write the tensors, too. That failure can be ASHORE_DEADLINE,
// for a save that missed its own deadline: see `ashore_save_wait`.
int32_t ashore_save_staged(ashore_save *save, double seconds);

// Waits until a save is durable, or returns its failure. ASHORE_DEADLINE means that the save has not ended
// and can be waited for again, or that it failed because it missed its own deadline: then the phase of
// `ashore_save_progress` is ASHORE_PHASE_ENDED. `committed` may be null.
int32_t ashore_save_wait(ashore_save *save, double seconds, ashore_committed *committed);

// Calls `done` once, when the save has ended, or at once within this call if it has ended already. `kind` is
// an `ashore_status`. `error` is its text, valid only within the call, and null for ASHORE_OK and
// ASHORE_SKIPPED. `done` must return soon, because other saves wait meanwhile. It may begin a save and free
// handles. A wait for the same executor, a fence and a close are refused in it.
int32_t ashore_save_then(ashore_save *save,
                         void (*done)(void *context, int32_t kind, const char *error),
                         void *context);

// Reports the progress of a save.
int32_t ashore_save_progress(ashore_save *save, ashore_progress *progress);

// Cancels a save, which ends as ASHORE_CANCELLED at once. The program may write its tensors when
// ashore_save_staged returns. ASHORE_CONFLICT means that it is too late: the save has ended or is being
// published.
int32_t ashore_save_cancel(ashore_save *save);

// Frees the handle of a save, which goes on. Does nothing for null or an invalid handle.
void ashore_save_free(ashore_save *save);

// Waits until the step of a save is also durable in the tier of this name; `ashore_save_wait` covers only
// the executor's own root. Returns the failure of the save; ASHORE_CANCELLED if the save did not begin, or
// the tier does not want the step any more; ASHORE_CONFLICT if another session owns the tier;
// ASHORE_INVALID for a tier that the executor of this process does not have. ASHORE_DEADLINE means not yet,
// and the step can be waited for again; after `ashore_close` it means that the step was not promoted. While
// a tier is away, the step does not become durable in it.
int32_t ashore_save_durable_in(ashore_save *save, const char *tier, double seconds);

// Makes a JSON array of what each tier has and lacks: [{"tier": "shared", "root": "...", "state": "ours",
// "newest": 8, "lacks": [], "forks": [], "error": null}, ...]. `state` is "ours", "away" (the tier does not
// answer at present) or "lost" (another session owns the tier). The array is empty if another rank promotes.
// Free the text with ashore_text_free.
int32_t ashore_tiers(ashore_executor *executor, char **json);

// Opens the step in the directory `path`. No executor is needed.
int32_t ashore_checkpoint_open(const char *path, ashore_checkpoint **checkpoint);

// Returns the step of a checkpoint, or -1 for an invalid handle.
int64_t ashore_checkpoint_step(ashore_checkpoint *checkpoint);

// Fills the memory of `count` targets in parallel, and compares every byte with its digest. A target with
// `offset` gets the box of `shape` at that offset; other targets get the whole tensor. Dtype and shape must
// match the saved ones: nothing is converted. Nothing is written unless every target fits. Packed targets
// that overlap are refused. The result is undefined for targets that overlap because of their strides.
// After a failure to read, the content of the targets is undefined. After ASHORE_DEADLINE copies to device
// memory may still be under way: keep that memory until the device has ended its work.
int32_t ashore_restore(ashore_checkpoint *checkpoint, const ashore_tensor *targets, size_t count);

// Makes the JSON text of the value `name`, or, if `name` is null, of the checkpoint: {"step": 7, "attempt":
// "...", "path": "...", "ranks": 1, "tensors": [{"name": "w", "dtype": "F32", "shape": [2, 3], "bytes": 24},
// ...], "values": {...}, "metadata": {...}}. Values that another language has saved and that JSON cannot
// express, such as NaN or a tuple, have the tags of docs/format.md: {"$f64": "7ff8000000000000"}. Free the
// text with ashore_text_free. `json` is null after a failure.
int32_t ashore_checkpoint_json(ashore_checkpoint *checkpoint, const char *name, char **json);

// Makes the JSON text of the value `name` that the rank `rank` saved for itself. Free the text with
// ashore_text_free.
int32_t ashore_checkpoint_rank_json(ashore_checkpoint *checkpoint,
                                    uint32_t rank,
                                    const char *name,
                                    char **json);

// Frees a text that a function has made. Does nothing for null.
void ashore_text_free(char *text);

// Frees the handle of a checkpoint. Does nothing for null or an invalid handle.
void ashore_checkpoint_free(ashore_checkpoint *checkpoint);

// Passes errors (level 0) and warnings (level 1) of the library to `log`, instead of writing them to stderr.
// Any thread may call `log`, which must return soon and not call the library. Null restores stderr. Call
// this function once: an earlier `log` may still be running when this function returns.
int32_t ashore_log(void (*log)(void *context, int32_t level, const char *text), void *context);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* ASHORE_H */
