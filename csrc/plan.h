/* The contract between the two halves: what a plan is, what its steps are and how one fails.
 *
 * Python describes a container as a list of steps; plan.c copies it into one immutable block of C memory;
 * a spawner thread clones; the child walks the steps and ends in execve. Nothing here needs Python.h. */
#ifndef DIYC_PLAN_H
#define DIYC_PLAN_H

#include <stddef.h>
#include <stdint.h>

/* One list for the enum, for the names Python sees and for the parameters of the tests.
 * X(NAME, "name", what it does: which fields of struct step it reads) */
#define STEP_LIST(X)                                                                                                   \
    X(MARK, "mark")                   /* note the time as mark number `flags` */                                       \
    X(AWAIT_PARENT, "await_parent")   /* wait until id maps and oom_score_adj are written */                           \
    X(PDEATHSIG, "pdeathsig")         /* signal `flags` at the parent's death; fd: /proc/self/stat, data: "PPID " */   \
    X(CGROUP_JOIN, "cgroup_join")     /* fd: a v1 `tasks` file */                                                      \
    X(UNSHARE, "unshare")             /* flags: CLONE_NEW... */                                                        \
    X(SETSID, "setsid")               /* a session of its own */                                                       \
    X(UMASK, "umask")                 /* flags: mask */                                                                \
    X(SETGROUPS, "setgroups")         /* data: array of gid_t */                                                       \
    X(SETRESGID, "setresgid")         /* flags: gid */                                                                 \
    X(SETRESUID, "setresuid")         /* flags: uid */                                                                 \
    X(MKDIR, "mkdir")                 /* target, flags: mode; one that exists is kept */                               \
    X(MKNOD_FILE, "mknod_file")       /* target: an empty file to mount upon; one that exists is kept */               \
    X(CHOWN, "chown")                 /* target: to the first id of the run's range, that is root inside */            \
    X(KEYRING, "keyring")             /* a session keyring of its own */                                               \
    X(SYSCTL, "sysctl")               /* target: a file below /proc/sys, data: its value */                            \
    X(WRITE_FILE, "write_file")       /* target is made anew with data as its content, flags: mode */                  \
    X(SYMLINK, "symlink")             /* source: what the link says, target: where it lies */                          \
    X(MOUNT, "mount")                 /* source, target, type, flags, data as in mount(2) */                           \
    X(OPEN_TREE, "open_tree")         /* source: path to clone, flags; out: register of the new mount */               \
    X(OPEN_FILE, "open_file")         /* source: path, flags: O_RDONLY or O_WRONLY; out: register */                   \
    X(FSMOUNT, "fsmount")             /* type, data: "key=value" strings, flags: MOUNT_ATTR_...; out: register */      \
    X(MOVE_MOUNT, "move_mount")       /* fd: a detached mount, target, flags: RESOLVE_... of openat2(2) */             \
    X(MOUNT_SETATTR, "mount_setattr") /* target, flags: MOUNT_ATTR_... to set */                                       \
    X(PIVOT_ROOT, "pivot_root")       /* target becomes the root, the old one is detached */                           \
    X(SETHOSTNAME, "sethostname")     /* data */                                                                       \
    X(SETDOMAINNAME, "setdomainname") /* data */                                                                       \
    X(LINK_UP, "link_up")             /* target: name of the link */                                                   \
    X(DUP, "dup")                     /* fd becomes descriptor number `flags` */                                       \
    X(CLOSE_FROM, "close_from")       /* flags: first descriptor to close */                                           \
    X(CHDIR, "chdir")                 /* target */                                                                     \
    X(RLIMIT, "rlimit")               /* flags: resource, data: struct rlimit64 */                                     \
    X(BOUNDING_SET, "bounding_set")   /* flags: mask of what stays */                                                  \
    X(CLEAR_AMBIENT, "clear_ambient")                                                                                  \
    X(CAPSET, "capset") /* flags: mask for permitted and effective; inheritable is empty */                            \
    X(NO_NEW_PRIVS, "no_new_privs")                                                                                    \
    X(EXEC_LABEL, "exec_label") /* fd: a file in /proc/self/attr, data: what execve shall change to */                 \
    X(SIGNALS, "signals")       /* default action for every signal, none blocked */                                    \
    X(EXEC, "exec")             /* the run's paths in turn, its argv and envp */

enum step_kind {
#define X(name, text) STEP_##name,
    STEP_LIST(X)
#undef X
        STEP_COUNT
};

extern const char *const step_names[STEP_COUNT];

/* `fd` and `out` are indices into the run's register file of descriptors, -1 for none. */
struct step {
    uint32_t kind;
    int32_t fd;
    int32_t out;
    uint32_t data_len;
    uint64_t flags;
    const char *source;
    const char *target;
    const char *type;
    const char *data;
};

struct plan {
    uint64_t clone_flags; /* CLONE_NEW... of clone3(2) */
    uint32_t step_count;
    uint32_t register_count;
    uint32_t spawner_steps; /* the first so many are the spawner thread's own, before clone3 */
    const struct step *steps;
};

enum { MARK_COUNT = 8 };

/* What the child leaves behind in the memory that it shares with the spawner thread. */
struct progress {
    volatile uint32_t parent_ready; /* futex: the parent has done its part */
    volatile uint32_t index;        /* of the step being walked */
    volatile int32_t error;         /* errno of the step that failed, 0 for none */
    volatile uint64_t marks[MARK_COUNT];
};

/* One run of a plan: the plan's parameters, and where the child reports. */
struct run {
    struct run *next;
    const struct plan *plan;
    void *plan_owner; /* the Python object that keeps the plan alive */
    uint64_t token;
    int *registers;
    char *const *argv;
    char *const *envp;
    const char *const *paths;
    uint32_t id_first;           /* host id of root inside */
    const char *id_map;          /* text for uid_map and gid_map, NULL without a user namespace */
    const char *oom_score_adj;   /* text, NULL to leave it */
    int cgroup_fd;               /* CLONE_INTO_CGROUP, -1 for none */
    volatile uint32_t *requests; /* futex: runs that wait for the spawner's helper thread */
    volatile uint32_t waiting;   /* 1 while the child waits for the helper */
    struct progress progress;
    /* filled by the spawner */
    int pid;
    int pidfd;
    int error; /* 0: started, or was killed while starting */
    int failed;
    uint64_t dequeued_ns;
    uint64_t started_ns;
};

/* child.c: walks the run's steps from the spawner's on; never returns. */
_Noreturn void child_main(void *run);

/* Walk steps `first` to `end - 1`; 0 or -errno, with run->progress.index at the step that failed. */
long steps_walk(struct run *run, uint32_t first, uint32_t end);

#endif
