/* What runs between clone and execve: a walk over the plan's steps, one system call or few for each.
 *
 * The child shares the supervisor's memory (CLONE_VM), so this file makes raw system calls only: no libc
 * function, no errno, no lock, no allocation, no write outside its own stack and its run's `registers` and
 * `progress`. It fails in one way: the step's errno is left in `progress` and the child exits. */
#include "plan.h"
#include "sys.h"

#include <linux/capability.h>
#include <linux/errno.h>
#include <linux/fcntl.h>
#include <linux/futex.h>
#include <linux/if.h>
#include <linux/keyctl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <linux/prctl.h>
#include <linux/sockios.h>
#include <linux/time_types.h>

enum { UMOUNT_DETACH = 2, SOCKET_INET = 2, SOCKET_DGRAM = 2, CLOCK_MONOTONIC_ID = 1, SIGNAL_COUNT = 64 };

static long child_open(const char *path, uint64_t flags, uint64_t mode, uint64_t resolve) {
    struct sys_open_how how = {.flags = flags | O_CLOEXEC, .mode = mode, .resolve = resolve};
    return sys_openat2(AT_FDCWD, path, &how);
}

static long child_mark(struct run *run, const struct step *step) {
    struct __kernel_timespec now = {0, 0};
    sys_call2(__NR_clock_gettime, CLOCK_MONOTONIC_ID, SYS_P(&now));
    run->progress.marks[step->flags] = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    return 0;
}

/* The helper thread writes id maps and oom_score_adj: a child in a new user namespace may not. */
static long child_await_parent(struct run *run) {
    __atomic_store_n(&run->waiting, 1, __ATOMIC_RELEASE);
    __atomic_fetch_add(run->requests, 1, __ATOMIC_ACQ_REL);
    sys_call4(__NR_futex, SYS_P(run->requests), FUTEX_WAKE, 1, 0);
    for (;;) {
        uint32_t ready = __atomic_load_n(&run->progress.parent_ready, __ATOMIC_ACQUIRE);
        if (ready != 0)
            return ready == 1 ? 0 : -(long)(ready - 1); /* 1 + errno of the helper's write */
        sys_call4(__NR_futex, SYS_P(&run->progress.parent_ready), FUTEX_WAIT, 0, 0);
    }
}

/* A parent that died before the call would never be noticed, and getppid() is 0 in a PID namespace: the fourth field of
 * /proc/self/stat, opened before the pivot, is asked (data: the supervisor's pid). Its pidfd would not do: it tells of
 * a process's end only when the last of its threads is gone, later than the kernel has looked for children to signal.
 */
static long child_pdeathsig(const struct step *step, int stat) {
    char text[512];
    long ret = sys_call2(__NR_prctl, PR_SET_PDEATHSIG, (long)step->flags);
    if (ret < 0 || stat < 0)
        return ret;
    long length = sys_call4(__NR_pread64, stat, SYS_P(text), sizeof(text), 0);
    if (length < 0)
        return length;
    long at = length;
    while (at > 0 && text[at - 1] != ')')
        at--;
    at += 3; /* " S " */
    for (uint32_t i = 0; i < step->data_len; i++)
        if (at + (long)i >= length || text[at + (long)i] != step->data[i])
            return -ESRCH;
    return 0;
}

static long child_mkdir(const struct step *step) {
    long ret = sys_call3(__NR_mkdirat, AT_FDCWD, SYS_P(step->target), (long)step->flags);
    return ret == -EEXIST ? 0 : ret;
}

static long child_mknod_file(const struct step *step) {
    long ret = sys_call4(__NR_mknodat, AT_FDCWD, SYS_P(step->target), 0100000 | 0644, 0);
    return ret == -EEXIST ? 0 : ret;
}

/* A kernel without keyrings has none to share, and EPERM is none of the kernel's answers here but that of a seccomp
 * filter, as container engines have it: the job inherits that, so it cannot make the call either. */
