/* Spawner threads: the only callers of clone3.
 *
 * A job's parent-death signal follows the thread that cloned it, so these threads live as long as the
 * spawner. Each has a mount namespace of four mounts: a clone copies those, however many the host has.
 * CLONE_VFORK keeps a thread in the kernel until its child has called execve or is dead. That also tells the
 * OOM killer and oom_score_adj that the shared memory is borrowed: without it, a child killed for its
 * cgroup's lack of memory would take the supervisor along. What the parent must do meanwhile (id maps,
 * oom_score_adj) is done by one helper thread. */
#include "spawner.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/mount.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { STACK_SIZE = 64 * 1024, DETACH = 2 /* MNT_DETACH, whose header clashes with linux/mount.h */ };

const char *const step_names[STEP_COUNT] = {
#define X(name, text) text,
    STEP_LIST(X)
#undef X
};

struct spawner_thread {
    struct spawner *spawner;
    pthread_t thread;
    int started;
    int is_helper;
    char *stack;
    pthread_mutex_t lock; /* of `current`, which the helper and spawner_kill look at */
    struct run *current;
};

struct run_queue {
    struct run *first;
    struct run *last;
};

struct spawner {
    pthread_mutex_t lock;
    pthread_cond_t wake;  /* queue not empty, or closing */
    pthread_cond_t ready; /* a thread has finished its set-up */
    struct run_queue queue;
    struct run_queue done;
    int eventfd;
    int has_clone3;
    volatile uint32_t requests; /* futex of the helper */
    volatile int closing;
    volatile int helper_closing; /* later than the others: their children may still wait for the helper */
    char scratch[PATH_MAX];
    unsigned ready_count;
    int init_error;
    const char *init_what;
    unsigned thread_count; /* the helper is the last */
    struct spawner_thread threads[];
};

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void queue_push(struct run_queue *queue, struct run *run) {
    run->next = NULL;
    if (queue->last)
        queue->last->next = run;
    else
        queue->first = run;
    queue->last = run;
}

static struct run *queue_pop(struct run_queue *queue) {
    struct run *run = queue->first;
    if (run) {
        queue->first = run->next;
        if (!queue->first)
            queue->last = NULL;
    }
    return run;
}

/* ---- the small root of a spawner thread ---- */

static int try_call(long ret, const char *name, const char **what) {
    if (ret >= 0)
        return 0;
    *what = name;
    return -errno;
}

static int libc_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data) {
    long ret = sys_mount(source, target, type, flags, data);
    errno = ret < 0 ? (int)-ret : errno;
    return ret < 0 ? -1 : 0;
}

struct dev_node {
    const char *path;
    unsigned major, minor;
};

/* Without root nobody makes device nodes: the host's own, which anybody may open, are mounted on empty files. */
static int dev_node_make(const struct dev_node *node, const char **what) {
    char source[32];
    if (mknod(node->path, S_IFCHR | 0666, makedev(node->major, node->minor)) == 0)
        return 0;
    if (errno != EPERM)
        return try_call(-1, "mknod /dev node", what);
    snprintf(source, sizeof(source), "/%s", node->path);
    int ret = try_call(mknod(node->path, S_IFREG | 0666, 0), "make a mount point in /dev", what);
    if (ret == 0)
        ret = try_call(libc_mount(source, node->path, NULL, MS_BIND, NULL), "bind the host's /dev node", what);
    return ret;
}

