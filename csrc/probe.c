/* Which system calls can be made here: the kernel may be too old, or a seccomp filter of an outer container may refuse.
 *
 * Each is made with arguments that it must refuse: whatever has it says so (mostly EINVAL), whatever lacks it says
 * ENOSYS, and a filter says ENOSYS or EPERM. Nothing happens either way. */
#include "spawner.h"
#include "sys.h"

#include <errno.h>

#ifndef __NR_landlock_create_ruleset
#define __NR_landlock_create_ruleset 444
#endif
#ifndef __NR_mount_setattr
#define __NR_mount_setattr 442
#endif

enum { LANDLOCK_VERSION = 1 }; /* LANDLOCK_CREATE_RULESET_VERSION: asks for the version of the interface */

static const struct {
    const char *name;
    long number;
    long arguments[5];
} probes[] = {
    {"clone3", __NR_clone3, {0, 0}}, /* no structure of that size */
    {"openat2", __NR_openat2, {-1, 0, 0, 0}},
    {"close_range", __NR_close_range, {1, 0, 0}}, /* the last before the first */
    {"open_tree", __NR_open_tree, {-1, 0, -1}},   /* no such flags */
    {"move_mount", __NR_move_mount, {-1, 0, -1, 0, -1}},
    {"mount_setattr", __NR_mount_setattr, {-1, 0, -1, 0, 0}},
    {"fsopen", __NR_fsopen, {0, -1}},
    {"fsconfig", __NR_fsconfig, {-1, -1, 0, 0, 0}},
    {"fsmount", __NR_fsmount, {-1, -1, 0}},
    {"pidfd_open", __NR_pidfd_open, {-1, 0}},
    {"pidfd_send_signal", __NR_pidfd_send_signal, {-1, 0, 0, -1}},
    {"keyctl", __NR_keyctl, {-1}}, /* no such operation */
    {"bpf", __NR_bpf, {-1, 0, 0}},
    {"landlock_create_ruleset", __NR_landlock_create_ruleset, {0, 0, LANDLOCK_VERSION}},
};

long system_call_probe(size_t index, const char **name) {
    if (index >= sizeof(probes) / sizeof(*probes)) {
        *name = NULL;
        return 0;
    }
    const long *arguments = probes[index].arguments;
    *name = probes[index].name;
    return sys_call(probes[index].number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4]);
}

int clone3_present(void) {
    const char *name;
    const long ret = system_call_probe(0, &name);
    return ret != -ENOSYS && ret != -EPERM;
}