static long child_keyring(void) {
    long ret = sys_call2(__NR_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0);
    return ret < 0 && ret != -ENOSYS && ret != -EPERM ? ret : 0;
}

static long child_sysctl(const struct step *step) {
    long fd = child_open(step->target, O_WRONLY, 0, 0);
    if (fd < 0)
        return fd;
    long ret = sys_write((int)fd, step->data, step->data_len);
    sys_close((int)fd);
    return ret < 0 ? ret : 0;
}

/* What lies there is unlinked first: an image may ship a link to somewhere else. */
static long child_write_file(const struct step *step) {
    long ret = sys_call3(__NR_unlinkat, AT_FDCWD, SYS_P(step->target), 0);
    if (ret < 0 && ret != -ENOENT)
        return ret;
    long fd = child_open(step->target, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, step->flags, RESOLVE_NO_MAGICLINKS);
    if (fd < 0)
        return fd;
    ret = sys_write((int)fd, step->data, step->data_len);
    sys_close((int)fd);
    return ret < 0 ? ret : ret == (long)step->data_len ? 0 : -ENOSPC;
}

static long child_fsconfig(int fd, const struct step *step) {
    const char *end = step->data + step->data_len;
    for (const char *key = step->data; key < end;) {
        const char *value = key;
        while (*value)
            value++;
        value++;
        long ret = sys_call(__NR_fsconfig, fd, FSCONFIG_SET_STRING, SYS_P(key), SYS_P(value), 0);
        if (ret < 0)
            return ret;
        while (*value)
            value++;
        key = value + 1;
    }
    return sys_call(__NR_fsconfig, fd, FSCONFIG_CMD_CREATE, 0, 0, 0);
}

/* A new file system as a detached mount: data is "key\0value\0" pairs. */
static long child_fsmount(const struct step *step) {
    long fs = sys_call2(__NR_fsopen, SYS_P(step->type), FSOPEN_CLOEXEC);
    if (fs < 0)
        return fs;
    long ret = child_fsconfig((int)fs, step);
    if (ret == 0)
        ret = sys_call3(__NR_fsmount, fs, FSMOUNT_CLOEXEC, (long)step->flags);
    sys_close((int)fs);
    return ret;
}