static int dev_populate(const char **what) {
    static const struct dev_node nodes[] = {{"dev/null", 1, 3},   {"dev/zero", 1, 5},    {"dev/full", 1, 7},
                                            {"dev/random", 1, 8}, {"dev/urandom", 1, 9}, {"dev/tty", 5, 0}};
    static const char *const links[][2] = {{"/proc/self/fd", "dev/fd"},
                                           {"/proc/self/fd/0", "dev/stdin"},
                                           {"/proc/self/fd/1", "dev/stdout"},
                                           {"/proc/self/fd/2", "dev/stderr"},
                                           {"pts/ptmx", "dev/ptmx"}};
    int ret = 0;
    for (size_t i = 0; ret == 0 && i < sizeof(nodes) / sizeof(*nodes); i++)
        ret = dev_node_make(&nodes[i], what);
    for (size_t i = 0; ret == 0 && i < sizeof(links) / sizeof(*links); i++)
        ret = try_call(symlink(links[i][0], links[i][1]), "symlink in /dev", what);
    if (ret == 0)
        ret = try_call(mkdir("dev/pts", 0755), "mkdir /dev/pts", what);
    if (ret == 0)
        ret = try_call(mkdir("dev/shm", 0755), "mkdir /dev/shm", what);
    return ret;
}

/* A kernel file system of our own or, where its PID or network namespace belongs to the host's root, the host's. */
static int kernel_mount(const char *type, const char *target, const char *host, const char **what) {
    if (libc_mount(type, target, type, MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) == 0)
        return 0;
    if (errno != EPERM)
        return try_call(-1, type, what);
    return try_call(libc_mount(host, target, NULL, MS_BIND | MS_REC, NULL), host, what);
}

/* /proc and /sys are whole here because the kernel lets a child's user namespace mount its own only where it
 * could already see such a mount unmasked (mount_too_revealing). /dev is shared by all children, read-only. */
static int small_root_fill(const char **what) {
    static const char *const dirs[] = {"proc", "sys", "dev", "scratch"};
    int ret = 0;
    umask(0);
    for (size_t i = 0; ret == 0 && i < sizeof(dirs) / sizeof(*dirs); i++)
        ret = try_call(mkdir(dirs[i], 0755), "mkdir in the spawner's root", what);
    if (ret == 0)
        ret = kernel_mount("proc", "proc", "/proc", what);
    if (ret == 0)
        ret = kernel_mount("sysfs", "sys", "/sys", what);
    if (ret == 0)
        ret = try_call(libc_mount("dev", "dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755,size=64k,nr_inodes=32"),
                       "mount /dev", what);
    if (ret == 0)
        ret = dev_populate(what);
    if (ret == 0)
        ret = try_call(libc_mount(NULL, "dev", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NOEXEC, NULL),
                       "remount /dev read-only", what);
    return ret;
}

static int small_root(const char *scratch, const char **what) {
    int ret = try_call(unshare(CLONE_NEWNS | CLONE_FS), "unshare mount namespace", what);
    if (ret == 0)
        ret = try_call(libc_mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "make mounts private", what);
    if (ret == 0)
        ret = try_call(libc_mount("diyc", scratch, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=64k,nr_inodes=32"),
                       "mount the spawner's root", what);
    if (ret == 0)
        ret = try_call(chdir(scratch), "chdir", what);
    if (ret == 0)
        ret = small_root_fill(what);
    if (ret == 0)
        ret = try_call(syscall(__NR_pivot_root, ".", "."), "pivot_root", what);
    if (ret == 0)
        ret = try_call(syscall(__NR_umount2, ".", DETACH), "detach the old root", what);
    if (ret == 0)
        ret = try_call(chdir("/"), "chdir", what);
    return ret;
}

/* ---- what the parent does for a child that waits ---- */

static int proc_write(int pid, const char *name, const char *text) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t written = write(fd, text, strlen(text));
    int error = written < 0 ? -errno : 0;
    close(fd);
    return error;
}

static void parent_part(struct run *run) {
    int error = 0;
    if (run->id_map) {
        error = proc_write(run->pid, "uid_map", run->id_map);
        if (error == 0)
            error = proc_write(run->pid, "gid_map", run->id_map);
    }
    if (error == 0 && run->oom_score_adj)
        error = proc_write(run->pid, "oom_score_adj", run->oom_score_adj);
    __atomic_store_n(&run->progress.parent_ready, 1u + (uint32_t)-error, __ATOMIC_RELEASE);
    syscall(__NR_futex, &run->progress.parent_ready, FUTEX_WAKE, 1, NULL);
}

