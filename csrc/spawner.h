/* Spawner threads: take runs from a queue, clone, and report each as started or failed.
 *
 * No function here needs Python; those that can fail return -errno. */
#ifndef DIYC_SPAWNER_H
#define DIYC_SPAWNER_H

#include "plan.h"

struct spawner;

/* Start `threads` spawner threads. `scratch` is a directory to build each thread's small root on: only the
 * threads' own mount namespaces see that. On failure *what names the call. */
int spawner_new(struct spawner **out, unsigned threads, const char *scratch, const char **what);

/* Hand over a run; it comes back by spawner_drain. */
void spawner_submit(struct spawner *spawner, struct run *run);

/* The eventfd that is readable when runs are ready to be drained. */
int spawner_eventfd(const struct spawner *spawner);

/* All runs finished since the last call, oldest first, linked by `next`. */
struct run *spawner_drain(struct spawner *spawner);

/* Kill a run that is still being set up; 0 if there was none with that token, 1 if it was killed. */
int spawner_kill(struct spawner *spawner, uint64_t token);

/* Let the threads finish what they have begun, join them and free everything. Runs still queued come
 * back as the list *left. */
void spawner_free(struct spawner *spawner, struct run **left);

/* A user namespace with `id_map` for users and groups, as a descriptor that mount_setattr(2) takes. */
int user_namespace_new(const char *id_map, const char **what);

/* Clone the mount at `path` as a detached mount and set attributes on it (MOUNT_ATTR_...); `userns` >= 0
 * makes it an idmapped mount. Unless `follow`, a symlink anywhere in the path is ELOOP. Returns the descriptor or
 * -errno. */
int tree_clone(const char *path, uint64_t attributes, int userns, int recursive, int follow, const char **what);

/* Bind a BPF program of type BPF_PROG_TYPE_CGROUP_DEVICE to the cgroup v2 directory; 0 or -errno. */
int device_program_attach(const void *instructions, size_t size, int cgroup, const char **what);

/* What system call number `index` of a table answers to arguments that it must refuse: -errno, or a version for
 * landlock_create_ruleset. *name is its name, NULL past the table's end. */
long system_call_probe(size_t index, const char **name);

/* Whether clone3(2) can be made; systemd's RestrictNamespaces= and older container engines hide it. */
int clone3_present(void);

#endif