/* The target is opened first, under the step's RESOLVE_ rules, so that what was checked is what is covered. */
static long child_move_mount(const struct step *step, int fd) {
    long target = child_open(step->target, O_PATH, 0, step->flags);
    if (target < 0)
        return target;
    long ret = sys_move_mount(fd, "", (int)target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
    sys_close((int)target);
    return ret;
}

static long child_mount_setattr(const struct step *step) {
    struct sys_mount_attr attr = {.attr_set = step->flags, .attr_clr = 0, .propagation = 0, .userns_fd = 0};
    return sys_mount_setattr(AT_FDCWD, step->target, 0, &attr);
}

/* pivot_root(".", ".") stacks the old root on the new one (pivot_root(2)); detaching it leaves only ours. */
static long child_pivot_root(const struct step *step) {
    long ret = sys_call1(__NR_chdir, SYS_P(step->target));
    if (ret == 0)
        ret = sys_call2(__NR_pivot_root, SYS_P("."), SYS_P("."));
    if (ret == 0)
        ret = sys_call2(__NR_umount2, SYS_P("."), UMOUNT_DETACH);
    if (ret == 0)
        ret = sys_call1(__NR_chdir, SYS_P("/"));
    return ret;
}

static long child_link_up(const struct step *step) {
    struct ifreq request;
    for (size_t i = 0; i < sizeof(request); i++)
        ((volatile char *)&request)[i] = 0;
    for (size_t i = 0; i < IFNAMSIZ - 1 && step->target[i]; i++)
        request.ifr_ifrn.ifrn_name[i] = step->target[i];
    long fd = sys_call3(__NR_socket, SOCKET_INET, SOCKET_DGRAM | O_CLOEXEC, 0);
    if (fd < 0)
        return fd;
    long ret = sys_call3(__NR_ioctl, fd, SIOCGIFFLAGS, SYS_P(&request));
    if (ret == 0) {
        request.ifr_ifru.ifru_flags |= IFF_UP;
        ret = sys_call3(__NR_ioctl, fd, SIOCSIFFLAGS, SYS_P(&request));
    }
    sys_close((int)fd);
    return ret;
}

/* dup3 refuses a descriptor that is in place already; there only its close-on-exec flag must go. */
static long child_dup(const struct step *step, int fd) {
    if (fd == (int)step->flags)
        return sys_call3(__NR_fcntl, fd, F_SETFD, 0);
    long ret = sys_call3(__NR_dup3, fd, (long)step->flags, step->data_len ? O_CLOEXEC : 0);
    return ret < 0 ? ret : 0;
}

static long child_bounding_set(const struct step *step) {
    for (long cap = 0; cap < 64; cap++) {
        if (step->flags >> cap & 1)
            continue;
        long ret = sys_call2(__NR_prctl, PR_CAPBSET_DROP, cap);
        if (ret == -EINVAL)
            return 0; /* past the last capability of this kernel */
        if (ret < 0)
            return ret;
    }
    return 0;
}

static long child_capset(const struct step *step) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    struct __user_cap_data_struct sets[2] = {
        {.effective = (uint32_t)step->flags, .permitted = (uint32_t)step->flags, .inheritable = 0},
        {.effective = step->flags >> 32, .permitted = step->flags >> 32, .inheritable = 0},
    };
    return sys_call2(__NR_capset, SYS_P(&header), SYS_P(sets));
}

/* CLONE_CLEAR_SIGHAND leaves ignored signals ignored, and Python ignores SIGPIPE; execve would keep that. */
static long child_signals(void) {
    struct {
        void *handler;
        unsigned long flags;
        void *restorer;
        uint64_t mask;
    } action = {0, 0, 0, 0};
    uint64_t none = 0;
    for (long number = 1; number <= SIGNAL_COUNT; number++) {
        long ret = sys_call4(__NR_rt_sigaction, number, SYS_P(&action), 0, sizeof(none));
        if (ret < 0 && ret != -EINVAL) /* KILL and STOP */
            return ret;
    }
    return sys_call4(__NR_rt_sigprocmask, 2 /* SIG_SETMASK */, SYS_P(&none), 0, sizeof(none));
}

/* As execvp(3): a candidate that cannot be run is remembered, one that is not there is passed over. */
static long child_exec(struct run *run) {
    long ret = -ENOENT;
    for (const char *const *path = run->paths; *path; path++) {
        long tried = sys_call3(__NR_execve, SYS_P(*path), SYS_P(run->argv), SYS_P(run->envp));
        if (tried != -ENOENT && tried != -ENOTDIR)
            ret = tried;
        if (ret != -ENOENT && ret != -EACCES)
            break;
    }
    return ret;
}

/* A step whose result is a descriptor puts it into its register. */
static long child_store(struct run *run, const struct step *step, long fd) {
    if (fd < 0)
        return fd;
    run->registers[step->out] = (int)fd;
    return 0;
}