static void helper_loop(struct spawner *spawner) {
    while (!__atomic_load_n(&spawner->helper_closing, __ATOMIC_ACQUIRE)) {
        uint32_t seen = __atomic_load_n(&spawner->requests, __ATOMIC_ACQUIRE);
        for (unsigned i = 0; i + 1 < spawner->thread_count; i++) {
            struct spawner_thread *thread = &spawner->threads[i];
            pthread_mutex_lock(&thread->lock);
            struct run *run = thread->current;
            if (run && __atomic_exchange_n(&run->waiting, 0, __ATOMIC_ACQ_REL))
                parent_part(run);
            pthread_mutex_unlock(&thread->lock);
        }
        syscall(__NR_futex, &spawner->requests, FUTEX_WAIT, seen, NULL);
    }
}

/* ---- one run ---- */

static void set_current(struct spawner_thread *thread, struct run *run) {
    pthread_mutex_lock(&thread->lock);
    thread->current = run;
    pthread_mutex_unlock(&thread->lock);
}

/* By its pid: until it is reaped, which nobody else does, that is the child's. */
static void reap(struct run *run) {
    siginfo_t info;
    while (waitid(P_PID, (id_t)run->pid, &info, WEXITED | __WALL) < 0 && errno == EINTR)
        continue;
    if (run->pidfd >= 0)
        close(run->pidfd);
}

/* What the spawner's own steps mounted: the child has its copy, or is dead. */
static void spawner_steps_undo(const struct run *run) {
    if (run->plan->spawner_steps)
        syscall(__NR_umount2, "/scratch", DETACH);
}

static void run_fail(struct run *run, int error) {
    run->error = error;
    run->failed = 1;
    run->pidfd = -1;
}

static long clone_with_clone3(struct spawner_thread *thread, struct run *run) {
    struct sys_clone_args args = {
        .flags = run->plan->clone_flags | CLONE_VM | CLONE_VFORK | CLONE_PIDFD | CLONE_PARENT_SETTID |
                 CLONE_CLEAR_SIGHAND | (run->cgroup_fd >= 0 ? CLONE_INTO_CGROUP : 0),
        .pidfd = (uint64_t)(uintptr_t)&run->pidfd,
        .parent_tid = (uint64_t)(uintptr_t)&run->pid,
        .exit_signal = SIGCHLD,
        .stack = (uint64_t)(uintptr_t)thread->stack,
        .stack_size = STACK_SIZE,
        .cgroup = run->cgroup_fd >= 0 ? (uint64_t)run->cgroup_fd : 0,
    };
    return sys_clone3(&args, child_main, run);
}

/* Where clone3 is hidden. The older call has no CLONE_INTO_CGROUP: there the child joins its v2 cgroup itself. Nor
 * CLONE_CLEAR_SIGHAND: until the signals step the child blocks all, as this thread does. And its CLONE_PIDFD takes the
 * place of CLONE_PARENT_SETTID, which the helper needs: the pidfd is opened later, while the pid is surely the child's
 * because only this thread reaps it. */
static long clone_without_clone3(struct spawner_thread *thread, struct run *run) {
    if (run->cgroup_fd >= 0)
        return -ENOSYS;
    const unsigned long flags = run->plan->clone_flags | CLONE_VM | CLONE_VFORK | CLONE_PARENT_SETTID | SIGCHLD;
    long pid = sys_clone(flags, thread->stack + STACK_SIZE, &run->pid, child_main, run);
    if (pid > 0)
        run->pidfd = (int)sys_call2(__NR_pidfd_open, pid, 0);
    if (pid < 0 || run->pidfd >= 0)
        return pid;
    kill((pid_t)pid, SIGKILL);
    const int error = run->pidfd;
    run->pidfd = -1;
    reap(run);
    return error;
}

