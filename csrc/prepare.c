/* What the supervisor prepares before a clone: user namespaces to map ids with, and detached mounts.
 *
 * A mount cloned here and moved into place by the child needs no path of the host inside the container, and
 * an idmapped one (mount_setattr(2), Linux 5.12) shows root's files as the container's root's without a chown. */
#include "spawner.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static int file_write(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    int error = write(fd, text, strlen(text)) < 0 ? -errno : 0;
    close(fd);
    return error;
}

static int process_user_namespace(int pid, const char *id_map, const char **what) {
    char path[64];
    *what = "write uid_map";
    snprintf(path, sizeof(path), "/proc/%d/uid_map", pid);
    int error = file_write(path, id_map);
    if (error)
        return error;
    *what = "write gid_map";
    snprintf(path, sizeof(path), "/proc/%d/gid_map", pid);
    error = file_write(path, id_map);
    if (error)
        return error;
    *what = "open the user namespace";
    snprintf(path, sizeof(path), "/proc/%d/ns/user", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/* A namespace outlives its process as long as a descriptor is open: the process only sleeps until then. It is
 * forked without CLONE_VM and makes no libc call, so the locks of other threads do not matter. */
int user_namespace_new(const char *id_map, const char **what) {
    *what = "clone a user namespace";
    long pid = sys_call2(__NR_clone, CLONE_NEWUSER | SIGCHLD, 0);
    if (pid < 0)
        return (int)pid;
    if (pid == 0) {
        sys_call2(__NR_prctl, PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            sys_call(__NR_ppoll, 0, 0, 0, 0, 0);
    }
    int ret = process_user_namespace((int)pid, id_map, what);
    kill((pid_t)pid, SIGKILL);
    while (waitpid((pid_t)pid, NULL, __WALL) < 0 && errno == EINTR)
        continue;
    return ret;
}

/* No link is followed on the way: a job with a writable mount could have put one there since the path was checked. */
static int tree_open(const char *path, int follow, unsigned recurse) {
    struct sys_open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = follow ? 0 : RESOLVE_NO_SYMLINKS};
    int at = (int)sys_openat2(AT_FDCWD, path, &how);
    if (at < 0)
        return at;
    int fd = (int)sys_open_tree(at, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recurse);
    close(at);
    return fd;
}

int tree_clone(const char *path, uint64_t attributes, int userns, int recursive, int follow, const char **what) {
    const unsigned recurse = recursive ? AT_RECURSIVE : 0;
    *what = "open_tree";
    int fd = tree_open(path, follow, recurse);
    if (fd < 0)
        return fd;
    struct sys_mount_attr attr = {.attr_set = attributes};
    if (userns >= 0) {
        attr.attr_set |= MOUNT_ATTR_IDMAP;
        attr.userns_fd = (uint64_t)userns;
    }
    *what = userns >= 0 ? "mount_setattr (idmapped mount)" : "mount_setattr";
    long ret = attr.attr_set ? sys_mount_setattr(fd, "", AT_EMPTY_PATH | recurse, &attr) : 0;
    if (ret < 0)
        close(fd);
    return ret < 0 ? (int)ret : fd;
}