static long child_step(struct run *run, const struct step *step) {
    const int fd = step->fd >= 0 ? run->registers[step->fd] : -1;
    const long flags = (long)step->flags;
    long ret;
    switch ((enum step_kind)step->kind) {
    case STEP_MARK:
        return child_mark(run, step);
    case STEP_AWAIT_PARENT:
        return child_await_parent(run);
    case STEP_PDEATHSIG:
        return child_pdeathsig(step, fd);
    case STEP_CGROUP_JOIN:
        ret = sys_write(fd, "0", 1);
        return ret < 0 ? ret : 0;
    case STEP_UNSHARE:
        return sys_call1(__NR_unshare, flags);
    case STEP_SETSID:
        ret = sys_call0(__NR_setsid);
        return ret < 0 ? ret : 0;
    case STEP_UMASK:
        sys_call1(__NR_umask, flags);
        return 0;
    case STEP_SETGROUPS:
        return sys_call2(__NR_setgroups, step->data_len / 4, SYS_P(step->data));
    case STEP_SETRESGID:
        return sys_call3(__NR_setresgid, flags, flags, flags);
    case STEP_SETRESUID:
        return sys_call3(__NR_setresuid, flags, flags, flags);
    case STEP_MKDIR:
        return child_mkdir(step);
    case STEP_MKNOD_FILE:
        return child_mknod_file(step);
    case STEP_CHOWN:
        return sys_call(__NR_fchownat, AT_FDCWD, SYS_P(step->target), run->id_first, run->id_first, 0);
    case STEP_KEYRING:
        return child_keyring();
    case STEP_SYSCTL:
        return child_sysctl(step);
    case STEP_WRITE_FILE:
        return child_write_file(step);
    case STEP_SYMLINK:
        return sys_call3(__NR_symlinkat, SYS_P(step->source), AT_FDCWD, SYS_P(step->target));
    case STEP_MOUNT:
        return sys_mount(step->source, step->target, step->type, step->flags, step->data);
    case STEP_OPEN_TREE:
        return child_store(run, step, sys_open_tree(AT_FDCWD, step->source, (unsigned)step->flags));
    case STEP_OPEN_FILE:
        return child_store(run, step, child_open(step->source, step->flags, 0, 0));
    case STEP_FSMOUNT:
        return child_store(run, step, child_fsmount(step));
    case STEP_MOVE_MOUNT:
        return child_move_mount(step, fd);
    case STEP_MOUNT_SETATTR:
        return child_mount_setattr(step);
    case STEP_PIVOT_ROOT:
        return child_pivot_root(step);
    case STEP_SETHOSTNAME:
        return sys_call2(__NR_sethostname, SYS_P(step->data), step->data_len);
    case STEP_SETDOMAINNAME:
        return sys_call2(__NR_setdomainname, SYS_P(step->data), step->data_len);
    case STEP_LINK_UP:
        return child_link_up(step);
    case STEP_DUP:
        return child_dup(step, fd);
    case STEP_CLOSE_FROM:
        return sys_call3(__NR_close_range, flags, ~0U, 0);
    case STEP_CHDIR:
        return sys_call1(__NR_chdir, SYS_P(step->target));
    case STEP_RLIMIT:
        return sys_call4(__NR_prlimit64, 0, flags, SYS_P(step->data), 0);
    case STEP_BOUNDING_SET:
        return child_bounding_set(step);
    case STEP_CLEAR_AMBIENT:
        return sys_call2(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL);
    case STEP_CAPSET:
        return child_capset(step);
    case STEP_NO_NEW_PRIVS:
        return sys_call2(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1);
    case STEP_EXEC_LABEL:
        ret = sys_write(fd, step->data, step->data_len);
        return ret < 0 ? ret : 0;
    case STEP_SIGNALS:
        return child_signals();
    case STEP_EXEC:
        return child_exec(run);
    case STEP_COUNT:
        break;
    }
    return -ENOSYS;
}

long steps_walk(struct run *run, uint32_t first, uint32_t end) {
    long ret = 0;
    for (uint32_t i = first; i < end && ret >= 0; i++) {
        run->progress.index = i;
        ret = child_step(run, &run->plan->steps[i]);
    }
    return ret;
}

_Noreturn void child_main(void *argument) {
    struct run *run = argument;
    long ret = steps_walk(run, run->plan->spawner_steps, run->plan->step_count);
    run->progress.error = (int32_t)-ret;
    for (;;)
        sys_call1(__NR_exit_group, 127);
}