static void run_clone(struct spawner_thread *thread, struct run *run) {
    set_current(thread, run);
    long pid = thread->spawner->has_clone3 ? clone_with_clone3(thread, run) : clone_without_clone3(thread, run);
    run->started_ns = now_ns();
    set_current(thread, NULL);
    if (pid < 0) {
        run->progress.index = UINT32_MAX;
        run_fail(run, (int)-pid);
    } else if (run->progress.error || run->progress.index + 1 != run->plan->step_count) {
        reap(run);
        run_fail(run, run->progress.error);
    }
}

static void run_spawn(struct spawner_thread *thread, struct run *run) {
    run->requests = &thread->spawner->requests;
    run->dequeued_ns = now_ns();
    run->pidfd = -1;
    long ret = steps_walk(run, 0, run->plan->spawner_steps);
    if (ret < 0)
        run_fail(run, (int)-ret);
    else
        run_clone(thread, run);
    spawner_steps_undo(run);
}

static void done_push(struct spawner *spawner, struct run *run) {
    pthread_mutex_lock(&spawner->lock);
    int first = spawner->done.first == NULL;
    queue_push(&spawner->done, run);
    pthread_mutex_unlock(&spawner->lock);
    if (first)
        eventfd_write(spawner->eventfd, 1);
}

static void spawn_loop(struct spawner_thread *thread) {
    struct spawner *spawner = thread->spawner;
    for (;;) {
        pthread_mutex_lock(&spawner->lock);
        while (!spawner->queue.first && !spawner->closing)
            pthread_cond_wait(&spawner->wake, &spawner->lock);
        struct run *run = spawner->closing ? NULL : queue_pop(&spawner->queue);
        pthread_mutex_unlock(&spawner->lock);
        if (!run)
            return;
        run_spawn(thread, run);
        done_push(spawner, run);
    }
}

static void *thread_main(void *argument) {
    struct spawner_thread *thread = argument;
    struct spawner *spawner = thread->spawner;
    const char *what = NULL;
    int error = small_root(spawner->scratch, &what);
    prctl(PR_SET_NAME, thread->is_helper ? "diyc-helper" : "diyc-spawner");
    pthread_mutex_lock(&spawner->lock);
    spawner->ready_count++;
    if (error && !spawner->init_error) {
        spawner->init_error = error;
        spawner->init_what = what;
    }
    pthread_cond_signal(&spawner->ready);
    pthread_mutex_unlock(&spawner->lock);
    if (error)
        return NULL;
    if (thread->is_helper)
        helper_loop(spawner);
    else
        spawn_loop(thread);
    return NULL;
}

/* ---- life of the spawner ---- */

/* Signals are for the supervisor's own thread: all are blocked while the others start. */
static int thread_start(struct spawner *spawner, unsigned i) {
    struct spawner_thread *thread = &spawner->threads[i];
    thread->spawner = spawner;
    thread->is_helper = i + 1 == spawner->thread_count;
    pthread_mutex_init(&thread->lock, NULL);
    thread->stack = mmap(NULL, STACK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (thread->stack == MAP_FAILED) {
        thread->stack = NULL;
        return -errno;
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&thread->thread, NULL, thread_main, thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    thread->started = error == 0;
    return -error;
}

int spawner_new(struct spawner **out, unsigned threads, const char *scratch, const char **what) {
    const unsigned count = threads + 1;
    struct spawner *spawner = calloc(1, sizeof(*spawner) + count * sizeof(*spawner->threads));
    if (!spawner)
        return -ENOMEM;
    spawner->thread_count = count;
    pthread_mutex_init(&spawner->lock, NULL);
    pthread_cond_init(&spawner->wake, NULL);
    pthread_cond_init(&spawner->ready, NULL);
    snprintf(spawner->scratch, sizeof(spawner->scratch), "%s", scratch);
    spawner->has_clone3 = clone3_present();
    spawner->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int error = spawner->eventfd < 0 ? -errno : 0;
    *what = "eventfd";
    unsigned started = 0;
    while (error == 0 && started < count) {
        *what = "start a spawner thread";
        error = thread_start(spawner, started);
        started += error == 0;
    }
    pthread_mutex_lock(&spawner->lock);
    while (spawner->ready_count < started)
        pthread_cond_wait(&spawner->ready, &spawner->lock);
    pthread_mutex_unlock(&spawner->lock);
    if (spawner->init_error) {
        error = spawner->init_error;
        *what = spawner->init_what;
    }
    if (error) {
        struct run *left;
        spawner_free(spawner, &left);
        return error;
    }
    *out = spawner;
    return 0;
}

void spawner_submit(struct spawner *spawner, struct run *run) {
    pthread_mutex_lock(&spawner->lock);
    queue_push(&spawner->queue, run);
    pthread_cond_signal(&spawner->wake);
    pthread_mutex_unlock(&spawner->lock);
}

int spawner_eventfd(const struct spawner *spawner) {
    return spawner->eventfd;
}

struct run *spawner_drain(struct spawner *spawner) {
    eventfd_t ignored;
    eventfd_read(spawner->eventfd, &ignored);
    pthread_mutex_lock(&spawner->lock);
    struct run *runs = spawner->done.first;
    spawner->done = (struct run_queue){NULL, NULL};
    pthread_mutex_unlock(&spawner->lock);
    return runs;
}

int spawner_kill(struct spawner *spawner, uint64_t token) {
    int killed = 0;
    for (unsigned i = 0; i + 1 < spawner->thread_count; i++) {
        struct spawner_thread *thread = &spawner->threads[i];
        pthread_mutex_lock(&thread->lock);
        struct run *run = thread->current;
        if (run && run->token == token && run->pid > 0)
            killed = kill(run->pid, SIGKILL) == 0; /* no other process's pid: it is reaped after `current` is reset */
        pthread_mutex_unlock(&thread->lock);
    }
    return killed;
}

static void threads_stop(struct spawner *spawner) {
    pthread_mutex_lock(&spawner->lock);
    spawner->closing = 1;
    pthread_cond_broadcast(&spawner->wake);
    pthread_mutex_unlock(&spawner->lock);
    for (unsigned i = 0; i + 1 < spawner->thread_count; i++)
        if (spawner->threads[i].started)
            pthread_join(spawner->threads[i].thread, NULL);
    struct spawner_thread *helper = &spawner->threads[spawner->thread_count - 1];
    __atomic_store_n(&spawner->helper_closing, 1, __ATOMIC_RELEASE);
    __atomic_fetch_add(&spawner->requests, 1, __ATOMIC_ACQ_REL);
    syscall(__NR_futex, &spawner->requests, FUTEX_WAKE, 1, NULL);
    if (helper->started)
        pthread_join(helper->thread, NULL);
}

void spawner_free(struct spawner *spawner, struct run **left) {
    threads_stop(spawner);
    for (unsigned i = 0; i < spawner->thread_count; i++) {
        if (spawner->threads[i].stack)
            munmap(spawner->threads[i].stack, STACK_SIZE);
        pthread_mutex_destroy(&spawner->threads[i].lock);
    }
    for (struct run *run = spawner->done.first; run; run = run->next)
        if (run->pidfd >= 0) { /* started, but nobody was told */
            syscall(__NR_pidfd_send_signal, run->pidfd, SIGKILL, NULL, 0);
            reap(run);
        }
    if (spawner->done.last)
        spawner->done.last->next = spawner->queue.first;
    *left = spawner->done.first ? spawner->done.first : spawner->queue.first;
    if (spawner->eventfd >= 0)
        close(spawner->eventfd);
    pthread_cond_destroy(&spawner->wake);
    pthread_cond_destroy(&spawner->ready);
    pthread_mutex_destroy(&spawner->lock);
    free(spawner);
}
